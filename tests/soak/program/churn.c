// SPDX-License-Identifier: MIT
// Processes that come and go: what the soak runs under `udedup run`.
//
//	churn data FILE EPOCH                              writes the file that an epoch's processes have in common
//	churn one KIND FILE EPOCH SEED MILLISECONDS        is one of them
//	churn resident FILE EPOCH SEED                     holds a few scattered pages, until SIGTERM
//	churn batch FILE EPOCH SEED COUNT PARALLEL         starts COUNT of them, at most PARALLEL at a time
//
// A page's content follows from a number (see fill()), so that each process knows what it must read in its memory, at its end
// and after each thing it does. Who reads anything else ends with WRONG. `batch` counts how its processes ended, in JSON.
#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

enum {
	PAGE = 4096,
	COMMON_PAGES = 2048, // of an epoch's file
	MUCH_PAGES = 512,    // that a process reads of it
	LITTLE_PAGES = 32,
	OWN_PAGES = 256,
	RESIDENT_STEP = 16,  // one page in so many stays with a resident
	PARALLEL_MAX = 256,
	LIFE_MS = 60,        // mean
	WRONG = 3,
	FAILED = 4,
};

enum kind { MUCH, LITTLE, FORK, KILLED, EXEC, OVERWRITE, BRIEF, KINDS };

static const char *const kind_names[KINDS] = {"much", "little", "fork", "killed", "exec", "overwrite", "brief"};

// What a page must contain: fill(number).
struct region {
	unsigned char *pages;
	uint64_t *numbers;
	unsigned int count;
};

static uint64_t splitmix(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static void fill(unsigned char *page, uint64_t number)
{
	for (size_t i = 0; i < PAGE; i += sizeof(number)) {
		uint64_t word = splitmix(&number);

		memcpy(page + i, &word, sizeof(word));
	}
}

static void fail(const char *what)
{
	fprintf(stderr, "churn: %s: %s\n", what, strerror(errno));
	exit(FAILED);
}

static uint64_t common_number(uint64_t epoch, unsigned int page)
{
	return epoch << 32 | page;
}

static uint64_t own_number(uint64_t seed, unsigned int page)
{
	return 1ULL << 63 | seed << 20 | page;
}

static void sleep_ms(unsigned int milliseconds)
{
	struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000L};

	while (nanosleep(&left, &left) < 0 && errno == EINTR)
		;
}

static struct region region_create(unsigned int count)
{
	struct region region = {.count = count};

