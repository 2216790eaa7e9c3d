// SPDX-License-Identifier: MIT
#include "segments.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "sys.h"
#include "transaction.h"

int udd_segment_find(uint32_t id)
{
	for (int i = 0; i < UDD_SEGMENTS_MAX; i++) {
		const struct udd_segment_map *segment = &udd_agent.segments[i];

		if (segment->pages && segment->id == id && !udd_segment_is_foreign(segment))
			return i;
	}
	return -ENOENT;
}

// Seals can be added, never taken off: what is sealed now stays so. F_SEAL_SEAL is not asked for, because the next engine
// adds F_SEAL_WRITE.
static int check_segment(int fd, uint32_t slots, struct stat *ret)
{
	const long wanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;
	long seals = udd_sys(SYS_fcntl, fd, F_GET_SEALS);
	long flags = udd_sys(SYS_fcntl, fd, F_GETFL);

	if (udd_failed(seals) || (seals & wanted) != wanted)
		return -EPERM;
	if (udd_failed(flags) || (flags & O_ACCMODE) != O_RDONLY)
		return -EACCES;
	if (!slots || slots > UDD_SEGMENT_SLOTS || udd_sys(SYS_fstat, fd, ret) || (uint64_t)ret->st_size < udd_bytes(slots))
		return -EINVAL;
	return 0;
}

static bool is_same_memory(const struct udd_segment_map *segment, const struct stat *status)
{
	return segment->device == status->st_dev && segment->inode == status->st_ino;
}

// A foreign segment with this memory, or -ENOENT.
static int find_foreign(const struct stat *status)
{
	for (int i = 0; i < UDD_SEGMENTS_MAX; i++) {
		const struct udd_segment_map *segment = &udd_agent.segments[i];

		if (segment->pages && udd_segment_is_foreign(segment) && is_same_memory(segment, status))
			return i;
	}
	return -ENOENT;
}

// The present engine has taken a foreign segment over: its runs count from now on, from the next UDD_RUNS on.
static void rename_segment(struct udd_segment_map *segment, uint32_t id)
{
	uint64_t started;

	udd_worker_lock_patiently(&started);
	segment->engine_id[0] = udd_agent.engine_id[0];
	segment->engine_id[1] = udd_agent.engine_id[1];
	segment->id = id;
	udd_live()->reported = 0;
	udd_worker_unlock(started);
}

// A segment that we have: only its descriptor may be missing, after a fork.
static void use_again(struct udd_segment_map *segment, int fd)
{
	// Ours stays if there is one: mappings join only if they were made with the same.
	if (segment->fd < 0)
		segment->fd = fd;
	else
		udd_close(fd);
}

static int map_segment(uint32_t id, uint32_t slots, int fd, const struct stat *status)
{
	uint64_t started;
	long pages;
	int at;

	for (at = 0; at < UDD_SEGMENTS_MAX && udd_agent.segments[at].pages; at++)
		;
	if (at == UDD_SEGMENTS_MAX)
		return -ENOSPC;
	pages = udd_sys(SYS_mmap, NULL, udd_bytes(slots), PROT_READ, MAP_SHARED, fd, 0);
	if (udd_failed(pages))
		return (int)pages;
	udd_worker_lock_patiently(&started);
	udd_agent.segments[at] = (struct udd_segment_map){
		.engine_id = {udd_agent.engine_id[0], udd_agent.engine_id[1]},
		.pages = udd_pointer((uint64_t)pages),
		.id = id,
		.slots = slots,
		.device = status->st_dev,
		.inode = status->st_ino,
		.fd = fd,
	};
	udd_worker_unlock(started);
	return 0;
}

int udd_segment_add(uint32_t id, uint32_t slots, int fd)
{
	struct stat status;
	int ret = check_segment(fd, slots, &status);
	int at;

	if (ret)
		return ret;
	at = udd_segment_find(id);
	if (at >= 0) {
		// Sent again, after a fork or a new connection: it must be the same memory.
		if (!is_same_memory(&udd_agent.segments[at], &status))
			return -EEXIST;
		use_again(&udd_agent.segments[at], fd);
		return 0;
	}
	at = find_foreign(&status);
	if (at < 0)
		return map_segment(id, slots, fd, &status);
	if (slots != udd_agent.segments[at].slots)
		return -EINVAL;
	use_again(&udd_agent.segments[at], fd);
	rename_segment(&udd_agent.segments[at], id);
	return 1;
}

// -EBUSY while runs of it are left.
static int let_go(struct udd_segment_map *segment)
{
	uint64_t started;
	int ret = 0;

	udd_worker_lock_patiently(&started);
	if (segment->references) {
		ret = -EBUSY;
	} else {
		udd_sys(SYS_munmap, segment->pages, udd_bytes(segment->slots));
		udd_close(segment->fd);
		*segment = (struct udd_segment_map){.fd = -1};
	}
	udd_worker_unlock(started);
	return ret;
}

int udd_segment_next_foreign(uint32_t from)
{
	for (uint32_t i = from; i < UDD_SEGMENTS_MAX; i++) {
		struct udd_segment_map *segment = &udd_agent.segments[i];

		if (segment->pages && udd_segment_is_foreign(segment) && let_go(segment))
			return (int)i;
	}
	return -ENOENT;
}

int udd_segment_remove(uint32_t id)
{
	int at = udd_segment_find(id);

	return at < 0 ? at : let_go(&udd_agent.segments[at]);
}
