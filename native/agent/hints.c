// SPDX-License-Identifier: MIT
#include "hints.h"

#include <errno.h>
#include <pthread.h>
#include <sys/single_threaded.h>
#include <sys/stat.h>

#include "agent.h"
#include "hooks.h"
#include "rings.h"
#include "sys.h"

enum udd_fd_kind {
	FD_UNKNOWN = 0,
	FD_FILE, // regular file or block device
	FD_OTHER,
};

static void look_at(struct udd_fd *slot, int fd)
{
	struct stat status;
	struct udd_live *live = udd_live();

	slot->kind = FD_OTHER;
	slot->on_mount = 0;
	if (udd_sys(SYS_fstat, fd, &status) != 0 || !(S_ISREG(status.st_mode) || S_ISBLK(status.st_mode)))
		return;
	slot->kind = FD_FILE;
	slot->on_mount = live->mount_dev && status.st_dev == live->mount_dev;
	slot->inode = status.st_ino;
}

static void forget_fd(int fd)
{
	if (fd >= 0 && fd < UDD_FD_SLOTS)
		udd_live()->fds[fd].kind = FD_UNKNOWN;
}

// What `fd` is. A descriptor may be reused behind our back; a wrong answer costs a useless hint or a missed one.
static bool source_of(int fd, uint64_t offset, struct udd_source *ret)
{
	struct udd_fd own = {.kind = FD_UNKNOWN};
	struct udd_fd *slot = fd >= 0 && fd < UDD_FD_SLOTS ? &udd_live()->fds[fd] : &own;

	if (slot->kind == FD_UNKNOWN || ++slot->uses == 0)
		look_at(slot, fd);
	if (slot->kind != FD_FILE)
		return false;
	*ret = (struct udd_source){.inode = slot->inode, .offset = offset, .on_mount = slot->on_mount};
	return true;
}

static bool wants_hints(long done)
{
	return done >= UDD_PAGE_SIZE && udd_live()->hints;
}

static void hint_buffer(int fd, const void *buffer, long done, uint64_t offset, uint32_t flags)
{
	struct udd_source source;

	if (wants_hints(done) && source_of(fd, offset, &source))
		udd_hint_push(buffer, (uint64_t)done, flags, &source);
}

static void hint_vector(int fd, const struct iovec *vector, int count, long done, uint64_t offset, uint32_t flags)
{
	struct udd_source source;

	if (!wants_hints(done) || !source_of(fd, offset, &source))
		return;
	for (int i = 0; i < count && done > 0; i++) {
		uint64_t bytes = udd_min(vector[i].iov_len, (uint64_t)done);

		udd_hint_push(vector[i].iov_base, bytes, flags, &source);
		done -= (long)bytes;
		if (source.offset != UINT64_MAX)
			source.offset += bytes;
	}
}

// A cancellation point, as libc makes it one.
static long cancellable(long number, long a, long b, long c, long d, long e, long f)
{
	long ret;
	int type;

	if (__libc_single_threaded) {
		// It may still have cancelled itself.
		pthread_testcancel();
		return udd_as_errno(udd_syscall6(number, a, b, c, d, e, f));
	}
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &type);
	ret = udd_syscall6(number, a, b, c, d, e, f);
	pthread_setcanceltype(type, NULL);
	return udd_as_errno(ret);
}

ssize_t udd_hook_read(int fd, void *buffer, size_t bytes)
{
	long ret = cancellable(SYS_read, fd, (long)buffer, (long)bytes, 0, 0, 0);

	hint_buffer(fd, buffer, ret, UINT64_MAX, 0);
	return ret;
}

ssize_t udd_hook_write(int fd, const void *buffer, size_t bytes)
{
	long ret = cancellable(SYS_write, fd, (long)buffer, (long)bytes, 0, 0, 0);

	hint_buffer(fd, buffer, ret, UINT64_MAX, UDD_HINT_WRITE);
	return ret;
}

