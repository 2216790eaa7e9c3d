// SPDX-License-Identifier: MIT
// The engine's per-page loops, called from Python through cffi (udedup._native) on whole batches with the GIL released.
// Nothing here decides anything: policy is Python's. Python calls all of this from one thread at a time; the only concurrency
// is with agents writing to their shared areas, which is why those are read with care and never twice.
//
// Functions that can fail return a negative errno. -EPROTO means that an agent said something it can't have said in good
// faith: its caller drops that agent.
#ifndef UDD_ENGINE_H
#define UDD_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "../common/wire.h"

enum {
	// Agent numbers are 1 … UDD_AGENT_NUMBERS - 1: what fits beside a page number and a round stamp in 64 bits.
	UDD_AGENT_NUMBERS = 1048576,
	// Mappings of images that are remembered of one agent.
	UDD_MAPPINGS_MAX = 64,
	// Buckets of the lead time histogram: 4 per power of two nanoseconds.
	UDD_LEAD_BUCKETS = 256,
};

// Maps an agent's shared area (UDD_SHARED_BYTES). NULL if there is no memory for it. The descriptor is not needed any more.
void *udd_area_map(int descriptor);
void udd_area_unmap(void *area);
// How much of it is in memory, bytes.
size_t udd_area_resident(void *area);
// Gives back the memory of the copies, which read as zeros then. 0 or a negative errno.
int udd_area_drop_copies(void *area);
// Gives what malloc() keeps for later back to the system.
void udd_memory_trim(void);
// Has malloc() keep nothing for later of pieces of `least` bytes or more, as it would once some have been freed.
void udd_memory_buffers_go(size_t least);

// Digests of `count` consecutive 4096-byte pages; ret takes 2 × count words, low half first.
void udd_digest_pages(const void *pages, size_t count, uint64_t *ret);

// Enters those of `count` digests whose place in the table is empty: both words 0.
void udd_fill_digests(uint64_t *table, const void *digests, size_t count);

// ---- index.c: where is a page with this digest? ----

struct udd_index;

// A reported page that the index knows elsewhere.
struct udd_match {
	uint64_t address;   // of the reported page
	uint64_t digest[2];
	uint32_t other;     // number of the agent with the candidate; 0: a store slot has it
	uint32_t copy;      // slot of the copy area that has the reported page, + 1; 0: none
	uint64_t other_address; // of the candidate
};

struct udd_lookup_counts {
	uint64_t shared;     // match a store slot
	uint64_t candidates; // match another candidate
	uint64_t inserted;   // are candidates now
	uint64_t own;        // were candidates already
	uint64_t refused;    // not inserted: the agent's limit is reached
	uint64_t merged;     // reported as merged already
	uint64_t alone;      // match themselves
};

// What becomes of a page that is found nowhere else.
enum udd_alone {
	UDD_ALONE_CANDIDATE = 0, // it is a candidate
	UDD_ALONE_SHARE = 1,     // it is none, but matches itself (`other`: its own agent)
	UDD_ALONE_PARK = 2,      // it is a candidate, if the agent may have one more, and matches itself as well
};

struct udd_index *udd_index_create(void);
void udd_index_destroy(struct udd_index *index);
size_t udd_index_candidates(const struct udd_index *index);
size_t udd_index_shared(const struct udd_index *index);
size_t udd_index_bytes(const struct udd_index *index);

// Most candidates of an agent. Needed before its first report: an unknown agent's limit is 0.
int udd_index_set_limit(struct udd_index *index, uint32_t agent, uint32_t limit);
// Most candidates of all agents together; without a limit to begin with. Those above it stay.
void udd_index_set_most(struct udd_index *index, size_t candidates);
// Looks reports up, in order; a page found nowhere becomes a candidate at once. Returns the number of matches (≤ count).
int udd_index_lookup(struct udd_index *index, uint32_t agent, const struct udd_report *reports, size_t count,
		     enum udd_alone alone, struct udd_match *ret_matches, struct udd_lookup_counts *ret);
// Ends one round of an agent. Candidates not confirmed for two whole rounds of their agent are dropped by the next udd_index_age().
void udd_index_next_round(struct udd_index *index, uint32_t agent);
// Both return the number of candidates removed.
size_t udd_index_age(struct udd_index *index);
size_t udd_index_forget_agent(struct udd_index *index, uint32_t agent);
// Removes all candidates but parked ones and gives their memory back; returns how many they were.
size_t udd_index_forget_candidates(struct udd_index *index);
// Removes a candidate whose digest is `digest`; returns 1 and who it was, or 0.
int udd_index_take_candidate(struct udd_index *index, const uint64_t *digest, uint32_t *ret_agent, uint64_t *ret_address);

