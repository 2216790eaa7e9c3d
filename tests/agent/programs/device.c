// SPDX-License-Identifier: MIT
// Memory that others hold on to: devices (io_uring's registered buffers, O_DIRECT), the program's own userfaultfd, and
// memory in huge pages.
#include "merged.h"

#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include "common/uffd.h"

enum { PAGES = 16, SKIPPED = 77 };

// A buffer registered with io_uring is pinned: a page moved away from it would no longer be the one the device writes to.
static void registered_buffer(void)
{
	struct io_uring_params parameters = {0};
	char *pinned = plain(PAGES);
	struct iovec vector = {pinned, PAGES * PAGE};
	long ring;

	await_agent();
	fill(pinned, PAGES, 1, WHOLE, 0);
	ring = syscall(SYS_io_uring_setup, 4, &parameters);
	if (ring < 0)
		_exit(SKIPPED);
	check(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) == 0);
	merged(PAGES, 1, WHOLE, NULL); // the same contents are in the store now
	for (uint64_t turn = 0; turn < 5; turn++) {
		// What is merged in here was looked at after the advice was taken up.
		advise(pinned, PAGES * PAGE);
		merged(1, 100 + turn, WHOLE, NULL);
		check(count_merged(pinned, PAGES) == 0);
		check(intact(pinned, PAGES, 1, WHOLE, 0));
	}
	// Once let go of, it merges.
	check(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
	await_merged(pinned, PAGES, WHOLE);
	check(intact(pinned, PAGES, 1, WHOLE, 0));
	// And a merged page can be registered: what is pinned then is the page that is read afterwards.
	check(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) == 0);
	check(count_merged(pinned, PAGES) == 0);
	check(intact(pinned, PAGES, 1, WHOLE, 0));
}

static void direct_read(void)
{
	char *at = merged(PAGES, 1, WHOLE, NULL);
	const char *path = getenv("DIRECT_FILE");
	char *content = plain(PAGES);
	int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0600);

	if (fd < 0 && errno == EINVAL)
		_exit(SKIPPED);
	check(fd >= 0);
	fill(content, PAGES, 9, WHOLE, 0);
	check(pwrite(fd, content, PAGES * PAGE, 0) == PAGES * PAGE);
	check(pread(fd, at, PAGES * PAGE, 0) == PAGES * PAGE);
	check(intact(at, PAGES, 9, WHOLE, 0));
	fill(at, PAGES, 1, WHOLE, 0);
	await_merged(at, PAGES, WHOLE);
	check(pwrite(fd, at, PAGES * PAGE, 0) == PAGES * PAGE);
	check(pread(fd, content, PAGES * PAGE, 0) == PAGES * PAGE);
	check(intact(content, PAGES, 1, WHOLE, 0));
}

static char *watched;
static int watcher;

static void *serve_faults(void *unused)
{
	(void)unused;
	for (int faults = 0; faults < 2; faults++) {
		struct uffd_msg message;
		struct uffdio_writeprotect allow = {.mode = 0};

		check(read(watcher, &message, sizeof(message)) == sizeof(message));
		check(message.event == UFFD_EVENT_PAGEFAULT && (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP));
		allow.range.start = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
		allow.range.len = PAGE;
		check(allow.range.start >= (uint64_t)(uintptr_t)watched);
		check(ioctl(watcher, UFFDIO_WRITEPROTECT, &allow) == 0);
	}
	return NULL;
}

// The program watches writes to its memory itself, which was merged.
static void own_userfaultfd(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
	struct uffdio_register wanted = {.mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect protect = {.mode = UFFDIO_WRITEPROTECT_MODE_WP};
	pthread_t thread;

	watched = merged(PAGES, 1, WHOLE, NULL);
	watcher = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	check(watcher >= 0 && ioctl(watcher, UFFDIO_API, &api) == 0);
	wanted.range.start = (uint64_t)(uintptr_t)watched;
	wanted.range.len = PAGES * PAGE;
	check(ioctl(watcher, UFFDIO_REGISTER, &wanted) == 0);
	check(intact(watched, PAGES, 1, WHOLE, 0));
	protect.range = wanted.range;
	check(ioctl(watcher, UFFDIO_WRITEPROTECT, &protect) == 0);
	check(pthread_create(&thread, NULL, serve_faults, NULL) == 0);
	fill_page(watched + 3 * PAGE, 2, 3);
	fill_page(watched + 9 * PAGE, 2, 9);
	check(pthread_join(thread, NULL) == 0);
	check(page_is(watched + 3 * PAGE, 2, 3) && page_is(watched + 9 * PAGE, 2, 9));
	check(page_is(watched + 4 * PAGE, 1, 4));
}

static void huge_pages(void)
{
	enum { HUGE = 2 << 20, HUGE_PAGES = HUGE / PAGE };
	char *areas[2];

	for (int copy = 0; copy < 2; copy++) {
		char *raw = plain(3 * HUGE_PAGES);

		areas[copy] = (char *)(((uintptr_t)raw + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
		check(madvise(areas[copy], HUGE, MADV_HUGEPAGE) == 0);
		fill(areas[copy], HUGE_PAGES, 1, WHOLE, 0);
	}
	await_merged(areas[0], HUGE_PAGES, WHOLE);
	await_merged(areas[1], HUGE_PAGES, WHOLE);
	check(has_flag(areas[0], "hg"));
	fill_page(areas[0] + 100 * PAGE, 2, 100);
	check(madvise(areas[0] + 200 * PAGE, 20 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(areas[0] + 200 * PAGE, 20));
	check(page_is(areas[0] + 100 * PAGE, 2, 100));
	check(intact(areas[0], 100, 1, WHOLE, 0) && intact_from(areas[0] + 220 * PAGE, 220, HUGE_PAGES - 220, 1, WHOLE, 0));
	check(intact(areas[1], HUGE_PAGES, 1, WHOLE, 0));
}

static const struct test_case cases[] = {
	{"registered-buffer", registered_buffer},
	{"direct-read", direct_read},
	{"own-userfaultfd", own_userfaultfd},
	{"huge-pages", huge_pages},
};

int main(int argc, char **argv)
{
	(void)argc;
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
