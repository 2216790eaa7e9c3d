// SPDX-License-Identifier: MIT
#include "fault.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#include "../common/uffd.h"
#include "agent.h"
#include "commit.h"
#include "merged.h"
#include "sys.h"
#include "transaction.h"
#include "userfault.h"

enum {
	BATCH = 16,                 // events read at a time
	ASIDE_MAX = 256,            // faults put aside; a blocked thread has one at most
	WIDEN_FACTOR = 4,           // a sequential writer's next break, in multiples of its last
	WIDEN_MOST = 128,           // the copies should still be in the processor's cache when the writer comes to them
	WIDEN_FIRST = 8,            // pages of its second break
	DISSOLVE_NS = 500000,       // one lone page may dissolve every so often
	DISSOLVES_MAX = 128,        // that many at once
	DISSOLVE_SCARCE = 4,        // where over half of its mappings are used up, a process dissolves one in so many of these
	BLOCK_PAGES = 64,           // what is opened to a storm of lone writes at a time, aligned
	OPEN_FROM = 2,              // lone breaks in a block that are a storm
	BLOCK_NS = 1000000000,      // within this time
	OPEN_MOST = 256,            // blocks opened before all are closed again
	OPEN_MS = 500,              // for how long
	EXCLUSIVE_NS = 200000,      // how long to wait for the lock before serving faults with a shared one
	QUIET_NS = 40000,           // with quiet breaks a writer waits for this time (or a multiple, where it was not enough), …
	QUIET_PAGE_NS = 2000,       // … for so much more with each page that breaks, …
	QUIET_RANDOM_NS = 16384,    // … and for something at random below this power of two
	SLICE_NS = 100000,          // the least that the scheduler takes
};

// sched_setattr(2), first version. libc has no declaration of it.
struct sched_attributes {
	uint32_t size;
	uint32_t policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime; // ns
	uint64_t deadline;
	uint64_t period;
};

// A fault was served and its threads are awake; distinct from 0 and every errno.
static const int SERVED = 1;

// Descriptors in the agent's table.
static int epoll_fd = -1;
static int pagemap_fd = -1;

// Addresses of faults that could not be served while the kernel was waiting for an event to be read. Used by whoever
// reads the userfaultfd, hence under the map lock.
static uint64_t aside[ASIDE_MAX];
static unsigned aside_count;

// With quiet breaks: what has broken while its writers still sleep. They can't tell by the time how long that took, which depends
// on how the pages around lie in the store, and that on who has the same. The fault thread's own.
static struct {
	struct udd_span span;
	uint64_t since; // ns: when the fault was read
} asleep[BATCH];
static unsigned asleep_count;
static uint64_t faults_read; // ns: when the last ones were

int udd_fault_pagemap(void)
{
	return pagemap_fd;
}

int udd_fault_prepare(void)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = udd_uffd()};
	long fd = udd_sys(SYS_epoll_create1, EPOLL_CLOEXEC);

	if (udd_failed(fd))
		return (int)fd;
	epoll_fd = (int)fd;
	fd = udd_sys(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (udd_failed(fd))
		return (int)fd;
	pagemap_fd = (int)fd;
	udd_commit_open();
	return (int)udd_sys(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_ADD, event.data.fd, &event);
}

int udd_fault_watch(int socket)
{
	// Edge triggered: the worker empties the socket, nothing needs arming again. Closing it ends the watch.
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.fd = socket};

	return (int)udd_sys(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_ADD, socket, &event);
}

static struct udd_span page_at(uint64_t address)
{
	return (struct udd_span){udd_page_down(address), udd_page_down(address) + UDD_PAGE_SIZE};
}

static void put_aside(uint64_t address)
{
	if (aside_count < ASIDE_MAX)
		aside[aside_count++] = address;
	else
		udd_uffd_wake(page_at(address));
}

void udd_fault_release(void)
{
	while (aside_count)
		udd_uffd_wake(page_at(aside[--aside_count]));
}

// How far to break from `page` on: a writer that goes on where it broke last gets more each time. Empty if this page can't
// be dissolved.
static struct udd_span widen(const struct udd_run_entry *run, uint64_t page)
{
	struct udd_live *live = udd_live();
	uint64_t pages = 1;
	unsigned stream;
	struct udd_span span;

