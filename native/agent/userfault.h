// SPDX-License-Identifier: MIT
// The ioctls of userfaultfd, each on a span, for the agent's threads: application threads don't have the descriptor.
#ifndef UDD_USERFAULT_H
#define UDD_USERFAULT_H

#include <stdbool.h>
#include <stdint.h>

#include "../common/uffd.h"
#include "agent.h"

static inline int udd_uffd(void)
{
	return udd_live()->uffd - 1;
}

// Opens a userfaultfd with all that merging needs; through /dev/userfaultfd, if that is given (≥ 0). Descriptor or errno.
int udd_uffd_open(int device);
int udd_uffd_register(struct udd_span span, uint64_t mode);
void udd_uffd_unregister(struct udd_span span);
void udd_uffd_wake(struct udd_span span);
// Sets write protection, or lifts it and wakes those who wait for that.
int udd_uffd_protect(struct udd_span span, bool protect);
// Lifts it, and wakes nobody.
int udd_uffd_unprotect_asleep(struct udd_span span);
// Maps the store's pages, write-protected. Pages that are mapped already are passed over, and *found set.
int udd_uffd_continue(struct udd_span span, bool *found);
// Moves pages without waking anyone. Returns bytes moved; *error says why it stopped short.
uint64_t udd_uffd_move(uint64_t to, uint64_t from, uint64_t bytes, int *error);

#endif
