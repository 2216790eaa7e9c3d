// SPDX-License-Identifier: MIT
#include "runs.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "sys.h"

enum {
	GROWTH = 64,                   // chunks backed at a time
	MERGE_BELOW = UDD_CHUNK_RUNS / 2, // neighbours with fewer runs together become one
};

_Static_assert(sizeof(struct udd_run_chunk) <= UDD_PAGE_SIZE, "a chunk is a page");

// Where a run is, or would be.
struct place {
	uint32_t chunk; // in the directory
	uint32_t entry;
};

static struct udd_run_chunk *chunk_of(const struct udd_run_entry *run)
{
	return udd_pointer(udd_page_down((uint64_t)(uintptr_t)run));
}

static struct udd_run_chunk *pool_chunk(const struct udd_runs *runs, uint32_t i)
{
	return udd_pointer((uint64_t)(uintptr_t)runs->chunks + udd_bytes(i));
}

static uint64_t end_of(const struct udd_run_entry *run)
{
	return run->address + udd_bytes(run->pages);
}

// The first run that ends behind `address`. In an empty table, or behind the last run: one past the last.
static struct place locate(const struct udd_runs *runs, uint64_t address)
{
	uint32_t low = 0;
	uint32_t high = runs->used;
	struct place ret;
	const struct udd_run_chunk *chunk;

	// The first chunk whose last run ends behind it, or the last one.
	while (low + 1 < high) {
		uint32_t middle = low + (high - low - 1) / 2;

		chunk = runs->directory[middle];
		if (end_of(&chunk->entries[chunk->count - 1]) <= address)
			low = middle + 1;
		else
			high = middle + 1;
	}
	ret = (struct place){.chunk = low};
	if (!runs->used)
		return ret;
	chunk = runs->directory[low];
	low = 0;
	high = chunk->count;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (end_of(&chunk->entries[middle]) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	ret.entry = low;
	return ret;
}

struct udd_run_entry *udd_runs_find(const struct udd_runs *runs, uint64_t address)
{
	struct place place = locate(runs, address);

	if (!runs->used || place.entry == runs->directory[place.chunk]->count)
		return NULL;
	return &runs->directory[place.chunk]->entries[place.entry];
}

struct udd_run_entry *udd_runs_next(const struct udd_run_entry *run)
{
	struct udd_run_chunk *chunk = chunk_of(run);
	uint32_t next = (uint32_t)(run - chunk->entries) + 1;

	if (next < chunk->count)
		return &chunk->entries[next];
	return chunk->next ? chunk->next->entries : NULL;
}

uint64_t udd_runs_pages(const struct udd_runs *runs, struct udd_span span)
{
	uint64_t pages = 0;

	for (const struct udd_run_entry *run = udd_runs_first(runs, span); run; run = udd_runs_next_in(run, span))
		pages += run->pages;
	return pages;
}

int udd_runs_reserve(struct udd_runs *runs, uint64_t total)
{
	// Two neighbours hold at least MERGE_BELOW runs together; two more are for the middle of an insertion.
	uint64_t wanted = 2 * (total / MERGE_BELOW + 1) + 2;
	long ret;

	if (wanted <= runs->capacity)
		return 0;
	wanted = (wanted + GROWTH - 1) / GROWTH * GROWTH;
	if (wanted > runs->limit)
		return -ENOMEM;
	ret = udd_sys(SYS_mprotect, runs->chunks, udd_bytes(wanted), PROT_READ | PROT_WRITE);
	if (udd_failed(ret))
		return (int)ret;
	runs->capacity = (uint32_t)wanted;
	return 0;
}

static void link_chunks(struct udd_runs *runs, uint32_t from)
{
	for (uint32_t i = from ? from - 1 : 0; i <= from && i < runs->used; i++)
		runs->directory[i]->next = i + 1 < runs->used ? runs->directory[i + 1] : NULL;
}

static struct udd_run_chunk *add_chunk(struct udd_runs *runs, uint32_t at)
{
	struct udd_run_chunk *chunk = runs->free;