// A page was parked (see store.c). Nobody looks at it any more, so it is a candidate that does not age until it is unparked, which
// removes it. Both do nothing if the candidate with this digest is another page.
int udd_index_park(struct udd_index *index, const uint64_t *digest, uint32_t agent, uint64_t address);
void udd_index_unpark(struct udd_index *index, const uint64_t *digest, uint32_t agent, uint64_t address);

int udd_index_publish(struct udd_index *index, const uint64_t *digest, uint32_t segment, uint32_t slot);
// 1 and the place of the slot with this digest, or 0.
int udd_index_find_shared(const struct udd_index *index, const uint64_t *digest, uint32_t *ret_segment, uint32_t *ret_slot);
size_t udd_index_forget_segment(struct udd_index *index, uint32_t segment);

// ---- hints.c: the hint stack ----

struct udd_hints;

// A popped hint: one page.
struct udd_hinted {
	uint64_t address;
	uint64_t digest[2];   // 0, 0: not known, the agent must hash it
	uint64_t nanoseconds; // CLOCK_MONOTONIC when the content was in place
	uint32_t agent;
	uint32_t reserved;
};

// What of a hint is not on the stack yet.
struct udd_hint_part {
	uint64_t page;  // the next one, by number
	uint64_t end;
	uint64_t block; // of that page, in an image
	uint64_t nanoseconds;
	uint32_t image; // 0: none that is known
	uint32_t reserved;
};

// Where the engine is in an agent's hint ring. All zero at the start.
struct udd_hint_reader {
	uint64_t tail;
	struct udd_hint_part part; // of the hint before `tail`
	uint64_t stuck_since; // CLOCK_MONOTONIC ns: the slot at tail was seen half written then; 0: it was not
};

struct udd_drain_counts {
	uint64_t hints;   // taken from the ring
	uint64_t pages;   // whole pages they meant
	uint64_t dropped; // hints overwritten or malformed
	uint32_t armed;   // 1: `waiting` went from 0 to 1, so one doorbell may come
	uint32_t reserved;
};

struct udd_hints *udd_hints_create(uint32_t slots);
void udd_hints_destroy(struct udd_hints *hints);
uint32_t udd_hints_depth(const struct udd_hints *hints); // pages that can be popped
uint64_t udd_hints_overwritten(const struct udd_hints *hints); // cumulative pages that fell off a bottom
// `digests` (2 words a block of 4096 bytes, 0, 0 if not known yet) must live as long as the stack, or until the image is removed.
int udd_hints_add_image(struct udd_hints *hints, uint64_t inode, const uint64_t *digests, uint64_t blocks);
// Undoes that: nothing refers to the digests any more.
void udd_hints_remove_image(struct udd_hints *hints, uint64_t inode);
// Puts a hint on top. inode 0: not on the udedup mount. Returns the number of pages meant.
int64_t udd_hints_push(struct udd_hints *hints, uint32_t agent, uint64_t address, uint64_t length, uint64_t inode,
		       uint64_t offset, uint64_t nanoseconds);
// Blocks [block, block + blocks) of an image were read: hints on the pages where the agent has them mapped, as far as its last
// UDD_MAPPINGS_MAX hints of that kind say. Returns their number.
int64_t udd_hints_read(struct udd_hints *hints, uint32_t agent, uint64_t inode, uint64_t block, uint64_t blocks,
		       uint64_t nanoseconds);
// Takes up to `pages` pages from an agent's ring onto the stack; `arm`: ask for a doorbell once there is more. Returns 1 if
// something is left, 0 if not.
int udd_hints_drain(struct udd_hints *hints, uint32_t agent, struct udd_hint_ring *ring, struct udd_hint_reader *reader,
		    uint64_t pages, int arm, struct udd_drain_counts *ret);
