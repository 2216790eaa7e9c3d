// SPDX-License-Identifier: MIT
//
// Calling a function in a thread of another program: which thread can be used, and how.
//
// dlopen() takes locks of libc's (the loader's, malloc's), so the thread may hold none of them, and nothing on its stack may be
// in the middle of what they protect. Such is a thread that waits in a system call which none of this code makes, or that runs
// in code which none of it calls; and no signal handler on its stack has interrupted anything else.

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "../common/uffd.h"
#include "engine.h"
#include "tracee.h"

enum {
	CODE_64 = 0x33,            // the segment of 64-bit code
	RED_ZONE = 128,            // bytes below the stack pointer that are a function's own (psABI)
	STACK_ROOM = 1 << 16,      // bytes that the call may need
	XSTATE_MOST = 1 << 14,     // bytes
	XSTATE_PLAIN = 2696,       // bytes of it without AMX, where a processor has that
	HOLD_ALL_NS = 40000000,    // how long all threads may take to stop, at first
	LONGER_AFTER_NS = 1000000000, // whenever so much patience is gone, they may take twice as long: the machine is busy
	PAUSE_NS = 3000000,        // between two attempts
	PATIENT_AFTER_NS = 100000000, // from when on threads that run are used, too
	AGAIN_NS = 10000000000,    // for a thread to stop that is to be let go of
};

static int read_memory(pid_t pid, uint64_t address, void *ret, size_t bytes)
{
	struct iovec local = {.iov_base = ret, .iov_len = bytes};
	struct iovec remote = {.iov_base = (void *)(uintptr_t)address, .iov_len = bytes};

	return process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)bytes ? 0 : -EFAULT;
}

static int write_memory(pid_t pid, uint64_t address, const void *from, size_t bytes)
{
	struct iovec local = {.iov_base = (void *)from, .iov_len = bytes};
	struct iovec remote = {.iov_base = (void *)(uintptr_t)address, .iov_len = bytes};

	return process_vm_writev(pid, &local, 1, &remote, 1, 0) == (ssize_t)bytes ? 0 : -EFAULT;
}

static bool is_in(const struct udd_code *code, size_t count, uint64_t address)
{
	for (size_t i = 0; i < count; i++) {
		if (address >= code[i].start && address < code[i].end)
			return true;
	}
	return false;
}

// The text of a file of a thread in /proc. False if there is none any more.
static bool read_task_file(pid_t pid, pid_t tid, const char *name, char *ret, size_t room)
{
	char path[64];
	ssize_t got;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", pid, tid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	got = read(fd, ret, room - 1);
	close(fd);
	ret[got < 0 ? 0 : got] = '\0';
	return got > 0;
}

// A thread's state as a letter, and its number in its own namespace.
static char task_state(pid_t pid, pid_t tid, int *own_number)
{
	char text[4096];
	const char *state = read_task_file(pid, tid, "status", text, sizeof(text)) ? strstr(text, "\nState:\t") : NULL;
	const char *numbers = state ? strstr(text, "\nNSpid:") : NULL;
	const char *last;

	if (!numbers)
		return 'X';
	last = numbers + 1;
	for (const char *at = last; *at && *at != '\n'; at++) {
		if (*at == '\t')
			last = at + 1;
	}
	*own_number = atoi(last);
	return state[8];
}

// Threads of a program, as they come; 0 at the end.
static pid_t next_task(DIR *tasks)
{
	struct dirent *entry;

	while ((entry = readdir(tasks))) {
		if (entry->d_name[0] != '.')
			return atoi(entry->d_name);
	}
	return 0;
}

static DIR *open_tasks(pid_t pid)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	return opendir(path);
}

// -ESRCH also for one that ends: the kernel says EPERM then.
static int begin_hold(pid_t pid, pid_t tid)
{
	int own_number;
	int r = udd_tracee_begin_hold(tid);

	return r == -EPERM && strchr("XZ", task_state(pid, tid, &own_number)) ? -ESRCH : r;
}

// No signal that somebody sends may come between two steps.
static void block_signals(sigset_t *before)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, before);
}

