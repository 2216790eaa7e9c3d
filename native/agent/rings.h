// SPDX-License-Identifier: MIT
// The shared rings, agent's side: place hints from application threads, dropped references from whoever holds the map lock.
#ifndef UDD_RINGS_H
#define UDD_RINGS_H

#include "agent.h"

// Where a hint's content comes from, as far as it is known.
struct udd_source {
	uint64_t inode;  // 0: unknown
	uint64_t offset; // UINT64_MAX: unknown
	bool on_mount;
};

// Pushes a hint for the whole pages inside [address, address + length). No system call, unless the engine asked to be rung.
void udd_hint_push(const void *address, uint64_t length, uint32_t flags, const struct udd_source *source);
// Records that the process let go of the store's pages behind `run`. Under the map lock, one at a time.
void udd_drop_push(const struct udd_run_entry *run, const struct udd_segment_map *segment, uint32_t flags);

#endif
