// SPDX-License-Identifier: MIT
//
// The merge transaction
// =====================
//
// Merging a page means: the application's private anonymous page goes away, and the same bytes appear in its place, out of
// a store segment mapped privately. The application's threads run all the while. What can go wrong, and what prevents it:
//
//  - A thread writes between our comparison and the replacement, and the write is lost. So the page is *frozen* first:
//    UFFDIO_MOVE takes it out of the application's page table into our staging area. Whoever touches the address now
//    waits in a userfault; what we compare can't change any more.
//
//  - A device writes: the page is pinned for DMA (O_DIRECT, io_uring, vfio). Page tables don't matter to a device. UFFDIO_MOVE
//    refuses pinned pages, and pages that are shared with a fork child; that refusal is why it is used for freezing.
//
//  - The digest lied, or the page changed since. We compare every byte with our own read-only mapping of the store, whose
//    pages never change once published. Different pages are moved back.
//
//  - A thread unmaps the run meanwhile, and another maps something else there: our MAP_FIXED would overwrite it. Calls that
//    change mappings are hooked and hold the map lock shared; we hold it exclusively. Removals that come past the hooks
//    raise userfaultfd's REMOVE event; the run in question is dropped, and merging ends in this process.
//
//  - Something fails half way (ENOMEM, mapping limit). Whatever was moved out is moved back, and the whole range is woken.
//
// Pages of files that nobody can write to take a shorter way (merge_file, and files.h for how they go back).
//
// A merged run is registered write-protected (WP) and MINOR: a write wakes the fault thread (fault.c), which *dissolves* the
// page: it puts a private copy in its place before the writer goes on. The copy is made from the store, not from the
// application's page, and becomes ordinary anonymous memory, which may merge again. It is moved in with mremap(), so that no
// thread ever sees the address without its content. MREMAP_DONTUNMAP leaves our side mapped, and the offset within our
// area follows the address, so that neighbouring dissolved pages become one mapping again.
//
// What broke without us (the kernel's own copy-on-write in a fork child, before its agent is up, or where a storm of writes is
// left to it) stays where it is, marked `broken` in the table: such a page may be pinned by a device, so it must never be
// copied elsewhere.

#include "transaction.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "commit.h"
#include "fault.h"
#include "merged.h"
#include "scan.h"
#include "segments.h"
#include "sys.h"
#include "userfault.h"

enum {
	LOCK_PATIENCE_NS = 2000000, // the worker rather comes back later than holds up the application
	REST_NS = 500000,           // how long the worker may go on without giving way
	VMAS_PER_RUN = 2,           // a lone merged page splits its mapping in three
};

// ---- tests ----

void udd_test_step(void)
{
	static uint32_t seed = 1;
	uint32_t draw;

	if (!udd_agent.test_delays)
		return;
	seed = seed * 1103515245 + 12345;
	draw = (seed >> 16) % 64;
	// Mostly a few microseconds, now and then long enough for everyone else to run.
	if (draw == 0) {
		udd_sys(SYS_sched_yield);
	} else if (draw < 3) {
		struct timespec delay = {.tv_nsec = (long)((seed >> 8) % 100000)};

		udd_sys(SYS_nanosleep, &delay, NULL);
	} else if (draw < 24) {
		for (uint32_t i = (seed >> 8) % 256; i; i--)
			udd_pause();
	}
}

// ---- the worker's lock ----

// When the worker last let others have its CPU.
static uint64_t rested;

// A thread that uses up its slice is made to wait in the middle of whatever it does, and with the lock held everyone waits
// along. Who sleeps, however shortly, begins a new slice.
static void rest(void)
{
	const struct timespec shortly = {.tv_nsec = 1};
	uint64_t now = udd_now();

	if (now - rested < REST_NS)
		return;
	udd_sys(SYS_nanosleep, &shortly, NULL);
	rested = udd_now();
}

