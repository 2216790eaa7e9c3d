// SPDX-License-Identifier: MIT
// Maps a file to be read and does what it is told: "touch" reads a byte of every page, "count" tells how many are the store's.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *at;
static size_t bytes;

static size_t count_merged(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[8192];
	size_t pages = 0;

	while (maps && fgets(line, sizeof(line), maps)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && (char *)start >= at && (char *)start < at + bytes &&
		    strstr(line, "/memfd:udedup-store"))
			pages += (end - start) / 4096;
	}
	if (maps)
		fclose(maps);
	return pages;
}

int main(int argc, char **argv)
{
	volatile unsigned long sum = 0;
	struct stat status;
	char command[64];
	int fd = argc == 2 ? open(argv[1], O_RDONLY) : -1;

	if (fd < 0 || fstat(fd, &status)) {
		puts("error: no file");
		return 1;
	}
	bytes = (size_t)status.st_size;
	while (fgets(command, sizeof(command), stdin)) {
		// Not before it is told to: by then its agent has joined.
		if (!at)
			at = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
		if (at == MAP_FAILED) {
			puts("error: no mapping");
			return 1;
		}
		for (size_t i = 0; strncmp(command, "touch", 5) == 0 && i < bytes; i += 4096)
			sum += (unsigned long)at[i];
		printf("ok %zu\n", count_merged());
		fflush(stdout);
	}
	return 0;
}
