// SPDX-License-Identifier: MIT
#include "marks.h"

#include <string.h>
#include <sys/mman.h>

#include "sys.h"
#include "util.h"

enum { LEAF_SHIFT = 22 };

static uint32_t slot_of(const struct udd_marks *marks, uint32_t key)
{
	return (key * 2654435761U) & (marks->table_size - 1);
}

// Index of a leaf with all marks UDD_MARK_NONE, or UINT32_MAX.
static uint32_t take_leaf(struct udd_marks *marks)
{
	enum { BATCH = 64 };

	if (marks->free_count) {
		uint32_t leaf = marks->free_leaves[--marks->free_count];

		memset(marks->leaves[leaf], 0, sizeof(marks->leaves[leaf]));
		return leaf;
	}
	if (marks->leaf_count == marks->leaf_limit)
		return UINT32_MAX;
	if (marks->leaf_count % BATCH == 0) {
		uint32_t batch = (uint32_t)udd_min(BATCH, marks->leaf_limit - marks->leaf_count);

		if (udd_failed(udd_sys(SYS_mprotect, marks->leaves[marks->leaf_count], batch * sizeof(marks->leaves[0]),
				       PROT_READ | PROT_WRITE)))
			return UINT32_MAX;
	}
	return marks->leaf_count++;
}

uint32_t *udd_mark(struct udd_marks *marks, uint64_t address)
{
	uint32_t key = (uint32_t)(address >> LEAF_SHIFT) + 1;
	uint32_t slot = slot_of(marks, key);
	struct udd_leaf_key *entry;

	for (; marks->table[slot].key; slot = (slot + 1) & (marks->table_size - 1)) {
		if (marks->table[slot].key == key)
			break;
	}
	entry = &marks->table[slot];
	if (!entry->key) {
		uint32_t leaf = take_leaf(marks);

		if (leaf == UINT32_MAX)
			return NULL;
		*entry = (struct udd_leaf_key){.key = key, .leaf = leaf};
	}
	return &marks->leaves[entry->leaf][udd_pages(address) % UDD_LEAF_PAGES];
}

void udd_mark_set(struct udd_marks *marks, uint32_t *mark, uint32_t value)
{
	if (*mark == UDD_MARK_ZERO)
		marks->zero_pages--;
	if (value == UDD_MARK_ZERO)
		marks->zero_pages++;
	*mark = value;
}

// Takes a table entry out and closes the gap it leaves in its probe sequence.
static void remove_entry(struct udd_marks *marks, uint32_t slot)
{
	uint32_t mask = marks->table_size - 1;
	uint32_t hole = slot;

	for (uint32_t next = (slot + 1) & mask; marks->table[next].key; next = (next + 1) & mask) {
		uint32_t home = slot_of(marks, marks->table[next].key);

		if (((next - home) & mask) >= ((next - hole) & mask)) {
			marks->table[hole] = marks->table[next];
			hole = next;
		}
	}
	marks->table[hole] = (struct udd_leaf_key){0};
}

static void clear_outside(struct udd_marks *marks, uint32_t *leaf, uint64_t base, const struct udd_layout *layout)
{
	for (uint32_t i = 0; i < UDD_LEAF_PAGES; i++) {
		uint64_t address = base + udd_bytes(i);
		const struct udd_candidate *candidate;

		if (leaf[i] != UDD_MARK_ZERO)
			continue;
		candidate = udd_layout_find(layout, address);
		if (!candidate || candidate->start > address)
			udd_mark_set(marks, &leaf[i], UDD_MARK_NONE);
	}
}

void udd_marks_sweep(struct udd_marks *marks, const struct udd_layout *layout)
{
	for (uint32_t slot = 0; slot < marks->table_size;) {
		struct udd_leaf_key entry = marks->table[slot];
		uint64_t base = (uint64_t)(entry.key - 1) << LEAF_SHIFT;
		const struct udd_candidate *candidate;

		if (!entry.key) {
			slot++;
			continue;
		}
		clear_outside(marks, marks->leaves[entry.leaf], base, layout);
		candidate = udd_layout_find(layout, base);
		if (candidate && candidate->start < base + (1UL << LEAF_SHIFT)) {
			slot++;
			continue;
		}
		marks->free_leaves[marks->free_count++] = entry.leaf;
		// What moved into the gap is looked at in the next turn.
		remove_entry(marks, slot);
	}
}
