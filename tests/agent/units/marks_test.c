// SPDX-License-Identifier: MIT
// Marks against a plain array of leaves; the hash table is small, so that its probe sequences are long and wrap around.
#include <string.h>
#include <sys/mman.h>

#include "agent/agent.h"
#include "agent/marks.h"
#include "unit.h"

struct udd_agent udd_agent; // layout.c counts the runs it finds there

enum { LEAVES = 100, KEYS = 160, STEPS = 300000, LEAF_SHIFT = 22 };

struct model_leaf {
	uint64_t base;
	bool used;
	uint32_t marks[UDD_LEAF_PAGES];
};

static struct model_leaf model[KEYS];
static struct udd_marks marks;
static struct udd_layout layout;

static uint32_t used_leaves(void)
{
	uint32_t used = 0;

	for (int i = 0; i < KEYS; i++)
		used += model[i].used;
	return used;
}

static void check_zero_count(void)
{
	uint64_t zero = 0;

	for (int i = 0; i < KEYS; i++) {
		for (int page = 0; model[i].used && page < UDD_LEAF_PAGES; page++)
			zero += model[i].marks[page] == UDD_MARK_ZERO;
	}
	check(zero == marks.zero_pages);
}

static void touch(uint64_t *random)
{
	struct model_leaf *leaf = &model[random_below(random, KEYS)];
	uint32_t page = (uint32_t)random_below(random, UDD_LEAF_PAGES);
	uint32_t value = (uint32_t)random_below(random, 4);
	uint32_t *mark = udd_mark(&marks, leaf->base + udd_bytes(page) + random_below(random, UDD_PAGE_SIZE));

	if (!leaf->used && used_leaves() == LEAVES) {
		check(!mark);
		return;
	}
	check(mark);
	leaf->used = true;
	check(*mark == leaf->marks[page]);
	udd_mark_set(&marks, mark, value);
	leaf->marks[page] = value;
}

static bool in_candidates(uint64_t start, uint64_t end)
{
	for (uint32_t i = 0; i < layout.count; i++) {
		if (layout.candidates[i].start < end && start < layout.candidates[i].end)
			return true;
	}
	return false;
}

static int by_address(const void *a, const void *b)
{
	const struct model_leaf *left = a;
	const struct model_leaf *right = b;

	return left->base < right->base ? -1 : left->base > right->base;
}

// Some leaves keep a candidate, which may reach over part of them only.
static void sweep(uint64_t *random)
{
	layout.count = 0;
	for (int i = 0; i < KEYS; i++) {
		uint64_t from = random_below(random, UDD_LEAF_PAGES);
		uint64_t pages = 1 + random_below(random, UDD_LEAF_PAGES - from);

		if (random_below(random, 3) == 0)
			continue;
		layout.candidates[layout.count++] =
			(struct udd_candidate){.start = model[i].base + udd_bytes(from),
					       .end = model[i].base + udd_bytes(from + pages)};
	}
	udd_marks_sweep(&marks, &layout);
	for (int i = 0; i < KEYS; i++) {
		struct model_leaf *leaf = &model[i];

		if (!in_candidates(leaf->base, leaf->base + (1UL << LEAF_SHIFT))) {
			leaf->used = false;
			memset(leaf->marks, 0, sizeof(leaf->marks));
			continue;
		}
		for (uint32_t page = 0; page < UDD_LEAF_PAGES; page++) {
			uint64_t at = leaf->base + udd_bytes(page);

			if (leaf->marks[page] == UDD_MARK_ZERO && !in_candidates(at, at + 1))
				leaf->marks[page] = UDD_MARK_NONE;
		}
	}
	check_zero_count();
}

static void check_all(void)
{
	for (int i = 0; i < KEYS; i++) {
		for (uint32_t page = 0; model[i].used && page < UDD_LEAF_PAGES; page++)
			check(*udd_mark(&marks, model[i].base + udd_bytes(page)) == model[i].marks[page]);
	}
}

// A page is passed over ever longer while it stays the same, 8 rounds at most, and not at all once it changes.
static void ages(void)
{
	static const uint32_t expected[] = {0, 1, 2, 4, 8, 8, 8, 8};
	uint32_t checksum = udd_mark_of(0x1234567800000000);
	uint32_t mark = udd_mark_after(UDD_MARK_NONE, checksum);

	check(udd_mark_age(checksum) == 0 && udd_mark_age(mark) == 1);
	check(udd_mark_has(mark, checksum) && udd_mark_skips(mark) == 0 && !udd_mark_skip(&mark));
	for (size_t look = 0; look < sizeof(expected) / sizeof(expected[0]); look++) {
		mark = udd_mark_after(mark, checksum);
		check(udd_mark_has(mark, checksum));
		check(udd_mark_skips(mark) == expected[look]);
		for (uint32_t round = 0; round < expected[look]; round++)
			check(udd_mark_skip(&mark));
		check(!udd_mark_skip(&mark) && udd_mark_has(mark, checksum));
	}
	mark = udd_mark_after(mark, udd_mark_of(1));
	check(udd_mark_has(mark, udd_mark_of(1)) && udd_mark_skips(mark) == 0);
}

int main(int argc, char **argv)
{
	size_t bytes = LEAVES * sizeof(marks.leaves[0]);
	uint64_t random;

	check(argc == 2);
	random = strtoull(argv[1], NULL, 0);
	marks.leaf_limit = LEAVES;
	marks.table_size = 256;
	marks.table = calloc(marks.table_size, sizeof(*marks.table));
	marks.free_leaves = calloc(LEAVES, sizeof(*marks.free_leaves));
	marks.leaves = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	layout.candidates = calloc(KEYS, sizeof(*layout.candidates));
	// All over the address space, two of three next to each other.
	for (int i = 0; i < KEYS; i++)
		model[i].base = i % 3 ? model[i - 1].base + (1UL << LEAF_SHIFT)
				      : (uint64_t)i << 36 | random_below(&random, 1 << 12) << LEAF_SHIFT;
	qsort(model, KEYS, sizeof(model[0]), by_address);
	for (int step = 0; step < STEPS; step++) {
		touch(&random);
		if (step % 2000 == 1999) {
			sweep(&random);
			check_all();
		}
	}
	check_zero_count();
	// A checksum never looks like one of the two special marks.
	check(udd_mark_of(0) >= UDD_MARK_MIN && udd_mark_of(1) >= UDD_MARK_MIN && udd_mark_of(1UL << 32) >= UDD_MARK_MIN);
	// Both halves of the word count, and what lies above the checksum stays free for age and skips.
	check(udd_mark_of(0x1234567800000000) == (0x12345678 & ((1U << UDD_MARK_AGE_SHIFT) - 1)));
	check(udd_mark_of(0x1234567800000000) != udd_mark_of(0x1234567900000000));
	check(udd_mark_of(UINT64_MAX >> 32) >> UDD_MARK_AGE_SHIFT == 0);
	ages();
	munmap(marks.leaves, bytes);
	free(marks.table);
	free(marks.free_leaves);
	free(layout.candidates);
	return 0;
}
