// SPDX-License-Identifier: MIT
// What a thread does to its own memory with the CPU and with the calls that manage mappings.
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "torture.h"

static size_t bytes(unsigned int pages)
{
	return (size_t)pages * PAGE;
}

static struct span whole(const struct region *r)
{
	return (struct span){0, r->pages};
}

// Often, but not always: a look at the pages also changes what the kernel knows of them.
static void maybe_check(struct worker *w, struct region *r, struct span span)
{
	if (chance(w, 2))
		check_span(w, r, span);
}

void op_write(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 16);

	note(w, r, span);
	maybe_check(w, r, span);
	compose(w, r->oracle + bytes(span.first), span.count);
	region_store(w, r, span);
	maybe_check(w, r, span);
}

void op_bytes(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);

	note(w, r, span);
	settle(w, r, span);
	for (unsigned int i = span.first; i < span.first + span.count; i++) {
		size_t offset = bytes(i) + below(w, PAGE);
		unsigned char value = (unsigned char)draw(w);

		r->oracle[offset] = value;
		if (!sabotaged(w, SABOTAGE_WRITE))
			((volatile unsigned char *)r->memory)[offset] = value;
	}
	check_span(w, r, span);
}

// From the first page of a large part to its last, as a program does that refills a buffer.
void op_overwrite(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, r->pages);

	note(w, r, span);
	compose(w, r->oracle + bytes(span.first), span.count);
	region_store(w, r, span);
	maybe_check(w, r, span);
}

static void flip(struct region *r, unsigned int page)
{
	r->memory[bytes(page)] ^= 1;
}

static void swap(struct region *r)
{
	unsigned char copy[PAGE];

	memcpy(copy, r->memory, PAGE);
	memcpy(r->memory, page_at(r, 1), PAGE);
	memcpy(page_at(r, 1), copy, PAGE);
}

void op_verify(struct worker *w, struct region *r)
{
	struct span span = chance(w, 2) ? whole(r) : pick(w, r, r->pages);

	if (r->kind == KIND_ANONYMOUS && sabotaged(w, SABOTAGE_FLIP))
		flip(r, span.first);
	if (r->kind == KIND_ANONYMOUS && sabotaged(w, SABOTAGE_ZERO))
		memset(r->memory, 0, PAGE);
	if (r->kind == KIND_ANONYMOUS && r->pages > 1 && sabotaged(w, SABOTAGE_SWAP))
		swap(r);
	note(w, r, span);
	check_span(w, r, span);
}

// Must a discard be refused? As for every program: not while the pages are locked; MADV_FREE not for files.
static bool discard(struct worker *w, struct region *r, struct span span, int advice)
{
	bool refused = r->locked || (advice == MADV_FREE && (r->kind == KIND_FILE || r->kind == KIND_READONLY));
	int result = advice == MADV_DONTNEED && sabotaged(w, SABOTAGE_DISCARD)
			     ? 0
			     : sys_madvise(page_at(r, span.first), bytes(span.count), advice);

	if (result != (refused ? -1 : 0) || (refused && errno != EINVAL))
		fail(r, page_at(r, span.first), "torture: WRONG RESULT: madvise(%d) of %u pages returned %d (%s), expected %s", advice,
		     span.count, result, strerror(errno), refused ? "EINVAL" : "success");
	return !refused;
}

void op_discard(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, chance(w, 2) ? r->pages : 32);

	note(w, r, span);
	maybe_check(w, r, span);
	if (discard(w, r, span, MADV_DONTNEED))
		region_fresh(r, span);
	maybe_check(w, r, span);
	if (chance(w, 4) || r->kind == KIND_READONLY)
		return;
	compose(w, r->oracle + bytes(span.first), span.count);
	region_store(w, r, span);
}

