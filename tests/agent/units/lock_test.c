// SPDX-License-Identifier: MIT
// The map lock: exclusion under many threads, and who goes before whom.
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "agent/lock.h"
#include "agent/util.h"
#include "unit.h"

enum { READERS = 4, WRITERS = 2, TIMED = 2, URGENT = 1 };

static const uint64_t SECOND = 1000000000;
static const uint64_t WAITING = 1UL << 62; // as in lock.c
static const uint64_t PHASE = (1UL << 19) - 1UL;
static const uint64_t CALM = 1UL << 19;
static const uint64_t READER = 1UL << 20;
static const uint64_t QUEUED = 1UL << 41;
static const uint64_t ROUNDS = 1000; // of each writer

static struct udd_lock lock;
static uint64_t left, right; // protected by the lock, and equal whenever nobody holds it exclusively
static atomic_uint_least64_t timed_in, timed_out;
static atomic_bool stop;

static bool is_free(void)
{
	return (lock.state & ~PHASE) == 0 && lock.sleepers == 0 && lock.pressing == 0 && lock.owner == 0;
}

static void write_both(void)
{
	left++;
	sched_yield();
	right++;
}

static void *reader(void *urgent)
{
	for (uint64_t i = 0; !stop; i++) {
		if (!urgent && (i % 2 || !udd_trylock_shared(&lock)))
			udd_lock_shared(&lock);
		else if (!urgent)
			;
		else if (i % 2)
			udd_lock_shared_urgent(&lock);
		else if (!udd_trylock_shared_urgent(&lock))
			continue;
		check(left == right);
		udd_unlock_shared(&lock);
		if (urgent)
			sched_yield();
	}
	return NULL;
}

static void *writer(void *unused)
{
	(void)unused;
	for (uint64_t i = 0; i < ROUNDS; i++) {
		udd_lock_exclusive(&lock, (int32_t)(i + 1));
		check(left == right);
		check(lock.owner == (int32_t)(i + 1));
		write_both();
		udd_unlock_exclusive(&lock);
	}
	return NULL;
}

static void *timed_writer(void *unused)
{
	(void)unused;
	for (uint64_t i = 0; i < ROUNDS; i++) {
		if (!(i % 2 ? udd_lock_exclusive_timed : udd_lock_exclusive_last)(&lock, i % 50 * 1000)) {
			timed_out++;
			continue;
		}
		timed_in++;
		check(left == right && lock.owner == 0);
		write_both();
		udd_unlock_exclusive(&lock);
	}
	return NULL;
}

// Ends only if no writer is starved, for readers run until they are through.
static void exclusion(void)
{
	pthread_t readers[READERS + URGENT], writers[WRITERS + TIMED];

	for (int i = 0; i < READERS + URGENT; i++)
		check(!pthread_create(&readers[i], NULL, reader, i < READERS ? NULL : &lock));
	for (int i = 0; i < WRITERS + TIMED; i++)
		check(!pthread_create(&writers[i], NULL, i < WRITERS ? writer : timed_writer, NULL));
	for (int i = 0; i < WRITERS + TIMED; i++)
		check(!pthread_join(writers[i], NULL));
	stop = true;
	for (int i = 0; i < READERS + URGENT; i++)
		check(!pthread_join(readers[i], NULL));
	check(left == right);
	check(left == WRITERS * ROUNDS + timed_in);
	check(timed_in > 0);
	check(is_free());
}

static atomic_int order, writer_turn, reader_turn;

static void *late_writer(void *unused)
{
	(void)unused;
	check(udd_lock_exclusive(&lock, 0)); // had to wait
	writer_turn = ++order;
	udd_unlock_exclusive(&lock);
	return NULL;
}

static void *late_reader(void *unused)
{
	(void)unused;
	check(!udd_trylock_shared(&lock)); // has to wait
	udd_lock_shared(&lock);
	reader_turn = ++order;
	udd_unlock_shared(&lock);
	return NULL;
}