bool udd_worker_lock(uint64_t *started)
{
	rest();
	if (!udd_lock_exclusive_last(&udd_live()->lock, LOCK_PATIENCE_NS))
		return false;
	*started = udd_now();
	udd_commit_look_at_mode(*started);
	udd_settle();
	udd_layout_apply(&udd_agent.layout, udd_live()->stale, &udd_live()->stale_count);
	return true;
}

void udd_worker_unlock(uint64_t started)
{
	struct udd_stats *stats = udd_live()->stats;
	uint64_t held;

	udd_unlock_exclusive(&udd_live()->lock);
	udd_fault_release();
	held = udd_now() - started;
	if (held > stats->lock_max_ns)
		__atomic_store_n(&stats->lock_max_ns, held, __ATOMIC_RELAXED);
}

// For what must be done: tries again and again, and lets the application's threads pass in between.
void udd_worker_lock_patiently(uint64_t *started)
{
	const struct timespec pause = {.tv_nsec = 1000000};

	while (!udd_worker_lock(started))
		udd_sys(SYS_nanosleep, &pause, NULL);
}

// ---- freezing ----

// Frozen pages lie in staging at the offset they have from `base` (of the transaction's first page).
struct transaction {
	uint64_t base;             // application address of page 0
	char *staging;             // where page 0 is frozen
	uint64_t frozen;           // bit mask of pages in staging
	uint64_t busy;             // pages that the kernel refused
	uint64_t gone;             // pages that are not there
	uint64_t same;             // pages of files that are equal to the store's
	uint64_t removed;          // pages whose removal came past the hooks
};

static uint64_t bit(unsigned page)
{
	return 1UL << page;
}

static uint64_t bits(unsigned from, unsigned to)
{
	return from == to ? 0 : ~0UL >> (64 - (to - from)) << from;
}

static struct udd_span pages_span(const struct transaction *tx, unsigned from, unsigned to)
{
	return (struct udd_span){tx->base + udd_bytes(from), tx->base + udd_bytes(to)};
}

// End of the stretch of set bits that starts at `from`, below `to`.
static unsigned stretch_end(uint64_t mask, unsigned from, unsigned to)
{
	while (from < to && mask & bit(from))
		from++;
	return from;
}

// An ioctl said EAGAIN: the kernel waits until someone reads the event of a mapping change. That is us: the fault thread
// can't, we hold the lock. Who made the event has to run before the ioctl can succeed. We sleep for that rather than yield:
// in the scheduler's eyes a thread that yields has had its turn, and everyone waits for the lock until its next.
static void read_events(struct transaction *tx)
{
	const struct timespec pause = {.tv_nsec = 20000};
	uint64_t removed = udd_fault_drain(tx->base);

	tx->removed |= removed;
	if (!removed)
		udd_sys(SYS_nanosleep, &pause, NULL);
}

// A page that a fork child no longer shares is still marked as shared until the next write to it. Populating for write
// takes that mark off without changing anything, so that the page can be moved. Never a hole, or a page whose removal was
// read, which the kernel may drop any moment: we would wait in a fault that is served after we give the lock back.
static bool take_back_from_fork(uint64_t address)
{
	unsigned char there = 0;

	return !udd_failed(udd_sys(SYS_mincore, address, UDD_PAGE_SIZE, &there)) && (there & 1) &&
	       !udd_failed(udd_sys(SYS_madvise, address, UDD_PAGE_SIZE, MADV_POPULATE_WRITE));
}

