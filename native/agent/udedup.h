// SPDX-License-Identifier: MIT
// C interface for programs that cooperate with udedup knowingly. Programs that are wrapped by `udedup run` need none of it.
//
//	if (udedup_join(NULL, NULL) == 0)
//		udedup_advise(buffer, bytes);
//
// Link with libudedup.so. All functions are thread-safe. They return 0 or a negative errno.
#ifndef UDEDUP_H
#define UDEDUP_H

#include <stddef.h>
#include <stdint.h>

#define UDEDUP_API __attribute__((visibility("default")))

// What is known of this process, as the agent counts it.
struct udedup_stats {
	uint64_t pages_merged;  // pages of this process that are mapped to the store now
	uint64_t zero_pages;    // pages left to the kernel's zero page
	uint64_t runs;          // stretches of merged pages
	uint64_t break_pages;   // merged pages that were written to, so far
	uint64_t break_events;  // write faults that took
	uint64_t hints;         // place hints given, so far
	uint64_t merging;       // 1 while pages may be merged, and are not paused
	char reason[128];       // why not, if not
};

// Joins the engine at `socket` (NULL: $UDEDUP_SOCKET or the default) in the domain `label` (NULL: that of the user), and
// waits until that has succeeded or failed. Joining twice is no error.
// -ECONNREFUSED: no engine answered; -EACCES: it refused, or this process can't be merged; udedup_stats() says why.
UDEDUP_API int udedup_join(const char *socket, const char *label);

// Hints that the whole pages inside [address, address + bytes) have just got content worth merging.
UDEDUP_API int udedup_advise(const void *address, size_t bytes);

// Merges nothing more in this process until udedup_resume(); what is merged stays so. When it returns, no merge is under way.
// Calls count: as many udedup_resume() as udedup_pause() let the merging go on, and one more does nothing. A fork child starts
// unpaused. -ENOTCONN: this process has not joined, and nothing is merged anyway.
UDEDUP_API int udedup_pause(void);
UDEDUP_API int udedup_resume(void);

UDEDUP_API int udedup_stats(struct udedup_stats *ret);

#endif
