// SPDX-License-Identifier: MIT
// Prints what every hooked call answers to good, odd and bad arguments, on memory that is merged if there is an agent. The
// test compares what a wrapped and a bare process print.
#include "merged.h"

#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/shm.h>
#include <sys/uio.h>

enum { PAGES = 8 };

static char *at, *hole, *nowhere;

// A fresh merged region per line, so that no line depends on another.
static void prepare(void)
{
	static uint64_t tag;

	tag++;
	at = merged(PAGES, tag, WHOLE, NULL);
	hole = merged(PAGES, tag + 100000, WHOLE, NULL);
	munmap(hole + 3 * PAGE, PAGE);
	nowhere = plain(PAGES);
	munmap(nowhere - PAGE, (PAGES + 2) * PAGE);
}

static long relative(long ret)
{
	if (ret >= (long)at && ret < (long)at + PAGES * PAGE)
		return ret - (long)at;
	return ret == -1 || (ret >= 0 && ret < 1 << 24) ? ret : 999999999; // some address
}

#define show(call)                                                                                                     \
	do {                                                                                                           \
		long ret_;                                                                                             \
		errno = 0;                                                                                             \
		ret_ = (long)(call);                                                                                   \
		printf("%s = %ld errno %d\n", #call, relative(ret_), errno);                                           \
	} while (0)
#define show_fresh(call)                                                                                               \
	do {                                                                                                           \
		prepare();                                                                                             \
		show(call);                                                                                            \
	} while (0)

static void mappings(void)
{
	const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;

	show_fresh(munmap(at + 1, PAGE));
	show_fresh(munmap(at, 0));
	show_fresh(munmap(at, 1));
	show_fresh(munmap(at, ~0UL));
	show_fresh(munmap(hole, PAGES * PAGE));
	show(munmap(nowhere, PAGE));
	show(mmap(NULL, 0, PROT_READ, anonymous, -1, 0));
	show(mmap(NULL, PAGE, PROT_READ, 0, -1, 0));
	show(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, -1, 0));
	show(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, 0, 1));
	show(mmap(NULL, 1UL << 60, PROT_READ, anonymous, -1, 0));
	show_fresh(mmap(at + 1, PAGE, PROT_READ, anonymous | MAP_FIXED, -1, 0));
	show_fresh(mmap(at, PAGE, PROT_READ, anonymous | MAP_FIXED_NOREPLACE, -1, 0));
	show_fresh(mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0));
	show(touch(at, false)); // what fails replaces nothing
	show_fresh(mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED | MAP_POPULATE, -1, 0));
	show(touch(at, false));
	show_fresh(mmap(at, 0, PROT_READ, anonymous | MAP_FIXED, -1, 0));
	show_fresh(mmap(at, PAGE, PROT_READ, anonymous | MAP_FIXED | MAP_STACK, -1, 0));
}

static void remaps(void)
{
	const size_t all = PAGES * PAGE;

	show_fresh(mremap(at + 1, PAGE, PAGE, 0));
	show_fresh(mremap(at, 0, PAGE, MREMAP_MAYMOVE));
	show_fresh(mremap(at, PAGE, 0, MREMAP_MAYMOVE));
	show_fresh(mremap(at, all, all, 0));
	show_fresh(mremap(at, all, all + 1, 0));
	show_fresh(mremap(at, all, all - 1, 0));
	show_fresh(mremap(at, all, PAGE, 0));
	show_fresh(mremap(at, all, all * 2, 0));
	show_fresh(mremap(at, all, all * 2, MREMAP_MAYMOVE));
	show_fresh(mremap(at, all * 2, all * 4, MREMAP_MAYMOVE));
	show_fresh(mremap(at, all * 2, all, 0));
	show_fresh(mremap(at, all, all, MREMAP_FIXED, nowhere));
	show_fresh(mremap(at, all, all, MREMAP_FIXED | MREMAP_MAYMOVE, at + PAGE));
	show_fresh(mremap(at, all, all, MREMAP_FIXED | MREMAP_MAYMOVE, nowhere + 1));
	show_fresh(mremap(at, all, all, MREMAP_FIXED | MREMAP_MAYMOVE, nowhere));
	show_fresh(mremap(at, all, all, MREMAP_DONTUNMAP, NULL));
	show_fresh(mremap(at, all, all * 2, MREMAP_DONTUNMAP | MREMAP_MAYMOVE, NULL));
	show_fresh(mremap(at, all, all, MREMAP_DONTUNMAP | MREMAP_MAYMOVE, NULL));
	show_fresh(mremap(at, all, all, 0x100));
	show_fresh(mremap(nowhere, all, all, 0));
	show_fresh(mremap(nowhere, all, all * 2, MREMAP_MAYMOVE));
	show_fresh(mremap(hole, all, all, 0));
	show_fresh(mremap(hole, all, all * 2, MREMAP_MAYMOVE));
	show_fresh(mremap(at, all, ~0UL - PAGE, MREMAP_MAYMOVE));
	show_fresh(mremap(at, all, 1UL << 46, MREMAP_MAYMOVE));
}

