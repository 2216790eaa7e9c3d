/* SPDX-License-Identifier: MIT
 *
 * The application's threads, and the oracle: what a read may return, known from what the threads did, not from what the
 * agent believes. Each thread does up to OPERATIONS things out of its set, on pages of its set, then reads its pages.
 */

#define READ_PAGE 1
#define WRITE_PAGE 2
#define PIN 4          /* a device reads into it: O_DIRECT, io_uring */
#define DISCARD 8      /* madvise(MADV_DONTNEED) through libc */
#define RAW_DISCARD 16 /* by a system call instruction of its own */
#define REPLACE 32     /* munmap or mmap(MAP_FIXED) through libc */
#define FORK 64
#define REMAP 128      /* mremap through libc: page 0 goes to page 1 */
#define PROTECT 256    /* a change that merged memory can't have: mprotect(PROT_EXEC), MADV_WIPEONFORK, UFFDIO_REGISTER */
#define RAW_REPLACE 512
#define RAW_FORK 1024

#define BIT(n) (1 << (n))

/* ---- the oracle ---- */

byte allowed[PAGES];  /* one bit for each content that a read may return */
byte dropping[PAGES]; /* discards under way */
bit rewritten[PAGES]; /* since the first of them started */

inline note_written(p, value)
{
	if
	:: dropping[p] -> rewritten[p] = 1; allowed[p] = BIT(value) | BIT(ZERO)
	:: else -> allowed[p] = BIT(value)
	fi
}

inline note_drop_begins(p)
{
	if
	:: dropping[p] == 0 -> rewritten[p] = 0
	:: else
	fi;
	dropping[p]++;
	allowed[p] = allowed[p] | BIT(ZERO)
}

inline note_drop_ends(p)
{
	dropping[p]--;
	if
	:: !rewritten[p] -> allowed[p] = BIT(ZERO)
	:: else
	fi
}

/* A read returned `value`. What it did not return while a discard was under way is gone for good. */
inline check_read(p, value)
{
	assert(allowed[p] & BIT(value)); /* a lost write, or a discarded page come back */
	allowed[p] = BIT(value) | ((dropping[p] && allowed[p] & BIT(ZERO)) -> BIT(ZERO) : 0)
}

/* ---- touching memory ---- */

inline wait_in_fault(p, why)
{
	fault[t] = PENDING; fault_page[t] = p; fault_kind[t] = why
}

/* Until it succeeds. In GONE memory a program gets SIGSEGV; FOREIGN memory is none of our business. */
inline touch(p, writes, pins)
{
	do
	:: atomic { fault[t] == NONE ->
		if
		:: vma[p] == GONE || vma[p] == FOREIGN -> break
		:: pte[p] == ABSENT && watch[p] == MISSING -> wait_in_fault(p, FAULT_MISSING)
		:: pte[p] == ABSENT && vma[p] == PLAIN && watch[p] != MISSING -> pte[p] = ANON; content[p] = ZERO
		:: pte[p] == ABSENT && vma[p] == STORE && watch[p] == ARMED -> wait_in_fault(p, FAULT_MINOR)
		:: pte[p] == ABSENT && vma[p] == STORE && watch[p] == UNWATCHED -> pte[p] = FILE
		:: pte[p] != ABSENT && writes && protected[p] -> wait_in_fault(p, FAULT_WP)
		:: pte[p] == FILE && writes && !protected[p] -> pte[p] = ANON; content[p] = SAME
		:: pte[p] == FILE && !writes -> check_read(p, SAME); break
		:: pte[p] == ANON && !writes -> check_read(p, content[p]); break
		:: pte[p] == ANON && writes && !protected[p] ->
			forked[p] = 0;
			if
			:: pins -> pinned[p] = 1
			:: else -> content[p] = MINE + t; note_written(p, MINE + t)
			fi;
			break
		fi }
	od
}

/* What a hook may touch while it holds the lock, its stack above all. */
#ifdef STACK
#define touch_stack() if :: touch(STACK, 1, 0) :: skip fi; skip
#else
#define touch_stack()
#endif

/* ---- hooks.c ---- */