static void await_state(uint64_t bits)
{
	uint64_t deadline = udd_now() + 30 * SECOND;

	while ((__atomic_load_n(&lock.state, __ATOMIC_SEQ_CST) & bits) != bits) {
		check(udd_now() < deadline);
		sched_yield();
	}
}

static void await_sleeper(void)
{
	uint64_t deadline = udd_now() + 30 * SECOND;

	while (!__atomic_load_n(&lock.sleepers, __ATOMIC_SEQ_CST)) {
		check(udd_now() < deadline);
		sched_yield();
	}
}

// Calm as long as a writer says so, whoever comes, waits and goes.
static void calm(void)
{
	pthread_t read;

	check(!udd_trylock_shared_calm(&lock) && is_free());
	check(!udd_lock_exclusive(&lock, 0));
	udd_lock_set_calm(&lock, true);
	check(!udd_trylock_shared_calm(&lock) && !udd_trylock_shared_urgent(&lock));
	order = 0;
	check(!pthread_create(&read, NULL, late_reader, NULL));
	await_state(QUEUED);
	udd_unlock_exclusive(&lock);
	check(!pthread_join(read, NULL) && reader_turn == 1);
	check(udd_trylock_shared_calm(&lock) && udd_trylock_shared_calm(&lock));
	check(!udd_lock_exclusive_timed(&lock, 1000));
	check(udd_trylock_shared(&lock));
	for (int held = 0; held < 3; held++)
		udd_unlock_shared(&lock);
	check((lock.state & ~PHASE) == CALM);
	check(!udd_lock_exclusive(&lock, 0));
	udd_lock_set_calm(&lock, false);
	udd_unlock_exclusive(&lock);
	check(!udd_trylock_shared_calm(&lock) && is_free());
	order = reader_turn = 0;
}

static void waiting_writer_goes_first(void)
{
	pthread_t write, read;

	check(udd_trylock_shared(&lock)); // need not wait
	check(!pthread_create(&write, NULL, late_writer, NULL));
	await_state(WAITING);
	check(!pthread_create(&read, NULL, late_reader, NULL));
	await_state(WAITING | QUEUED);
	await_sleeper();
	// Both wait, yet whoever is urgent passes them.
	udd_lock_shared_urgent(&lock);
	check(udd_trylock_shared_urgent(&lock));
	check(writer_turn == 0 && reader_turn == 0);
	udd_unlock_shared(&lock);
	udd_unlock_shared(&lock);
	check(writer_turn == 0 && reader_turn == 0);
	udd_unlock_shared(&lock);
	check(!pthread_join(write, NULL));
	check(!pthread_join(read, NULL));
	check(writer_turn == 1 && reader_turn == 2);
	check(is_free());
}

static void giving_up(void)
{
	pthread_t write;
	uint64_t started = udd_now();

	udd_lock_shared(&lock);
	check(!udd_lock_exclusive_timed(&lock, SECOND / 50));
	check(udd_now() - started >= SECOND / 50 && udd_now() - started < 20 * SECOND);
	// Nobody waits any more, so readers come in without waiting.
	check((lock.state & ~PHASE) == READER);
	check(udd_trylock_shared(&lock));
	udd_unlock_shared(&lock);
	// One that gives up must not make another forget that it waits.
	writer_turn = 0;
	check(!pthread_create(&write, NULL, late_writer, NULL));
	await_sleeper();
	check(!udd_lock_exclusive_timed(&lock, SECOND / 50));
	await_state(WAITING);
	check(writer_turn == 0);
	udd_unlock_shared(&lock);
	check(!pthread_join(write, NULL));
	check(writer_turn > 0 && is_free());
}

static void owner(void)
{
	check(!udd_lock_exclusive(&lock, 4711));
	check(lock.owner == 4711);
	check(!udd_trylock_shared_urgent(&lock));
	check(!udd_lock_exclusive_timed(&lock, 1000));
	check(lock.owner == 4711);
	udd_unlock_exclusive(&lock);
	check(lock.owner == 0);
	check(udd_lock_exclusive_timed(&lock, 1000));
	check(lock.owner == 0);
	udd_unlock_exclusive(&lock);
	check(udd_trylock_shared_urgent(&lock));
	udd_unlock_shared(&lock);
	check(is_free());
}

