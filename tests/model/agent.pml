/* SPDX-License-Identifier: MIT
 *
 * The agent's side. Beside each step stands the C function that does it, in native/agent; test_model.py checks that it exists.
 * The table of runs (udd_agent.runs) is kept page by page, and the lists of what waits to be settled as one bit a page.
 */

#ifdef TAKE_BACK_REMOVED
#define MAY_TAKE_BACK(p) true
#else
#define MAY_TAKE_BACK(p) !removed[p]
#endif
#ifdef NO_REMOVAL_CHECK
#define REMOVED(p) false
#else
#define REMOVED(p) removed[p]
#endif
#define HAS_DEFERRED (deferred[0] || deferred[(PAGES > 1)] || deferred[PAGES - 1])

byte fault_thread_pid;

/* The map lock: struct udd_lock. `waiters` stands for WAITING, which keeps new readers out. Whoever in the C code waits for
 * a limited time waits for ever here, where that can only make the agent more likely to get stuck. */
bit held;
byte readers;
byte waiters;
byte owner;    /* the application thread that holds it exclusively, + 1 */
bit owner_kept; /* the fault thread serves the owner, who must not give the lock up meanwhile */

/* The table. */
bit merged[PAGES];
bit armed[PAGES];
bit broken[PAGES];
/* struct udd_live */
bit merging = 1;
bit broke[PAGES];    /* live->unsettled: broke in place while the table was not ours to change */
bit deferred[PAGES]; /* live->unsettled: dropped by raw system calls, likewise */
bit stale[PAGES];    /* live->stale */
bit arm_bell;        /* UDD_BELL_ARM */
/* fault.c: faults to be woken later */
bit aside[PAGES];
bit asleep[PAGES];   /* with quiet breaks: have broken, and their writers still wait */
/* The worker's layout. */
bit candidate[PAGES];

inline forget_run(p) /* udd_forget() */
{
	merged[p] = 0; armed[p] = 0; broken[p] = 0;
}

inline release_aside() /* udd_fault_release() */
{
	d_step {
		for (ri : 0 .. PAGES - 1) {
			if
			:: aside[ri] -> aside[ri] = 0; k_wake(ri)
			:: else
			fi
		}
		ri = 0
	}
}

/* Fresh memory over a merged page. The table changes with it: who reads the table holds the lock. */
inline discard_page(p) /* udd_discard() */
{
	if
	:: merged[p] -> assert(vma[p] != FOREIGN); k_map(p, PLAIN); forget_run(p)
	:: else
	fi
}

inline settle_removals(i) /* udd_settle() */
{
	d_step {
		for (i : 0 .. PAGES - 1) {
			if
			:: deferred[i] -> deferred[i] = 0; discard_page(i)
			:: else
			fi
		}
		i = 0
	}
}

/* By whoever took the lock exclusively. */
inline settle(i) /* udd_settle() */
{
	d_step {
		for (i : 0 .. PAGES - 1) {
			if
			:: broke[i] && merged[i] -> broken[i] = 1 /* udd_broke_in_place() */
			:: else
			fi;
			broke[i] = 0
		}
		i = 0
	};
#ifdef DEFERRED_LEFT_TO_FAULT_THREAD
	if
	:: _pid == fault_thread_pid -> settle_removals(i)
	:: else
	fi
#else
	settle_removals(i)
#endif
}

inline lock_exclusive() /* udd_lock_exclusive() */
{
	waiters++;
	atomic { !held && !readers -> held = 1; waiters-- }
}

/* ---- the worker ---- */

inline worker_lock(i) /* udd_worker_lock() */
{
#ifdef NO_MAP_LOCK
	skip;
#else
	lock_exclusive();
#endif
	settle(i);
	d_step { /* udd_layout_apply() */
		for (i : 0 .. PAGES - 1) {
			if
			:: stale[i] -> stale[i] = 0; candidate[i] = 0
			:: else
			fi
		}
		i = 0
	}
}

inline worker_unlock() /* udd_worker_unlock() */
{
#ifndef NO_MAP_LOCK
	held = 0;
#endif
	release_aside()
}

bit removed[PAGES]; /* tx->removed */
bit frozen[PAGES];  /* tx->frozen */
bit equal[PAGES];

