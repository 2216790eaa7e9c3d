// SPDX-License-Identifier: MIT
//
// Setting the agent up: the reservation and what lies where in it, hooks, threads, fork children, and the C interface.

#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "attach.h"
#include "hooks.h"
#include "merged.h"
#include "rings.h"
#include "sandbox.h"
#include "sys.h"
#include "thread.h"
#include "transaction.h"
#include "udedup.h"
#include "worker.h"

enum {
	CHUNKS_LIMIT = 1 << 16,       // chunks of merged runs: 4 million runs at least
	CHUNKS_LIMIT_SMALL = 1 << 12, // if the address space is limited
	LEAVES_LIMIT = 1 << 16,       // 4 MiB of memory each: 256 GiB
	LEAVES_LIMIT_SMALL = 1 << 12, // if the address space is limited
	LIMIT_LEAST = 1 << 30,        // bytes of RLIMIT_AS and RLIMIT_DATA below which the agent stays out
	JOIN_MS = 5000,               // how long udedup_join waits for an engine to answer at all
	FORK_DELAY_MS = 20,           // a child that execs at once need not join
};

struct udd_agent udd_agent;

// ---- the reservation ----

// Areas are cut from the front, each with a page that nobody may touch before it.
static void *cut(uint64_t *at, uint64_t bytes)
{
	uint64_t start = *at + UDD_PAGE_SIZE;

	*at = start + udd_page_up(bytes);
	return udd_pointer(start);
}

static int back(void *area, uint64_t bytes, bool wipe)
{
	long ret = udd_sys(SYS_mprotect, area, udd_page_up(bytes), PROT_READ | PROT_WRITE);

	if (!udd_failed(ret) && wipe)
		ret = udd_sys(SYS_madvise, area, udd_page_up(bytes), MADV_WIPEONFORK);
	return udd_failed(ret) ? (int)ret : 0;
}

struct area {
	void **where;
	uint64_t bytes;
	bool backed; // usable at once; else it grows (mprotect) with what is in it
	bool wiped;  // empty in a fork child
};

