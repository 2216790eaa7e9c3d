// SPDX-License-Identifier: MIT
// Store segments from the engine's side: writing slots, and counting who refers to them.
//
// A slot is written once and published only when the digest *of the slot* is the expected one: the copy area it came from is
// shared with the agent and may change under our hands. Counts are kept per slot, and per slot and agent: an agent's end gives
// back exactly what was its own, and an agent that gives back what it never had is found out. Counts decide when
// a segment is retired, nothing else; a wrong one wastes memory (the kernel keeps the true ones).
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../common/digest.h"
#include "engine.h"

// A count that reached this stays there: the slot then counts as referred to until the agent leaves.
static const uint16_t STUCK = UINT16_MAX;

struct segment {
	char *base;
	struct udd_segment_state state;
	uint32_t counts[UDD_SEGMENT_SLOTS];
};

struct udd_store {
	struct segment **segments; // by number
	uint32_t capacity;
	uint32_t users; // its owner and its holders: Python destroys them in any order
};

struct holding {
	uint64_t pages;
	uint16_t counts[UDD_SEGMENT_SLOTS];
};

struct udd_holder {
	struct udd_store *store;
	struct holding **holdings; // by segment number, made when first needed
	uint32_t capacity;
	uint64_t pages;
};

struct udd_store *udd_store_create(void)
{
	struct udd_store *store = calloc(1, sizeof(*store));

	if (store)
		store->users = 1;
	return store;
}

void udd_store_destroy(struct udd_store *store)
{
	if (--store->users)
		return;
	for (uint32_t i = 0; i < store->capacity; i++)
		free(store->segments[i]);
	free(store->segments);
	free(store);
}

// Makes `*array`, of pointers, long enough for index `last`.
static int pointers_reserve(void ***array, uint32_t *capacity, uint32_t last)
{
	if (last < *capacity)
		return 0;
	uint32_t wanted = last + last / 2 + 8;
	void **bigger = realloc(*array, wanted * sizeof(*bigger));

	if (!bigger)
		return -ENOMEM;
	memset(bigger + *capacity, 0, (wanted - *capacity) * sizeof(*bigger));
	*array = bigger;
	*capacity = wanted;
	return 0;
}

static struct segment *store_find(const struct udd_store *store, uint32_t number)
{
	return number < store->capacity ? store->segments[number] : NULL;
}

int udd_store_add_segment(struct udd_store *store, uint32_t number, void *base)
{
	if (number == 0 || number > 1U << 24 || store_find(store, number))
		return -EINVAL;
	int r = pointers_reserve((void ***)&store->segments, &store->capacity, number);

	if (r < 0)
		return r;
	struct segment *segment = calloc(1, sizeof(*segment));

	if (!segment)
		return -ENOMEM;
	segment->base = base;
	store->segments[number] = segment;
	return 0;
}

int udd_store_remove_segment(struct udd_store *store, uint32_t number)
{
	struct segment *segment = store_find(store, number);

	if (!segment)
		return -ENOENT;
	if (segment->state.references)
		return -EBUSY;
	free(segment);
	store->segments[number] = NULL;
	return 0;
}

int udd_store_segment(const struct udd_store *store, uint32_t number, struct udd_segment_state *ret)
{
	const struct segment *segment = store_find(store, number);

	if (!segment)
		return -ENOENT;
	*ret = segment->state;
	return 0;
}

int udd_segment_digests(int descriptor, uint64_t *ret)
{
	enum { BATCH = 16 };
	char pages[BATCH * UDD_PAGE_SIZE];
	const struct udd_digest zero = udd_digest_page(memset(pages, 0, UDD_PAGE_SIZE));
	int used = 0;

	for (int slot = 0; slot < UDD_SEGMENT_SLOTS; slot += BATCH) {
		// Not through a mapping: that would give memory to what is empty, and end us where a page can't be read.
		ssize_t got = pread(descriptor, pages, sizeof(pages), (off_t)slot * UDD_PAGE_SIZE);

		if (got != sizeof(pages))
			return got < 0 ? -errno : -EIO;
		udd_digest_pages(pages, BATCH, &ret[2 * slot]);
		for (int i = slot; i < slot + BATCH; i++) {
			if (ret[2 * i] == zero.low && ret[2 * i + 1] == zero.high)
				ret[2 * i] = ret[2 * i + 1] = 0;
			else
				used = i + 1;
		}
	}
	return used;
}

