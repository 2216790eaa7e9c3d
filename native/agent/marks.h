// SPDX-License-Identifier: MIT
// What the linear scan remembers of each page: a 25-bit checksum, to tell pages that keep still from volatile ones (KSM's
// "oldchecksum"), at how many looks it was the same and how many rounds to pass the page over for it (KSM's "smart scan"), and
// whether the page was given to the kernel's zero page. At the first look at a page, or after it changed, the checksum is of a
// part of it only: most of what a look costs is to get the page out of memory. 4 bytes a page, in leaves of 4 MiB of address
// space found through a small hash table. A leaf that finds no room is simply not remembered. The worker's own.
#ifndef UDD_MARKS_H
#define UDD_MARKS_H

#include <stdint.h>

#include "layout.h"
#include "util.h"

enum {
	UDD_MARK_NONE = 0, // never seen
	UDD_MARK_ZERO = 1, // left to the kernel's zero page
	UDD_MARK_MIN = 2,  // checksums start here
	UDD_MARK_AGE_SHIFT = 25,   // above the checksum: looks that found it unchanged, 3 bits; 0: it is of a part of the page
	UDD_MARK_AGE_MAX = 7,
	UDD_MARK_SKIPS_SHIFT = 28, // above that: rounds to pass it over, 4 bits

	UDD_LEAF_PAGES = 1024,
};

struct udd_leaf_key {
	uint32_t key;  // address >> 22, + 1; 0 = free
	uint32_t leaf; // index
};

struct udd_marks {
	struct udd_leaf_key *table; // open addressing
	uint32_t (*leaves)[UDD_LEAF_PAGES];
	uint32_t table_size;        // power of two, twice leaf_limit or more
	uint32_t leaf_count;        // leaves backed by memory
	uint32_t leaf_limit;
	uint32_t *free_leaves;      // stack of given-back leaves
	uint32_t free_count;
	uint64_t zero_pages;        // marks that are UDD_MARK_ZERO
};

// Where the mark of the page at `address` is; NULL if there is no room.
uint32_t *udd_mark(struct udd_marks *marks, uint64_t address);
// Changes a mark and keeps count of zero pages.
void udd_mark_set(struct udd_marks *marks, uint32_t *mark, uint32_t value);
// Forgets leaves that no candidate reaches into any more.
void udd_marks_sweep(struct udd_marks *marks, const struct udd_layout *layout);

// The checksum of a page or a part of it.
static inline uint32_t udd_mark_of(uint64_t digest_low)
{
	uint32_t mark = (uint32_t)(digest_low ^ digest_low >> 32) & ((1U << UDD_MARK_AGE_SHIFT) - 1);

	return mark < UDD_MARK_MIN ? UDD_MARK_MIN : mark;
}

static inline bool udd_mark_has(uint32_t mark, uint32_t checksum)
{
	return (mark & ((1U << UDD_MARK_AGE_SHIFT) - 1)) == checksum;
}

static inline uint32_t udd_mark_age(uint32_t mark)
{
	return mark >> UDD_MARK_AGE_SHIFT & UDD_MARK_AGE_MAX;
}

// The mark after a look at a whole page of this checksum that found it unchanged: the longer, the more rounds it is passed over.
static inline uint32_t udd_mark_after(uint32_t mark, uint32_t checksum)
{
	static const uint8_t skips[UDD_MARK_AGE_MAX + 1] = {0, 0, 0, 1, 2, 4, 8, 8};
	uint32_t age = udd_mark_has(mark, checksum) ? (uint32_t)udd_min(udd_mark_age(mark) + 1, UDD_MARK_AGE_MAX) : 1;

	return checksum | age << UDD_MARK_AGE_SHIFT | (uint32_t)skips[age] << UDD_MARK_SKIPS_SHIFT;
}

// Rounds that the page is still passed over.
static inline uint32_t udd_mark_skips(uint32_t mark)
{
	return mark >> UDD_MARK_SKIPS_SHIFT;
}

// Whether the page is passed over this round; takes that round off.
static inline bool udd_mark_skip(uint32_t *mark)
{
	if (!udd_mark_skips(*mark))
		return false;
	*mark -= 1U << UDD_MARK_SKIPS_SHIFT;
	return true;
}

#endif