// Whether a drain would find something.
int udd_hints_waiting(const struct udd_hint_ring *ring, const struct udd_hint_reader *reader);
// Takes up to `pages` pages, the newest of each agent and as many of each as of the others; sorted by agent, then address.
size_t udd_hints_pop(struct udd_hints *hints, size_t pages, struct udd_hinted *ret);
// Nothing of an agent is popped while it is held.
int udd_hints_hold(struct udd_hints *hints, uint32_t agent, int hold);
void udd_hints_forget_agent(struct udd_hints *hints, uint32_t agent);
// Forgets all hints and gives their memory back; returns how many they were.
uint32_t udd_hints_clear(struct udd_hints *hints);
// Length of the leading part of `hinted` that is one agent's.
size_t udd_hinted_group(const struct udd_hinted *hinted, size_t count);
// Splits one agent's hints into reports (digest known) and ranges (to be visited); both arrays have room for `count`.
void udd_hinted_split(const struct udd_hinted *hinted, size_t count, struct udd_report *ret_reports, size_t *ret_report_count,
		      struct udd_range *ret_ranges, size_t *ret_range_count);
// Adds to `histogram` (UDD_LEAD_BUCKETS) the age of each hint whose page was merged just now; returns their number.
size_t udd_hinted_leads(const struct udd_hinted *hinted, size_t hinted_count, const struct udd_run *runs,
			const struct udd_merge_result *results, size_t run_count, uint64_t now, uint64_t *histogram);

// ---- plan.c: which page goes where ----

// A page and the slot it is to be merged with.
struct udd_target {
	uint64_t address;
	uint32_t agent;
	uint32_t segment;
	uint32_t slot;
	uint32_t reserved;
};

// A page on its way into the store.
struct udd_fresh {
	uint64_t address;
	uint64_t digest[2];
	uint32_t copy; // slot of the copy area that has it, + 1; 0: none
	uint32_t reserved;
};

void udd_matches_sort(struct udd_match *matches, size_t count);
// Those of `agent` that match more than themselves; ret has room for `count`. Returns their number.
size_t udd_matches_without_alone(uint32_t agent, const struct udd_match *matches, size_t count, struct udd_match *ret);
// Takes out the pages of one agent's targets; both are sorted by address. Returns how many matches are left.
size_t udd_matches_without(struct udd_match *matches, size_t count, const struct udd_target *targets, size_t target_count);
// The next (up to UDD_COPY_MAX) pages, from *position on, whose digest no slot has yet, each digest once. Pages in stretches of
// fewer than `least` pages are passed over. `matches` is sorted by address. With `copied`, only pages that the copy area has.
size_t udd_plan_fresh(const struct udd_index *index, const struct udd_match *matches, size_t count, uint32_t least, int copied,
		      size_t *position, struct udd_fresh *ret);
// As ranges for UDD_COPY, in the same order; ret has room for `count`. Returns the number of ranges.
size_t udd_plan_copy(const struct udd_fresh *fresh, size_t count, struct udd_range *ret);
// Takes in the answer to that UDD_COPY (UDD_COPY_WORDS words): where the pages are in the copy area now.
void udd_plan_copied(struct udd_fresh *fresh, size_t count, const uint64_t *valid);
// Targets of those matches whose digest has a slot by now.
size_t udd_plan_targets(const struct udd_index *index, uint32_t agent, const struct udd_match *matches, size_t count,
			struct udd_target *ret);
void udd_targets_sort(struct udd_target *targets, size_t count); // by agent, then address
// Length of the leading part of `targets` that is one agent's.
size_t udd_target_group(const struct udd_target *targets, size_t count);
// One agent's sorted targets as runs of at most UDD_RUN_MAX pages; stretches of fewer than `least` pages are left out and counted.
size_t udd_plan_runs(const struct udd_target *targets, size_t count, uint32_t least, struct udd_run *ret, uint64_t *ret_deferred);
// The matches of `agent` whose page is in none of `runs`, as if they matched themselves; both are sorted by address, ret has room
// for `count`. Returns their number.
size_t udd_matches_outside(uint32_t agent, const struct udd_match *matches, size_t count, const struct udd_run *runs,
			   size_t run_count, struct udd_match *ret);
void udd_runs_sort(struct udd_run *runs, size_t count); // by address
// Distinct segments of runs; returns how many there are, of which at most `max` are written.
size_t udd_run_segments(const struct udd_run *runs, size_t count, uint32_t *ret, size_t max);

// ---- huge.c: pages by the transparent huge page they may lie in ----

// Some pages of one huge page's worth of memory.
struct udd_huge_area {
	uint64_t address;  // 2 MiB aligned
	uint64_t pages[8]; // UDD_HUGE_WORDS words, a bit for each page
};