// ---- which thread ----

// System calls in which programs wait, and which neither malloc() nor the loader makes where it waits.
static bool is_wait(const struct user_regs_struct *registers)
{
	static const short numbers[] = {
		SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_recvmmsg, SYS_accept, SYS_accept4, SYS_poll, SYS_ppoll,
		SYS_select, SYS_pselect6, SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_nanosleep, SYS_clock_nanosleep,
		SYS_pause, SYS_rt_sigsuspend, SYS_rt_sigtimedwait, SYS_wait4, SYS_waitid, SYS_semop, SYS_semtimedop, SYS_msgrcv,
		SYS_mq_timedreceive, SYS_io_getevents, SYS_io_pgetevents, SYS_io_uring_enter, SYS_restart_syscall, SYS_flock,
	};

	// Condition variables, semaphores and joins wait so; locks of libc's do not (its lowlevellock.h).
	if (registers->orig_rax == SYS_futex)
		return (registers->rsi & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET;
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		if (numbers[i] == (long)registers->orig_rax)
			return true;
	}
	return false;
}

// Is the thread in code that the kernel has go elsewhere when it is interrupted?
static bool in_restartable_sequence(pid_t tid)
{
	struct __ptrace_rseq_configuration configuration;
	uint64_t sequence;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof(configuration), &configuration) != sizeof(configuration))
		return true;
	if (!configuration.rseq_abi_pointer)
		return false;
	// rseq_cs, behind the two numbers of the processor.
	return read_memory(tid, configuration.rseq_abi_pointer + 8, &sequence, sizeof(sequence)) || sequence;
}

static bool has_stack_room(const struct udd_program *program, const struct udd_held_thread *thread)
{
	uint64_t stack = thread->registers.rsp;
	uint64_t first_part = stack - STACK_ROOM / 4;
	char byte;

	// What lies that far below is not there yet on the first thread's stack, which grows.
	if (thread->tid == program->pid && stack < program->stack_start)
		return program->stack_start - stack + 4 * STACK_ROOM < program->stack_limit &&
		       read_memory(thread->tid, first_part, &byte, 1) == 0;
	for (uint64_t at = stack - STACK_ROOM; at < stack; at += 4096) {
		if (read_memory(thread->tid, at, &byte, 1))
			return false;
	}
	return true;
}

// Has a signal handler on its stack interrupted something that may hold a lock?
static bool is_delicate(const void *context, uint64_t place)
{
	const struct udd_program *program = context;

	return !is_in(program->calm, program->calm_count, place) && !is_in(program->waiting, program->waiting_count, place);
}

static bool is_usable(const struct udd_program *program, const struct udd_held_thread *thread, int own_number, bool patient)
{
	const struct user_regs_struct *registers = &thread->registers;
	int32_t number;

	if (registers->cs != CODE_64 || is_in(program->barred, program->barred_count, registers->rip))
		return false;
	// One that libc does not know has no thread control block, or another's.
	if (read_memory(thread->tid, registers->fs_base + program->tid_offset, &number, sizeof(number)) || number != own_number)
		return false;
	if (udd_tracee_in_call(registers) ? !udd_tracee_waits(registers) || !is_wait(registers)
					  : !patient || program->filtered ||
						    !is_in(program->calm, program->calm_count, registers->rip) ||
						    in_restartable_sequence(thread->tid))
		return false;
	return has_stack_room(program, thread) && !udd_tracee_any_interrupted(thread->tid, registers->rsp, is_delicate, program);
}

// ---- the call ----

// What the kernel would put on the stack for a signal handler, but for the siginfo.
struct frame {
	uint64_t restorer;
	ucontext_t context;
};

// What has to be as before when the thread goes on.
struct saved {
	struct user_regs_struct registers;
	uint64_t mask;             // of blocked signals
	int32_t error;             // errno
	char xstate[XSTATE_MOST];  // floating point and vector registers
	size_t xstate_bytes;
	uint64_t frame;            // address
	uint64_t data;
};

