// SPDX-License-Identifier: MIT
#include "lock.h"

#include <linux/futex.h>
#include <time.h>

#include "sys.h"
#include "util.h"

static const uint32_t HELD = 1U << 31;           // one writer is in
static const uint32_t WAITING = 1U << 30;        // a writer waits: no new readers
static const uint32_t READERS = (1U << 30) - 1U; // how many are in
static const unsigned SPINS = 100;               // critical sections are mostly shorter than a futex wait

static uint32_t load(const struct udd_lock *lock)
{
	return __atomic_load_n(&lock->state, __ATOMIC_RELAXED);
}

static bool swap(struct udd_lock *lock, uint32_t *seen, uint32_t wanted)
{
	return __atomic_compare_exchange_n(&lock->state, seen, wanted, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

// Sleeps while the state is `seen`; `timeout` is relative, NULL = for ever.
static void wait_while(struct udd_lock *lock, uint32_t seen, const struct timespec *timeout)
{
	__atomic_add_fetch(&lock->waiters, 1, __ATOMIC_SEQ_CST);
	udd_sys(SYS_futex, &lock->state, FUTEX_WAIT_PRIVATE, seen, timeout);
	__atomic_sub_fetch(&lock->waiters, 1, __ATOMIC_SEQ_CST);
}

static void wake_all(struct udd_lock *lock)
{
	if (__atomic_load_n(&lock->waiters, __ATOMIC_SEQ_CST))
		udd_sys(SYS_futex, &lock->state, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

static bool lock_shared(struct udd_lock *lock, uint32_t barred)
{
	uint32_t seen = load(lock);
	bool waited = false;

	for (unsigned spins = 0;;) {
		if (!(seen & barred)) {
			if (swap(lock, &seen, seen + 1))
				return waited;
			continue;
		}
		waited = true;
		if (spins++ < SPINS)
			udd_pause();
		else
			wait_while(lock, seen, NULL);
		seen = load(lock);
	}
}

bool udd_lock_shared(struct udd_lock *lock)
{
	return lock_shared(lock, HELD | WAITING);
}

void udd_lock_shared_urgent(struct udd_lock *lock)
{
	lock_shared(lock, HELD);
}

bool udd_trylock_shared_urgent(struct udd_lock *lock)
{
	uint32_t seen = load(lock);

	while (!(seen & HELD)) {
		if (swap(lock, &seen, seen + 1))
			return true;
	}
	return false;
}

void udd_unlock_shared(struct udd_lock *lock)
{
	uint32_t left = __atomic_sub_fetch(&lock->state, 1, __ATOMIC_SEQ_CST);

	if (left == WAITING)
		wake_all(lock);
}

bool udd_lock_exclusive_timed(struct udd_lock *lock, uint64_t nanoseconds)
{
	uint64_t deadline = 0; // not known before the first wait: mostly there is none
	uint32_t seen = load(lock);

	for (unsigned spins = 0;;) {
		if (!(seen & (HELD | READERS))) {
			// Other waiting writers set WAITING again in their next turn.
			if (swap(lock, &seen, HELD))
				return true;
			continue;
		}
		if (!(seen & WAITING)) {
			if (!swap(lock, &seen, seen | WAITING))
				continue;
			seen |= WAITING;
		}
		if (spins++ < SPINS) {
			udd_pause();
		} else if (nanoseconds == UINT64_MAX) {
			wait_while(lock, seen, NULL);
		} else {
			uint64_t now = udd_now();
			struct timespec left;

			if (!deadline)
				deadline = now + nanoseconds;
			if (now >= deadline) {
				__atomic_and_fetch(&lock->state, ~WAITING, __ATOMIC_SEQ_CST);
				wake_all(lock);
				return false;
			}
			left = udd_timespec(deadline - now);
			wait_while(lock, seen, &left);
		}
		seen = load(lock);
	}
}

bool udd_lock_exclusive(struct udd_lock *lock, int32_t owner)
{
	uint32_t seen = 0;
	bool waited = !swap(lock, &seen, HELD);

	if (waited)
		udd_lock_exclusive_timed(lock, UINT64_MAX);
	__atomic_store_n(&lock->owner, owner, __ATOMIC_RELEASE);
	return waited;
}

void udd_unlock_exclusive(struct udd_lock *lock)
{
	if (__atomic_exchange_n(&lock->owner, 0, __ATOMIC_SEQ_CST)) {
		while (__atomic_load_n(&lock->kept, __ATOMIC_SEQ_CST))
			udd_sys(SYS_futex, &lock->kept, FUTEX_WAIT_PRIVATE, 1, NULL);
	}
	__atomic_and_fetch(&lock->state, ~HELD, __ATOMIC_SEQ_CST);
	wake_all(lock);
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
