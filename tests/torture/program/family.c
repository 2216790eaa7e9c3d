// SPDX-License-Identifier: MIT
// Processes: children that verify, write and live on for a while, their children, vfork and posix_spawn.
//
// A child is a worker like its parent's thread, with an oracle of its own: a copy that the parent makes before the fork.
// So neither waits for the other, and each sees at once if a write of the other one shows up in its memory.
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "torture.h"

enum { SPAWN_STATUS = 7, VFORK_STATUS = 9 };

static void slots_init(struct worker *w, size_t oracle, unsigned int count, unsigned int depth)
{
	w->slot_count = count;
	w->slots = shared_allocate(count * sizeof(*w->slots));
	for (unsigned int i = 0; i < count; i++) {
		struct slot *slot = &w->slots[i];

		slot->oracle = shared_allocate(oracle);
		slot->message = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (slot->message == MAP_FAILED)
			setup_error("mmap");
		if (depth < 2)
			slots_init(&slot->worker, oracle, 1, depth + 1);
	}
}

void family_init(struct worker *w)
{
	slots_init(w, oracle_size(w), CHILDREN, 1);
}

static void absorb(struct worker *w, const struct worker *child)
{
	w->verified += child->verified;
	w->skipped += child->skipped;
	w->children += child->children;
	for (unsigned int i = 0; i < operation_count; i++)
		add_costs(&w->costs[i], &child->costs[i]);
}

static bool reap_slot(struct worker *w, struct slot *slot)
{
	int status;
	pid_t pid = waitpid(slot->pid, &status, WNOHANG);

	if (pid == 0) {
		if (now() > slot->late)
			hang("torture: HANG: child %d (fork depth %u) of thread %u does not end: %s for %.3f s at %p", (int)slot->pid,
			     slot->worker.depth, w->id, operations[slot->worker.doing].name,
			     (double)(now() - slot->worker.since) / 1e9, (void *)slot->worker.where);
		return false;
	}
	if (pid < 0)
		fail(NULL, NULL, "torture: waitpid(%d): %s", (int)slot->pid, strerror(errno));
	if (status)
		fail(NULL, NULL, "torture: CHILD FAILED: %d (fork depth %u) ended with %s %d while %s", (int)pid, slot->worker.depth,
		     WIFSIGNALED(status) ? "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
		     operations[slot->worker.doing].name);
	unsigned int token = (unsigned int)pid % POOL_PAGES;

	check_bytes(NULL, slot->message, data + (size_t)token * PAGE, PAGE, "shared anonymous page written by a child");
	w->verified++;
	absorb(w, &slot->worker);
	slot->pid = 0;
	return true;
}

void reap(struct worker *w, bool all)
{
	for (unsigned int i = 0; i < w->slot_count; i++)
		while (w->slots[i].pid && !reap_slot(w, &w->slots[i]) && all)
			nap(w, 1000000);
}

// Memory with MADV_DONTFORK must not be here. Something else may be at its address meanwhile, but not with its content.
static void check_absent(const struct region *r)
{
	for (unsigned int i = 0; i < r->pages; i++) {
		unsigned char copy[PAGE];
		struct iovec local = {copy, PAGE}, remote = {page_at(r, i), PAGE};

		if (process_vm_readv(getpid(), &local, 1, &remote, 1, 0) != PAGE)
			continue;
		if (!is_zero(copy) && !memcmp(copy, r->oracle + (size_t)i * PAGE, PAGE))
			fail(r, page_at(r, i), "torture: WRONG RESULT: memory with MADV_DONTFORK is there in the child");
	}
}

// What a fork does to the regions.
static void inherit(struct worker *w)
{
	unsigned int kept = 0;

	for (unsigned int i = 0; i < w->region_count; i++) {
		struct region *r = &w->regions[i];

		r->locked = false;
		r->pin_count = 0;
		r->ready = 0;
		if (r->kind == KIND_DONTFORK) {
			check_absent(r);
			continue;
		}
		if (r->kind == KIND_WIPEONFORK) {
			region_fresh(r, (struct span){0, r->pages});
			if (!r->guard_count && sabotaged(w, SABOTAGE_WIPE))
				r->memory[0] = 1;
		}
		w->regions[kept++] = *r;
	}
	w->region_count = kept;
}

