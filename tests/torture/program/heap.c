// SPDX-License-Identifier: MIT
// The heap: one thread owns the break, another one exercises malloc. Neither uses what the other does: malloc in a thread
// other than the first takes its memory from arenas that are mapped, not from the break.
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "torture.h"

enum {
	BLOCKS = 192,
	BLOCK_MOST = 512 << 10,
};

// Grows or shrinks the heap. What comes back after shrinking must be empty.
void op_brk(struct worker *w, struct region *r)
{
	unsigned int pages = below(w, r->capacity + 1);
	struct span change = {pages < r->pages ? pages : r->pages, (unsigned int)abs((int)pages - (int)r->pages)};

	note(w, r, change);
	if (sbrk(0) != page_at(r, r->pages))
		fail(r, sbrk(0), "torture: WRONG RESULT: the break is not where it was left, at %p", (void *)page_at(r, r->pages));
	if (sbrk(((intptr_t)pages - (intptr_t)r->pages) * PAGE) == (void *)-1)
		fail(r, sbrk(0), "torture: WRONG RESULT: sbrk: %s", strerror(errno));
	bool grown = pages > r->pages;

	r->pages = pages;
	if (!grown)
		return;
	region_fresh(r, change);
	if (sabotaged(w, SABOTAGE_HEAP))
		page_at(r, change.first)[0] = 1;
	check_span(w, r, change);
	compose(w, r->oracle + (size_t)change.first * PAGE, change.count);
	region_store(w, r, change);
}

void *heap_thread(void *worker)
{
	static void (*const runs[])(struct worker *, struct region *) = {op_write, op_bytes, op_verify, op_discard, op_overwrite};
	struct worker *w = self = worker;
	struct region *r = &w->regions[0];

	w->tid = (pid_t)syscall(SYS_gettid);
	w->region_count = 1;
	r->kind = KIND_HEAP;
	r->capacity = LARGE_PAGES;
	oracle_place(w, shared_allocate(oracle_size(w)));
	r->memory = sbrk(0);
	size_t off = -(uintptr_t)r->memory % PAGE;

	r->memory += off;
	if (sbrk((intptr_t)off) == (void *)-1)
		setup_error("sbrk");
	while (!stopping(w)) {
		if (r->pages == 0 || chance(w, 2))
			perform(w, &operations[operation_index(op_brk)], r);
		for (unsigned int i = below(w, 4); i && r->pages; i--)
			perform(w, &operations[operation_index(runs[below(w, sizeof(runs) / sizeof(*runs))])], r);
		nap(w, (uint64_t)below(w, chance(w, 4) ? 1000 : 100) * 1000000);
	}
	check_region(w, r);
	w->done = true;
	return NULL;
}

struct block {
	unsigned char *memory;
	size_t size;
	size_t phase; // the first byte is byte `phase` of the pool
};

// Blocks are filled so that their whole pages are pages of the pool.
static void fill_block(struct worker *w, struct block *block)
{
	block->phase = (uintptr_t)block->memory % PAGE + (size_t)below(w, 8) * PAGE;
	memcpy(block->memory, data + block->phase, block->size);
	if (sabotaged(w, SABOTAGE_MALLOC))
		block->memory[block->size - 1] ^= 1;
}

static void check_block(struct worker *w, const struct block *block, size_t size)
{
	w->where = (uintptr_t)block->memory;
	check_bytes(NULL, block->memory, data + block->phase, size, "block of malloc");
	w->verified += size / PAGE;
}

static size_t block_size(struct worker *w)
{
	return 1 + below(w, 16u << below(w, 16));
}

static void change_block(struct worker *w, struct block *block)
{
	size_t size = block_size(w);
	unsigned char *memory;

	if (!block->memory) {
		memory = chance(w, 2) ? calloc(1, size) : NULL;
		if (memory && (memory[0] || memcmp(memory, memory + 1, size - 1)))
			fail(NULL, memory, "torture: WRONG BYTE: calloc returned memory that is not zero, %zu bytes", size);
		if (!memory)
			memory = malloc(size);
	} else if (chance(w, 2)) {
		memory = realloc(block->memory, size);
		if (memory) {
			block->memory = memory;
			check_block(w, block, size < block->size ? size : block->size);
		}
	} else {
		free(block->memory);
		block->memory = NULL;
		return;
	}
	if (!memory)
		fail(NULL, NULL, "torture: out of memory");
	block->memory = memory;
	block->size = size;
	fill_block(w, block);
}

void op_malloc(struct worker *w, struct region *unused)
{
	static struct block *blocks;

	(void)unused;
	if (!blocks)
		blocks = shared_allocate(BLOCKS * sizeof(*blocks));
	for (unsigned int i = 0; i < 32; i++) {
		struct block *block = &blocks[below(w, BLOCKS)];

		if (block->memory)
			check_block(w, block, block->size);
		change_block(w, block);
	}
	if (chance(w, 64))
		malloc_trim(0);
}

void *malloc_thread(void *worker)
{
	struct worker *w = self = worker;

	w->tid = (pid_t)syscall(SYS_gettid);
	while (!stopping(w)) {
		perform(w, &operations[operation_index(op_malloc)], NULL);
		nap(w, chance(w, 16) ? 500000000 : (uint64_t)below(w, 10) * 1000000);
	}
	w->done = true;
	return NULL;
}
