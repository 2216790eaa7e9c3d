// SPDX-License-Identifier: MIT
#include "rings.h"

#include <time.h>

#include "sys.h"

static uint64_t vdso_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void udd_hint_push(const void *address, uint64_t length, uint32_t flags, const struct udd_source *source)
{
	struct udd_live *live = udd_live();
	struct udd_hint_ring *ring = __atomic_load_n(&live->hints, __ATOMIC_ACQUIRE);
	uint64_t start = (uint64_t)(uintptr_t)address;
	uint64_t ticket;
	struct udd_hint *hint;

	if (!ring || udd_page_up(start) + UDD_PAGE_SIZE > start + length)
		return;
	ticket = __atomic_fetch_add(&ring->head, 1, __ATOMIC_RELAXED);
	hint = &ring->slots[ticket % UDD_HINT_SLOTS];
	__atomic_store_n(&hint->sequence, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	hint->address = start;
	hint->length = (uint32_t)udd_min(length, UINT32_MAX);
	hint->flags = flags;
	hint->inode = source->inode;
	hint->offset = source->offset;
	hint->nanoseconds = vdso_now() | (source->on_mount ? 1UL << 63 : 0);
	__atomic_store_n(&hint->sequence, ticket + 1, __ATOMIC_RELEASE);
	__atomic_add_fetch(&live->stats->hint_count, 1, __ATOMIC_RELAXED);
	if (__atomic_load_n(&ring->waiting, __ATOMIC_SEQ_CST) && __atomic_exchange_n(&ring->waiting, 0, __ATOMIC_SEQ_CST))
		udd_ring(UDD_BELL_HINTS);
}

void udd_drop_push(const struct udd_run_entry *run, const struct udd_segment_map *segment, uint32_t flags)
{
	struct udd_live *live = udd_live();
	struct udd_drop_ring *ring = live->drops;
	uint64_t head;

	// Runs of an engine that is gone are nobody's business; a child reports what it holds when it joins.
	if (!ring || udd_segment_is_foreign(segment))
		return;
	// Not reported to the engine yet, so it can't count it.
	if (run->address >= live->reported)
		return;
	head = ring->head;
	if (head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) >= UDD_DROP_SLOTS) {
		__atomic_add_fetch(&live->stats->drops_lost, 1, __ATOMIC_RELAXED);
		return;
	}
	ring->slots[head % UDD_DROP_SLOTS] = (struct udd_drop){
		.address = run->address,
		.segment = segment->id,
		.slot = run->slot,
		.pages = run->pages,
		.flags = flags,
	};
	__atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
}