static void freeze(struct transaction *tx, unsigned from, unsigned to)
{
	enum { RETRIES = 16 };
	unsigned retries = 0;
	bool taken_back = false;

	while (from < to) {
		uint64_t offset = udd_bytes(from);
		int error;
		uint64_t moved = udd_uffd_move((uint64_t)(uintptr_t)tx->staging + offset, tx->base + offset, udd_bytes(to - from), &error);
		unsigned done = from + (unsigned)udd_pages(moved);

		tx->frozen |= bits(from, done);
		from = done;
		if (from == to)
			break;
		// Having moved some, the kernel says EAGAIN whatever stopped it.
		if (moved)
			continue;
		if (error == -EAGAIN && retries++ < RETRIES) {
			read_events(tx);
			continue;
		}
		if (error == -EBUSY && !taken_back && !(tx->removed & bit(from)) &&
		    take_back_from_fork(tx->base + udd_bytes(from))) {
			taken_back = true;
			continue;
		}
		taken_back = false;
		if (error == -EBUSY || error == -EAGAIN) {
			tx->busy |= bit(from);
			udd_test_count(UDD_TEST_REFUSED, 1);
		} else {
			tx->gone |= bit(from);
		}
		from++;
	}
}

// Puts frozen pages back. What the application dropped meanwhile, past the hooks, stays dropped: whether we know of it
// already, or learn of it here.
static void thaw(struct transaction *tx, uint64_t mask)
{
	const struct timespec pause = {.tv_nsec = 1000000};

	tx->frozen &= ~mask;
	while ((mask &= ~tx->removed)) {
		unsigned from = (unsigned)__builtin_ctzl(mask);
		unsigned to = stretch_end(mask, from, UDD_RUN_MAX);
		uint64_t offset = udd_bytes(from);
		int error;
		uint64_t moved = udd_uffd_move(tx->base + offset, (uint64_t)(uintptr_t)tx->staging + offset, udd_bytes(to - from), &error);

		mask &= ~bits(from, from + (unsigned)udd_pages(moved));
		if (moved)
			continue;
		if (error == -EAGAIN) {
			read_events(tx);
		} else if (error == -ENOMEM) {
			udd_sys(SYS_nanosleep, &pause, NULL);
		} else {
			// The mapping is no longer the one we took the page from: unmapped past the hooks.
			udd_stop_merging("memory was unmapped by a raw system call");
			mask &= ~bit(from);
		}
	}
}

// ---- merging ----

static bool held_off(uint64_t address, uint64_t now)
{
	uint64_t page = udd_pages(address);
	const __typeof__(udd_live()->holdoff[0]) *slot = &udd_live()->holdoff[page % UDD_HOLDOFF_SLOTS];

	return slot->page == page && now < slot->until;
}

void udd_hold_off(struct udd_span span)
{
	struct udd_live *live = udd_live();
	uint64_t until = udd_now() + live->holdoff_ns;

	for (uint64_t page = udd_pages(span.start); page < udd_pages(span.end); page++) {
		__typeof__(live->holdoff[0]) *slot = &live->holdoff[page % UDD_HOLDOFF_SLOTS];

		slot->page = page;
		slot->until = until;
	}
}

static uint64_t mappings_now(void)
{
	const struct udd_layout *layout = &udd_agent.layout;
	int64_t since = (int64_t)udd_agent.runs.count - (int64_t)layout->runs;

	return layout->mappings + (since > 0 ? VMAS_PER_RUN * (uint64_t)since : 0);
}

// Bits of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
static const uint64_t PAGEMAP_PROTECTED = 1UL << 57; // by userfaultfd
static const uint64_t PAGEMAP_FILE = 1UL << 61;
static const uint64_t PAGEMAP_SWAPPED = 1UL << 62;
static const uint64_t PAGEMAP_PRESENT = 1UL << 63;

// Entries of at most UDD_RUN_MAX pages. 0 or a negative errno.
static int read_pagemap(struct udd_span span, uint64_t *ret)
{
	long bytes = (long)(udd_pages(span.end - span.start) * sizeof(*ret));
	long got = udd_sys(SYS_pread64, udd_fault_pagemap(), ret, bytes, udd_pages(span.start) * sizeof(*ret));

	if (got == bytes)
		return 0;
	return udd_failed(got) ? (int)got : -EIO;
}

struct udd_span udd_still_merged(struct udd_span span)
{
	const uint64_t wanted = PAGEMAP_PROTECTED | PAGEMAP_FILE | PAGEMAP_PRESENT;
	struct udd_span ret = {span.start, span.start};
	uint64_t entries[UDD_RUN_MAX];