inline enter() /* enter() */
{
#ifndef NO_MAP_LOCK
	if
	:: atomic { !held && !waiters -> readers++ } /* udd_trylock_shared() */
	:: atomic { held || waiters -> queued++; my_phase = phase }; phase != my_phase /* udd_lock_shared() */
	fi;
#else
	skip;
#endif
	touch_stack()
}

inline leave() /* leave() */
{
#ifndef NO_MAP_LOCK
	readers--;
#endif
	skip
}

inline enter_exclusive() /* enter_exclusive() */
{
#ifndef NO_MAP_LOCK
	d_step { readers--; waiters++ };
	atomic { !held && !readers -> held = 1; owner = t + 1; waiters-- }
#endif
	settle(hi);
	touch_stack()
}

inline leave_exclusive() /* leave_exclusive() */
{
#ifndef NO_MAP_LOCK
	owner = 0;
	!owner_kept;
	unlock_exclusive();
#endif
	skip
}

inline note_change(p) /* note_change() */
{
	stale[p] = 1
}

/* The system call itself: a mapping that userfaultfd watches raises an event first, and the thread waits until it is read. */
inline dontneed_begins(p)
{
	if
	:: watch[p] != UNWATCHED -> changing++; removal[t] = PENDING; removal_page[t] = p
	:: else -> k_zap(p)
	fi
}

inline dontneed_goes_on(p)
{
	if
	:: removal[t] == NONE -> skip
	:: removal[t] == READ ->
		d_step { removal[t] = NONE; removal_page[t] = 0; changing-- };
		d_step { k_zap(p) }
	fi
}

inline dontneed(p)
{
	d_step { dontneed_begins(p) };
	dontneed_goes_on(p)
}

/* Past the hooks. Not noticed where a mapping of the store is not registered: between two system calls of arm(), or behind
 * mremap, as the README says. */
inline raw_dontneed(p)
{
	if
#ifndef LIMIT_RAW_DISCARD
	:: atomic { vma[p] == STORE && watch[p] == UNWATCHED -> skip }
	:: d_step { !(vma[p] == STORE && watch[p] == UNWATCHED) -> note_drop_begins(p); dontneed_begins(p) };
#else
	:: d_step { note_drop_begins(p); dontneed_begins(p) };
#endif
		dontneed_goes_on(p);
		d_step { note_drop_ends(p) }
	fi
}

inline madvise_dontneed(p) /* hook_madvise() */
{
	d_step { note_drop_begins(p) };
	enter();
	if
	:: !merged[p] -> dontneed(p); leave()
	:: else ->
		enter_exclusive();
		if
		:: merged[p] -> d_step { discard_page(p) } /* discard() */
		:: else -> dontneed(p)
		fi;
		leave_exclusive()
	fi;
	d_step { note_drop_ends(p) }
}

inline map_anew(p, what)
{
	k_map(p, what);
	if
	:: what == PLAIN -> allowed[p] = BIT(ZERO); rewritten[p] = 0
	:: else
	fi
}

/* munmap, or mmap with MAP_FIXED. */
inline replace_mapping(p, what) /* replace_mapping() */
{
	enter();
	if
	:: !merged[p] -> d_step { map_anew(p, what) }; note_change(p); leave()
	:: else ->
		enter_exclusive();
		d_step { map_anew(p, what) };
		d_step { forget_run(p) }; /* udd_forget() */
		note_change(p);
		leave_exclusive()
	fi
}

inline mremap(p, q) /* hook_mremap() */
{
	enter();
	if
	:: !merged[p] && !merged[q] -> d_step { k_mremap(p, q) }; note_change(p); note_change(q); leave()
	:: else ->
		enter_exclusive();
		/* udd_remap(): forgets what is at the target, moves the mapping, then the entry */
		d_step { forget_run(q) };
		d_step { k_mremap(p, q) }; /* move_run() */
		if
		:: merged[p] -> d_step { merged[q] = 1; broken[q] = broken[p]; armed[q] = 0; arm_bell = 1; forget_run(p) } /* udd_readdress() */
		:: else
		fi;
		note_change(p); note_change(q);
		leave_exclusive()
	fi
}

