// SPDX-License-Identifier: MIT
// Threads of the agent, made with clone(2) and not with pthread_create: libc must not know of them. Else a process with one
// thread would be multi-threaded to libc (slower malloc and stdio), would not end when its last own thread does, and the
// application would see setuid and fork take other paths. The price: nothing on these threads may enter libc where that
// uses the thread control block (errno, malloc, stdio, cancellation, lazy binding). memcpy and the like are fine.
#ifndef UDD_THREAD_H
#define UDD_THREAD_H

enum { UDD_STACK_BYTES = 65536 };

// Runs body(argument) with all signals blocked, on the stack whose lowest address is given, with a zeroed page at `tls` in
// place of libc's thread control block. `body` never returns. Returns the tid or a negative errno.
int udd_thread_start(void (*body)(void *), void *argument, char *stack, void *tls, unsigned long flags);
// The same in a child process that shares this one's memory; returns when it has ended, with its pid, or a negative errno. It is
// waited for with __WALL.
int udd_process_probe(void (*body)(void *), char *stack, void *tls);

#endif
