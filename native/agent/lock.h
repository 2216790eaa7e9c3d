// SPDX-License-Identifier: MIT
// The map lock. Whoever changes the process's mappings through a hook holds it shared while the system call runs; whoever
// changes merged memory, or the table of merged runs, holds it exclusively. So the worker's transaction never sees a
// mapping change under its hands, and the table is stable for everyone who holds the lock at all.
//
// Waiting writers go before new readers, or a busy allocator would starve them. Nor do writers starve readers, or the worker
// would, who takes the lock again at once a thousand times: readers who had to wait are let in, all of them, by the writer
// that gives the lock up, so that nobody waits for more than one writer after another (a "phase-fair" lock: Brandenburg and
// Anderson, Real-Time Systems 46, 2010). Among writers the worker is last. The fault thread passes waiting writers
// (udd_lock_shared_urgent): an application thread that holds the lock shared may be waiting for it.
//
// Does not block signals; hooks.c does, except while the lock is calm: no handler is installed that could interrupt who holds it.
#ifndef UDD_LOCK_H
#define UDD_LOCK_H

#include <stdbool.h>
#include <stdint.h>

struct udd_lock {
	uint64_t state;    // see lock.c; its lower half is a futex too, where readers sleep. All zero = free, never held
	uint32_t turn;     // futex: changes when a writer that waits should look again
	uint32_t sleepers; // writers asleep there
	uint32_t pressing; // writers that wait and before whom the worker does not go
	int32_t owner;     // tid of the application thread that holds it exclusively; 0 for the agent's own threads
	uint32_t kept;     // futex: 1 while the fault thread serves the owner, who must not give the lock up
};

// Never waits: false if there is a writer, in or waiting.
bool udd_trylock_shared(struct udd_lock *lock);
// False as well if the lock is not calm. Signals need not be blocked: it stays calm until it is given up.
bool udd_trylock_shared_calm(struct udd_lock *lock);
// Signals must be blocked, or a handler would not know whether this thread has been let in already.
void udd_lock_shared(struct udd_lock *lock);
// Only waits for a writer that is in.
void udd_lock_shared_urgent(struct udd_lock *lock);
// Urgent, but never waits: false if a writer is in.
bool udd_trylock_shared_urgent(struct udd_lock *lock);
void udd_unlock_shared(struct udd_lock *lock);

// Waits as long as it takes. True if it had to wait. `owner` is the caller's tid if it is an application thread, else 0.
bool udd_lock_exclusive(struct udd_lock *lock, int32_t owner);
// Gives up after `nanoseconds`: returns false, and nothing is held.
bool udd_lock_exclusive_timed(struct udd_lock *lock, uint64_t nanoseconds);
// The same, for the worker: lets every other writer go first.
bool udd_lock_exclusive_last(struct udd_lock *lock, uint64_t nanoseconds);
void udd_unlock_exclusive(struct udd_lock *lock);
// Held exclusively, or nobody else knows the lock yet.
void udd_lock_set_calm(struct udd_lock *lock, bool calm);
// The fault thread: keeps the application thread that holds the lock exclusively from giving it up, until it is let go.
// Returns its tid; 0 if there is none, and then there is nothing to let go.
int32_t udd_lock_keep_owner(struct udd_lock *lock);
void udd_lock_let_go_owner(struct udd_lock *lock);

#endif
