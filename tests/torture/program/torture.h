// SPDX-License-Identifier: MIT
// An ordinary multi-threaded program that does everything to its memory that Linux lets a program do, and knows at every
// moment what each byte must be.
//
// It knows nothing of udedup and shares no code with it. The *oracle* is a second copy of all data in a MAP_SHARED file
// mapping, which is never a candidate for merging. A region belongs to one worker, so its oracle needs no lock; what
// several threads look at (shared.c) is guarded by a sequence number per page, kept beside the oracle.
//
// Everything the program itself depends on (workers, region tables, statistics) lives in the oracle's file as well, so
// that a wrong page shows up as a wrong byte with a report and not as a crash somewhere else.
#ifndef TORTURE_H
#define TORTURE_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum {
	PAGE = 4096,
	POOL_PAGES = 256,   // distinct contents that all instances of the program share
	DATA_PAGES = 1024,  // of the data file; it starts with the pool
	BULK_PAGES = 256,   // at its end, of bulk regions
	REGIONS = 14,       // per worker
	REGION_PAGES = 96,  // capacity of an ordinary region
	LARGE_PAGES = 512,  // capacity of the transparent-huge-page and bulk regions and of the heap
	LANE_PAGES = 32,    // pages that all workers write to, each in its own bytes
	CHILDREN = 2,       // living children per worker, one grandchild each
	HISTORY = 12,       // operations remembered per region
	BUCKETS = 48 * 8,   // of the time histogram
	OPERATIONS = 48,
	EXIT_WRONG = 1,
	EXIT_SETUP = 2,
	EXIT_HANG = 3,
};

enum region_kind {
	KIND_ANONYMOUS,
	KIND_HUGE,     // MADV_HUGEPAGE, aligned to 2 MiB when fresh
	KIND_FILE,     // MAP_PRIVATE, writable, of the data file: discarding brings the file's content back
	KIND_READONLY, // MAP_PRIVATE, PROT_READ, of the data file
	KIND_DONTFORK,
	KIND_WIPEONFORK,
	KIND_BULK, // left alone until all of it can be merged, then written, discarded or unmapped as a whole
	KIND_HEAP, // the brk area
};

// Deliberate faults for the self-test: each is a way in which a deduplicator could go wrong.
enum sabotage {
	SABOTAGE_NONE,
	SABOTAGE_FLIP,    // one bit of a quiet page changes
	SABOTAGE_ZERO,    // a quiet page loses its content
	SABOTAGE_SWAP,    // two pages change places
	SABOTAGE_WRITE,   // a write is lost
	SABOTAGE_DISCARD, // discarded content comes back
	SABOTAGE_FREE,    // a page given to MADV_FREE is neither old nor zero
	SABOTAGE_MAP,     // a fresh mapping is not empty
	SABOTAGE_KERNEL,  // bytes the kernel wrote for read() are lost
	SABOTAGE_DIRECT,  // direct I/O went to a page that is no longer mapped
	SABOTAGE_PIN,     // a fixed buffer of io_uring is no longer the page that is mapped
	SABOTAGE_CHILD,   // a child sees a wrong byte
	SABOTAGE_WIPE,    // wiped memory survives a fork
	SABOTAGE_SIGNAL,  // memory made read-only can be written
	SABOTAGE_HEAP,
	SABOTAGE_MALLOC,
	SABOTAGE_BOARD,   // a reader sees a torn or missing page for a moment
	SABOTAGE_LANE,    // two threads write to one page and one write is lost
	SABOTAGE_FUTEX,   // a wake-up is lost
	SABOTAGE_HANG,
	SABOTAGE_KINDS,
};

struct event {
	uint64_t time;   // ns since start
	uint8_t operation;
	uint16_t first;  // page in the region
	uint16_t count;
};

struct region {
	enum region_kind kind;
	unsigned int index;    // in its worker
	unsigned char *memory; // what is tested
	unsigned char *oracle; // what it must contain, capacity pages
	uint8_t *maybe;        // per page: given to MADV_FREE, so it may also be zero until it is written
	unsigned int pages, capacity;
	unsigned int file_page;  // KIND_FILE, KIND_READONLY: page of the data file that page 0 maps
	bool split;              // may consist of several mappings, because the program itself split it
	bool broke;              // KIND_BULK: last written while it was merged
	bool locked;             // mlock()ed as a whole
	int guard;               // protection of the guarded part
	unsigned int guard_first, guard_count; // changed by mprotect() until the next operation
	unsigned int pin_first, pin_count;     // registered with io_uring
	uint64_t ready;          // ns: left alone until then
	uint64_t generation;     // operations so far
	struct event history[HISTORY];
};

