// SPDX-License-Identifier: MIT
#include "tracee.h"

#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

enum {
	// What the kernel has a system call return that it will make again (include/linux/errno.h); never seen without ptrace.
	ERESTART_SYS = 512,
	ERESTART_NO_INTERRUPT = 513,
	ERESTART_NO_HANDLER = 514,
	ERESTART_BLOCK = 516,
	SPINS = 100,          // looks for a stop before sleeping between them
	REST_NS = 20000,
	STACK_MOST = 1 << 18, // bytes of a stack that are looked at
};

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

uint64_t udd_tracee_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void udd_tracee_rest(uint64_t nanoseconds)
{
	struct timespec time = {.tv_sec = (time_t)(nanoseconds / 1000000000), .tv_nsec = (long)(nanoseconds % 1000000000)};

	nanosleep(&time, NULL);
}

int udd_tracee_await(pid_t tid, uint64_t deadline, int *status)
{
	for (unsigned spins = 0;; spins++) {
		pid_t got = waitpid(tid, status, __WALL | WNOHANG);

		if (got == tid)
			return WIFSTOPPED(*status) ? 0 : -ESRCH;
		if (got < 0 && errno != EINTR)
			return -ESRCH;
		if (udd_tracee_now() > deadline)
			return -ETIMEDOUT;
		if (spins > SPINS)
			udd_tracee_rest(REST_NS);
	}
}

int udd_tracee_begin_hold(pid_t tid)
{
	if (ptrace(PTRACE_SEIZE, tid, NULL, PTRACE_O_TRACESYSGOOD))
		return -errno;
	return ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) ? -errno : 0;
}

void udd_tracee_forgo(pid_t tid, uint64_t deadline)
{
	int status;

	if (udd_tracee_await(tid, deadline, &status) == 0)
		ptrace(PTRACE_DETACH, tid, NULL, status >> 16 ? 0 : WSTOPSIG(status));
}

bool udd_tracee_in_call(const struct user_regs_struct *registers)
{
	return (long)registers->orig_rax >= 0;
}

bool udd_tracee_waits(const struct user_regs_struct *registers)
{
	long result = (long)registers->rax;

	return udd_tracee_in_call(registers) && (result == -ERESTART_SYS || result == -ERESTART_NO_INTERRUPT ||
						 result == -ERESTART_NO_HANDLER || result == -ERESTART_BLOCK);
}

// Calls that return EINTR also when no signal has come, but only we have: signal(7), "Interruption of system calls and library
// functions by stop signals", and calls on sockets with a timeout. None of them has done anything then.
static bool fails_for_our_sake(long number)
{
	static const short numbers[] = {
		SYS_read,         SYS_write,       SYS_pread64,  SYS_pwrite64,        SYS_readv,    SYS_writev,
		SYS_accept,       SYS_accept4,     SYS_recvfrom, SYS_recvmsg,         SYS_recvmmsg, SYS_sendto,
		SYS_sendmsg,      SYS_sendmmsg,    SYS_semop,    SYS_semtimedop,      SYS_msgrcv,   SYS_msgsnd,
		SYS_epoll_wait,   SYS_epoll_pwait, SYS_openat,   SYS_rt_sigtimedwait, SYS_open,     SYS_io_getevents,
		SYS_io_pgetevents, SYS_io_uring_enter, SYS_epoll_pwait2,
	};

	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		if (numbers[i] == number)
			return true;
	}
	return false;
}

long udd_tracee_again(const struct user_regs_struct *registers)
{
	return (long)registers->rax == -ERESTART_BLOCK ? SYS_restart_syscall : (long)registers->orig_rax;
}

// With this result the kernel makes the call again, unless a signal with a handler is there by now: then it is EINTR all the same.
// At once, so that it does so even if we are killed.
static int make_again(pid_t tid, struct user_regs_struct *registers)
{
	if (!udd_tracee_in_call(registers) || (long)registers->rax != -EINTR || !fails_for_our_sake((long)registers->orig_rax))
		return 0;
	registers->rax = (unsigned long)-ERESTART_NO_HANDLER;
	return ptrace(PTRACE_SETREGS, tid, NULL, registers) ? -ESRCH : 0;
}

int udd_tracee_await_hold(pid_t tid, uint64_t deadline, struct udd_held_thread *ret)
{
	*ret = (struct udd_held_thread){.tid = tid};
	for (;;) {
		int status;
		int r = udd_tracee_await(tid, deadline, &status);

		ret->late = r == -ETIMEDOUT;
		if (r)
			return ret->late ? -EBUSY : r;
		if (status >> 16 == PTRACE_EVENT_STOP) {
			if (WSTOPSIG(status) == SIGTRAP)
				return ptrace(PTRACE_GETREGS, tid, NULL, &ret->registers) ? -ESRCH : make_again(tid, &ret->registers);
			// The program was just stopped by a signal, and stays so.
			ptrace(PTRACE_DETACH, tid, NULL, NULL);
			return -EBUSY;
		}
		// A signal came first.
		ptrace(PTRACE_CONT, tid, NULL, WSTOPSIG(status));
	}
}

void udd_tracee_release(const struct udd_held_thread *thread)
{
	ptrace(PTRACE_DETACH, thread->tid, NULL, NULL);
}

// cs, gs, fs and ss in the context that the kernel saves for a handler of a 64-bit program; 16 bytes before is the place.
static const uint64_t SEGMENTS = 0x002b000000000033;

bool udd_tracee_any_interrupted(pid_t pid, uint64_t stack, bool (*found)(const void *context, uint64_t place), const void *context)
{
	enum { PIECE = 4096 / sizeof(uint64_t) };
	uint64_t words[PIECE];
	uint64_t last[2] = {0, 0};

	// To the end of a page, then page by page until there is none.
	for (uint64_t at = stack & ~7UL, end = at + STACK_MOST; at < end;) {
		size_t wanted = 4096 - at % 4096;
		struct iovec local = {.iov_base = words, .iov_len = wanted};
		struct iovec remote = {.iov_base = (void *)(uintptr_t)at, .iov_len = wanted};
		ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);

		if (got < (ssize_t)wanted)
			return false;
		for (size_t i = 0; i < wanted / sizeof(uint64_t); i++) {
			if (words[i] == SEGMENTS && found(context, last[0]))
				return true;
			last[0] = last[1];
			last[1] = words[i];
		}
		at += wanted;
	}
	return false;
}
