// SPDX-License-Identifier: MIT
// The agent's state, in two halves that a fork tells apart.
//
// `struct udd_live` belongs to one process. It lies in memory that the kernel wipes in a fork child (MADV_WIPEONFORK), so
// a child, however it was made, starts with a free lock, no threads and no rings, and knows it by `live->started`.
// `struct udd_agent` is inherited: the merged runs stay merged in the child and keep their meaning there.
//
// All memory of both, and the stacks of the agent's threads, lie in one reservation (arena.h) that is never a candidate.
#ifndef UDD_AGENT_H
#define UDD_AGENT_H

#include <stdbool.h>

#include "../common/attach.h"
#include "../common/wire.h"
#include "files.h"
#include "layout.h"
#include "lock.h"
#include "marks.h"
#include "runs.h"
#include "util.h"

enum {
	UDD_SEGMENTS_MAX = 4096, // segments one process may hold at a time: 64 GiB of store
	UDD_HOLDOFF_SLOTS = 4096,
	UDD_FD_SLOTS = 1024,
	UDD_STALE_SLOTS = 512,
	UDD_STAGING_PAGES = 512,
	UDD_BLOCK_SLOTS = 256,
	UDD_UNSETTLED_SLOTS = 1024,
	UDD_PATH_MAX = 108,
};

// How the paths of engines' sockets begin that are in a directory of everybody's (udedup/places.py, and the folders that
// `udedup run` makes in there).
#define UDD_TEMPORARY "/tmp/udedup-"

// What the agent knows of a store segment. Written by the worker under the map lock held exclusively; never moves.
struct udd_segment_map {
	uint64_t engine_id[2]; // whose
	const char *pages;     // the agent's own read-only mapping; NULL: slot free
	uint32_t id;           // the engine's name for it
	uint32_t slots;        // how many pages it has
	uint64_t device;       // of its memfd, to tell it from another, as is
	uint64_t inode;
	uint32_t references;   // pages of runs that lie in it
	int fd;                // read-only, in the agent's descriptor table; -1 in a fork child until the engine sends it again
};

// Why a process that could be merged is not; what status shows.
enum udd_merging {
	UDD_MERGING_OFF = 0, // not joined yet, or no longer: see live->reason
	UDD_MERGING_ON = 1,
};

// What the worker is woken for.
enum udd_bell {
	UDD_BELL_SOCKET = 1, // the engine sent something, or is gone
	UDD_BELL_HINTS = 2,  // the engine asked to be told of hints
	UDD_BELL_ARM = 4,    // merged runs have lost their write protection
	UDD_BELL_LEAVE = 8,  // the program is to be left
};

// A descriptor of the application: what read() on it gives.
struct udd_fd {
	uint64_t inode;   // if on the udedup mount, else 0
	uint8_t kind;     // enum udd_fd_kind
	uint8_t uses;     // since it was looked at; looked at again when this wraps to 0
	uint8_t on_mount; // the file is on the udedup mount
};

// What happened to merged pages while the table was not the fault thread's to change.
struct udd_unsettled {
	struct udd_span span;
	bool removed; // dropped by a raw system call; else broken in place, and span is one page
};

struct udd_live {
	uint32_t started;     // 0 in a process that nobody set up yet: a fork child
	uint32_t merging;     // enum udd_merging; transactions are allowed
	uint32_t joined;      // futex: 1 joined, 2 refused or impossible (see reason), 0 not known yet
	uint32_t bell;        // futex: enum udd_bell bits for the worker
	int32_t uffd;         // + 1; 0 = none
	struct udd_lock lock; // the map lock
	struct udd_stats *stats;       // in the shared area, or `own_stats`
	struct udd_hint_ring *hints;   // in the shared area; NULL before joining
	struct udd_drop_ring *drops;   // likewise
	uint64_t reported;             // the engine counts the runs below this address, all of them from UDD_RUNS on. Under the map lock
	uint64_t mount_dev;            // st_dev of the udedup mount, 0: none. Set under the map lock held exclusively
	uint32_t mount_known;          // 1: mount_dev says what the engine said
	uint64_t holdoff_ns;           // how long a broken page is left alone
	uint64_t vma_limit;            // mappings the process may have
	int32_t fault_tid;             // the fault thread, for its CPU clock
	int32_t worker;                // the worker thread; 0: there is none
	struct udd_attach_live attach; // what `udedup attach` reads and writes
	struct {
		uint64_t next;         // address
		uint64_t pages;        // of the last break
	} breaking[4];                 // sequential writers: where each is expected next
	uint32_t breaking_next;        // which of them to replace
	uint32_t mapped;      // memory was mapped where there was none, since the layout was read
	uint64_t dissolves;           // breaks that may still dissolve a lone page, see fault.c
	uint64_t dissolves_at;        // ns: when that was last added to
	struct {
		uint64_t number;       // its pages' number / BLOCK_PAGES
		uint64_t breaks;       // lone ones
		uint64_t at;           // ns: the last
	} blocks[UDD_BLOCK_SLOTS];     // where lone breaks were lately, see fault.c
	uint32_t opened;               // blocks that the kernel breaks by itself for the time being
	uint64_t opened_at;            // ns: when the first of them was
	// Address ranges whose mapping or attributes changed since the layout was read. Appended under the map lock held
	// shared, emptied under it held exclusively.
	uint32_t stale_count;
	struct udd_stale stale[UDD_STALE_SLOTS];
	// What the table has to be told by the next who holds the lock exclusively. The fault thread appends, whoever holds the
	// lock; so these are a ring of one writer and one reader.
	uint32_t unsettled_head; // next to be read
	uint32_t unsettled_tail; // next to be written
	struct udd_unsettled unsettled[UDD_UNSETTLED_SLOTS];
	struct {
		uint64_t page; // page number
		uint64_t until; // ns
	} holdoff[UDD_HOLDOFF_SLOTS];
	struct udd_fd fds[UDD_FD_SLOTS];
	struct udd_stats own_stats; // before joining
};