static int save(const struct udd_program *program, const struct udd_held_thread *thread, struct saved *ret)
{
	struct iovec xstate = {.iov_base = ret->xstate, .iov_len = sizeof(ret->xstate) - sizeof(uint64_t)};

	ret->registers = thread->registers;
	if (ptrace(PTRACE_GETSIGMASK, thread->tid, sizeof(ret->mask), &ret->mask) ||
	    ptrace(PTRACE_GETREGSET, thread->tid, NT_X86_XSTATE, &xstate))
		return -errno;
	ret->xstate_bytes = xstate.iov_len;
	return read_memory(thread->tid, thread->registers.fs_base + (uint64_t)program->errno_offset, &ret->error, sizeof(ret->error));
}

// The image of ptrace() as that of a signal frame (asm/sigcontext.h). Bytes 464 to 471 of the former say what it has.
static size_t make_xstate(const struct saved *saved, char *ret)
{
	static const uint64_t AMX = 3UL << 17;
	struct {
		uint32_t magic;
		uint32_t extended_bytes;
		uint64_t features;
		uint32_t bytes;
	} *header = (void *)(ret + 464);
	static const uint32_t last = 0x46505845;
	size_t bytes = saved->xstate_bytes;
	uint64_t features;

	memcpy(ret, saved->xstate, bytes);
	memcpy(&features, ret + 464, sizeof(features));
	if (features & AMX && bytes > XSTATE_PLAIN) {
		bytes = XSTATE_PLAIN;
		features &= ~AMX;
	}
	header->magic = 0x46505853;
	header->extended_bytes = (uint32_t)(bytes + sizeof(last));
	header->features = features;
	header->bytes = (uint32_t)bytes;
	memcpy(ret + bytes, &last, sizeof(last));
	return bytes + sizeof(last);
}

static void make_frame(const struct udd_program *program, const struct saved *saved, uint64_t xstate, struct frame *ret)
{
	const struct user_regs_struct *from = &saved->registers;
	greg_t *to = ret->context.uc_mcontext.gregs;
	bool again = udd_tracee_waits(from);

	memset(ret, 0, sizeof(*ret));
	ret->restorer = program->restorer;
	ret->context.uc_flags = 7; // with xstate, and as 64-bit programs have it (asm/ucontext.h)
	// The alternate stack is to stay what it is, which we don't know: the kernel passes over one that can't be.
	ret->context.uc_stack.ss_flags = -1;
	memcpy(&ret->context.uc_sigmask, &saved->mask, sizeof(saved->mask));
	ret->context.uc_mcontext.fpregs = (void *)(uintptr_t)xstate;
	to[REG_R8] = (greg_t)from->r8;
	to[REG_R9] = (greg_t)from->r9;
	to[REG_R10] = (greg_t)from->r10;
	to[REG_R11] = (greg_t)from->r11;
	to[REG_R12] = (greg_t)from->r12;
	to[REG_R13] = (greg_t)from->r13;
	to[REG_R14] = (greg_t)from->r14;
	to[REG_R15] = (greg_t)from->r15;
	to[REG_RDI] = (greg_t)from->rdi;
	to[REG_RSI] = (greg_t)from->rsi;
	to[REG_RBP] = (greg_t)from->rbp;
	to[REG_RBX] = (greg_t)from->rbx;
	to[REG_RDX] = (greg_t)from->rdx;
	// Made again from its beginning: the kernel forgets how long it has waited when it returns from a handler.
	to[REG_RAX] = (greg_t)(again ? from->orig_rax : from->rax);
	to[REG_RCX] = (greg_t)from->rcx;
	to[REG_RSP] = (greg_t)from->rsp;
	to[REG_RIP] = (greg_t)(again ? from->rip - 2 : from->rip);
	to[REG_EFL] = (greg_t)from->eflags;
	to[REG_CSGSFS] = (greg_t)(from->cs | from->ss << 48);
}

