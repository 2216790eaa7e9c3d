// SPDX-License-Identifier: MIT
// The hint stack: which pages have new content, newest first (XLH: stale hints are worth little, so what does not fit falls
// off the bottom).
//
// One entry is one page. A page hinted again moves to the top, so the stack never holds a page twice. Entries are a fixed array
// threaded by a doubly linked list (top to bottom) and found through a hash of their indices.
//
// Rings are written by application threads of agents that nobody vouches for: a head that jumps, lengths that overflow and
// slots that never get finished are all dealt with here, and one call's work is bounded by the size of the stack.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../common/digest.h"
#include "engine.h"

static const uint64_t ADDRESS_END = 1ULL << 47;
static const uint64_t HINT_ON_MOUNT = 1ULL << 63;
static const uint64_t OFFSET_UNKNOWN = UINT64_MAX;
// A slot found half written belongs to a thread that was descheduled, or killed: wait this long before passing over it.
static const uint64_t STUCK_NS = 5000000;
// A head further ahead than any program can have pushed between two looks.
static const uint64_t HEAD_JUMP_MAX = 1ULL << 40;
static const uint32_t NONE = UINT32_MAX;

struct entry {
	uint64_t key;         // agent number and page number; 0: free
	uint64_t nanoseconds;
	uint32_t image;       // index in images + 1; 0: none
	uint32_t block;
	uint32_t newer;       // towards the top
	uint32_t older;       // towards the bottom; of a free entry: the next free one
};

struct image {
	uint64_t inode; // 0: removed, free for another one
	const uint64_t *digests;
	uint64_t blocks;
};

struct udd_hints {
	struct entry *entries;
	uint32_t *buckets; // open addressing: index of an entry + 1, or 0
	uint32_t slots;
	uint32_t bucket_mask;
	uint32_t depth;
	uint32_t top;
	uint32_t bottom;
	uint32_t free;     // first of the entries that were given back
	uint32_t fresh;    // first entry that was never used: a stack that stays small costs no memory
	uint64_t overwritten;
	struct image *images;
	uint32_t image_count;
	struct udd_digest zero;
};

static uint64_t entry_key(uint32_t agent, uint64_t address)
{
	return (uint64_t)agent << 35 | address >> UDD_PAGE_SHIFT;
}

static uint32_t bucket_home(const struct udd_hints *hints, uint64_t key)
{
	return key * 0x9e3779b97f4a7c15ULL >> 32 & hints->bucket_mask;
}

static uint32_t bucket_find(const struct udd_hints *hints, uint64_t key)
{
	uint32_t i = bucket_home(hints, key);

	while (hints->buckets[i] && hints->entries[hints->buckets[i] - 1].key != key)
		i = (i + 1) & hints->bucket_mask;
	return i;
}

static void bucket_remove(struct udd_hints *hints, uint32_t hole)
{
	for (uint32_t i = (hole + 1) & hints->bucket_mask; hints->buckets[i]; i = (i + 1) & hints->bucket_mask) {
		uint32_t home = bucket_home(hints, hints->entries[hints->buckets[i] - 1].key);

		if (((hole - home) & hints->bucket_mask) <= ((i - home) & hints->bucket_mask)) {
			hints->buckets[hole] = hints->buckets[i];
			hole = i;
		}
	}
	hints->buckets[hole] = 0;
}

static void list_unlink(struct udd_hints *hints, uint32_t i)
{
	struct entry *entry = &hints->entries[i];

	if (entry->newer == NONE)
		hints->top = entry->older;
	else
		hints->entries[entry->newer].older = entry->older;
	if (entry->older == NONE)
		hints->bottom = entry->newer;
	else
		hints->entries[entry->older].newer = entry->newer;
}

static void list_put_on_top(struct udd_hints *hints, uint32_t i)
{
	struct entry *entry = &hints->entries[i];

	entry->newer = NONE;
	entry->older = hints->top;
	if (hints->top == NONE)
		hints->bottom = i;
	else
		hints->entries[hints->top].newer = i;
	hints->top = i;
}

