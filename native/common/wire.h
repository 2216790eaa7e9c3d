// SPDX-License-Identifier: MIT
// What the engine and the agents say to each other.
//
// One SOCK_SEQPACKET connection per agent carries packed structs; one memfd per agent (the *shared area*)
// carries what must not cost a system call: place hints, dropped references, counters, and page contents on
// their way into the store. The engine asks, the agent answers; at most one request is under way per agent.
// The agent also sends UDD_DOORBELL on its own when a ring has something and the engine asked to be told; one that comes back
// from another engine perhaps once for that one.
//
// Nothing here is trusted by either side: the engine checks every count, address and index it reads (and drops
// an agent that lies), the agent compares bytes before it replaces a page. Control clients (`udedup status` …)
// use the same socket; their first message starts with '{' instead of UDD_MAGIC. That protocol is JSON and lives in
// udedup/engine/control.py.
//
// All addresses and lengths are in bytes, page aligned unless stated; pages are 4096 bytes. Little endian.
#ifndef UDD_WIRE_H
#define UDD_WIRE_H

#ifndef UDD_CDEF
#include <stdint.h>
#endif

enum {
	UDD_MAGIC = 0x44445555, // "UUDD"
	UDD_WIRE_VERSION = 4,
	UDD_PAGE_SHIFT = 12,
	UDD_PAGE_SIZE = 4096,

	UDD_LABEL_MAX = 64,
	UDD_COMMAND_MAX = 128,
	UDD_REASON_MAX = 128,

	// Pages of one store segment, and its size in bytes (16 MiB).
	UDD_SEGMENT_SLOTS = 4096,
	UDD_SEGMENT_BYTES = 16777216,

	// Most items of one message, and most pages of one run in UDD_MERGE (results are bit masks).
	UDD_ITEMS_MAX = 512,
	UDD_RUN_MAX = 64,
	// Most page reports in one answer, and most pages of one UDD_VISIT.
	UDD_REPORTS_MAX = 2016,
	// Most pages that one UDD_SCAN visits; it ends early once it has nothing left to report with.
	UDD_SCAN_MAX = 8192,
	// Pages of the copy area: a copy of every page that one UDD_VISIT or UDD_SCAN reports has room.
	UDD_COPY_SLOTS = 2016,
	// Most pages of one UDD_COPY.
	UDD_COPY_MAX = 512,
	UDD_COPY_WORDS = 8, // of a bit mask with a bit for each

	UDD_SKIPS_MAX = 8,
	UDD_SKIPS_PER_VISIT = 2,

	// A transparent huge page, and what a bit mask needs with a bit for each of its pages.
	UDD_HUGE_BYTES = 2097152,
	UDD_HUGE_PAGES = 512,
	UDD_HUGE_WORDS = 8,

	// Layout of the shared area (byte offsets, page aligned; both sides assert that the parts fit).
	UDD_SHARED_STATS = 0,
	UDD_SHARED_HINTS = 4096,
	UDD_HINT_SLOTS = 4096,     // power of two
	UDD_SHARED_DROPS = 204800,
	UDD_DROP_SLOTS = 4096,     // power of two
	UDD_SHARED_COPY = 307200,
	UDD_SHARED_BYTES = 8564736, // UDD_SHARED_COPY + UDD_COPY_SLOTS * UDD_PAGE_SIZE
};