static void *give_up(void *argument)
{
	(void)argument;
	check(!udd_lock_exclusive(&lock, 4711));
	__atomic_store_n(&order, 1, __ATOMIC_SEQ_CST);
	udd_unlock_exclusive(&lock);
	__atomic_store_n(&order, 2, __ATOMIC_SEQ_CST);
	return NULL;
}

static void owner_is_kept(void)
{
	pthread_t thread;

	order = 0;
	check(udd_lock_keep_owner(&lock) == 0 && lock.kept == 0);
	check(!udd_lock_exclusive(&lock, 0));
	check(udd_lock_keep_owner(&lock) == 0 && lock.kept == 0);
	udd_unlock_exclusive(&lock);
	// Kept before it gives up: it doesn't, for as long as it takes.
	lock.kept = 1;
	check(!pthread_create(&thread, NULL, give_up, NULL));
	while (__atomic_load_n(&order, __ATOMIC_SEQ_CST) != 1)
		;
	for (int i = 0; i < 100; i++) {
		check(!udd_lock_exclusive_timed(&lock, SECOND / 10000));
		check(__atomic_load_n(&order, __ATOMIC_SEQ_CST) == 1);
	}
	udd_lock_let_go_owner(&lock);
	check(!pthread_join(thread, NULL));
	check(order == 2 && is_free());
}

static atomic_int inside;

static void *patient_reader(void *unused)
{
	(void)unused;
	udd_lock_shared(&lock);
	inside++;
	while (inside < READERS)
		sched_yield();
	udd_unlock_shared(&lock);
	return NULL;
}

// Whoever takes the lock again and again lets everyone in who waited, before it gets it the next time.
static void readers_are_not_starved(void)
{
	pthread_t readers[READERS];

	check(!udd_lock_exclusive(&lock, 0));
	for (int i = 0; i < READERS; i++)
		check(!pthread_create(&readers[i], NULL, patient_reader, NULL));
	while ((__atomic_load_n(&lock.state, __ATOMIC_SEQ_CST) & ~(PHASE | WAITING)) / QUEUED % (1UL << 21) < READERS)
		sched_yield();
	udd_unlock_exclusive(&lock);
	check(udd_lock_exclusive_last(&lock, 30 * SECOND));
	check(inside == READERS);
	udd_unlock_exclusive(&lock);
	for (int i = 0; i < READERS; i++)
		check(!pthread_join(readers[i], NULL));
	check(is_free());
}

static void the_worker_is_last(void)
{
	pthread_t write;

	order = writer_turn = 0;
	udd_lock_shared(&lock);
	check(!pthread_create(&write, NULL, late_writer, NULL));
	await_sleeper();
	check(!udd_lock_exclusive_last(&lock, SECOND / 50));
	await_state(WAITING);
	udd_unlock_shared(&lock);
	check(udd_lock_exclusive_last(&lock, 30 * SECOND));
	check(writer_turn == 1);
	udd_unlock_exclusive(&lock);
	check(!pthread_join(write, NULL));
	check(is_free());
}

// Someone who only tries must not keep readers out when it gives up.
static void giving_up_lets_readers_in(void)
{
	pthread_t read;

	order = reader_turn = 0;
	udd_lock_shared(&lock);
	__atomic_or_fetch(&lock.state, WAITING, __ATOMIC_SEQ_CST);
	check(!pthread_create(&read, NULL, late_reader, NULL));
	await_state(QUEUED);
	check(!udd_lock_exclusive_timed(&lock, SECOND / 50));
	check(!pthread_join(read, NULL));
	check(reader_turn == 1);
	udd_unlock_shared(&lock);
	check(is_free());
}

int main(void)
{
	owner();
	owner_is_kept();
	giving_up();
	order = writer_turn = reader_turn = 0;
	calm();
	waiting_writer_goes_first();
	readers_are_not_starved();
	the_worker_is_last();
	giving_up_lets_readers_in();
	exclusion();
	return 0;
}
