// SPDX-License-Identifier: MIT
// breaks PAGES: what do writes to merged pages cost, and writes to the kernel's own copy-on-write pages?
//
// map SEED RUN → mapped; two areas with equal content, PAGES each, one page of their own after every RUN pages (0: none),
//                and a private mapping of a memfd of as many pages
// wait         → merged, once both areas are
// scattered N  → NS NS NS NS; N single pages in random order: time per write to the memfd's, to the merged ones; likewise
//                of the first BATCH ones alone, before the agent takes them for a storm
// sequential   → NS NS; all pages overwritten in order, as far as they lie in one area: likewise
// unmap        → unmapped
#include <fcntl.h>

#include "common.h"

enum {
	WAIT_SECONDS = 60,
	BATCH = 32, // writes timed together
};

struct areas {
	uint64_t pages;  // equal ones in each area
	uint64_t run;    // 0: all of them
	uint64_t room;   // pages of an area, with what lies between
	char *merged[2]; // equal content
	char *kernel;    // private mapping of a memfd
	int pagemap;
};

// Where equal page `number` lies in an area.
static char *page_at(const struct areas *areas, char *area, uint64_t number)
{
	return area + (areas->run ? number + number / areas->run : number) * PAGE;
}

static void map_areas(struct areas *areas, uint64_t seed, uint64_t run)
{
	int fd = memfd_create("bench", MFD_CLOEXEC);
	volatile char sum = 0;

	areas->run = run;
	areas->room = areas->pages + (run ? areas->pages / run : 0);
	if (fd < 0 || ftruncate(fd, (off_t)(areas->room * PAGE)))
		fail("memfd");
	// First, hence highest: anonymous memory right above a file's mapping passes for .bss, which is left alone.
	areas->kernel = mmap(NULL, areas->room * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	if (areas->kernel == MAP_FAILED)
		fail("mmap");
	for (int i = 0; i < 2; i++) {
		areas->merged[i] = map_pages(areas->room);
		for (uint64_t page = 0; page < areas->room; page++)
			fill_page(areas->merged[i] + page * PAGE, (seed + 1) << 8 | (uint64_t)(i + 1), page);
		for (uint64_t page = 0; page < areas->pages; page++)
			fill_page(page_at(areas, areas->merged[i], page), (seed + 1) << 8, page);
	}
	if (pwrite(fd, areas->merged[0], areas->room * PAGE, 0) != (ssize_t)(areas->room * PAGE))
		fail("pwrite");
	close(fd);
	// Present and read-only, like merged pages: only the copy is to be measured.
	for (uint64_t page = 0; page < areas->room; page++)
		sum += areas->kernel[page * PAGE];
	answer("mapped");
}

// Is every equal page a file's by now? The agent's own count would include pages elsewhere, which come and go.
static bool all_merged(const struct areas *areas)
{
	const uint64_t file_page = 1UL << 61; // see the kernel's Documentation/admin-guide/mm/pagemap.rst
	uint64_t entry;

	for (int i = 0; i < 2; i++) {
		for (uint64_t page = 0; page < areas->pages; page++) {
			uintptr_t address = (uintptr_t)page_at(areas, areas->merged[i], page);

			if (pread(areas->pagemap, &entry, sizeof(entry), (off_t)(address / PAGE * sizeof(entry))) != sizeof(entry))
				fail("pagemap");
			if (!(entry & file_page))
				return false;
		}
	}
	return true;
}

static bool wait_all_merged(const struct areas *areas)
{
	uint64_t end = nanoseconds(CLOCK_MONOTONIC) + WAIT_SECONDS * 1000000000UL;

	while (!all_merged(areas)) {
		if (nanoseconds(CLOCK_MONOTONIC) > end)
			return false;
		nap(10000);
	}
	return true;
}

static void unmap_areas(const struct areas *areas)
{
	munmap(areas->merged[0], areas->room * PAGE);
	munmap(areas->merged[1], areas->room * PAGE);
	munmap(areas->kernel, areas->room * PAGE);
	answer("unmapped");
}

static int by_value(const void *a, const void *b)
{
	double left = *(const double *)a;
	double right = *(const double *)b;

	return (left > right) - (left < right);
}

// Median over batches: a batch in which somebody else had the processor does not count.
static double median(double *values, size_t count)
{
	qsort(values, count, sizeof(*values), by_value);
	return values[count / 2];
}

// Time per page, ns, of `count` writes of `bytes` bytes at the pages whose numbers are given.
static double time_writes(const struct areas *areas, char *area, const uint64_t *numbers, uint64_t count, size_t bytes,
			  double *first)
{
	double times[count / BATCH];

	for (uint64_t batch = 0; batch < count / BATCH; batch++) {
		uint64_t started = nanoseconds(CLOCK_MONOTONIC);

		for (uint64_t i = batch * BATCH; i < (batch + 1) * BATCH; i++)
			memset(page_at(areas, area, numbers[i]), 1, bytes);
		times[batch] = (double)(nanoseconds(CLOCK_MONOTONIC) - started) / BATCH;
	}
	*first = times[0];
	return median(times, count / BATCH);
}

static void scattered(const struct areas *areas, uint64_t count)
{
	uint64_t *numbers = malloc(areas->pages * sizeof(*numbers));
	uint64_t state = 88172645463325252;
	double kernel_first;
	double merged_first;
	double kernel;
	double merged;

	for (uint64_t i = 0; i < areas->pages; i++)
		numbers[i] = i;
	for (uint64_t i = areas->pages - 1; i > 0; i--) {
		uint64_t other = next_random(&state) % (i + 1);
		uint64_t swapped = numbers[i];

		numbers[i] = numbers[other];
		numbers[other] = swapped;
	}
	kernel = time_writes(areas, areas->kernel, numbers, count, sizeof(uint64_t), &kernel_first);
	merged = time_writes(areas, areas->merged[0], numbers, count, sizeof(uint64_t), &merged_first);
	free(numbers);
	answer("%f %f %f %f", kernel, merged, kernel_first, merged_first);
}

// As a whole, without medians: the handler takes many pages at a time, so most batches would cost nothing.
static double time_overwrite(const struct areas *areas, char *area)
{
	uint64_t started = nanoseconds(CLOCK_MONOTONIC);

	for (uint64_t i = 0; i < areas->pages; i++)
		memset(page_at(areas, area, i), 1, PAGE);
	return (double)(nanoseconds(CLOCK_MONOTONIC) - started) / (double)areas->pages;
}

int main(int argc, char **argv)
{
	struct areas areas = {0};
	char line[64];
	unsigned long number;
	unsigned long run;

	if (argc != 2) {
		answer("error usage: breaks PAGES");
		return 2;
	}
	areas.pages = strtoull(argv[1], NULL, 10);
	areas.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (areas.pagemap < 0)
		fail("pagemap");
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "map %lu %lu", &number, &run) == 2) {
			map_areas(&areas, number, run);
		} else if (strcmp(line, "wait\n") == 0) {
			if (!wait_all_merged(&areas)) {
				answer("error not all was merged, only %lu pages", agent_stats().pages_merged);
				return 1;
			}
			answer("merged");
		} else if (sscanf(line, "scattered %lu", &number) == 1) {
			scattered(&areas, number);
		} else if (strcmp(line, "sequential\n") == 0) {
			double kernel = time_overwrite(&areas, areas.kernel);

			answer("%f %f", kernel, time_overwrite(&areas, areas.merged[0]));
		} else if (strcmp(line, "unmap\n") == 0) {
			unmap_areas(&areas);
		} else {
			answer("error unknown command");
			return 2;
		}
	}
	return 0;
}
