// SPDX-License-Identifier: MIT
#include "attach.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>

#include "agent.h"
#include "hooks.h"
#include "sys.h"
#include "udedup.h"
#include "worker.h"

enum {
	PATCHED_FIRST_MS = 1, // between two looks whether the functions are redirected
	PATCHED_LAST_MS = 1000,
};

UDEDUP_API struct udd_attachment udedup_attachment = {.magic = UDD_ATTACH_MAGIC, .version = UDD_ATTACH_VERSION};

UDEDUP_API void udedup_attach(const struct udd_attach_request *request);
UDEDUP_API void udedup_leave(void);

// It gives the path a second slash at its beginning, which no other way in does. Such a path the loader keeps as it is.
bool udd_loaded_by_attach(void)
{
	Dl_info info;

	return dladdr(&udedup_attachment, &info) && info.dli_fname && strncmp(info.dli_fname, "//", 2) == 0;
}

static struct udd_attach_live *here(void)
{
	return &udd_live()->attach;
}

static void say(const char *reason)
{
	snprintf(udedup_attachment.reason, sizeof(udedup_attachment.reason), "%s", reason);
}

static void set_state(enum udd_attach_state state)
{
	__atomic_store_n(&here()->state, state, __ATOMIC_RELEASE);
	udd_sys(SYS_futex, &here()->state, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

static enum udd_attach_state state_now(void)
{
	return __atomic_load_n(&here()->state, __ATOMIC_ACQUIRE);
}

// ---- on a thread of the program, which is held for it ----

// Has a worker wait until the functions are redirected. 0 or a negative errno.
static int start(void)
{
	struct udd_live *live = udd_live();

	switch (state_now()) {
	case UDD_ATTACH_LEFT:
	case UDD_ATTACH_REFUSED:
		__atomic_store_n(&here()->leave, 0, __ATOMIC_RELAXED);
		__atomic_store_n(&here()->patched, 0, __ATOMIC_RELAXED);
		set_state(UDD_ATTACH_PREPARED);
		return 0;
	case UDD_ATTACH_JOINING:
		// Whoever wanted that has gone away. It is to look again at once, and where we say.
		udd_sys(SYS_futex, &here()->leave, FUTEX_WAKE_PRIVATE, INT32_MAX);
		return 0;
	case UDD_ATTACH_PREPARED:
		return 0;
	case UDD_ATTACH_NONE:
		break;
	default:
		return -EALREADY;
	}
	if (live->worker)
		return -EALREADY;
	here()->state = UDD_ATTACH_PREPARED;
	// A child of a fork that no hook saw, because the program was not attached then.
	if (!live->started)
		udd_agent_forked();
	else
		udd_agent_start();
	if (live->worker)
		return 0;
	here()->state = UDD_ATTACH_NONE;
	say(live->stats->reason);
	return -EPERM;
}

static int set_up(const struct udd_attach_request *request)
{
	const char *missing;
	int ret = udd_agent_set_up(request);

	if (ret == -ENOMEM)
		say("its memory is limited (RLIMIT_AS, RLIMIT_DATA), and the agent would need some of it");
	if (!ret && udd_hooks_prepare(&missing))
		udd_agent_say_unhooked(missing);
	return ret;
}

static int prepare(const struct udd_attach_request *request)
{
	int ret = udd_live() ? udd_agent_choose(request) : set_up(request);

	if (ret)
		return ret;
	if (udd_agent.reason[0]) {
		say(udd_agent.reason);
		return -ENOTSUP;
	}
	return start();
}

void udedup_attach(const struct udd_attach_request *request)
{
	struct udd_attachment *ret = &udedup_attachment;

	if (!udd_agent_claim()) {
		ret->error = -EBUSY;
		return;
	}
	say("");
	ret->error = prepare(request);
	udd_hooks_list(ret);
	ret->live = udd_live() ? (uint64_t)(uintptr_t)here() : 0;
	udd_agent_unclaim();
}

void udedup_leave(void)
{
	udd_hooks_list(&udedup_attachment);
	udedup_attachment.error = udd_live() ? 0 : -ENOTCONN;
	if (!udd_live())
		return;
	udedup_attachment.live = (uint64_t)(uintptr_t)here();
	__atomic_store_n(&here()->leave, 1, __ATOMIC_SEQ_CST);
	udd_sys(SYS_futex, &here()->leave, FUTEX_WAKE_PRIVATE, INT32_MAX);
	udd_ring(UDD_BELL_LEAVE);
}

// ---- the worker ----

void udd_attach_wait(void)
{
	uint64_t pause = PATCHED_FIRST_MS;

	if (state_now() != UDD_ATTACH_PREPARED)
		return;
	udd_hooks_forget();
	while (!__atomic_load_n(&here()->patched, __ATOMIC_ACQUIRE)) {
		udd_nap(pause);
		pause = udd_min(pause * 2, PATCHED_LAST_MS);
	}
	udd_hooks_patched();
	set_state(UDD_ATTACH_JOINING);
}

void udd_attach_tell(enum udd_attach_state state)
{
	set_state(state);
}

bool udd_attach_is_leaving(void)
{
	return __atomic_load_n(&here()->leave, __ATOMIC_ACQUIRE);
}

void udd_attach_stay(void)
{
	__atomic_store_n(&here()->leave, 0, __ATOMIC_RELEASE);
	set_state(UDD_ATTACH_KEPT);
}

void udd_attach_nap(uint64_t milliseconds)
{
	struct timespec time = udd_timespec(milliseconds * 1000000);

	udd_sys(SYS_futex, &here()->leave, FUTEX_WAIT_PRIVATE, 0, &time);
}

void udd_attach_park(enum udd_attach_state state, bool clean)
{
	here()->clean = clean;
	memcpy(udedup_attachment.reason, udd_live()->stats->reason, sizeof(udedup_attachment.reason));
	set_state(state);
	while (state_now() != UDD_ATTACH_PREPARED)
		udd_sys(SYS_futex, &here()->state, FUTEX_WAIT_PRIVATE, state, NULL);
	udd_attach_wait();
}
