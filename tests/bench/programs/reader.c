// SPDX-License-Identifier: MIT
// reader FILE BLOCKS: reads a file into page-aligned private memory of its own, and tells how long it takes to be merged.
//
// read FIRST COUNT      → read; blocks of 4 KiB, into pages not used yet
// wait PAGES            → merged, once so many pages of the process are
// sample FIRST COUNT MS → a time in ns for each block: from pread's return to the page being merged; a pause before each
#include <fcntl.h>
#include <sys/prctl.h>

#include "common.h"

enum {
	WAIT_SECONDS = 60,
	POLL_US = 50,
	SAMPLE_SECONDS = 10,
};

static char *buffers;
static uint64_t used;
static uint64_t room;

static void read_block(int fd, uint64_t block)
{
	if (used == room) {
		answer("error no page is left to read into");
		exit(1);
	}
	if (pread(fd, buffers + used++ * PAGE, PAGE, (off_t)(block * PAGE)) != PAGE)
		fail("pread");
}

static uint64_t sample(int fd, uint64_t block)
{
	uint64_t merged = agent_stats().pages_merged;
	uint64_t returned;

	read_block(fd, block);
	returned = nanoseconds(CLOCK_MONOTONIC);
	while (agent_stats().pages_merged <= merged) {
		if (nanoseconds(CLOCK_MONOTONIC) - returned > SAMPLE_SECONDS * 1000000000UL) {
			answer("error block %lu was not merged", block);
			exit(1);
		}
		nap(POLL_US);
	}
	return nanoseconds(CLOCK_MONOTONIC) - returned;
}

int main(int argc, char **argv)
{
	char line[64];
	unsigned long first;
	unsigned long count;
	unsigned long milliseconds;
	int fd;

	if (argc != 3) {
		answer("error usage: reader FILE BLOCKS");
		return 2;
	}
	fd = open(argv[1], O_RDONLY);
	if (fd < 0)
		fail(argv[1]);
	// Naps are to end when they should.
	prctl(PR_SET_TIMERSLACK, 1);
	room = strtoull(argv[2], NULL, 10);
	buffers = map_pages(room);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "read %lu %lu", &first, &count) == 2) {
			for (unsigned long i = 0; i < count; i++)
				read_block(fd, first + i);
			answer("read");
		} else if (sscanf(line, "wait %lu", &count) == 1) {
			if (!wait_merged(count, WAIT_SECONDS)) {
				answer("error only %lu pages were merged", agent_stats().pages_merged);
				return 1;
			}
			answer("merged");
		} else if (sscanf(line, "sample %lu %lu %lu", &first, &count, &milliseconds) == 3) {
			for (unsigned long i = 0; i < count; i++) {
				nap((long)milliseconds * 1000);
				printf("%lu ", sample(fd, first + i));
			}
			answer("end");
		} else {
			answer("error unknown command");
			return 2;
		}
	}
	return 0;
}
