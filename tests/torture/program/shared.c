// SPDX-License-Identifier: MIT
// Memory that several threads look at while it merges and breaks.
//
// - The *board*: one thread writes, all workers read, each page under a sequence number. A reader sees what no owner can
//   see: a page that is wrong only for a moment while somebody else exchanges it.
// - The *lanes*: all workers write to the same pages, each in its own bytes. A page that is exchanged while another
//   thread writes to it loses that write.
// - The *bells*: a futex in a page that merges while a thread sleeps on it.
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "torture.h"

enum {
	BOARD_PAGES = 128,
	BELL_PAGES = 16,
	LANE_CONTENTS = 3,
};

// Everything here but the memory under test is in oracle memory.
struct board {
	struct region region;
	_Atomic(uint32_t) sequence[BOARD_PAGES]; // odd while the writer changes the page
	_Atomic(uint32_t) bell;   // 0: nobody waits; else 1 + page, shifted left by one; lowest bit: a private futex
	_Atomic(uint32_t) rung;   // bells that the waiter has seen
};

static struct board *board;
static unsigned char *lanes, *bells;
static size_t lane_size;

static unsigned char *map(unsigned int pages)
{
	void *memory = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		setup_error("mmap");
	return memory;
}

void shared_init(void)
{
	board = shared_allocate(sizeof(*board));
	board->region = (struct region){
		.kind = KIND_ANONYMOUS,
		.memory = map(BOARD_PAGES),
		.oracle = shared_allocate((size_t)BOARD_PAGES * PAGE),
		.maybe = shared_allocate(BOARD_PAGES),
		.pages = BOARD_PAGES,
		.capacity = BOARD_PAGES,
	};
	lanes = map(LANE_PAGES);
	lane_size = PAGE / options.threads / 8 * 8;
	bells = map(BELL_PAGES);
	// The first word of a bell's page is the futex, the rest is known content.
	for (unsigned int i = 0; i < BELL_PAGES; i++)
		memcpy(bells + (size_t)i * PAGE + 4, data + 4, PAGE - 4);
}

// The writer only: what is done in between may show any mixture of old and new.
static void open_pages(struct span span)
{
	for (unsigned int i = span.first; i < span.first + span.count; i++)
		atomic_fetch_add(&board->sequence[i], 1);
	atomic_thread_fence(memory_order_seq_cst);
}

static void close_pages(struct span span)
{
	atomic_thread_fence(memory_order_seq_cst);
	for (unsigned int i = span.first; i < span.first + span.count; i++)
		atomic_fetch_add(&board->sequence[i], 1);
}

void op_board_write(struct worker *w, struct region *unused)
{
	struct region *r = &board->region;
	struct span span = pick(w, r, 16);

	(void)unused;
	note(w, r, span);
	check_span(w, r, span);
	open_pages(span);
	switch (below(w, 8)) {
	case 0:
		if (sys_madvise(page_at(r, span.first), (size_t)span.count * PAGE, MADV_DONTNEED))
			fail(r, page_at(r, span.first), "torture: madvise: %s", strerror(errno));
		region_fresh(r, span);
		break;
	case 1:
		region_map_over(r, span, MAP_FIXED);
		break;
	case 2:
	case 3:
		for (unsigned int i = span.first; i < span.first + span.count; i++) {
			size_t offset = (size_t)i * PAGE + below(w, PAGE);

			r->memory[offset] = r->oracle[offset] = (unsigned char)draw(w);
		}
		break;
	default:
		compose(w, r->oracle + (size_t)span.first * PAGE, span.count);
		region_store(w, r, span);
	}
	close_pages(span);
	if (sabotaged(w, SABOTAGE_BOARD)) {
		unsigned char *byte = page_at(r, span.first);

		*(volatile unsigned char *)byte ^= 1;
		nap(w, 20000000);
		*(volatile unsigned char *)byte ^= 1;
	}
}

void op_board_read(struct worker *w, struct region *unused)
{
	const struct region *r = &board->region;
	unsigned int first = below(w, BOARD_PAGES);

	(void)unused;
	for (unsigned int i = first; i < first + 32; i++) {
		unsigned int page = i % BOARD_PAGES;
		unsigned char got[PAGE], want[PAGE];
		uint32_t sequence = board->sequence[page];

		if (sequence & 1)
			continue;
		w->where = (uintptr_t)page_at(r, page);
		memcpy(got, page_at(r, page), PAGE);
		memcpy(want, r->oracle + (size_t)page * PAGE, PAGE);
		atomic_thread_fence(memory_order_seq_cst);
		if (board->sequence[page] != sequence)
			continue;
		if (memcmp(got, want, PAGE)) {
			say("torture: a reader saw a wrong page at %p, sequence %u:", (void *)page_at(r, page), sequence);
			check_bytes(NULL, got, want, PAGE, "copy of a page that another thread owns");
		}
		w->verified++;
	}
}