ssize_t udd_hook_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
	long ret = cancellable(SYS_pread64, fd, (long)buffer, (long)bytes, offset, 0, 0);

	hint_buffer(fd, buffer, ret, (uint64_t)offset, 0);
	return ret;
}

ssize_t udd_hook_pwrite(int fd, const void *buffer, size_t bytes, off_t offset)
{
	long ret = cancellable(SYS_pwrite64, fd, (long)buffer, (long)bytes, offset, 0, 0);

	hint_buffer(fd, buffer, ret, (uint64_t)offset, UDD_HINT_WRITE);
	return ret;
}

ssize_t udd_hook_readv(int fd, const struct iovec *vector, int count)
{
	long ret = cancellable(SYS_readv, fd, (long)vector, count, 0, 0, 0);

	hint_vector(fd, vector, count, ret, UINT64_MAX, 0);
	return ret;
}

ssize_t udd_hook_writev(int fd, const struct iovec *vector, int count)
{
	long ret = cancellable(SYS_writev, fd, (long)vector, count, 0, 0, 0);

	hint_vector(fd, vector, count, ret, UINT64_MAX, UDD_HINT_WRITE);
	return ret;
}

ssize_t udd_hook_preadv(int fd, const struct iovec *vector, int count, off_t offset)
{
	long ret = cancellable(SYS_preadv, fd, (long)vector, count, offset, 0, 0);

	hint_vector(fd, vector, count, ret, (uint64_t)offset, 0);
	return ret;
}

ssize_t udd_hook_pwritev(int fd, const struct iovec *vector, int count, off_t offset)
{
	long ret = cancellable(SYS_pwritev, fd, (long)vector, count, offset, 0, 0);

	hint_vector(fd, vector, count, ret, (uint64_t)offset, UDD_HINT_WRITE);
	return ret;
}

// Like libc, where the kernel, or a filter of system calls, does not know the call with flags.
static ssize_t without_flags(int fd, const struct iovec *vector, int count, off_t offset, int flags,
			     ssize_t (*here)(int, const struct iovec *, int),
			     ssize_t (*there)(int, const struct iovec *, int, off_t))
{
	if (flags)
		return udd_as_errno(-ENOTSUP);
	return offset == -1 ? here(fd, vector, count) : there(fd, vector, count, offset);
}

ssize_t udd_hook_preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
	long ret = cancellable(SYS_preadv2, fd, (long)vector, count, offset, 0, flags);

	if (ret < 0 && errno == ENOSYS)
		return without_flags(fd, vector, count, offset, flags, udd_hook_readv, udd_hook_preadv);
	// Offset -1 means the file's own position, and that we don't know it.
	hint_vector(fd, vector, count, ret, (uint64_t)offset, 0);
	return ret;
}

ssize_t udd_hook_pwritev2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
	long ret = cancellable(SYS_pwritev2, fd, (long)vector, count, offset, 0, flags);

	if (ret < 0 && errno == ENOSYS)
		return without_flags(fd, vector, count, offset, flags, udd_hook_writev, udd_hook_pwritev);
	hint_vector(fd, vector, count, ret, flags & RWF_APPEND ? UINT64_MAX : (uint64_t)offset, UDD_HINT_WRITE);
	return ret;
}

int udd_hook_close(int fd)
{
	long ret;

	forget_fd(fd);
	ret = cancellable(SYS_close, fd, 0, 0, 0, 0, 0);
	forget_fd(fd);
	return (int)ret;
}

int udd_hook_dup2(int old, int new)
{
	long ret = udd_sys(SYS_dup2, old, new);

	forget_fd(new);
	return (int)udd_as_errno(ret);
}

int udd_hook_dup3(int old, int new, int flags)
{
	long ret = udd_sys(SYS_dup3, old, new, flags);

	forget_fd(new);
	return (int)udd_as_errno(ret);
}
