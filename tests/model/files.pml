/* SPDX-License-Identifier: MIT
 *
 * A model of merging mappings of files
 * ====================================
 *
 * One page of a mapping that nobody can write to (native/agent/files.h). The worker reads the layout, compares the page without
 * the lock, takes the lock, and maps the store over the file. One thread of the application maps other things there, makes the
 * mapping writable and writes, discards and unmaps; its hooks hold the map lock. Spin goes through every order of that. At
 * every step what the page shows must be what the application put there, unless it is a fault to read it.
 *
 * The store has the content of file A. Switches take one safeguard away each; test_files_model.py expects spin to find the harm.
 * Left out: several pages, several threads of the application (the lock orders them), the fault thread (there are no faults to
 * serve), the engine.
 */

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef OPERATIONS
#define OPERATIONS 3
#endif

/* What is mapped. */
#define NOTHING 0
#define FILE_A 1
#define FILE_B 2
#define ANON 3
#define STORE 4

/* Contents. */
#define ZERO 0
#define A 1
#define B 2
#define WRITTEN 3

/* ---- the kernel ---- */
byte vma = FILE_A;
bool writable = false;
bool copied = false; /* a private copy, with the content `copy` */
byte copy = ZERO;
byte content = A; /* what a read gives; follows from the above */

inline reread()
{
	if
	:: copied -> content = copy
	:: !copied && vma == FILE_B -> content = B
	:: !copied && (vma == FILE_A || vma == STORE) -> content = A
	:: else -> content = ZERO
	fi
}

inline map_at(what, may_write)
{
	vma = what; writable = may_write; copied = false; copy = ZERO; reread()
}

/* ---- the agent's tables ---- */
byte file = FILE_A;    /* the mapping that is remembered, and of what the spare is made */
bool mergeable = true;
bool merged = false;   /* in the table, merged */
byte merged_file = NOTHING;
bool noted = false;    /* a change, not taken in yet */
bool locked = false;

/* What must be seen; NOTHING is mapped if `vma` is, which only the application brings about. */
byte expected = A;

inline lock()
{
#ifndef NO_MAP_LOCK
	atomic { !locked -> locked = true }
#else
	skip
#endif
}

inline unlock()
{
	locked = false
}

inline changed()
{
#ifndef NO_NOTES
	noted = true;
#endif
	mergeable = false
}

/* The file takes the place of what is merged, if it still is. */
inline restore()
{
	if
	:: merged && !copied -> d_step { map_at(merged_file, false); merged = false }
	:: else
	fi
}

proctype worker()
{
	bool known, candidate, same;
	byte number;
	byte round = 0;

	do
	:: round < ROUNDS ->
		round++;
		/* The layout: what is known first, then what is mapped. */
		lock();
		noted = false; known = mergeable; number = file;
		unlock();
		candidate = known && vma == number && !writable;
		/* Without the lock: it may take until the file's server answers. */
		same = content == A;
		lock();
		if
		:: noted -> candidate = false; noted = false
		:: else
		fi;
		if
#ifdef NOT_COMPARED
		:: candidate && !merged && !copied ->
#else
		:: candidate && same && !merged && !copied ->
#endif
			d_step { map_at(STORE, false) };
			merged = true; merged_file = number
		:: else
		fi;
		unlock();
		if
		:: true ->
			lock();
			restore();
			unlock()
		:: true
		fi
	:: else -> break
	od
}

proctype application()
{
	byte operation = 0;

	do
	:: operation < OPERATIONS ->
		operation++;
		if
		:: true -> /* other memory in its place */
			lock();
			d_step { map_at(ANON, true); expected = ZERO };
			merged = false;
			changed();
			unlock();
			d_step { copied = true; copy = WRITTEN; expected = WRITTEN; reread() }
		:: true -> /* another file, or the same again */
			lock();
			if
			:: d_step { map_at(FILE_B, false); expected = B }
			:: d_step { map_at(FILE_A, false); expected = A }
			fi;
			merged = false;
			changed();
			unlock();
			/* It is remembered in a second step. */
			lock();
			file = vma;
			mergeable = true;
			unlock()
		:: (vma == FILE_A || vma == FILE_B || vma == STORE) && !writable -> /* written to */
			lock();
#ifndef WRITTEN_IN_PLACE
			restore();
#endif
			writable = true;
			changed();
			unlock();
			d_step { copied = true; copy = WRITTEN; expected = WRITTEN; reread() };
			/* Dropped, it is the file's again. */
			if
			:: d_step { copied = false; expected = (vma == FILE_B -> B : A); reread() }
			:: true
			fi
		:: true -> /* unmapped */
			lock();
			d_step { map_at(NOTHING, false) };
			merged = false;
			changed();
			unlock()
		fi;
	:: else -> break
	od
}

proctype watcher()
{
end:
	atomic { vma != NOTHING && content != expected -> assert(vma == NOTHING || content == expected) }
}

init
{
	atomic { run worker(); run application(); run watcher() }
}