/* What an event about page p means for a transaction under way. */
inline note_removed(p) /* read_events() */
{
	removed[p] = 1;
#ifdef REMOVED_IS_A_HULL
	/* from the first page ever removed to the last */
	if
	:: removed[0] && removed[PAGES - 1] -> removed[1] = 1
	:: else
	fi
#endif
}

/* An ioctl said EAGAIN: everything that waits in the userfaultfd is read, faults first. */
inline drain(i) /* udd_fault_drain() */
{
	do
	:: atomic { unread_faults ->
		for (i : 0 .. THREADS - 1) {
			if
			:: fault[i] == PENDING -> fault[i] = READ; aside[fault_page[i]] = 1
			:: else
			fi
		}
		i = 0 }
	:: atomic { !unread_faults && unread_removals ->
		if
		:: removal[0] == PENDING -> i = 0
		:: removal[1] == PENDING -> i = 1
		:: removal[THREADS - 1] == PENDING -> i = THREADS - 1
		fi;
		/* serve_removal() */
		merging = 0;
		note_removed(removal_page[i]);
		victim = removal_page[i];
		removal[i] = READ;
		i = 0 };
		/* The thread may go on and drop the page from here on. */
		d_step { discard_page(victim); k_wake(victim); victim = 0 }
	:: else -> break
	od
}

inline freeze_page(p, i) /* freeze() */
{
	taken_back = 0;
	tries = 0;
	do
	:: d_step { k_move_out(p, ret) };
		if
		:: ret == OK -> frozen[p] = 1; break
		:: ret == EAGAIN && tries < 1 -> tries++; drain(i) /* read_events() */
		:: ret == EAGAIN && tries == 1 -> break /* RETRIES are used up: busy */
		:: ret == EBUSY && !taken_back && MAY_TAKE_BACK(p) ->
			taken_back = 1;
			/* take_back_from_fork(): MADV_POPULATE_WRITE touches the page. */
			atomic {
				if
				:: pte[p] == ABSENT && watch[p] == MISSING -> worker_fault = p + 1
				:: pte[p] == ANON -> forked[p] = 0
				:: else
				fi
			}
			worker_fault == 0
		:: else -> break /* busy, or gone */
		fi
	od;
	taken_back = 0; tries = 0; ret = OK
}


/* Pages go back from the first on; a removal that is learnt of meanwhile is looked at before each call. */
inline thaw(p, i) /* thaw() */
{
	do
#ifdef THAW_IGNORES_REMOVAL
	:: false -> skip
#else
	:: removed[p] -> d_step { staged[p] = 0; staging[p] = 0 }; break
#endif
	:: else ->
		d_step { k_move_back(p, ret) };
		if
		:: ret == EAGAIN -> drain(i) /* read_events() */
		:: ret == OK -> break
		:: else -> merging = 0; d_step { staged[p] = 0; staging[p] = 0 }; break /* udd_stop_merging() */
		fi
	od;
	frozen[p] = 0; ret = OK
}

inline arm_page(p) /* arm() */
{
	d_step { k_register(p, ARMED, ret) };
	if
	:: ret == OK ->
		d_step { k_continue(p, ret) }; /* udd_uffd_continue() */
		if
		:: ret == EEXIST ->
			/* a thread touched it already */
			d_step { k_protect(p, 1, ret) };
			/* find_broken(): asks the page table */
			if
			:: ret == OK && pte[p] == ANON -> d_step { broken[p] = 1; k_protect(p, 0, ret); ret = OK }
			:: else
			fi
		:: else
		fi
	:: else
	fi;
	if
	:: ret == OK -> armed[p] = 1
	:: else -> arm_bell = 1
	fi;
	ret = OK
}