	if (chunk)
		runs->free = chunk->next;
	else
		chunk = pool_chunk(runs, runs->touched++);
	chunk->count = 0;
	memmove(&runs->directory[at + 1], &runs->directory[at], (runs->used - at) * sizeof(*runs->directory));
	runs->directory[at] = chunk;
	runs->used++;
	link_chunks(runs, at);
	return chunk;
}

static void remove_chunk(struct udd_runs *runs, uint32_t at)
{
	struct udd_run_chunk *chunk = runs->directory[at];

	runs->used--;
	memmove(&runs->directory[at], &runs->directory[at + 1], (runs->used - at) * sizeof(*runs->directory));
	link_chunks(runs, at);
	chunk->next = runs->free;
	runs->free = chunk;
}

static void move_entries(struct udd_run_entry *to, const struct udd_run_entry *from, uint32_t count)
{
	memmove(to, from, count * sizeof(*to));
}

// Puts a run at a place, without joining.
static void put(struct udd_runs *runs, struct place place, const struct udd_run_entry *run)
{
	struct udd_run_chunk *chunk = runs->used ? runs->directory[place.chunk] : add_chunk(runs, 0);

	if (chunk->count == UDD_CHUNK_RUNS) {
		// Runs mostly come in ascending order: a full last chunk stays full.
		uint32_t half = place.entry == UDD_CHUNK_RUNS ? UDD_CHUNK_RUNS : UDD_CHUNK_RUNS / 2;
		struct udd_run_chunk *second = add_chunk(runs, place.chunk + 1);

		second->count = UDD_CHUNK_RUNS - half;
		move_entries(second->entries, &chunk->entries[half], second->count);
		chunk->count = half;
		if (place.entry >= half) {
			place.entry -= half;
			chunk = second;
		}
	}
	move_entries(&chunk->entries[place.entry + 1], &chunk->entries[place.entry], chunk->count - place.entry);
	chunk->entries[place.entry] = *run;
	chunk->count++;
	runs->count++;
}

// Joins the chunk with the next one, if both are nearly empty.
static void join_chunks(struct udd_runs *runs, uint32_t at)
{
	struct udd_run_chunk *chunk;
	struct udd_run_chunk *next;

	if (at + 1 >= runs->used)
		return;
	chunk = runs->directory[at];
	next = runs->directory[at + 1];
	if (chunk->count + next->count >= MERGE_BELOW)
		return;
	move_entries(&chunk->entries[chunk->count], next->entries, next->count);
	chunk->count += next->count;
	remove_chunk(runs, at + 1);
}

// Takes `count` runs of one chunk out.
static void take(struct udd_runs *runs, struct place place, uint32_t count)
{
	struct udd_run_chunk *chunk = runs->directory[place.chunk];

	chunk->count -= count;
	runs->count -= count;
	move_entries(&chunk->entries[place.entry], &chunk->entries[place.entry + count], chunk->count - place.entry);
	if (!chunk->count) {
		remove_chunk(runs, place.chunk);
	} else {
		join_chunks(runs, place.chunk);
	}
	if (place.chunk)
		join_chunks(runs, place.chunk - 1);
}

static bool follows(const struct udd_run_entry *a, const struct udd_run_entry *b)
{
	return end_of(a) == b->address && a->segment == b->segment && a->attributes == b->attributes &&
	       a->protection == b->protection && a->broken == b->broken && a->armed == b->armed && a->file == b->file &&
	       a->slot + a->pages == b->slot;
}

void udd_runs_insert(struct udd_runs *runs, const struct udd_run_entry *run)
{
	struct place place = locate(runs, run->address);
	struct udd_run_entry *next = udd_runs_find(runs, run->address);
	// The run that ends at this address, if there is one.
	struct udd_run_entry *previous = udd_runs_find(runs, run->address - 1);

	if (previous && previous != next && follows(previous, run)) {
		previous->pages += run->pages;
		if (next && follows(previous, next)) {
			previous->pages += next->pages;
			take(runs, place, 1);
		}
		return;
	}
	if (next && follows(run, next)) {
		next->address = run->address;
		next->slot = run->slot;
		next->pages += run->pages;
		return;
	}
	put(runs, place, run);
}

static void split_at(struct udd_runs *runs, uint64_t address)
{
	struct udd_run_entry *run = udd_runs_find(runs, address);
	struct udd_run_entry tail;
	uint32_t head;

	if (!run || run->address >= address)
		return;
	head = (uint32_t)udd_pages(address - run->address);
	tail = *run;
	tail.address = address;
	tail.slot += head;
	tail.pages -= head;
	run->pages = head;
	put(runs, locate(runs, address), &tail);
}

void udd_runs_split(struct udd_runs *runs, struct udd_span span)
{
	split_at(runs, span.start);
	split_at(runs, span.end);
}

void udd_runs_remove(struct udd_runs *runs, struct udd_span span)
{
	while (udd_runs_overlap(runs, span)) {
		struct place place = locate(runs, span.start);
		const struct udd_run_chunk *chunk = runs->directory[place.chunk];
		uint32_t count = 0;

		while (place.entry + count < chunk->count && chunk->entries[place.entry + count].address < span.end)
			count++;
		take(runs, place, count);
	}
}
