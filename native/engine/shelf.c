// SPDX-License-Identifier: MIT
// Which blocks of an image can be had from the store of a trust domain instead of from its files.
//
// A digest is no proof: it is 128 bits of a fast hash without a key, and who owns a page in the domain (a guest, say) can make
// one that has the digest of somebody's block. So the index nominates a slot, and the block's own bytes, read from the image,
// are compared with it before the shelf says for good that they are the same. Slots never change; files do, so a shelf is
// good for one epoch of its watch only, and the watch is asked at every use.
//
// Segment numbers are never used twice, so a place in a segment that is no more leads nowhere rather than astray.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "engine.h"

enum {
	SLOT_BITS = 12,
	// So many successive segments, 16 TiB, can be told apart: what 4 bytes a block cost. See shelf_reach().
	SEGMENTS_SPAN = 1 << (32 - SLOT_BITS),
	READ_BLOCKS_MAX = 257, // 1 MiB that begins inside a block
};

_Static_assert(UDD_SEGMENT_SLOTS == 1 << SLOT_BITS, "a place is a segment number and a slot");

// What of a file tells that its content may have changed.
struct stamp {
	uint64_t size;
	struct statx_timestamp mtime;
	struct statx_timestamp ctime;
};

struct watched {
	int descriptor;
	struct stamp stamp;
};

struct udd_watch {
	uint64_t epoch;     // counts changes, from 1 on
	uint64_t settle_ns;
	int64_t changed_ns; // see watch_changed_ns()
	bool settled;       // long enough ago
	uint32_t count;
	struct watched files[];
};

struct udd_shelf {
	struct udd_store *store;
	uint32_t *places; // by block: (segment - base) << SLOT_BITS | slot; 0: none
	uint32_t base;
	uint64_t blocks;
	uint64_t epoch; // of the watch, in which all places were found
};

struct udd_watch *udd_watch_create(const int *descriptors, uint32_t count, uint64_t settle_ns)
{
	struct udd_watch *watch = calloc(1, sizeof(*watch) + count * sizeof(watch->files[0]));

	if (!watch)
		return NULL;
	watch->settle_ns = settle_ns;
	watch->count = count;
	for (uint32_t i = 0; i < count; i++)
		watch->files[i].descriptor = descriptors[i];
	return watch;
}

void udd_watch_destroy(struct udd_watch *watch)
{
	free(watch);
}