struct times {
	uint64_t count;
	uint64_t max; // ns
	uint32_t buckets[BUCKETS];
};

// What the scheduler knows of a thread: all that is neither is time asleep, waiting for somebody.
struct cpu_times {
	uint64_t ran;    // ns on a CPU
	uint64_t queued; // ns ready, but without one
};

// What operations of one kind took, sleeps on purpose excepted.
struct costs {
	struct times whole;
	struct times asleep; // of that, waiting for somebody: a lock, a fault, a device, a child
	struct times ran;
};

// A moment of a thread's life, to time single steps of operations: many of these are made of dozens.
struct moment {
	uint64_t at;  // ns
	uint64_t ran; // ns on a CPU so far
};

// Kinds of steps, from the end of the table of operations.
enum step {
	STEP_WRITE = 2, // one page written to
	STEP_CALL = 1,  // one call that discards or unmaps
};

struct slot;
struct io;

struct worker {
	unsigned int id;
	unsigned int depth; // 0 in the program, 1 in a child, 2 in a grandchild
	pid_t tid;
	uint64_t random;
	uint64_t deadline; // ns
	unsigned int region_count;
	struct region regions[REGIONS];
	uint8_t lane[LANE_PAGES]; // content of this worker's bytes in each lane page
	struct io *io;            // descriptors and ring; null in children
	struct slot *slots;       // for children
	unsigned int slot_count;
	_Atomic(uint64_t) since;     // ns when the present operation began
	_Atomic(unsigned int) doing; // index in the table of operations
	_Atomic(uintptr_t) where;    // address it works on
	_Atomic(bool) done;
	uint64_t napped;   // ns asleep on purpose during the present operation
	struct cpu_times napped_cpu; // of that, not asleep
	uint64_t verified; // pages
	uint64_t skipped;  // operations that the system refused for lack of something (image gone …)
	uint64_t children; // forks
	struct costs costs[OPERATIONS];
	sigjmp_buf landing; // where an expected SIGSEGV continues
	volatile sig_atomic_t expecting;
	void *volatile fault_address;
	volatile sig_atomic_t fault_code;
};

// A place for one child: what it knows when it starts, prepared by its parent before the fork.
struct slot {
	struct worker worker;
	unsigned char *oracle; // for all regions of the worker, one after another
	unsigned char *message; // one MAP_SHARED | MAP_ANONYMOUS page, written by the child
	pid_t pid;             // 0: free
	uint64_t late;         // ns: running after this means that it hangs
};

enum operation_flags {
	WRITES = 1,   // not for read-only regions
	KEEPS_PIN = 2,  // allowed on a region registered with io_uring
	KEEPS_LOCK = 4, // allowed on a locked region
	ANYWHERE = 8,   // also in children
	LONE = 16,      // needs no region
	REMAPS = 32,    // uses mremap
};

struct operation {
	const char *name;
	unsigned int weight; // 0: never drawn, only called
	unsigned int flags;
	void (*run)(struct worker *w, struct region *r);
};

struct options {
	uint64_t seed;
	unsigned int seconds;
	unsigned int threads;
	unsigned int hang; // seconds without progress
	unsigned int slow; // ms after which an operation is reported while it lasts; 0: never
	bool raw;
	enum sabotage sabotage;
	const char *image;     // a file with the data file's content, or null
	const char *directory; // for the data file and direct I/O
};

// Set once before the first thread starts.
extern struct options options;
extern const struct operation operations[];
extern const unsigned int operation_count;
extern unsigned char *data; // DATA_PAGES known pages in oracle memory, the pool first
extern unsigned int worker_count;
extern struct worker **workers;
extern _Thread_local struct worker *self;

struct span {
	unsigned int first, count;
};

// main.c
uint64_t now(void);
void nap(struct worker *w, uint64_t ns);
struct cpu_times cpu_times(void);
void add_costs(struct costs *sum, const struct costs *costs);
void *shared_allocate(size_t size);
bool stopping(const struct worker *w);

// content.c
void content_init(void);
uint64_t draw(struct worker *w);
unsigned int below(struct worker *w, unsigned int limit);
bool chance(struct worker *w, unsigned int one_in);
bool sabotaged(struct worker *w, enum sabotage kind);
bool is_zero(const void *page);
void compose(struct worker *w, unsigned char *pages, unsigned int count);

