// SPDX-License-Identifier: MIT
//
// Hooks run on the application's threads. Those that change mappings hold the map lock: shared while nothing merged is
// concerned, exclusively where the table of runs has to change with the mapping. They know the agent's descriptors only by
// name (the agent's threads have a table of their own), so they never talk to userfaultfd; a thread that waits in a write
// fault is woken by the fault thread, which takes the lock too and then finds the run gone.
//
// Calls that may wait for a write fault (populating, locking) are done without the lock. What a hook itself touches while it
// holds the lock, its stack above all, may be merged too: the fault thread serves the lock's owner out of turn (fault.c).

#include "hooks.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "../common/uffd.h"
#include "agent.h"
#include "commit.h"
#include "hints.h"
#include "merged.h"
#include "patch.h"
#include "remap.h"
#include "rings.h"
#include "sys.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

// One past the highest address that a program can map (x86-64, four-level page tables: a kernel with five gives more only
// to those who ask).
static const uint64_t ADDRESS_SPACE = 1UL << 47;

extern void *__curbrk; // libc's idea of the program break

// ---- the lock, on application threads ----

// How many hooks this thread is in: more than one when the handler of a fault interrupted a hook.
static __thread unsigned depth;
// Which of them, from 1, has signals wait, if any does; and what was blocked before that.
static __thread unsigned blocking;
static __thread uint64_t blocked_before;

static struct udd_live *live_here(void)
{
	struct udd_live *live = udd_live();

	// A child of a fork that no hook saw.
	if (!__atomic_load_n(&live->started, __ATOMIC_ACQUIRE)) {
		depth = 0;
		blocking = 0;
		udd_agent_forked();
	}
	return live;
}

static uint64_t signal_bit(int number)
{
	return 1UL << (number - 1);
}

// Signals wait while their thread is in a hook. Their handlers may call hooked functions as well, and a hook that needs the lock
// exclusively can neither wait for the one below it, nor take its hold away: the table must not change under that one's hands. What
// the thread's own instructions raise the kernel would not let wait; it would end the process.
static uint64_t signals_that_wait(void)
{
	return ~(signal_bit(SIGSEGV) | signal_bit(SIGBUS) | signal_bit(SIGFPE) | signal_bit(SIGILL) | signal_bit(SIGTRAP) |
		 signal_bit(SIGSYS));
}

// In the hook that the thread is in, or goes into, as its `level`th.
static void block_signals(unsigned level)
{
	uint64_t wanted = signals_that_wait();

	udd_sys(SYS_rt_sigprocmask, SIG_BLOCK, &wanted, &blocked_before, sizeof(wanted));
	blocking = level;
}

static void restore_signals(uint64_t blocked)
{
	udd_sys(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof(blocked));
}

// Two system calls are much for a small munmap(), so signals are only blocked where one has a handler: while the lock is calm,
// none has, and it takes the lock held exclusively to change that.
static void enter(void)
{
	struct udd_lock *lock = &live_here()->lock;

	// Nested, it must pass a waiting writer, who waits for the hook below.
	if (depth) {
		udd_lock_shared_urgent(lock);
		depth++;
		return;
	}
	if (udd_trylock_shared_calm(lock)) {
		depth = 1;
		return;
	}
	block_signals(1);
	depth = 1;
	if (!udd_trylock_shared(lock)) {
		udd_lock_shared(lock);
		udd_test_count(UDD_TEST_COLLIDED, 1);
	}
}

// Returns whether this hook had signals wait.
static bool go_out(void)
{
	bool blocked = blocking == depth--;

	if (blocked)
		blocking = 0;
	return blocked;
}

static void leave(void)
{
	// In this order: as long as the lock is held, no handler sees that nobody is said to hold it.
	bool blocked = go_out();

	udd_unlock_shared(&udd_live()->lock);
	if (blocked)
		restore_signals(blocked_before);
}

// From shared to exclusive. Not atomic: look at the table again. The handler of a fault gives up the hold of the hook that it
// interrupted, too, for as long as it takes.
static void enter_exclusive(void)
{
	struct udd_live *live = udd_live();

	// It need not stay calm between the two.
	if (!blocking)
		block_signals(depth);
	for (unsigned held = 0; held < depth; held++)
		udd_unlock_shared(&live->lock);
	if (udd_lock_exclusive(&live->lock, (int32_t)udd_sys(SYS_gettid)))
		udd_test_count(UDD_TEST_COLLIDED, 1);
	udd_settle();
}

static void leave_exclusive(void)
{
	udd_unlock_exclusive(&udd_live()->lock);
	for (unsigned held = 1; held < depth; held++)
		udd_lock_shared_urgent(&udd_live()->lock);
	if (go_out())
		restore_signals(blocked_before);
}

