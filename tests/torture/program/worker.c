// SPDX-License-Identifier: MIT
// The table of operations, and the loop that draws from it: a burst on a region, then the region is left alone for some
// time so that it can merge, meanwhile the others.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "torture.h"

const struct operation operations[] = {
	{"sleep", 0, 0, NULL},
	{"write", 72, WRITES | KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_write},
	{"bytes", 140, WRITES | KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_bytes},
	{"overwrite", 12, WRITES | KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_overwrite},
	{"bulk", 0, WRITES | ANYWHERE, op_bulk},
	{"verify", 48, KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_verify},
	{"discard", 160, KEEPS_LOCK | ANYWHERE, op_discard},
	{"free", 24, KEEPS_LOCK | ANYWHERE, op_free},
	{"map_over", 24, ANYWHERE, op_map_over},
	{"hole", 24, ANYWHERE, op_hole},
	{"move", 18, REMAPS | ANYWHERE, op_move},
	{"mremap_grow", 15, REMAPS | ANYWHERE, op_grow},
	{"mremap_shrink", 9, REMAPS | ANYWHERE, op_shrink},
	{"mremap_fixed", 12, REMAPS | ANYWHERE, op_mremap_fixed},
	{"mremap_dontunmap", 9, REMAPS | ANYWHERE, op_dontunmap},
	{"protect", 18, KEEPS_LOCK | ANYWHERE, op_protect},
	{"populate", 12, KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_populate},
	{"lock", 9, ANYWHERE | KEEPS_LOCK, op_lock},
	{"huge", 6, ANYWHERE, op_huge},
	{"churn", 40, LONE | ANYWHERE, op_churn},
	{"stack", 2, LONE | ANYWHERE, op_stack},
	{"signal_stack", 9, WRITES | KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_signal_stack},
	{"direct_read", 18, WRITES | KEEPS_PIN | KEEPS_LOCK, op_direct_read},
	{"direct_write", 12, KEEPS_PIN | KEEPS_LOCK, op_direct_write},
	{"uring_read", 18, WRITES | KEEPS_PIN | KEEPS_LOCK, op_uring_read},
	{"uring_pin", 16, WRITES, op_pin},
	{"uring_fixed", 15, WRITES | KEEPS_PIN | KEEPS_LOCK, op_fixed},
	{"kernel_write", 36, WRITES | KEEPS_PIN | KEEPS_LOCK, op_kernel_write},
	{"kernel_read", 24, KEEPS_PIN | KEEPS_LOCK, op_kernel_read},
	{"process_vm", 12, WRITES | KEEPS_PIN | KEEPS_LOCK, op_process_vm},
	{"image_read", 36, WRITES | KEEPS_PIN | KEEPS_LOCK, op_image_read},
	{"fork", 2, LONE | ANYWHERE, op_fork},
	{"vfork", 2, WRITES | KEEPS_PIN | KEEPS_LOCK | ANYWHERE, op_vfork},
	{"spawn", 1, LONE | ANYWHERE, op_spawn},
	{"board_read", 16, LONE, op_board_read},
	{"lane", 6, LONE, op_lane},
	{"board_write", 0, LONE, op_board_write},
	{"futex_wait", 0, LONE, op_futex_wait},
	{"futex_wake", 0, LONE, op_futex_wake},
	{"brk", 0, 0, op_brk},
	{"malloc", 0, LONE, op_malloc},
	{"one page written", 0, 0, NULL},
	{"one call", 0, 0, NULL},
};
const unsigned int operation_count = sizeof(operations) / sizeof(*operations);
_Static_assert(sizeof(operations) / sizeof(*operations) <= OPERATIONS, "too many operations for the statistics");

_Thread_local struct worker *self;

static void on_sigsegv(int number, siginfo_t *info, void *context)
{
	struct worker *w = self;

	(void)number;
	(void)context;
	if (!w || !w->expecting)
		fail(NULL, info->si_addr, "torture: UNEXPECTED SIGNAL %d, code %d", number, info->si_code);
	w->expecting = 0;
	w->fault_address = info->si_addr;
	w->fault_code = info->si_code;
	siglongjmp(w->landing, 1);
}

void sigsegv_init(void)
{
	struct sigaction action = {.sa_sigaction = on_sigsegv, .sa_flags = SA_SIGINFO};

	if (sigaction(SIGSEGV, &action, NULL) || sigaction(SIGBUS, &action, NULL))
		setup_error("sigaction");
}

unsigned int operation_index(void (*run)(struct worker *w, struct region *r))
{
	unsigned int i = 0;

	while (operations[i].run != run)
		i++;
	return i;
}