	for (stream = 0; stream < sizeof(live->breaking) / sizeof(live->breaking[0]); stream++) {
		if (live->breaking[stream].next == page) {
			pages = udd_max(WIDEN_FIRST, live->breaking[stream].pages * WIDEN_FACTOR);
			break;
		}
	}
	if (pages == 1)
		stream = live->breaking_next++ % (sizeof(live->breaking) / sizeof(live->breaking[0]));
	pages = udd_min(pages, WIDEN_MOST);
	span = udd_dissolvable(run, (struct udd_span){page, page + udd_bytes(pages)});
	// The page that faulted is surely what the table says.
	if (udd_pages(span.end - span.start) > 1)
		span.end = udd_max(page + UDD_PAGE_SIZE, udd_still_merged(span).end);
	live->breaking[stream].next = span.end;
	live->breaking[stream].pages = pages;
	return span;
}

// Wakes the writers that sleep, each when it is due. Without the lock where that is possible, which others wait for.
static void wake_sleepers(void)
{
	uint32_t random = 0;

	for (unsigned i = 0; i < asleep_count; i++) {
		uint64_t due = asleep[i].since + QUIET_NS + udd_pages(asleep[i].span.end - asleep[i].span.start) * QUIET_PAGE_NS;
		uint64_t now = udd_now();

		if (now > due)
			due += (now - due + QUIET_NS - 1) / QUIET_NS * QUIET_NS;
		// What is left is a matter of some tens of nanoseconds: caches are not the same for all pages.
		udd_sys(SYS_getrandom, &random, sizeof(random), 0);
		due += random % QUIET_RANDOM_NS;
		// A timer would not be exact enough.
		while (udd_now() < due)
			udd_pause();
		udd_uffd_wake(asleep[i].span);
	}
	asleep_count = 0;
}

// Lets the writers of pages that have broken go on.
static void wake_writers(struct udd_span span)
{
	if (!udd_agent.quiet) {
		udd_uffd_wake(span);
		return;
	}
	if (asleep_count == BATCH)
		wake_sleepers();
	asleep[asleep_count].span = span;
	asleep[asleep_count++].since = faults_read;
}

static void count_break(struct udd_span span)
{
	udd_count_breaks(udd_pages(span.end - span.start), 1);
	udd_hold_off(span);
}

static uint32_t unsettled_room(void)
{
	const struct udd_live *live = udd_live();

	return UDD_UNSETTLED_SLOTS - (live->unsettled_tail - __atomic_load_n(&live->unsettled_head, __ATOMIC_ACQUIRE));
}

// There must be room.
static void append_unsettled(struct udd_span span, bool removed)
{
	struct udd_live *live = udd_live();

	live->unsettled[live->unsettled_tail % UDD_UNSETTLED_SLOTS] = (struct udd_unsettled){.span = span, .removed = removed};
	__atomic_store_n(&live->unsettled_tail, live->unsettled_tail + 1, __ATOMIC_RELEASE);
}

// Is there a removal in `span` that the table does not know of? Nobody settles meanwhile: the lock is held, if only shared.
static bool removal_unsettled(struct udd_span span)
{
	const struct udd_live *live = udd_live();

	for (uint32_t i = live->unsettled_head; i != live->unsettled_tail; i++) {
		const struct udd_unsettled *entry = &live->unsettled[i % UDD_UNSETTLED_SLOTS];

		if (entry->removed && udd_span_overlaps(entry->span, span))
			return true;
	}
	return false;
}

// Breaks one page where it is: the kernel copies it as soon as protection is lifted. Without the exclusive lock, the table
// hears of it later; noted before, because the writer goes on at once, and may hold the lock.
static int break_in_place(uint64_t page, bool exclusive)
{
	struct udd_live *live = udd_live();
	struct udd_span span = page_at(page);
	int ret;

	if (!exclusive) {
		if (!unsettled_room())
			return -EAGAIN;
		append_unsettled(span, false);
	}
	ret = udd_agent.quiet ? udd_uffd_unprotect_asleep(span) : udd_uffd_protect(span, false);
	if (ret) {
		// Its reader can't have come by: who might be it is the writer, and waits.
		if (!exclusive)
			__atomic_store_n(&live->unsettled_tail, live->unsettled_tail - 1, __ATOMIC_RELEASE);
		return ret;
	}
	count_break(span);
	if (exclusive)
		udd_broke_in_place(span);
	if (udd_agent.quiet)
		wake_writers(span);
	return SERVED;
}

