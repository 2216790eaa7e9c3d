// SPDX-License-Identifier: MIT
#include "thread.h"

#include <sched.h>
#include <signal.h>
#include <stdint.h>

#include "sys.h"

// The child starts with nothing on its stack but what we put there, so it can't return through C.
static long clone_thread(unsigned long flags, void *stack, void *tls, void (*body)(void *), void *argument)
{
	long ret;
	register long r10 __asm__("r10") = 0;
	register void *r8 __asm__("r8") = tls;
	register void (*r12)(void *) __asm__("r12") = body;
	register void *r13 __asm__("r13") = argument;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%r13, %%rdi\n\t"
			 "call *%%r12\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(ret)
			 : "a"(SYS_clone), "D"(flags), "S"(stack), "d"(0), "r"(r10), "r"(r8), "r"(r12), "r"(r13)
			 : "rcx", "r11", "memory");
	return ret;
}

static int start(void (*body)(void *), void *argument, char *stack, void *tls, unsigned long flags)
{
	uint64_t all = ~0UL;
	uint64_t mask;
	long ret;

	// The thread control block of x86-64 points to itself at offset 0 and 16.
	((void **)tls)[0] = tls;
	((void **)tls)[2] = tls;
	udd_sys(SYS_rt_sigprocmask, SIG_SETMASK, &all, &mask, sizeof(all));
	ret = clone_thread(flags | CLONE_VM | CLONE_SETTLS, stack + UDD_STACK_BYTES, tls, body, argument);
	udd_sys(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof(mask));
	return (int)ret;
}

int udd_thread_start(void (*body)(void *), void *argument, char *stack, void *tls, unsigned long flags)
{
	// Not CLONE_FS: setns() and the like need a working directory that is the caller's alone.
	return start(body, argument, stack, tls, flags | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM);
}

int udd_process_probe(void (*body)(void *), char *stack, void *tls)
{
	return start(body, NULL, stack, tls, CLONE_VFORK);
}