// Shared is enough to keep the worker out, and the shared area where it is.
void udd_hold_merging(bool pause)
{
	uint64_t *paused;
	uint64_t before;

	enter();
	paused = &udd_live()->stats->paused;
	before = __atomic_load_n(paused, __ATOMIC_RELAXED);
	while ((pause || before) && !__atomic_compare_exchange_n(paused, &before, pause ? before + 1 : before - 1, true,
								 __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
	leave();
}

static void note_change(struct udd_span span, enum udd_stale_kind kind)
{
	udd_files_changed(span);
	udd_stale_note(udd_live()->stale, &udd_live()->stale_count, span, kind);
}

// The layout has to be read again some time. Mostly it is known already, and costs a read.
static void note_mapped(void)
{
	struct udd_live *live = udd_live();

	if (!__atomic_load_n(&live->mapped, __ATOMIC_RELAXED))
		__atomic_store_n(&live->mapped, 1, __ATOMIC_RELAXED);
}

static struct udd_span span_of(const void *address, size_t length)
{
	uint64_t start = udd_page_down((uint64_t)(uintptr_t)address);
	uint64_t end = (uint64_t)(uintptr_t)address + length;

	return (struct udd_span){start, end < start ? UINT64_MAX - UDD_PAGE_SIZE + 1 : udd_page_up(end)};
}

// A range that the kernel would look at, rather than refuse at once.
static bool sound(const void *address, size_t length)
{
	uint64_t start = (uint64_t)(uintptr_t)address;

	return length && length < ADDRESS_SPACE && start < ADDRESS_SPACE - length;
}

// ---- mappings ----

// A call that unmaps `span`, or maps over it.
static long replace_mapping(struct udd_span span, long (*call)(const long *), const long *arguments)
{
	long ret;

	enter();
	if (!udd_merged_in(span)) {
		ret = call(arguments);
		note_change(span, UDD_STALE_CHANGED);
		leave();
		return ret;
	}
	enter_exclusive();
	ret = call(arguments);
	if (!udd_failed(ret)) {
		udd_test_count(UDD_TEST_UNMAPPED, 1);
		udd_forget(span);
	}
	note_change(span, UDD_STALE_CHANGED);
	leave_exclusive();
	return ret;
}

static long call_munmap(const long *arguments)
{
	return udd_sys(SYS_munmap, arguments[0], arguments[1]);
}

static int hook_munmap(void *address, size_t length)
{
	const long arguments[] = {(long)address, (long)length};

	return (int)udd_as_errno(replace_mapping(span_of(address, length), call_munmap, arguments));
}

static long call_mmap(const long *arguments)
{
	return udd_syscall6(SYS_mmap, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

// Mappings of files that can be merged are remembered. Nobody else knows this one yet.
static void note_file(struct udd_span span, int protection, int flags, int fd, uint64_t offset)
{
	struct udd_file file;
	struct udd_source source;

	live_here();
	if (!udd_file_wanted(span, protection, flags, fd, &file))
		return;
	enter();
	enter_exclusive();
	udd_file_add(&file);
	leave_exclusive();
	// The layout may have been read since it was mapped, but before it was known.
	note_mapped();
	source = (struct udd_source){.inode = file.inode, .offset = offset, .on_mount = true};
	udd_hint_push(udd_pointer(span.start), span.end - span.start, UDD_HINT_MAPPED, &source);
}

static void *hook_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	long arguments[] = {(long)address, (long)length, protection, flags, fd, offset};
	bool replaces = (flags & MAP_FIXED) && !(flags & MAP_FIXED_NOREPLACE);
	long ret;

	if (replaces) {
		// Reading a file in may take long: without the lock.
		arguments[3] &= ~MAP_POPULATE;
		ret = replace_mapping(span_of(address, length), call_mmap, arguments);
		if ((flags & MAP_POPULATE) && !udd_failed(ret))
			udd_sys(SYS_madvise, ret, udd_page_up(length),
				protection & PROT_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
	} else {
		// In free addresses there is nothing that a transaction could be about.
		ret = call_mmap(arguments);
		note_mapped();
	}
	if (!udd_failed(ret) && fd >= 0)
		note_file(span_of(udd_pointer((uint64_t)ret), length), protection, flags, fd, (uint64_t)offset);
	if ((flags & MAP_STACK) && !udd_failed(ret)) {
		enter();
		note_change(span_of((void *)ret, length), UDD_STALE_STACK);
		leave();
	}
	return (void *)udd_as_errno(ret);
}

static long call_shmat(const long *arguments)
{
	return udd_sys(SYS_shmat, arguments[0], arguments[1], arguments[2]);
}

static void *hook_shmat(int id, const void *address, int flags)
{
	const long arguments[] = {id, (long)address, flags};
	struct shmid_ds info;

	// Shared memory is no candidate; but attaching it over something replaces that.
	if ((flags & SHM_REMAP) && udd_sys(SYS_shmctl, id, IPC_STAT, &info) == 0)
		return (void *)udd_as_errno(replace_mapping(span_of(address, info.shm_segsz), call_shmat, arguments));
	return (void *)udd_as_errno(call_shmat(arguments));
}

// ---- protection, advice, locking ----

static void update_runs(struct udd_span span, void (*change)(struct udd_run_entry *, uint32_t), uint32_t value)
{
	struct udd_runs *runs = &udd_agent.runs;

	udd_runs_split(runs, span);
	for (struct udd_run_entry *run = udd_runs_first(runs, span); run; run = udd_runs_next_in(run, span))
		change(run, value);
}

static void set_protection(struct udd_run_entry *run, uint32_t protection)
{
	run->protection = (uint8_t)protection;
}

static void add_attribute(struct udd_run_entry *run, uint32_t attribute)
{
	run->attributes |= (uint8_t)attribute;
}

static void remove_attribute(struct udd_run_entry *run, uint32_t attribute)
{
	run->attributes &= (uint8_t)~attribute;
}

// Does the hook run on this memory? Its frames, and those of what it calls, are written to while it holds the lock.
static bool is_own_stack(struct udd_span span)
{
	enum { BELOW = 1 << 18, ABOVE = 1 << 14 };
	uint64_t frame = (uint64_t)(uintptr_t)__builtin_frame_address(0);

	return udd_span_overlaps(span, (struct udd_span){frame - BELOW, frame + ABOVE});
}

// Has the kernel copy merged pages where they are, whatever they hold by now. Where they are protected, the fault thread serves
// us as the lock's owner, and leaves notes that must not run out of room. False if some could not be copied.
static bool break_by_kernel(struct udd_span span)
{
	while (!udd_span_empty(span)) {
		struct udd_span part = {span.start, udd_min(span.end, span.start + udd_bytes(UDD_UNSETTLED_SLOTS / 4))};

		if (udd_failed(udd_sys(SYS_madvise, part.start, part.end - part.start, MADV_POPULATE_WRITE)))
			return false;
		udd_settle();
		udd_broke_in_place(part);
		span.start = part.end;
	}
	return true;
}

// Makes what is merged in `span` private; the lock is held exclusively.
static void dissolve_all(struct udd_span span)
{
	struct udd_runs *runs = &udd_agent.runs;
	bool allowed = udd_commit_allows();

	for (uint64_t at = span.start; udd_merged_in((struct udd_span){at, span.end});) {
		const struct udd_run_entry *run = udd_runs_find(runs, at);
		struct udd_span piece = udd_span_clip(udd_run_span(run), (struct udd_span){at, span.end});

		at = piece.end;
		// One that can't be had stays merged, which is right too, only not what was hoped for. Of those that the kernel
		// breaks by itself nobody knows which already did, so it breaks the rest as well; a copy of the store's page would
		// undo what is written to our own stack meanwhile; and there may be no memory for it (commit.h).
		if (run->broken)
			continue;
		if (run->armed && !is_own_stack(piece) && allowed)
			udd_dissolve(piece, 0);
		else
			break_by_kernel(piece);
	}
}

// Piece by piece, as far as it goes: the table must know how far that was.
static long protect_pieces(long number, struct udd_span span, const long *arguments)
{
	struct udd_runs *runs = &udd_agent.runs;
	long ret = 0;

	udd_runs_split(runs, span);
	for (uint64_t at = span.start; at < span.end && !udd_failed(ret);) {
		struct udd_run_entry *run = udd_runs_first(runs, (struct udd_span){at, span.end});
		struct udd_span piece = {at, run ? run->address : span.end};

		if (udd_span_empty(piece))
			piece = udd_run_span(run);
		ret = udd_sys(number, piece.start, piece.end - piece.start, arguments[2], arguments[3]);
		if (!udd_failed(ret))
			update_runs(piece, set_protection, (uint32_t)arguments[2] & (PROT_READ | PROT_WRITE | PROT_EXEC));
		at = piece.end;
	}
	return ret;
}

static long change_protection(long number, struct udd_span span, const long *arguments)
{
	const void *address = udd_pointer((uint64_t)arguments[0]);
	long protection = arguments[2];
	long ret;

	if (arguments[0] % UDD_PAGE_SIZE || !sound(address, (size_t)arguments[1]))
		return udd_sys(number, arguments[0], arguments[1], protection, arguments[3]);
	enter();
	if (!udd_merged_in(span)) {
		ret = udd_sys(number, arguments[0], arguments[1], protection, arguments[3]);
		note_change(span, UDD_STALE_CHANGED);
		leave();
		return ret;
	}
	enter_exclusive();
	udd_files_restore(span, false);
	// A mapping of the store must not become executable, nor protected by a key it would lose again.
	if ((protection & PROT_EXEC) || number == SYS_pkey_mprotect)
		dissolve_all(span);
	ret = protect_pieces(number, span, arguments);
	if (protection & PROT_WRITE)
		udd_files_open(span);
	note_change(span, UDD_STALE_CHANGED);
	leave_exclusive();
	return ret;
}

static int hook_mprotect(void *address, size_t length, int protection)
{
	const long arguments[] = {(long)address, (long)length, protection, 0};

	return (int)udd_as_errno(change_protection(SYS_mprotect, span_of(address, length), arguments));
}

static int hook_pkey_mprotect(void *address, size_t length, int protection, int key)
{
	const long arguments[] = {(long)address, (long)length, protection, key};

	return (int)udd_as_errno(change_protection(SYS_pkey_mprotect, span_of(address, length), arguments));
}

// The application's advice for the memory between merged runs. The kernel goes on behind a hole, and says so in the end.
static long advise_gap(struct udd_span gap, int advice, bool *hole)
{
	long ret = udd_span_empty(gap) ? 0 : udd_sys(SYS_madvise, gap.start, gap.end - gap.start, advice);

	*hole |= ret == -ENOMEM;
	return ret == -ENOMEM ? 0 : ret;
}

// The runs from `run` on that lie side by side and are alike, *last being the last of them: taken together, because a mapping can
// be replaced as a whole even where the process can't have another one.
static struct udd_span alike_from(const struct udd_run_entry *run, struct udd_span span, const struct udd_run_entry **last)
{
	struct udd_span ret = udd_run_span(run);
	const struct udd_run_entry *next = run;

	do {
		*last = next;
		ret.end = udd_run_span(next).end;
		next = udd_runs_next_in(next, span);
	} while (next && next->address == ret.end && next->protection == run->protection && next->attributes == run->attributes);
	return ret;
}

// 0 or a negative errno, and then nothing has changed.
static long map_fresh(const struct udd_run_entry *run, struct udd_span span)
{
	if (udd_commit_strict() && !udd_commit_has_room())
		return -ENOMEM;
	return udd_map_like(run, span);
}

// Where there is no room for fresh memory in the place of merged pages, they are broken where they are, and zero from then on.
static bool can_wipe(const struct udd_run_entry *run, int advice)
{
	return (run->protection & PROT_WRITE) && advice != MADV_GUARD_INSTALL;
}

static long wipe(struct udd_span span)
{
	if (!break_by_kernel(span))
		return -ENOMEM;
	memset(udd_pointer(span.start), 0, span.end - span.start);
	return 0;
}

// Drops the contents of the first part of `span`, as far as one can say in one go which runs are none any more: merged pages become
// fresh memory, the gaps between them get the application's advice. *end: where the part ends.
static long discard(struct udd_span span, int advice, uint64_t *end)
{
	struct udd_span wiped = {span.end, span.end};
	struct udd_runs *runs = &udd_agent.runs;
	uint64_t at = span.start;
	bool hole = false;
	long ret = 0;

	udd_runs_split(runs, span);
	for (const struct udd_run_entry *run = udd_runs_first(runs, span), *last; run && !udd_failed(ret); run = udd_runs_next_in(last, span)) {
		struct udd_span merged = alike_from(run, span, &last);

		ret = advise_gap((struct udd_span){at, merged.start}, advice, &hole);
		if (!udd_failed(ret) && (run->attributes & UDD_ATTRIBUTE_LOCKED) && advice != MADV_DONTNEED_LOCKED)
			ret = -EINVAL;
		if (udd_failed(ret))
			break;
		at = merged.start;
		ret = map_fresh(run, merged);
		if (udd_failed(ret) && can_wipe(run, advice)) {
			wiped = merged;
			ret = 0;
			break;
		}
		if (!udd_failed(ret))
			at = merged.end;
		if (!udd_failed(ret) && advice == MADV_GUARD_INSTALL)
			ret = udd_sys(SYS_madvise, merged.start, merged.end - merged.start, advice);
	}
	if (!udd_failed(ret))
		ret = advise_gap((struct udd_span){at, wiped.start}, advice, &hole);
	// All at once, and no more than was replaced.
	udd_test_count(UDD_TEST_DISCARDED, udd_runs_pages(runs, (struct udd_span){span.start, at}));
	udd_forget((struct udd_span){span.start, at});
	if (!udd_failed(ret))
		ret = wipe(wiped);
	*end = wiped.end;
	return !udd_failed(ret) && hole ? -ENOMEM : ret;
}

// All of it, also where there may be merged pages of files: without them the kernel finds the store's, which are the same.
static long discard_all(struct udd_span span, int advice)
{
	struct udd_runs *runs = &udd_agent.runs;
	bool hole = false;
	long ret = 0;

	for (uint64_t at = span.start; at < span.end && !udd_failed(ret);) {
		const struct udd_run_entry *run = udd_runs_first(runs, (struct udd_span){at, span.end});
		struct udd_span piece = {at, span.end};

		while (run && !run->file)
			run = udd_runs_next_in(run, piece);
		if (run && run->address <= at) {
			piece.end = udd_min(span.end, udd_run_span(run).end);
			ret = udd_sys(SYS_madvise, piece.start, piece.end - piece.start, advice);
		} else {
			piece.end = run ? run->address : span.end;
			ret = discard(piece, advice, &piece.end);
			hole |= ret == -ENOMEM;
			ret = ret == -ENOMEM ? 0 : ret;
		}
		at = piece.end;
	}
	return !udd_failed(ret) && hole ? -ENOMEM : ret;
}

// What an advice does to memory, as far as merging is concerned.
enum advice_kind {
	ADVICE_HARMLESS,  // no lock
	ADVICE_DISCARD,   // the contents go
	ADVICE_ATTRIBUTE, // sets or clears an attribute
	ADVICE_PRIVATE,   // only anonymous memory can have it
};

static enum advice_kind advice_kind(int advice, uint32_t *attribute, bool *sets)
{
	static const struct {
		int advice;
		enum advice_kind kind;
		uint32_t attribute;
		bool sets;
	} table[] = {
		{MADV_DONTNEED, ADVICE_DISCARD, 0, false},
		{MADV_FREE, ADVICE_DISCARD, 0, false},
		{MADV_DONTNEED_LOCKED, ADVICE_DISCARD, 0, false},
		{MADV_GUARD_INSTALL, ADVICE_DISCARD, 0, false},
		{MADV_DONTFORK, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_DONTFORK, true},
		{MADV_DOFORK, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_DONTFORK, false},
		{MADV_DONTDUMP, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_DONTDUMP, true},
		{MADV_DODUMP, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_DONTDUMP, false},
		{MADV_MERGEABLE, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_MERGEABLE, true},
		{MADV_UNMERGEABLE, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_MERGEABLE, false},
		{MADV_HUGEPAGE, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_HUGEPAGE, true},
		{MADV_NOHUGEPAGE, ADVICE_ATTRIBUTE, UDD_ATTRIBUTE_NOHUGEPAGE, true},
		{MADV_WIPEONFORK, ADVICE_PRIVATE, 0, true},
		{MADV_REMOVE, ADVICE_PRIVATE, 0, true},
	};

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (table[i].advice != advice)
			continue;
		*attribute = table[i].attribute;
		*sets = table[i].sets;
		return table[i].kind;
	}
	return ADVICE_HARMLESS;
}

// KSM would scan the same memory, and what it merges can't be moved. The kernel only says whether all of it is mapped, as
// it would for the advice.
static long withhold_from_ksm(void *address, size_t length)
{
	return udd_sys(SYS_msync, address, length, MS_ASYNC);
}

static int hook_madvise(void *address, size_t length, int advice)
{
	struct udd_span span = span_of(address, length);
	uint32_t attribute;
	bool sets;
	enum advice_kind kind = advice_kind(advice, &attribute, &sets);
	long ret;

	if (kind == ADVICE_HARMLESS || (uintptr_t)address % UDD_PAGE_SIZE || !sound(address, length))
		return (int)udd_as_errno(udd_sys(SYS_madvise, address, length, advice));
	if (advice == MADV_MERGEABLE && !udd_agent.keep_ksm)
		return (int)udd_as_errno(withhold_from_ksm(address, length));
	enter();
	if (!udd_merged_in(span)) {
		ret = udd_sys(SYS_madvise, address, length, advice);
		if (kind != ADVICE_DISCARD)
			note_change(span, UDD_STALE_CHANGED);
		leave();
		return (int)udd_as_errno(ret);
	}
	enter_exclusive();
	if (kind == ADVICE_DISCARD) {
		ret = discard_all(span, advice);
	} else {
		udd_files_restore(span, false);
		if (kind == ADVICE_PRIVATE)
			dissolve_all(span);
		ret = udd_sys(SYS_madvise, address, length, advice);
		// Holes don't keep the kernel from what lies behind them.
		if ((!udd_failed(ret) || ret == -ENOMEM) && attribute)
			update_runs(span, sets ? add_attribute : remove_attribute, attribute);
		note_change(span, UDD_STALE_CHANGED);
	}
	leave_exclusive();
	return (int)udd_as_errno(ret);
}

static const struct udd_span WHOLE_MEMORY = {0, UINT64_MAX - UDD_PAGE_SIZE + 1};

// Merged pages in locked memory break in place, because a new mapping would not be locked.
static void change_locking(struct udd_span span, void (*change)(struct udd_run_entry *, uint32_t))
{
	enter();
	note_change(span, UDD_STALE_CHANGED);
	if (!udd_merged_in(span)) {
		leave();
		return;
	}
	enter_exclusive();
	update_runs(span, change, UDD_ATTRIBUTE_LOCKED);
	leave_exclusive();
}

static int hook_mlock(const void *address, size_t length)
{
	change_locking(span_of(address, length), add_attribute);
	return (int)udd_as_errno(udd_sys(SYS_mlock, address, length));
}

static int hook_mlock2(const void *address, size_t length, unsigned flags)
{
	change_locking(span_of(address, length), add_attribute);
	return (int)udd_as_errno(udd_sys(SYS_mlock2, address, length, flags));
}

static int hook_mlockall(int flags)
{
	change_locking(WHOLE_MEMORY, add_attribute);
	return (int)udd_as_errno(udd_sys(SYS_mlockall, flags));
}

static int hook_munlock(const void *address, size_t length)
{
	long ret = udd_sys(SYS_munlock, address, length);

	change_locking(span_of(address, length), remove_attribute);
	return (int)udd_as_errno(ret);
}

static int hook_munlockall(void)
{
	long ret = udd_sys(SYS_munlockall);

	change_locking(WHOLE_MEMORY, remove_attribute);
	return (int)udd_as_errno(ret);
}

static bool is_userfaultfd(int fd)
{
	static const char wanted[] = "anon_inode:[userfaultfd]";
	char path[32] = "/proc/self/fd/";
	char digits[12];
	char target[sizeof(wanted)];
	size_t count = 0;
	size_t end = strlen(path);

	if (fd < 0)
		return false;
	for (unsigned rest = (unsigned)fd; count == 0 || rest; rest /= 10)
		digits[count++] = (char)('0' + rest % 10);
	while (count)
		path[end++] = digits[--count];
	path[end] = '\0';
	return udd_sys(SYS_readlink, path, target, sizeof(target)) == sizeof(wanted) - 1 &&
	       memcmp(target, wanted, sizeof(wanted) - 1) == 0;
}

// The range that UFFDIO_REGISTER is about, from an argument that may point anywhere. False if the kernel will refuse it.
static bool read_range(const void *argument, struct udd_span *ret)
{
	struct uffdio_range range;
	struct iovec local = {.iov_base = &range, .iov_len = sizeof(range)};
	struct iovec remote = {.iov_base = (void *)argument, .iov_len = sizeof(range)};

	if (udd_sys(SYS_process_vm_readv, udd_sys(SYS_getpid), &local, 1, &remote, 1, 0) != (long)sizeof(range))
		return false;
	*ret = (struct udd_span){range.start, range.start + range.len};
	return (range.start | range.len) % UDD_PAGE_SIZE == 0 && sound(udd_pointer(range.start), range.len);
}

// The application registers memory with a userfaultfd of its own: it must be plain memory, and none of ours any more.
static int hook_ioctl(int fd, unsigned long request, void *argument)
{
	struct udd_span span;
	long ret;

	if (request == UFFDIO_REGISTER && is_userfaultfd(fd) && read_range(argument, &span)) {
		enter();
		enter_exclusive();
		udd_files_restore(span, false);
		dissolve_all(span);
		note_change(span, UDD_STALE_CHANGED);
		ret = udd_sys(SYS_ioctl, fd, request, argument);
		leave_exclusive();
		return (int)udd_as_errno(ret);
	}
	return (int)udd_as_errno(udd_sys(SYS_ioctl, fd, request, argument));
}

// ---- the heap ----

static long call_brk(const long *arguments)
{
	return udd_sys(SYS_brk, arguments[0]);
}

static int hook_brk(void *address)
{
	const long arguments[] = {(long)address};
	uint64_t now = (uint64_t)(uintptr_t)__curbrk;
	long ret;

	if (now && (uint64_t)(uintptr_t)address < now && address)
		ret = replace_mapping((struct udd_span){udd_page_up((uint64_t)(uintptr_t)address), udd_page_up(now)}, call_brk,
				      arguments);
	else
		ret = call_brk(arguments);
	note_mapped();
	__curbrk = (void *)ret;
	return (void *)ret < address ? (int)udd_as_errno(-ENOMEM) : 0;
}

// ---- mremap ----

static void note_remap(struct udd_span from, long ret, size_t new_length)
{
	note_change(from, UDD_STALE_CHANGED);
	if (!udd_failed(ret))
		note_change(span_of((void *)ret, new_length), UDD_STALE_CHANGED);
}

// mremap() of no length. What can't be made the file's again can't be had a second time either.
static long copy_mapping(struct udd_span from, struct udd_span to, const long *arguments)
{
	const struct udd_run_entry *run = udd_runs_first(&udd_agent.runs, from);
	long ret;

	if (run && run->file)
		return -ENOMEM;
	ret = udd_syscall6(SYS_mremap, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], 0);
	if (!udd_failed(ret))
		udd_forget(to);
	return ret;
}

static void *hook_mremap(void *address, size_t old_length, size_t new_length, int flags, ...)
{
	// Of no length, it makes another mapping of what a shared one maps there.
	struct udd_span from = span_of(address, old_length ? old_length : 1);
	struct udd_span to = {0, 0};
	uint64_t wanted = 0;
	bool odd = (uintptr_t)address % UDD_PAGE_SIZE || !sound(address, old_length) || !sound(address, new_length) ||
		   (flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)) ||
		   ((flags & MREMAP_DONTUNMAP) && (!(flags & MREMAP_MAYMOVE) || old_length != new_length));
	long arguments[] = {(long)address, (long)old_length, (long)new_length, flags, 0};
	long ret;

	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_list list;

		va_start(list, flags);
		wanted = (uint64_t)(uintptr_t)va_arg(list, void *);
		va_end(list);
		arguments[4] = (long)wanted;
		if (flags & MREMAP_FIXED) {
			to = span_of(udd_pointer(wanted), new_length);
			odd |= wanted % UDD_PAGE_SIZE || !sound(udd_pointer(wanted), new_length) || udd_span_overlaps(from, to) || !(flags & MREMAP_MAYMOVE);
		}
	}
	enter();
	if ((odd && old_length) || !(udd_agent.dissolved || udd_merged_in(from) || udd_merged_in(to))) {
		ret = udd_syscall6(SYS_mremap, arguments[0], arguments[1], arguments[2], flags, arguments[4], 0);
		note_remap(from, ret, new_length);
		leave();
	} else {
		enter_exclusive();
		udd_files_restore(from, true);
		ret = old_length ? udd_remap(from, to, arguments) : copy_mapping(from, to, arguments);
		note_remap(from, ret, new_length);
		leave_exclusive();
	}
	return (void *)udd_as_errno(ret);
}

