// SPDX-License-Identifier: MIT
// Store segments from the engine's side: writing slots, and counting who refers to them.
//
// A slot is published only when the digest *of the slot* is the expected one: the copy area it came from is shared with the
// agent and may change under our hands. What was published is never written again. Counts are kept per slot, and per slot and
// agent: an agent's end gives back exactly what was its own, and an agent that gives back what it never had is found out. Counts
// decide when a segment is retired, nothing else; a wrong one wastes memory (the kernel keeps the true ones).
//
// New pages come in by UFFDIO_COPY: the kernel takes a page and copies into it, where a write to a mapping takes a fault that
// clears the page first (1.2 µs a page instead of 2.5). Where userfaultfd is not to be had, madvise() and memcpy() do the same.
//
// Pages of agents with quiet breaks (udedup/engine/agent.py) go into the store even if nobody else has them: they are *parked*,
// in segments that nobody but their agent is given. The domain's index does not lead to such a slot, but the page is a candidate
// there, and moves to a shared slot once somebody else has the same.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../common/digest.h"
#include "../common/uffd.h"
#include "engine.h"
#include "numbered.h"

// A count that reached this stays there: the slot then counts as referred to until the agent has nothing of its segment any more.
static const uint16_t STUCK = UINT16_MAX;

struct segment {
	char *base;
	uint32_t owner;  // number of the agent whose parked pages it has; 0: anybody may share it
	uint32_t filled; // slots that have memory; those from state.used on are not published and may be written
	struct udd_segment_state state;
	uint32_t counts[UDD_SEGMENT_SLOTS];
};

struct udd_store {
	struct udd_numbered segments;
	uint32_t users; // its owner and its holders: Python destroys them in any order
	int uffd;       // -1: none
};

struct holding {
	uint64_t pages;
	uint16_t counts[UDD_SEGMENT_SLOTS];
};

struct udd_holder {
	struct udd_store *store;
	struct udd_numbered holdings; // by segment, as long as it has pages there
	uint64_t pages;
	struct udd_index *index; // see udd_holder_tell(); or NULL
	uint32_t agent;
};

// For nothing but UFFDIO_COPY, so that any user may have one. -1 if not.
static int open_userfaultfd(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);

	if (fd < 0 || !ioctl(fd, UFFDIO_API, &api))
		return fd;
	close(fd);
	return -1;
}

struct udd_store *udd_store_create(void)
{
	struct udd_store *store = calloc(1, sizeof(*store));

	if (!store)
		return NULL;
	store->users = 1;
	store->uffd = open_userfaultfd();
	return store;
}

void udd_store_destroy(struct udd_store *store)
{
	if (--store->users)
		return;
	udd_store_close(store);
	if (store->uffd >= 0)
		close(store->uffd);
	free(store);
}

struct udd_store *udd_store_keep(struct udd_store *store)
{
	store->users++;
	return store;
}

void udd_store_close(struct udd_store *store)
{
	for (uint32_t i = 0; i < store->segments.count; i++)
		free(store->segments.items[i].thing);
	udd_numbered_deinit(&store->segments);
}

static struct segment *store_find(const struct udd_store *store, uint32_t number)
{
	return udd_numbered_find(&store->segments, number);
}

int udd_store_add_segment(struct udd_store *store, uint32_t number, void *base)
{
	if (number == 0 || store_find(store, number))
		return -EINVAL;
	struct segment *segment = calloc(1, sizeof(*segment));

	if (!segment)
		return -ENOMEM;
	segment->base = base;
	int r = udd_numbered_add(&store->segments, number, segment);

	if (r < 0)
		free(segment);
	return r;
}

int udd_store_own_segment(struct udd_store *store, uint32_t number, uint32_t agent)
{
	struct segment *segment = store_find(store, number);

	if (!segment || segment->state.used)
		return -EINVAL;
	segment->owner = agent;
	return 0;
}