	while (ret.end < span.end) {
		struct udd_span next = {ret.end, udd_min(span.end, ret.end + udd_bytes(UDD_RUN_MAX))};

		if (read_pagemap(next, entries))
			return ret;
		for (uint64_t i = 0; i < udd_pages(next.end - next.start); i++) {
			if ((entries[i] & wanted) != wanted)
				return ret;
			ret.end += UDD_PAGE_SIZE;
		}
	}
	return ret;
}

// All of them?
static bool still_merged(struct udd_span span)
{
	return udd_still_merged(span).end == span.end;
}

int udd_private_copies(struct udd_span span, uint64_t *ret)
{
	uint64_t entries[UDD_RUN_MAX];
	int error = read_pagemap(span, entries);

	*ret = 0;
	for (unsigned i = 0; !error && i < udd_pages(span.end - span.start); i++) {
		if ((entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED)) && !(entries[i] & PAGEMAP_FILE))
			*ret |= bit(i);
	}
	return error;
}

// Pages of `span` that are private copies already broke before they were write-protected.
static int find_broken(struct udd_span span)
{
	uint64_t copies;
	int ret = udd_private_copies(span, &copies);

	if (ret)
		return ret;
	for (unsigned i = 0; i < udd_pages(span.end - span.start); i++) {
		struct udd_span page = {span.start + udd_bytes(i), span.start + udd_bytes(i + 1)};

		if (copies & bit(i)) {
			udd_broke_in_place(page);
			udd_count_breaks(1, 0);
			udd_uffd_protect(page, false);
		}
	}
	return 0;
}

// Write-protects a mapped run of at most UDD_RUN_MAX pages. Between mapping and registering, threads may have touched it.
static int arm(struct udd_span span)
{
	bool touched;
	int ret = udd_uffd_register(span, UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR);

	if (!ret)
		ret = udd_uffd_continue(span, &touched);
	if (!ret && touched) {
		ret = udd_uffd_protect(span, true);
		if (!ret)
			ret = find_broken(span);
	}
	if (ret)
		return ret;
	for (struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span))
		run->armed = 1;
	return 0;
}

bool udd_arm_runs(void)
{
	for (uint64_t at = 0;;) {
		struct udd_runs *runs = &udd_agent.runs;
		struct udd_run_entry *run;
		uint64_t started;

		if (!udd_worker_lock(&started))
			return false;
		run = runs->count ? udd_runs_find(runs, at) : NULL;
		while (run && (run->armed || run->broken || run->file))
			run = udd_runs_next(run);
		if (run && udd_reserve_runs(UDD_RUN_MAX))
			run = NULL;
		if (run) {
			struct udd_span span = udd_run_span(run);

			span.start = udd_max(span.start, at);
			span.end = udd_min(span.end, span.start + udd_bytes(UDD_RUN_MAX));
			at = span.end;
			udd_runs_split(runs, span);
			// A run that can't be armed works all the same; it only breaks uncounted.
			arm(span);
			udd_uffd_wake(span);
		}
		udd_worker_unlock(started);
		if (!run)
			return true;
	}
}

// The first pages of a run inside `span`, as many as are treated at a time.
static struct udd_span start_of(const struct udd_run_entry *run, struct udd_span span)
{
	struct udd_span ret = udd_span_clip(udd_run_span(run), span);

	ret.end = udd_min(ret.end, ret.start + udd_bytes(UDD_RUN_MAX));
	return ret;
}

// Pages that are merged, all of them. 0 or a negative errno.
static int make_private(struct udd_span span)
{
	long ret;

	udd_commit_look();
	if (!udd_commit_strict())
		return udd_dissolve(span, 0);
	// What can't be written to need not be made private before it can.
	if (!(udd_first_run(span)->protection & PROT_WRITE))
		return 0;
	// From here on the kernel breaks them: what the table takes for armed may be replaced by a copy of the store's. Nor may the fault
	// thread be asked for a page, which can't have the lock. Arming finds out what broke.
	for (struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span))
		run->armed = 0;
	udd_uffd_unregister(span);
	ret = udd_sys(SYS_madvise, span.start, span.end - span.start, MADV_POPULATE_WRITE);
	if (arm(span))
		udd_ring(UDD_BELL_ARM);
	return (int)ret;
}