// `items`: structs of `bytes` bytes that begin with a page's address (struct udd_match, struct udd_target). Groups those that
// follow each other and lie in one area; ret has room for `count`. Returns the number of areas.
size_t udd_huge_areas(const void *items, size_t bytes, size_t count, struct udd_huge_area *ret);
// Likewise, of the zero pages among reports.
size_t udd_huge_zeros(const struct udd_report *reports, size_t count, struct udd_huge_area *ret);
// The candidates (as targets without a slot) of those matches that lie in one of `areas` (addresses); both are sorted. Returns
// their number.
size_t udd_huge_others(const struct udd_match *matches, size_t count, const uint64_t *areas, size_t area_count,
		       struct udd_target *ret);
// Takes out the items that lie in one of `areas` (addresses); both are sorted. Returns how many items are left.
size_t udd_huge_without(void *items, size_t bytes, size_t count, const uint64_t *areas, size_t area_count);

// ---- store.c: slots and who refers to them ----

struct udd_store;
struct udd_holder; // one agent's references into a store

struct udd_segment_state {
	uint32_t used; // slots written
	uint32_t live; // of them: referred to
	uint64_t references;
};

struct udd_publish_counts {
	uint64_t written;  // slots
	uint64_t invalid;  // the agent could not copy the page
	uint64_t mismatch; // the copy has another digest than expected
};

struct udd_merge_counts {
	uint64_t merged;
	uint64_t mismatch;
	uint64_t busy;
	uint64_t gone;
	uint64_t no_vma;
	uint64_t runs; // with at least one page merged
};

struct udd_drop_counts {
	uint64_t pages;
	uint64_t broken; // of them: written to
};

// Where a slot of a retiring segment went; segment 0: it was dead.
struct udd_move {
	uint32_t segment;
	uint32_t slot;
};

struct udd_store *udd_store_create(void);
void udd_store_destroy(struct udd_store *store); // its memory goes with the last of its holders
// `base`: the engine's own writable mapping of the segment.
int udd_store_add_segment(struct udd_store *store, uint32_t segment, void *base);
// An empty segment is for this agent's parked pages, and nobody else is given it.
int udd_store_own_segment(struct udd_store *store, uint32_t segment, uint32_t agent);
// Digests, 2 words each, of all slots of an earlier engine's segment, which nobody can write to any more; 0, 0 for those that are
// all zero. Returns the number of slots up to the last that is not. Touches nothing else: the one function for any thread.
int udd_segment_digests(int descriptor, uint64_t *ret);
// Adds such a segment: its slots are published, but for those whose content the index has elsewhere. `base` is only read from.
int udd_store_adopt_segment(struct udd_store *store, struct udd_index *index, uint32_t segment, void *base, uint32_t used,
			    const uint64_t *digests);
// -EBUSY while slots are referred to.
int udd_store_remove_segment(struct udd_store *store, uint32_t segment);
int udd_store_segment(const struct udd_store *store, uint32_t segment, struct udd_segment_state *ret);
// Copies pages from a copy area into the next slots of a segment, hashes each slot, and publishes those with the expected digest.
// Starts at fresh[*position] and stops early when the segment is full. -ENOMEM: no memory for more slots. Candidates with the same
// digest come back as targets (room for `count`); returns their number.
int udd_store_publish(struct udd_store *store, struct udd_index *index, uint32_t segment, const void *copy_area,
		      const struct udd_fresh *fresh, size_t count, size_t *position, struct udd_target *ret_targets,
		      struct udd_publish_counts *ret);
// Moves live slots of one segment, from *position on: to where the index has their content, else to fresh slots of
// another segment until that is full. Those that `moves` has a place for are passed over. -ENOMEM: no memory for more.
int udd_store_move(struct udd_store *store, struct udd_index *index, uint32_t from, uint32_t to, uint32_t *position,
		   struct udd_move *moves);
// Targets on the new places of those pages of runs that are in segment `from`; ret has room for all pages, at most `max`.
size_t udd_plan_moves(uint32_t agent, const struct udd_run *runs, size_t count, uint32_t from, const struct udd_move *moves,
		      struct udd_target *ret, size_t max);

// One more user of the store, who ends with udd_store_destroy(). Returns it.
struct udd_store *udd_store_keep(struct udd_store *store);
// The segments' memory is about to go: nothing is found in them any more.
void udd_store_close(struct udd_store *store);
// The page in a slot, valid until its segment is removed or the store closed; NULL: there is none.
const char *udd_store_slot(const struct udd_store *store, uint32_t segment, uint32_t slot);

