// SPDX-License-Identifier: MIT
// What pages contain. Most contents come from a fixed pool, so that pages are equal within a thread, between threads and
// between instances; the rest are zero, unique, or equal to a page of the pool except for one byte.
#include <string.h>

#include "torture.h"

unsigned char *data;

static uint64_t splitmix(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static void fill(unsigned char *page, uint64_t seed)
{
	for (size_t i = 0; i < PAGE; i += sizeof(seed)) {
		uint64_t word = splitmix(&seed);

		memcpy(page + i, &word, sizeof(word));
	}
}

// The pool is the same in every instance and on every run: its seeds are the page numbers. Beyond the pool the data file
// holds the pool again in another order, some zero pages, and pages that nothing else contains.
void content_init(void)
{
	data = shared_allocate((size_t)DATA_PAGES * PAGE);
	for (unsigned int i = 0; i < DATA_PAGES; i++) {
		unsigned char *page = data + (size_t)i * PAGE;

		if (i >= POOL_PAGES && i % 16 == 0)
			memset(page, 0, PAGE);
		else if (i >= POOL_PAGES && i < 3 * POOL_PAGES)
			memcpy(page, data + (size_t)((i * 5) % POOL_PAGES) * PAGE, PAGE);
		else
			fill(page, (uint64_t)i << 32);
	}
}

uint64_t draw(struct worker *w)
{
	return splitmix(&w->random);
}

unsigned int below(struct worker *w, unsigned int limit)
{
	return (unsigned int)(((draw(w) >> 32) * limit) >> 32);
}

bool chance(struct worker *w, unsigned int one_in)
{
	return below(w, one_in) == 0;
}

bool sabotaged(struct worker *w, enum sabotage kind)
{
	return options.sabotage == kind && chance(w, 2);
}

bool is_zero(const void *page)
{
	const unsigned char *bytes = page;

	return bytes[0] == 0 && memcmp(bytes, bytes + 1, PAGE - 1) == 0;
}

void compose(struct worker *w, unsigned char *pages, unsigned int count)
{
	unsigned int style = below(w, 20);
	unsigned int start = below(w, POOL_PAGES);

	for (unsigned int i = 0; i < count; i++) {
		unsigned char *page = pages + (size_t)i * PAGE;

		if (style < 2) {
			memset(page, 0, PAGE);
		} else if (style < 4) {
			fill(page, draw(w));
		} else if (style < 7) { // equal except for one byte
			memcpy(page, data + (size_t)(start % POOL_PAGES) * PAGE, PAGE);
			page[below(w, PAGE)] ^= 1u << below(w, 8);
		} else if (style < 10) { // one page again and again
			memcpy(page, data + (size_t)(start % 8) * PAGE, PAGE);
		} else { // a run of the pool
			memcpy(page, data + (size_t)((start + i) % POOL_PAGES) * PAGE, PAGE);
		}
	}
}