// May a lone break dissolve its page? Breaking in place takes half the time, but such a page can never be merged again:
// nothing tells whether a device has pinned it. So every break dissolves, up to a rate that costs a process some two percent
// of a CPU: a guest that reads one file after the other breaks hundreds of lone pages a second. In a storm of lone writes the
// rest break in place.
static bool may_dissolve_lone(uint64_t now)
{
	struct udd_live *live = udd_live();
	bool scarce = __atomic_load_n(&live->stats->vmas, __ATOMIC_RELAXED) > live->vma_limit / 2;
	uint64_t every = scarce ? DISSOLVE_SCARCE * DISSOLVE_NS : DISSOLVE_NS;

	if (now - live->dissolves_at > every) {
		live->dissolves = udd_min(DISSOLVES_MAX, live->dissolves + (now - live->dissolves_at) / every);
		live->dissolves_at = now;
	}
	if (!live->dissolves)
		return false;
	live->dissolves--;
	return true;
}

// Notes a lone break. Was it one of several in its block?
static bool block_storm(uint64_t page, uint64_t now)
{
	uint64_t number = udd_pages(page) / BLOCK_PAGES;
	__typeof__(udd_live()->blocks[0]) *block = &udd_live()->blocks[number % UDD_BLOCK_SLOTS];

	if (block->number != number || now - block->at > BLOCK_NS) {
		block->number = number;
		block->breaks = 0;
	}
	block->at = now;
	return ++block->breaks >= OPEN_FROM;
}

// Leaves the merged pages around `page` to the kernel's own copy-on-write, which costs a fraction of a fault that we serve.
// They stay merged until written to; the worker protects them again before long, and enters in the table what broke.
static void open_block(uint64_t page, uint64_t now)
{
	struct udd_live *live = udd_live();
	uint64_t start = page - page % udd_bytes(BLOCK_PAGES);
	struct udd_span block = {start, start + udd_bytes(BLOCK_PAGES)};

	if (live->opened == OPEN_MOST)
		return;
	if (!live->opened++)
		live->opened_at = now;
	for (struct udd_run_entry *run = udd_first_run(block); run; run = udd_runs_next_in(run, block)) {
		if (run->broken || !run->armed)
			continue;
		// First, whatever becomes of the call: what the table takes for armed may be replaced by a copy of the store's.
		run->armed = 0;
		udd_test_count(UDD_TEST_OPENED, run->pages);
		if (udd_uffd_protect(udd_run_span(run), false))
			return;
	}
}

// Has the worker protect again what was opened, when its time is up. Returns how long that is, in ms; -1: nothing is open.
static long close_blocks(void)
{
	struct udd_live *live = udd_live();
	uint64_t open_ms;

	if (!live->opened)
		return -1;
	open_ms = (udd_now() - live->opened_at) / 1000000;
	if (open_ms < OPEN_MS)
		return OPEN_MS - (long)open_ms;
	live->opened = 0;
	udd_ring(UDD_BELL_ARM);
	return -1;
}

// A write to a merged page. With the lock held exclusively the page leaves the store's mapping.
static int serve_write(uint64_t page, bool exclusive)
{
	const struct udd_run_entry *run = udd_runs_find(&udd_agent.runs, page);
	struct udd_span span;
	bool storm = false;
	uint64_t now = 0;
	int ret;

	if (run->broken)
		return udd_uffd_protect(page_at(page), false);
	if (exclusive) {
		udd_commit_look();
		if (udd_commit_strict()) {
			now = udd_now();
			storm = block_storm(page, now);
		}
	}
	if (exclusive && !udd_span_empty(span = widen(run, page))) {
		// Several share the cost; and the kernel's own copying is not quiet.
		bool dissolve = udd_agent.quiet || udd_pages(span.end - span.start) > 1;

		if (!dissolve) {
			now = udd_now();
			storm = block_storm(page, now);
			dissolve = may_dissolve_lone(now);
		}
		if (dissolve && !udd_dissolve(span, UDD_DROP_BREAK)) {
			// First counted: the writer may look.
			count_break(span);
			wake_writers(span);
			return SERVED;
		}
	}
	// Locked, no mapping left to split into, too many of them, or no memory promised for another one.
	ret = break_in_place(page, exclusive);
	if (storm && ret == SERVED)
		open_block(page, now);
	return ret;
}

