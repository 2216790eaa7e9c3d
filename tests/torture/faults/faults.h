// SPDX-License-Identifier: MIT
// Included in front of every source of the agent in a build for tests: each system call the agent makes is offered to
// faults.c first, by the name of the function it is made in. What the library ships knows nothing of this.
#ifndef UDD_TEST_FAULTS_H
#define UDD_TEST_FAULTS_H

#include "agent/sys.h"

// Returns the errno, negative, that this call is to fail with; 0: it is to be made.
long udd_fault_draw(const char *function, long number, const long *arguments);

static inline long udd_faulty_syscall6(const char *function, long number, long a, long b, long c, long d, long e, long f)
{
	const long arguments[] = {a, b, c, d, e, f};
	long error = udd_fault_draw(function, number, arguments);

	return error ? error : udd_syscall6(number, a, b, c, d, e, f);
}

#define udd_syscall6(...) udd_faulty_syscall6(__func__, __VA_ARGS__)

#endif