int udd_store_adopt_segment(struct udd_store *store, struct udd_index *index, uint32_t number, void *base, uint32_t used,
			    const uint64_t *digests)
{
	if (used > UDD_SEGMENT_SLOTS)
		return -EINVAL;
	int r = udd_store_add_segment(store, number, base);

	if (r < 0)
		return r;
	store_find(store, number)->state.used = used;
	for (uint32_t slot = 0; slot < used; slot++) {
		const uint64_t *digest = &digests[2 * slot];
		uint32_t other_segment, other_slot;

		if ((!digest[0] && !digest[1]) || udd_index_find_shared(index, digest, &other_segment, &other_slot))
			continue;
		r = udd_index_publish(index, digest, number, slot);
		if (r < 0)
			return r;
	}
	return 0;
}

static char *segment_slot(const struct segment *segment, uint32_t slot)
{
	return segment->base + (size_t)slot * UDD_PAGE_SIZE;
}

// Memory for the next slots, as far as there are so many. -ENOMEM if there is none: writing to them would end the engine.
static int segment_back(const struct segment *segment, size_t slots)
{
	uint32_t left = UDD_SEGMENT_SLOTS - segment->state.used;
	size_t bytes = (slots < left ? slots : left) * UDD_PAGE_SIZE;

	return bytes && madvise(segment_slot(segment, segment->state.used), bytes, MADV_POPULATE_WRITE) ? -ENOMEM : 0;
}

static size_t count_valid(const uint64_t *valid, size_t from, size_t to)
{
	size_t count = 0;

	for (size_t i = from; i < to; i++)
		count += valid[i / 64] >> i % 64 & 1;
	return count;
}

int udd_store_publish(struct udd_store *store, struct udd_index *index, uint32_t number, const void *copy_area,
		      const uint64_t *valid, const struct udd_fresh *fresh, size_t count, size_t *position,
		      struct udd_target *ret_targets, struct udd_publish_counts *ret)
{
	struct segment *segment = store_find(store, number);
	int targets = 0;

	if (!segment || count > UDD_COPY_MAX)
		return -EINVAL;
	int r = segment_back(segment, count_valid(valid, *position, count));

	if (r < 0)
		return r;
	for (; *position < count && segment->state.used < UDD_SEGMENT_SLOTS; ++*position) {
		size_t i = *position;
		uint32_t slot = segment->state.used, other_segment, other_slot;

		if (!(valid[i / 64] >> i % 64 & 1)) {
			ret->invalid++;
			continue;
		}
		// Another agent's page may have brought this content in while the copy was under way.
		if (udd_index_find_shared(index, fresh[i].digest, &other_segment, &other_slot))
			continue;
		memcpy(segment_slot(segment, slot), (const char *)copy_area + i * UDD_PAGE_SIZE, UDD_PAGE_SIZE);
		struct udd_digest digest = udd_digest_page(segment_slot(segment, slot));

		// Nobody was told of the slot: the next page takes it.
		if (digest.low != fresh[i].digest[0] || digest.high != fresh[i].digest[1]) {
			ret->mismatch++;
			continue;
		}
		r = udd_index_publish(index, fresh[i].digest, number, slot);
		if (r < 0)
			return r;
		segment->state.used++;
		ret->written++;
		struct udd_target *target = &ret_targets[targets];

		*target = (struct udd_target){.segment = number, .slot = slot};
		targets += udd_index_take_candidate(index, fresh[i].digest, &target->agent, &target->address);
	}
	return targets;
}

