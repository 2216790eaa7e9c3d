// SPDX-License-Identifier: MIT
#include "commit.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "agent.h"
#include "sys.h"

enum { LOOK_NS = 10000000 }; // how old a look at the system's setting may be

static int mode_fd = -1;
static uint64_t looked_at;       // ns: at the mode
static uint32_t promises_freely; // by the mode; 0 until it is known
static uint32_t limits_allow = 1; // by the limits of the process, as of the last look at them

void udd_commit_open(void)
{
	mode_fd = (int)udd_sys(SYS_openat, AT_FDCWD, "/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC);
	__atomic_store_n(&looked_at, 0, __ATOMIC_RELAXED);
}

void udd_commit_look_at_mode(uint64_t now)
{
	char mode = '2';

	// Both threads may look, and find the same.
	if (now - __atomic_load_n(&looked_at, __ATOMIC_RELAXED) < LOOK_NS)
		return;
	__atomic_store_n(&looked_at, now, __ATOMIC_RELAXED);
	if (udd_sys(SYS_pread64, mode_fd, &mode, 1, 0) != 1)
		mode = '2';
	__atomic_store_n(&promises_freely, mode == '0' || mode == '1', __ATOMIC_RELAXED);
}

static bool is_unlimited(int resource)
{
	struct rlimit limit;

	return udd_sys(SYS_prlimit64, 0, resource, NULL, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

static bool map_trial(int protection)
{
	return !udd_failed(udd_sys(SYS_mmap, udd_agent.trial, udd_bytes(UDD_STAGING_PAGES), protection,
				   MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

// In addresses of our own: any other might be mapped over by a thread that knows them to be free, before we unmap them again.
bool udd_commit_has_room(void)
{
	bool ret = map_trial(PROT_READ | PROT_WRITE);

	// Should that fail, it is only not given back yet.
	if (ret)
		map_trial(PROT_NONE);
	return ret;
}

void udd_commit_look(void)
{
	bool unlimited = is_unlimited(RLIMIT_AS) && is_unlimited(RLIMIT_DATA);

	udd_commit_look_at_mode(udd_now());
	__atomic_store_n(&limits_allow, unlimited || udd_commit_has_room(), __ATOMIC_RELAXED);
}

bool udd_commit_strict(void)
{
	return !__atomic_load_n(&promises_freely, __ATOMIC_RELAXED) || !__atomic_load_n(&limits_allow, __ATOMIC_RELAXED);
}

bool udd_commit_allows(void)
{
	return !udd_commit_strict() && udd_commit_has_room();
}
