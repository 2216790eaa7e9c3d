// SPDX-License-Identifier: MIT
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "../common/uffd.h"
#include "agent.h"
#include "sys.h"
#include "thread.h"

enum { FILTERED = 2 }; // what PR_GET_SECCOMP says of a thread with a filter

// Calls that fail by themselves or do nothing, one for each that the agent's threads make.
static const struct {
	long number;
	long arguments[4];
} calls[] = {
	{SYS_chdir, {(long)"/"}},
	{SYS_clone, {CLONE_THREAD}},
	{SYS_close, {-1}},
	{SYS_connect, {-1}},
	{SYS_epoll_create1, {-1}},
	{SYS_epoll_ctl, {-1}},
	{SYS_epoll_pwait, {-1}},
	{SYS_fcntl, {-1, F_GETFL}},
	{SYS_fstat, {-1}},
	{SYS_futex, {0, FUTEX_WAKE_PRIVATE}},
	{SYS_ioctl, {-1, PAGEMAP_SCAN}},
	{SYS_ioctl, {-1, UFFDIO_API}},
	{SYS_ioctl, {-1, UFFDIO_CONTINUE}},
	{SYS_ioctl, {-1, UFFDIO_MOVE}},
	{SYS_ioctl, {-1, UFFDIO_REGISTER}},
	{SYS_ioctl, {-1, UFFDIO_UNREGISTER}},
	{SYS_ioctl, {-1, UFFDIO_WAKE}},
	{SYS_ioctl, {-1, UFFDIO_WRITEPROTECT}},
	{SYS_ioctl, {-1, UFFDIO_ZEROPAGE}},
	{SYS_lseek, {-1}},
	{SYS_madvise, {0, 0, MADV_POPULATE_WRITE}},
	{SYS_mincore, {0}},
	{SYS_mmap, {0, 0, PROT_READ, MAP_SHARED}},
	{SYS_mprotect, {0, 0, PROT_READ}},
	{SYS_mremap, {0, 0, 0, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP}},
	{SYS_munmap, {0, 0}},
	{SYS_nanosleep, {0}},
	{SYS_openat, {AT_FDCWD, 0, O_RDONLY}},
	{SYS_poll, {0, 0, 0}},
	{SYS_pread64, {-1}},
	{SYS_prctl, {-1}},
	{SYS_pwrite64, {-1}},
	{SYS_read, {-1}},
	{SYS_recvmsg, {-1}},
	{SYS_rt_sigaction, {0}},
	{SYS_sched_getattr, {0}},
	{SYS_sched_setattr, {0}},
	{SYS_sendmsg, {-1}},
	{SYS_socket, {AF_UNIX, -1}},
	{SYS_close_range, {~0U, ~0U, CLOSE_RANGE_UNSHARE}},
};

// A process of its own, in the caller's memory: what kills it kills nobody else.
static void probe(void *argument)
{
	// Should it be killed, nobody is interested in a core file; 1 is what keeps programs that collect them out as well.
	const struct rlimit no_core = {.rlim_cur = 1, .rlim_max = 1};

	(void)argument;
	udd_sys(SYS_prlimit64, 0, RLIMIT_CORE, &no_core, NULL);
	for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
		const long *arguments = calls[i].arguments;
		long ret = udd_sys(calls[i].number, arguments[0], arguments[1], arguments[2], arguments[3]);

		if (ret == -EPERM || ret == -EACCES || ret == -ENOSYS)
			udd_sys(SYS_exit, 1);
	}
	udd_sys(SYS_exit, 0);
}

bool udd_sandbox_allows_us(void)
{
	int status = 0;
	long got;
	int pid;

	if (udd_sys(SYS_prctl, PR_GET_SECCOMP) != FILTERED)
		return true;
	// No SIGCHLD, and no wait() of the program's sees it.
	pid = udd_process_probe(probe, udd_agent.worker_stack, udd_agent.tls);
	if (pid < 0)
		return false;
	do
		got = udd_sys(SYS_wait4, pid, &status, __WALL, NULL);
	while (got == -EINTR);
	return got == pid && status == 0;
}