// ---- processes ----

static pid_t (*original_fork)(void);
static int (*original_clone)(int (*)(void *), void *, int, void *, void *, void *, void *);

// A child starts with no hook that its parent is in. `blocked`: what signals were before the parent blocked the others, or NULL.
static void start_child(const uint64_t *blocked)
{
	depth = 0;
	blocking = 0;
	udd_agent_forked();
	if (blocked)
		restore_signals(*blocked);
}

// No transaction is under way while the kernel copies the address space, or the child would miss what is frozen.
static pid_t hook_fork(void)
{
	pid_t ret;

	enter();
	ret = original_fork();
	if (ret == 0)
		start_child(blocking ? &blocked_before : NULL);
	else
		leave();
	return ret;
}

// What the child of clone() without CLONE_VM is to do. It has a copy of its parent's stack, with this.
struct clone_call {
	int (*body)(void *);
	void *argument;
	bool blocks;      // the hook blocks signals
	uint64_t blocked; // which were, before it
};

static bool is_last_thread(void)
{
	enum { AGENT_THREADS = 2, LINKS_OF_EMPTY = 2 };
	struct stat task;

	return udd_sys(SYS_stat, "/proc/self/task", &task) == 0 && task.st_nlink <= LINKS_OF_EMPTY + AGENT_THREADS + 1;
}

