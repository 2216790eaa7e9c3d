// SPDX-License-Identifier: MIT
// What `udedup attach` and the agent in the program tell each other. The one that attaches loads the agent into a thread of the
// program and calls udedup_attach() there; then it stops all threads, redirects libc's functions by writing `patches` itself,
// and says so in `patched`. Only then does the worker join. udedup_leave() is the way back: when the worker has let go of
// everything, the patches are taken out again in the same manner.
//
// All of it is read and written in the program's memory from outside: sizes and order are fixed.
#ifndef UDD_ATTACH_H
#define UDD_ATTACH_H

#include <stdint.h>

#include "wire.h"

enum {
	UDD_ATTACH_MAGIC = 0x41444455, // "UDDA"
	UDD_ATTACH_VERSION = 1,
	UDD_ATTACH_SOCKET_MAX = 108,
	UDD_ATTACH_PATCHES_MAX = 48,
};

enum udd_attach_state {
	UDD_ATTACH_NONE = 0,     // nobody has attached or detached: the agent came with the program, or was not set up yet
	UDD_ATTACH_PREPARED = 1, // waits for `patched`
	UDD_ATTACH_JOINING = 2,  // the worker tries to join
	UDD_ATTACH_JOINED = 3,
	UDD_ATTACH_REFUSED = 4,  // and why is in `reason`
	UDD_ATTACH_LEFT = 5,     // nothing is merged, and no engine connected
	UDD_ATTACH_KEPT = 6,     // was to leave, and could not: no memory or mappings for private copies. Joins again
};

enum udd_attach_flags {
	UDD_ATTACH_QUIET = 1,    // as UDEDUP_QUIET_BREAKS
	UDD_ATTACH_KEEP_KSM = 2, // as UDEDUP_KEEP_KSM
};

// The argument of udedup_attach().
struct udd_attach_request {
	char socket[UDD_ATTACH_SOCKET_MAX]; // absolute path, NUL terminated
	uint32_t flags;                     // enum udd_attach_flags
	char label[UDD_LABEL_MAX];          // wanted domain label, NUL terminated, empty for none
};

// One function of libc.
struct udd_attach_patch {
	uint64_t entry;  // its address; 0: this one can't be redirected
	uint64_t before; // its first 8 bytes, as they are
	uint64_t after;  // and as they are to be
	uint32_t maps;   // 1: it changes mappings, and no thread may be in it when it is redirected
	uint32_t padding;
};

// The part of one process: a fork child, which has no agent yet, finds zeros.
struct udd_attach_live {
	uint32_t state;   // enum udd_attach_state; futex
	uint32_t patched; // 1: the functions are redirected
	uint32_t leave;   // 1: the worker is to leave; futex
	uint32_t clean;   // with UDD_ATTACH_LEFT: 1: no mapping of the store is left, and the hooks are needed no more
};

// The exported variable udedup_attachment.
struct udd_attachment {
	uint32_t magic;   // UDD_ATTACH_MAGIC
	uint32_t version; // UDD_ATTACH_VERSION
	int32_t error;    // negative errno of the last udedup_attach(), or 0
	uint32_t patch_count;
	uint64_t live;    // address of struct udd_attach_live; 0: the agent was not set up yet
	char reason[UDD_REASON_MAX]; // what is in the way, NUL terminated
	struct udd_attach_patch patches[UDD_ATTACH_PATCHES_MAX];
};

#endif
