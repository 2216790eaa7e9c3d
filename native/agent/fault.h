// SPDX-License-Identifier: MIT
// The fault thread: serves write faults on merged pages (copy-on-write breaks), and learns of removals that no hook
// announced. It also tells the worker when the engine sent something, because the worker sleeps on a futex that
// application threads can ring without a descriptor.
#ifndef UDD_FAULT_H
#define UDD_FAULT_H

#include "util.h"

// The thread's body; `argument` is unused.
void udd_fault_thread(void *argument);

// Opens what the thread needs, in the agent's descriptor table. 0 or a negative errno.
int udd_fault_prepare(void);
// Also listen to the engine's socket.
int udd_fault_watch(int socket);
// A descriptor of /proc/self/pagemap.
int udd_fault_pagemap(void);

// The worker, holding the map lock exclusively: reads what waits in the userfaultfd, because an ioctl said EAGAIN. Faults
// are put aside for udd_fault_release(); removals are carried out on the table. Returns a bit mask of those that were removed
// of the UDD_RUN_MAX pages from `base` on.
uint64_t udd_fault_drain(uint64_t base);
// Wakes those whose faults were put aside: they fault again.
void udd_fault_release(void);

#endif
