/* SPDX-License-Identifier: MIT
 *
 * The kernel's side: page tables, mappings and userfaultfd as Linux 6.18 does them (mm/memory.c, mm/madvise.c,
 * mm/userfaultfd.c, fs/userfaultfd.c). Every inline is one step that the kernel's own locks make atomic.
 */

/* What a page contains. */
#define ZERO 0
#define SAME 1 /* what the store's page contains */
#define MINE 2 /* MINE + t is what thread t writes */

mtype = { GONE, PLAIN, STORE, FOREIGN };       /* a page's mapping; FOREIGN: something that is not ours to touch */
mtype = { UNWATCHED, MISSING, ARMED };         /* its registration; ARMED is WP|MINOR */
mtype = { ABSENT, ANON, FILE };                /* its page table entry: nothing, a private page, the store's page */
mtype = { NONE, PENDING, READ };               /* a fault, or an event, of a thread: none, queued, read by the agent */
mtype = { FAULT_MISSING, FAULT_MINOR, FAULT_WP };
mtype = { OK, EAGAIN, EBUSY, EEXIST, ENOENT, ENOMEM };

mtype vma[PAGES] = PLAIN;
mtype watch[PAGES] = UNWATCHED;
mtype pte[PAGES] = ABSENT;
byte content[PAGES]; /* if ANON */
bit protected[PAGES]; /* by userfaultfd */
bit forked[PAGES];   /* ANON, and marked as shared with a fork child */
bit pinned[PAGES];   /* ANON, and a device may write to it */
bit staged[PAGES];   /* the staging area: is there a page? */
byte staging[PAGES]; /* and its content */

byte changing; /* mmap_changing: while it is not 0, ioctls say EAGAIN */
mtype fault[THREADS] = NONE;
byte fault_page[THREADS];
mtype fault_kind[THREADS];
mtype removal[THREADS] = NONE; /* the event of a thread that waits in MADV_DONTNEED */
byte removal_page[THREADS];
byte kt, ri; /* scratch of single steps */
byte worker_fault; /* the page, + 1, on which the worker itself waits */

#define unread_faults (fault[0] == PENDING || fault[1] == PENDING || fault[THREADS - 1] == PENDING)
#define unread_removals (removal[0] == PENDING || removal[1] == PENDING || removal[THREADS - 1] == PENDING)

inline k_forget_page(p)
{
	pte[p] = ABSENT;
	content[p] = 0;
	protected[p] = 0;
	forked[p] = 0;
	pinned[p] = 0;
}

/* mmap(MAP_FIXED) and munmap. No event (EVENT_UNMAP is off), and nobody is woken. */
inline k_map(p, what)
{
	vma[p] = what;
	watch[p] = UNWATCHED;
	k_forget_page(p);
}

/* UFFDIO_WAKE of one page: the waiting threads fault again, whether or not their fault was read. */
inline k_wake(p)
{
	for (kt : 0 .. THREADS - 1) {
		if
		:: fault[kt] != NONE && fault_page[kt] == p -> fault[kt] = NONE; fault_page[kt] = 0; fault_kind[kt] = 0
		:: else
		fi
	}
	kt = 0;
	if
	:: worker_fault == p + 1 -> worker_fault = 0
	:: else
	fi
}

inline k_register(p, mode, ret)
{
	if
	:: vma[p] == GONE || vma[p] == FOREIGN -> ret = ENOENT
	:: else -> watch[p] = mode; ret = OK
	fi
}

inline k_unregister(p)
{
	if
	:: watch[p] != UNWATCHED -> watch[p] = UNWATCHED; protected[p] = 0; k_wake(p)
	:: else
	fi
}

/* UFFDIO_MOVE of one page to staging. */
inline k_move_out(p, ret)
{
	if
	:: changing -> ret = EAGAIN
	:: else ->
		if
		:: vma[p] != PLAIN || pte[p] == ABSENT -> ret = ENOENT
#ifndef MOVE_IGNORES_PINS
		:: vma[p] == PLAIN && pte[p] == ANON && pinned[p] -> ret = EBUSY
#endif
		:: vma[p] == PLAIN && pte[p] == ANON && forked[p] && !pinned[p] -> ret = EBUSY
		:: else ->
			assert(!staged[p]);
			assert(!pinned[p]); /* a device would go on writing to the page in staging */
			staged[p] = 1; staging[p] = content[p];
			k_forget_page(p);
			ret = OK
		fi
	fi
}

/* UFFDIO_MOVE of one page back. */
inline k_move_back(p, ret)
{
	if
	:: changing -> ret = EAGAIN
	:: else ->
		if
		:: vma[p] != PLAIN || watch[p] != MISSING -> ret = ENOENT
		:: vma[p] == PLAIN && watch[p] == MISSING && pte[p] != ABSENT -> ret = EEXIST
		:: else ->
			pte[p] = ANON; content[p] = staging[p];
			staged[p] = 0; staging[p] = 0;
			ret = OK
		fi
	fi
}

/* UFFDIO_CONTINUE of one page, write-protected. */
inline k_continue(p, ret)
{
	if
	:: changing -> ret = EAGAIN
	:: else ->
		if
		:: vma[p] != STORE || watch[p] != ARMED -> ret = ENOENT
		:: vma[p] == STORE && watch[p] == ARMED && pte[p] != ABSENT -> ret = EEXIST
		:: else -> pte[p] = FILE; protected[p] = 1; ret = OK
		fi
	fi
}

/* UFFDIO_WRITEPROTECT of one page; lifting protection wakes. */
inline k_protect(p, on, ret)
{
	if
	:: changing -> ret = EAGAIN
	:: else ->
		if
		:: watch[p] != ARMED -> ret = ENOENT
		:: else ->
			ret = OK;
			if
			:: on -> protected[p] = (pte[p] != ABSENT)
			:: else -> protected[p] = 0; k_wake(p)
			fi
		fi
	fi
}

/* Lifts protection, and whoever waits for that sleeps on. */
inline k_unprotect_asleep(p, ret)
{
	if
	:: changing -> ret = EAGAIN
	:: else ->
		if
		:: watch[p] != ARMED -> ret = ENOENT
		:: else -> ret = OK; protected[p] = 0
		fi
	fi
}

/* What the kernel does with a page that MADV_DONTNEED drops. In a mapping of the store the page will come back. */
inline k_zap(p)
{
	if
	:: vma[p] == PLAIN || vma[p] == STORE -> k_forget_page(p)
	:: else
	fi
}
