// SPDX-License-Identifier: MIT
// The mount's reads, as far as they are the same for every one: waiting for the next, and answering it from the page cache.
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <time.h>

#include "engine.h"

enum {
	// Between two looks, in turns of a loop that does nothing: less would keep the device's lock from who asks.
	SPIN_PAUSES = 30,
};

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int udd_request_wait(int device, int loop, uint64_t spin_ns)
{
	struct pollfd files[] = {{.fd = device, .events = POLLIN}, {.fd = loop, .events = POLLIN}};
	int64_t end = spin_ns ? now_ns() + (int64_t)spin_ns : 0;

	do {
		int ready = poll(files, spin_ns ? 2 : 1, 0);

		// Whatever it can't tell now, a wait that sleeps can.
		if (ready < 0)
			return UDD_REQUEST_NONE;
		if (ready)
			return files[0].revents ? UDD_REQUEST_THERE : UDD_REQUEST_OTHERS;
		for (int i = 0; spin_ns && i < SPIN_PAUSES; i++)
			__builtin_ia32_pause();
	} while (spin_ns && now_ns() < end);
	return UDD_REQUEST_NONE;
}

int udd_read_digested(int file, uint64_t position, int flags, char *buffer, size_t size, uint64_t *digests, uint64_t offset)
{
	struct iovec part = {.iov_base = buffer, .iov_len = size};
	uint64_t first = (offset + UDD_PAGE_SIZE - 1) / UDD_PAGE_SIZE, end = (offset + size) / UDD_PAGE_SIZE;
	bool known = true;
	ssize_t done = preadv2(file, &part, 1, (off_t)position, flags);

	if (done < 0)
		return -errno;
	if ((size_t)done != size)
		return -EAGAIN;
	// As elsewhere: a digest whose low half is 0 is taken for missing.
	for (uint64_t block = first; block < end && known; block++)
		known = digests[2 * block] != 0;
	if (known)
		return 0;
	udd_digest_pages(buffer + (first * UDD_PAGE_SIZE - offset), end - first, &digests[2 * first]);
	return 1;
}