struct udd_holder *udd_holder_create(struct udd_store *store);
void udd_holder_destroy(struct udd_holder *holder); // gives all its references back
// Whose it is, and who is to be told when its parked pages are none any more; `index` must live until it is cleared for good.
void udd_holder_tell(struct udd_holder *holder, struct udd_index *index, uint32_t agent);
// Tells it of the pages that are parked: of runs that were taken (an answer to UDD_MERGE) or adopted (`results`: NULL), those that are
// so still.
int udd_holder_park(struct udd_holder *holder, const struct udd_run *runs, const struct udd_merge_result *results, size_t count);
void udd_holder_clear(struct udd_holder *holder);
uint64_t udd_holder_pages(const struct udd_holder *holder);
uint64_t udd_holder_segment_pages(const struct udd_holder *holder, uint32_t segment);
// Takes references for the pages that an answer to UDD_MERGE says are merged.
int udd_holder_take(struct udd_holder *holder, const struct udd_run *runs, const struct udd_merge_result *results, size_t count,
		    struct udd_merge_counts *ret);
// Takes references for runs an agent has already. Segments that are no more are passed over.
int udd_holder_adopt(struct udd_holder *holder, const struct udd_run *runs, size_t count);
// Empties an agent's drop ring. Segments that are no more are passed over; `newest`: highest segment number ever given out.
int udd_holder_drain(struct udd_holder *holder, struct udd_drop_ring *ring, uint32_t newest, struct udd_drop_counts *ret);
// Begins a new count: no references, and what is in the drop ring before `head` is void.
int udd_holder_restart(struct udd_holder *holder, struct udd_drop_ring *ring, uint64_t head);

// ---- smaps.c: what the kernel says ----

struct udd_smaps {
	uint64_t merged_rss;       // bytes, over private mappings of store segments, which are merged runs
	uint64_t merged_anonymous; // of them: copied on write
	uint64_t store_pss;        // bytes, over all mappings of store segments
	uint64_t mappings;
	uint64_t pss;              // bytes, over all mappings
};

// Sums up an open /proc/PID/smaps.
int udd_smaps_read(int fd, struct udd_smaps *ret);

// ---- shelf.c: which blocks of an image can be had from the store ----

struct udd_watch; // an image's files, and whether they have changed
struct udd_shelf; // an image's blocks that are in one store

enum {
	// Stretches of a read that the store does not have, more than which make it a read of the files.
	UDD_GAPS_MAX = 16,
};

struct udd_gap {
	uint32_t start; // byte of the read
	uint32_t end;
};

struct udd_taken {
	const char *data; // the bytes, or the buffer
	uint64_t epoch;   // in which the image has them
	struct udd_gap gaps[UDD_GAPS_MAX];
};

struct udd_put_counts {
	uint64_t entered;   // blocks that were not there before
	uint64_t differing; // blocks with another content than the slot with their digest
};

// Descriptors stay the caller's. Files that changed less than `settle_ns` ago are not relied on yet. NULL: no memory.
struct udd_watch *udd_watch_create(const int *descriptors, uint32_t count, uint64_t settle_ns);
void udd_watch_destroy(struct udd_watch *watch);
// Between two calls that give the same number the files have not changed. 0: that can't be told.
uint64_t udd_watch_epoch(struct udd_watch *watch);

// NULL: no memory, or no addresses.
struct udd_shelf *udd_shelf_create(struct udd_store *store, uint64_t blocks);
void udd_shelf_destroy(struct udd_shelf *shelf);
// Finds [offset, offset + size) of the image, at most 1 MiB. Returns the number of gaps that are left in `buffer`, which has room
// for all; with 0 of them the bytes are at ret->data, valid as long as their segment. -ENOENT: nothing is there.
int udd_shelf_take(struct udd_shelf *shelf, struct udd_watch *watch, uint64_t offset, size_t size, char *buffer,
		   struct udd_taken *ret);
// A bit for each of up to 64 blocks that is on the shelf.
uint64_t udd_shelf_there(const struct udd_shelf *shelf, uint64_t first, uint32_t count);
// Likewise, of those too that may be on it once they have been compared.
uint64_t udd_shelf_nominees(const struct udd_shelf *shelf, const struct udd_index *index, const uint64_t *digests, uint64_t first,
			    uint32_t count);
