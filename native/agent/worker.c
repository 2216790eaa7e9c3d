// SPDX-License-Identifier: MIT
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "agent.h"
#include "attach.h"
#include "fault.h"
#include "merged.h"
#include "rings.h"
#include "scan.h"
#include "segments.h"
#include "sys.h"
#include "thread.h"
#include "transaction.h"
#include "userfault.h"

enum {
	WELCOME_MS = 10000,      // how long the engine may take to answer a hello
	BACKOFF_FIRST_MS = 100,  // between attempts to join
	BACKOFF_LAST_MS = 30000,
	FDS_MAX = 2,             // descriptors that come with one message
};

// Everything the worker knows that nobody else needs.
struct worker {
	int socket;
	int device;                 // /dev/userfaultfd, from the engine or opened here; -1
	bool ever_joined;
	char *shared;               // the shared area, stays mapped when the engine goes away; NULL before joining
	struct udd_scan_state scan;
	char *request;              // UDD_MESSAGE_BYTES each
	char *answer;
	int handed;                 // a segment's descriptor, to go with the answer; -1
};

// A received message.
struct received {
	long bytes;       // negative errno, 0 = the engine is gone
	int fds[FDS_MAX]; // -1 where there is none; the receiver's to close
};

static void copy_text(char *to, size_t room, const char *from)
{
	size_t length = 0;

	while (length < room - 1 && from[length])
		length++;
	memcpy(to, from, length);
	memset(to + length, 0, room - length);
}

void udd_stop_merging(const char *reason)
{
	struct udd_live *live = udd_live();

	__atomic_store_n(&live->merging, UDD_MERGING_OFF, __ATOMIC_RELEASE);
	if (live->stats->reason[0] == '\0')
		copy_text(live->stats->reason, sizeof(live->stats->reason), reason);
	__atomic_store_n(&live->stats->merging, 0, __ATOMIC_RELEASE);
}

void udd_nap(uint64_t milliseconds)
{
	struct timespec time = udd_timespec(milliseconds * 1000000);

	udd_sys(SYS_nanosleep, &time, NULL);
}

