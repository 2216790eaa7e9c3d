// SPDX-License-Identifier: MIT
// The hooks in libc: what they lock, what they report, what they take care of. One table, in hooks.c.
#ifndef UDD_HOOKS_H
#define UDD_HOOKS_H

#include <errno.h>
#include <stdbool.h>

#include "../common/attach.h"
#include "sys.h"

// What a libc function returns, for what the kernel did.
static inline long udd_as_errno(long ret)
{
	if (!udd_failed(ret))
		return ret;
	errno = (int)-ret;
	return -1;
}

// Installs every hook of the table. Returns 0, or a negative errno if one that merging depends on could not be.
// `missing` then names it.
int udd_hooks_install(const char **missing);
// The same, but redirects no function yet: `udedup attach` does that, while no thread runs.
int udd_hooks_prepare(const char **missing);
// What is to be redirected, or was.
void udd_hooks_list(struct udd_attachment *ret);
// All of it is, now. The worker.
void udd_hooks_patched(void);
// No function is redirected any more, and what the hooks knew is of no worth. The worker, and nothing is merged.
void udd_hooks_forget(void);
// One udedup_pause() or udedup_resume(); on application threads. No transaction is under way when it returns.
void udd_hold_merging(bool pause);
// Handlers of signals that came past the hook, by a system call of the program's own. The map lock is held exclusively.
void udd_look_for_handlers(void);

#endif