// Puts on the thread's stack what the call needs, and from what it goes on when that is done.
static int push(const struct udd_program *program, pid_t tid, const void *data, size_t bytes, struct saved *saved)
{
	char xstate[XSTATE_MOST];
	size_t xstate_bytes = make_xstate(saved, xstate);
	struct frame frame;
	uint64_t at = saved->registers.rsp - RED_ZONE;
	uint64_t xstate_at;

	saved->data = (at - bytes) & ~63UL;
	xstate_at = (saved->data - xstate_bytes) & ~63UL;
	// As at the entry of a function: 8 bytes below a multiple of 16.
	saved->frame = ((xstate_at - sizeof(frame) - sizeof(siginfo_t)) & ~15UL) - 8;
	make_frame(program, saved, xstate_at, &frame);
	if (write_memory(tid, saved->data, data, bytes) || write_memory(tid, xstate_at, xstate, xstate_bytes))
		return -EFAULT;
	return write_memory(tid, saved->frame, &frame, sizeof(frame));
}

static int begin(pid_t tid, const struct saved *saved, uint64_t function, uint64_t second)
{
	static const uint64_t DIRECTION_AND_TRAP = 0x500;
	const uint64_t faults = 1UL << (SIGSEGV - 1) | 1UL << (SIGBUS - 1) | 1UL << (SIGFPE - 1) | 1UL << (SIGILL - 1) |
				1UL << (SIGTRAP - 1) | 1UL << (SIGSYS - 1);
	uint64_t mask = ~faults;
	struct user_regs_struct registers = saved->registers;

	registers.rip = function;
	registers.rsp = saved->frame;
	registers.rdi = saved->data;
	registers.rsi = second;
	registers.rax = 0;
	registers.orig_rax = (unsigned long)-1;
	registers.eflags &= ~DIRECTION_AND_TRAP;
	if (ptrace(PTRACE_SETREGS, tid, NULL, &registers))
		return -errno;
	return ptrace(PTRACE_SETSIGMASK, tid, sizeof(mask), &mask) ? -errno : 0;
}

// Everything is as it was, and the thread goes on. At the entry of the system call by which it would itself restore all that,
// the call that it has waited in is put in its place: so that one goes on where it was. `registers`: see below.
static void restore(const struct udd_program *program, pid_t tid, struct saved *saved, const struct user_regs_struct *registers)
{
	struct iovec xstate = {.iov_base = saved->xstate, .iov_len = saved->xstate_bytes};

	write_memory(tid, saved->registers.fs_base + (uint64_t)program->errno_offset, &saved->error, sizeof(saved->error));
	ptrace(PTRACE_SETREGSET, tid, NT_X86_XSTATE, &xstate);
	ptrace(PTRACE_SETSIGMASK, tid, sizeof(saved->mask), &saved->mask);
	ptrace(PTRACE_SETREGS, tid, NULL, registers);
	ptrace(PTRACE_DETACH, tid, NULL, NULL);
}

static void end(const struct udd_program *program, pid_t tid, struct saved *saved)
{
	struct user_regs_struct registers = saved->registers;

	// A system call without a number returns what is there.
	if (udd_tracee_in_call(&registers))
		registers.orig_rax = (unsigned long)udd_tracee_again(&registers);
	restore(program, tid, saved, &registers);
}

// The call takes too long: it goes on by itself, and the thread then, too.
static void leave_to_itself(pid_t tid)
{
	int status;

	ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	if (udd_tracee_await(tid, udd_tracee_now() + AGAIN_NS, &status) == 0)
		ptrace(PTRACE_DETACH, tid, NULL, status >> 16 || WSTOPSIG(status) & 0x80 ? 0 : WSTOPSIG(status));
}

static bool is_fault(int number)
{
	return number == SIGSEGV || number == SIGBUS || number == SIGFPE || number == SIGILL || number == SIGTRAP || number == SIGSYS;
}

