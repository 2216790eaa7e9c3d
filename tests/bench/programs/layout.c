// SPDX-License-Identifier: MIT
// layout RUNS RUN GAP SEED [mergeable|huge]: fills memory with RUNS stretches of RUN pages that every process with the same
// SEED has, each followed by GAP pages that nobody else has. mergeable: for KSM; huge: in transparent huge pages.
//
// fill           → filled START END, addresses in hexadecimal
// wait PAGES     → merged, once the agent says so
// verify         → same, if every byte is still what it was
#include "common.h"

enum {
	WAIT_SECONDS = 60,
	HUGE_PAGES = 512, // pages of a huge page
};

struct layout {
	char *memory;
	uint64_t runs;
	uint64_t run;
	uint64_t gap;
	uint64_t seed;
	uint64_t own_seed;
};

static void expected_page(const struct layout *layout, uint64_t number, char *ret)
{
	bool shared = number % (layout->run + layout->gap) < layout->run;

	fill_page(ret, shared ? layout->seed : layout->own_seed, number);
}

static uint64_t pages(const struct layout *layout)
{
	return layout->runs * (layout->run + layout->gap);
}

static char *map_huge(size_t pages)
{
	const uintptr_t huge = HUGE_PAGES * PAGE;
	char *memory = map_pages(pages + HUGE_PAGES);

	memory += -(uintptr_t)memory % huge;
	if (madvise(memory, pages * PAGE, MADV_HUGEPAGE))
		fail("madvise");
	return memory;
}

static void fill(struct layout *layout, const char *advice)
{
	bool huge = strcmp(advice, "huge") == 0;

	layout->memory = huge ? map_huge(pages(layout)) : map_pages(pages(layout));
	if (strcmp(advice, "mergeable") == 0 && madvise(layout->memory, pages(layout) * PAGE, MADV_MERGEABLE))
		fail("madvise");
	for (uint64_t i = 0; i < pages(layout); i++)
		expected_page(layout, i, layout->memory + i * PAGE);
	answer("filled %lx %lx", (unsigned long)layout->memory, (unsigned long)layout->memory + pages(layout) * PAGE);
}

static void verify(const struct layout *layout)
{
	static char expected[PAGE];

	for (uint64_t i = 0; i < pages(layout); i++) {
		expected_page(layout, i, expected);
		if (memcmp(expected, layout->memory + i * PAGE, PAGE) != 0) {
			answer("error page %lu has changed", i);
			exit(1);
		}
	}
	answer("same");
}

int main(int argc, char **argv)
{
	struct layout layout = {.own_seed = (uint64_t)getpid() << 32};
	char line[64];

	if (argc < 5) {
		answer("error usage: layout RUNS RUN GAP SEED [mergeable|huge]");
		return 2;
	}
	layout.runs = strtoull(argv[1], NULL, 10);
	layout.run = strtoull(argv[2], NULL, 10);
	layout.gap = strtoull(argv[3], NULL, 10);
	layout.seed = strtoull(argv[4], NULL, 10);
	while (fgets(line, sizeof(line), stdin)) {
		if (strcmp(line, "fill\n") == 0) {
			fill(&layout, argc > 5 ? argv[5] : "");
		} else if (strncmp(line, "wait ", 5) == 0) {
			if (!wait_merged(strtoull(line + 5, NULL, 10), WAIT_SECONDS)) {
				answer("error only %lu pages were merged", agent_stats().pages_merged);
				return 1;
			}
			answer("merged");
		} else if (strcmp(line, "verify\n") == 0) {
			verify(&layout);
		} else {
			answer("error unknown command");
			return 2;
		}
	}
	return 0;
}
