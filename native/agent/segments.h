// SPDX-License-Identifier: MIT
// The store segments that this process has: a read-only mapping of each, to compare with, and its descriptor, to map from.
// A segment is taken only if it is sealed and read-only, so that its pages can never change. The worker only.
//
// Segments of an engine that is gone are *foreign*: their runs stay merged, nothing more merges with them. The next engine may
// take them over; it then gives them a number of its own.
#ifndef UDD_SEGMENTS_H
#define UDD_SEGMENTS_H

#include <stdint.h>

#include "agent.h"

// Index in udd_agent.segments of a segment of the present engine, or -ENOENT.
int udd_segment_find(uint32_t id);
// Takes a segment of the present engine into use, or knows it again: by its number, or as a foreign one by its memfd. The
// descriptor is ours if that succeeds. 0, or 1 if it was a foreign one, or a negative errno.
int udd_segment_add(uint32_t id, uint32_t slots, int fd);
// Index of the first foreign segment from `from` on that runs refer to, or -ENOENT. Those that nothing refers to are let go of.
int udd_segment_next_foreign(uint32_t from);
// Lets go of it. -EBUSY while runs of it are left.
int udd_segment_remove(uint32_t id);

#endif