int udd_store_move(struct udd_store *store, struct udd_index *index, uint32_t from, uint32_t to, uint32_t *position,
		   struct udd_move *moves)
{
	struct segment *source = store_find(store, from), *target = store_find(store, to);

	if (!source || !target || source == target)
		return -EINVAL;
	for (; *position < source->state.used && target->state.used < UDD_SEGMENT_SLOTS; ++*position) {
		struct udd_move *move = &moves[*position];
		uint32_t slot = target->state.used;

		if (!source->counts[*position] || move->segment)
			continue;
		struct udd_digest digest = udd_digest_page(segment_slot(source, *position));
		uint64_t words[2] = {digest.low, digest.high};

		if (udd_index_find_shared(index, words, &move->segment, &move->slot) && move->segment != from)
			continue;
		*move = (struct udd_move){0};
		int r = segment_back(target, 1);

		if (r < 0)
			return r;
		memcpy(segment_slot(target, slot), segment_slot(source, *position), UDD_PAGE_SIZE);
		r = udd_index_publish(index, words, to, slot);
		if (r < 0)
			return r;
		target->state.used++;
		*move = (struct udd_move){.segment = to, .slot = slot};
	}
	return 0;
}

struct udd_holder *udd_holder_create(struct udd_store *store)
{
	struct udd_holder *holder = calloc(1, sizeof(*holder));

	if (!holder)
		return NULL;
	holder->store = store;
	store->users++;
	return holder;
}

static struct holding *holder_find(const struct udd_holder *holder, uint32_t number)
{
	return number < holder->capacity ? holder->holdings[number] : NULL;
}

static void segment_release(struct segment *segment, uint32_t slot, uint32_t references)
{
	segment->counts[slot] -= references;
	segment->state.references -= references;
	if (references && !segment->counts[slot])
		segment->state.live--;
}

void udd_holder_clear(struct udd_holder *holder)
{
	for (uint32_t number = 0; number < holder->capacity; number++) {
		struct holding *holding = holder->holdings[number];

		if (!holding)
			continue;
		struct segment *segment = store_find(holder->store, number);

		for (uint32_t slot = 0; segment && slot < UDD_SEGMENT_SLOTS; slot++)
			segment_release(segment, slot, holding->counts[slot]);
		free(holding);
		holder->holdings[number] = NULL;
	}
	holder->pages = 0;
}

void udd_holder_destroy(struct udd_holder *holder)
{
	udd_holder_clear(holder);
	udd_store_destroy(holder->store);
	free(holder->holdings);
	free(holder);
}

uint64_t udd_holder_pages(const struct udd_holder *holder)
{
	return holder->pages;
}

uint64_t udd_holder_segment_pages(const struct udd_holder *holder, uint32_t number)
{
	const struct holding *holding = holder_find(holder, number);

	return holding ? holding->pages : 0;
}

static int holder_hold(struct udd_holder *holder, uint32_t number, struct holding **ret)
{
	int r = pointers_reserve((void ***)&holder->holdings, &holder->capacity, number);

	if (r < 0)
		return r;
	if (!holder->holdings[number])
		holder->holdings[number] = calloc(1, sizeof(struct holding));
	*ret = holder->holdings[number];
	return *ret ? 0 : -ENOMEM;
}

static void holding_take(struct udd_holder *holder, struct holding *holding, struct segment *segment, uint32_t slot)
{
	holder->pages++;
	holding->pages++;
	if (holding->counts[slot] == STUCK)
		return;
	holding->counts[slot]++;
	segment->state.references++;
	if (segment->counts[slot]++ == 0)
		segment->state.live++;
}