uint64_t udd_unmerge(struct udd_span span)
{
	uint64_t before = udd_live()->stats->pages_merged;

	while (span.start < span.end) {
		struct udd_runs *runs = &udd_agent.runs;
		const struct udd_run_entry *run;
		struct udd_span piece;
		uint64_t started;
		int ret;

		udd_worker_lock_patiently(&started);
		run = udd_runs_first(runs, span);
		if (run && !run->armed && !run->broken && !run->file) {
			// Arming finds out what broke meanwhile, which are runs of their own then.
			piece = start_of(run, span);
			udd_runs_split(runs, piece);
			arm(piece);
			run = udd_runs_first(runs, span);
		}
		if (!run) {
			udd_worker_unlock(started);
			break;
		}
		piece = start_of(run, span);
		if (run->file) {
			udd_files_restore(piece, false);
			ret = 0;
		} else {
			ret = still_merged(piece) ? make_private(piece) : 0;
		}
		udd_uffd_wake(piece);
		udd_worker_unlock(started);
		span.start = piece.end;
		if (ret)
			break;
	}
	return before - udd_live()->stats->pages_merged;
}

// Maps the store over pages that were compared and are frozen, or merged elsewhere so far.
static int map_store(const struct transaction *tx, unsigned from, unsigned to, const struct udd_run_entry *run)
{
	struct udd_span span = pages_span(tx, from, to);
	struct udd_segment_map *segment = udd_segment_of(run);
	struct udd_run_entry entry = *run;
	int type = run->file && udd_agent.files[run->file - 1].shared ? MAP_SHARED : MAP_PRIVATE;
	long ret;

	ret = udd_sys(SYS_mmap, span.start, span.end - span.start, run->protection, type | MAP_FIXED, segment->fd,
		      udd_bytes(run->slot + from));
	if (udd_failed(ret))
		return (int)ret;
	udd_test_step();
	udd_restore_attributes(span, run->attributes);
	entry.address = span.start;
	entry.pages = to - from;
	entry.slot = run->slot + from;
	entry.armed = 0;
	entry.broken = 0;
	udd_insert_run(&entry);
	segment->references += entry.pages;
	udd_count_merged(entry.pages);
	udd_publish_runs();
	// Should arming fail, the run is right all the same: the kernel breaks it by itself, until udd_arm_runs tries again.
	if (!run->file && arm(span))
		udd_ring(UDD_BELL_ARM);
	return 0;
}

static bool same_page(const char *a, const char *b)
{
	return memcmp(a, b, UDD_PAGE_SIZE) == 0;
}

// Pages of [from, to) that are merged already go from their slots to the new ones: both copies are the store's own and
// never change, so nothing needs freezing. How segments are retired.
static void relocate(const struct transaction *tx, unsigned from, unsigned to, const struct udd_run_entry *wanted,
		     struct udd_merge_result *ret)
{
	struct udd_span span = pages_span(tx, from, to);
	struct udd_run_entry old = *udd_first_run(span);
	struct udd_run_entry target = *wanted;
	const char *old_pages = udd_store_page(&old);
	const char *new_pages = udd_store_page(wanted) + udd_bytes(from);
	uint64_t copies = 0;
	int error;

