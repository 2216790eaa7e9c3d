// SPDX-License-Identifier: MIT
// Replaces functions of libc at their entry, in libc's own text, so that libc's internal callers are seen too. Each
// function gets a jump to a stub near libc, which jumps to our hook. Most hooks do the system call themselves; for the few
// whose original is needed, the instructions under the jump are copied to a trampoline, if they are of a kind that runs
// anywhere. Everything else is refused: then that function is not hooked, and the caller decides what that means.
#ifndef UDD_PATCH_H
#define UDD_PATCH_H

#include <stdint.h>

// One function's replacement, prepared.
struct udd_patch {
	uint64_t *entry; // the function; NULL: nothing to apply
	uint64_t before; // its first bytes as they are
	uint64_t word;   // its first bytes from then on
};

// Room for stubs within reach of `near` (an address in libc). 0 or a negative errno.
int udd_patch_init(const void *near);
// Prepares to redirect `function` to `hook`. With `original`, *original becomes a way to call the unhooked function.
// 0, or a negative errno: -ENOTSUP for code that can't be patched safely.
int udd_patch_prepare(void *function, const void *hook, void **original, struct udd_patch *ret);
// No more is prepared: from now on the stubs can run. 0 or a negative errno.
int udd_patch_seal(void);
// Redirects. Other threads may be calling the function meanwhile. 0 or a negative errno.
int udd_patch_apply(const struct udd_patch *patch);
// Makes all threads see what was applied.
void udd_patch_done(void);

#endif
