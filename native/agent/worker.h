// SPDX-License-Identifier: MIT
// The worker thread: joins the engine, and does what it asks for. Sleeps on a futex (live->bell) otherwise. When the engine
// goes away, what is merged stays merged, the fault thread goes on, and the worker tries to join again, ever more rarely.
#ifndef UDD_WORKER_H
#define UDD_WORKER_H

#include <stdint.h>

enum {
	// Most bytes of a message in either direction, and how many such buffers the worker has: request and answer.
	UDD_MESSAGE_BYTES = 65536, // udd_reports with UDD_REPORTS_MAX of them fits
	UDD_MESSAGE_BUFFERS = 2,
};

// The thread's body. `argument` is a uintptr_t: milliseconds to wait before joining (a fork child that is about to exec
// need not join).
void udd_worker_thread(void *argument);

// For the agent's own threads.
void udd_nap(uint64_t milliseconds);

#endif
