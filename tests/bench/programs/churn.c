// SPDX-License-Identifier: MIT
// churn ROUNDS: a program that lives on malloc and mmap. Prints the CPU time it took, ns, its agent's included.
//
// Small blocks are most of it, as in most programs; large ones are mapped by malloc, and grow by mremap; areas of its own
// are mapped, written, protected, partly discarded and unmapped.
#include <malloc.h>

#include "common.h"

enum {
	SLOTS = 4096,
	SMALL_PER_LARGE = 256, // in a thousand operations of real programs a handful reach the kernel
	LARGE_SLOTS = 16,
	AREA_PAGES = 64,
};

static char *small[SLOTS];
static char *large[LARGE_SLOTS];

static void one_small(uint64_t number)
{
	size_t bytes = 16 + (number >> 16) % 1008;
	char **slot = &small[number % SLOTS];

	free(*slot);
	*slot = malloc(bytes);
	if (!*slot)
		fail("malloc");
	memset(*slot, (int)number, bytes);
}

static void one_large(uint64_t number)
{
	char **slot = &large[number % LARGE_SLOTS];
	size_t bytes = (128 + (number >> 16) % 256) << 10;

	*slot = realloc(*slot, bytes);
	if (!*slot)
		fail("realloc");
	memset(*slot, (int)number, bytes);
}

static void one_area(uint64_t number)
{
	char *area = map_pages(AREA_PAGES);

	memset(area, (int)number, AREA_PAGES * PAGE);
	if (mprotect(area, AREA_PAGES / 2 * PAGE, PROT_READ) || madvise(area + AREA_PAGES / 2 * PAGE, PAGE, MADV_DONTNEED) ||
	    munmap(area, AREA_PAGES * PAGE))
		fail("an area");
}

int main(int argc, char **argv)
{
	uint64_t state = 88172645463325252;
	char line[64];
	uint64_t rounds;

	if (argc != 2) {
		answer("error usage: churn ROUNDS");
		return 2;
	}
	rounds = strtoull(argv[1], NULL, 10);
	// Without this the threshold rises, and nothing is mapped after a while.
	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t started = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);

		for (uint64_t i = 0; i < rounds; i++) {
			for (unsigned j = 0; j < SMALL_PER_LARGE; j++)
				one_small(next_random(&state));
			one_large(next_random(&state));
			one_area(next_random(&state));
		}
		answer("%lu", nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - started);
	}
	return 0;
}
