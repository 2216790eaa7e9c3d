// SPDX-License-Identifier: MIT
// The hint stack: which pages have new content, newest first (XLH: stale hints are worth little, so what does not fit falls
// off the bottom).
//
// One entry is one page. A page hinted again moves to the top, so the stack never holds a page twice. Entries are a fixed array
// threaded by doubly linked lists (top to bottom) and found through a hash of their indices.
//
// Agents are not each other's friends, so each has a lane of its own. While there is room a lane may be of any depth; when there
// is none, an agent with more than its share pays for its own new hints, and one with less takes from the deepest lane. What is
// popped is shared out evenly among the lanes. So a flood of hints costs those who make it, and nobody else.
//
// Rings are written by application threads of agents that nobody vouches for: a head that jumps, lengths that overflow and
// slots that never get finished are all dealt with here, and the caller bounds one call's work.
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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
	uint32_t newer;       // towards the top of its lane
	uint32_t older;       // towards the bottom; of a free entry: the next free one
};

// Where an agent said that it mapped an image. It does not say when that ends: a hint too many is found out by the agent.
struct mapping {
	uint64_t inode; // 0: none
	uint64_t offset;
	uint64_t address;
	uint64_t length;
};

// One agent's hints.
struct lane {
	uint32_t agent;
	uint32_t top;
	uint32_t bottom;
	uint32_t depth;
	uint32_t quota; // of the pop under way
	bool held;      // not popped from for now
	uint32_t mapped; // how often it mapped one
	struct mapping *mappings; // UDD_MAPPINGS_MAX, a ring; NULL: none yet
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
	uint32_t depth;    // of all lanes
	uint32_t held;     // of those that are held
	uint32_t sharers;  // lanes that are not empty
	uint32_t free;     // first of the entries that were given back
	uint32_t fresh;    // first entry that was never used: a stack that stays small costs no memory
	uint64_t overwritten;
	struct lane *lanes; // sorted by agent
	uint32_t lane_count;
	uint32_t lane_room;
	uint32_t turn;      // which lane gets what can't be shared out evenly
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

// Where the lane of an agent is, or would have to be.
static uint32_t lane_place(const struct udd_hints *hints, uint32_t agent)
{
	uint32_t low = 0, high = hints->lane_count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (hints->lanes[middle].agent < agent)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct lane *lane_find(const struct udd_hints *hints, uint32_t agent)
{
	uint32_t i = lane_place(hints, agent);

	return i < hints->lane_count && hints->lanes[i].agent == agent ? &hints->lanes[i] : NULL;
}

// The lane of an agent, a new one if it has none; NULL: no memory. Moves the other lanes.
static struct lane *lane_open(struct udd_hints *hints, uint32_t agent)
{
	uint32_t i = lane_place(hints, agent);

	if (i < hints->lane_count && hints->lanes[i].agent == agent)
		return &hints->lanes[i];
	if (hints->lane_count == hints->lane_room) {
		uint32_t room = hints->lane_room ? 2 * hints->lane_room : 16;
		struct lane *lanes = realloc(hints->lanes, room * sizeof(*lanes));

		if (!lanes)
			return NULL;
		hints->lanes = lanes;
		hints->lane_room = room;
	}
	memmove(&hints->lanes[i + 1], &hints->lanes[i], (hints->lane_count++ - i) * sizeof(*hints->lanes));
	hints->lanes[i] = (struct lane){.agent = agent, .top = NONE, .bottom = NONE};
	return &hints->lanes[i];
}

static void list_unlink(struct udd_hints *hints, struct lane *lane, uint32_t i)
{
	struct entry *entry = &hints->entries[i];

	if (entry->newer == NONE)
		lane->top = entry->older;
	else
		hints->entries[entry->newer].older = entry->older;
	if (entry->older == NONE)
		lane->bottom = entry->newer;
	else
		hints->entries[entry->older].newer = entry->newer;
}

static void list_put_on_top(struct udd_hints *hints, struct lane *lane, uint32_t i)
{
	struct entry *entry = &hints->entries[i];

	entry->newer = NONE;
	entry->older = lane->top;
	if (lane->top == NONE)
		lane->bottom = i;
	else
		hints->entries[lane->top].newer = i;
	lane->top = i;
}

static void entry_release(struct udd_hints *hints, struct lane *lane, uint32_t i)
{
	bucket_remove(hints, bucket_find(hints, hints->entries[i].key));
	list_unlink(hints, lane, i);
	hints->entries[i].key = 0;
	hints->entries[i].older = hints->free;
	hints->free = i;
	hints->depth--;
	hints->held -= lane->held;
	hints->sharers -= --lane->depth == 0;
}

// Who gives up its oldest hint for a new one in `lane`, now that there is no room.
static struct lane *lane_to_take_from(struct udd_hints *hints, struct lane *lane)
{
	struct lane *deepest = lane;

	if (lane->depth && lane->depth >= hints->slots / hints->sharers)
		return lane;
	for (struct lane *other = hints->lanes; other < hints->lanes + hints->lane_count; other++) {
		if (other->depth > deepest->depth)
			deepest = other;
	}
	return deepest;
}

// An unused entry for `lane`; an old hint is lost if there is none.
static uint32_t entry_take(struct udd_hints *hints, struct lane *lane)
{
	if (hints->free == NONE && hints->fresh < hints->slots)
		return hints->fresh++;
	if (hints->free == NONE) {
		struct lane *loser = lane_to_take_from(hints, lane);

		entry_release(hints, loser, loser->bottom);
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
	hints->free = NONE;
	hints->zero = udd_digest_page(zero_page);
	return hints;
}

void udd_hints_destroy(struct udd_hints *hints)
{
	free(hints->entries);
	free(hints->buckets);
	for (uint32_t i = 0; i < hints->lane_count; i++)
		free(hints->lanes[i].mappings);
	free(hints->lanes);
	free(hints->images);
	free(hints);
}

uint32_t udd_hints_depth(const struct udd_hints *hints)
{
	return hints->depth - hints->held;
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
	for (uint32_t i = 0; i < hints->fresh; i++) {
		if (hints->entries[i].image == slot)
			hints->entries[i].image = 0;
	}
	hints->images[slot - 1] = (struct image){0};
}

static void hints_push_page(struct udd_hints *hints, struct lane *lane, uint64_t address, uint32_t image, uint64_t block,
			    uint64_t nanoseconds)
{
	uint64_t key = entry_key(lane->agent, address);
	uint32_t bucket = bucket_find(hints, key);
	uint32_t i;

	if (hints->buckets[bucket]) {
		i = hints->buckets[bucket] - 1;
		list_unlink(hints, lane, i);
	} else {
		i = entry_take(hints, lane);
		hints->buckets[bucket_find(hints, key)] = i + 1;
		hints->depth++;
		hints->held += lane->held;
		hints->sharers += lane->depth++ == 0;
	}
	struct entry *entry = &hints->entries[i];

	entry->key = key;
	entry->nanoseconds = nanoseconds;
	entry->image = image && block < hints->images[image - 1].blocks && block <= UINT32_MAX ? image : 0;
	entry->block = (uint32_t)block;
	list_put_on_top(hints, lane, i);
}

// What is to be pushed for one hint: its whole pages, or the last of them if they are more than the stack can hold.
static int part_init(struct udd_hint_part *part, struct udd_hints *hints, uint64_t address, uint64_t length, uint64_t inode,
		     uint64_t offset, uint64_t nanoseconds)
{
	*part = (struct udd_hint_part){.nanoseconds = nanoseconds};
	if (address >= ADDRESS_END || length > ADDRESS_END - address)
		return -EINVAL;
	part->page = (address + UDD_PAGE_SIZE - 1) >> UDD_PAGE_SHIFT;
	part->end = (address + length) >> UDD_PAGE_SHIFT;
	if (part->page >= part->end) {
		part->end = part->page;
		return 0;
	}
	if (part->end - part->page > hints->slots) {
		hints->overwritten += part->end - part->page - hints->slots;
		part->page = part->end - hints->slots;
	}
	offset += inode && offset != OFFSET_UNKNOWN && offset <= INT64_MAX ? (part->page << UDD_PAGE_SHIFT) - address : 0;
	if (inode && offset <= INT64_MAX && offset % UDD_PAGE_SIZE == 0)
		part->image = image_find(hints, inode);
	part->block = offset >> UDD_PAGE_SHIFT;
	return 0;
}

// Pushes up to `pages` pages of it; returns how many.
static uint64_t part_push(struct udd_hint_part *part, struct udd_hints *hints, struct lane *lane, uint64_t pages)
{
	uint64_t end = part->end - part->page > pages ? part->page + pages : part->end;
	uint64_t first = part->page;

	for (; part->page < end; part->page++, part->block++)
		hints_push_page(hints, lane, part->page << UDD_PAGE_SHIFT, part->image, part->block, part->nanoseconds);
	return end - first;
}

int64_t udd_hints_push(struct udd_hints *hints, uint32_t agent, uint64_t address, uint64_t length, uint64_t inode,
		       uint64_t offset, uint64_t nanoseconds)
{
	struct udd_hint_part part;

	if (agent == 0 || agent >= UDD_AGENT_NUMBERS)
		return -EINVAL;
	struct lane *lane = lane_open(hints, agent);

	if (!lane)
		return -ENOMEM;
	int ret = part_init(&part, hints, address, length, inode, offset, nanoseconds);

	return ret ? ret : (int64_t)part_push(&part, hints, lane, UINT64_MAX);
}

// Remembers one in the place of the one that was there, else of the oldest. 0 or a negative errno.
static int note_mapping(struct lane *lane, const struct udd_hint *hint)
{
	if (hint->address % UDD_PAGE_SIZE || hint->offset % UDD_PAGE_SIZE || hint->offset > INT64_MAX ||
	    !(hint->nanoseconds & HINT_ON_MOUNT) || hint->address >= ADDRESS_END)
		return -EINVAL;
	if (!lane->mappings)
		lane->mappings = calloc(UDD_MAPPINGS_MAX, sizeof(*lane->mappings));
	if (!lane->mappings)
		return -ENOMEM;
	uint32_t at = 0;

	while (at < UDD_MAPPINGS_MAX && !(lane->mappings[at].inode && lane->mappings[at].address == hint->address))
		at++;
	if (at == UDD_MAPPINGS_MAX)
		at = lane->mapped++ % UDD_MAPPINGS_MAX;
	lane->mappings[at] = (struct mapping){
		.inode = hint->inode,
		.offset = hint->offset,
		.address = hint->address,
		.length = hint->length,
	};
	return 0;
}

int64_t udd_hints_read(struct udd_hints *hints, uint32_t agent, uint64_t inode, uint64_t block, uint64_t blocks,
		       uint64_t nanoseconds)
{
	struct lane *lane = lane_find(hints, agent);
	uint64_t start = block << UDD_PAGE_SHIFT;
	uint64_t end = start + (blocks << UDD_PAGE_SHIFT);
	int64_t pushed = 0;

	for (uint32_t i = 0; lane && lane->mappings && i < UDD_MAPPINGS_MAX; i++) {
		const struct mapping *mapping = &lane->mappings[i];
		uint64_t from = start > mapping->offset ? start : mapping->offset;
		uint64_t to = end < mapping->offset + mapping->length ? end : mapping->offset + mapping->length;
		struct udd_hint_part part;

		if (mapping->inode != inode || from >= to ||
		    part_init(&part, hints, mapping->address + (from - mapping->offset), to - from, inode, from, nanoseconds))
			continue;
		pushed += (int64_t)part_push(&part, hints, lane, UINT64_MAX);
	}
	return pushed;
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
		    uint64_t pages, int arm, struct udd_drain_counts *ret)
{
	uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
	uint64_t ahead = head - reader->tail;
	uint64_t records = 0;

	if (ahead > HEAD_JUMP_MAX)
		return -EPROTO;
	struct lane *lane = lane_open(hints, agent);

	if (!lane)
		return -ENOMEM;
	if (ahead > UDD_HINT_SLOTS) {
		ret->dropped += ahead - UDD_HINT_SLOTS;
		reader->tail = head - UDD_HINT_SLOTS;
		reader->stuck_since = 0;
	}
	uint64_t left = pages - part_push(&reader->part, hints, lane, pages);

	for (; left && reader->tail != head; reader->tail++) {
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
		if (taken == 1 && hint.flags & UDD_HINT_MAPPED) {
			ret->dropped += note_mapping(lane, &hint) != 0;
			records++;
			left--;
			continue;
		}
		if (taken != 1 || part_init(&reader->part, hints, hint.address, hint.length,
					    hint.nanoseconds & HINT_ON_MOUNT ? hint.inode : 0, hint.offset,
					    hint.nanoseconds & ~HINT_ON_MOUNT)) {
			ret->dropped++;
			continue;
		}
		records++;
		left -= part_push(&reader->part, hints, lane, left);
	}
	ret->hints += records;
	ret->pages += pages - left;
	// The caller looks again after arming only if something came in between: then `head` has moved.
	if (arm && __atomic_exchange_n(&ring->waiting, 1, __ATOMIC_SEQ_CST) == 0)
		ret->armed = 1;
	return __atomic_load_n(&ring->head, __ATOMIC_SEQ_CST) != reader->tail || reader->part.page != reader->part.end;
}

int udd_hints_waiting(const struct udd_hint_ring *ring, const struct udd_hint_reader *reader)
{
	return __atomic_load_n(&ring->head, __ATOMIC_RELAXED) != reader->tail || reader->part.page != reader->part.end;
}

static int hinted_compare(const void *left, const void *right)
{
	const struct udd_hinted *a = left, *b = right;

	if (a->agent != b->agent)
		return a->agent < b->agent ? -1 : 1;
	return a->address < b->address ? -1 : a->address > b->address;
}

// Shares `pages` out evenly: a lane that has less leaves the rest to the others.
static void quotas_set(struct udd_hints *hints, size_t pages)
{
	struct lane *end = hints->lanes + hints->lane_count;
	size_t left = pages, given;
	uint32_t wanting;

	for (struct lane *lane = hints->lanes; lane < end; lane++)
		lane->quota = 0;
	do {
		wanting = 0;
		given = 0;
		for (struct lane *lane = hints->lanes; lane < end; lane++)
			wanting += !lane->held && lane->quota < lane->depth;
		for (struct lane *lane = hints->lanes; wanting && lane < end; lane++) {
			size_t more = lane->held ? 0 : lane->depth - lane->quota;

			if (more > left / wanting)
				more = left / wanting;
			lane->quota += more;
			given += more;
		}
		left -= given;
	} while (given);
	// Less than one each: by turns.
	for (uint32_t i = 0; left && wanting && i < hints->lane_count; i++) {
		struct lane *lane = &hints->lanes[hints->turn++ % hints->lane_count];

		if (!lane->held && lane->quota < lane->depth) {
			lane->quota++;
			left--;
		}
	}
}

size_t udd_hints_pop(struct udd_hints *hints, size_t pages, struct udd_hinted *ret)
{
	size_t count = 0;

	quotas_set(hints, pages);
	for (struct lane *lane = hints->lanes; lane < hints->lanes + hints->lane_count; lane++) {
		for (; lane->quota; lane->quota--, count++) {
			const struct entry *entry = &hints->entries[lane->top];
			struct udd_hinted *hinted = &ret[count];

			*hinted = (struct udd_hinted){
				.address = (entry->key & ((1ULL << 35) - 1)) << UDD_PAGE_SHIFT,
				.agent = lane->agent,
				.nanoseconds = entry->nanoseconds,
			};
			if (entry->image) {
				const uint64_t *digest = &hints->images[entry->image - 1].digests[2 * (uint64_t)entry->block];

				// Zero pages are the agent's business: let it look.
				if (digest[0] != hints->zero.low || digest[1] != hints->zero.high)
					memcpy(hinted->digest, digest, sizeof(hinted->digest));
			}
			entry_release(hints, lane, lane->top);
		}
	}
	qsort(ret, count, sizeof(*ret), hinted_compare);
	return count;
}

int udd_hints_hold(struct udd_hints *hints, uint32_t agent, int hold)
{
	struct lane *lane = hold ? lane_open(hints, agent) : lane_find(hints, agent);

	if (!lane)
		return hold ? -ENOMEM : 0;
	if (lane->held != !!hold)
		hints->held += hold ? lane->depth : -lane->depth;
	lane->held = hold;
	return 0;
}

void udd_hints_forget_agent(struct udd_hints *hints, uint32_t agent)
{
	struct lane *lane = lane_find(hints, agent);

	if (!lane)
		return;
	while (lane->depth)
		entry_release(hints, lane, lane->top);
	free(lane->mappings);
	memmove(lane, lane + 1, (hints->lanes + hints->lane_count-- - (lane + 1)) * sizeof(*lane));
}

// Only what lies in whole pages goes back: the array may have neighbours.
static void give_back(void *array, size_t bytes)
{
	uintptr_t begin = ((uintptr_t)array + UDD_PAGE_SIZE - 1) & -(uintptr_t)UDD_PAGE_SIZE;
	uintptr_t end = ((uintptr_t)array + bytes) & -(uintptr_t)UDD_PAGE_SIZE;

	if (begin < end)
		madvise((void *)begin, end - begin, MADV_DONTNEED);
}

uint32_t udd_hints_clear(struct udd_hints *hints)
{
	uint32_t depth = hints->depth;

	for (uint32_t i = 0; i < hints->lane_count; i++) {
		while (hints->lanes[i].depth)
			entry_release(hints, &hints->lanes[i], hints->lanes[i].top);
	}
	// Nothing is in use now: all keys and buckets are 0, as if they had never been used.
	give_back(hints->entries, hints->slots * sizeof(*hints->entries));
	give_back(hints->buckets, ((size_t)hints->bucket_mask + 1) * sizeof(*hints->buckets));
	hints->free = NONE;
	hints->fresh = 0;
	return depth;
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
