// SPDX-License-Identifier: MIT
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>

#include "sys.h"

int udd_uffd_open(int device)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UDD_UFFD_FEATURES};
	long fd = device >= 0 ? udd_sys(SYS_ioctl, device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
			      : udd_sys(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	long ret;

	if (udd_failed(fd))
		return (int)fd;
	ret = udd_sys(SYS_ioctl, fd, UFFDIO_API, &api);
	if (!udd_failed(ret))
		return (int)fd;
	udd_close((int)fd);
	return (int)ret;
}

int udd_uffd_register(struct udd_span span, uint64_t mode)
{
	struct uffdio_register arg = {.range = {.start = span.start, .len = span.end - span.start}, .mode = mode};

	return (int)udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_REGISTER, &arg);
}

void udd_uffd_unregister(struct udd_span span)
{
	struct uffdio_range range = {.start = span.start, .len = span.end - span.start};

	// Fails only where nothing of ours is registered.
	udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_UNREGISTER, &range);
}

void udd_uffd_wake(struct udd_span span)
{
	struct uffdio_range range = {.start = span.start, .len = span.end - span.start};

	udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_WAKE, &range);
}

static int write_protect(struct udd_span span, uint64_t mode)
{
	struct uffdio_writeprotect arg = {.range = {.start = span.start, .len = span.end - span.start}, .mode = mode};

	return (int)udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_WRITEPROTECT, &arg);
}

int udd_uffd_protect(struct udd_span span, bool protect)
{
	return write_protect(span, protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0);
}

int udd_uffd_unprotect_asleep(struct udd_span span)
{
	return write_protect(span, UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
}

// Maps the store's pages, write-protected. Pages that are mapped already are passed over, and *found set.
int udd_uffd_continue(struct udd_span span, bool *found)
{
	*found = false;
	while (span.start < span.end) {
		struct uffdio_continue arg = {
			.range = {.start = span.start, .len = span.end - span.start},
			.mode = UFFDIO_CONTINUE_MODE_WP | UFFDIO_CONTINUE_MODE_DONTWAKE,
		};
		long ret = udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_CONTINUE, &arg);

		if (ret == 0)
			return 0;
		if (arg.mapped > 0) {
			span.start += (uint64_t)arg.mapped;
		} else if (arg.mapped == -EEXIST) {
			*found = true;
			span.start += UDD_PAGE_SIZE;
		} else {
			return (int)ret;
		}
	}
	return 0;
}

// Moves pages without waking anyone. Returns bytes moved; *error says why it stopped short.
uint64_t udd_uffd_move(uint64_t to, uint64_t from, uint64_t bytes, int *error)
{
	struct uffdio_move arg = {.dst = to, .src = from, .len = bytes, .mode = UFFDIO_MOVE_MODE_DONTWAKE};
	long ret = udd_sys(SYS_ioctl, udd_uffd(), UFFDIO_MOVE, &arg);

	*error = 0;
	if (ret == 0)
		return bytes;
	*error = (int)ret;
	return arg.move > 0 ? (uint64_t)arg.move : 0;
}
