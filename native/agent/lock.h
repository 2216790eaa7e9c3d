// SPDX-License-Identifier: MIT
// The map lock. Whoever changes the process's mappings through a hook holds it shared while the system call runs; whoever
// changes merged memory, or the table of merged runs, holds it exclusively. So the worker's transaction never sees a
// mapping change under its hands, and the table is stable for everyone who holds the lock at all.
//
// Waiting writers go first, or a busy allocator would starve them. The fault thread passes waiting writers
// (udd_lock_shared_urgent): an application thread that holds the lock shared may be waiting for it.
//
// Does not block signals: hooks nest in signal handlers, which hooks.c deals with.
#ifndef UDD_LOCK_H
#define UDD_LOCK_H

#include <stdbool.h>
#include <stdint.h>

struct udd_lock {
	uint32_t state;   // readers | UDD_LOCK_WAITING | UDD_LOCK_HELD; all zero = free
	uint32_t waiters; // threads in futex wait on `state`, a hint that a wake is needed
	int32_t owner;    // tid of the application thread that holds it exclusively; 0 for the agent's own threads
	uint32_t kept;    // futex: 1 while the fault thread serves the owner, who must not give the lock up
};

// True if it had to wait.
bool udd_lock_shared(struct udd_lock *lock);
void udd_lock_shared_urgent(struct udd_lock *lock);
// Urgent, but never waits: false if a writer is in.
bool udd_trylock_shared_urgent(struct udd_lock *lock);
void udd_unlock_shared(struct udd_lock *lock);

// Waits as long as it takes. True if it had to wait. `owner` is the caller's tid if it is an application thread, else 0.
bool udd_lock_exclusive(struct udd_lock *lock, int32_t owner);
// Gives up after `nanoseconds`: returns false, and nothing is held.
bool udd_lock_exclusive_timed(struct udd_lock *lock, uint64_t nanoseconds);
void udd_unlock_exclusive(struct udd_lock *lock);
// The fault thread: keeps the application thread that holds the lock exclusively from giving it up, until it is let go.
// Returns its tid; 0 if there is none, and then there is nothing to let go.
int32_t udd_lock_keep_owner(struct udd_lock *lock);
void udd_lock_let_go_owner(struct udd_lock *lock);

#endif
