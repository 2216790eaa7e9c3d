// SPDX-License-Identifier: MIT
// huge EQUAL ZERO: fills HUGE_PAGES huge pages. In each, EQUAL pages have the same content in every process that runs this,
// ZERO more are all zero, and the others are this process's own; all mixed. Says "filled START END" (hexadecimal), and on a line
// of input checks every byte.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	PAGES = 512, // of a huge page
	HUGE_PAGES = 8,
	STRIDE = 211, // prime, so that place × STRIDE goes through all pages
};

static void expected(unsigned char *page, unsigned number, unsigned equal, unsigned zero)
{
	// By place 0 … 511 in its huge page, shuffled: equal ones first, then zero ones.
	unsigned place = number % PAGES * STRIDE % PAGES;
	uint64_t *words = (uint64_t *)page;

	memset(page, 0, PAGE);
	if (place >= equal && place < equal + zero)
		return;
	for (unsigned i = 0; i < PAGE / sizeof(*words); i++)
		words[i] = (number + 1) * 0x9e3779b97f4a7c15 ^ (place < equal ? 0 : (uint64_t)getpid() << 32);
}

int main(int argc, char **argv)
{
	const size_t huge = (size_t)PAGES * PAGE, size = HUGE_PAGES * huge;
	static unsigned char wanted[PAGE];
	unsigned equal = argc > 1 ? (unsigned)atoi(argv[1]) : 0, zero = argc > 2 ? (unsigned)atoi(argv[2]) : 0;
	unsigned char *memory = mmap(NULL, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return 2;
	memory += -(uintptr_t)memory % huge;
	if (madvise(memory, size, MADV_HUGEPAGE))
		return 2;
	for (unsigned i = 0; i < HUGE_PAGES * PAGES; i++)
		expected(memory + (size_t)i * PAGE, i, equal, zero);
	printf("filled %lx %lx\n", (unsigned long)memory, (unsigned long)(memory + size));
	fflush(stdout);
	getchar();
	for (unsigned i = 0; i < HUGE_PAGES * PAGES; i++) {
		expected(wanted, i, equal, zero);
		if (memcmp(wanted, memory + (size_t)i * PAGE, PAGE) != 0) {
			fprintf(stderr, "page %u has changed\n", i);
			return 1;
		}
	}
	return 0;
}
