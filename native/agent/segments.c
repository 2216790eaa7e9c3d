// SPDX-License-Identifier: MIT
#include "segments.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "sys.h"
#include "transaction.h"

int udd_segment_find(const uint64_t engine_id[2], uint32_t id)
{
	for (int i = 0; i < UDD_SEGMENTS_MAX; i++) {
		const struct udd_segment_map *segment = &udd_agent.segments[i];

		if (segment->pages && segment->id == id && segment->engine_id[0] == engine_id[0] &&
		    segment->engine_id[1] == engine_id[1])
			return i;
	}
	return -ENOENT;
}

static int check_segment(int fd, uint32_t slots, uint64_t *inode)
{
	struct stat status;
	const long wanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
	long seals = udd_sys(SYS_fcntl, fd, F_GET_SEALS);
	long flags = udd_sys(SYS_fcntl, fd, F_GETFL);

	if (udd_failed(seals) || (seals & wanted) != wanted)
		return -EPERM;
	if (udd_failed(flags) || (flags & O_ACCMODE) != O_RDONLY)
		return -EACCES;
	if (!slots || slots > UDD_SEGMENT_SLOTS || udd_sys(SYS_fstat, fd, &status) || (uint64_t)status.st_size < udd_bytes(slots))
		return -EINVAL;
	*inode = status.st_ino;
	return 0;
}

int udd_segment_add(const uint64_t engine_id[2], uint32_t id, uint32_t slots, int fd)
{
	int at = udd_segment_find(engine_id, id);
	uint64_t inode;
	int ret = check_segment(fd, slots, &inode);
	uint64_t started;
	long pages;

	if (ret)
		return ret;
	if (at >= 0) {
		// Known from before a fork: only the descriptor is missing, and it must be that of the same memory.
		if (udd_agent.segments[at].fd >= 0 || udd_agent.segments[at].inode != inode)
			return -EEXIST;
		udd_agent.segments[at].fd = fd;
		return 0;
	}
	for (at = 0; at < UDD_SEGMENTS_MAX && udd_agent.segments[at].pages; at++)
		;
	if (at == UDD_SEGMENTS_MAX)
		return -ENOSPC;
	pages = udd_sys(SYS_mmap, NULL, udd_bytes(slots), PROT_READ, MAP_SHARED, fd, 0);
	if (udd_failed(pages))
		return (int)pages;
	udd_worker_lock_patiently(&started);
	udd_agent.segments[at] = (struct udd_segment_map){
		.engine_id = {engine_id[0], engine_id[1]},
		.pages = udd_pointer((uint64_t)pages),
		.id = id,
		.slots = slots,
		.inode = inode,
		.fd = fd,
	};
	udd_worker_unlock(started);
	return 0;
}

int udd_segment_remove(const uint64_t engine_id[2], uint32_t id)
{
	int at = udd_segment_find(engine_id, id);
	struct udd_segment_map *segment = &udd_agent.segments[at < 0 ? 0 : at];
	int ret = 0;
	uint64_t started;

	if (at < 0)
		return at;
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
