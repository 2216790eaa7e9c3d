// SPDX-License-Identifier: MIT
// pread FILE: what does the hook add to a pread of 4 KiB from the page cache?
//
// time CALLS → NS NS; per call: by a raw system call, by libc's pread (the hooked one, if this process is wrapped)
#include <fcntl.h>
#include <sys/syscall.h>

#include "common.h"

enum {
	BUFFERS = 64,    // pages read into, in turns
	FILE_PAGES = 64, // pages read, in turns
	BATCH = 64,      // calls timed together
};

typedef ssize_t pread_function(int fd, void *buffer, size_t bytes, off_t offset);

static ssize_t raw_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
	return syscall(SYS_pread64, fd, buffer, bytes, offset);
}

static uint64_t batch(pread_function *read_page, int fd, char *buffers)
{
	uint64_t started = nanoseconds(CLOCK_MONOTONIC);

	for (unsigned i = 0; i < BATCH; i++) {
		if (read_page(fd, buffers + i % BUFFERS * PAGE, PAGE, i % FILE_PAGES * PAGE) != PAGE)
			fail("pread");
	}
	return nanoseconds(CLOCK_MONOTONIC) - started;
}

static int by_value(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a;
	uint64_t right = *(const uint64_t *)b;

	return (left > right) - (left < right);
}

static double median(uint64_t *values, size_t count)
{
	qsort(values, count, sizeof(*values), by_value);
	return (double)values[count / 2] / BATCH;
}

int main(int argc, char **argv)
{
	char *buffers = map_pages(BUFFERS);
	char line[64];
	unsigned long calls;
	int fd;

	if (argc != 2) {
		answer("error usage: pread FILE");
		return 2;
	}
	fd = open(argv[1], O_RDONLY);
	if (fd < 0)
		fail(argv[1]);
	memset(buffers, 1, BUFFERS * PAGE);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "time %lu", &calls) != 1 || calls < BATCH) {
			answer("error unknown command");
			return 2;
		}
		size_t batches = calls / BATCH;
		uint64_t *raw = malloc(batches * sizeof(*raw));
		uint64_t *hooked = malloc(batches * sizeof(*hooked));

		// In turns, so that whatever disturbs disturbs both.
		for (size_t i = 0; i < batches; i++) {
			raw[i] = batch(raw_pread, fd, buffers);
			hooked[i] = batch(pread, fd, buffers);
		}
		double raw_time = median(raw, batches);

		answer("%f %f", raw_time, median(hooked, batches));
		free(raw);
		free(hooked);
	}
	return 0;
}