enum udd_message_type {
	// agent → engine, first message. Answered by UDD_WELCOME or UDD_REFUSED.
	UDD_HELLO = 1,
	// engine → agent. Ancillary: the shared area's descriptor, then (if asked for and available) /dev/userfaultfd.
	UDD_WELCOME = 2,
	// engine → agent: struct udd_refused, then the engine closes.
	UDD_REFUSED = 3,
	// engine → agent requests. Each is answered by one UDD_DONE with the same seq.
	// struct udd_segment; ancillary: read-only descriptor of the memfd, sealed with F_SEAL_SHRINK, F_SEAL_GROW and
	// F_SEAL_FUTURE_WRITE at least. Status in the answer; header.value 1: runs of a segment handed over are now runs of this one.
	UDD_SEGMENT = 4,
	UDD_SEGMENT_DROP = 5, // struct udd_segment: forget it; -EBUSY while runs of it are left
	UDD_SCAN = 6,         // struct udd_scan: visit the next pages of the linear scan; answer: page reports
	// count × struct udd_range: hash these (hinted) pages; answer: page reports. header.value 1: zero pages are merged even if
	// that splits huge pages.
	UDD_VISIT = 7,
	UDD_COPY = 8,         // count × struct udd_range: copy these pages to the copy area, in order, densely; answer: udd_copied
	UDD_MERGE = 9,        // count × struct udd_run; answer: count × struct udd_merge_result, in the same order
	// count × struct udd_range, none = everything; answer: header.value = pages given back. With header.value not 0, and no ranges:
	// mappings of the file on the mount with this inode, which may have changed, and are not merged again.
	UDD_UNMERGE = 10,
	// struct udd_cursor; answer: up to UDD_ITEMS_MAX × struct udd_run with address ≥ cursor, ascending. With header.value 1 the
	// engine counts references anew: at cursor 0 all drops so far are void (header.value of the answer: the drop ring's head
	// then), and until the last answer (no items) drops are recorded only for runs that were reported. Where memory moves
	// meanwhile (mremap) from what was reported to what was not, or the other way, the count ends early and no drops are recorded
	// any more; drops_lost counts up, so that the engine begins another.
	UDD_RUNS = 11,
	// struct udd_cursor, an index: the next segment from there on that an earlier engine gave and that runs still refer to; answer:
	// udd_handover. Ancillary, if the agent has it (a fork child does not): the segment's descriptor. An engine that takes such a
	// segment over sends it by UDD_SEGMENT under a number of its own; the agent knows it by its inode, and its runs are then
	// runs of that number. Their references count from the next UDD_RUNS with header.value 1 on.
	UDD_HANDOVER = 16,
	UDD_HUGE = 15,        // count × uint64_t, addresses: which of them lie in a transparent huge page? answer: udd_huge
	// agent → engine
	UDD_DONE = 12,
	UDD_DOORBELL = 13,
	// engine → agent: the engine ends or drops this agent; struct udd_refused says why. Merged pages stay merged.
	UDD_BYE = 14,
};

struct udd_header {
	uint32_t magic;
	uint16_t type;  // enum udd_message_type
	uint16_t count; // items that follow
	uint32_t seq;   // of the request; an answer repeats it
	int32_t status; // answers: 0 or a negative errno; else 0
	uint64_t value; // meaning depends on type, else 0
};

enum udd_hello_flags {
	UDD_HELLO_NEED_UFFD = 1, // the agent could not open a full userfaultfd itself
	UDD_HELLO_FORKED = 2,    // a fork child: it may hold runs inherited from its parent (engine: ask UDD_RUNS)
	UDD_HELLO_REJOIN = 4,    // an agent whose engine went away: likewise
	UDD_HELLO_QUIET = 8,     // it wants UDD_CONFIG_QUIET
};

// Its beginning, up to `version`, is the same in every version of the protocol.
struct udd_hello {
	struct udd_header header;
	uint32_t version; // UDD_WIRE_VERSION
	uint32_t flags;   // enum udd_hello_flags
	uint64_t engine_id[2]; // of the engine whose segments the runs refer to; 0 if none
	uint64_t hooks;        // bit set of installed hooks, for status
	char label[UDD_LABEL_MAX];     // wanted domain label, NUL terminated, empty for none
	char command[UDD_COMMAND_MAX]; // for people; NUL terminated
};

