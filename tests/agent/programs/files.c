// SPDX-License-Identifier: MIT
// Mappings of images on the mount, merged: whatever the program does with them, it finds the file. argv: case, private or
// shared, the first image, the second one, which has the same pages behind a page of its own.
#include <sys/stat.h>

#include "merged.h"

enum { PAGES = 96, SECOND = 1 };

static int type; // of mappings
static const char *paths[2];
static char contents[2][(PAGES + SECOND) * PAGE]; // of the images, read

static void read_image(int image)
{
	size_t bytes = (PAGES + (image ? SECOND : 0)) * PAGE;
	int fd = open(paths[image], O_RDONLY | O_CLOEXEC);

	check(fd >= 0);
	for (size_t at = 0; at < bytes;) {
		// By a system call: no place hint.
		long got = syscall(SYS_pread64, fd, contents[image] + at, bytes - at, at);

		check(got > 0);
		at += (size_t)got;
	}
	close(fd);
}

// The common pages of an image; the descriptor is closed at once.
static char *map_image(int image)
{
	int fd = open(paths[image], O_RDONLY | O_CLOEXEC);
	char *at;

	check(fd >= 0);
	at = mmap(NULL, PAGES * PAGE, PROT_READ, type, fd, image ? SECOND * PAGE : 0);
	check(at != MAP_FAILED);
	close(fd);
	return at;
}

// What lies at page `page` of both images, from the common ones on.
static const char *original(size_t page)
{
	return contents[0] + page * PAGE;
}

static bool right_from(const char *at, size_t first, size_t pages)
{
	return memcmp(at, original(first), pages * PAGE) == 0;
}

static bool right(const char *at)
{
	return right_from(at, 0, PAGES);
}

// The line of /proc/self/maps.
static void mapping_of(const void *at, char *ret, size_t room)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[8192];

	check(maps);
	*ret = '\0';
	while (fgets(line, sizeof(line), maps)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && start <= (unsigned long)at && (unsigned long)at < end)
			snprintf(ret, room, "%s", line);
	}
	fclose(maps);
}

static bool is_store(const void *at)
{
	char line[8192];

	mapping_of(at, line, sizeof(line));
	return strstr(line, "/memfd:udedup-store");
}

static bool is_image(const void *at)
{
	char line[8192];

	mapping_of(at, line, sizeof(line));
	return strstr(line, ".img");
}

static unsigned mappings_of_images(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[8192];
	unsigned count = 0;

	check(maps);
	while (fgets(line, sizeof(line), maps))
		count += strstr(line, ".img") != NULL;
	fclose(maps);
	return count;
}

static size_t count_store(const char *at, size_t pages)
{
	size_t count = 0;

	for (size_t i = 0; i < pages; i++)
		count += is_store(at + i * PAGE);
	return count;
}

static void await_store(const char *at, size_t pages)
{
	double deadline = seconds() + PATIENCE_SECONDS;

	if (!wrapped())
		return;
	for (unsigned turn = 0; count_store(at, pages) < pages; turn++) {
		check(seconds() < deadline && "merged in time");
		if (turn % 50 == 0)
			advise(at, pages * PAGE);
		breathe();
	}
}

// Two mappings, of both images, all of it merged.
static void both(char *at[2])
{
	await_agent();
	for (int image = 0; image < 2; image++) {
		read_image(image);
		at[image] = map_image(image);
		check(right(at[image]));
	}
	for (int image = 0; image < 2; image++)
		await_store(at[image], PAGES);
	for (int image = 0; image < 2; image++)
		check(right(at[image]));
}

static void merges(void)
{
	char *at[2];
	char line[8192];
	char permissions[8];

	both(at);
	if (wrapped())
		check(stats().pages_merged >= 2 * PAGES);
	mapping_of(at[0], line, sizeof(line));
	check(sscanf(line, "%*s %7s ", permissions) == 1);
	check(strcmp(permissions, type == MAP_SHARED ? "r--s" : "r--p") == 0);
	check(touch(at[0] + 5, true) == SIGSEGV);
	check(right(at[0]) && right(at[1]));
}

static void merges_with_anonymous(void)
{
	char *at = plain(PAGES);
	char *mapped;

	await_agent();
	read_image(0);
	memcpy(at, contents[0], PAGES * PAGE);
	mapped = map_image(0);
	check(right(mapped));
	await_store(mapped, PAGES);
	await_merged(at, PAGES, WHOLE);
	check(right(mapped) && right(at));
	at[7] ^= 1;
	check(right(mapped));
	at[7] ^= 1;
	check(right(at));
}