	// A hint may be about pages that are there already.
	if (old.segment == wanted->segment && old.slot == wanted->slot + from) {
		ret->busy |= bits(from, to);
		return;
	}
	// What is locked would not be so in another mapping.
	if (old.broken || (old.attributes & UDD_ATTRIBUTE_LOCKED) ||
	    (old.file ? udd_private_copies(span, &copies) || copies : !old.armed || !still_merged(span))) {
		ret->busy |= bits(from, to);
		return;
	}
	if (memcmp(old_pages, new_pages, udd_bytes(to - from)) != 0) {
		ret->mismatch |= bits(from, to);
		return;
	}
	target.attributes = old.attributes;
	target.protection = old.protection;
	target.file = old.file;
	// The old entry goes first, so that the table never has two for one page; it comes back if mapping fails.
	udd_remove_runs(span);
	error = map_store(tx, from, to, &target);
	if (error) {
		udd_insert_run(&old);
		ret->no_vma |= bits(from, to);
		return;
	}
	udd_release_run(&old, 0);
	ret->merged |= bits(from, to);
}

// Freezes, compares and maps the pages [from, to), which lie in one candidate and are not merged.
static void merge_stretch(struct transaction *tx, unsigned from, unsigned to, const struct udd_run_entry *run,
			  struct udd_merge_result *ret)
{
	struct udd_span span = pages_span(tx, from, to);
	uint64_t equal = 0;

	if (udd_uffd_register(span, UFFDIO_REGISTER_MODE_MISSING)) {
		ret->gone |= bits(from, to);
		return;
	}
	udd_test_step();
	freeze(tx, from, to);
	udd_test_step();
	for (unsigned i = from; i < to; i++) {
		if ((tx->frozen & bit(i)) && same_page(tx->staging + udd_bytes(i), udd_store_page(run) + udd_bytes(i)))
			equal |= bit(i);
	}
	ret->mismatch |= tx->frozen & ~equal;
	thaw(tx, tx->frozen & ~equal);
	udd_test_step();
	for (unsigned i = from; i < to;) {
		unsigned end = stretch_end(equal, i, to);

		if (end == i) {
			i++;
			continue;
		}
		// Dropped by a raw system call while it was frozen: it must read as zeros, so it stays away.
		if (bits(i, end) & tx->removed) {
			thaw(tx, bits(i, end));
			ret->gone |= bits(i, end);
		} else if (map_store(tx, i, end, run)) {
			thaw(tx, bits(i, end));
			ret->no_vma |= bits(i, end);
		} else {
			tx->frozen &= ~bits(i, end);
			ret->merged |= bits(i, end);
		}
		i = end;
	}
	// Whatever did not merge is plain memory again; unregistering wakes those who wait for it.
	for (unsigned i = from; i < to;) {
		unsigned end = stretch_end(~ret->merged, i, to);

		if (end > i)
			udd_uffd_unregister(pages_span(tx, i, end));
		i = end > i ? end : i + 1;
	}
	ret->busy |= tx->busy & bits(from, to);
	ret->gone |= tx->gone & bits(from, to);
	udd_uffd_wake(span);
	udd_test_count(UDD_TEST_TRANSACTIONS, 1);
}

// Pages [from, to) of a file's mapping, which nobody can write to. Whether they are equal was found out before the lock was
// taken, because reading them may take until their server answers; the mapping has not changed since, or the candidate would
// be stale and the mapping forgotten. A debugger's private copies stay.
static void merge_file(struct transaction *tx, unsigned from, unsigned to, const struct udd_run_entry *run,
		       struct udd_merge_result *ret)
{
	uint64_t copies;
	uint64_t equal;

	if (!udd_file_holds(run->file, pages_span(tx, from, to))) {
		ret->gone |= bits(from, to);
		return;
	}
	if (udd_private_copies(pages_span(tx, from, to), &copies))
		copies = ~0UL;
	copies = copies << from & bits(from, to);
	equal = tx->same & bits(from, to) & ~copies;
	ret->busy |= copies;
	ret->mismatch |= bits(from, to) & ~equal & ~copies;
	for (unsigned i = from; i < to;) {
		unsigned end = stretch_end(equal, i, to);

		if (end == i) {
			i++;
			continue;
		}
		if (udd_file_take(run->file, end - i)) {
			ret->no_vma |= bits(i, end);
		} else if (udd_test_step(), map_store(tx, i, end, run)) {
			// It may have unmapped what was there before it failed.
			udd_file_map_back(run->file, pages_span(tx, i, end));
			udd_file_put(run->file, end - i);
			ret->no_vma |= bits(i, end);
		} else {
			ret->merged |= bits(i, end);
		}
		i = end;
	}
	udd_test_count(UDD_TEST_TRANSACTIONS, 1);
}