enum udd_config_flags {
	UDD_CONFIG_ZERO_PAGES = 1, // merge all-zero pages with the kernel's
	UDD_CONFIG_HINTS = 2,      // push place hints
	UDD_CONFIG_SMART_SCAN = 8, // pass over pages that never change, or always, for up to 8 rounds
	UDD_CONFIG_KEEP_HUGE = 4,  // zero pages inside of huge pages are reported, not merged, unless UDD_VISIT says so
	UDD_CONFIG_QUIET = 16,     // how long a write takes must not tell whether somebody else has the page
	UDD_CONFIG_FIRST_SIGHT = 32, // the linear scan reports a page at its first look at it, not only once it was found unchanged
};

struct udd_welcome {
	struct udd_header header;
	uint64_t engine_id[2];
	uint64_t mount_dev;   // st_dev of the udedup mount, 0 if none
	uint32_t agent_id;
	uint32_t flags;       // enum udd_config_flags
	uint32_t vma_limit;   // mappings this process may have in all, reserve already taken off
	uint32_t holdoff_ms;  // how long a page that broke is left alone
};

struct udd_refused {
	struct udd_header header;
	char reason[UDD_REASON_MAX]; // for people, NUL terminated
};

struct udd_segment {
	struct udd_header header;
	uint32_t id;    // never reused while an engine lives
	uint32_t slots; // ≤ UDD_SEGMENT_SLOTS
};

struct udd_scan {
	struct udd_header header;
	uint32_t pages;  // most pages to visit
	uint32_t flags;  // none yet, 0
};

struct udd_cursor {
	struct udd_header header;
	uint64_t address;
};

// Answer to UDD_HANDOVER; header.count 0: there is none. header.value: the cursor to go on with.
struct udd_handover {
	struct udd_header header;
	uint64_t device; // of the memfd, as stat() has them
	uint64_t inode;
};

struct udd_range {
	uint64_t address;
	uint64_t pages;
};

struct udd_run {
	uint64_t address;
	uint32_t pages; // ≤ UDD_RUN_MAX in UDD_MERGE, any in the answer to UDD_RUNS
	uint32_t segment;
	uint32_t slot; // of the first page; the others follow
	uint32_t reserved;
};

// Bit i is page i of the run; every page is in exactly one mask. A page is mapped to its slot if and only if `merged` says so.
struct udd_merge_result {
	uint64_t merged;
	uint64_t mismatch; // content differs from the slot
	uint64_t busy;     // pinned, shared after fork, held back after a break, or the map lock was not to be had
	uint64_t gone;     // no longer private anonymous writable memory
	uint64_t no_vma;   // the mapping limit is reached
};

// Answer to UDD_COPY; bit i of `valid` is page i of the copy area.
struct udd_copied {
	struct udd_header header;
	uint64_t valid[8]; // UDD_COPY_WORDS
};

// Answer to UDD_HUGE; bit i is for address i. Only a matter of speed and memory: nothing is less safe for a wrong bit.
struct udd_huge {
	struct udd_header header;
	uint64_t huge[8]; // UDD_ITEMS_MAX bits
};

enum udd_report_flags {
	UDD_REPORT_HINTED = 1, // from UDD_VISIT: may be inserted at once
	UDD_REPORT_MERGED = 2, // already merged: no digest
	UDD_REPORT_ZERO = 4,   // all zero, in a huge page: see UDD_CONFIG_KEEP_HUGE
	UDD_REPORT_SKIPS_SHIFT = 8, // the byte from here: rounds that the page will be passed over, at most UDD_SKIPS_MAX
	UDD_REPORT_COPY_SHIFT = 16, // the 16 bits from here: which slot of the copy area has what was hashed, + 1; 0: none
};

// One page of a scan or visit. Only pages worth looking up are reported: present, mostly not zero, and (scan) unchanged since
// the previous round, or new under UDD_CONFIG_FIRST_SIGHT. Digest: XXH3_128bits of the page, low then high half. Its copy stays until the next request that uses the
// copy area.
struct udd_report {
	uint64_t address;
	uint64_t digest[2];
	uint64_t flags;
};

