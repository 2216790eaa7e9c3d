// SPDX-License-Identifier: MIT
// System calls without libc: no errno, no cancellation point, no hook of ours on the way. The agent's threads have no
// thread control block of libc's, so they may use nothing else; hooks use them to do what the patched function did.
#ifndef UDD_SYS_H
#define UDD_SYS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>

#if !defined(__x86_64__)
#error "the agent knows x86-64 only"
#endif

// Returns what the kernel returns: a negative errno on failure.
static inline long udd_syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

#define UDD_SYS_PAD(number, a, b, c, d, e, f, ...)                                                                     \
	udd_syscall6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
// udd_sys(SYS_name, up to six arguments)
#define udd_sys(...) UDD_SYS_PAD(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

static inline bool udd_failed(long ret)
{
	return (unsigned long)ret > -4096UL;
}

static inline void udd_close(int fd)
{
	if (fd >= 0)
		udd_sys(SYS_close, fd);
}

static inline void udd_cleanup_fd(const int *fd)
{
	udd_close(*fd);
}

// Closes the descriptor when it goes out of scope, unless it is negative.
#define udd_auto_close __attribute__((cleanup(udd_cleanup_fd)))

#endif
