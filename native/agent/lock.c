// SPDX-License-Identifier: MIT
#include "lock.h"

#include <linux/futex.h>
#include <time.h>

#include "sys.h"
#include "util.h"

// The state: a phase number, in the lower half, which grows whenever waiting readers are let in; whether it is calm; how many
// readers are in; how many wait for the next phase; and the writers' bits.
static const uint64_t PHASE = (1UL << 19) - 1UL;
static const uint64_t CALM = 1UL << 19;
static const uint64_t READER = 1UL << 20;
static const uint64_t READERS = ((1UL << 21) - 1UL) << 20; // more than there can be threads
static const uint64_t QUEUED = 1UL << 41;
static const uint64_t QUEUE = ((1UL << 21) - 1UL) << 41;
static const uint64_t WAITING = 1UL << 62; // a writer waits: no new readers
static const uint64_t HELD = 1UL << 63;    // one writer is in
static const unsigned SPINS = 100;         // critical sections are mostly shorter than a futex wait

static uint64_t load(const struct udd_lock *lock)
{
	return __atomic_load_n(&lock->state, __ATOMIC_SEQ_CST);
}

static bool swap(struct udd_lock *lock, uint64_t *seen, uint64_t wanted)
{
	return __atomic_compare_exchange_n(&lock->state, seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static void wake_readers(struct udd_lock *lock)
{
	udd_sys(SYS_futex, &lock->state, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

static void wake_writers(struct udd_lock *lock)
{
	__atomic_add_fetch(&lock->turn, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&lock->sleepers, __ATOMIC_SEQ_CST))
		udd_sys(SYS_futex, &lock->turn, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

// What the state becomes when the readers that wait are let in.
static uint64_t admit(uint64_t state)
{
	uint64_t queued = (state & QUEUE) / QUEUED;

	if (!queued)
		return state;
	return (state & (HELD | WAITING | CALM)) | ((state & READERS) + queued * READER) | ((state + 1) & PHASE);
}

static bool try_shared(struct udd_lock *lock, uint64_t barred, uint64_t needed, uint64_t *seen)
{
	*seen = load(lock);
	while ((*seen & (barred | needed)) == needed) {
		if (swap(lock, seen, *seen + READER))
			return true;
	}
	return false;
}

static void lock_shared(struct udd_lock *lock, uint64_t barred)
{
	uint64_t seen;
	uint64_t phase;

	for (unsigned spins = 0; spins < SPINS; spins++) {
		if (try_shared(lock, barred, 0, &seen))
			return;
		udd_pause();
	}
	// Queued only while there is a writer, who will let us in; at any other moment there is no need to.
	while (!swap(lock, &seen, seen + QUEUED)) {
		if (!(seen & barred) && try_shared(lock, barred, 0, &seen))
			return;
	}
	phase = seen & PHASE;
	while (((seen = load(lock)) & PHASE) == phase)
		udd_sys(SYS_futex, &lock->state, FUTEX_WAIT_PRIVATE, (uint32_t)seen, NULL);
}

bool udd_trylock_shared(struct udd_lock *lock)
{
	uint64_t seen;

	return try_shared(lock, HELD | WAITING, 0, &seen);
}

bool udd_trylock_shared_calm(struct udd_lock *lock)
{
	uint64_t seen;

	return try_shared(lock, HELD | WAITING, CALM, &seen);
}

void udd_lock_shared(struct udd_lock *lock)
{
	lock_shared(lock, HELD | WAITING);
}

void udd_lock_shared_urgent(struct udd_lock *lock)
{
	lock_shared(lock, HELD);
}

bool udd_trylock_shared_urgent(struct udd_lock *lock)
{
	uint64_t seen;

	return try_shared(lock, HELD, 0, &seen);
}

void udd_unlock_shared(struct udd_lock *lock)
{
	uint64_t left = __atomic_sub_fetch(&lock->state, READER, __ATOMIC_SEQ_CST);

	if (!(left & READERS) && (left & WAITING))
		wake_writers(lock);
}

// A writer that waited waits no more. Others set WAITING again in their next turn.
static void give_up_waiting(struct udd_lock *lock)
{
	uint64_t seen = load(lock);
	uint64_t wanted;

	do
		wanted = seen & HELD ? seen & ~WAITING : admit(seen & ~WAITING);
	while (!swap(lock, &seen, wanted));
	if ((seen ^ wanted) & PHASE)
		wake_readers(lock);
	wake_writers(lock);
}

static bool try_exclusive(struct udd_lock *lock, bool last)
{
	uint64_t seen = load(lock);

	while (!(seen & (HELD | READERS)) && !(last && __atomic_load_n(&lock->pressing, __ATOMIC_SEQ_CST))) {
		if (swap(lock, &seen, (seen & ~WAITING) | HELD))
			return true;
	}
	return false;
}

// Has readers wait for us. False if the lock was given up meanwhile.
static bool announce(struct udd_lock *lock)
{
	uint64_t seen = load(lock);

	while (seen & (HELD | READERS)) {
		if ((seen & WAITING) || swap(lock, &seen, seen | WAITING))
			return true;
	}
	return false;
}

static bool wait_exclusive(struct udd_lock *lock, uint64_t nanoseconds, bool last)
{
	uint64_t deadline = nanoseconds == UINT64_MAX ? UINT64_MAX : udd_now() + nanoseconds;

	for (unsigned spins = 0;;) {
		uint32_t turn = __atomic_load_n(&lock->turn, __ATOMIC_SEQ_CST);
		uint64_t now;

		if (try_exclusive(lock, last))
			return true;
		// The last has nobody wait for it as long as others wait, too.
		if (!(last && __atomic_load_n(&lock->pressing, __ATOMIC_SEQ_CST)) && !announce(lock))
			continue;
		if (spins++ < SPINS) {
			udd_pause();
			continue;
		}
		now = deadline == UINT64_MAX ? 0 : udd_now();
		if (deadline != UINT64_MAX && now >= deadline)
			return false;

		struct timespec left = udd_timespec(deadline - now);

		__atomic_add_fetch(&lock->sleepers, 1, __ATOMIC_SEQ_CST);
		udd_sys(SYS_futex, &lock->turn, FUTEX_WAIT_PRIVATE, turn, deadline == UINT64_MAX ? NULL : &left);
		__atomic_sub_fetch(&lock->sleepers, 1, __ATOMIC_SEQ_CST);
	}
}

bool udd_lock_exclusive_timed(struct udd_lock *lock, uint64_t nanoseconds)
{
	bool ret;

	if (try_exclusive(lock, false))
		return true;
	__atomic_add_fetch(&lock->pressing, 1, __ATOMIC_SEQ_CST);
	ret = wait_exclusive(lock, nanoseconds, false);
	__atomic_sub_fetch(&lock->pressing, 1, __ATOMIC_SEQ_CST);
	if (!ret)
		give_up_waiting(lock);
	return ret;
}

bool udd_lock_exclusive_last(struct udd_lock *lock, uint64_t nanoseconds)
{
	bool ret = try_exclusive(lock, true) || wait_exclusive(lock, nanoseconds, true);

	if (!ret)
		give_up_waiting(lock);
	return ret;
}

bool udd_lock_exclusive(struct udd_lock *lock, int32_t owner)
{
	bool waited = !try_exclusive(lock, false);

	if (waited)
		udd_lock_exclusive_timed(lock, UINT64_MAX);
	__atomic_store_n(&lock->owner, owner, __ATOMIC_RELEASE);
	return waited;
}

void udd_unlock_exclusive(struct udd_lock *lock)
{
	uint64_t seen;
	uint64_t wanted;

	if (__atomic_exchange_n(&lock->owner, 0, __ATOMIC_SEQ_CST)) {
		while (__atomic_load_n(&lock->kept, __ATOMIC_SEQ_CST))
			udd_sys(SYS_futex, &lock->kept, FUTEX_WAIT_PRIVATE, 1, NULL);
	}
	seen = load(lock);
	do
		wanted = admit(seen & ~HELD);
	while (!swap(lock, &seen, wanted));
	if ((seen ^ wanted) & PHASE)
		wake_readers(lock);
	// Even if readers were let in: writers that slept through our turn have to say again that they wait.
	wake_writers(lock);
}

void udd_lock_set_calm(struct udd_lock *lock, bool calm)
{
	if (calm)
		__atomic_or_fetch(&lock->state, CALM, __ATOMIC_SEQ_CST);
	else
		__atomic_and_fetch(&lock->state, ~CALM, __ATOMIC_SEQ_CST);
}

int32_t udd_lock_keep_owner(struct udd_lock *lock)
{
	int32_t owner;

	// Whoever gives the lock up clears `owner`, then looks at `kept`: one of us sees the other.
	__atomic_store_n(&lock->kept, 1, __ATOMIC_SEQ_CST);
	owner = __atomic_load_n(&lock->owner, __ATOMIC_SEQ_CST);
	if (!owner)
		udd_lock_let_go_owner(lock);
	return owner;
}

void udd_lock_let_go_owner(struct udd_lock *lock)
{
	__atomic_store_n(&lock->kept, 0, __ATOMIC_SEQ_CST);
	udd_sys(SYS_futex, &lock->kept, FUTEX_WAKE_PRIVATE, 1);
}