static void entry_release(struct udd_hints *hints, uint32_t i)
{
	bucket_remove(hints, bucket_find(hints, hints->entries[i].key));
	list_unlink(hints, i);
	hints->entries[i].key = 0;
	hints->entries[i].older = hints->free;
	hints->free = i;
	hints->depth--;
}

// An unused entry; the oldest hint falls off for it if there is none.
static uint32_t entry_take(struct udd_hints *hints)
{
	if (hints->free == NONE && hints->fresh < hints->slots)
		return hints->fresh++;
	if (hints->free == NONE) {
		entry_release(hints, hints->bottom);
		hints->overwritten++;
	}
	uint32_t i = hints->free;

	hints->free = hints->entries[i].older;
	return i;
}

struct udd_hints *udd_hints_create(uint32_t slots)
{
	static const char zero_page[UDD_PAGE_SIZE];
	uint32_t buckets = 16;

	if (slots == 0 || slots > 1U << 28)
		return NULL;
	while (buckets < 2 * slots)
		buckets *= 2;
	struct udd_hints *hints = calloc(1, sizeof(*hints));

	if (!hints)
		return NULL;
	hints->entries = calloc(slots, sizeof(*hints->entries));
	hints->buckets = calloc(buckets, sizeof(*hints->buckets));
	if (!hints->entries || !hints->buckets) {
		udd_hints_destroy(hints);
		return NULL;
	}
	hints->slots = slots;
	hints->bucket_mask = buckets - 1;
	hints->top = hints->bottom = hints->free = NONE;
	hints->zero = udd_digest_page(zero_page);
	return hints;
}

void udd_hints_destroy(struct udd_hints *hints)
{
	free(hints->entries);
	free(hints->buckets);
	free(hints->images);
	free(hints);
}

uint32_t udd_hints_depth(const struct udd_hints *hints)
{
	return hints->depth;
}

uint64_t udd_hints_overwritten(const struct udd_hints *hints)
{
	return hints->overwritten;
}

static uint32_t image_find(const struct udd_hints *hints, uint64_t inode)
{
	for (uint32_t i = 0; i < hints->image_count; i++) {
		if (hints->images[i].inode == inode)
			return i + 1;
	}
	return 0;
}

int udd_hints_add_image(struct udd_hints *hints, uint64_t inode, const uint64_t *digests, uint64_t blocks)
{
	struct image added = {.inode = inode, .digests = digests, .blocks = blocks};
	uint32_t slot = image_find(hints, 0);

	if (slot) {
		hints->images[slot - 1] = added;
		return 0;
	}
	struct image *images = realloc(hints->images, (hints->image_count + 1) * sizeof(*images));

	if (!images)
		return -ENOMEM;
	images[hints->image_count++] = added;
	hints->images = images;
	return 0;
}

void udd_hints_remove_image(struct udd_hints *hints, uint64_t inode)
{
	uint32_t slot = image_find(hints, inode);

	if (!slot)
		return;
	for (uint32_t i = hints->top; i != NONE; i = hints->entries[i].older) {
		if (hints->entries[i].image == slot)
			hints->entries[i].image = 0;
	}
	hints->images[slot - 1] = (struct image){0};
}

static void hints_push_page(struct udd_hints *hints, uint32_t agent, uint64_t address, uint32_t image, uint64_t block,
			    uint64_t nanoseconds)
{
	uint64_t key = entry_key(agent, address);
	uint32_t bucket = bucket_find(hints, key);
	uint32_t i;

	if (hints->buckets[bucket]) {
		i = hints->buckets[bucket] - 1;
		list_unlink(hints, i);
	} else {
		i = entry_take(hints);
		hints->buckets[bucket_find(hints, key)] = i + 1;
		hints->depth++;
	}
	struct entry *entry = &hints->entries[i];

	entry->key = key;
	entry->nanoseconds = nanoseconds;
	entry->image = image && block < hints->images[image - 1].blocks && block <= UINT32_MAX ? image : 0;
	entry->block = (uint32_t)block;
	list_put_on_top(hints, i);
}