int udd_store_remove_segment(struct udd_store *store, uint32_t number)
{
	struct segment *segment = store_find(store, number);

	if (!segment)
		return -ENOENT;
	if (segment->state.references)
		return -EBUSY;
	udd_numbered_remove(&store->segments, number);
	free(segment);
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

const char *udd_store_slot(const struct udd_store *store, uint32_t number, uint32_t slot)
{
	const struct segment *segment = store_find(store, number);

	return segment && slot < segment->state.used ? segment_slot(segment, slot) : NULL;
}

// Slots that are being given memory, by one call of udd_store_publish().
struct filling {
	int uffd;                  // -1: not to be had, or the kernel would not
	struct uffdio_range range; // registered with it; length 0: none
	// The slots [from, end) hold the copies from number `copy` on.
	uint32_t from;
	uint32_t end;
	uint32_t copy;
};

static void filling_end(struct filling *filling)
{
	if (filling->range.len)
		ioctl(filling->uffd, UFFDIO_UNREGISTER, &filling->range);
	filling->range.len = 0;
}

// Gives up to `count` slots from `filled` on new pages with the content of `pages`, copies number `copy` and following. Where the
// kernel does not, nothing stays registered: whoever touched a page that is not there would wait for ever.
static void filling_add(struct filling *filling, struct segment *segment, const void *pages, uint32_t copy, uint32_t count)
{
	uint64_t end = (uintptr_t)segment_slot(segment, UDD_SEGMENT_SLOTS);
	struct uffdio_copy arg = {
		.dst = (uintptr_t)segment_slot(segment, segment->filled),
		.src = (uintptr_t)pages,
		.len = (uint64_t)count * UDD_PAGE_SIZE,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};

	if (filling->uffd < 0)
		return;
	if (!filling->range.len) {
		struct uffdio_register reg = {.range = {arg.dst, end - arg.dst}, .mode = UFFDIO_REGISTER_MODE_MISSING};

		if (!ioctl(filling->uffd, UFFDIO_REGISTER, &reg))
			filling->range = reg.range;
	}
	if (filling->range.len)
		ioctl(filling->uffd, UFFDIO_COPY, &arg);
	if (arg.copy > 0) {
		filling->from = segment->filled;
		filling->copy = copy;
		filling->end = segment->filled += arg.copy / UDD_PAGE_SIZE;
		return;
	}
	filling_end(filling);
	filling->uffd = -1;
}

// Whether a slot has what copy number `copy` holds.
static int filling_has(const struct filling *filling, uint32_t slot, uint32_t copy)
{
	return slot >= filling->from && slot < filling->end && copy == filling->copy + (slot - filling->from);
}

// Pages of `fresh` whose copies follow each other, and the slots that are left for them.
static uint32_t fresh_stretch(const struct segment *segment, const struct udd_fresh *fresh, size_t count)
{
	uint32_t length = 1, room = UDD_SEGMENT_SLOTS - segment->filled;

	while (length < count && length < room && fresh[length].copy == fresh[length - 1].copy + 1)
		length++;
	return length;
}

// Gives the slot number `filled` memory. -ENOMEM if there is none: writing to it would end the engine.
static int segment_back(struct segment *segment)
{
	if (madvise(segment_slot(segment, segment->filled), UDD_PAGE_SIZE, MADV_POPULATE_WRITE))
		return -ENOMEM;
	segment->filled++;
	return 0;
}

int udd_store_publish(struct udd_store *store, struct udd_index *index, uint32_t number, const void *copy_area,
		      const struct udd_fresh *fresh, size_t count, size_t *position, struct udd_target *ret_targets,
		      struct udd_publish_counts *ret)
{
	struct segment *segment = store_find(store, number);
	struct filling filling = {.uffd = store->uffd};
	int targets = 0, r = 0;

	if (!segment || count > UDD_COPY_MAX)
		return -EINVAL;
	for (; *position < count && segment->state.used < UDD_SEGMENT_SLOTS; ++*position) {
		const struct udd_fresh *page = &fresh[*position];
		uint32_t slot = segment->state.used, other_segment, other_slot;

		if (!page->copy || page->copy > UDD_COPY_SLOTS) {
			ret->invalid++;
			continue;
		}
		// Another agent's page may have brought this content in while the copy was under way.
		if (udd_index_find_shared(index, page->digest, &other_segment, &other_slot))
			continue;
		const char *source = (const char *)copy_area + (size_t)(page->copy - 1) * UDD_PAGE_SIZE;

		if (slot == segment->filled)
			filling_add(&filling, segment, source, page->copy, fresh_stretch(segment, page, count - *position));
		if (slot == segment->filled)
			r = segment_back(segment);
		if (r < 0)
			break;
		// Where a page before this one was left out, everything has moved by one slot.
		if (!filling_has(&filling, slot, page->copy))
			memcpy(segment_slot(segment, slot), source, UDD_PAGE_SIZE);
		struct udd_digest digest = udd_digest_page(segment_slot(segment, slot));

		// Nobody was told of the slot: the next page takes it.
		if (digest.low != page->digest[0] || digest.high != page->digest[1]) {
			ret->mismatch++;
			continue;
		}
		r = udd_index_publish(index, page->digest, number, slot);
		if (r < 0)
			break;
		segment->state.used++;
		ret->written++;
		struct udd_target *target = &ret_targets[targets];

		*target = (struct udd_target){.segment = number, .slot = slot};
		targets += udd_index_take_candidate(index, page->digest, &target->agent, &target->address);
	}
	filling_end(&filling);
	// What was found goes first: the next call fails at the same page.
	return targets ? targets : r;
}

int udd_store_move(struct udd_store *store, struct udd_index *index, uint32_t from, uint32_t to, uint32_t *position,
		   struct udd_move *moves)
{
	struct segment *source = store_find(store, from), *target = store_find(store, to);

	if (!source || !target || source == target || source->owner != target->owner)
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
		int r = slot < target->filled ? 0 : segment_back(target);

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
	holder->store = udd_store_keep(store);
	return holder;
}

void udd_holder_tell(struct udd_holder *holder, struct udd_index *index, uint32_t agent)
{
	holder->index = index;
	holder->agent = agent;
}

static struct holding *holder_find(const struct udd_holder *holder, uint32_t number)
{
	return udd_numbered_find(&holder->holdings, number);
}

static void segment_release(struct segment *segment, uint32_t slot, uint32_t references)
{
	segment->counts[slot] -= references;
	segment->state.references -= references;
	if (references && !segment->counts[slot])
		segment->state.live--;
}

// Gives the references of a holding back; it is gone then, its place not yet.
static void holding_release(const struct udd_holder *holder, struct holding *holding, uint32_t number)
{
	struct segment *segment = store_find(holder->store, number);

	for (uint32_t slot = 0; segment && slot < UDD_SEGMENT_SLOTS; slot++)
		segment_release(segment, slot, holding->counts[slot]);
	free(holding);
}

void udd_holder_clear(struct udd_holder *holder)
{
	for (uint32_t i = 0; i < holder->holdings.count; i++)
		holding_release(holder, holder->holdings.items[i].thing, holder->holdings.items[i].number);
	udd_numbered_deinit(&holder->holdings);
	holder->pages = 0;
}

void udd_holder_destroy(struct udd_holder *holder)
{
	udd_holder_clear(holder);
	udd_store_destroy(holder->store);
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
	*ret = holder_find(holder, number);
	if (*ret)
		return 0;
	struct holding *holding = calloc(1, sizeof(*holding));

	if (!holding)
		return -ENOMEM;
	int r = udd_numbered_add(&holder->holdings, number, holding);

	if (r < 0)
		free(holding);
	else
		*ret = holding;
	return r;
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

// The digest of a slot where this holder's agent parks. False for other slots.
static bool parked_digest(const struct udd_holder *holder, const struct segment *segment, uint32_t slot, uint64_t *ret)
{
	if (!holder->index || segment->owner != holder->agent)
		return false;
	udd_digest_pages(segment_slot(segment, slot), 1, ret);
	return true;
}

int udd_holder_park(struct udd_holder *holder, const struct udd_run *runs, const struct udd_merge_result *results, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct udd_run *run = &runs[i];
		const struct segment *segment = store_find(holder->store, run->segment);
		const struct holding *holding = holder_find(holder, run->segment);

		for (uint32_t page = 0; segment && holding && page < run->pages; page++) {
			uint64_t digest[2];

			if ((results && !(results[i].merged >> page & 1)) || !holding->counts[run->slot + page] ||
			    !parked_digest(holder, segment, run->slot + page, digest))
				continue;
			int r = udd_index_park(holder->index, digest, holder->agent, run->address + (uint64_t)page * UDD_PAGE_SIZE);

			if (r < 0)
				return r;
		}
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
		if (!holding || !holding->pages || !holding->counts[slot])
			return -EPROTO;
		uint64_t digest[2];

		if (parked_digest(holder, segment, slot, digest))
			udd_index_unpark(holder->index, digest, holder->agent,
					 drop->address + (uint64_t)(slot - drop->slot) * UDD_PAGE_SIZE);
		holder->pages--;
		holding->pages--;
		if (holding->counts[slot] == STUCK)
			continue;
		holding->counts[slot]--;
		segment_release(segment, slot, 1);
	}
	// Else each segment that it ever had pages of would leave one behind.
	if (holding && !holding->pages) {
		udd_numbered_remove(&holder->holdings, drop->segment);
		holding_release(holder, holding, drop->segment);
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
