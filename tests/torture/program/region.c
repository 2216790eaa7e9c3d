// SPDX-License-Identifier: MIT
// Regions: a piece of private memory that one worker owns, and its oracle.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "torture.h"

enum { HUGE_SIZE = 2 << 20 };

int data_file = -1;

// The last address that some thread gave back: another one may try to map it at once.
static _Atomic(uintptr_t) last_freed;

#ifdef __x86_64__
static long raw_syscall(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}
#else
#error "raw system calls are written for x86-64 only"
#endif

static int raw_result(long result)
{
	if (result >= 0)
		return 0;
	errno = (int)-result;
	return -1;
}

// With --raw this bypasses libc, and with it anything that watches libc's functions: as far as userfaultfd's events promise to
// be a net. They tell of discards, not of unmaps, and not in a child that has just been forked (README, limits).
int sys_madvise(void *address, size_t size, int advice)
{
	if (options.raw && advice == MADV_DONTNEED && !self->depth)
		return raw_result(raw_syscall(SYS_madvise, (long)address, (long)size, advice));
	return madvise(address, size, advice);
}

void freed(void *address)
{
	last_freed = (uintptr_t)address;
}

void *take_freed(void)
{
	return (void *)atomic_exchange(&last_freed, 0);
}

unsigned char *page_at(const struct region *r, unsigned int page)
{
	return r->memory + (size_t)page * PAGE;
}

struct span pick(struct worker *w, const struct region *r, unsigned int most)
{
	struct span span;

	span.count = 1 + below(w, most < r->pages ? most : r->pages);
	span.first = below(w, r->pages - span.count + 1);
	return span;
}

static bool of_file(const struct region *r)
{
	return r->kind == KIND_FILE || r->kind == KIND_READONLY;
}

int region_protection(const struct region *r)
{
	return r->kind == KIND_READONLY ? PROT_READ : PROT_READ | PROT_WRITE;
}

// The oracle of pages that were never written since they were mapped or discarded.
void region_fresh(struct region *r, struct span span)
{
	unsigned char *oracle = r->oracle + (size_t)span.first * PAGE;
	size_t size = (size_t)span.count * PAGE;

	if (of_file(r))
		memcpy(oracle, data + (size_t)(r->file_page + span.first) * PAGE, size);
	else
		memset(oracle, 0, size);
	memset(r->maybe + span.first, 0, span.count);
}

static void advise(struct region *r, void *address, size_t size)
{
	int advice = r->kind == KIND_DONTFORK     ? MADV_DONTFORK
		     : r->kind == KIND_WIPEONFORK ? MADV_WIPEONFORK
		     : r->kind == KIND_HUGE       ? MADV_HUGEPAGE
						  : MADV_NORMAL;

	if (madvise(address, size, advice))
		fail(r, address, "torture: madvise(%d): %s", advice, strerror(errno));
}

// New memory over a part of the region or into a hole in it. Errors are left to the caller only for
// MAP_FIXED_NOREPLACE, where another thread may have been faster: then r->memory is null.
void region_map_over(struct region *r, struct span span, int extra_flags)
{
	unsigned char *address = page_at(r, span.first);
	size_t size = (size_t)span.count * PAGE;
	int flags = MAP_PRIVATE | extra_flags | (of_file(r) ? 0 : MAP_ANONYMOUS);
	off_t offset = of_file(r) ? (off_t)(r->file_page + span.first) * PAGE : 0;
	void *got = mmap(address, size, region_protection(r), flags, of_file(r) ? data_file : -1, offset);

	if (got == MAP_FAILED && extra_flags == MAP_FIXED_NOREPLACE && errno == EEXIST) {
		r->memory = NULL;
		return;
	}
	if (got != address)
		fail(r, address, "torture: mmap at a fixed address returned %p: %s", got, strerror(errno));
	advise(r, address, size);
	r->split = true;
	region_fresh(r, span);
}

// A fresh region at an address of the kernel's choice, or where another thread unmapped something a moment ago.
void region_map(struct worker *w, struct region *r, unsigned int pages)
{
	size_t size = (size_t)pages * PAGE, slack = r->kind == KIND_HUGE ? HUGE_SIZE : 0;
	int flags = MAP_PRIVATE | (of_file(r) ? 0 : MAP_ANONYMOUS);
	int fd = of_file(r) ? data_file : -1;
	unsigned char *got = MAP_FAILED;

	if (of_file(r))
		r->file_page = below(w, DATA_PAGES - r->capacity);
	off_t offset = of_file(r) ? (off_t)r->file_page * PAGE : 0;
	void *wanted = slack || chance(w, 2) ? NULL : take_freed();

	if (wanted)
		got = mmap(wanted, size, region_protection(r), flags | MAP_FIXED_NOREPLACE, fd, offset);
	if (got == MAP_FAILED)
		got = mmap(NULL, size + slack, region_protection(r), flags, fd, offset);
	if (got == MAP_FAILED)
		fail(r, wanted, "torture: mmap of %u pages: %s", pages, strerror(errno));
	if (slack) {
		size_t before = -(uintptr_t)got % HUGE_SIZE;

		if (before && munmap(got, before))
			fail(r, got, "torture: munmap: %s", strerror(errno));
		got += before;
		if (slack - before && munmap(got + size, slack - before))
			fail(r, got, "torture: munmap: %s", strerror(errno));
	}
	r->memory = got;
	r->pages = pages;
	r->split = false;
	r->locked = false;
	advise(r, got, size);
	region_fresh(r, (struct span){0, pages});
	if (sabotaged(w, SABOTAGE_MAP) && r->kind == KIND_ANONYMOUS)
		r->memory[0] = 1;
}

