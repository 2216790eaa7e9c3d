// SPDX-License-Identifier: MIT
// Reads, and drops, what the kernel has cached of a file in our own mount.
//
// Each step of that may have the kernel ask this very process. A thread that waits for the answer can't be killed before it comes,
// and its descriptors, /dev/fuse among them, stay open until it is gone: an engine that is killed then would leave a mount that hangs, and
// itself. So the steps are made by threads that share no descriptors with the others. With the last of these the connection ends, and with
// that the wait.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "engine.h"

struct apart {
	const char *path;
	struct udd_stretch *stretches;
	size_t count;
	char *data; // NULL: drop
	uint32_t *ret_thread;
	int ret;
};

static int apart_read(int fd, struct udd_stretch *stretch, char *data)
{
	for (stretch->got = 0; stretch->got < stretch->bytes;) {
		ssize_t got = pread(fd, data + stretch->got, stretch->bytes - stretch->got, stretch->offset + stretch->got);

		if (got < 0)
			return -errno;
		if (got == 0)
			break;
		stretch->got += got;
	}
	return 0;
}

static int apart_work(const struct apart *apart)
{
	char *data = apart->data;
	int r = 0;

	if (close_range(0, ~0U, CLOSE_RANGE_UNSHARE) < 0)
		return -errno;
	__atomic_store_n(apart->ret_thread, (uint32_t)gettid(), __ATOMIC_RELEASE);
	int fd = open(apart->path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	for (size_t i = 0; i < apart->count && r == 0; i++) {
		struct udd_stretch *stretch = &apart->stretches[i];

		if (!data) {
			r = -posix_fadvise(fd, stretch->offset, stretch->bytes, POSIX_FADV_DONTNEED);
			continue;
		}
		r = apart_read(fd, stretch, data);
		data += stretch->bytes;
	}
	close(fd);
	return r;
}

static void *apart_main(void *argument)
{
	struct apart *apart = argument;

	apart->ret = apart_work(apart);
	return NULL;
}

static int apart_run(struct apart *apart)
{
	pthread_t thread;
	sigset_t all, before;
	int r;

	// The interpreter's handlers write to a descriptor that such a thread hasn't got.
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	r = -pthread_create(&thread, NULL, apart_main, apart);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (r == 0) {
		pthread_join(thread, NULL);
		r = apart->ret;
	}
	__atomic_store_n(apart->ret_thread, 0, __ATOMIC_RELEASE);
	return r;
}

int udd_apart_read(const char *path, struct udd_stretch *stretches, size_t count, char *ret_data, uint32_t *ret_thread)
{
	struct apart apart = {path, stretches, count, ret_data, ret_thread, 0};

	return apart_run(&apart);
}

int udd_apart_drop(const char *path, struct udd_stretch *stretches, size_t count, uint32_t *ret_thread)
{
	struct apart apart = {path, stretches, count, NULL, ret_thread, 0};

	return apart_run(&apart);
}