static int follow(const struct udd_program *program, pid_t tid, struct saved *saved, uint64_t deadline, struct udd_attach_outcome *ret)
{
	int number = 0; // a signal to be delivered
	int call = 0;

	for (;;) {
		struct __ptrace_syscall_info info;
		int status;
		int r = ptrace(PTRACE_SYSCALL, tid, NULL, number) ? -ESRCH : udd_tracee_await(tid, deadline, &status);

		number = 0;
		if (r == -ETIMEDOUT)
			leave_to_itself(tid);
		if (r)
			return r;
		if (status >> 16)
			continue;
		if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
			number = WSTOPSIG(status);
			if (!is_fault(number))
				continue;
			ret->signal = number;
			restore(program, tid, saved, &saved->registers);
			return -EINTR;
		}
		if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof(info), &info) <= 0)
			return -ESRCH;
		if (info.op == PTRACE_SYSCALL_INFO_ENTRY && info.entry.nr == SYS_rt_sigreturn &&
		    info.stack_pointer == saved->frame + sizeof(uint64_t)) {
			end(program, tid, saved);
			return 0;
		}
		if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
			call = (int)info.entry.nr;
		} else if (info.op == PTRACE_SYSCALL_INFO_EXIT && info.exit.is_error) {
			ret->failed_call = call;
			ret->failed_errno = (int)-info.exit.rval;
		}
	}
}

// -EAGAIN: not this one, now.
static int call_in(const struct udd_program *program, pid_t tid, bool patient, uint64_t function, const void *data, size_t bytes,
		   uint64_t second, uint64_t deadline, struct udd_attach_outcome *ret)
{
	struct udd_held_thread thread = {0};
	struct saved saved;
	int own_number;
	char state = task_state(program->pid, tid, &own_number);
	uint64_t started = udd_tracee_now();
	int r;

	if (state != 'S' && state != 'R')
		return -EAGAIN;
	r = begin_hold(program->pid, tid);
	if (!r)
		r = udd_tracee_await_hold(tid, deadline, &thread);
	if (r && thread.late)
		udd_tracee_forgo(tid, udd_tracee_now() + AGAIN_NS);
	if (r)
		return r == -EPERM ? r : -EAGAIN;
	if (!is_usable(program, &thread, own_number, patient) || save(program, &thread, &saved) ||
	    push(program, tid, data, bytes, &saved)) {
		udd_tracee_release(&thread);
		return -EAGAIN;
	}
	r = begin(tid, &saved, function, second);
	if (!r)
		r = follow(program, tid, &saved, deadline, ret);
	ret->held_ns = udd_tracee_now() - started;
	ret->threads = 1;
	return r;
}

int udd_attach_call(const struct udd_program *program, uint64_t function, const void *data, size_t bytes, uint64_t second,
		    uint32_t patience_ms, struct udd_attach_outcome *ret)
{
	uint64_t started = udd_tracee_now();
	uint64_t deadline = started + (uint64_t)patience_ms * 1000000;
	sigset_t before;
	int r = -EAGAIN;

	*ret = (struct udd_attach_outcome){0};
	block_signals(&before);
	while (r == -EAGAIN && udd_tracee_now() < deadline) {
		DIR *tasks = open_tasks(program->pid);
		bool patient = udd_tracee_now() - started > PATIENT_AFTER_NS;

		if (!tasks)
			r = -ESRCH;
		for (pid_t tid; r == -EAGAIN && (tid = next_task(tasks));)
			r = call_in(program, tid, patient, function, data, bytes, second, deadline, ret);
		if (tasks)
			closedir(tasks);
		if (r == -EAGAIN)
			udd_tracee_rest(PAUSE_NS);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return r;
}

// ---- filters ----

#ifndef PTRACE_SECCOMP_GET_FILTER
#define PTRACE_SECCOMP_GET_FILTER 0x420c
#endif

int udd_attach_filter(int tid, uint32_t index, uint64_t *ret, size_t room)
{
	struct udd_held_thread thread = {0};
	sigset_t before;
	int r;

	block_signals(&before);
	r = udd_tracee_begin_hold(tid);
	if (!r)
		r = udd_tracee_await_hold(tid, udd_tracee_now() + AGAIN_NS, &thread);
	if (!r) {
		// Without a place to put it, the kernel only says how long it is.
		long length = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, (unsigned long)index, NULL);

		if (length > 0 && (size_t)length <= room)
			length = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, (unsigned long)index, ret);
		r = length < 0 ? -errno : (int)length;
		udd_tracee_release(&thread);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return r;
}

