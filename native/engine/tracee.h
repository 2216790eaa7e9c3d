// SPDX-License-Identifier: MIT
// Other programs' threads, held by ptrace: calling a function in one, and changing code while none of them runs.
//
// Whoever holds a thread may be killed at any moment, and then the thread must go on by itself as if nothing had been. So a call
// is made the way the kernel calls a signal handler: what the thread was about lies on its own stack, in a frame from which
// rt_sigreturn() restores it, and the function returns there. It takes one step to begin a call, and one to end it.
//
// Nothing here decides which functions, which code and whether at all.
#ifndef UDD_TRACEE_H
#define UDD_TRACEE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

// A thread that is held.
struct udd_held_thread {
	pid_t tid;
	bool late; // it has not stopped in time, and is not held: it is in a system call that does not end
	struct user_regs_struct registers;
};

// CLOCK_MONOTONIC, ns.
uint64_t udd_tracee_now(void);
// A moment for others.
void udd_tracee_rest(uint64_t nanoseconds);

// Stops a thread in two steps, so that many can be stopped at a time. What began must be awaited. -ESRCH: it has ended; -EBUSY: a
// signal has stopped it, or it is late; -EPERM.
int udd_tracee_begin_hold(pid_t tid);
int udd_tracee_await_hold(pid_t tid, uint64_t deadline, struct udd_held_thread *ret);
// Lets go of one that is late. It runs nothing of the program before it has stopped: so this waits, until `deadline`.
void udd_tracee_forgo(pid_t tid, uint64_t deadline);
// Lets go of it.
void udd_tracee_release(const struct udd_held_thread *thread);
// Waits for the next stop. 0, -ESRCH or -ETIMEDOUT.
int udd_tracee_await(pid_t tid, uint64_t deadline, int *status);

// Whether the thread comes out of a system call; and whether it was interrupted in one, which is made again when it goes on.
bool udd_tracee_in_call(const struct user_regs_struct *registers);
bool udd_tracee_waits(const struct user_regs_struct *registers);
// The number of the system call with which it then goes on.
long udd_tracee_again(const struct user_regs_struct *registers);

// Calls `found` for every place that a signal handler on the stack of the thread has interrupted, until it returns true, and
// returns whether it did. Takes for one also what is left of a frame that is none any more.
bool udd_tracee_any_interrupted(pid_t pid, uint64_t stack, bool (*found)(const void *context, uint64_t place), const void *context);

#endif