struct udd_agent {
	struct udd_live *live;
	struct udd_span arena;     // the reservation
	char *worker_stack;        // lowest addresses; UDD_STACK_BYTES each
	char *fault_stack;
	char *tls;                 // one page per thread, in place of libc's thread control block
	char *staging;             // UDD_STAGING_PAGES, where frozen pages wait
	char *blank;               // UDD_STAGING_PAGES, where private copies are made (dissolve)
	char *trial;               // UDD_STAGING_PAGES, where it is tried whether there is memory (commit.h). Under the map lock.
	char *file_pages;          // UDD_RUN_MAX, copies of a file's pages to be compared. The worker's own.
	char *message;             // the worker's message buffers
	struct udd_runs runs;      // merged runs. Under the map lock.
	bool dissolved;            // merged memory became private again: mappings may be cut in several. Under the map lock.
	uint64_t run_pages;        // pages in all runs, broken ones too. Under the map lock.
	struct udd_file files[UDD_FILES_MAX]; // mappings of files. Under the map lock.
	uint32_t files_used;       // slots of it that were ever used
	uint64_t files_served;     // st_dev of the mount whose engine was there when last heard of; 0: none. Under the map lock.
	struct udd_layout layout;  // candidates. The worker's own.
	struct udd_marks marks;    // checksums of pages. The worker's own.
	struct udd_segment_map *segments; // UDD_SEGMENTS_MAX
	uint64_t engine_id[2];     // the engine joined last
	uint64_t hooks;            // bit set of installed hooks
	bool knows_handlers;       // the hook that learns of signal handlers is there
	bool has_handlers;         // there are some, or were. Under the map lock.
	uint64_t *test_counters;   // UDEDUP_TEST_COUNTERS, shared with whoever tests; else NULL
	bool keep_ksm;             // UDEDUP_KEEP_KSM: MADV_MERGEABLE goes to the kernel
	bool quiet;                // UDEDUP_QUIET_BREAKS, or the engine wants it: all breaks take the same time
	uint32_t test_delays;      // UDEDUP_TEST_DELAYS: transactions dawdle at every step
	char socket_path[UDD_PATH_MAX];
	char label[UDD_LABEL_MAX];
	char command[UDD_COMMAND_MAX];
	char reason[UDD_REASON_MAX]; // why this process cannot be merged at all, empty if it can
};

extern struct udd_agent udd_agent;

// Given by an engine before the present one.
static inline bool udd_segment_is_foreign(const struct udd_segment_map *segment)
{
	return segment->engine_id[0] != udd_agent.engine_id[0] || segment->engine_id[1] != udd_agent.engine_id[1];
}

static inline struct udd_live *udd_live(void)
{
	return udd_agent.live;
}

// Words of the file named by UDEDUP_TEST_COUNTERS.
enum udd_test_counter {
	UDD_TEST_MERGED,
	UDD_TEST_BROKEN,
	UDD_TEST_DISCARDED,
	UDD_TEST_COLLIDED,
	UDD_TEST_REFUSED,
	UDD_TEST_MISMATCH,
	UDD_TEST_ZERO,
	UDD_TEST_UNMAPPED,
	UDD_TEST_TRANSACTIONS,
	UDD_TEST_FOREIGN,
	UDD_TEST_OPENED,
};

static inline void udd_test_count(enum udd_test_counter counter, uint64_t n)
{
	if (udd_agent.test_counters && n)
		__atomic_add_fetch(&udd_agent.test_counters[counter], n, __ATOMIC_RELAXED);
}

// Sets the agent up in this process: reservation, tables, hooks. Once, from the constructor or udedup_join().
// Returns 0 or a negative errno; udd_agent.reason says what went wrong.
int udd_agent_init(const char *socket_path, const char *label);
// The same without hooks, and with what would be in the environment named by who asks for it.
int udd_agent_set_up(const struct udd_attach_request *wanted);
// Only who has claimed the agent sets it up, or changes what it is to do. False: another has. Never waits.
bool udd_agent_claim(void);
void udd_agent_unclaim(void);
// Which engine to join, and as what. 0 or a negative errno.
int udd_agent_choose(const struct udd_attach_request *wanted);
// A function without which there is no merging could not be hooked.
void udd_agent_say_unhooked(const char *function);
// Nothing is merged, and the functions were not hooked for a while: forgets what the hooks have told of the process.
void udd_agent_forget(void);
// Starts the agent's threads in this process.
int udd_agent_start(void);
// In a fork child, before anything else of the agent runs there.
void udd_agent_forked(void);
// Wakes the worker for something; any thread.
void udd_ring(enum udd_bell bell);
// No transaction in this process from now on, and why.
void udd_stop_merging(const char *reason);

#endif