// ---- changing code ----

// The threads of a program, all that there are.
struct crowd {
	struct udd_held_thread *threads;
	size_t count;
	size_t room;
};

static bool knows(const struct crowd *crowd, pid_t tid)
{
	for (size_t i = 0; i < crowd->count; i++) {
		if (crowd->threads[i].tid == tid)
			return true;
	}
	return false;
}

static int add(struct crowd *crowd, pid_t tid)
{
	if (crowd->count == crowd->room) {
		size_t room = crowd->room ? 2 * crowd->room : 64;
		struct udd_held_thread *threads = realloc(crowd->threads, room * sizeof(*threads));

		if (!threads)
			return -ENOMEM;
		crowd->threads = threads;
		crowd->room = room;
	}
	crowd->threads[crowd->count++] = (struct udd_held_thread){.tid = tid};
	return 0;
}

// Begins to hold every thread that is not known yet. How many those were, or a negative errno.
static int begin_new(pid_t pid, struct crowd *crowd)
{
	DIR *tasks = open_tasks(pid);
	int found = 0;
	int r = tasks ? 0 : -ESRCH;

	for (pid_t tid; !r && (tid = next_task(tasks));) {
		if (knows(crowd, tid))
			continue;
		r = begin_hold(pid, tid);
		if (r == -ESRCH) {
			r = 0;
			continue;
		}
		if (!r)
			r = add(crowd, tid);
		found++;
	}
	if (tasks)
		closedir(tasks);
	return r ? r : found;
}

// Those who ended meanwhile, or can't be held, are not among them any more. -EBUSY if there are such, or one is late.
static int await_all(struct crowd *crowd, size_t from, uint64_t deadline)
{
	size_t kept = from;
	int ret = 0;

	for (size_t i = from; i < crowd->count; i++) {
		int r = udd_tracee_await_hold(crowd->threads[i].tid, deadline, &crowd->threads[kept]);

		kept += !r || crowd->threads[kept].late;
		if (r && r != -ESRCH)
			ret = r;
	}
	crowd->count = kept;
	return ret;
}

// A thread that waits does not create any: when nobody new is there any more, all are held.
static int hold_all(pid_t pid, struct crowd *crowd, uint64_t deadline)
{
	for (;;) {
		size_t from = crowd->count;
		int found = begin_new(pid, crowd);
		int r = await_all(crowd, from, deadline);

		if (found <= 0 || r)
			return found < 0 ? found : r;
	}
}

static void release_all(const struct crowd *crowd)
{
	for (size_t i = 0; i < crowd->count; i++) {
		if (!crowd->threads[i].late)
			udd_tracee_release(&crowd->threads[i]);
	}
}

static void forgo_late(struct crowd *crowd)
{
	uint64_t deadline = udd_tracee_now() + AGAIN_NS;

	for (size_t i = 0; i < crowd->count; i++) {
		if (crowd->threads[i].late)
			udd_tracee_forgo(crowd->threads[i].tid, deadline);
	}
	crowd->count = 0;
}

struct barred {
	pid_t pid;
	const struct udd_code *code;
	size_t count;
};

static bool is_barred(const struct barred *barred, uint64_t place)
{
	return is_in(barred->code, barred->count, place);
}

// Behind a system call the function has done what it does. The kernel has a handler return before it if it is to be made again.
static bool is_barred_by_handler(const void *context, uint64_t place)
{
	static const unsigned char syscall_code[] = {0x0f, 0x05};
	const struct barred *barred = context;
	unsigned char code[sizeof(syscall_code)];

	return is_barred(barred, place) &&
	       (read_memory(barred->pid, place - sizeof(code), code, sizeof(code)) || memcmp(code, syscall_code, sizeof(code)) != 0);
}

