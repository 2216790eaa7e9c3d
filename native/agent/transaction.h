// SPDX-License-Identifier: MIT
// The transactions that merge memory, and undo it. See transaction.c for how it works and why it is safe.
// The worker only, unless said otherwise; each takes the map lock exclusively for a moment.
#ifndef UDD_TRANSACTION_H
#define UDD_TRANSACTION_H

#include <stdbool.h>
#include <stdint.h>

#include "agent.h"

// Merges `run->pages` (≤ UDD_RUN_MAX) pages with the store's. Every page ends in one mask of `ret`.
void udd_merge(const struct udd_run *run, struct udd_merge_result *ret);
// Gives all-zero pages of `span` (at most UDD_RUN_MAX pages) to the kernel's zero page. Returns a bit mask of those that are.
uint64_t udd_merge_zero(struct udd_span span);
// Makes what is merged inside `span` private again. Returns the number of pages.
uint64_t udd_unmerge(struct udd_span span);
// Write-protects merged runs that are not (after a fork, or a move). Returns false if the lock was not to be had.
bool udd_arm_runs(void);
// Empties the staging area.
int udd_staging_reset(void);
// Is this address in the staging area? Then someone populates it, and udd_staging_populate() lets it be.
bool udd_staging_holds(uint64_t address);
int udd_staging_populate(uint64_t page);

// The fault thread: notes that pages broke; they are left alone for a while.
void udd_hold_off(struct udd_span span);
// Whoever holds the map lock exclusively and has the agent's descriptors: as much of the beginning of `span` as really is what
// the table says, the store's and protected. Whoever unmaps past the hooks leaves a table that lies; the kernel's page table
// doesn't. To be asked before merged pages are replaced.
struct udd_span udd_still_merged(struct udd_span span);

// Bit i: page i of `span` (at most UDD_RUN_MAX pages) is a private copy, not a page of the mapped file. 0 or a negative errno.
int udd_private_copies(struct udd_span span, uint64_t *ret);

// The longest time the worker held the map lock is kept in the statistics; this is the shared prologue and epilogue.
bool udd_worker_lock(uint64_t *started);
void udd_worker_unlock(uint64_t started);
// For what must be done: tries again and again, and lets the application's threads pass in between.
void udd_worker_lock_patiently(uint64_t *started);

// Dawdles, when a test asked for it: a step of a transaction is over.
void udd_test_step(void);

#endif