/* Pages [from, to) are candidates and not merged. */
inline merge_stretch(from, to, p, i) /* merge_stretch() */
{
	d_step {
		for (p : from .. to - 1) {
			k_register(p, MISSING, ret);
			if
			:: ret != OK -> gone = 1
			:: else
			fi
		}
		p = 0
	};
	if
	:: gone -> skip
	:: else ->
#ifndef NO_FREEZE
		for (p : from .. to - 1) { freeze_page(p, i) }
#endif
		skip;
		d_step { /* same_page() */
			for (p : from .. to - 1) {
#ifdef NO_FREEZE
				equal[p] = (pte[p] == ANON && content[p] == SAME)
#else
				equal[p] = (frozen[p] && staging[p] == SAME)
#endif
			}
		};
		for (p : from .. to - 1) {
			if
			:: frozen[p] && !equal[p] -> thaw(p, i)
			:: else
			fi
		};
		for (p : from .. to - 1) {
			if
			:: equal[p] && REMOVED(p) -> thaw(p, i)
			:: equal[p] && !REMOVED(p) ->
				/* map_store(): mmap may fail, for want of memory or of mappings */
				if
				:: skip ->
					d_step {
						assert(vma[p] != FOREIGN);
#ifdef NO_MAP_LOCK
						assert(vma[p] != GONE);
#endif
#ifdef NO_FREEZE
						assert(!pinned[p]);
#endif
						k_map(p, STORE);
						staged[p] = 0; staging[p] = 0; frozen[p] = 0
					};
					d_step { merged[p] = 1; armed[p] = 0; broken[p] = 0 }; /* udd_insert_run() */
					arm_page(p)
				:: FAILURES ->
#ifdef NOT_MOVED_BACK
					d_step { staged[p] = 0; staging[p] = 0; frozen[p] = 0 }
#else
					thaw(p, i)
#endif
				fi
			:: else
			fi
		};
		for (p : from .. to - 1) {
			if
			:: !merged[p] -> d_step { k_unregister(p) } /* udd_uffd_unregister() */
			:: else
			fi
		}
	fi;
#ifndef NO_WAKE
	skip;
	d_step { for (p : from .. to - 1) { k_wake(p) } p = 0 }; /* udd_uffd_wake() */
#endif
	gone = 0;
	skip;
	d_step { for (p : 0 .. PAGES - 1) { removed[p] = 0; frozen[p] = 0; equal[p] = 0 } p = 0 }
}


inline merge(from, to, p, i) /* udd_merge() */
{
	worker_lock(i);
	/* merge_locked(): the first stretch of candidates. */
	from = MERGE_FROM;
	do
	:: from < MERGE_TO && (!merging || merged[from] || !candidate[from]) -> from++
	:: else -> break
	od;
	to = from;
	do
	:: to < MERGE_TO && merging && !merged[to] && candidate[to] -> to++
	:: else -> break
	od;
	if
	:: from < to -> merge_stretch(from, to, p, i)
	:: else
	fi;
	from = 0; to = 0;
	worker_unlock()
}

/* The engine wants a merged page in another slot. */
inline relocate(p, i) /* relocate() */
{
	worker_lock(i);
	if
	:: merging && merged[p] && armed[p] && !broken[p] ->
		if
		:: vma[p] == STORE && pte[p] == FILE && protected[p] -> /* still_merged() */
			d_step { assert(vma[p] != FOREIGN); k_map(p, STORE); armed[p] = 0 }; /* map_store() */
			arm_page(p);
			d_step { k_wake(p) }
		:: else
		fi
	:: else
	fi;
	worker_unlock()
}

inline unmerge(p, i) /* udd_unmerge() */
{
	worker_lock(i);
	if
	:: merged[p] ->
		if
		:: !armed[p] && !broken[p] -> arm_page(p)
		:: else
		fi;
		if
		:: vma[p] == STORE && pte[p] == FILE && protected[p] -> dissolve(p) /* still_merged() */
		:: else
		fi;
		d_step { k_wake(p) }
	:: else
	fi;
	worker_unlock()
}

/* A private copy of the store's page, put in place by mremap. */
inline dissolve(p) /* udd_dissolve() */
{
	if
	:: broken[p] || !armed[p] || !merged[p] -> skip
	:: else ->
		/* dissolve_piece() */
		d_step {
			assert(vma[p] != FOREIGN);
			assert(!pinned[p]);
			k_map(p, PLAIN);
			pte[p] = ANON; content[p] = SAME;
			forget_run(p)
		}
	fi
}

inline arm_runs(p, i) /* udd_arm_runs() */
{
	arm_bell = 0;
	worker_lock(i);
	for (p : 0 .. PAGES - 1) {
		if
		:: merged[p] && !armed[p] && !broken[p] -> arm_page(p); d_step { k_wake(p) }
		:: else
		fi
	}
	worker_unlock()
}