// Compares blocks, whose content at `data` was read in `epoch`, with what the index has for their digests (two words for each block
// of the image), and enters those that are equal. Returns how many of them are on the shelf now.
uint32_t udd_shelf_put(struct udd_shelf *shelf, struct udd_watch *watch, uint64_t epoch, const struct udd_index *index,
		       const uint64_t *digests, uint64_t first, uint32_t count, const char *data, struct udd_put_counts *ret);
// Takes off the shelf what the image has been given new content for.
void udd_shelf_drop(struct udd_shelf *shelf, uint64_t first, uint64_t count);

// ---- apart.c: a file of our own mount, used by threads that are no obstacle to the engine's end ----

struct udd_stretch {
	uint64_t offset; // in the file
	uint64_t bytes;
	uint64_t got; // bytes read, fewer only at the end of the file
};

// Both open the file, go through all stretches and close it. From before the opening on *ret_thread is the thread that does it,
// afterwards 0. They return 0 or what failed first.
// `ret_data`: room for the bytes of all stretches, one after the other.
int udd_apart_read(const char *path, struct udd_stretch *stretches, size_t count, char *ret_data, uint32_t *ret_thread);
// Drops what is cached and not mapped.
int udd_apart_drop(const char *path, struct udd_stretch *stretches, size_t count, uint32_t *ret_thread);

// ---- request.c: the mount's reads ----

enum {
	UDD_REQUEST_NONE,
	UDD_REQUEST_THERE,
	UDD_REQUEST_OTHERS, // none, but something else for the loop to do
};

// Whether the FUSE device has a request. If not it is looked again and again for `spin_ns`, or until there is something at `loop`
// (-1: not looked at). Gives no CPU away: for a wait that is shorter than to be woken would take.
int udd_request_wait(int device, int loop, uint64_t spin_ns);

// Reads `size` bytes of a file from byte `position` on, with `flags` of preadv2(2), that are the bytes from `offset` on of an image.
// Sees to it that the whole blocks among them have digests in `digests`, the image's (two words for each block). 1: some had not, 0: all
// had. -EAGAIN: they are not all there; other errors as preadv2's.
int udd_read_digested(int file, uint64_t position, int flags, char *buffer, size_t size, uint64_t *digests, uint64_t offset);

// ---- express.c: reads of the mount that need no Python ----

enum {
	// Reads of which Python is told at once.
	UDD_EXPRESS_BATCH = 64,
};

// How an image is read.
struct udd_express_image {
	int file;                // its bytes are in
	int flags;               // of preadv2(2) with which that needs no disk; negative: it can't be told
	uint64_t size;           // of the disk, bytes
	const uint64_t *digests; // as udd_read_digested()'s
	const uint64_t *map;     // by cluster: where in the file it begins, in bytes, + 1; 0: not known. NULL: the file is the disk
	uint32_t cluster_bits;
};

// A read that was answered.
struct udd_express_done {
	uint64_t file;
	uint64_t offset; // bytes, in the image
	uint64_t size;   // bytes
	uint64_t epoch;  // of the image's watch; 0: the store had no part in it
};

// For a new mount. `room`: of `size` bytes, for what is read.
void udd_express_begin(char *room, size_t size);
// Has reads of an open file answered from now on: from `shelf`, or if that is NULL from the image's file.
void udd_express_enter(uint64_t file, const struct udd_express_image *image, struct udd_shelf *shelf, struct udd_watch *watch);
void udd_express_leave(uint64_t file);
void udd_express_leave_all(void);
// NULL: Python has to answer. `size`: of the read; it ends with the disk. Valid until the next one.
const char *udd_express_read(uint64_t file, uint64_t offset, size_t *size);
// How many were answered since udd_express_take(): once there are UDD_EXPRESS_BATCH there are no more.
uint32_t udd_express_answered(void);
// Takes what was answered since the last time; returns how many, at most UDD_EXPRESS_BATCH.
uint32_t udd_express_take(struct udd_express_done *ret);

// ---- session.c: requests to the mount that we answer ourselves ----