// check.c
_Noreturn void fail(const struct region *r, const void *address, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
_Noreturn void hang(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void setup_error(const char *what);
void say_slow(const struct worker *w);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void check_bytes(const struct region *r, const unsigned char *got, const unsigned char *want, size_t size, const char *what);
void check_span(struct worker *w, struct region *r, struct span span);
void check_region(struct worker *w, struct region *r);
void settle(struct worker *w, struct region *r, struct span span);
bool faults(struct worker *w, void *address, bool write);
void check_init(void);

// region.c
int sys_madvise(void *address, size_t size, int advice);
void freed(void *address);
void *take_freed(void);
unsigned char *page_at(const struct region *r, unsigned int page);
struct span pick(struct worker *w, const struct region *r, unsigned int most);
int region_protection(const struct region *r);
void region_fresh(struct region *r, struct span span);
void region_map(struct worker *w, struct region *r, unsigned int pages);
void region_map_over(struct region *r, struct span span, int extra_flags);
void region_prepare(struct worker *w, struct region *r, const struct operation *operation);
void region_store(struct worker *w, struct region *r, struct span span);
void note(struct worker *w, struct region *r, struct span span);
void regions_init(struct worker *w);
size_t oracle_size(const struct worker *w);
void oracle_place(struct worker *w, unsigned char *base);
void open_data_file(void);
extern int data_file;

// worker.c
unsigned int operation_index(void (*run)(struct worker *w, struct region *r));
void perform(struct worker *w, const struct operation *operation, struct region *r);
struct moment this_moment(void);
void record_step(struct worker *w, enum step step, struct moment since);
void bursts(struct worker *w);
void sigsegv_init(void);

// operations.c
void op_write(struct worker *w, struct region *r);
void op_bytes(struct worker *w, struct region *r);
void op_overwrite(struct worker *w, struct region *r);
void op_bulk(struct worker *w, struct region *r);
void op_verify(struct worker *w, struct region *r);
void op_discard(struct worker *w, struct region *r);
void op_free(struct worker *w, struct region *r);
void op_map_over(struct worker *w, struct region *r);
void op_hole(struct worker *w, struct region *r);
void op_move(struct worker *w, struct region *r);
void op_grow(struct worker *w, struct region *r);
void op_shrink(struct worker *w, struct region *r);
void op_mremap_fixed(struct worker *w, struct region *r);
void op_dontunmap(struct worker *w, struct region *r);
void op_protect(struct worker *w, struct region *r);
void op_populate(struct worker *w, struct region *r);
void op_lock(struct worker *w, struct region *r);
void op_huge(struct worker *w, struct region *r);
void op_churn(struct worker *w, struct region *r);
void op_stack(struct worker *w, struct region *r);
void op_signal_stack(struct worker *w, struct region *r);

// io.c
void io_init(struct worker *w);
void io_deinit(struct worker *w);
void unpin(struct worker *w, struct region *r);
void op_direct_read(struct worker *w, struct region *r);
void op_direct_write(struct worker *w, struct region *r);
void op_uring_read(struct worker *w, struct region *r);
void op_pin(struct worker *w, struct region *r);
void op_fixed(struct worker *w, struct region *r);
void op_kernel_write(struct worker *w, struct region *r);
void op_kernel_read(struct worker *w, struct region *r);
void op_process_vm(struct worker *w, struct region *r);
void op_image_read(struct worker *w, struct region *r);
bool image_fill(struct worker *w, unsigned char *memory, unsigned int first, unsigned int count);

// family.c
void family_init(struct worker *w);
void reap(struct worker *w, bool all);
void op_fork(struct worker *w, struct region *r);
void op_vfork(struct worker *w, struct region *r);
void op_spawn(struct worker *w, struct region *r);

// shared.c
void shared_init(void);
void op_board_write(struct worker *w, struct region *r);
void op_board_read(struct worker *w, struct region *r);
void op_lane(struct worker *w, struct region *r);
void op_futex_wait(struct worker *w, struct region *r);
void op_futex_wake(struct worker *w, struct region *r);
void *board_thread(void *worker);
void *futex_wait_thread(void *worker);
void *futex_wake_thread(void *worker);

// heap.c
void op_brk(struct worker *w, struct region *r);
void op_malloc(struct worker *w, struct region *r);
void *heap_thread(void *worker);
void *malloc_thread(void *worker);

#endif