static int64_t nanoseconds(struct statx_timestamp time)
{
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static bool same_time(struct statx_timestamp one, struct statx_timestamp other)
{
	return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

// 1: the file has changed since the last look; 0: it has not. Negative: can't be told.
static int watched_look(struct watched *file)
{
	struct stamp *stamp = &file->stamp;
	struct statx now;

	// Not what a server has to say: the loop must not wait for one.
	if (statx(file->descriptor, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &now))
		return -errno;
	// Writes to a block device don't show.
	if (!S_ISREG(now.stx_mode))
		return -EINVAL;
	if (stamp->size == now.stx_size && same_time(stamp->mtime, now.stx_mtime) && same_time(stamp->ctime, now.stx_ctime))
		return 0;
	*stamp = (struct stamp){.size = now.stx_size, .mtime = now.stx_mtime, .ctime = now.stx_ctime};
	return 1;
}

static bool watch_settled(const struct udd_watch *watch)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec - watch->changed_ns >= (int64_t)watch->settle_ns;
}

// The latest of all times of the files, CLOCK_REALTIME.
static int64_t watch_changed_ns(const struct udd_watch *watch)
{
	int64_t latest = 0;

	for (uint32_t i = 0; i < watch->count; i++) {
		int64_t mtime = nanoseconds(watch->files[i].stamp.mtime), ctime = nanoseconds(watch->files[i].stamp.ctime);

		if (mtime > latest)
			latest = mtime;
		if (ctime > latest)
			latest = ctime;
	}
	return latest;
}

uint64_t udd_watch_epoch(struct udd_watch *watch)
{
	bool changed = false, failed = false;

	// All of them, whatever becomes of one: a change that was seen must count.
	for (uint32_t i = 0; i < watch->count; i++) {
		int r = watched_look(&watch->files[i]);

		changed = changed || r > 0;
		failed = failed || r < 0;
	}
	if (changed) {
		watch->epoch++;
		watch->settled = false;
		watch->changed_ns = watch_changed_ns(watch);
	}
	// One more change within the same tick of the file system's clock would not show.
	if (!watch->settled)
		watch->settled = watch_settled(watch);
	return watch->settled && !failed ? watch->epoch : 0;
}

struct udd_shelf *udd_shelf_create(struct udd_store *store, uint64_t blocks)
{
	size_t bytes = (blocks ? blocks : 1) * sizeof(uint32_t);
	struct udd_shelf *shelf = calloc(1, sizeof(*shelf));

	if (!shelf)
		return NULL;
	// Takes memory where blocks are on the shelf only: a page stands for 4 MiB of image.
	shelf->places = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (shelf->places == MAP_FAILED) {
		free(shelf);
		return NULL;
	}
	madvise(shelf->places, bytes, MADV_NOHUGEPAGE);
	shelf->store = udd_store_keep(store);
	shelf->blocks = blocks;
	return shelf;
}

static size_t shelf_bytes(const struct udd_shelf *shelf)
{
	return (shelf->blocks ? shelf->blocks : 1) * sizeof(uint32_t);
}

void udd_shelf_destroy(struct udd_shelf *shelf)
{
	munmap(shelf->places, shelf_bytes(shelf));
	udd_store_destroy(shelf->store);
	free(shelf);
}

// The page of the store that holds a block; NULL: none is known, or not any more.
static const char *shelf_block(const struct udd_shelf *shelf, uint64_t block)
{
	uint32_t place = block < shelf->blocks ? shelf->places[block] : 0;

	return place ? udd_store_slot(shelf->store, shelf->base + (place >> SLOT_BITS), place & (UDD_SEGMENT_SLOTS - 1)) : NULL;
}

static void shelf_clear(struct udd_shelf *shelf)
{
	madvise(shelf->places, shelf_bytes(shelf), MADV_DONTNEED);
}

// Whether a place can say that it is in this segment. When numbers have come to the end of those that can be told apart, all
// places are forgotten, and half of the span lies ahead again.
static bool shelf_reach(struct udd_shelf *shelf, uint32_t segment)
{
	if (segment <= shelf->base)
		return false;
	if (segment - shelf->base < SEGMENTS_SPAN)
		return true;
	shelf_clear(shelf);
	shelf->base = segment - SEGMENTS_SPAN / 2;
	return true;
}

// Whether the shelf is good for `epoch`; one of an earlier epoch is cleared.
static bool shelf_enter(struct udd_shelf *shelf, uint64_t epoch)
{
	if (!epoch)
		return false;
	if (shelf->epoch != epoch && shelf->epoch)
		shelf_clear(shelf);
	shelf->epoch = epoch;
	return true;
}

int udd_shelf_take(struct udd_shelf *shelf, struct udd_watch *watch, uint64_t offset, size_t size, char *buffer,
		   struct udd_taken *ret)
{
	const char *pages[READ_BLOCKS_MAX];
	uint64_t first = offset / UDD_PAGE_SIZE;
	size_t skip = offset % UDD_PAGE_SIZE;
	size_t count = (skip + size + UDD_PAGE_SIZE - 1) / UDD_PAGE_SIZE;
	uint32_t there = 0, gaps = 0;
	bool adjacent = true;

	if (!size || count > READ_BLOCKS_MAX)
		return -EINVAL;
	for (size_t i = 0; i < count; i++) {
		pages[i] = shelf_block(shelf, first + i);
		there += pages[i] != NULL;
		adjacent = adjacent && pages[i] && (!i || pages[i] == pages[i - 1] + UDD_PAGE_SIZE);
		if (!pages[i] && (!i || pages[i - 1]) && ++gaps > UDD_GAPS_MAX)
			return -ENOENT;
	}
	// Asked after the reader has asked us: what was written before that shows.
	uint64_t epoch = there ? udd_watch_epoch(watch) : 0;

	if (!epoch || epoch != shelf->epoch)
		return -ENOENT;
	ret->epoch = epoch;
	if (adjacent) {
		ret->data = pages[0] + skip;
		return 0;
	}
	ret->data = buffer;
	gaps = 0;
	for (size_t i = 0; i < count; i++) {
		// Of the bytes asked for, those from `start` to `end` are in this block.
		size_t start = i ? i * UDD_PAGE_SIZE - skip : 0;
		size_t end = (i + 1) * UDD_PAGE_SIZE - skip < size ? (i + 1) * UDD_PAGE_SIZE - skip : size;

		if (pages[i])
			memcpy(buffer + start, pages[i] + (i ? 0 : skip), end - start);
		else if (gaps && ret->gaps[gaps - 1].end == start)
			ret->gaps[gaps - 1].end = end;
		else
			ret->gaps[gaps++] = (struct udd_gap){.start = start, .end = end};
	}
	return gaps;
}

uint64_t udd_shelf_there(const struct udd_shelf *shelf, uint64_t first, uint32_t count)
{
	uint64_t there = 0;

	for (uint32_t i = 0; i < count && i < 64; i++) {
		if (shelf_block(shelf, first + i))
			there |= 1ULL << i;
	}
	return there;
}

uint64_t udd_shelf_nominees(const struct udd_shelf *shelf, const struct udd_index *index, const uint64_t *digests, uint64_t first,
			    uint32_t count)
{
	uint64_t nominees = udd_shelf_there(shelf, first, count);

	for (uint32_t i = 0; i < count && i < 64 && first + i < shelf->blocks; i++) {
		const uint64_t *digest = &digests[2 * (first + i)];
		uint32_t segment, slot;

		if ((digest[0] || digest[1]) && udd_index_find_shared(index, digest, &segment, &slot))
			nominees |= 1ULL << i;
	}
	return nominees;
}

uint32_t udd_shelf_put(struct udd_shelf *shelf, struct udd_watch *watch, uint64_t epoch, const struct udd_index *index,
		       const uint64_t *digests, uint64_t first, uint32_t count, const char *data, struct udd_put_counts *ret)
{
	uint32_t there = 0;

	if (first >= shelf->blocks || count > shelf->blocks - first)
		return 0;
	// `data` was read in `epoch`, and what is entered now is taken for good as long as that lasts.
	if (!epoch || udd_watch_epoch(watch) != epoch || !shelf_enter(shelf, epoch))
		return 0;
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t *digest = &digests[2 * (first + i)];
		const char *page = shelf_block(shelf, first + i);
		uint32_t segment, slot;

		if (page) {
			there++;
			continue;
		}
		if ((!digest[0] && !digest[1]) || !udd_index_find_shared(index, digest, &segment, &slot) || !shelf_reach(shelf, segment))
			continue;
		page = udd_store_slot(shelf->store, segment, slot);
		if (!page)
			continue;
		if (memcmp(page, data + (size_t)i * UDD_PAGE_SIZE, UDD_PAGE_SIZE)) {
			ret->differing++;
			continue;
		}
		shelf->places[first + i] = (segment - shelf->base) << SLOT_BITS | slot;
		ret->entered++;
		there++;
	}
	return there;
}