static void record(struct times *times, uint64_t ns)
{
	unsigned int bucket = (unsigned int)ns;

	// Eight buckets for each power of two.
	if (ns >= 8) {
		unsigned int log = 63 - (unsigned int)__builtin_clzll(ns);

		bucket = (log - 3) * 8 + (unsigned int)(ns >> (log - 3));
	}
	if (bucket >= BUCKETS)
		bucket = BUCKETS - 1;
	times->buckets[bucket]++;
	times->count++;
	if (ns > times->max)
		times->max = ns;
}

struct moment this_moment(void)
{
	struct timespec ran;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ran);
	return (struct moment){now(), (uint64_t)ran.tv_sec * 1000000000 + (uint64_t)ran.tv_nsec};
}

// Whether it slept or had no CPU is not told apart for steps: what it did not run counts as asleep.
void record_step(struct worker *w, enum step step, struct moment since)
{
	struct costs *costs = &w->costs[operation_count - step];
	struct moment end = this_moment();
	uint64_t whole = end.at - since.at, ran = end.ran - since.ran;

	record(&costs->whole, whole);
	record(&costs->asleep, whole > ran ? whole - ran : 0);
	record(&costs->ran, ran);
}

void perform(struct worker *w, const struct operation *operation, struct region *r)
{
	unsigned int index = (unsigned int)(operation - operations);

	w->doing = index;
	w->where = 0;
	if (r)
		region_prepare(w, r, operation);
	w->napped = 0;
	w->napped_cpu = (struct cpu_times){0};
	struct cpu_times cpu_start = cpu_times();
	uint64_t start = now();

	w->since = start;
	operation->run(w, r);
	uint64_t end = now();

	struct cpu_times cpu = cpu_times();
	uint64_t whole = end - start - w->napped, ran = cpu.ran - cpu_start.ran - w->napped_cpu.ran;
	uint64_t awake = ran + (cpu.queued - cpu_start.queued - w->napped_cpu.queued);

	record(&w->costs[index].whole, whole);
	record(&w->costs[index].asleep, whole > awake ? whole - awake : 0);
	record(&w->costs[index].ran, ran);
	w->doing = 0;
	w->since = end;
}

static const struct operation *pick_operation(struct worker *w)
{
	unsigned int total = 0;

	for (unsigned int i = 0; i < operation_count; i++)
		total += operations[i].weight;
	unsigned int ticket = below(w, total), i = 0;

	while (ticket >= operations[i].weight)
		ticket -= operations[i++].weight;
	return &operations[i];
}

static bool allowed(const struct worker *w, const struct region *r, const struct operation *operation)
{
	if (w->depth && !(operation->flags & ANYWHERE))
		return false;
	// Moved memory is watched again only a moment later.
	if (options.raw && (operation->flags & REMAPS))
		return false;
	if (operation->flags & LONE)
		return true;
	// A pin is worth little if the next operation removes it: most operations leave a pinned region alone.
	if (r->pin_count && !(operation->flags & KEEPS_PIN))
		return (r->generation & 15) == 0;
	return r->kind != KIND_READONLY || !(operation->flags & WRITES);
}

// 10 ms to 2 s, each order of magnitude alike often; a third of the time none at all.
static uint64_t quiet(struct worker *w)
{
	uint64_t ns = 10000000;

	if (chance(w, 3))
		return 0;
	for (unsigned int i = below(w, 8); i; i--)
		ns = ns * 2 + below(w, (unsigned int)(ns / 2));
	return ns < 2000000000 ? ns : 2000000000;
}

static struct region *pick_region(struct worker *w)
{
	unsigned int start = below(w, w->region_count);

	for (unsigned int i = 0; i < w->region_count; i++) {
		struct region *r = &w->regions[(start + i) % w->region_count];

		if (r->ready <= now())
			return r;
	}
	return NULL;
}

// Long enough for all of a bulk region to be seen twice by a scan, and merged. Pages that broke are left alone for a second.
static uint64_t until_merged(struct worker *w, const struct region *r)
{
	return (r->broke ? 2000000000 : 900000000) + (uint64_t)below(w, 500) * 1000000;
}

static void burst(struct worker *w, struct region *r)
{
	for (unsigned int i = 1 + below(w, 4); i; i--) {
		const struct operation *operation = pick_operation(w);

		if (operation->flags & LONE ? allowed(w, NULL, operation) : r && allowed(w, r, operation))
			perform(w, operation, operation->flags & LONE ? NULL : r);
	}
}

// Until the deadline, but at least once: a child whose deadline is over when it starts makes one burst.
void bursts(struct worker *w)
{
	do {
		struct region *r = pick_region(w);

		reap(w, false);
		if (options.sabotage == SABOTAGE_HANG && w->id == 0 && !w->depth)
			for (;;)
				pause();
		if (r && r->kind == KIND_BULK)
			perform(w, &operations[operation_index(op_bulk)], r);
		else
			burst(w, r);
		if (r)
			r->ready = now() + (r->kind == KIND_BULK ? until_merged(w, r) : quiet(w));
		else
			nap(w, 2000000);
	} while (!stopping(w));
}