// Has the session that the shared object called `name` makes next tell udd_read_asked() and udd_fallocate_asked(), which are Python's, of
// these requests. -ENOENT: nothing of that name is loaded, -ENOSYS: it makes none, or not in a way that we know.
int udd_session_prepare(const char *name);
// Whether the one that was made since does.
int udd_session_ours(void);
// Has it look for the next read for `spin_ns` after it has answered one, or until there is something at `loop` (-1: not looked at).
void udd_session_look(int loop, uint64_t spin_ns);
// Each request is answered once: with bytes, or with an error (positive; 0: it is done). A negative errno if nobody wants to know any more.
int udd_request_reply(void *request, const char *data, size_t size);
int udd_request_fail(void *request, int error);

// ---- sample.c: what has really been merged, seen from outside ----

struct udd_sampler;

// Pages, and numbers of events since the sampler was made. "Known": with the content of an image block.
struct udd_sample {
	uint64_t present;              // private pages, anonymous or merged
	uint64_t zero_pages;           // of them: all zero, and in none of the following
	uint64_t zero_shared;          // of these: on a page frame with others
	uint64_t opportunity;          // pages that would be saved if all equal ones were merged
	uint64_t sharing;              // pages that are saved
	uint64_t shared;               // page frames that several places are on
	uint64_t opportunities;        // times that a place came to hold what another one holds
	uint64_t merges;               // times that such a place came to be on one frame with another
	uint64_t merges_at_once;       // of them: not later than in the first sample with the opportunity
	uint64_t known_opportunities;
	uint64_t known_merges;
	uint64_t known_merges_at_once;
};

struct udd_sampler *udd_sampler_create(void);
void udd_sampler_destroy(struct udd_sampler *sampler);
// Makes the contents of `count` image blocks of 4096 bytes known.
int udd_sampler_know(struct udd_sampler *sampler, const void *blocks, size_t count);
// Looks at all processes; `seconds`: the time now, from 0 at the sampler's beginning. Only one with
// CAP_SYS_ADMIN sees page frames; others get -EPERM. Processes that are gone have no pages.
int udd_sampler_take(struct udd_sampler *sampler, const uint32_t *pids, size_t count, double seconds, struct udd_sample *ret);
// Seconds from opportunity to merge, one for each merge so far; valid until the next sample. Returns their number.
size_t udd_sampler_latencies(const struct udd_sampler *sampler, const float **ret);

// ---- estimate.c: what could be shared in any processes, seen from outside ----

enum {
	UDD_ESTIMATE_TIMES = 12,    // contents that are seen as often as this or more are counted together
	UDD_ESTIMATE_READERS = 256, // at most
};

struct udd_estimate;
struct udd_reader;

// What is counted together: a mapping's name in one process. Counts are pages.
struct udd_place {
	uint64_t pages;        // present; the kernel's zero page is none
	uint64_t already;      // of them: on a frame that was counted before, or without frames mapped more than once
	uint64_t already_file; // of these: of files, or shared memory
	uint64_t already_ksm;  // of these: merged by KSM
	uint64_t file;         // of the others, which are frames: of files, or shared memory
	uint64_t sampled;      // of the frames: those that were to be read, all or a sample
	uint64_t unreadable;   // of these
	uint64_t zero;         // of these: all zero, and in none of the following
	uint64_t zero_file;    // of them: of files, or shared memory
	uint64_t known;        // of those read: with the content of an image's block
	double within;         // saved if equal frames of one process were one
	double between;        // saved besides if equal frames of different processes were one; each process has an equal part
	uint32_t process;      // number of it
};

// Page numbers [page, end) of a process.
struct udd_mapped {
	uint64_t page;
	uint64_t end;
	uint64_t place;
};

// How far ranges have been looked at; all zero at the beginning.
struct udd_position {
	uint64_t range;
	uint64_t page;
};

// How often contents were found in frames, those that are all zero apart.
struct udd_contents {
	uint64_t seen[UDD_ESTIMATE_TIMES + 1]; // number of contents by how often they were found
	uint64_t pages;                        // found in so many frames
};

// What is saved beside zero pages, pages.
struct udd_saved {
	double within; // as of all places
	double between;
	double anonymous; // anonymous frames with each other
	double file;      // frames of files with each other
	double mixed;     // these two kinds with each other
};

// `part`: how much of the memory is to be read, 1 for all of it, else frames are chosen at random, by `seed`. NULL: no memory.
struct udd_estimate *udd_estimate_create(double part, uint64_t seed);
void udd_estimate_destroy(struct udd_estimate *estimate);
// Whether the kernel shows page frames.
int udd_estimate_has_frames(const struct udd_estimate *estimate);
// Returns the number of a new place, or a negative errno. Not for two threads at a time.
int64_t udd_estimate_add_place(struct udd_estimate *estimate, uint32_t process);
// Stays where it is.
struct udd_place *udd_estimate_place(const struct udd_estimate *estimate, uint64_t place);