// Pages of staging used since it was last emptied.
static unsigned staging_used;

int udd_staging_reset(void)
{
	struct udd_span span = {(uint64_t)(uintptr_t)udd_agent.staging,
				(uint64_t)(uintptr_t)udd_agent.staging + udd_bytes(UDD_STAGING_PAGES)};
	long ret;

	// A fresh mapping, not MADV_DONTNEED: that would raise an event on our own userfaultfd and wait for it.
	ret = udd_sys(SYS_mmap, span.start, span.end - span.start, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	if (udd_failed(ret))
		return (int)ret;
	udd_sys(SYS_madvise, span.start, span.end - span.start, MADV_WIPEONFORK);
	udd_sys(SYS_madvise, span.start, span.end - span.start, MADV_NOHUGEPAGE);
	staging_used = 0;
	// The kernel moves only into memory that is registered with the userfaultfd it is asked through.
	return udd_uffd_register(span, UFFDIO_REGISTER_MODE_MISSING);
}

bool udd_staging_holds(uint64_t address)
{
	uint64_t start = (uint64_t)(uintptr_t)udd_agent.staging;

	return address >= start && address < start + udd_bytes(UDD_STAGING_PAGES);
}

int udd_staging_populate(uint64_t page)
{
	struct uffdio_zeropage arg = {.range = {.start = page, .len = UDD_PAGE_SIZE}};

	// Nothing can be moved to a page that is there.
	staging_used = UDD_STAGING_PAGES;
	return (int)udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_ZEROPAGE, &arg);
}

static bool staging_take(struct transaction *tx, unsigned pages)
{
	if (staging_used + pages > UDD_STAGING_PAGES && udd_staging_reset())
		return false;
	tx->staging = udd_agent.staging + udd_bytes(staging_used);
	staging_used += pages;
	return true;
}

// Asked under the lock at every step: whoever learns of an unannounced removal, and udedup_pause(), say so under the lock.
static bool may_merge(void)
{
	return udd_live()->merging && !__atomic_load_n(&udd_live()->stats->paused, __ATOMIC_RELAXED);
}

// Splits [0, run->pages) into stretches that are alike: held off, merged already, candidates, or nothing of ours.
static void merge_locked(struct transaction *tx, const struct udd_run *run, int segment, uint64_t now,
			 struct udd_merge_result *ret)
{
	struct udd_run_entry entry = {.slot = run->slot, .segment = (uint16_t)segment};

	for (unsigned from = 0; from < run->pages;) {
		uint64_t address = tx->base + udd_bytes(from);
		const struct udd_run_entry *next = udd_agent.runs.count ? udd_runs_find(&udd_agent.runs, address) : NULL;
		const struct udd_candidate *candidate = udd_layout_find(&udd_agent.layout, address);
		unsigned to = run->pages;

		if (!may_merge()) {
			ret->gone |= bits(from, to);
			return;
		}
		if (next && next->address <= address) {
			to = from + (unsigned)udd_min(udd_pages(udd_run_span(next).end - address), to - from);
			relocate(tx, from, to, &entry, ret);
		} else if (held_off(address, now)) {
			to = from + 1;
			ret->busy |= bit(from);
		} else if (!candidate || candidate->start > address || candidate->stale) {
			to = from + 1;
			ret->gone |= bit(from);
		} else {
			to = from + (unsigned)udd_min(udd_pages(candidate->end - address), to - from);
			if (next)
				to = from + (unsigned)udd_min(udd_pages(next->address - address), to - from);
			for (unsigned page = from + 1; page < to; page++) {
				if (held_off(tx->base + udd_bytes(page), now))
					to = page;
			}
			entry.attributes = (uint8_t)candidate->attributes;
			entry.file = candidate->file;
			entry.protection = candidate->file ? (uint8_t)udd_agent.files[candidate->file - 1].protection
							   : PROT_READ | PROT_WRITE;
			if (candidate->file)
				merge_file(tx, from, to, &entry, ret);
			else
				merge_stretch(tx, from, to, &entry, ret);
		}
		from = to;
	}
}