static int clone_body(void *argument)
{
	const struct clone_call call = *(const struct clone_call *)argument;
	int ret;

	start_child(call.blocks ? &call.blocked : NULL);
	ret = call.body(call.argument);
	// libc ends only this thread now, and the agent's would keep the process.
	if (is_last_thread())
		udd_sys(SYS_exit_group, ret);
	return ret;
}

static int hook_clone(int (*body)(void *), void *stack, int flags, void *argument, void *parent_tid, void *tls, void *child_tid)
{
	struct clone_call call = {.body = body, .argument = argument};
	int ret;

	if ((flags & CLONE_VM) || !body)
		return original_clone(body, stack, flags, argument, parent_tid, tls, child_tid);
	enter();
	call.blocks = blocking;
	call.blocked = blocked_before;
	ret = original_clone(clone_body, stack, flags, &call, parent_tid, tls, child_tid);
	leave();
	return ret;
}

// ---- signal handlers ----

static int (*original_sigaction)(int, const struct sigaction *, struct sigaction *);

static bool may_interrupt(int number, void (*handler)(int))
{
	return handler != SIG_DFL && handler != SIG_IGN && number > 0 && number < _NSIG && (signals_that_wait() & signal_bit(number));
}

static void end_calm(void)
{
	if (__atomic_load_n(&udd_agent.has_handlers, __ATOMIC_ACQUIRE))
		return;
	enter();
	enter_exclusive();
	__atomic_store_n(&udd_agent.has_handlers, true, __ATOMIC_RELEASE);
	udd_lock_set_calm(&udd_live()->lock, false);
	leave_exclusive();
}