/* Drops the registration (EVENT_REMAP is off), and with it all protection. */
inline k_mremap(p, q)
{
	if
	:: vma[p] != GONE ->
		vma[q] = vma[p]; watch[q] = UNWATCHED; pte[q] = pte[p]; content[q] = content[p]; protected[q] = 0;
		forked[q] = forked[p]; pinned[q] = pinned[p];
		allowed[q] = allowed[p]; dropping[q] = dropping[p]; rewritten[q] = rewritten[p];
		k_map(p, GONE)
	:: else
	fi
}

inline change_protection(p) /* change_protection() */
{
	enter();
	if
	:: !merged[p] -> note_change(p); leave()
	:: else ->
		enter_exclusive();
		if
#ifdef STACK
		/* is_own_stack(), break_by_kernel() */
		:: merged[p] && p == STACK && !OWN_STACK_DISSOLVES ->
			touch(p, 1, 0);
			settle(hi);
			d_step {
				if
				:: merged[p] -> broken[p] = 1 /* udd_broke_in_place() */
				:: else
				fi
			}
		:: merged[p] && (p != STACK || OWN_STACK_DISSOLVES) -> dissolve(p) /* dissolve_all() */
#else
		:: merged[p] -> dissolve(p) /* dissolve_all() */
#endif
		:: else
		fi;
		note_change(p);
		leave_exclusive()
	fi
}

/* The child's page table is a copy of ours, and its mappings are not registered. */
inline k_fork()
{
	d_step {
		for (hi : 0 .. PAGES - 1) {
			if
			:: vma[hi] == PLAIN && pte[hi] == ABSENT -> assert(allowed[hi] & BIT(ZERO))
			:: vma[hi] == STORE && pte[hi] != ANON -> assert(allowed[hi] & BIT(SAME))
			:: (vma[hi] == PLAIN || vma[hi] == STORE) && pte[hi] == ANON ->
				assert(allowed[hi] & BIT(content[hi]));
				forked[hi] = !pinned[hi]
			:: else
			fi
		}
		hi = 0
	}
}

inline fork() /* hook_fork() */
{
#ifdef FORK_NOT_HOOKED
	k_fork()
#else
	enter();
	k_fork();
	leave()
#endif
}

/* A device reads into the page: after it was pinned, without asking a page table again. */
inline direct_read(p)
{
	touch(p, 1, 1);
	atomic {
		if
		:: pinned[p] -> content[p] = MINE + t; note_written(p, MINE + t)
		:: else /* the page was dropped meanwhile */
		fi
	};
	pinned[p] = 0
}

proctype application(byte t; short may; byte on)
{
	byte p, hi, done;
	bit my_phase; /* of the lock, when this thread began to wait for it */

	do
	:: done < OPERATIONS ->
		done++;
		if
		:: on & 1 -> p = 0
		:: on & 2 -> p = 1
		:: on & 4 -> p = 2
		fi;
		if
		:: may & READ_PAGE -> touch(p, 0, 0)
		:: may & WRITE_PAGE -> touch(p, 1, 0)
		:: may & PIN && vma[p] != GONE && vma[p] != FOREIGN -> direct_read(p)
		:: may & DISCARD -> madvise_dontneed(p)
		:: may & RAW_DISCARD -> raw_dontneed(p)
		:: may & REPLACE ->
			atomic { allowed[p] = 255 };
			if
			:: replace_mapping(p, GONE);
				if
				:: d_step { map_anew(p, FOREIGN) }
				:: d_step { map_anew(p, PLAIN) }
				fi
			:: replace_mapping(p, FOREIGN)
			:: replace_mapping(p, PLAIN)
			fi
		:: may & FORK -> fork()
		:: may & REMAP -> mremap(0, 1)
		:: may & PROTECT -> change_protection(p)
		:: may & RAW_REPLACE -> allowed[p] = 255; d_step { map_anew(p, FOREIGN) }
		:: may & RAW_FORK -> k_fork()
		fi;
		p = 0
	:: break
	od;
	if
	:: on & 1 -> touch(0, 0, 0)
	:: else
	fi;
	if
	:: on & 2 -> touch(1, 0, 0)
	:: else
	fi;
	if
	:: on & 4 -> touch(2, 0, 0)
	:: else
	fi
}