static bool is_about_files(const struct udd_run *run)
{
	const struct udd_layout *layout = &udd_agent.layout;
	const struct udd_candidate *candidate = udd_layout_find(layout, run->address);

	for (; candidate && candidate < layout->candidates + layout->count && candidate->start < run->address + udd_bytes(run->pages);
	     candidate++) {
		if (candidate->file)
			return true;
	}
	return false;
}

void udd_merge(const struct udd_run *run, struct udd_merge_result *ret)
{
	struct transaction tx = {.base = run->address};
	int segment = udd_segment_find(run->segment);
	uint64_t all;
	uint64_t started;

	memset(ret, 0, sizeof(*ret));
	if (!run->pages || run->pages > UDD_RUN_MAX || run->address % UDD_PAGE_SIZE)
		return;
	all = bits(0, run->pages);
	if (segment < 0 || udd_agent.segments[segment].fd < 0 ||
	    (uint64_t)run->slot + run->pages > udd_agent.segments[segment].slots) {
		ret->gone = all;
		return;
	}
	if (mappings_now() + VMAS_PER_RUN > udd_live()->vma_limit) {
		ret->no_vma = all;
		return;
	}
	udd_refresh_layout_of((struct udd_span){run->address, run->address + udd_bytes(run->pages)});
	if (is_about_files(run))
		tx.same = udd_file_compare(run->address, run->pages, udd_agent.segments[segment].pages + udd_bytes(run->slot));
	if (!staging_take(&tx, run->pages) || !udd_worker_lock(&started)) {
		ret->busy = all;
		return;
	}
	if (udd_reserve_runs(UDD_RUN_MAX) || (udd_commit_strict() && !udd_commit_has_room()))
		ret->no_vma = all;
	else
		merge_locked(&tx, run, segment, started, ret);
	udd_worker_unlock(started);
	udd_test_count(UDD_TEST_MERGED, (uint64_t)__builtin_popcountll(ret->merged));
	udd_test_count(UDD_TEST_MISMATCH, (uint64_t)__builtin_popcountll(ret->mismatch));
}

static bool all_zero(const char *page)
{
	static const char zeros[UDD_PAGE_SIZE];

	return same_page(page, zeros);
}

uint64_t udd_merge_zero(struct udd_span span)
{
	unsigned pages = (unsigned)udd_pages(span.end - span.start);
	struct transaction tx = {.base = span.start};
	const struct udd_candidate *candidate;
	uint64_t zero = 0;
	uint64_t started;

	if (!staging_take(&tx, pages) || !udd_worker_lock(&started))
		return 0;
	candidate = udd_layout_find(&udd_agent.layout, span.start);
	if (may_merge() && candidate && !candidate->stale && !candidate->file && candidate->start <= span.start && span.end <= candidate->end &&
	    !udd_merged_in(span) && !udd_uffd_register(span, UFFDIO_REGISTER_MODE_MISSING)) {
		freeze(&tx, 0, pages);
		udd_test_step();
		for (unsigned i = 0; i < pages; i++) {
			if ((tx.frozen & bit(i)) && all_zero(tx.staging + udd_bytes(i)))
				zero |= bit(i);
		}
		thaw(&tx, tx.frozen & ~zero);
		// The hole that is left reads as zeros without any further help.
		udd_uffd_unregister(span);
		udd_uffd_wake(span);
	}
	udd_worker_unlock(started);
	udd_test_count(UDD_TEST_ZERO, (uint64_t)__builtin_popcountll(zero));
	return zero;
}