// Every way in libc to install a handler leads here, except for the two signals of its own.
static int hook_sigaction(int number, const struct sigaction *action, struct sigaction *old)
{
	if (action && may_interrupt(number, action->sa_handler))
		end_calm();
	return original_sigaction(number, action, old);
}

static int (*original_cancel)(pthread_t);

// One of those two ends a thread at whatever instruction, if the thread has said so (PTHREAD_CANCEL_ASYNCHRONOUS): not in a hook, or
// what it holds would be held for ever. The other one's handler maps nothing.
static int hook_cancel(pthread_t thread)
{
	end_calm();
	return original_cancel(thread);
}

static bool find_handler(void)
{
	for (int number = 1; number < _NSIG; number++) {
		struct {
			void (*handler)(int);
			unsigned long flags;
			void (*restorer)(void);
			uint64_t mask;
		} action;

		if (udd_failed(udd_sys(SYS_rt_sigaction, number, NULL, &action, sizeof(action.mask))) ||
		    may_interrupt(number, action.handler))
			return true;
	}
	return false;
}

void udd_look_for_handlers(void)
{
	if (!udd_agent.knows_handlers || udd_agent.has_handlers)
		return;
	udd_agent.has_handlers = find_handler();
	udd_lock_set_calm(&udd_live()->lock, !udd_agent.has_handlers);
}