// A whole region that had time to merge: checked, then changed at one stroke, and filled again with pages that only bulk
// regions contain, in their order, so that they merge in long runs.
void op_bulk(struct worker *w, struct region *r)
{
	const unsigned char *pages = data + bytes(DATA_PAGES - BULK_PAGES);
	unsigned int start = below(w, BULK_PAGES), how = below(w, 10);

	note(w, r, whole(r));
	check_span(w, r, whole(r));
	if (how < 3) {
		discard(w, r, whole(r), MADV_DONTNEED);
		region_fresh(r, whole(r));
	} else if (how == 3) {
		region_map_over(r, whole(r), MAP_FIXED);
	}
	r->broke = how > 3;
	maybe_check(w, r, whole(r));
	for (unsigned int i = 0; i < r->pages; i++)
		memcpy(r->oracle + bytes(i), pages + bytes((start + i) % BULK_PAGES), PAGE);
	region_store(w, r, whole(r));
	maybe_check(w, r, whole(r));
}

void op_free(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);

	note(w, r, span);
	maybe_check(w, r, span);
	if (discard(w, r, span, MADV_FREE))
		memset(r->maybe + span.first, 1, span.count);
	maybe_check(w, r, span);
	if (chance(w, 2))
		settle(w, r, span);
}

// New memory at the same address in one step.
void op_map_over(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);

	note(w, r, span);
	region_map_over(r, span, MAP_FIXED);
	maybe_check(w, r, span);
}

static void unmap(struct region *r, struct span span)
{
	if (!span.count)
		return;
	if (munmap(page_at(r, span.first), bytes(span.count)))
		fail(r, page_at(r, span.first), "torture: munmap: %s", strerror(errno));
	freed(page_at(r, span.first));
}

// New memory at the same address in two steps: other threads may take the hole.
void op_hole(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	unsigned char *memory = r->memory;

	note(w, r, span);
	unmap(r, span);
	if (chance(w, 2))
		sched_yield();
	region_map_over(r, span, MAP_FIXED_NOREPLACE);
	if (r->memory) {
		maybe_check(w, r, span);
		return;
	}
	unsigned int end = span.first + span.count;

	r->memory = memory;
	unmap(r, (struct span){0, span.first});
	unmap(r, (struct span){end, r->pages - end});
	region_map(w, r, 1 + below(w, r->capacity));
	maybe_check(w, r, whole(r));
}

void op_move(struct worker *w, struct region *r)
{
	note(w, r, whole(r));
	unmap(r, whole(r));
	if (chance(w, 4))
		sched_yield();
	region_map(w, r, 1 + below(w, r->capacity));
	maybe_check(w, r, whole(r));
	if (chance(w, 4) || r->kind == KIND_READONLY)
		return;
	compose(w, r->oracle, r->pages);
	region_store(w, r, whole(r));
}

// A region that the program itself has split may consist of several mappings, which mremap refuses.
static bool remapped(struct worker *w, struct region *r, void *result)
{
	if (result != MAP_FAILED)
		return true;
	if (errno != EFAULT || !r->split)
		fail(r, r->memory, "torture: WRONG RESULT: mremap of %u pages failed: %s", r->pages, strerror(errno));
	w->skipped++;
	return false;
}

void op_grow(struct worker *w, struct region *r)
{
	unsigned int pages = r->pages + below(w, r->capacity - r->pages + 1);

	note(w, r, whole(r));
	void *got = mremap(r->memory, bytes(r->pages), bytes(pages), MREMAP_MAYMOVE);

	if (!remapped(w, r, got))
		return;
	struct span added = {r->pages, pages - r->pages};

	r->memory = got;
	r->pages = pages;
	region_fresh(r, added);
	maybe_check(w, r, whole(r));
}

void op_shrink(struct worker *w, struct region *r)
{
	unsigned int pages = 1 + below(w, r->pages);
	struct span rest = {pages, r->pages - pages};

	note(w, r, rest);
	if (rest.count && chance(w, 2)) {
		// Shrinking acts on the tail only, so it succeeds even on several mappings.
		if (mremap(r->memory, bytes(r->pages), bytes(pages), 0) != r->memory)
			fail(r, r->memory, "torture: WRONG RESULT: shrinking mremap: %s", strerror(errno));
	} else {
		unmap(r, rest);
	}
	r->pages = pages;
	maybe_check(w, r, whole(r));
}