int64_t udd_hints_push(struct udd_hints *hints, uint32_t agent, uint64_t address, uint64_t length, uint64_t inode,
		       uint64_t offset, uint64_t nanoseconds)
{
	if (agent == 0 || agent >= UDD_AGENT_NUMBERS || address >= ADDRESS_END || length > ADDRESS_END - address)
		return -EINVAL;
	uint64_t first = (address + UDD_PAGE_SIZE - 1) >> UDD_PAGE_SHIFT;
	uint64_t end = (address + length) >> UDD_PAGE_SHIFT;

	if (first >= end)
		return 0;
	// Only the last ones would stay.
	if (end - first > hints->slots) {
		hints->overwritten += end - first - hints->slots;
		first = end - hints->slots;
	}
	uint64_t skipped = (first << UDD_PAGE_SHIFT) - address;
	uint32_t image = 0;

	if (inode && offset != OFFSET_UNKNOWN && offset <= INT64_MAX && (offset + skipped) % UDD_PAGE_SIZE == 0)
		image = image_find(hints, inode);
	for (uint64_t page = first; page < end; page++) {
		uint64_t block = (offset + skipped + ((page - first) << UDD_PAGE_SHIFT)) >> UDD_PAGE_SHIFT;

		hints_push_page(hints, agent, page << UDD_PAGE_SHIFT, image, block, nanoseconds);
	}
	return end - first;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

// 1: taken; 0: being written; -1: overwritten.
static int ring_read(struct udd_hint_ring *ring, uint64_t ticket, struct udd_hint *ret)
{
	struct udd_hint *slot = &ring->slots[ticket % UDD_HINT_SLOTS];
	uint64_t before = __atomic_load_n(&slot->sequence, __ATOMIC_ACQUIRE);

	if (before != ticket + 1)
		return before > ticket + 1 ? -1 : 0;
	memcpy(ret, slot, sizeof(*ret));
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	return __atomic_load_n(&slot->sequence, __ATOMIC_RELAXED) == before ? 1 : -1;
}

int udd_hints_drain(struct udd_hints *hints, uint32_t agent, struct udd_hint_ring *ring, struct udd_hint_reader *reader,
		    int arm, struct udd_drain_counts *ret)
{
	uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
	uint64_t ahead = head - reader->tail;
	uint64_t pages = 0;

	if (ahead > HEAD_JUMP_MAX)
		return -EPROTO;
	if (ahead > UDD_HINT_SLOTS) {
		ret->dropped += ahead - UDD_HINT_SLOTS;
		reader->tail = head - UDD_HINT_SLOTS;
		reader->stuck_since = 0;
	}
	for (; reader->tail != head; reader->tail++) {
		struct udd_hint hint;
		int taken = ring_read(ring, reader->tail, &hint);

		if (taken == 0) {
			uint64_t now = now_ns();

			if (reader->stuck_since == 0)
				reader->stuck_since = now;
			if (now - reader->stuck_since < STUCK_NS)
				break;
		}
		reader->stuck_since = 0;
		if (taken != 1 || pages >= hints->slots) {
			ret->dropped++;
			continue;
		}
		int64_t pushed = udd_hints_push(hints, agent, hint.address, hint.length,
						hint.nanoseconds & HINT_ON_MOUNT ? hint.inode : 0, hint.offset,
						hint.nanoseconds & ~HINT_ON_MOUNT);

		if (pushed < 0) {
			ret->dropped++;
			continue;
		}
		ret->hints++;
		pages += pushed;
	}
	ret->pages += pages;
	// The caller looks again after arming only if something came in between: then `head` has moved.
	if (arm && __atomic_exchange_n(&ring->waiting, 1, __ATOMIC_SEQ_CST) == 0)
		ret->armed = 1;
	return __atomic_load_n(&ring->head, __ATOMIC_SEQ_CST) != reader->tail;
}

static int hinted_compare(const void *left, const void *right)
{
	const struct udd_hinted *a = left, *b = right;

	if (a->agent != b->agent)
		return a->agent < b->agent ? -1 : 1;
	return a->address < b->address ? -1 : a->address > b->address;
}

size_t udd_hints_pop(struct udd_hints *hints, size_t pages, struct udd_hinted *ret)
{
	size_t count = 0;

	for (; count < pages && hints->top != NONE; count++) {
		const struct entry *entry = &hints->entries[hints->top];
		struct udd_hinted *hinted = &ret[count];

		*hinted = (struct udd_hinted){
			.address = (entry->key & ((1ULL << 35) - 1)) << UDD_PAGE_SHIFT,
			.agent = entry->key >> 35,
			.nanoseconds = entry->nanoseconds,
		};
		if (entry->image) {
			const uint64_t *digest = &hints->images[entry->image - 1].digests[2 * (uint64_t)entry->block];

			// Zero pages are the agent's business: let it look.
			if (digest[0] != hints->zero.low || digest[1] != hints->zero.high)
				memcpy(hinted->digest, digest, sizeof(hinted->digest));
		}
		entry_release(hints, hints->top);
	}
	qsort(ret, count, sizeof(*ret), hinted_compare);
	return count;
}

void udd_hints_forget_agent(struct udd_hints *hints, uint32_t agent)
{
	for (uint32_t i = hints->top, older; i != NONE; i = older) {
		older = hints->entries[i].older;
		if (hints->entries[i].key >> 35 == agent)
			entry_release(hints, i);
	}
}

size_t udd_hinted_group(const struct udd_hinted *hinted, size_t count)
{
	size_t i = 0;

	while (i < count && hinted[i].agent == hinted[0].agent)
		i++;
	return i;
}

void udd_hinted_split(const struct udd_hinted *hinted, size_t count, struct udd_report *ret_reports, size_t *ret_report_count,
		      struct udd_range *ret_ranges, size_t *ret_range_count)
{
	size_t reports = 0, ranges = 0;

	for (size_t i = 0; i < count; i++) {
		if (hinted[i].digest[0] || hinted[i].digest[1]) {
			ret_reports[reports++] = (struct udd_report){
				.address = hinted[i].address,
				.digest = {hinted[i].digest[0], hinted[i].digest[1]},
				.flags = UDD_REPORT_HINTED,
			};
		} else if (ranges && ret_ranges[ranges - 1].address + ret_ranges[ranges - 1].pages * UDD_PAGE_SIZE == hinted[i].address) {
			ret_ranges[ranges - 1].pages++;
		} else {
			ret_ranges[ranges++] = (struct udd_range){.address = hinted[i].address, .pages = 1};
		}
	}
	*ret_report_count = reports;
	*ret_range_count = ranges;
}

static unsigned int lead_bucket(uint64_t nanoseconds)
{
	if (nanoseconds < 4)
		return nanoseconds;
	unsigned int exponent = 63 - __builtin_clzll(nanoseconds);

	return 4 * exponent + (nanoseconds >> (exponent - 2) & 3);
}

size_t udd_hinted_leads(const struct udd_hinted *hinted, size_t hinted_count, const struct udd_run *runs,
			const struct udd_merge_result *results, size_t run_count, uint64_t now, uint64_t *histogram)
{
	size_t merged = 0, i = 0;

	// Both are sorted by address.
	for (size_t r = 0; r < run_count; r++) {
		for (uint32_t page = 0; page < runs[r].pages; page++) {
			uint64_t address = runs[r].address + (uint64_t)page * UDD_PAGE_SIZE;

			if (!(results[r].merged >> page & 1))
				continue;
			while (i < hinted_count && hinted[i].address < address)
				i++;
			if (i == hinted_count)
				return merged;
			if (hinted[i].address != address)
				continue;
			// The agent's clock word may say anything; a future one counts as now.
			histogram[lead_bucket(now > hinted[i].nanoseconds ? now - hinted[i].nanoseconds : 0)]++;
			merged++;
		}
	}
	return merged;
}