static void become_calm(void)
{
	enter();
	enter_exclusive();
	udd_agent.knows_handlers = true;
	udd_look_for_handlers();
	leave_exclusive();
}

// ---- limits ----

// Not while merged memory is replaced by what the limits must allow (commit.h).
static int hook_prlimit(pid_t pid, int resource, const struct rlimit *wanted, struct rlimit *old)
{
	long ret;

	enter();
	ret = udd_sys(SYS_prlimit64, pid, resource, wanted, old);
	leave();
	return (int)udd_as_errno(ret);
}

static int hook_setrlimit(int resource, const struct rlimit *wanted)
{
	return hook_prlimit(0, resource, wanted, NULL);
}

// ---- the table ----

enum hook_lock {
	LOCK_NONE,
	LOCK_MAP, // the map lock, shared or exclusive
};

#define HOOK(function) ((const void *)(function))

static const struct {
	const char *symbol;
	const void *hook;
	void *original;      // where the way to the unhooked function goes, or NULL
	enum hook_lock lock; // without these there is no merging
	const char *reports;
} hooks[] = {
	{"munmap", HOOK(hook_munmap), NULL, LOCK_MAP, "runs that are gone"},
	{"mmap", HOOK(hook_mmap), NULL, LOCK_MAP, "runs that are replaced, thread stacks, mapped images"},
	{"mremap", HOOK(hook_mremap), NULL, LOCK_MAP, "runs that move"},
	{"brk", HOOK(hook_brk), NULL, LOCK_MAP, "runs that are gone"},
	{"shmat", HOOK(hook_shmat), NULL, LOCK_MAP, "runs that are replaced"},
	{"mprotect", HOOK(hook_mprotect), NULL, LOCK_MAP, "protection of runs"},
	{"pkey_mprotect", HOOK(hook_pkey_mprotect), NULL, LOCK_MAP, "protection of runs"},
	{"madvise", HOOK(hook_madvise), NULL, LOCK_MAP, "discards and attributes of runs"},
	{"mlock", HOOK(hook_mlock), NULL, LOCK_MAP, "runs that break in place"},
	{"mlock2", HOOK(hook_mlock2), NULL, LOCK_MAP, "runs that break in place"},
	{"mlockall", HOOK(hook_mlockall), NULL, LOCK_MAP, "runs that break in place"},
	{"munlock", HOOK(hook_munlock), NULL, LOCK_MAP, "runs that need not break in place any more"},
	{"munlockall", HOOK(hook_munlockall), NULL, LOCK_MAP, "runs that need not break in place any more"},
	{"ioctl", HOOK(hook_ioctl), NULL, LOCK_MAP, "memory registered with another userfaultfd"},
	{"_Fork", HOOK(hook_fork), &original_fork, LOCK_MAP, "children"},
	{"clone", HOOK(hook_clone), &original_clone, LOCK_MAP, "children"},
	{"sigaction", HOOK(hook_sigaction), &original_sigaction, LOCK_NONE, "signal handlers"},
	{"pthread_cancel", HOOK(hook_cancel), &original_cancel, LOCK_NONE, "threads that end anywhere"},
	{"setrlimit64", HOOK(hook_setrlimit), NULL, LOCK_MAP, "limits of memory"},
	{"prlimit64", HOOK(hook_prlimit), NULL, LOCK_MAP, "limits of memory"},
	{"read", HOOK(udd_hook_read), NULL, LOCK_NONE, "place hints"},
	{"pread64", HOOK(udd_hook_pread), NULL, LOCK_NONE, "place hints"},
	{"readv", HOOK(udd_hook_readv), NULL, LOCK_NONE, "place hints"},
	{"preadv64", HOOK(udd_hook_preadv), NULL, LOCK_NONE, "place hints"},
	{"write", HOOK(udd_hook_write), NULL, LOCK_NONE, "place hints"},
	{"pwrite64", HOOK(udd_hook_pwrite), NULL, LOCK_NONE, "place hints"},
	{"writev", HOOK(udd_hook_writev), NULL, LOCK_NONE, "place hints"},
	{"pwritev64", HOOK(udd_hook_pwritev), NULL, LOCK_NONE, "place hints"},
	{"preadv64v2", HOOK(udd_hook_preadv2), NULL, LOCK_NONE, "place hints"},
	{"pwritev64v2", HOOK(udd_hook_pwritev2), NULL, LOCK_NONE, "place hints"},
	{"close", HOOK(udd_hook_close), NULL, LOCK_NONE, "descriptors whose kind is forgotten"},
	{"dup2", HOOK(udd_hook_dup2), NULL, LOCK_NONE, "descriptors whose kind is forgotten"},
	{"dup3", HOOK(udd_hook_dup3), NULL, LOCK_NONE, "descriptors whose kind is forgotten"},
};

