// SPDX-License-Identifier: MIT
// probe PAGES: what does the time of a write tell about memory that one can't read?
//
// In the manner of the attacks on memory deduplication (Suzaki et al., EuroSec 2011; Bosman et al., S&P 2016): put a guess into a
// page, wait until the machine has looked at it, time one write to it. Right guesses and wrong ones lie in one area in random
// order and are written to in another random order, so that whatever drifts hits both alike.
//
// hold SEED         → held; PAGES pages of content that SEED names, for others to guess
// guess SEED DRAW N → M; as many pages, one in N of them (drawn by DRAW, M in all) with that content, the others with content that
//                     nobody has
// merged            → N; how many of them are a file's to the kernel now, that is, mapped to a store
// write             → WORD …; each page's time in ns, with a + before it for a right guess
// advise SEED DRAW N → WORD …; N times: two equal pages are hinted at; how long it takes until they are merged, likewise
// drop              → dropped
#include <fcntl.h>
#include <x86intrin.h>

#include "../bench/programs/common.h"

enum {
	WAIT_SECONDS = 20,
	CALIBRATION_NS = 20000000,
	DRAWN = 1 << 20, // seeds above are for content that nobody has
};

struct area {
	uint64_t pages;
	char *start;
	bool *right;
};

static struct area area_create(uint64_t pages)
{
	return (struct area){.pages = pages, .start = map_pages(pages), .right = calloc(pages, sizeof(bool))};
}

static void area_destroy(struct area *area)
{
	munmap(area->start, area->pages * PAGE);
	free(area->right);
	*area = (struct area){0};
}

static char *page_of(const struct area *area, uint64_t number)
{
	return area->start + number * PAGE;
}

static uint64_t random_state(uint64_t draw)
{
	return (draw + 1) * 0x9E3779B97F4A7C15;
}

static struct area hold(uint64_t pages, uint64_t seed)
{
	struct area ret = area_create(pages);

	for (uint64_t i = 0; i < pages; i++)
		fill_page(page_of(&ret, i), seed, i);
	return ret;
}

static struct area guess(uint64_t pages, uint64_t seed, uint64_t draw, uint64_t odds)
{
	struct area ret = area_create(pages);
	uint64_t state = random_state(draw);

	for (uint64_t i = 0; i < pages; i++) {
		ret.right[i] = next_random(&state) % odds == 0;
		fill_page(page_of(&ret, i), ret.right[i] ? seed : DRAWN + draw, i);
	}
	return ret;
}

static uint64_t count_right(const struct area *area)
{
	uint64_t ret = 0;

	for (uint64_t i = 0; i < area->pages; i++)
		ret += area->right[i];
	return ret;
}

static uint64_t count_merged(const struct area *area)
{
	const uint64_t file_page = 1UL << 61; // see the kernel's Documentation/admin-guide/mm/pagemap.rst
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t ret = 0;

	for (uint64_t i = 0; i < area->pages; i++) {
		uint64_t entry;

		if (pread(pagemap, &entry, sizeof(entry), (off_t)((uintptr_t)page_of(area, i) / PAGE * sizeof(entry))) != sizeof(entry))
			fail("pagemap");
		ret += (entry & file_page) != 0;
	}
	close(pagemap);
	return ret;
}

// Cycles of the time stamp counter in a nanosecond.
static double cycles_per_ns(void)
{
	uint64_t began = nanoseconds(CLOCK_MONOTONIC);
	uint64_t cycles = __rdtsc();

	while (nanoseconds(CLOCK_MONOTONIC) < began + CALIBRATION_NS)
		;
	cycles = __rdtsc() - cycles;
	return (double)cycles / (double)(nanoseconds(CLOCK_MONOTONIC) - began);
}