static int reserve(void)
{
	struct udd_agent *agent = &udd_agent;
	struct rlimit limit = {.rlim_cur = RLIM_INFINITY};
	struct rlimit data = {.rlim_cur = RLIM_INFINITY};
	uint64_t total = 0;
	uint64_t at;
	long ret;

	getrlimit(RLIMIT_AS, &limit);
	getrlimit(RLIMIT_DATA, &data);
	// The agent's memory would count, and a program near its limit would fail for our sake.
	if (limit.rlim_cur < LIMIT_LEAST || data.rlim_cur < LIMIT_LEAST)
		return -ENOMEM;
	agent->marks.leaf_limit = limit.rlim_cur == RLIM_INFINITY ? LEAVES_LIMIT : LEAVES_LIMIT_SMALL;
	agent->marks.table_size = 2 * agent->marks.leaf_limit;
	agent->runs.limit = limit.rlim_cur == RLIM_INFINITY ? CHUNKS_LIMIT : CHUNKS_LIMIT_SMALL;

	struct area areas[] = {
		{(void **)&agent->live, sizeof(struct udd_live), true, true},
		{(void **)&agent->worker_stack, UDD_STACK_BYTES, true, false},
		{(void **)&agent->fault_stack, UDD_STACK_BYTES, true, false},
		{(void **)&agent->tls, 2UL * UDD_PAGE_SIZE, true, false},
		{(void **)&agent->file_pages, udd_bytes(UDD_RUN_MAX), true, false},
		{(void **)&agent->message, (uint64_t)UDD_MESSAGE_BYTES * UDD_MESSAGE_BUFFERS, true, false},
		{(void **)&agent->segments, UDD_SEGMENTS_MAX * sizeof(struct udd_segment_map), true, false},
		{(void **)&agent->staging, udd_bytes(UDD_STAGING_PAGES), true, true},
		// Its flags go to the application with the pages: it must have none. Not aligned to 2 MiB, so that it gets no
		// transparent huge page.
		{(void **)&agent->blank, udd_bytes(UDD_STAGING_PAGES), true, false},
		{(void **)&agent->layout.candidates, UDD_LAYOUT_MAX * sizeof(struct udd_candidate), true, false},
		{(void **)&agent->layout.buffer, UDD_LAYOUT_BUFFER, true, false},
		{(void **)&agent->runs.directory, agent->runs.limit * sizeof(*agent->runs.directory), true, false},
		{(void **)&agent->marks.table, agent->marks.table_size * sizeof(struct udd_leaf_key), true, false},
		{(void **)&agent->marks.free_leaves, agent->marks.leaf_limit * sizeof(uint32_t), true, false},
		{(void **)&agent->runs.chunks, udd_bytes(agent->runs.limit), false, false},
		{(void **)&agent->trial, udd_bytes(UDD_STAGING_PAGES), false, false},
		{(void **)&agent->marks.leaves, (uint64_t)agent->marks.leaf_limit * sizeof(agent->marks.leaves[0]), false, false},
	};
	const size_t count = sizeof(areas) / sizeof(areas[0]);

	for (size_t i = 0; i < count; i++)
		total += udd_page_up(areas[i].bytes) + UDD_PAGE_SIZE;
	ret = udd_sys(SYS_mmap, NULL, total + UDD_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (udd_failed(ret))
		return (int)ret;
	at = (uint64_t)ret;
	agent->arena = (struct udd_span){at, at + total + UDD_PAGE_SIZE};
	// Core files are for the application's memory.
	udd_sys(SYS_madvise, ret, total + UDD_PAGE_SIZE, MADV_DONTDUMP);
	for (size_t i = 0; i < count; i++) {
		*areas[i].where = cut(&at, areas[i].bytes);
		if (areas[i].backed) {
			int error = back(*areas[i].where, areas[i].bytes, areas[i].wiped);

			if (error)
				return error;
		}
	}
	// What is made in it goes to the application, and must not be left out of its core files.
	udd_sys(SYS_madvise, agent->blank, udd_bytes(UDD_STAGING_PAGES), MADV_DODUMP);
	return udd_runs_reserve(&agent->runs, 1);
}

// ---- this process ----

static void read_command(char *ret, size_t room)
{
	int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, ret, room - 1);

	if (fd >= 0)
		close(fd);
	for (ssize_t i = 0; i + 1 < got; i++) {
		if (ret[i] == '\0')
			ret[i] = ' ';
	}
	ret[got < 0 ? 0 : got] = '\0';
}