void op_mremap_fixed(struct worker *w, struct region *r)
{
	unsigned int extra = below(w, 4);
	unsigned char *place =
		mmap(NULL, bytes(r->pages + extra), chance(w, 2) ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	note(w, r, whole(r));
	if (place == MAP_FAILED)
		fail(r, NULL, "torture: mmap: %s", strerror(errno));
	if (extra && munmap(place + bytes(r->pages), bytes(extra)))
		fail(r, place, "torture: munmap: %s", strerror(errno));
	void *old = r->memory;
	void *got = mremap(old, bytes(r->pages), bytes(r->pages), MREMAP_MAYMOVE | MREMAP_FIXED, place);

	if (!remapped(w, r, got)) {
		// The kernel may have removed what was at the destination before it looked at the source.
		munmap(place, bytes(r->pages));
		return;
	}
	if (got != place)
		fail(r, got, "torture: WRONG RESULT: mremap to %p returned %p", (void *)place, got);
	freed(old);
	r->memory = got;
	maybe_check(w, r, whole(r));
}

// The pages go to a new address, the mapping stays, empty.
void op_dontunmap(struct worker *w, struct region *r)
{
	unsigned char *old = r->memory;

	note(w, r, whole(r));
	void *got = mremap(old, bytes(r->pages), bytes(r->pages), MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);

	if (!remapped(w, r, got))
		return;
	r->memory = got;
	maybe_check(w, r, whole(r));
	for (unsigned int i = 0; i < r->pages; i++) {
		const unsigned char *want = r->kind == KIND_FILE || r->kind == KIND_READONLY ? data + bytes(r->file_page + i)
											      : data + bytes(POOL_PAGES);

		check_bytes(r, old + bytes(i), want, PAGE, "page left behind by mremap(MREMAP_DONTUNMAP)");
	}
	if (r->kind != KIND_READONLY) {
		memcpy(old, data, PAGE);
		check_span(w, r, (struct span){0, 1});
		check_bytes(r, old, data, PAGE, "page written after mremap(MREMAP_DONTUNMAP)");
	}
	if (munmap(old, bytes(r->pages)))
		fail(r, old, "torture: munmap: %s", strerror(errno));
	freed(old);
}

// Stays in force while the region is quiet; region_prepare() ends it.
void op_protect(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	int guard = r->kind == KIND_READONLY || chance(w, 2) ? PROT_NONE : PROT_READ;
	unsigned char *address = page_at(r, span.first);

	note(w, r, span);
	maybe_check(w, r, span);
	settle(w, r, span);
	if (!sabotaged(w, SABOTAGE_SIGNAL) && mprotect(address, bytes(span.count), guard))
		fail(r, address, "torture: mprotect: %s", strerror(errno));
	r->guard = guard;
	r->guard_first = span.first;
	r->guard_count = span.count;
	r->split = true;
	unsigned char *target = address + below(w, (unsigned int)bytes(span.count));

	if (chance(w, 2) && !faults(w, target, guard == PROT_READ))
		fail(r, target, "torture: WRONG RESULT: access to memory with protection %d did not fault", guard);
	if (chance(w, 2) && (pread(data_file, target, 1, 0) != -1 || errno != EFAULT))
		fail(r, target, "torture: WRONG RESULT: pread into memory with protection %d did not fail with EFAULT", guard);
	if (guard == PROT_READ)
		maybe_check(w, r, span);
}

void op_populate(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 64);
	bool write = r->kind != KIND_READONLY && chance(w, 2);

	note(w, r, span);
	if (madvise(page_at(r, span.first), bytes(span.count), write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ))
		fail(r, page_at(r, span.first), "torture: WRONG RESULT: madvise(MADV_POPULATE_%s): %s", write ? "WRITE" : "READ",
		     strerror(errno));
	maybe_check(w, r, span);
}

void op_lock(struct worker *w, struct region *r)
{
	note(w, r, whole(r));
	if (r->locked || mlock(r->memory, bytes(r->pages)) == 0)
		r->locked = true;
	else if (geteuid() != 0 && (errno == ENOMEM || errno == EPERM))
		w->skipped++; // RLIMIT_MEMLOCK, which does not bind root
	else
		fail(r, r->memory, "torture: WRONG RESULT: mlock: %s", strerror(errno));
	maybe_check(w, r, whole(r));
}

