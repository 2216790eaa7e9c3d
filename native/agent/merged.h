// SPDX-License-Identifier: MIT
// Merged memory: the table of runs together with the mappings it stands for, and giving memory back. For any thread that
// holds the map lock exclusively; nothing here needs a descriptor, so hooks use it on the application's threads.
#ifndef UDD_MERGED_H
#define UDD_MERGED_H

#include <stdbool.h>
#include <stdint.h>

#include "agent.h"

static inline struct udd_segment_map *udd_segment_of(const struct udd_run_entry *run)
{
	return &udd_agent.segments[run->segment];
}

// The store's copy of a run's first page.
static inline const char *udd_store_page(const struct udd_run_entry *run)
{
	return udd_segment_of(run)->pages + udd_bytes(run->slot);
}

static inline bool udd_merged_in(struct udd_span span)
{
	return udd_runs_overlap(&udd_agent.runs, span);
}

// Room in the table for `more` pages to be merged. 0 or -ENOMEM.
int udd_reserve_runs(uint32_t more);
// The first of the runs inside a span, split at its ends, or NULL; the others follow by udd_runs_next_in().
struct udd_run_entry *udd_first_run(struct udd_span span);
void udd_insert_run(const struct udd_run_entry *run);
// Takes the runs of `span`, which ends on run borders, out of the table. References are the caller's business.
void udd_remove_runs(struct udd_span span);
// Lets go of the store's pages that a run refers to, and tells the engine; the run itself stays. `reason` as below.
void udd_release_run(const struct udd_run_entry *run, uint32_t reason);
// Statistics: what the table says of runs, and merged pages that came or went.
void udd_publish_runs(void);
void udd_count_merged(int64_t pages);
// Statistics: pages that broke, at write faults that were served (0: the kernel broke them by itself).
void udd_count_breaks(uint64_t pages, uint64_t events);

// Replaces merged pages of `span` by private anonymous copies, at most UDD_STAGING_PAGES of them. `reason` is 0 or
// UDD_DROP_BREAK. 0 or a negative errno, and then some may be left as they were.
int udd_dissolve(struct udd_span span, uint32_t reason);
// How far from `run` on (or from the start of `span`, if that is inside) merged pages of `span` can be dissolved in one
// piece: they follow each other and are alike, wherever in the store they are. Empty if those of `run` can't be at all.
struct udd_span udd_dissolvable(const struct udd_run_entry *run, struct udd_span span);
// Replaces merged pages of `span` by fresh anonymous memory, which reads as zeros. 0 or a negative errno.
int udd_discard(struct udd_span span);
// Maps fresh anonymous memory at `span`, with the protection and attributes of `run`. 0 or a negative errno.
int udd_map_like(const struct udd_run_entry *run, struct udd_span span);
// Gives the new mapping at `span` the attributes (enum udd_attribute) that the application's old one had.
void udd_restore_attributes(struct udd_span span, uint32_t attributes);
// The mappings of `span` are gone, or about to be replaced: forgets the runs.
void udd_forget(struct udd_span span);
// The pages of `span` broke in place.
void udd_broke_in_place(struct udd_span span);
// Moves the run entries of `from` to `to` (the mappings were moved already).
void udd_readdress(struct udd_span from, uint64_t to);
// In a fork child, which has no other thread yet: what the fork changed about merged memory.
void udd_runs_forked(void);
// Enters into the table what happened while the lock was not to be had exclusively (live->unsettled), and gives removed pages
// fresh memory. First thing for everyone who takes the lock exclusively.
void udd_settle(void);

#endif