static void goes_with_its_mappings(void)
{
	char *at[2];
	struct stat status;

	both(at);
	check(mappings_of_images() > 0);
	check(munmap(at[0] + 3 * PAGE, (PAGES - 3) * PAGE) == 0);
	check(right_from(at[0], 0, 3));
	check(munmap(at[0], 3 * PAGE) == 0);
	check(munmap(at[1], PAGES * PAGE) == 0);
	// Nothing is left that would keep the images busy.
	check(mappings_of_images() == 0);
	check(stat(paths[0], &status) == 0);
	both(at);
}

static void written(void)
{
	char *at[2];

	both(at);
	if (type == MAP_SHARED) {
		check(mprotect(at[0], PAGES * PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES);
		check(right(at[0]));
		return;
	}
	check(mprotect(at[0] + 8 * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE) == 0);
	if (wrapped()) {
		check(is_image(at[0] + 8 * PAGE) && is_image(at[0] + 23 * PAGE));
		check(is_store(at[0] + 7 * PAGE) && is_store(at[0] + 24 * PAGE));
	}
	check(right(at[0]));
	for (size_t i = 8; i < 24; i++)
		memset(at[0] + i * PAGE + 100, (int)i, 50);
	check(right_from(at[0], 0, 8) && right_from(at[0] + 24 * PAGE, 24, PAGES - 24));
	for (size_t i = 8; i < 24; i++) {
		char page[PAGE];

		memcpy(page, original(i), PAGE);
		memset(page + 100, (int)i, 50);
		check(memcmp(page, at[0] + i * PAGE, PAGE) == 0);
	}
	check(right(at[1]));
	check(mprotect(at[0] + 8 * PAGE, 16 * PAGE, PROT_READ) == 0);
	check(at[0][9 * PAGE + 100] == 9);
	// Dropped, they are the file's again.
	check(madvise(at[0], PAGES * PAGE, MADV_DONTNEED) == 0);
	check(right(at[0]) && right(at[1]));
}

static void inaccessible(void)
{
	char *at[2];

	both(at);
	check(mprotect(at[0] + PAGE, 4 * PAGE, PROT_NONE) == 0);
	check(touch(at[0] + 2 * PAGE, false) == SIGSEGV);
	check(right_from(at[0], 0, 1) && right_from(at[0] + 5 * PAGE, 5, PAGES - 5));
	check(mprotect(at[0] + PAGE, 4 * PAGE, PROT_READ | PROT_EXEC) == 0);
	check(right(at[0]) && right(at[1]));
}

static void discarded(void)
{
	char *at[2];

	both(at);
	check(madvise(at[0] + PAGE, 9 * PAGE, MADV_DONTNEED) == 0);
	check(right(at[0]));
	check(madvise(at[0], PAGES * PAGE, MADV_FREE) == -1 && errno == EINVAL);
	check(right(at[0]));
	check(madvise(at[0], PAGES * PAGE, MADV_WILLNEED) == 0);
	check(madvise(at[0], PAGES * PAGE, MADV_RANDOM) == 0);
	check(madvise(at[0], PAGES * PAGE, MADV_DONTDUMP) == 0);
	check(has_flag(at[0] + 11 * PAGE, "dd"));
	check(msync(at[0], PAGES * PAGE, MS_SYNC) == 0);
	check(right(at[0]) && right(at[1]));
	// Together with anonymous memory behind it.
	check(mmap(at[1] + 4 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at[1] + 4 * PAGE);
	memset(at[1] + 4 * PAGE, 'x', 2 * PAGE);
	check(madvise(at[1], PAGES * PAGE, MADV_DONTNEED) == 0);
	check(right_from(at[1], 0, 4) && is_zero(at[1] + 4 * PAGE, 2) && right_from(at[1] + 6 * PAGE, 6, PAGES - 6));
}

static void mapped_over(void)
{
	char *at[2];
	int fd;

	both(at);
	check(mmap(at[0] + 4 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at[0] + 4 * PAGE);
	check(is_zero(at[0] + 4 * PAGE, 8));
	memset(at[0] + 4 * PAGE, 'y', 8 * PAGE);
	// Other pages of the file in the middle of its own.
	fd = open(paths[1], O_RDONLY | O_CLOEXEC);
	check(mmap(at[1] + 8 * PAGE, 4 * PAGE, PROT_READ, type | MAP_FIXED, fd, 40 * PAGE) == at[1] + 8 * PAGE);
	close(fd);
	check(right_from(at[1] + 8 * PAGE, 39, 4));
	await_store(at[1] + 8 * PAGE, 4);
	check(right_from(at[1], 0, 8) && right_from(at[1] + 8 * PAGE, 39, 4) && right_from(at[1] + 12 * PAGE, 12, PAGES - 12));
	// To put it back where another mapping of it lies in the middle.
	if (type == MAP_PRIVATE) {
		check(mprotect(at[1], PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
		check(right_from(at[1], 0, 8) && right_from(at[1] + 8 * PAGE, 39, 4) && right_from(at[1] + 12 * PAGE, 12, PAGES - 12));
	}
	check(right_from(at[0], 0, 4) && right_from(at[0] + 12 * PAGE, 12, PAGES - 12));
	for (size_t i = 4 * PAGE; i < 12 * PAGE; i++)
		check(at[0][i] == 'y');
}

static void moved(void)
{
	char *at[2];
	char *room = mmap(NULL, 2 * PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *to;

	both(at);
	to = mremap(at[0], PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room + 5 * PAGE);
	check(to == room + 5 * PAGE);
	check(right(to));
	check(touch(at[0], false) == SIGSEGV);
	// Shorter, then longer: the file goes on where it was cut.
	check(mremap(to, PAGES * PAGE, 10 * PAGE, 0) == to);
	check(right_from(to, 0, 10));
	to = mremap(to, 10 * PAGE, PAGES * PAGE, MREMAP_MAYMOVE);
	check(to != MAP_FAILED);
	check(right(to));
	// Left mapped, too.
	room = mremap(at[1], PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	check(room != MAP_FAILED);
	check(right(room) && right(at[1]));
	// Over what is merged.
	at[0] = map_image(0);
	check(right(at[0]));
	await_store(at[0], PAGES);
	check(mremap(to, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at[0]) == at[0]);
	check(right(at[0]));
}

static void mapped_twice(void)
{
	char *at[2];
	char *copy;

	if (type != MAP_SHARED)
		return;
	both(at);
	copy = mremap(at[0] + 3 * PAGE, 0, (PAGES - 3) * PAGE, MREMAP_MAYMOVE);
	check(copy != MAP_FAILED);
	check(right_from(copy, 3, PAGES - 3));
	check(right(at[0]));
	// Which is for what may be written to.
	check(remap_file_pages(at[1] + 4 * PAGE, 4 * PAGE, 0, 50, 0) == -1 && errno == EINVAL);
	check(right(at[1]));
}

static void forked(void)
{
	char *at[2];
	pid_t child;

	both(at);
	child = fork();
	if (child == 0) {
		check(right(at[0]) && right(at[1]));
		if (type == MAP_PRIVATE) {
			check(mprotect(at[0], PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
			check(right(at[0]));
			for (size_t i = 0; i < PAGES; i += 3)
				memset(at[0] + i * PAGE, 'z', PAGE);
			for (size_t i = 0; i < PAGES; i++) {
				if (i % 3)
					check(right_from(at[0] + i * PAGE, i, 1));
				else
					check(at[0][i * PAGE] == 'z' && at[0][i * PAGE + PAGE - 1] == 'z');
			}
			check(madvise(at[0], PAGES * PAGE, MADV_DONTNEED) == 0);
			check(right(at[0]));
		}
		check(munmap(at[1], 7 * PAGE) == 0);
		check(right_from(at[1] + 7 * PAGE, 7, PAGES - 7));
		await_agent();
		at[1] = map_image(1);
		check(right(at[1]));
		await_store(at[1], PAGES);
		check(right(at[1]));
		_exit(0);
	}
	check(wait_child(child) == 0);
	check(right(at[0]) && right(at[1]));
}

// A debugger writes where the program can't.
static void written_by_a_debugger(void)
{
	char *at[2];
	int memory;
	char byte = 'D';

	if (type != MAP_PRIVATE)
		return;
	await_agent();
	read_image(0);
	at[0] = map_image(0);
	check(right(at[0]));
	memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	check(memory >= 0);
	check(pwrite(memory, &byte, 1, (off_t)(uintptr_t)(at[0] + 3 * PAGE + 9)) == 1);
	check(at[0][3 * PAGE + 9] == 'D');
	contents[0][3 * PAGE + 9] = 'D';
	at[1] = map_image(1);
	await_store(at[0], 3);
	await_store(at[0] + 4 * PAGE, PAGES - 4);
	check(right(at[0]));
	check(pwrite(memory, &byte, 1, (off_t)(uintptr_t)(at[0] + 20 * PAGE + 9)) == 1);
	check(at[0][20 * PAGE + 9] == 'D');
	contents[0][20 * PAGE + 9] = 'D';
	check(right(at[0]));
	// Given back, both are still there.
	check(mprotect(at[0], PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
	check(right(at[0]));
	at[0][21 * PAGE] ^= 1;
	at[0][21 * PAGE] ^= 1;
	check(right(at[0]));
	check(madvise(at[0], PAGES * PAGE, MADV_DONTNEED) == 0);
	read_image(0);
	check(right(at[0]) && right(at[1]));
}

static void locked(void)
{
	char *at[2];

	both(at);
	check(mlock(at[0], 8 * PAGE) == 0);
	check(right(at[0]));
	check(munlock(at[0], 8 * PAGE) == 0);
	check(mremap(at[0], PAGES * PAGE, 4 * PAGE, 0) == at[0]);
	check(right_from(at[0], 0, 4) && right(at[1]));
}

// Tells when it is merged, and goes on when it is told to.
static void without_an_engine(void)
{
	char *at[2];
	char line[16];
	pid_t child;

	both(at);
	puts("merged");
	fflush(stdout);
	check(fgets(line, sizeof(line), stdin));
	check(right(at[0]) && right(at[1]));
	check(madvise(at[0], PAGES * PAGE, MADV_DONTNEED) == 0);
	check(right(at[0]));
	check(madvise(at[0], PAGES * PAGE, MADV_DONTDUMP) == 0);
	check(mprotect(at[0], 8 * PAGE, PROT_NONE) == 0);
	check(mprotect(at[0], 8 * PAGE, PROT_READ) == 0);
	check(right(at[0]));
	if (type == MAP_PRIVATE) {
		check(mprotect(at[0], PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
		check(right(at[0]));
		for (size_t i = 0; i < PAGES; i += 2)
			memset(at[0] + i * PAGE, 'z', PAGE);
		for (size_t i = 0; i < PAGES; i++)
			check(i % 2 ? right_from(at[0] + i * PAGE, i, 1) : at[0][i * PAGE + 77] == 'z');
		check(madvise(at[0], PAGES * PAGE, MADV_DONTNEED) == 0);
		check(right(at[0]));
	}
	child = fork();
	if (child == 0) {
		check(right(at[1]));
		_exit(0);
	}
	check(wait_child(child) == 0);
	check(munmap(at[0], PAGES * PAGE) == 0);
	check(right(at[1]));
	puts("right");
	fflush(stdout);
	check(fgets(line, sizeof(line), stdin));
	check(right(at[1]));
}

// Read for the first time by page faults.
static void faults(void)
{
	char *at[2];
	char line[16];
	double deadline = seconds() + PATIENCE_SECONDS;
	size_t missing = 1;

	await_agent();
	for (int image = 0; image < 2; image++) {
		at[image] = map_image(image);
		for (size_t i = 0; i < PAGES; i++)
			check(touch(at[image] + i * PAGE, false) == 0);
	}
	while (missing) {
		check(seconds() < deadline && "merged in time");
		breathe();
		missing = 2 * PAGES - count_store(at[0], PAGES) - count_store(at[1], PAGES);
	}
	read_image(0);
	check(right(at[0]) && right(at[1]));
	puts("merged");
	fflush(stdout);
	check(fgets(line, sizeof(line), stdin));
}

// Waits until the first image is nowhere merged any more; the second one still is.
static void changes(void)
{
	double deadline = seconds() + PATIENCE_SECONDS;
	char *at[2];
	char line[16];

	both(at);
	puts("merged");
	fflush(stdout);
	check(fgets(line, sizeof(line), stdin));
	while (count_store(at[0], PAGES)) {
		check(seconds() < deadline && "given back in time");
		breathe();
	}
	check(count_store(at[1], PAGES) == PAGES);
	await_agent();
	check(right(at[1]));
	puts("the file again");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static const struct test_case cases[] = {
		{"merges", merges},
		{"merges-with-anonymous", merges_with_anonymous},
		{"goes-with-its-mappings", goes_with_its_mappings},
		{"written", written},
		{"inaccessible", inaccessible},
		{"discarded", discarded},
		{"mapped-over", mapped_over},
		{"moved", moved},
		{"mapped-twice", mapped_twice},
		{"forked", forked},
		{"written-by-a-debugger", written_by_a_debugger},
		{"locked", locked},
		{"without-an-engine", without_an_engine},
		{"faults", faults},
		{"changes", changes},
	};

	check(argc == 5);
	type = strcmp(argv[2], "shared") == 0 ? MAP_SHARED : MAP_PRIVATE;
	paths[0] = argv[3];
	paths[1] = argv[4];
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