static bool changes_mappings(const struct user_regs_struct *registers)
{
	static const short numbers[] = {
		SYS_mmap, SYS_munmap, SYS_mremap, SYS_brk, SYS_shmat, SYS_mprotect, SYS_pkey_mprotect, SYS_madvise, SYS_mlock,
		SYS_mlock2, SYS_mlockall, SYS_munlock, SYS_munlockall, SYS_fork, SYS_vfork, SYS_clone, SYS_clone3,
	};

	if (registers->orig_rax == SYS_ioctl)
		return registers->rsi == UFFDIO_REGISTER;
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		if (numbers[i] == (long)registers->orig_rax)
			return true;
	}
	return false;
}

// May the code be changed while this thread is where it is? What it has done already matters no more; what it will do does.
static bool is_in_the_way(const struct udd_held_thread *thread, const struct barred *barred)
{
	const struct user_regs_struct *registers = &thread->registers;

	if (udd_tracee_any_interrupted(thread->tid, registers->rsp, is_barred_by_handler, barred))
		return true;
	if (udd_tracee_in_call(registers))
		return udd_tracee_waits(registers) && changes_mappings(registers);
	return is_barred(barred, registers->rip);
}

static int write_words(pid_t pid, const struct udd_attach_word *words, size_t count)
{
	char path[32];
	uint64_t found;
	int fd;
	int ret = 0;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	for (size_t i = 0; i < count && !ret; i++) {
		if (pread(fd, &found, sizeof(found), (off_t)words[i].address) != sizeof(found) || found != words[i].before)
			ret = -ESTALE;
	}
	for (size_t i = 0; i < count && !ret; i++) {
		if (pwrite(fd, &words[i].after, sizeof(found), (off_t)words[i].address) != sizeof(found))
			ret = -EIO;
	}
	close(fd);
	return ret;
}

// Such a thread, which waits for a disk or a child that uses its memory, would hold up all the others.
static bool has_deep_sleeper(pid_t pid)
{
	DIR *tasks = open_tasks(pid);
	bool found = false;
	int own_number;

	for (pid_t tid; tasks && !found && (tid = next_task(tasks));)
		found = task_state(pid, tid, &own_number) == 'D';
	if (tasks)
		closedir(tasks);
	return found;
}

static int change_now(pid_t pid, const struct barred *barred, const struct udd_attach_word *words, size_t count,
		      uint64_t limit, struct crowd *crowd, struct udd_attach_outcome *ret)
{
	uint64_t started = udd_tracee_now();
	uint64_t held;
	int r = hold_all(pid, crowd, started + limit);

	for (size_t i = 0; !r && i < crowd->count; i++) {
		if (is_in_the_way(&crowd->threads[i], barred))
			r = -EAGAIN;
	}
	if (!r)
		r = crowd->count ? write_words(pid, words, count) : -ESRCH;
	ret->threads = (uint32_t)crowd->count;
	release_all(crowd);
	held = udd_tracee_now() - started;
	ret->held_ns = held > ret->held_ns ? held : ret->held_ns;
	return r == -EBUSY ? -EAGAIN : r;
}

int udd_attach_change(int pid, const struct udd_code *barred_code, size_t barred_count, const struct udd_attach_word *words, size_t count,
		      uint32_t patience_ms, struct udd_attach_outcome *ret)
{
	const struct barred barred = {.pid = pid, .code = barred_code, .count = barred_count};
	uint64_t started = udd_tracee_now();
	uint64_t deadline = started + (uint64_t)patience_ms * 1000000;
	struct crowd crowd = {0};
	sigset_t before;
	int r = -EAGAIN;

	*ret = (struct udd_attach_outcome){0};
	block_signals(&before);
	while (r == -EAGAIN && udd_tracee_now() < deadline) {
		uint64_t limit = HOLD_ALL_NS << (udd_tracee_now() - started) / LONGER_AFTER_NS;

		if (!has_deep_sleeper(pid))
			r = change_now(pid, &barred, words, count, limit, &crowd, ret);
		forgo_late(&crowd);
		if (r == -EAGAIN)
			udd_tracee_rest(PAUSE_NS);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	free(crowd.threads);
	return r;
}
