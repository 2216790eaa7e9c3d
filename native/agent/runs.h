// SPDX-License-Identifier: MIT
// The table of merged runs: which addresses of this process are mapped to which store slots. Sorted by address; runs never
// overlap. A run may be `broken`: its pages are private copies made by the kernel inside the mapping of a store segment
// (they broke while no agent watched, as in a fork child). It refers to no slot any more, but the table must remember it,
// because MADV_DONTNEED there would bring back the store's bytes instead of zeros.
//
// Kept in chunks of one page each, with a directory of their first addresses: tens of thousands of lone pages are common,
// and they come and go one at a time. Two neighbouring chunks are never both nearly empty, which bounds their number.
//
// Does no locking: readers hold the map lock shared or exclusively, writers exclusively.
#ifndef UDD_RUNS_H
#define UDD_RUNS_H

#include <stdbool.h>
#include <stdint.h>

#include "util.h"

// Attributes of an application's mapping that a new mapping in its place must get again.
enum udd_attribute {
	UDD_ATTRIBUTE_DONTFORK = 1,
	UDD_ATTRIBUTE_DONTDUMP = 2,
	UDD_ATTRIBUTE_MERGEABLE = 4,
	UDD_ATTRIBUTE_HUGEPAGE = 8,
	UDD_ATTRIBUTE_NOHUGEPAGE = 16,
	UDD_ATTRIBUTE_LOCKED = 32, // merged memory that was locked later: it breaks in place, a new mapping would not be locked
};

struct udd_run_entry {
	uint64_t address;
	uint32_t pages;
	uint32_t slot;      // of the first page
	uint16_t segment;   // index into udd_agent.segments
	uint8_t attributes; // enum udd_attribute
	uint8_t protection; // PROT_*
	uint8_t broken;     // 1: private copies in a store mapping, see above
	uint8_t armed;      // 1: write-protected by userfaultfd; 0: the kernel breaks it by itself (fork child, after mremap, storm)
	uint16_t file;      // in the place of a file's pages: which mapping of a file, index in udd_agent.files + 1; 0: of anonymous ones
};

enum {
	UDD_CHUNK_RUNS = (UDD_PAGE_SIZE - 16) / sizeof(struct udd_run_entry),
};

// One page, so that the chunk of an entry is found from its address.
struct udd_run_chunk {
	struct udd_run_chunk *next; // in order of address, or in the list of free chunks
	uint32_t count;
	uint32_t reserved;
	struct udd_run_entry entries[UDD_CHUNK_RUNS];
};

struct udd_runs {
	struct udd_run_chunk *chunks;     // the pool; the reservation has room for `limit`
	struct udd_run_chunk **directory; // in order of address
	struct udd_run_chunk *free;
	uint32_t count;    // runs
	uint32_t used;     // chunks in the directory
	uint32_t touched;  // chunks of the pool that were ever used
	uint32_t capacity; // chunks of the pool that are backed by memory
	uint32_t limit;
};

static inline struct udd_span udd_run_span(const struct udd_run_entry *run)
{
	return (struct udd_span){.start = run->address, .end = run->address + udd_bytes(run->pages)};
}

// The first run that ends behind `address`; NULL if there is none. Valid until the table changes.
struct udd_run_entry *udd_runs_find(const struct udd_runs *runs, uint64_t address);
// The run behind `run`; NULL after the last.
struct udd_run_entry *udd_runs_next(const struct udd_run_entry *run);

// The first run that shares an address with `span`, or NULL.
static inline struct udd_run_entry *udd_runs_first(const struct udd_runs *runs, struct udd_span span)
{
	struct udd_run_entry *run = runs->count ? udd_runs_find(runs, span.start) : NULL;

	return run && run->address < span.end ? run : NULL;
}

// The next run that shares an address with `span`, or NULL.
static inline struct udd_run_entry *udd_runs_next_in(const struct udd_run_entry *run, struct udd_span span)
{
	struct udd_run_entry *next = udd_runs_next(run);

	return next && next->address < span.end ? next : NULL;
}

static inline bool udd_runs_overlap(const struct udd_runs *runs, struct udd_span span)
{
	return !udd_span_empty(span) && udd_runs_first(runs, span);
}

// Pages of the runs that share an address with `span`.
uint64_t udd_runs_pages(const struct udd_runs *runs, struct udd_span span);
// Room for `total` runs, however they come and go; -ENOMEM if there can't be.
int udd_runs_reserve(struct udd_runs *runs, uint64_t total);
// Adds a run where none is, joining neighbours.
void udd_runs_insert(struct udd_runs *runs, const struct udd_run_entry *run);
// Makes `span` end on run borders, so that the runs inside can be treated whole. Up to two runs more.
void udd_runs_split(struct udd_runs *runs, struct udd_span span);
// Takes out what lies inside `span`, which must end on run borders or in no run.
void udd_runs_remove(struct udd_runs *runs, struct udd_span span);

#endif