// Ends what an earlier operation left in force and this one can't live with.
void region_prepare(struct worker *w, struct region *r, const struct operation *operation)
{
	if (r->guard_count) {
		struct span span = {r->guard_first, r->guard_count};
		unsigned char *address = page_at(r, span.first);

		if (r->guard == PROT_READ)
			check_span(w, r, span);
		if (chance(w, 4) && !faults(w, address + below(w, PAGE), r->guard == PROT_READ))
			fail(r, address, "torture: access to protected memory did not fault");
		if (mprotect(address, (size_t)span.count * PAGE, region_protection(r)))
			fail(r, address, "torture: mprotect: %s", strerror(errno));
		r->guard_count = 0;
	}
	if (r->pin_count && !(operation->flags & KEEPS_PIN))
		unpin(w, r);
	if (r->locked && !(operation->flags & KEEPS_LOCK)) {
		if (munlock(r->memory, (size_t)r->pages * PAGE))
			fail(r, r->memory, "torture: munlock: %s", strerror(errno));
		r->locked = false;
	}
}

// Writes what the oracle says.
void region_store(struct worker *w, struct region *r, struct span span)
{
	size_t start = (size_t)span.first * PAGE, size = (size_t)span.count * PAGE;

	w->where = (uintptr_t)(r->memory + start);
	if (sabotaged(w, SABOTAGE_WRITE))
		size -= PAGE / 2;
	for (size_t at = 0; at < size; at += PAGE) {
		struct moment began = this_moment();

		memcpy(r->memory + start + at, r->oracle + start + at, size - at < PAGE ? size - at : PAGE);
		record_step(w, STEP_WRITE, began);
	}
	memset(r->maybe + span.first, 0, span.count);
}

void note(struct worker *w, struct region *r, struct span span)
{
	r->history[r->generation++ % HISTORY] = (struct event){
		.time = now(), .operation = (uint8_t)w->doing, .first = (uint16_t)span.first, .count = (uint16_t)span.count};
	w->where = (uintptr_t)page_at(r, span.first);
}

size_t oracle_size(const struct worker *w)
{
	size_t size = 0;

	for (unsigned int i = 0; i < w->region_count; i++)
		size += (size_t)w->regions[i].capacity * (PAGE + 1);
	return size;
}

void oracle_place(struct worker *w, unsigned char *base)
{
	for (unsigned int i = 0; i < w->region_count; i++) {
		struct region *r = &w->regions[i];

		r->oracle = base;
		base += (size_t)r->capacity * PAGE;
	}
	for (unsigned int i = 0; i < w->region_count; i++) {
		w->regions[i].maybe = base;
		base += w->regions[i].capacity;
	}
}

void regions_init(struct worker *w)
{
	static const enum region_kind kinds[REGIONS] = {KIND_HUGE, KIND_FILE, KIND_READONLY, KIND_DONTFORK, KIND_WIPEONFORK,
						       KIND_BULK, KIND_BULK};

	w->region_count = REGIONS;
	for (unsigned int i = 0; i < REGIONS; i++) {
		w->regions[i].kind = kinds[i];
		w->regions[i].index = i;
		w->regions[i].capacity = kinds[i] == KIND_HUGE || kinds[i] == KIND_BULK ? LARGE_PAGES : REGION_PAGES;
	}
	oracle_place(w, shared_allocate(oracle_size(w)));
	for (unsigned int i = 0; i < REGIONS; i++) {
		struct region *r = &w->regions[i];

		region_map(w, r, r->capacity == LARGE_PAGES ? r->capacity : 1 + below(w, r->capacity));
		if (r->kind == KIND_READONLY)
			continue;
		compose(w, r->oracle, r->pages);
		region_store(w, r, (struct span){0, r->pages});
	}
}

// The data file exists by name only for a moment: what is needed later is its descriptor.
void open_data_file(void)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/torture-data.%d", options.directory, (int)getpid());
	data_file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (data_file < 0)
		setup_error(path);
	if (unlink(path))
		setup_error(path);
	if (pwrite(data_file, data, (size_t)DATA_PAGES * PAGE, 0) != (ssize_t)DATA_PAGES * PAGE || fsync(data_file))
		setup_error("writing the data file");
}