static const unsigned char *lane_content(unsigned int content)
{
	static const unsigned int pages[LANE_CONTENTS] = {POOL_PAGES, 0, 1}; // the first one is zero

	return data + (size_t)pages[content] * PAGE;
}

static void check_lane(struct worker *w, unsigned int page)
{
	size_t start = w->id * lane_size;

	w->where = (uintptr_t)(lanes + (size_t)page * PAGE + start);
	check_bytes(NULL, lanes + (size_t)page * PAGE + start, lane_content(w->lane[page]) + start, lane_size,
		    "this thread's bytes in a page that all threads write to");
}

// Most threads want the same content at the same time, so that whole pages become equal.
void op_lane(struct worker *w, struct region *unused)
{
	size_t start = w->id * lane_size;

	(void)unused;
	for (unsigned int page = 0; page < LANE_PAGES; page++) {
		uint8_t fashion = (uint8_t)((now() / 1000000000 + page / 8) % LANE_CONTENTS);

		check_lane(w, page);
		if (chance(w, 4))
			continue;
		w->lane[page] = chance(w, 16) ? (uint8_t)below(w, LANE_CONTENTS) : fashion;
		memcpy(lanes + (size_t)page * PAGE + start, lane_content(w->lane[page]) + start,
		       sabotaged(w, SABOTAGE_LANE) ? lane_size / 2 : lane_size);
		check_lane(w, page);
	}
	w->verified += LANE_PAGES;
}

static _Atomic(uint32_t) *bell_word(unsigned int page)
{
	return (_Atomic(uint32_t) *)(bells + (size_t)page * PAGE);
}

static void check_bell(unsigned int page, uint32_t want)
{
	check_bytes(NULL, (const unsigned char *)bell_word(page), (const unsigned char *)&want, sizeof(want), "futex word");
	check_bytes(NULL, bells + (size_t)page * PAGE + 4, data + 4, PAGE - 4, "page around a futex");
}

void op_futex_wait(struct worker *w, struct region *unused)
{
	unsigned int page = below(w, BELL_PAGES);
	unsigned int private = below(w, 2);
	struct timespec limit = {.tv_sec = options.hang / 2};

	(void)unused;
	check_bell(page, 0);
	w->where = (uintptr_t)bell_word(page);
	board->bell = (1 + page) << 1 | private;
	while (*bell_word(page) == 0) {
		uint64_t before = now();
		long result = syscall(SYS_futex, bell_word(page), private ? FUTEX_WAIT_PRIVATE : FUTEX_WAIT, 0, &limit, NULL, 0);

		w->napped += now() - before;
		if (result && errno == ETIMEDOUT)
			fail(NULL, bell_word(page), "torture: LOST WAKE-UP: nobody woke the futex, its value is %u", *bell_word(page));
		if (result && errno != EAGAIN && errno != EINTR)
			fail(NULL, bell_word(page), "torture: WRONG RESULT: futex: %s", strerror(errno));
	}
	check_bell(page, 1);
	*bell_word(page) = 0;
	check_bell(page, 0);
	board->rung++;
	w->verified += 3;
}

void op_futex_wake(struct worker *w, struct region *unused)
{
	uint32_t bell = board->bell;

	(void)unused;
	if (!bell) {
		nap(w, 200000);
		return;
	}
	_Atomic(uint32_t) *word = bell_word((bell >> 1) - 1);

	// Long enough for the page to merge below the sleeper, most of the time.
	nap(w, chance(w, 4) ? 0 : below(w, 200000000));
	w->where = (uintptr_t)word;
	uint32_t rung = board->rung;

	board->bell = 0;
	*word = 1;
	if (sabotaged(w, SABOTAGE_FUTEX))
		return;
	if (syscall(SYS_futex, word, bell & 1 ? FUTEX_WAKE_PRIVATE : FUTEX_WAKE, INT_MAX, NULL, NULL, 0) < 0)
		fail(NULL, word, "torture: WRONG RESULT: futex: %s", strerror(errno));
	while (board->rung == rung)
		nap(w, 100000);
}

static void repeat(struct worker *w, void (*run)(struct worker *, struct region *), unsigned int pause_ms)
{
	self = w;
	w->tid = (pid_t)syscall(SYS_gettid);
	while (!stopping(w)) {
		perform(w, &operations[operation_index(run)], NULL);
		if (pause_ms)
			nap(w, (uint64_t)below(w, pause_ms) * 1000000);
	}
	w->done = true;
}

void *board_thread(void *worker)
{
	repeat(worker, op_board_write, 20);
	return NULL;
}

void *futex_wait_thread(void *worker)
{
	repeat(worker, op_futex_wait, 0);
	return NULL;
}

// Ends after the waiter, which might wait for it.
void *futex_wake_thread(void *worker)
{
	struct worker *w = worker;

	w->deadline += 1000000000;
	repeat(w, op_futex_wake, 0);
	while (board->bell)
		perform(w, &operations[operation_index(op_futex_wake)], NULL);
	return NULL;
}
