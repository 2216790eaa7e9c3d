// SPDX-License-Identifier: MIT
// Decides which of the agent's system calls fail, and counts them in a table that all processes of a run share (the file
// named by UDEDUP_TEST_FAULTS, see faults.py).
//
// Calls on the agent's own threads fail, with each errno that the kernel may give for them. Of those that hooks make on the
// application's threads only the ones that the agent makes for itself do: a hook hands on the errno of what the application
// asked for, as it must. Calls that can't fail as the agent makes them are not in the list of errnos: to wake or to close,
// to set a signal mask.
#undef udd_syscall6
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent/agent.h"
#include "agent/thread.h"
#include "common/uffd.h"
#include "faults.h"

enum {
	SLOTS = 4096, // as in faults.py
	NAME = 40,
	ERRNOS = 8,
	EAGER = 40,   // calls of a kind that are likely to fail; the later ones are not, or nothing would ever work
	EAGER_ONE_IN = 8,
	LATER_ONE_IN = 256,
	RARELY = 20000, // after so many calls of a kind
	RARE_ONE_IN = 2048,
};

struct slot {
	uint64_t key;       // 0: free
	uint64_t calls;     // offered
	uint64_t faults[ERRNOS];
	int32_t errnos[ERRNOS];
	int64_t number;     // of the system call
	uint64_t request;   // of ioctl, or the operation of futex
	char function[NAME];
};

struct kind {
	long number;
	uint64_t request; // of ioctl, or the operation of futex; 0: any
	int errnos[ERRNOS];
};

static const struct kind kinds[] = {
	{SYS_ioctl, UFFDIO_REGISTER, {ENOMEM, EBUSY, EINVAL}},
	{SYS_ioctl, UFFDIO_MOVE, {EAGAIN, EBUSY, ENOENT, EINVAL, ENOMEM, EFAULT}},
	{SYS_ioctl, UFFDIO_WRITEPROTECT, {EAGAIN, ENOENT, EINVAL}},
	{SYS_ioctl, UFFDIO_CONTINUE, {EAGAIN, ENOMEM, ENOENT, EFAULT}},
	{SYS_ioctl, UFFDIO_API, {EINVAL}},
	{SYS_ioctl, USERFAULTFD_IOC_NEW, {EPERM, ENOMEM, EMFILE}},
	{SYS_ioctl, PROCMAP_QUERY, {ENOTTY}},
	{SYS_ioctl, PAGEMAP_SCAN, {ENOMEM, EINTR, EFAULT}},
	{SYS_futex, FUTEX_WAIT_PRIVATE, {EINTR, EAGAIN}},
	{SYS_mmap, 0, {ENOMEM, EAGAIN, EACCES}},
	{SYS_mremap, 0, {ENOMEM, EAGAIN, EFAULT}},
	{SYS_mprotect, 0, {ENOMEM}},
	{SYS_madvise, 0, {ENOMEM, EAGAIN, EFAULT}},
	{SYS_munmap, 0, {ENOMEM}},
	{SYS_pread64, 0, {EINTR, ENOMEM, EIO}},
	{SYS_pwrite64, 0, {ENOSPC, EFAULT, ENOMEM}},
	{SYS_read, 0, {EINTR, EAGAIN, ENOMEM}},
	{SYS_lseek, 0, {EINVAL}},
	{SYS_openat, 0, {EMFILE, ENFILE, ENOMEM, EACCES, ENOENT, EINTR}},
	{SYS_fstat, 0, {EIO, ENOMEM}},
	{SYS_fcntl, 0, {EINVAL}},
	{SYS_socket, 0, {EMFILE, ENFILE, ENOMEM, EACCES}},
	{SYS_connect, 0, {ECONNREFUSED, ENOENT, EAGAIN, EINTR, EACCES}},
	{SYS_sendmsg, 0, {EPIPE, ECONNRESET, ENOBUFS, ENOMEM, EINTR}},
	{SYS_recvmsg, 0, {EINTR, ECONNRESET, ENOMEM}},
	{SYS_poll, 0, {EINTR, ENOMEM}},
	{SYS_epoll_create1, 0, {EMFILE, ENFILE, ENOMEM}},
	{SYS_epoll_ctl, 0, {ENOSPC, ENOMEM}},
	{SYS_epoll_pwait, 0, {EINTR}},
	{SYS_userfaultfd, 0, {EPERM, ENOSYS, EMFILE, ENOMEM}},
	{SYS_close_range, 0, {ENOSYS, ENOMEM}},
	{SYS_nanosleep, 0, {EINTR}},
	{SYS_prctl, 0, {EINVAL}},
	{SYS_chdir, 0, {EACCES}},
	{SYS_sched_getattr, 0, {EINVAL, ENOSYS}},
	{SYS_sched_setattr, 0, {EPERM, EINVAL}},
};