void op_huge(struct worker *w, struct region *r)
{
	static const int advices[] = {MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLD, MADV_PAGEOUT};
	struct span span = chance(w, 2) ? whole(r) : pick(w, r, r->pages);

	note(w, r, span);
	r->split = true;
	if (madvise(page_at(r, span.first), bytes(span.count), advices[below(w, 4)]))
		w->skipped++; // kernels without transparent huge pages; locked pages
	maybe_check(w, r, span);
}

// Many short-lived mappings, most of them gone before or while somebody merges them.
void op_churn(struct worker *w, struct region *r)
{
	(void)r;
	for (unsigned int round = 8 + below(w, 24); round; round--) {
		unsigned int pages = 1 + below(w, 16);
		void *wanted = chance(w, 2) ? take_freed() : NULL;
		unsigned char *memory = mmap(wanted, bytes(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			fail(NULL, wanted, "torture: mmap: %s", strerror(errno));
		w->where = (uintptr_t)memory;
		if (chance(w, 4))
			nap(w, below(w, 200000));
		for (unsigned int i = 0; i < pages; i++)
			check_bytes(NULL, memory + bytes(i), data + bytes(POOL_PAGES), PAGE, "fresh mapping is not empty");
		unsigned int start = below(w, POOL_PAGES - pages);

		if (!image_fill(w, memory, start, pages))
			memcpy(memory, data + bytes(start), bytes(pages));
		if (chance(w, 2))
			nap(w, chance(w, 16) ? 20000000 : below(w, 500000));
		check_bytes(NULL, memory, data + bytes(start), bytes(pages), "short-lived mapping");
		w->verified += 2 * (uint64_t)pages;
		struct moment began = this_moment();

		if (chance(w, 4)) {
			if (sys_madvise(memory, bytes(pages), MADV_DONTNEED))
				fail(NULL, memory, "torture: madvise: %s", strerror(errno));
			record_step(w, STEP_CALL, began);
			for (unsigned int i = 0; i < pages; i++)
				check_bytes(NULL, memory + bytes(i), data + bytes(POOL_PAGES), PAGE, "discarded mapping is not empty");
		}
		began = this_moment();
		if (munmap(memory, bytes(pages)))
			fail(NULL, memory, "torture: munmap: %s", strerror(errno));
		record_step(w, STEP_CALL, began);
		freed(memory);
	}
}

void op_stack(struct worker *w, struct region *r)
{
	unsigned char buffer[8 * PAGE];
	unsigned int start = below(w, POOL_PAGES - 8);

	(void)r;
	if (pread(data_file, buffer, sizeof(buffer), (off_t)bytes(start)) != sizeof(buffer))
		fail(NULL, buffer, "torture: pread: %s", strerror(errno));
	nap(w, below(w, 20000000));
	check_bytes(NULL, buffer, data + bytes(start), sizeof(buffer), "stack");
	w->verified += 8;
}

static void on_signal(int number)
{
	unsigned char here;

	(void)number;
	self->fault_address = &here;
}

// The kernel writes a signal's frame to pages that have been quiet and may be merged.
void op_signal_stack(struct worker *w, struct region *r)
{
	enum { STACK = 16 };
	struct span span = {0, STACK};
	stack_t stack = {.ss_size = (size_t)STACK * PAGE}, none = {.ss_flags = SS_DISABLE};
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};

	if (r->pages < STACK)
		return;
	span.first = below(w, r->pages - STACK + 1);
	note(w, r, span);
	stack.ss_sp = page_at(r, span.first);
	w->fault_address = NULL;
	if (sigaction(SIGUSR1, &action, NULL) || sigaltstack(&stack, NULL) || raise(SIGUSR1) || sigaltstack(&none, NULL))
		fail(r, stack.ss_sp, "torture: signal stack: %s", strerror(errno));
	ptrdiff_t where = (unsigned char *)w->fault_address - page_at(r, span.first);

	if (where < 0 || where >= (ptrdiff_t)bytes(STACK))
		fail(r, w->fault_address, "torture: WRONG RESULT: the signal handler ran elsewhere");
	compose(w, r->oracle + bytes(span.first), span.count);
	region_store(w, r, span);
	maybe_check(w, r, whole(r));
}