enum { HOOKS = sizeof(hooks) / sizeof(hooks[0]) };

_Static_assert((int)HOOKS <= (int)UDD_ATTACH_PATCHES_MAX, "the table that udedup attach reads has room for all");

static struct udd_patch patches[HOOKS];

int udd_hooks_prepare(const char **missing)
{
	// libc's own functions, whoever may have interposed them.
	void *libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
	int ret = libc ? udd_patch_init(dlsym(libc, "munmap")) : -ENOENT;
	int error;

	*missing = "libc";
	if (ret)
		return ret;
	for (size_t i = 0; i < HOOKS; i++) {
		void *function = dlsym(libc, hooks[i].symbol);

		error = function ? udd_patch_prepare(function, hooks[i].hook, hooks[i].original, &patches[i]) : -ENOENT;
		if (error && hooks[i].lock == LOCK_MAP && !ret) {
			*missing = hooks[i].symbol;
			ret = error;
		}
	}
	dlclose(libc);
	error = udd_patch_seal();
	if (error)
		memset(patches, 0, sizeof(patches));
	return error ? error : ret;
}

static bool is_installed(const void *hook)
{
	for (size_t i = 0; i < HOOKS; i++) {
		if (hooks[i].hook == hook)
			return udd_agent.hooks >> i & 1;
	}
	return false;
}

