// SPDX-License-Identifier: MIT
// Seccomp filters: may the agent's threads live under the one that binds the calling thread? They inherit it, in a fork child
// or a program that is executed by one that has restricted itself; and a filter may kill the process for a system call that
// the program itself never makes.
#ifndef UDD_SANDBOX_H
#define UDD_SANDBOX_H

#include <stdbool.h>

// True if there is no filter, or it allows all that the agent does. Only while the worker's stack is not in use.
bool udd_sandbox_allows_us(void);

#endif