static _Noreturn void child(struct slot *slot, unsigned char *private_page)
{
	struct worker *w = self = &slot->worker;

	w->tid = (pid_t)syscall(SYS_gettid);
	inherit(w);
	for (unsigned int i = 0; i < w->region_count; i++)
		check_region(w, &w->regions[i]);
	if (!w->regions[0].guard_count && sabotaged(w, SABOTAGE_CHILD))
		w->regions[0].memory[0] ^= 1;
	// Half of the children go on for a while, so that they are merged themselves and break what they share.
	if (chance(w, 2))
		w->deadline = now() + (uint64_t)below(w, 400) * 1000000;
	bursts(w);
	reap(w, true);
	for (unsigned int i = 0; i < w->region_count; i++)
		check_region(w, &w->regions[i]);
	memcpy(slot->message, data + (size_t)((unsigned int)getpid() % POOL_PAGES) * PAGE, PAGE);
	*private_page = 1; // must not reach the parent
	_exit(0);
}

void op_fork(struct worker *w, struct region *r)
{
	struct slot *slot = NULL;
	unsigned char private_page = 0;

	(void)r;
	reap(w, false);
	for (unsigned int i = 0; i < w->slot_count; i++)
		if (!w->slots[i].pid)
			slot = &w->slots[i];
	if (!slot)
		return;
	struct worker *copy = &slot->worker;
	struct slot *slots = copy->slots;
	unsigned int slot_count = copy->slot_count;
	struct region *last = &w->regions[w->region_count - 1];
	size_t size = (size_t)(last->maybe + last->capacity - w->regions[0].oracle);

	memcpy(slot->oracle, w->regions[0].oracle, size);
	*copy = *w;
	copy->slots = slots;
	copy->slot_count = slot_count;
	copy->depth++;
	copy->random = draw(w);
	copy->io = NULL;
	copy->deadline = now();
	copy->verified = copy->skipped = copy->children = 0;
	memset(copy->costs, 0, sizeof(copy->costs));
	for (unsigned int i = 0; i < w->region_count; i++) {
		copy->regions[i].oracle = slot->oracle + (w->regions[i].oracle - w->regions[0].oracle);
		copy->regions[i].maybe = slot->oracle + (w->regions[i].maybe - w->regions[0].oracle);
	}
	memset(slot->message, 0, PAGE);
	w->children++;
	pid_t pid = fork();

	if (pid == 0)
		child(slot, &private_page);
	if (pid < 0)
		fail(NULL, NULL, "torture: fork: %s", strerror(errno));
	slot->late = now() + (uint64_t)options.hang * 1000000000;
	slot->pid = pid;
	if (private_page)
		fail(NULL, &private_page, "torture: WRONG RESULT: a child's stack reached its parent");
}

// The child of vfork writes to its parent's memory: to pages that the parent's threads, asleep or not, merge and break.
__attribute__((noinline)) static pid_t vfork_and_store(struct region *r, size_t start, size_t size)
{
	pid_t pid = vfork();

	if (pid == 0) {
		memcpy(r->memory + start, r->oracle + start, size);
		_exit(VFORK_STATUS);
	}
	return pid;
}

static void expect_status(pid_t pid, int want, const char *what)
{
	int status;
	pid_t got;

	do
		got = waitpid(pid, &status, 0);
	while (got < 0 && errno == EINTR);
	if (got != pid || !WIFEXITED(status) || WEXITSTATUS(status) != want)
		fail(NULL, NULL, "torture: WRONG RESULT: %s: waitpid returned %d, status 0x%x, expected exit status %d", what,
		     (int)got, (unsigned int)status, want);
}

void op_vfork(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 16);

	note(w, r, span);
	compose(w, r->oracle + (size_t)span.first * PAGE, span.count);
	memset(r->maybe + span.first, 0, span.count);
	pid_t pid = vfork_and_store(r, (size_t)span.first * PAGE, (size_t)span.count * PAGE);

	if (pid < 0)
		fail(r, NULL, "torture: vfork: %s", strerror(errno));
	expect_status(pid, VFORK_STATUS, "child of vfork");
	check_span(w, r, span);
}

void op_spawn(struct worker *w, struct region *r)
{
	static char name[] = "torture", option[] = "--exit", status[] = "7";
	char *arguments[] = {name, option, status, NULL};
	pid_t pid;

	(void)w;
	(void)r;
	int result = posix_spawn(&pid, "/proc/self/exe", NULL, NULL, arguments, environ);

	if (result)
		fail(NULL, NULL, "torture: posix_spawn: %s", strerror(result));
	expect_status(pid, SPAWN_STATUS, "spawned program");
}