inline merge_zero(p, i) /* udd_merge_zero() */
{
	worker_lock(i);
	if
	:: merging && candidate[p] && !merged[p] ->
		d_step { k_register(p, MISSING, ret) };
		if
		:: ret == OK ->
			freeze_page(p, i);
			if
			:: frozen[p] && staging[p] == ZERO -> d_step { staged[p] = 0; frozen[p] = 0 }
			:: frozen[p] && staging[p] != ZERO -> thaw(p, i)
			:: else
			fi;
			d_step { k_unregister(p) };
			d_step { k_wake(p); removed[p] = 0 }
		:: else
		fi;
		ret = OK
	:: else
	fi;
	worker_unlock()
}

/* Once the memory is mapped otherwise, its mapping may be a candidate again. */
inline read_layout(i) /* udd_layout_read() */
{
	worker_lock(i);
	worker_unlock();
	d_step {
		for (i : 0 .. PAGES - 1) { candidate[i] = (vma[i] == PLAIN) }
		i = 0
	}
}

proctype worker() /* udd_worker_thread() */
{
	byte from, to, p, i, tries, victim;
	byte rounds;
	bit gone, taken_back;
	mtype ret = OK;

	do
	:: rounds < ROUNDS ->
		rounds++;
		if
		:: WORK & 1 -> merge(from, to, p, i)
		:: WORK & 2 -> unmerge(WORK_PAGE, i)
		:: WORK & 4 -> relocate(WORK_PAGE, i)
		:: WORK & 8 -> merge_zero(WORK_PAGE, i)
		:: WORK & 16 -> read_layout(i)
		:: WORK & 32 -> arm_runs(p, i); p = 0
		fi
	:: arm_bell -> arm_runs(p, i); p = 0 /* serve_engine() */
	:: break
	od
}

/* ---- the fault thread ---- */

inline wake_writers(p) /* wake_writers() */
{
#ifdef QUIET
	asleep[p] = 1
#else
	d_step { k_wake(p) }
#endif
}

inline wake_sleepers(i) /* wake_sleepers() */
{
#if defined(QUIET) && !defined(SLEEPERS_FORGOTTEN)
	d_step {
		for (i : 0 .. PAGES - 1) {
			if
			:: asleep[i] -> k_wake(i); asleep[i] = 0
			:: else
			fi
		}
		i = 0
	}
#else
	skip
#endif
}

inline break_in_place(p, excl) /* break_in_place() */
{
	d_step {
#ifdef QUIET
		k_unprotect_asleep(p, ret); /* udd_uffd_unprotect_asleep() */
		if
		:: ret == OK -> asleep[p] = 1
		:: else
		fi;
#else
		k_protect(p, 0, ret); /* udd_uffd_protect() */
#endif
		if
		:: ret == OK ->
			if
			:: excl && merged[p] -> broken[p] = 1 /* udd_broke_in_place() */
			:: !excl -> broke[p] = 1
			:: else
			fi
		:: else
		fi
	}
	served = (ret == OK)
}

inline serve_write(p, excl) /* serve_write() */
{
	if
	:: broken[p] -> d_step { k_protect(p, 0, ret) }
	:: else ->
		if
		:: excl && armed[p] ->
#ifdef WIDEN
			/* widen(): neighbours of the same run go along */
			for (i : 0 .. PAGES - 1) {
				if
				:: merged[i] && armed[i] && !broken[i] -> dissolve(i); wake_writers(i)
				:: else
				fi
			}
#else
			dissolve(p); wake_writers(p);
#endif
			served = 1
		:: true -> break_in_place(p, excl) /* locked memory, or may_dissolve_lone() says no */
		fi
	fi
}

inline serve_fault(t, excl) /* serve_fault() */
{
	served = 0; ret = OK;
	if
#ifndef SERVE_WHAT_IS_DEFERRED
	:: deferred[page] -> ret = EAGAIN
#endif
	:: else ->
		if
		:: merged[page] && kind == FAULT_WP -> serve_write(page, excl)
		:: merged[page] && kind == FAULT_MINOR -> d_step { k_continue(page, ret) } /* serve_minor() */
		:: else
		fi
	fi;
	finish_fault()
}