	region.pages = mmap(NULL, (size_t)count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	region.numbers = calloc(count, sizeof(*region.numbers));
	if (region.pages == MAP_FAILED || !region.numbers)
		fail("no memory");
	return region;
}

// Reads `count` pages of the common file, `step` apart, from `first` on.
static struct region region_read(const char *file, uint64_t epoch, unsigned int first, unsigned int count, unsigned int step)
{
	struct region region = region_create(count);
	int fd = open(file, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail(file);
	for (unsigned int i = 0; i < count; i++)
		region.numbers[i] = common_number(epoch, first + i * step);
	if (step == 1) {
		if (pread(fd, region.pages, (size_t)count * PAGE, (off_t)first * PAGE) != (ssize_t)count * PAGE)
			fail(file);
	} else {
		for (unsigned int i = 0; i < count; i++)
			if (pread(fd, region.pages + (size_t)i * PAGE, PAGE, (off_t)(first + i * step) * PAGE) != PAGE)
				fail(file);
	}
	close(fd);
	return region;
}

// Fills every `step`th page, from `first` on, with what nobody else has.
static void region_own(struct region *region, uint64_t seed, unsigned int first, unsigned int step)
{
	for (unsigned int i = first; i < region->count; i += step) {
		region->numbers[i] = own_number(seed, i);
		fill(region->pages + (size_t)i * PAGE, region->numbers[i]);
	}
}

static void region_check(const struct region *region)
{
	unsigned char expected[PAGE];

	for (unsigned int i = 0; i < region->count; i++) {
		fill(expected, region->numbers[i]);
		if (memcmp(expected, region->pages + (size_t)i * PAGE, PAGE)) {
			fprintf(stderr, "churn: page %u at %p is wrong, number %#lx\n", i,
				(void *)(region->pages + (size_t)i * PAGE), (unsigned long)region->numbers[i]);
			_exit(WRONG);
		}
	}
}

// One that writes over half of what it has inherited, and one that only reads it.
static void fork_two(struct region *region, uint64_t seed, unsigned int milliseconds)
{
	pid_t children[2];

	for (int i = 0; i < 2; i++) {
		children[i] = fork();
		if (children[i] < 0)
			fail("fork");
		if (children[i] == 0) {
			if (i == 0)
				region_own(region, seed ^ 1 << 30, 0, 2);
			sleep_ms(milliseconds / 2);
			region_check(region);
			_exit(0);
		}
	}
	for (int i = 0; i < 2; i++) {
		int status;

		if (waitpid(children[i], &status, 0) < 0)
			fail("waitpid");
		if (status) {
			fprintf(stderr, "churn: a child ended with %#x\n", status);
			_exit(WIFEXITED(status) ? WEXITSTATUS(status) : FAILED);
		}
	}
}

static int one(enum kind kind, char **argv)
{
	const char *file = argv[0];
	uint64_t epoch = strtoull(argv[1], NULL, 10), seed = strtoull(argv[2], NULL, 10);
	unsigned int milliseconds = strtoul(argv[3], NULL, 10);

	if (kind == BRIEF)
		return 0;
	if (kind == LITTLE) {
		struct region own = region_create(OWN_PAGES);

		region_own(&own, seed, 0, 1);
		struct region common = region_read(file, epoch, 0, LITTLE_PAGES, 1);

		sleep_ms(milliseconds);
		region_check(&own);
		region_check(&common);
		return 0;
	}
	unsigned int first = seed % (COMMON_PAGES - MUCH_PAGES) / 64 * 64;
	struct region region = region_read(file, epoch, first, MUCH_PAGES, 1);

	sleep_ms(milliseconds);
	region_check(&region);
	for (unsigned int round = 0; kind == KILLED || (kind == OVERWRITE && round < 3); round++) {
		region_own(&region, seed + round, round % 4, 4);
		sleep_ms(milliseconds / 4);
		region_check(&region);
	}
	if (kind == FORK) {
		fork_two(&region, seed, milliseconds);
		region_check(&region);
	}
	if (kind == EXEC) {
		execl("/proc/self/exe", "churn", "one", kind_names[MUCH], file, argv[1], argv[2], argv[3], NULL);
		fail("exec");
	}
	return 0;
}

static int resident(char **argv)
{
	struct region region =
		region_read(argv[0], strtoull(argv[1], NULL, 10), strtoull(argv[2], NULL, 10) % RESIDENT_STEP,
			    COMMON_PAGES / RESIDENT_STEP, RESIDENT_STEP);
	sigset_t end;
	int number;

	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	sigprocmask(SIG_BLOCK, &end, NULL);
	puts("ready");
	fflush(stdout);
	sigwait(&end, &number);
	region_check(&region);
	return 0;
}

// ---- many of them ----

struct child {
	pid_t pid; // 0: free
	enum kind kind;
	uint64_t kill_at; // ms; 0: never
};

struct counts {
	unsigned int started[KINDS];
	unsigned int wrong;
	unsigned int failed;
};

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ULL + now.tv_nsec / 1000000;
}

static void start(struct child *child, char **argv, uint64_t seed)
{
	extern char **environ;
	uint64_t random = seed;
	char seed_text[24], life_text[24];
	unsigned int life = LIFE_MS / 2 + splitmix(&random) % LIFE_MS;

	child->kind = splitmix(&random) % KINDS;
	child->kill_at = child->kind == KILLED ? now_ms() + 1 + splitmix(&random) % (4 * LIFE_MS) : 0;
	snprintf(seed_text, sizeof(seed_text), "%llu", (unsigned long long)(seed & 0xffffffffff));
	snprintf(life_text, sizeof(life_text), "%u", life);
	char *arguments[] = {"churn", "one", (char *)kind_names[child->kind], argv[0], argv[1], seed_text, life_text, NULL};

	errno = posix_spawn(&child->pid, "/proc/self/exe", NULL, NULL, arguments, environ);
	if (errno)
		fail("starting a process");
}

static void ended(struct child *child, int status, struct counts *counts)
{
	bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && child->kill_at;

	if (WIFEXITED(status) && WEXITSTATUS(status) == WRONG)
		counts->wrong++;
	else if (status && !killed)
		counts->failed++;
	if (status && !killed)
		fprintf(stderr, "churn: process %d (%s) ended with %#x\n", (int)child->pid, kind_names[child->kind], status);
	child->pid = 0;
}

static int batch(char **argv)
{
	uint64_t seed = strtoull(argv[2], NULL, 10);
	unsigned int count = strtoul(argv[3], NULL, 10), parallel = strtoul(argv[4], NULL, 10);
	struct child children[PARALLEL_MAX] = {0};
	struct counts counts = {0};
	unsigned int started = 0, running = 0;

	if (parallel == 0 || parallel > PARALLEL_MAX) {
		errno = EINVAL;
		fail("so many at a time");
	}
	while (started < count || running) {
		for (unsigned int i = 0; i < parallel; i++) {
			struct child *child = &children[i];
			int status;

			if (child->pid && child->kill_at && now_ms() >= child->kill_at)
				kill(child->pid, SIGKILL);
			if (child->pid && waitpid(child->pid, &status, WNOHANG) == child->pid) {
				ended(child, status, &counts);
				running--;
			}
			if (!child->pid && started < count) {
				start(child, argv, seed + started++);
				counts.started[child->kind]++;
				running++;
			}
		}
		sleep_ms(1);
	}
	printf("{");
	for (unsigned int i = 0; i < KINDS; i++)
		printf("\"%s\": %u, ", kind_names[i], counts.started[i]);
	printf("\"wrong\": %u, \"failed_otherwise\": %u}\n", counts.wrong, counts.failed);
	return counts.wrong || counts.failed;
}

static int write_data(char **argv)
{
	FILE *file = fopen(argv[0], "we");
	unsigned char page[PAGE];

	if (!file)
		fail(argv[0]);
	for (unsigned int i = 0; i < COMMON_PAGES; i++) {
		fill(page, common_number(strtoull(argv[1], NULL, 10), i));
		if (fwrite(page, PAGE, 1, file) != 1)
			fail(argv[0]);
	}
	if (fclose(file))
		fail(argv[0]);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "data"))
		return write_data(argv + 2);
	if (argc == 5 && !strcmp(argv[1], "resident"))
		return resident(argv + 2);
	if (argc == 7 && !strcmp(argv[1], "batch"))
		return batch(argv + 2);
	for (int kind = 0; argc == 7 && !strcmp(argv[1], "one") && kind < KINDS; kind++)
		if (!strcmp(argv[2], kind_names[kind]))
			return one(kind, argv + 3);
	fputs("churn: see the top of churn.c\n", stderr);
	return 2;
}