static void protections(void)
{
	show_fresh(mprotect(at + 1, PAGE, PROT_READ));
	show_fresh(mprotect(at, 0, PROT_READ));
	show_fresh(mprotect(at, 1, PROT_READ));
	show(touch(at, true));
	show(touch(at + PAGE, true));
	show_fresh(mprotect(at, PAGE, 0x40));
	show_fresh(mprotect(at, PAGE, PROT_READ | PROT_GROWSDOWN));
	show_fresh(mprotect(at, PAGE, PROT_GROWSDOWN | PROT_GROWSUP));
	show_fresh(mprotect(at, ~0UL, PROT_READ));
	show_fresh(mprotect(nowhere, PAGE, PROT_READ));
	show_fresh(mprotect(hole, PAGES * PAGE, PROT_READ));
	show_fresh(pkey_mprotect(at, PAGE, PROT_READ, 99));
	show_fresh(pkey_mprotect(at, PAGE, PROT_READ, -1));
	show(touch(at, true));
	show_fresh(mlock(nowhere, PAGE));
	show_fresh(mlock(hole, PAGES * PAGE));
	show_fresh(mlock(at + 1, PAGE));
	show(munlock(at, PAGES * PAGE));
	show_fresh(mlock2(at, PAGE, 77));
	show_fresh(mlock2(at, PAGE, MLOCK_ONFAULT));
	show(munlock(at, PAGE));
	show_fresh(munlock(nowhere, PAGE));
	show(mlockall(0));
	show(mlockall(77));
}

static void locking_everything(void)
{
	show_fresh(mlockall(MCL_CURRENT));
	show(munlockall());
	show_fresh(mlockall(MCL_CURRENT | MCL_FUTURE));
	show(munlockall());
}

static void advices(void)
{
	// All there are, one more at either end of a range, but: HWPOISON and SOFT_OFFLINE (100, 101), which take memory from the
	// machine, and COLLAPSE (25), which depends on what the machine has left.
	static const int advices[] = {-1, 0,  1,  2,  3,  4,  5,  8,  9,  10, 11, 12, 13, 14, 15, 16,
				      17, 18, 19, 20, 21, 22, 23, 24, 26, 99, 102, 103, 104};

	for (size_t i = 0; i < sizeof(advices) / sizeof(advices[0]); i++) {
		int advice = advices[i];

		prepare();
		printf("advice %d: ", advice);
		show(madvise(at, PAGES * PAGE, advice));
		show(madvise(at + 1, PAGE, advice));
		show(madvise(at, 0, advice));
		show(madvise(nowhere, PAGE, advice));
		show(madvise(at, ~0UL - 4 * PAGE, advice));
	}
	show_fresh(msync(at, PAGES * PAGE, MS_SYNC));
	show(msync(at, PAGES * PAGE, MS_INVALIDATE));
	show(msync(at + 1, PAGE, MS_SYNC));
}

static int never(void *unused)
{
	(void)unused;
	return 1;
}

static void others(void)
{
	char *start = sbrk(0);
	int ends[2];

	show(brk((void *)1));
	show(sbrk(1L << 50));
	show((char *)sbrk(0) - start);
	show(shmat(-1, NULL, 0));
	show(shmat(99999999, at, SHM_REMAP));
	show(clone(never, NULL, SIGCHLD, NULL));
	show(clone(NULL, start, SIGCHLD, NULL));
	show(clone(never, at, CLONE_THREAD, NULL));
	show(ioctl(-1, 0x5401, NULL));
	show(ioctl(0, 0xdead, NULL));
	check(pipe(ends) == 0);
	show(ioctl(-1, UFFDIO_REGISTER, at));
	show(ioctl(ends[0], UFFDIO_REGISTER, at));
}