int udd_holder_take(struct udd_holder *holder, const struct udd_run *runs, const struct udd_merge_result *results, size_t count,
		    struct udd_merge_counts *ret)
{
	for (size_t i = 0; i < count; i++) {
		const struct udd_run *run = &runs[i];
		struct segment *segment = store_find(holder->store, run->segment);
		struct udd_merge_result result = results[i];
		uint64_t all = run->pages == 64 ? UINT64_MAX : (1ULL << run->pages) - 1;
		struct holding *holding;

		if (!segment || run->pages == 0 || run->pages > UDD_RUN_MAX || run->slot + run->pages > segment->state.used)
			return -EINVAL;
		int merged = __builtin_popcountll(result.merged), mismatch = __builtin_popcountll(result.mismatch);
		int busy = __builtin_popcountll(result.busy), gone = __builtin_popcountll(result.gone);
		int no_vma = __builtin_popcountll(result.no_vma);

		if ((result.merged | result.mismatch | result.busy | result.gone | result.no_vma) != all ||
		    merged + mismatch + busy + gone + no_vma != (int)run->pages)
			return -EPROTO;
		ret->merged += merged;
		ret->mismatch += mismatch;
		ret->busy += busy;
		ret->gone += gone;
		ret->no_vma += no_vma;
		if (!merged)
			continue;
		ret->runs++;
		int r = holder_hold(holder, run->segment, &holding);

		if (r < 0)
			return r;
		for (uint64_t mask = result.merged; mask; mask &= mask - 1)
			holding_take(holder, holding, segment, run->slot + __builtin_ctzll(mask));
	}
	return 0;
}

int udd_holder_adopt(struct udd_holder *holder, const struct udd_run *runs, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct udd_run *run = &runs[i];
		struct segment *segment = store_find(holder->store, run->segment);
		struct holding *holding;

		if (!segment)
			continue;
		if (run->slot >= segment->state.used || run->pages > segment->state.used - run->slot)
			return -EPROTO;
		int r = holder_hold(holder, run->segment, &holding);

		if (r < 0)
			return r;
		for (uint32_t page = 0; page < run->pages; page++)
			holding_take(holder, holding, segment, run->slot + page);
	}
	return 0;
}

static int holder_drop(struct udd_holder *holder, const struct udd_drop *drop, uint32_t newest)
{
	struct segment *segment = store_find(holder->store, drop->segment);
	struct holding *holding = holder_find(holder, drop->segment);

	if (drop->segment == 0 || drop->segment > newest)
		return -EPROTO;
	if (!segment)
		return 0;
	if (drop->slot >= UDD_SEGMENT_SLOTS || drop->pages > UDD_SEGMENT_SLOTS - drop->slot)
		return -EPROTO;
	for (uint32_t slot = drop->slot; slot < drop->slot + drop->pages; slot++) {
		if (!holding || !holding->counts[slot])
			return -EPROTO;
		holder->pages--;
		holding->pages--;
		if (holding->counts[slot] == STUCK)
			continue;
		holding->counts[slot]--;
		segment_release(segment, slot, 1);
	}
	return 0;
}

int udd_holder_restart(struct udd_holder *holder, struct udd_drop_ring *ring, uint64_t head)
{
	if (head - ring->tail > UDD_DROP_SLOTS)
		return -EPROTO;
	udd_holder_clear(holder);
	__atomic_store_n(&ring->tail, head, __ATOMIC_RELEASE);
	return 0;
}

int udd_holder_drain(struct udd_holder *holder, struct udd_drop_ring *ring, uint32_t newest, struct udd_drop_counts *ret)
{
	uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
	uint64_t tail = ring->tail;

	// The agent can write the tail as well; a wrong one shows here or as a reference it never had.
	if (head - tail > UDD_DROP_SLOTS)
		return -EPROTO;
	for (; tail != head; tail++) {
		struct udd_drop drop;

		memcpy(&drop, &ring->slots[tail % UDD_DROP_SLOTS], sizeof(drop));
		int r = holder_drop(holder, &drop, newest);

		if (r < 0)
			return r;
		ret->pages += drop.pages;
		if (drop.flags & UDD_DROP_BREAK)
			ret->broken += drop.pages;
	}
	__atomic_store_n(&ring->tail, tail, __ATOMIC_RELEASE);
	return 0;
}