static int serve_minor(uint64_t page)
{
	bool found;

	return udd_uffd_continue(page_at(page), &found);
}

static void serve_fault(const struct uffd_msg *message, bool exclusive)
{
	uint64_t page = udd_page_down(message->arg.pagefault.address);
	uint64_t flags = message->arg.pagefault.flags;
	int ret = 0;

	if (removal_unsettled(page_at(page))) {
		// To the application its content is gone, the table still has the store's: nobody may see it again.
		ret = -EAGAIN;
	} else if (udd_merged_in(page_at(page))) {
		if (flags & UFFD_PAGEFAULT_FLAG_WP)
			ret = serve_write(page, exclusive);
		else if (flags & UFFD_PAGEFAULT_FLAG_MINOR)
			ret = serve_minor(page);
	}
	// mlockall() populates our staging area too. It has to go on; the area is renewed before it is used again.
	if (udd_staging_holds(page))
		ret = udd_staging_populate(page);
	// Everything else was frozen a moment ago and is back, or is no longer merged. Whoever waits tries again.
	if (ret == -EAGAIN)
		put_aside(page);
	else if (ret != SERVED)
		udd_uffd_wake(page_at(page));
}

// Memory was, or is about to be, dropped by a raw system call. The kernel goes on with it once we have read the event, at a
// time we can't know: from now on a transaction might bring back what it drops. So there are no more of them.
static void note_removal(void)
{
	__atomic_add_fetch(&udd_live()->stats->foreign_events, 1, __ATOMIC_RELAXED);
	udd_test_count(UDD_TEST_FOREIGN, 1);
	udd_stop_merging("memory was discarded by a raw system call");
}

static void serve_removal(struct udd_span span)
{
	note_removal();
	if (udd_merged_in(span)) {
		udd_discard(span);
		udd_uffd_wake(span);
	}
}

// Without the lock held exclusively. Who made it waits for nothing any more, but no transaction starts.
static void defer_removal(struct udd_span span)
{
	note_removal();
	append_unsettled(span, true);
}

// Reads up to BATCH events. Returns how many.
static unsigned read_events(struct uffd_msg *messages)
{
	long got;

	do
		got = udd_sys(SYS_read, udd_uffd(), messages, BATCH * sizeof(*messages));
	while (got == -EINTR);
	if (udd_agent.quiet)
		faults_read = udd_now();
	return udd_failed(got) ? 0 : (unsigned)((unsigned long)got / sizeof(*messages));
}

// Which of the UDD_RUN_MAX pages from `base` on lie in `span`.
static uint64_t pages_in(struct udd_span span, uint64_t base)
{
	uint64_t ret = 0;

	for (unsigned i = 0; i < UDD_RUN_MAX; i++) {
		if (udd_span_overlaps(page_at(base + udd_bytes(i)), span))
			ret |= 1UL << i;
	}
	return ret;
}

uint64_t udd_fault_drain(uint64_t base)
{
	struct uffd_msg messages[BATCH];
	uint64_t removed = 0;
	unsigned count;

	while ((count = read_events(messages))) {
		for (unsigned i = 0; i < count; i++) {
			if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
				put_aside(messages[i].arg.pagefault.address);
			} else if (messages[i].event == UFFD_EVENT_REMOVE) {
				struct udd_span span = {messages[i].arg.remove.start, messages[i].arg.remove.end};

				serve_removal(span);
				removed |= pages_in(span, base);
			}
		}
	}
	return removed;
}