// Answer to UDD_SCAN and UDD_VISIT; header.count reports follow. header.value: pages passed over (smart scan), each charged as
// one part in UDD_SKIPS_PER_VISIT of a visited one.
struct udd_reports {
	struct udd_header header;
	uint32_t visited;  // pages looked at (charged against the rate limit)
	uint32_t changed;  // of them: changed since the last round (volatile)
	uint32_t zero;     // of them: zero pages given to the kernel's zero page now
	uint32_t wrapped;  // scan: 1 if the linear scan reached the end of memory (a full round)
};

// ---- the shared area ----

// Written by the agent only, one word at a time; a snapshot may be torn between words.
struct udd_stats {
	uint64_t pages_merged;   // pages mapped to the store now
	uint64_t zero_pages;     // pages left to the kernel's zero page and not written since
	uint64_t runs;           // merged runs in the table
	uint64_t vmas;           // mappings of the process at the last look
	uint64_t managed_pages;  // present candidate pages at the last look, merged ones included
	uint64_t break_pages;    // cumulative
	uint64_t break_events;   // cumulative: userfaultfd write faults served
	uint64_t hint_count;     // cumulative place hints pushed
	uint64_t cpu_ns;         // both agent threads
	uint64_t merging;        // 1 while transactions are allowed
	uint64_t foreign_events; // removals that no hook announced
	uint64_t memory_bytes;   // the agent's own memory, shared area excluded
	uint64_t drops_lost;     // drop records that found the ring full, and counts cut short: the engine must ask UDD_RUNS again
	uint64_t lock_max_ns;    // longest exclusive hold of the map lock by the worker
	char reason[UDD_REASON_MAX]; // why merging is 0
	uint64_t paused;             // how many udedup_pause() await their udedup_resume(): 0 while transactions are allowed
};

enum udd_hint_flags {
	UDD_HINT_WRITE = 1,  // the page was the source of a write (else: the target of a read)
	UDD_HINT_ADVISE = 2, // udedup_advise()
	UDD_HINT_MAPPED = 4, // nothing was moved: the file was mapped there, and what is read of it from now on may be its page faults
};

// Place hints: a ring that its writers overwrite. A writer takes a ticket t from `head`, writes slot t % UDD_HINT_SLOTS and
// sets its `sequence` to t + 1 last (0 while it writes). The reader keeps its own tail; a slot whose sequence is not
// tail + 1 before and after copying was overwritten (or is being written) and counts as dropped (or is read later).
struct udd_hint {
	uint64_t sequence;
	uint64_t address; // byte address, any alignment; only whole pages inside [address, address + length) are meant
	uint32_t length;  // bytes
	uint32_t flags;   // enum udd_hint_flags
	uint64_t inode;   // 0 if unknown
	uint64_t offset;  // in the file, UINT64_MAX if unknown
	uint64_t nanoseconds; // CLOCK_MONOTONIC when the content was in place; bit 63 set: inode is on the udedup mount
};

struct udd_hint_ring {
	uint64_t head;    // next ticket; written by the agent's application threads
	uint32_t waiting; // the engine set this to 1 to be rung; whoever changes it to 0 rings
	uint32_t reserved[13];
	struct udd_hint slots[UDD_HINT_SLOTS];
};

// References to store slots that the agent's process let go of (breaks, unmaps, discards), oldest first. The agent writes
// under its own lock, the engine reads: a plain bounded queue, full = drops_lost counts up. The engine empties it only while no
// request is under way, after it has taken in the last answer: so a drop is never seen before the merge it undoes.
struct udd_drop {
	uint64_t address; // where the pages were
	uint32_t segment;
	uint32_t slot;
	uint32_t pages;
	uint32_t flags; // enum udd_drop_flags
};

enum udd_drop_flags {
	UDD_DROP_BREAK = 1, // written to (else: unmapped, discarded or unmerged)
};

struct udd_drop_ring {
	uint64_t head; // next to write, by the agent
	uint64_t tail; // next to read, by the engine
	uint64_t reserved[6];
	struct udd_drop slots[UDD_DROP_SLOTS];
};

#endif