static uint64_t cycles_of_write(char *page)
{
	volatile uint64_t *word = (volatile uint64_t *)page;
	uint64_t value = *word + 1; // reading first takes the TLB and the caches out of the measurement
	unsigned processor;
	uint64_t began;
	uint64_t ended;

	_mm_mfence();
	_mm_lfence();
	began = __rdtsc();
	_mm_lfence();
	*word = value;
	_mm_mfence();
	ended = __rdtscp(&processor);
	_mm_lfence();
	return ended - began;
}

static uint64_t *shuffled(uint64_t count, uint64_t *state)
{
	uint64_t *ret = malloc(count * sizeof(*ret));

	for (uint64_t i = 0; i < count; i++)
		ret[i] = i;
	for (uint64_t i = count - 1; i > 0; i--) {
		uint64_t other = next_random(state) % (i + 1);
		uint64_t swapped = ret[i];

		ret[i] = ret[other];
		ret[other] = swapped;
	}
	return ret;
}

static void print_time(bool right, double ns)
{
	printf("%s%.1f ", right ? "+" : "", ns);
}

static void write_all(const struct area *area)
{
	uint64_t state = random_state((uintptr_t)area->start);
	uint64_t *order = shuffled(area->pages, &state);
	uint64_t *cycles = calloc(area->pages, sizeof(*cycles));
	double per_ns = cycles_per_ns();

	for (uint64_t i = 0; i < area->pages; i++)
		cycles[order[i]] = cycles_of_write(page_of(area, order[i]));
	for (uint64_t i = 0; i < area->pages; i++)
		print_time(area->right[i], (double)cycles[i] / per_ns);
	answer("%s", "");
	free(cycles);
	free(order);
}

// Two equal pages at a time; half of the pairs have a content that is held elsewhere.
static void advise_all(uint64_t pages, uint64_t seed, uint64_t draw, uint64_t trials)
{
	int (*advise)(const void *, size_t);
	uint64_t state = random_state(draw);

	*(void **)&advise = dlsym(RTLD_DEFAULT, "udedup_advise");
	for (uint64_t trial = 0; trial < trials; trial++) {
		struct area area = area_create(2);
		uint64_t began;

		area.right[0] = next_random(&state) >> 63;
		for (uint64_t i = 0; i < area.pages; i++)
			fill_page(page_of(&area, i), area.right[0] ? seed : DRAWN + draw, trial % pages);
		began = nanoseconds(CLOCK_MONOTONIC);
		for (uint64_t i = 0; i < area.pages; i++)
			advise(page_of(&area, i), PAGE);
		while (count_merged(&area) < area.pages) {
			if (nanoseconds(CLOCK_MONOTONIC) > began + WAIT_SECONDS * 1000000000UL)
				fail("a hint had no effect");
			nap(50);
		}
		print_time(area.right[0], (double)(nanoseconds(CLOCK_MONOTONIC) - began));
		area_destroy(&area);
	}
	answer("%s", "");
}

int main(int argc, char **argv)
{
	struct area area = {0};
	char line[64];
	uint64_t pages;
	unsigned long seed;
	unsigned long draw;
	unsigned long odds;
	unsigned long trials;

	if (argc != 2) {
		answer("error usage: probe PAGES");
		return 2;
	}
	pages = strtoull(argv[1], NULL, 10);
	answer("ready");
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "hold %lu", &seed) == 1) {
			area = hold(pages, seed);
			answer("held");
		} else if (sscanf(line, "guess %lu %lu %lu", &seed, &draw, &odds) == 3 && odds) {
			area = guess(pages, seed, draw, odds);
			answer("%lu", count_right(&area));
		} else if (strcmp(line, "merged\n") == 0) {
			answer("%lu", count_merged(&area));
		} else if (strcmp(line, "write\n") == 0) {
			write_all(&area);
		} else if (sscanf(line, "advise %lu %lu %lu", &seed, &draw, &trials) == 3) {
			advise_all(pages, seed, draw, trials);
		} else if (strcmp(line, "drop\n") == 0) {
			area_destroy(&area);
			answer("dropped");
		} else {
			answer("error unknown command");
			return 2;
		}
	}
	return 0;
}