static void open_test_counters(void)
{
	const char *path = getenv("UDEDUP_TEST_COUNTERS");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *pages;

	udd_agent.test_delays = getenv("UDEDUP_TEST_DELAYS") != NULL;
	if (fd < 0)
		return;
	pages = mmap(NULL, UDD_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (pages != MAP_FAILED)
		udd_agent.test_counters = pages;
}

// Made absolute: the agent's threads have a working directory of their own.
static int set_socket_path(char *ret, const char *path)
{
	char directory[UDD_PATH_MAX] = "";
	int length;

	if (path[0] != '/' && (!getcwd(directory, sizeof(directory) - 1)))
		return -ENAMETOOLONG;
	length = snprintf(ret, UDD_PATH_MAX, "%s%s%s", directory, directory[0] ? "/" : "", path);
	return length >= UDD_PATH_MAX ? -ENAMETOOLONG : 0;
}

static int claimed;

bool udd_agent_claim(void)
{
	return !__atomic_exchange_n(&claimed, 1, __ATOMIC_ACQUIRE);
}

void udd_agent_unclaim(void)
{
	__atomic_store_n(&claimed, 0, __ATOMIC_RELEASE);
}

int udd_agent_choose(const struct udd_attach_request *wanted)
{
	struct udd_agent *agent = &udd_agent;

	_Static_assert(sizeof(wanted->socket) == sizeof(agent->socket_path), "a path that fits in one fits in the other");
	if (!memchr(wanted->socket, '\0', sizeof(wanted->socket)) || !memchr(wanted->label, '\0', sizeof(wanted->label)))
		return -ENAMETOOLONG;
	memcpy(agent->socket_path, wanted->socket, sizeof(agent->socket_path));
	memcpy(agent->label, wanted->label, sizeof(agent->label));
	agent->keep_ksm = wanted->flags & UDD_ATTACH_KEEP_KSM;
	agent->quiet = wanted->flags & UDD_ATTACH_QUIET;
	return 0;
}

int udd_agent_set_up(const struct udd_attach_request *wanted)
{
	struct udd_agent *agent = &udd_agent;
	int ret = udd_agent_choose(wanted);

	if (ret)
		return ret;
	read_command(agent->command, sizeof(agent->command));
	ret = reserve();
	if (ret) {
		// As if it had never been tried.
		udd_sys(SYS_munmap, agent->arena.start, agent->arena.end - agent->arena.start);
		agent->live = NULL;
		return ret;
	}
	for (int i = 0; i < UDD_SEGMENTS_MAX; i++)
		agent->segments[i].fd = -1;
	agent->layout.smaps_fd = -1;
	agent->live->stats = &agent->live->own_stats;
	agent->live->started = 1;
	return 0;
}

void udd_agent_say_unhooked(const char *function)
{
	snprintf(udd_agent.reason, sizeof(udd_agent.reason), "%s of this libc can't be hooked", function);
}

int udd_agent_init(const char *socket_path, const char *label)
{
	struct udd_attach_request wanted = {.flags = (getenv("UDEDUP_KEEP_KSM") ? UDD_ATTACH_KEEP_KSM : 0) |
						     (getenv("UDEDUP_QUIET_BREAKS") ? UDD_ATTACH_QUIET : 0)};
	const char *missing;
	int ret = set_socket_path(wanted.socket, socket_path);

	if (ret)
		return ret;
	if (strlen(label) >= sizeof(wanted.label))
		return -ENAMETOOLONG;
	strcpy(wanted.label, label); // NOLINT: it fits
	open_test_counters();
	ret = udd_agent_set_up(&wanted);
	// The agent is joined all the same: `status` shows what is in the way.
	if (!ret && udd_hooks_install(&missing))
		udd_agent_say_unhooked(missing);
	return ret;
}

void udd_agent_forget(void)
{
	struct udd_live *live = udd_live();
	struct udd_layout *layout = &udd_agent.layout;

	udd_lock_exclusive(&live->lock, 0);
	memset(live->fds, 0, sizeof(live->fds));
	for (uint32_t i = 0; i < udd_agent.files_used; i++)
		udd_agent.files[i].mergeable = 0;
	layout->count = 0;
	layout->read_at = 0;
	layout->stack_count = 0;
	udd_unlock_exclusive(&live->lock);
}

static int start_worker(uintptr_t delay_ms)
{
	int ret;

	if (!udd_sandbox_allows_us()) {
		udd_stop_merging("a seccomp filter forbids what the agent does");
		return -EPERM;
	}
	ret = udd_thread_start(udd_worker_thread, (void *)delay_ms, udd_agent.worker_stack, udd_agent.tls, CLONE_FILES);
	if (ret < 0)
		return ret;
	udd_live()->worker = ret;
	return 0;
}

void udd_ring(enum udd_bell bell)
{
	uint32_t *word = &udd_live()->bell;

	__atomic_or_fetch(word, (uint32_t)bell, __ATOMIC_SEQ_CST);
	udd_sys(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1);
}

int udd_agent_start(void)
{
	return start_worker(0);
}

void udd_agent_forked(void)
{
	struct udd_live *live = udd_live();
	uint32_t fresh = 0;

	if (!__atomic_compare_exchange_n(&live->started, &fresh, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
		return;
	udd_lock_set_calm(&live->lock, udd_agent.knows_handlers && !udd_agent.has_handlers);
	live->stats = &live->own_stats;
	for (int i = 0; i < UDD_SEGMENTS_MAX; i++)
		udd_agent.segments[i].fd = -1;
	udd_runs_forked();
	udd_agent.layout.count = 0;
	udd_agent.layout.read_at = 0;
	udd_agent.layout.smaps_fd = -1;
	start_worker(FORK_DELAY_MS);
}

__attribute__((constructor)) static void wrapped(void)
{
	const char *socket_path = getenv("UDEDUP_SOCKET");
	const char *label = getenv("UDEDUP_DOMAIN");

	// Loaded, but not by `udedup run`: udedup_join() comes later, or never.
	if (!socket_path || udd_loaded_by_attach() || udd_agent_init(socket_path, label ? label : ""))
		return;
	udd_files_at_start();
	udd_agent_start();
}

// ---- udedup.h ----

static const char *default_socket(char *buffer, size_t room)
{
	const char *runtime = getenv("XDG_RUNTIME_DIR");

	if (geteuid() == 0)
		return "/run/udedup.sock";
	if (runtime && runtime[0])
		snprintf(buffer, room, "%s/udedup.sock", runtime);
	else
		snprintf(buffer, room, UDD_TEMPORARY "%u.sock", geteuid());
	return buffer;
}

int udedup_join(const char *socket, const char *label)
{
	char buffer[UDD_PATH_MAX];
	struct timespec patience = udd_timespec(JOIN_MS * 1000000UL);
	uint32_t joined;
	int ret = 0;

	if (!udd_live() && udd_agent_claim()) {
		if (!socket)
			socket = getenv("UDEDUP_SOCKET");
		// What failed may be tried again.
		if (!udd_live())
			ret = udd_agent_init(socket ? socket : default_socket(buffer, sizeof(buffer)), label ? label : "");
		if (!ret && !udd_live()->worker)
			ret = udd_agent_start();
		udd_agent_unclaim();
	}
	if (ret)
		return ret;
	if (!udd_live())
		return -EAGAIN;
	joined = __atomic_load_n(&udd_live()->joined, __ATOMIC_ACQUIRE);
	if (!joined) {
		udd_sys(SYS_futex, &udd_live()->joined, FUTEX_WAIT_PRIVATE, 0, &patience);
		joined = __atomic_load_n(&udd_live()->joined, __ATOMIC_ACQUIRE);
	}
	if (!joined)
		return -ECONNREFUSED;
	return joined == 1 ? 0 : -EACCES;
}

int udedup_advise(const void *address, size_t bytes)
{
	const struct udd_source nowhere = {.offset = UINT64_MAX};

	if (!udd_live())
		return -ENOTCONN;
	udd_hint_push(address, bytes, UDD_HINT_ADVISE, &nowhere);
	return 0;
}

int udedup_pause(void)
{
	if (!udd_live())
		return -ENOTCONN;
	udd_hold_merging(true);
	return 0;
}

int udedup_resume(void)
{
	if (!udd_live())
		return -ENOTCONN;
	udd_hold_merging(false);
	return 0;
}

int udedup_stats(struct udedup_stats *ret)
{
	const struct udd_stats *stats;

	if (!udd_live())
		return -ENOTCONN;
	stats = udd_live()->stats;
	*ret = (struct udedup_stats){
		.pages_merged = stats->pages_merged,
		.zero_pages = stats->zero_pages,
		.runs = stats->runs,
		.break_pages = stats->break_pages,
		.break_events = stats->break_events,
		.hints = stats->hint_count,
		.merging = stats->merging && !stats->paused,
	};
	memcpy(ret->reason, stats->reason, sizeof(ret->reason));
	if (stats->merging && stats->paused)
		strcpy(ret->reason, "the program has paused it");
	return 0;
}