// Who looks: one of several threads. It goes with the estimate. NULL: no memory, or there are too many. Not for two threads at a time.
struct udd_reader *udd_reader_create(struct udd_estimate *estimate);
// Goes on looking at a process until some `limit` pages were present or `position` is behind the last range. Returns how many were, or
// a negative errno. `memory`, `pagemap`: of /proc/PID.
int64_t udd_reader_look(struct udd_reader *reader, int memory, int pagemap, const struct udd_mapped *ranges, size_t count,
			uint64_t limit, struct udd_position *position);
// Afterwards, before any of the following: brings equal contents together.
void udd_reader_sort(struct udd_reader *reader);

// Makes blocks of an image known by their digests, two words each, both 0 for those that aren't. Returns how many were, those that
// are all zero apart.
uint64_t udd_estimate_know(struct udd_estimate *estimate, const uint64_t *digests, size_t count);
// -ENOMEM.
int udd_estimate_count(const struct udd_estimate *estimate, struct udd_contents *ret);
// Fills in what places would save, once. `weight`: how many frames each in the sample stands for. `shares`: the part that is saved of a
// frame whose content was found so often, by how often, less than UDD_ESTIMATE_TIMES times. -ENOMEM.
int udd_estimate_judge(struct udd_estimate *estimate, const double *shares, double weight, struct udd_saved *ret);

// ---- attach.c: a program that runs already ----

// Code of a program, by its addresses: [start, end).
struct udd_code {
	uint64_t start;
	uint64_t end;
};

// What has to be known of a program before a function can be called in it.
struct udd_program {
	int32_t pid;
	uint32_t tid_offset;    // bytes from a thread's pointer to where libc keeps its number
	int64_t errno_offset;   // likewise to errno
	uint64_t restorer;      // address of code that calls rt_sigreturn()
	uint64_t stack_start;   // where the first thread's stack begins, from above
	uint64_t stack_limit;   // how large that may become, bytes
	uint32_t filtered;      // 1: its system calls go through a seccomp filter
	uint32_t calm_count;
	uint32_t barred_count;
	uint32_t waiting_count;
	const struct udd_code *calm;    // a running thread can be used here: no lock that dlopen() takes can be held
	const struct udd_code *barred;  // not even one that waits can be used here
	const struct udd_code *waiting; // libc's functions that do nothing but wait
};

// How it went.
struct udd_attach_outcome {
	uint64_t held_ns;      // how long threads were held: one, for a call; all, for a change. The longest time, if tried again
	uint32_t threads;      // how many
	int32_t signal;        // a call ended by this signal; 0: it did not
	int32_t failed_call;   // the last system call that failed in it, and its errno; 0: none
	int32_t failed_errno;
};

// A word of the program's code or data that is to be changed.
struct udd_attach_word {
	uint64_t address;
	uint64_t before;
	uint64_t after;
};

// Calls function(address of a copy of `data`, second) in a thread of the program, within `patience_ms`; the others run on.
// -EAGAIN: no thread was at a place where that can be done. -EINTR: the call was ended by a signal. -ETIMEDOUT: it takes too
// long, and will end by itself. -ESRCH: the program has ended.
int udd_attach_call(const struct udd_program *program, uint64_t function, const void *data, size_t bytes, uint64_t second,
		    uint32_t patience_ms, struct udd_attach_outcome *ret);
// The `index`th of a thread's seccomp filters, newest first, as its instructions (struct sock_filter). How many those are, or
// -ENOENT: there is no such filter; -EACCES, -EPERM: that is not for us to know; -EBUSY; -ESRCH.
int udd_attach_filter(int tid, uint32_t index, uint64_t *ret, size_t room);
// Changes all of `words` while no thread runs, and none is in `barred` code. -EAGAIN: there was always one within `patience_ms`.
// -ESTALE: some of them are not what they should be before, and none was changed. -ESRCH: the program has ended.
int udd_attach_change(int pid, const struct udd_code *barred, size_t barred_count, const struct udd_attach_word *words, size_t count,
		      uint32_t patience_ms, struct udd_attach_outcome *ret);

#endif