// Serves faults of the thread that holds the lock exclusively.
static void serve_owner_only(int32_t owner)
{
	struct uffd_msg messages[BATCH];
	unsigned count = read_events(messages);

	for (unsigned i = 0; i < count; i++) {
		uint64_t page = udd_page_down(messages[i].arg.pagefault.address);
		int ret = 0;

		if (messages[i].event == UFFD_EVENT_REMOVE) {
			defer_removal((struct udd_span){messages[i].arg.remove.start, messages[i].arg.remove.end});
			continue;
		}
		if (messages[i].event != UFFD_EVENT_PAGEFAULT)
			continue;
		if ((int32_t)messages[i].arg.pagefault.feat.ptid != owner) {
			put_aside(page);
			continue;
		}
		if (messages[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
			ret = break_in_place(page, false);
		else if (messages[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR)
			ret = serve_minor(page);
		// Not put aside if an event must be read first: that would be for as long as it holds the lock. It faults again, and
		// finds us back in a moment.
		if (ret != SERVED)
			udd_uffd_wake(page_at(page));
	}
	wake_sleepers();
}

// An application thread holds the lock exclusively, in a hook, and ran into a merged page itself: its stack, say. It can't
// wait for us while we wait for it. No transaction is under way, nor can one begin before we let the owner go, so its faults
// are served in place; everything else waits until the lock is free.
static void serve_owner(void)
{
	struct udd_lock *lock = &udd_live()->lock;
	int32_t owner = unsettled_room() < BATCH ? 0 : udd_lock_keep_owner(lock);

	if (!owner)
		return;
	serve_owner_only(owner);
	udd_lock_let_go_owner(lock);
}

// Events are read under the map lock, so that none is overtaken by a transaction. Held exclusively wherever that is to be
// had in time; an application thread that holds it shared may be waiting for us. False if removals were read that the table
// could not be told of: then it is to be called again.
static bool serve_all(void)
{
	struct udd_live *live = udd_live();
	struct uffd_msg messages[BATCH];
	bool exclusive;
	bool settled;
	unsigned count;

	while (!(exclusive = udd_lock_exclusive_timed(&live->lock, EXCLUSIVE_NS)) && !udd_trylock_shared_urgent(&live->lock))
		serve_owner();
	if (exclusive)
		udd_settle();
	do {
		count = exclusive || unsettled_room() >= BATCH ? read_events(messages) : 0;
		for (unsigned i = 0; i < count; i++) {
			if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
				serve_fault(&messages[i], exclusive);
			} else if (messages[i].event == UFFD_EVENT_REMOVE) {
				struct udd_span span = {messages[i].arg.remove.start, messages[i].arg.remove.end};

				if (exclusive)
					serve_removal(span);
				else
					defer_removal(span);
			}
		}
		// What was put aside waits for an event that has not been read yet.
	} while (count == BATCH || (count && aside_count));
	settled = !removal_unsettled((struct udd_span){0, UINT64_MAX});
	udd_fault_release();
	if (exclusive)
		udd_unlock_exclusive(&live->lock);
	else
		udd_unlock_shared(&live->lock);
	wake_sleepers();
	return settled;
}

// We have little to do at a time, and others wait for it. In EEVDF (Linux 6.12) who asks for a short slice comes sooner to
// it, and no further ahead; older kernels ignore it. A process with a real-time policy is left as it is.
static void ask_for_short_slices(void)
{
	struct sched_attributes attributes = {.size = sizeof(attributes)};

	if (udd_failed(udd_sys(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0)) || attributes.policy != SCHED_OTHER)
		return;
	attributes.runtime = SLICE_NS;
	udd_sys(SYS_sched_setattr, 0, &attributes, 0);
}

void udd_fault_thread(void *argument)
{
	struct epoll_event events[4];

	(void)argument;
	ask_for_short_slices();
	for (;;) {
		long count = udd_sys(SYS_epoll_pwait, epoll_fd, events, 4, close_blocks(), NULL, 0);

		for (long i = 0; i < count; i++) {
			if (events[i].data.fd != udd_uffd())
				udd_ring(UDD_BELL_SOCKET);
			else
				while (!serve_all())
					;
		}
	}
}