// Of all that may come in between a hook's beginning and its end.
static bool learns_of_interruptions(void)
{
	return is_installed(HOOK(hook_sigaction)) && is_installed(HOOK(hook_cancel));
}

int udd_hooks_install(const char **missing)
{
	int ret = udd_hooks_prepare(missing);

	for (size_t i = 0; i < HOOKS; i++) {
		int error = patches[i].entry ? udd_patch_apply(&patches[i]) : -ENOENT;

		if (!error) {
			udd_agent.hooks |= 1UL << i;
		} else if (hooks[i].lock == LOCK_MAP && !ret) {
			*missing = hooks[i].symbol;
			ret = error;
		}
	}
	udd_patch_done();
	if (learns_of_interruptions())
		become_calm();
	return ret;
}

void udd_hooks_list(struct udd_attachment *ret)
{
	ret->patch_count = HOOKS;
	for (size_t i = 0; i < HOOKS; i++) {
		ret->patches[i] = (struct udd_attach_patch){
			.entry = (uint64_t)(uintptr_t)patches[i].entry,
			.before = patches[i].before,
			.after = patches[i].word,
			.maps = hooks[i].lock == LOCK_MAP,
		};
	}
}

void udd_hooks_forget(void)
{
	struct udd_live *live = udd_live();

	udd_lock_exclusive(&live->lock, 0);
	udd_agent.hooks = 0;
	udd_agent.knows_handlers = false;
	udd_agent.has_handlers = false;
	udd_lock_set_calm(&live->lock, false);
	udd_unlock_exclusive(&live->lock);
}

void udd_hooks_patched(void)
{
	struct udd_live *live = udd_live();

	udd_lock_exclusive(&live->lock, 0);
	for (size_t i = 0; i < HOOKS; i++)
		udd_agent.hooks |= (uint64_t)!!patches[i].entry << i;
	udd_agent.knows_handlers = learns_of_interruptions();
	udd_look_for_handlers();
	udd_unlock_exclusive(&live->lock);
}
