// SPDX-License-Identifier: MIT
// Which memory of the process may be merged: private, anonymous, writable mappings with no property that a mapping of the
// store could not have, and those of files that files.h knows. Read from /proc/self/smaps (for the attributes); between two readings, hooks note what changed
// (struct udd_stale), and what changed is no candidate until the next reading. So an entry says what the mapping *is*, as
// far as the process goes through libc; the kernel refuses the rest (see transaction.c).
//
// Merged memory is in it too, marked: what is written to becomes plain memory again between two readings, and new content is often
// hinted right then. A look there finds only what has become so, and a merge what the table of runs does not have.
//
// Left out: thread stacks (told by MAP_STACK), the main stack, the agent's own memory, locked, wiped-on-fork, growing,
// protection-keyed or otherwise registered memory, and .bss, which the dynamic linker unmaps past our hooks.
#ifndef UDD_LAYOUT_H
#define UDD_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "files.h"
#include "util.h"

enum {
	UDD_LAYOUT_MAX = 131072, // mappings remembered
	UDD_STACKS_MAX = 1024,   // thread stacks remembered
};

struct udd_candidate {
	uint64_t start;
	uint64_t end;
	uint16_t attributes; // enum udd_attribute
	uint16_t file;       // index in udd_agent.files + 1, if it is a mapping of a file that nobody can write to; else 0
	uint16_t stale;      // 1: changed since
	uint16_t merged;     // 1: a mapping of the store when smaps was read, no page of it written to
};

// A mapping of a file that may be merged, as was known before smaps was read.
struct udd_layout_file {
	struct udd_span span;
	uint64_t device;
	uint64_t inode;
	uint16_t number; // index in udd_agent.files + 1
	uint16_t protection; // PROT_*
	bool shared;
};

enum udd_stale_kind {
	UDD_STALE_CHANGED, // mapped, unmapped, protected, advised
	UDD_STALE_STACK,   // a thread stack was mapped here
};

struct udd_stale {
	uint64_t start;
	uint64_t end;  // written last; 0: not written yet
	uint64_t kind; // enum udd_stale_kind
};

struct udd_layout {
	struct udd_candidate *candidates; // sorted
	uint32_t count;
	uint32_t stale;       // changes taken in since
	uint32_t mappings;    // of the whole process, at the last reading
	uint32_t runs;        // merged runs there were then
	uint64_t read_at;     // ns, CLOCK_MONOTONIC
	uint64_t read_cost;   // ns of CPU
	uint64_t present;     // bytes present in candidates and merged runs, at the last reading
	int smaps_fd;         // -1 until the worker opened it
	char *buffer;         // UDD_LAYOUT_BUFFER bytes
	struct udd_layout_file files[UDD_FILES_MAX]; // sorted
	uint32_t file_count;
	struct udd_span stacks[UDD_STACKS_MAX];
	uint32_t stack_count;
	uint32_t stack_next; // which to forget when full
};

enum { UDD_LAYOUT_BUFFER = 65536 };

// Takes over what is known of mappings of files (files.h); to be done under the map lock, before a reading.
void udd_layout_note_files(struct udd_layout *layout);
// Reads the layout anew. 0 or a negative errno, in which case there are no candidates.
int udd_layout_read(struct udd_layout *layout, struct udd_span own);
// Notes a change in one of UDD_STALE_SLOTS slots, unless one of the last few notes says the same: programs map and unmap at the
// same few addresses again and again. Many may do so at once; nobody else looks meanwhile. Once the slots are full, the count
// exceeds them.
void udd_stale_note(struct udd_stale *stale, uint32_t *count, struct udd_span span, enum udd_stale_kind kind);
// Takes in what changed, and empties the slots; everything is stale if they were full.
void udd_layout_apply(struct udd_layout *layout, struct udd_stale *stale, uint32_t *count);
// The candidate that holds `address`, or the next one behind it; NULL if there is none.
struct udd_candidate *udd_layout_find(const struct udd_layout *layout, uint64_t address);

#endif
