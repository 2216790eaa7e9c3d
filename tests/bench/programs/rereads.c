// SPDX-License-Identifier: MIT
// rereads FILE BLOCKS RATE [mergeable]: reads the first blocks of 4 KiB of a file over and over, always into the same memory, RATE
// blocks a second. mergeable: for KSM.
//
// begin          → reading, once all of it was; a thread goes on from then
#include <fcntl.h>
#include <pthread.h>

#include "common.h"

enum {
	BLOCKS_AT_ONCE = 32, // of one pread
};

struct work {
	int fd;
	char *buffers;
	uint64_t blocks;
	uint64_t rate;
};

static void read_blocks(const struct work *work, uint64_t block)
{
	size_t bytes = BLOCKS_AT_ONCE * PAGE;

	if (pread(work->fd, work->buffers + block * PAGE, bytes, (off_t)(block * PAGE)) != (ssize_t)bytes)
		fail("pread");
}

static void *reread(void *argument)
{
	const struct work *work = argument;
	uint64_t next = nanoseconds(CLOCK_MONOTONIC);

	for (uint64_t block = 0;; block = (block + BLOCKS_AT_ONCE) % work->blocks) {
		uint64_t now = nanoseconds(CLOCK_MONOTONIC);

		read_blocks(work, block);
		next += BLOCKS_AT_ONCE * 1000000000UL / work->rate;
		if (next > now)
			nap((long)((next - now) / 1000));
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct work work;
	pthread_t thread;
	char line[64];

	if (argc < 4) {
		answer("error usage: rereads FILE BLOCKS RATE [mergeable]");
		return 2;
	}
	work.fd = open(argv[1], O_RDONLY);
	if (work.fd < 0)
		fail(argv[1]);
	work.blocks = strtoull(argv[2], NULL, 10) / BLOCKS_AT_ONCE * BLOCKS_AT_ONCE;
	work.rate = strtoull(argv[3], NULL, 10);
	work.buffers = map_pages(work.blocks);
	if (argc > 4 && madvise(work.buffers, work.blocks * PAGE, MADV_MERGEABLE))
		fail("madvise");
	while (fgets(line, sizeof(line), stdin)) {
		if (strcmp(line, "begin\n") != 0) {
			answer("error unknown command");
			return 2;
		}
		for (uint64_t block = 0; block < work.blocks; block += BLOCKS_AT_ONCE)
			read_blocks(&work, block);
		errno = pthread_create(&thread, NULL, reread, &work);
		if (errno)
			fail("pthread_create");
		answer("reading");
	}
	return 0;
}