// Tells udedup_join() how it went.
static void announce(uint32_t joined)
{
	__atomic_store_n(&udd_live()->joined, joined, __ATOMIC_RELEASE);
	udd_sys(SYS_futex, &udd_live()->joined, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

// ---- messages ----

static struct received receive(int socket, char *buffer, int flags)
{
	struct received ret = {.fds = {-1, -1}};
	char control[CMSG_SPACE(sizeof(int) * FDS_MAX)] __attribute__((aligned(8)));
	struct iovec vector = {.iov_base = buffer, .iov_len = UDD_MESSAGE_BYTES};
	struct msghdr message = {
		.msg_iov = &vector,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *header;

	do
		ret.bytes = udd_sys(SYS_recvmsg, socket, &message, flags | MSG_CMSG_CLOEXEC);
	while (ret.bytes == -EINTR);
	if (ret.bytes <= 0)
		return ret;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
		memcpy(ret.fds, CMSG_DATA(header), udd_min(header->cmsg_len - CMSG_LEN(0), sizeof(ret.fds)));
	return ret;
}

static void drop_fds(const struct received *message)
{
	for (int i = 0; i < FDS_MAX; i++)
		udd_close(message->fds[i]);
}

// `fd`: a descriptor to go with it, -1 for none.
static bool send_message(int socket, const void *message, size_t bytes, int fd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	struct iovec vector = {.iov_base = (void *)message, .iov_len = bytes};
	struct msghdr header = {
		.msg_iov = &vector,
		.msg_iovlen = 1,
		.msg_control = fd < 0 ? NULL : &control,
		.msg_controllen = fd < 0 ? 0 : sizeof(control),
	};
	long ret;

	memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	do
		ret = udd_sys(SYS_sendmsg, socket, &header, MSG_NOSIGNAL);
	while (ret == -EINTR);
	return ret == (long)bytes;
}

static bool is_message(const struct received *message, const char *buffer, size_t bytes)
{
	const struct udd_header *header = (const struct udd_header *)buffer;

	return message->bytes >= (long)sizeof(*header) && header->magic == UDD_MAGIC && message->bytes >= (long)bytes;
}

static bool wait_for(int fd, short events, int milliseconds)
{
	struct pollfd poll = {.fd = fd, .events = events};

	return udd_sys(SYS_poll, &poll, 1, milliseconds) == 1;
}

// ---- joining ----

enum { OBSTACLE_MAX = UDD_REASON_MAX - UDD_PATH_MAX }; // before the path, so that every path has room behind it

static void say_forbidden(const char *obstacle)
{
	char reason[UDD_REASON_MAX];
	size_t length = strnlen(obstacle, OBSTACLE_MAX);

	copy_text(reason, sizeof(reason), obstacle);
	copy_text(reason + length, UDD_PATH_MAX, udd_agent.socket_path);
	udd_stop_merging(reason);
}

// False if the engine is another user's, at a place where anybody may put one instead of this user's own.
static bool is_trusted(int fd)
{
	struct ucred engine = {0};
	socklen_t bytes = sizeof(engine);

	if (strncmp(udd_agent.socket_path, UDD_TEMPORARY, strlen(UDD_TEMPORARY)) != 0)
		return true;
	if (udd_sys(SYS_getsockopt, fd, SOL_SOCKET, SO_PEERCRED, &engine, &bytes) != 0)
		return false;
	return engine.uid == 0 || engine.uid == (uid_t)udd_sys(SYS_geteuid);
}

// A descriptor, or a negative errno; -EACCES means that it is no use to try again.
static int connect_engine(const struct worker *worker)
{
	const char *obstacle = "may not connect to ";
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	long fd = udd_sys(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	long ret;

	if (udd_failed(fd))
		return (int)fd;
	copy_text(address.sun_path, sizeof(address.sun_path), udd_agent.socket_path);
	do
		ret = udd_sys(SYS_connect, fd, &address, sizeof(address));
	while (ret == -EINTR);
	if (!udd_failed(ret) && is_trusted((int)fd))
		return (int)fd;
	udd_close((int)fd);
	if (!udd_failed(ret)) {
		obstacle = "not this user's: ";
		ret = -EACCES;
	}
	if (ret != -EACCES)
		return (int)ret;
	// An engine that takes over from another lets nobody in for a moment, until its socket has its permissions.
	if (worker->ever_joined)
		return -EAGAIN;
	say_forbidden(obstacle);
	return -EACCES;
}

// Whether the kernel gives this process a userfaultfd without the device (vm.unprivileged_userfaultfd, or rights).
static bool needs_no_device(void)
{
	udd_auto_close int fd = udd_uffd_open(-1);

	return fd >= 0;
}

static bool say_hello(const struct worker *worker)
{
	struct udd_hello hello = {
		.header = {.magic = UDD_MAGIC, .type = UDD_HELLO},
		.version = UDD_WIRE_VERSION,
		.engine_id = {udd_agent.engine_id[0], udd_agent.engine_id[1]},
		.hooks = udd_agent.hooks,
	};

	if (udd_live()->uffd == 0 && worker->device < 0 && !needs_no_device())
		hello.flags |= UDD_HELLO_NEED_UFFD;
	if (udd_agent.quiet)
		hello.flags |= UDD_HELLO_QUIET;
	if (worker->ever_joined)
		hello.flags |= UDD_HELLO_REJOIN;
	else if (udd_agent.run_pages)
		hello.flags |= UDD_HELLO_FORKED;
	memcpy(hello.label, udd_agent.label, sizeof(hello.label));
	memcpy(hello.command, udd_agent.command, sizeof(hello.command));
	return send_message(worker->socket, &hello, sizeof(hello), -1);
}

// Opens the userfaultfd and starts the fault thread, once in a process. 0 or a negative errno.
static int start_faults(struct worker *worker, int device)
{
	struct udd_live *live = udd_live();
	int fd;
	int ret;

	if (live->uffd)
		return 0;
	fd = udd_uffd_open(device >= 0 ? device : worker->device);
	if (fd < 0)
		return fd;
	live->uffd = fd + 1;
	ret = udd_fault_prepare();
	if (ret)
		return ret;
	ret = udd_staging_reset();
	if (ret)
		return ret;
	ret = udd_thread_start(udd_fault_thread, NULL, udd_agent.fault_stack, udd_agent.tls + UDD_PAGE_SIZE, CLONE_FILES);
	if (ret < 0)
		return ret;
	live->fault_tid = ret;
	return 0;
}

static int use_shared_area(struct worker *worker, int fd, uint64_t mount_dev)
{
	struct udd_live *live = udd_live();
	uint64_t merged = live->stats->pages_merged;
	struct udd_stats *stats;
	long ret;

	// After a rejoin, over the area of the engine before: a thread may still be pushing a hint there.
	ret = udd_sys(SYS_mmap, worker->shared, UDD_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | (worker->shared ? MAP_FIXED : 0),
		      fd, 0);
	if (udd_failed(ret))
		return (int)ret;
	// A child must not write into its parent's rings.
	udd_sys(SYS_madvise, ret, UDD_SHARED_BYTES, MADV_DONTFORK);
	worker->shared = udd_pointer((uint64_t)ret);
	// Memory that is shared is promised page by page, when it is touched; where the kernel promises none any more (commit.h), that is a
	// SIGBUS for the application, whose threads write to the rings.
	ret = udd_sys(SYS_madvise, ret, UDD_SHARED_COPY, MADV_POPULATE_WRITE);
	if (udd_failed(ret))
		return -ENOMEM;
	worker->scan.copy = worker->shared + UDD_SHARED_COPY;
	worker->scan.shared_fd = fd;
	stats = (struct udd_stats *)(worker->shared + UDD_SHARED_STATS);
	udd_lock_exclusive(&live->lock, 0);
	udd_files_choose(mount_dev);
	*stats = live->own_stats;
	stats->pages_merged = merged;
	stats->runs = udd_agent.runs.count;
	stats->reason[0] = '\0';
	live->stats = stats;
	live->drops = (struct udd_drop_ring *)(worker->shared + UDD_SHARED_DROPS);
	// What is merged already is reported first, by UDD_RUNS.
	live->reported = udd_agent.run_pages ? 0 : UINT64_MAX;
	udd_unlock_exclusive(&live->lock);
	return 0;
}

static void leave_shared_area(struct worker *worker)
{
	struct udd_live *live = udd_live();

	if (worker->scan.shared_fd < 0)
		return;
	udd_lock_exclusive(&live->lock, 0);
	__atomic_store_n(&live->merging, UDD_MERGING_OFF, __ATOMIC_RELEASE);
	live->own_stats = *live->stats;
	live->own_stats.merging = 0;
	live->stats = &live->own_stats;
	live->drops = NULL;
	udd_agent.files_served = 0;
	__atomic_store_n(&live->hints, NULL, __ATOMIC_RELEASE);
	udd_unlock_exclusive(&live->lock);
	udd_close(worker->scan.shared_fd);
	worker->scan.shared_fd = -1;
}

// Says hello and takes what the engine gives. 0, or a negative errno; -EACCES means that it is no use to try again.
static int join(struct worker *worker)
{
	struct udd_live *live = udd_live();
	const struct udd_welcome *welcome = (const struct udd_welcome *)worker->request;
	struct received message;
	int ret;

	if (!say_hello(worker) || !wait_for(worker->socket, POLLIN, WELCOME_MS))
		return -EPIPE;
	message = receive(worker->socket, worker->request, MSG_DONTWAIT);
	if (is_message(&message, worker->request, sizeof(struct udd_refused)) && welcome->header.type == UDD_REFUSED) {
		copy_text(live->stats->reason, sizeof(live->stats->reason), ((struct udd_refused *)worker->request)->reason);
		return -EACCES;
	}
	if (!is_message(&message, worker->request, sizeof(*welcome)) || welcome->header.type != UDD_WELCOME || message.fds[0] < 0) {
		drop_fds(&message);
		return -EPROTO;
	}
	ret = start_faults(worker, message.fds[1]);
	udd_close(message.fds[1]);
	if (!ret)
		ret = use_shared_area(worker, message.fds[0], welcome->mount_dev);
	if (ret) {
		udd_close(message.fds[0]);
		udd_stop_merging(ret == -EPERM ? "no permission for userfaultfd" : "userfaultfd or memory is not to be had");
		return -EACCES;
	}
	udd_agent.engine_id[0] = welcome->engine_id[0];
	udd_agent.engine_id[1] = welcome->engine_id[1];
	live->holdoff_ns = (uint64_t)welcome->holdoff_ms * 1000000;
	live->vma_limit = welcome->vma_limit;
	worker->scan.flags = welcome->flags;
	if (welcome->flags & UDD_CONFIG_QUIET)
		udd_agent.quiet = true;
	worker->ever_joined = true;
	udd_arm_runs();
	if (udd_agent.reason[0]) {
		udd_stop_merging(udd_agent.reason);
	} else if (!live->stats->foreign_events) {
		__atomic_store_n(&live->merging, UDD_MERGING_ON, __ATOMIC_RELEASE);
		live->stats->merging = 1;
	}
	if (welcome->flags & UDD_CONFIG_HINTS)
		__atomic_store_n(&live->hints, (struct udd_hint_ring *)(worker->shared + UDD_SHARED_HINTS), __ATOMIC_RELEASE);
	return udd_fault_watch(worker->socket);
}

// ---- requests ----

static void publish_stats(void)
{
	struct udd_stats *stats = udd_live()->stats;
	// The CPU clock of a thread, by its tid (see clock_getcpuclockid(3) and the kernel's posix-timers_types.h).
	int fault_clock = (int)(~(unsigned)udd_live()->fault_tid << 3 | 6);

	stats->cpu_ns = udd_clock(CLOCK_THREAD_CPUTIME_ID) + udd_clock(fault_clock);
	stats->memory_bytes = udd_bytes(udd_agent.runs.touched) +
			      (uint64_t)udd_agent.marks.leaf_count * sizeof(udd_agent.marks.leaves[0]) +
			      udd_agent.layout.count * sizeof(struct udd_candidate) + sizeof(struct udd_live);
}

static size_t answer_reports(struct worker *worker, const struct udd_header *header)
{
	struct udd_reports *ret = (struct udd_reports *)worker->answer;
	struct udd_report *reports = (struct udd_report *)(ret + 1);

	worker->scan.split = header->type == UDD_VISIT && header->value;
	if (header->type == UDD_SCAN)
		udd_scan(&worker->scan, ((const struct udd_scan *)header)->pages, ret, reports);
	else
		udd_visit(&worker->scan, (const struct udd_range *)(header + 1), header->count, ret, reports);
	return sizeof(*ret) + ret->header.count * sizeof(*reports);
}

static size_t answer_merges(struct worker *worker, const struct udd_header *header)
{
	struct udd_header *ret = (struct udd_header *)worker->answer;
	const struct udd_run *runs = (const struct udd_run *)(header + 1);
	struct udd_merge_result *results = (struct udd_merge_result *)(ret + 1);

	for (uint32_t i = 0; i < header->count; i++)
		udd_merge(&runs[i], &results[i]);
	ret->count = header->count;
	return sizeof(*ret) + header->count * sizeof(*results);
}

static size_t answer_unmerge(struct worker *worker, const struct udd_header *header)
{
	struct udd_header *ret = (struct udd_header *)worker->answer;
	const struct udd_range *ranges = (const struct udd_range *)(header + 1);

	if (header->count == 0 && header->value)
		ret->value = udd_files_unmerge(header->value);
	else if (header->count == 0)
		ret->value = udd_unmerge((struct udd_span){0, UINT64_MAX});
	for (uint32_t i = 0; i < header->count; i++)
		ret->value += udd_unmerge((struct udd_span){ranges[i].address, ranges[i].address + udd_bytes(ranges[i].pages)});
	return sizeof(*ret);
}

static size_t answer_runs(struct worker *worker, const struct udd_cursor *cursor)
{
	struct udd_live *live = udd_live();
	struct udd_header *ret = (struct udd_header *)worker->answer;
	struct udd_run *items = (struct udd_run *)(ret + 1);
	const struct udd_runs *runs = &udd_agent.runs;
	bool counts = cursor->header.value == 1;
	bool goes_on = counts && cursor->address;
	const struct udd_run_entry *run;
	bool cut_short;

	udd_lock_exclusive(&live->lock, 0);
	udd_settle();
	if (counts && !goes_on)
		live->reported = 0;
	cut_short = goes_on && !live->reported;
	ret->value = live->drops->head;
	// A count goes on at its border: what moved to between that and the last run reported is counted already.
	run = runs->count && !cut_short ? udd_runs_find(runs, goes_on ? live->reported : cursor->address) : NULL;
	for (; run && ret->count < UDD_ITEMS_MAX; run = udd_runs_next(run)) {
		const struct udd_segment_map *segment = &udd_agent.segments[run->segment];

		if (run->broken || udd_segment_is_foreign(segment))
			continue;
		items[ret->count++] = (struct udd_run){
			.address = run->address,
			.pages = run->pages,
			.segment = segment->id,
			.slot = run->slot,
		};
	}
	if (counts && !cut_short)
		live->reported = run ? run->address : UINT64_MAX;
	udd_unlock_exclusive(&live->lock);
	return sizeof(*ret) + ret->count * sizeof(*items);
}

static size_t answer_handover(struct worker *worker, const struct udd_cursor *cursor)
{
	struct udd_handover *ret = (struct udd_handover *)worker->answer;
	int at = cursor->address < UDD_SEGMENTS_MAX ? udd_segment_next_foreign((uint32_t)cursor->address) : -ENOENT;
	const struct udd_segment_map *segment = &udd_agent.segments[at < 0 ? 0 : at];

	if (at >= 0) {
		ret->header.count = 1;
		ret->header.value = (uint64_t)at + 1;
		ret->device = segment->device;
		ret->inode = segment->inode;
		worker->handed = segment->fd;
	}
	return sizeof(*ret);
}

static size_t answer_copy(struct worker *worker, const struct udd_header *header)
{
	struct udd_copied *ret = (struct udd_copied *)worker->answer;

	udd_copy(&worker->scan, (const struct udd_range *)(header + 1), header->count, ret->valid);
	return sizeof(*ret);
}

static size_t answer_huge(const struct worker *worker, const struct udd_header *header)
{
	struct udd_huge *ret = (struct udd_huge *)worker->answer;

	udd_find_huge((const uint64_t *)(header + 1), header->count, ret->huge);
	return sizeof(*ret);
}

// Bytes that a request of this type with this many items must have, 0 if there is no such request.
static size_t request_bytes(const struct udd_header *header)
{
	if (header->type != UDD_SCAN && header->count > UDD_ITEMS_MAX)
		return 0;
	switch (header->type) {
	case UDD_SEGMENT:
	case UDD_SEGMENT_DROP:
		return sizeof(struct udd_segment);
	case UDD_SCAN:
		return sizeof(struct udd_scan);
	case UDD_RUNS:
	case UDD_HANDOVER:
		return sizeof(struct udd_cursor);
	case UDD_VISIT:
	case UDD_COPY:
	case UDD_UNMERGE:
		return sizeof(*header) + header->count * sizeof(struct udd_range);
	case UDD_MERGE:
		return sizeof(*header) + header->count * sizeof(struct udd_run);
	case UDD_HUGE:
		return sizeof(*header) + header->count * sizeof(uint64_t);
	default:
		return 0;
	}
}

static size_t answer_segment(struct worker *worker, struct received *message)
{
	const struct udd_segment *segment = (const struct udd_segment *)worker->request;
	struct udd_header *ret = (struct udd_header *)worker->answer;
	int status = message->fds[0] < 0 ? -EBADF : udd_segment_add(segment->id, segment->slots, message->fds[0]);

	if (status < 0) {
		ret->status = status;
	} else {
		message->fds[0] = -1;
		ret->value = (uint64_t)status;
	}
	return sizeof(*ret);
}

static size_t answer(struct worker *worker, struct received *message)
{
	const struct udd_header *header = (const struct udd_header *)worker->request;
	const struct udd_segment *segment = (const struct udd_segment *)header;
	struct udd_header *ret = (struct udd_header *)worker->answer;

	switch (header->type) {
	case UDD_SEGMENT:
		return answer_segment(worker, message);
	case UDD_SEGMENT_DROP:
		ret->status = udd_segment_remove(segment->id);
		return sizeof(*ret);
	case UDD_COPY:
		return answer_copy(worker, header);
	case UDD_MERGE:
		return answer_merges(worker, header);
	case UDD_UNMERGE:
		return answer_unmerge(worker, header);
	case UDD_HUGE:
		return answer_huge(worker, header);
	case UDD_RUNS:
		return answer_runs(worker, (const struct udd_cursor *)header);
	case UDD_HANDOVER:
		return answer_handover(worker, (const struct udd_cursor *)header);
	default:
		return answer_reports(worker, header);
	}
}

// Does one request. False if the engine is gone or talks nonsense.
static bool serve(struct worker *worker, struct received *message)
{
	const struct udd_header *header = (const struct udd_header *)worker->request;
	struct udd_header *ret = (struct udd_header *)worker->answer;
	size_t bytes;

	if (!is_message(message, worker->request, sizeof(*header)) || !request_bytes(header) ||
	    message->bytes < (long)request_bytes(header))
		return false;
	memset(ret, 0, sizeof(struct udd_reports));
	worker->handed = -1;
	bytes = answer(worker, message);
	*ret = (struct udd_header){
		.magic = UDD_MAGIC,
		.type = UDD_DONE,
		.count = ret->count,
		.seq = header->seq,
		.status = ret->status,
		.value = ret->value,
	};
	publish_stats();
	return send_message(worker->socket, worker->answer, bytes, worker->handed);
}

static bool ring_engine(const struct worker *worker)
{
	const struct udd_header doorbell = {.magic = UDD_MAGIC, .type = UDD_DOORBELL};

	return send_message(worker->socket, &doorbell, sizeof(doorbell), -1);
}

// Serves the engine until it goes away.
static void serve_engine(struct worker *worker)
{
	struct udd_live *live = udd_live();

	// The engine may have spoken before the fault thread listened.
	__atomic_or_fetch(&live->bell, UDD_BELL_SOCKET, __ATOMIC_SEQ_CST);
	for (;;) {
		uint32_t bell = __atomic_exchange_n(&live->bell, 0, __ATOMIC_SEQ_CST);

		if (udd_attach_is_leaving() || ((bell & UDD_BELL_HINTS) && !ring_engine(worker)))
			return;
		// Not urgent: such runs work, they only break uncounted so far.
		if ((bell & UDD_BELL_ARM) && !udd_arm_runs())
			udd_ring(UDD_BELL_ARM);
		while (bell & UDD_BELL_SOCKET) {
			struct received message = receive(worker->socket, worker->request, MSG_DONTWAIT);
			bool good = message.bytes == -EAGAIN || (message.bytes > 0 && serve(worker, &message));

			drop_fds(&message);
			if (!good)
				return;
			if (message.bytes == -EAGAIN)
				break;
		}
		if (!bell)
			udd_sys(SYS_futex, &live->bell, FUTEX_WAIT_PRIVATE, 0, NULL);
	}
}

// ---- leaving ----

// Nothing is shared any more. Returns when somebody attaches, and then it is as if nothing had been joined before.
static void wait_for_another_time(struct worker *worker, enum udd_attach_state state)
{
	bool clean = !udd_agent.runs.count;

	announce(2);
	udd_attach_park(state, clean);
	if (clean)
		udd_agent_forget();
	worker->ever_joined = false;
	udd_live()->stats->reason[0] = '\0';
	announce(0);
}

// Whether no page is shared any more. Pages that broke in place are private, but can't be moved out of their mapping.
static bool all_private(void)
{
	const struct udd_run_entry *run;

	udd_lock_exclusive(&udd_live()->lock, 0);
	udd_settle();
	run = udd_agent.runs.count ? udd_runs_find(&udd_agent.runs, 0) : NULL;
	while (run && run->broken)
		run = udd_runs_next(run);
	udd_unlock_exclusive(&udd_live()->lock);
	return !run;
}

// Gives everything back, and waits for another time. What can't be given back stays, and the worker joins again.
static void leave(struct worker *worker)
{
	const struct udd_span everything = {0, UINT64_MAX};

	udd_stop_merging("udedup detach has taken it out");
	while (!all_private()) {
		if (udd_unmerge(everything))
			continue;
		udd_attach_stay();
		return;
	}
	udd_agent.engine_id[0] = 0;
	udd_agent.engine_id[1] = 0;
	for (int at = 0; (at = udd_segment_next_foreign((uint32_t)at)) >= 0;)
		at++;
	// A thread may still be pushing a hint there.
	if (worker->shared)
		udd_sys(SYS_mmap, worker->shared, UDD_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	wait_for_another_time(worker, UDD_ATTACH_LEFT);
}

void udd_worker_thread(void *argument)
{
	struct worker worker = {
		.socket = -1,
		.device = -1,
		.scan = {.shared_fd = -1},
		.request = udd_agent.message,
		.answer = udd_agent.message + UDD_MESSAGE_BYTES,
	};
	uint64_t backoff = BACKOFF_FIRST_MS;
	int ret;

	// A descriptor table of its own, empty: neither holds the application's descriptors open, nor takes its numbers.
	if (udd_failed(udd_sys(SYS_close_range, 0, ~0U, CLOSE_RANGE_UNSHARE))) {
		udd_stop_merging("close_range is not to be had");
		announce(2);
		udd_sys(SYS_exit, 0);
	}
	udd_sys(SYS_prctl, PR_SET_NAME, "udedup-worker");
	// Short sleeps are to be short.
	udd_sys(SYS_prctl, PR_SET_TIMERSLACK, 1);
	// Nor does it keep a file system busy.
	udd_sys(SYS_chdir, "/");
	udd_nap((uint64_t)(uintptr_t)argument);
	udd_attach_wait();
	worker.device = (int)udd_sys(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	udd_agent.layout.smaps_fd = (int)udd_sys(SYS_openat, AT_FDCWD, "/proc/self/smaps", O_RDONLY | O_CLOEXEC);
	for (;;) {
		worker.socket = connect_engine(&worker);
		ret = worker.socket < 0 ? worker.socket : join(&worker);
		if (!ret) {
			announce(1);
			udd_attach_tell(UDD_ATTACH_JOINED);
			backoff = BACKOFF_FIRST_MS;
			serve_engine(&worker);
		}
		leave_shared_area(&worker);
		udd_close(worker.socket);
		if (ret == -EACCES) {
			wait_for_another_time(&worker, UDD_ATTACH_REFUSED);
		} else if (udd_attach_is_leaving()) {
			leave(&worker);
		} else {
			udd_attach_nap(backoff);
			backoff = udd_min(backoff * 2, BACKOFF_LAST_MS);
		}
	}
}