inline finish_fault() /* serve_fault() */
{
	if
	:: ret == EAGAIN -> aside[page] = 1 /* put_aside() */
#ifdef NO_WAKE
	:: ret != EAGAIN && !served && kind != FAULT_MISSING -> d_step { k_wake(page) }
#else
	:: ret != EAGAIN && !served -> d_step { k_wake(page) }
#endif
	:: else
	fi;
	served = 0; ret = OK; page = 0; kind = 0
}

/* Reads one message, faults before events. */
inline read_message() /* read_events() */
{
	atomic {
		if
		:: fault[0] == PENDING -> from = 0
		:: fault[1] == PENDING -> from = 1
		:: fault[THREADS - 1] == PENDING -> from = THREADS - 1
		:: !unread_faults && removal[0] == PENDING -> from = 0
		:: !unread_faults && removal[1] == PENDING -> from = 1
		:: !unread_faults && removal[THREADS - 1] == PENDING -> from = THREADS - 1
		:: else -> from = THREADS
		fi;
		if
		:: from < THREADS && fault[from] == PENDING ->
			fault[from] = READ; page = fault_page[from]; kind = fault_kind[from]
		:: from < THREADS && fault[from] != PENDING ->
			removal[from] = READ; page = removal_page[from]; kind = 0;
#ifndef NO_REMOVE_HANDLING
			/* serve_removal() and defer_removal() stop merging; no transaction can start before the lock is given back. */
			merging = 0
#endif
		:: else
		fi
	}
}

inline serve_owner(i) /* serve_owner() */
{
#ifndef OWNER_NOT_KEPT
	owner_kept = 1; /* udd_lock_keep_owner() */
#endif
	seen = owner;
	if
	:: seen ->
		read_message();
		if
		:: from == THREADS -> skip
		:: from < THREADS && kind == 0 -> deferred[page] = 1; page = 0 /* defer_removal() */
		:: from < THREADS && kind != 0 ->
			ret = EAGAIN;
			if
			:: from + 1 == seen && kind == FAULT_WP -> break_in_place(page, 0)
			:: from + 1 == seen && kind == FAULT_MINOR -> d_step { k_continue(page, ret) } /* serve_minor() */
			:: else
			fi;
#ifndef OWNER_PUT_ASIDE
			if
			:: from + 1 == seen -> ret = OK
			:: else
			fi;
#endif
			finish_fault()
		fi;
#ifndef OWNER_SLEEPS
		wake_sleepers(i)
#endif
	:: else
	fi;
	owner_kept = 0; /* udd_lock_let_go_owner() */
	seen = 0; from = 0
}

proctype fault_thread() /* udd_fault_thread() */
{
	byte page, from, i, seen;
	mtype kind, ret = OK;
	bit exclusive, served;

	fault_thread_pid = _pid;
end:	do
	:: unread_faults || unread_removals || HAS_DEFERRED ->
		/* serve_all(): again and again, until the table knows of all removals */
		do
		:: atomic { !held && !readers -> held = 1; exclusive = 1; break } /* udd_lock_exclusive_timed() */
#ifndef NO_SHARED_SERVING
		:: atomic { !held && readers && (unread_faults || unread_removals) -> readers++; break } /* udd_trylock_shared_urgent() */
#endif
#ifndef NO_OWNER_SERVING
		:: held && owner && (unread_faults || unread_removals) -> serve_owner(i)
#endif
		od;
		if
		:: exclusive -> settle(i)
		:: else
		fi;
		do
		:: read_message();
			if
			:: from == THREADS -> break
			:: from < THREADS && kind == 0 ->
#ifdef NO_REMOVE_HANDLING
				skip;
#else
				if
				:: exclusive -> /* serve_removal() */
					d_step { discard_page(page) };
					d_step { k_wake(page) }
				:: else -> deferred[page] = 1 /* defer_removal() */
				fi;
#endif
				page = 0
			:: from < THREADS && kind != 0 -> serve_fault(from, exclusive)
			fi;
			from = 0;
			/* A batch may end here. */
			if
			:: skip
			:: break
			fi
		od;
		from = 0;
#ifdef WAITS_FOR_READERS
		if
		:: !exclusive && HAS_DEFERRED -> readers--; lock_exclusive(); exclusive = 1; settle(i)
		:: else
		fi;
#endif
		release_aside();
		if
		:: exclusive -> held = 0
		:: else -> readers--
		fi;
		wake_sleepers(i);
		exclusive = 0
	od
}
