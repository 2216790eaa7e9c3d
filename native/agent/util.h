// SPDX-License-Identifier: MIT
// Small things every part of the agent needs: page arithmetic, ranges, the clock.
#ifndef UDD_UTIL_H
#define UDD_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "../common/wire.h"
#include "sys.h"

// Addresses [start, end).
struct udd_span {
	uint64_t start;
	uint64_t end;
};

static inline uint64_t udd_page_down(uint64_t address)
{
	return address & ~(uint64_t)(UDD_PAGE_SIZE - 1);
}

static inline uint64_t udd_page_up(uint64_t address)
{
	return udd_page_down(address + UDD_PAGE_SIZE - 1);
}

static inline uint64_t udd_bytes(uint64_t pages)
{
	return pages << UDD_PAGE_SHIFT;
}

static inline uint64_t udd_pages(uint64_t bytes)
{
	return bytes >> UDD_PAGE_SHIFT;
}

static inline uint64_t udd_min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t udd_max(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static inline bool udd_span_empty(struct udd_span span)
{
	return span.start >= span.end;
}

static inline struct udd_span udd_span_clip(struct udd_span span, struct udd_span to)
{
	return (struct udd_span){.start = udd_max(span.start, to.start), .end = udd_min(span.end, to.end)};
}

static inline bool udd_span_overlaps(struct udd_span a, struct udd_span b)
{
	return a.start < b.end && b.start < a.end;
}

static inline void *udd_pointer(uint64_t address)
{
	return (void *)(uintptr_t)address; // NOLINT(performance-no-int-to-ptr): addresses of the host process
}

static inline void udd_pause(void)
{
	__builtin_ia32_pause();
}

static inline struct timespec udd_timespec(uint64_t nanoseconds)
{
	return (struct timespec){.tv_sec = (time_t)(nanoseconds / 1000000000), .tv_nsec = (long)(nanoseconds % 1000000000)};
}

static inline uint64_t udd_clock(int clock)
{
	struct timespec now = {0};

	udd_sys(SYS_clock_gettime, clock, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

// CLOCK_MONOTONIC, ns, by a system call: for the agent's threads, which must not enter libc.
static inline uint64_t udd_now(void)
{
	return udd_clock(CLOCK_MONOTONIC);
}

#endif