// The same number may mean something else on another device: its argument is nothing but a number until the kernel looked.
static void odd_ioctl(void)
{
	int ends[2];

	check(pipe(ends) == 0);
	show(ioctl(ends[0], UFFDIO_REGISTER, NULL));
	show(ioctl(-1, UFFDIO_REGISTER, 5));
	show(ioctl(ends[0], UFFDIO_REGISTER, nowhere));
}

static void transfers(void)
{
	static char buffer[4 * PAGE];
	struct iovec vector[] = {{buffer, PAGE}, {NULL, 0}, {buffer + PAGE, 2 * PAGE}};
	struct iovec bad[] = {{buffer, PAGE}, {(void *)8, PAGE}};
	int fd = memfd_create("file", 0);
	int read_only = open("/etc/passwd", O_RDONLY);
	int directory = open("/", O_RDONLY | O_DIRECTORY);
	int ends[2];

	check(pipe(ends) == 0);
	check(ftruncate(fd, 3 * PAGE) == 0);
	prepare();
	show(read(-1, buffer, 1));
	show(read(fd, NULL, PAGE));
	show(read(fd, (void *)8, 2 * PAGE));
	show(read(fd, buffer, 0));
	show(read(fd, buffer, sizeof(buffer)));
	show(read(fd, buffer, sizeof(buffer)));
	show(read(directory, buffer, PAGE));
	show(read(ends[1], buffer, 1));
	show(pread(fd, at + PAGES * PAGE - 100, PAGE, 0)); // runs into the guard
	show(pread(fd, buffer, PAGE, -1));
	show(pread(fd, buffer, sizeof(buffer), PAGE));
	show(pread(fd, buffer, 1, 1L << 62));
	show(pread(ends[0], buffer, 1, 0));
	show(readv(fd, vector, 3));
	show(readv(fd, NULL, 0));
	show(readv(fd, vector, -1));
	show(readv(fd, vector, 2000));
	show(readv(fd, NULL, 2));
	show(preadv(fd, vector, 3, 0));
	show(preadv(fd, vector, 3, 100));
	show(preadv(fd, vector, 3, -5));
	show(preadv(fd, bad, 2, 0));
	show(preadv(ends[0], vector, 1, 0));
	show(preadv2(fd, vector, 3, 0, 0));
	show(preadv2(fd, vector, 3, -5, 0));
	show(preadv2(fd, vector, 3, 0, 1 << 30));
	show(preadv2(fd, bad, 2, 0, RWF_HIPRI));
	show(preadv2(ends[0], vector, 1, 0, 0));
	show(lseek(fd, 100, SEEK_SET));
	show(preadv2(fd, vector, 3, -1, 0));
	show(lseek(fd, 0, SEEK_CUR));
	show(write(-1, buffer, 1));
	show(write(read_only, buffer, 1));
	show(write(fd, (void *)8, PAGE));
	show(write(fd, at, 2 * PAGE));
	show(pwrite(fd, at, PAGE, -1));
	show(pwrite(fd, at, 2 * PAGE, 5));
	show(writev(fd, bad, 2));
	show(writev(fd, vector, 3));
	show(writev(fd, vector, -1));
	show(pwritev(fd, vector, 3, 1));
	show(pwritev(fd, vector, 3, -1));
	show(pwritev2(fd, vector, 3, 1, RWF_DSYNC));
	show(pwritev2(fd, vector, 3, -5, 0));
	show(pwritev2(fd, vector, 3, 0, 1 << 30));
	show(pwritev2(fd, bad, 2, 0, 0));
	show(pwritev2(fd, vector, 3, 0, RWF_APPEND));
	show(lseek(fd, 100, SEEK_SET));
	show(pwritev2(fd, vector, 3, -1, 0));
	show(lseek(fd, 0, SEEK_CUR));
	show(close(-1));
	show(close(100000));
	show(dup2(fd, fd));
	show(dup2(-1, 5));
	show(dup2(fd, -1));
	show(dup2(100000, 100000));
	show(dup3(fd, fd, 0));
	show(dup3(fd, 50, 77));
	show(dup3(fd, 50, O_CLOEXEC));
	show(fcntl(50, F_GETFD));
	show(close(50));
	show(close(50));
}

static const struct test_case cases[] = {
	{"mappings", mappings}, {"remaps", remaps},       {"protections", protections}, {"advices", advices},
	{"locking-everything", locking_everything},
	{"others", others},     {"odd-ioctl", odd_ioctl}, {"transfers", transfers},
};

int main(int argc, char **argv)
{
	(void)argc;
	setvbuf(stdout, NULL, _IONBF, 0);
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