// Where application threads do what the agent needs, and go on without it if it fails.
static const struct {
	const char *function;
	long number;
} on_application_threads[] = {
	{"lock_shared", SYS_futex},         {"wait_exclusive", SYS_futex},   {"udd_unlock_exclusive", SYS_futex},
	{"dissolve_piece", SYS_mremap},     {"dissolve_piece", SYS_madvise}, {"udd_remap", SYS_openat},
	{"mapping_at", SYS_ioctl},
};

// What is advised there was accepted for the same memory before; a failure would be an attribute lost.
static const char never[] = "udd_restore_attributes";

static struct slot *slots;
static uint64_t seed;

__attribute__((constructor(101))) static void open_table(void)
{
	const char *path = getenv("UDEDUP_TEST_FAULTS");
	const char *text = getenv("UDEDUP_TEST_FAULTS_SEED");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *table = fd < 0 ? MAP_FAILED : mmap(NULL, SLOTS * sizeof(*slots), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	seed = text ? strtoull(text, NULL, 0) : 0;
	if (table != MAP_FAILED)
		slots = table;
}

static bool may_fail_anywhere(const char *function, long number)
{
	for (size_t i = 0; i < sizeof(on_application_threads) / sizeof(on_application_threads[0]); i++) {
		if (on_application_threads[i].number == number && strcmp(on_application_threads[i].function, function) == 0)
			return true;
	}
	return false;
}

static bool on_agent_thread(void)
{
	const char *here = __builtin_frame_address(0);

	return udd_agent.live && ((here >= udd_agent.worker_stack && here < udd_agent.worker_stack + UDD_STACK_BYTES) ||
				  (here >= udd_agent.fault_stack && here < udd_agent.fault_stack + UDD_STACK_BYTES));
}

static uint64_t mix(uint64_t value)
{
	value ^= value >> 33;
	value *= 0xff51afd7ed558ccd;
	value ^= value >> 33;
	value *= 0xc4ceb9fe1a85ec53;
	return value ^ value >> 33;
}

// Giving frozen pages back: that the application's mapping is no longer there, or no longer ours, is nothing that happens while
// it is, and the page would be lost. Waiting, and memory, are what may be in the way.
static const struct kind move_back = {SYS_ioctl, UFFDIO_MOVE, {EAGAIN, ENOMEM}};

static bool is_move_back(const struct uffdio_move *move)
{
	const char *from = udd_pointer(move->src);

	return from >= udd_agent.staging && from < udd_agent.staging + UDD_STAGING_PAGES * UDD_PAGE_SIZE;
}

static const struct kind *find_kind(long number, uint64_t request, const long *arguments)
{
	if (request == UFFDIO_MOVE && is_move_back(udd_pointer((uint64_t)arguments[2])))
		return &move_back;
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		if (kinds[i].number == number && (!kinds[i].request || kinds[i].request == request))
			return &kinds[i];
	}
	return NULL;
}

static struct slot *find_slot(const char *function, const struct kind *kind)
{
	uint64_t key = ((uint64_t)kind->number << 32 | kind->request) ^ (kind == &move_back);

	for (const char *c = function; *c; c++)
		key = mix(key ^ (unsigned char)*c);
	key |= 1;
	for (uint64_t i = key; i < key + SLOTS; i++) {
		struct slot *slot = &slots[i % SLOTS];
		uint64_t expected = 0;

		if (__atomic_compare_exchange_n(&slot->key, &expected, key, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
			slot->number = kind->number;
			slot->request = kind->request;
			memcpy(slot->errnos, kind->errnos, sizeof(slot->errnos));
			strncpy(slot->function, function, NAME - 1);
			return slot;
		}
		if (expected == key)
			return slot;
	}
	return NULL;
}

long udd_fault_draw(const char *function, long number, const long *arguments)
{
	uint64_t request = number == SYS_ioctl || number == SYS_futex ? (uint32_t)arguments[1] : 0;
	const struct kind *kind;
	struct slot *slot;
	uint64_t call;
	uint64_t draw;
	unsigned count = 0;

	if (!slots || strcmp(function, never) == 0 || (!on_agent_thread() && !may_fail_anywhere(function, number)))
		return 0;
	kind = find_kind(number, request, arguments);
	slot = kind ? find_slot(kind == &move_back ? "thaw" : function, kind) : NULL;
	if (!slot)
		return 0;
	call = __atomic_fetch_add(&slot->calls, 1, __ATOMIC_RELAXED);
	draw = mix(seed ^ slot->key ^ mix(call));
	if (draw % (call < EAGER ? EAGER_ONE_IN : call < RARELY ? LATER_ONE_IN : RARE_ONE_IN))
		return 0;
	while (count < ERRNOS && kind->errnos[count])
		count++;
	count = (unsigned)((draw >> 32) % count);
	__atomic_fetch_add(&slot->faults[count], 1, __ATOMIC_RELAXED);
	return -kind->errnos[count];
}
