// SPDX-License-Identifier: MIT
// The store segments that this process has: a read-only mapping of each, to compare with, and its descriptor, to map from.
// A segment is taken only if it is sealed and read-only, so that its pages can never change. The worker only.
#ifndef UDD_SEGMENTS_H
#define UDD_SEGMENTS_H

#include <stdint.h>

#include "agent.h"

// Index in udd_agent.segments, or -ENOENT.
int udd_segment_find(const uint64_t engine_id[2], uint32_t id);
// Takes a segment into use: the descriptor is ours if that succeeds. 0 or a negative errno.
int udd_segment_add(const uint64_t engine_id[2], uint32_t id, uint32_t slots, int fd);
// Lets go of it. -EBUSY while runs of it are left.
int udd_segment_remove(const uint64_t engine_id[2], uint32_t id);

#endif
