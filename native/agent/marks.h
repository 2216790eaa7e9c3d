// SPDX-License-Identifier: MIT
// What the linear scan remembers of each page: a 25-bit checksum, to tell pages that keep still from volatile ones (KSM's
// "oldchecksum"), at how many looks it was the same and how many rounds to pass the page over for it (KSM's "smart scan"), and
// whether the page was given to the kernel's zero page. At the first look at a page, or after it changed, the checksum is of a
// part of it only: most of what a look costs is to get the page out of memory. A page that has changed at every look of late is
// passed over as well: it would take up most of the rate in a busy program, and is not worth merging. 4 bytes a page, in leaves
// of 4 MiB of address space found through a small hash table. A leaf that finds no room is simply not remembered. The worker's
// own.
#ifndef UDD_MARKS_H
#define UDD_MARKS_H

#include <stdint.h>

#include "layout.h"
#include "util.h"

enum {
	UDD_MARK_NONE = 0, // never seen
	UDD_MARK_ZERO = 1, // left to the kernel's zero page
	UDD_MARK_MIN = 2,  // checksums start here
	UDD_MARK_CHANGES_SHIFT = 22, // where the checksum is of a part of the page, it ends here: looks that found it changed, 3 bits
	UDD_MARK_AGE_SHIFT = 25,   // above the checksum: looks that found it unchanged, 3 bits; 0: it is of a part of the page
	UDD_MARK_LOOKS_MAX = 7,
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

// So many low bits of a digest. What is small says something else.
static inline uint32_t udd_mark_checksum(uint64_t digest_low, uint32_t bits)
{
	uint32_t checksum = (uint32_t)(digest_low ^ digest_low >> 32) & ((1U << bits) - 1);

	return checksum < UDD_MARK_MIN ? UDD_MARK_MIN : checksum;
}

// The checksum of a page.
static inline uint32_t udd_mark_of(uint64_t digest_low)
{
	return udd_mark_checksum(digest_low, UDD_MARK_AGE_SHIFT);
}

// The checksum of a part of a page.
static inline uint32_t udd_mark_of_part(uint64_t digest_low)
{
	return udd_mark_checksum(digest_low, UDD_MARK_CHANGES_SHIFT);
}

static inline uint32_t udd_mark_age(uint32_t mark)
{
	return mark >> UDD_MARK_AGE_SHIFT & UDD_MARK_LOOKS_MAX;
}

static inline bool udd_mark_has(uint32_t mark, uint32_t checksum)
{
	return (mark & ((1U << UDD_MARK_AGE_SHIFT) - 1)) == checksum;
}

// Of a mark that is of a part.
static inline bool udd_mark_has_part(uint32_t mark, uint32_t checksum)
{
	return (mark & ((1U << UDD_MARK_CHANGES_SHIFT) - 1)) == checksum;
}

// Rounds to pass over a page that was found as it was, or was not, at so many looks one after the other.
static inline uint32_t udd_mark_skips_after(uint32_t looks)
{
	static const uint8_t skips[UDD_MARK_LOOKS_MAX + 1] = {0, 0, 0, 1, 2, 4, 8, 8};

	return (uint32_t)skips[looks] << UDD_MARK_SKIPS_SHIFT;
}

// The mark after a look at a whole page of this checksum that found it unchanged.
static inline uint32_t udd_mark_after(uint32_t mark, uint32_t checksum)
{
	uint32_t age = udd_mark_has(mark, checksum) ? (uint32_t)udd_min(udd_mark_age(mark) + 1, UDD_MARK_LOOKS_MAX) : 1;

	return checksum | age << UDD_MARK_AGE_SHIFT | udd_mark_skips_after(age);
}

// The mark of a page that is new, or was found changed, with the checksum of its part.
static inline uint32_t udd_mark_after_change(uint32_t mark, uint32_t checksum)
{
	uint32_t before = udd_mark_age(mark) ? 0 : mark >> UDD_MARK_CHANGES_SHIFT & UDD_MARK_LOOKS_MAX;
	uint32_t changes = mark < UDD_MARK_MIN ? 0 : (uint32_t)udd_min(before + 1, UDD_MARK_LOOKS_MAX);

	return checksum | changes << UDD_MARK_CHANGES_SHIFT | udd_mark_skips_after(changes);
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
