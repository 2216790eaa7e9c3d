// SPDX-License-Identifier: MIT
// Options, threads, the watchdog, the result, and the self-test.
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <malloc.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "torture.h"

static const uint64_t second = 1000000000;
static const uint64_t millisecond = 1000000;
static const size_t shared_size = (size_t)8 << 30; // address space and file size, not memory

struct options options = {.seconds = 10, .threads = 8, .hang = 20, .directory = "."};
unsigned int worker_count;
struct worker **workers;

static uint64_t start;
static unsigned char *shared_next, *shared_end;

// ns since the program started; children keep their parent's clock.
uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * second + (uint64_t)time.tv_nsec - start;
}

// Of the calling thread, without libc: its read() is what a program under test may be slow in.
struct cpu_times cpu_times(void)
{
	char text[96];
	struct cpu_times ret = {0};
	long fd = syscall(SYS_openat, AT_FDCWD, "/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
	long got = fd < 0 ? -1 : syscall(SYS_read, fd, text, sizeof(text) - 1);

	if (fd >= 0)
		syscall(SYS_close, fd);
	if (got <= 0)
		return ret;
	text[got] = 0;
	char *end;

	ret.ran = strtoull(text, &end, 10);
	ret.queued = strtoull(end, NULL, 10);
	return ret;
}

// A sleep on purpose: not counted as time of the operation.
void nap(struct worker *w, uint64_t ns)
{
	struct timespec time = {(time_t)(ns / second), (long)(ns % second)};
	struct cpu_times cpu_before = cpu_times();
	uint64_t before = now();

	nanosleep(&time, NULL);
	uint64_t took = now() - before;
	struct cpu_times cpu = cpu_times();

	w->since += took;
	w->napped += took;
	w->napped_cpu.ran += cpu.ran - cpu_before.ran;
	w->napped_cpu.queued += cpu.queued - cpu_before.queued;
}

bool stopping(const struct worker *w)
{
	return now() >= w->deadline;
}

static void shared_init_memory(void)
{
	int fd = memfd_create("torture-oracle", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)shared_size))
		setup_error("the oracle's file");
	shared_next = mmap(NULL, shared_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (shared_next == MAP_FAILED)
		setup_error("mapping the oracle");
	shared_end = shared_next + shared_size;
	close(fd);
}

// Zeroed, page aligned, never given back. Only called before the threads run, except by a thread for itself under the
// lock of its first operation.
void *shared_allocate(size_t size)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

	pthread_mutex_lock(&lock);
	unsigned char *memory = shared_next;

	shared_next += (size + PAGE - 1) / PAGE * PAGE;
	pthread_mutex_unlock(&lock);
	if (memory + size > shared_end) {
		errno = ENOMEM;
		setup_error("the oracle");
	}
	return memory;
}

static void *worker_thread(void *worker)
{
	struct worker *w = self = worker;

	w->tid = (pid_t)syscall(SYS_gettid);
	bursts(w);
	reap(w, true);
	for (unsigned int i = 0; i < w->region_count; i++) {
		region_prepare(w, &w->regions[i], &operations[0]);
		check_region(w, &w->regions[i]);
	}
	io_deinit(w);
	w->done = true;
	return NULL;
}

static void watch(void)
{
	uint64_t *reported = shared_allocate(worker_count * sizeof(*reported)); // beginning of each worker's last slow operation
	bool all;

	do {
		struct timespec pause = {.tv_nsec = options.slow ? 20000000 : 100000000};

		nanosleep(&pause, NULL);
		all = true;
		for (unsigned int i = 0; i < worker_count; i++) {
			const struct worker *w = workers[i];
			uint64_t since = w->since, time = now();

			all &= w->done;
			if (!w->done && time > since && time - since > options.hang * second)
				hang("torture: HANG: thread %u (tid %d) made no progress for %u s", i, (int)w->tid, options.hang);
			if (options.slow && w->doing && time > since && time - since > options.slow * millisecond && since != reported[i]) {
				reported[i] = since;
				say_slow(w);
			}
		}
	} while (!all);
}

// Upper end of a bucket of record().
static uint64_t bucket_end(unsigned int bucket)
{
	if (bucket < 8)
		return bucket;
	return ((uint64_t)(bucket % 8 + 9) << (bucket / 8 - 1)) - 1;
}

static uint64_t percentile(const struct times *times, double share)
{
	uint64_t seen = 0, wanted = (uint64_t)((double)times->count * share);

	for (unsigned int i = 0; i < BUCKETS; i++) {
		seen += times->buckets[i];
		if (seen > wanted)
			return bucket_end(i) < times->max ? bucket_end(i) : times->max;
	}
	return times->max;
}

void add_times(struct times *sum, const struct times *times)
{
	sum->count += times->count;
	if (times->max > sum->max)
		sum->max = times->max;
	for (unsigned int i = 0; i < BUCKETS; i++)
		sum->buckets[i] += times->buckets[i];
}

void add_costs(struct costs *sum, const struct costs *costs)
{
	add_times(&sum->whole, &costs->whole);
	add_times(&sum->asleep, &costs->asleep);
	add_times(&sum->ran, &costs->ran);
}

// A histogram as JSON: counts by the upper end of their bucket in microseconds.
static void print_times(const char *name, const struct times *times)
{
	const char *separator = "";

	printf("\"%s\": {\"p9999_us\": %.1f, \"max_us\": %.1f, \"histogram\": {", name, (double)percentile(times, 0.9999) / 1e3,
	       (double)times->max / 1e3);
	for (unsigned int i = 0; i < BUCKETS; i++) {
		if (!times->buckets[i])
			continue;
		printf("%s\"%.3f\": %" PRIu32, separator, (double)bucket_end(i) / 1e3, times->buckets[i]);
		separator = ", ";
	}
	printf("}}");
}

static void print_result(void)
{
	static struct costs sum[OPERATIONS];
	uint64_t verified = 0, skipped = 0, children = 0, all = 0;

	for (unsigned int i = 0; i < worker_count; i++) {
		const struct worker *w = workers[i];

		verified += w->verified;
		skipped += w->skipped;
		children += w->children;
		for (unsigned int j = 0; j < operation_count; j++) {
			add_costs(&sum[j], &w->costs[j]);
			all += operations[j].run ? w->costs[j].whole.count : 0;
		}
	}
	printf("{\"seed\": %" PRIu64 ", \"seconds\": %.3f, \"threads\": %u, \"raw\": %s, \"operations\": %" PRIu64
	       ", \"verified_pages\": %" PRIu64 ", \"children\": %" PRIu64 ", \"skipped\": %" PRIu64 ", \"by_kind\": {",
	       options.seed, (double)now() / 1e9, options.threads, options.raw ? "true" : "false", all, verified, children,
	       skipped);
	for (unsigned int i = 1; i < operation_count; i++) {
		printf("%s\"%s\": {\"count\": %" PRIu64 ", ", i == 1 ? "" : ", ", operations[i].name, sum[i].whole.count);
		print_times("whole", &sum[i].whole);
		printf(", ");
		print_times("asleep", &sum[i].asleep);
		printf(", ");
		print_times("ran", &sum[i].ran);
		printf("}");
	}
	printf("}}\n");
	if (fflush(stdout))
		setup_error("standard output");
}

static int torture(void)
{
	static void *(*const services[])(void *) = {board_thread, futex_wait_thread, futex_wake_thread, malloc_thread, heap_thread};
	const unsigned int service_count = sizeof(services) / sizeof(*services);
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	start = (uint64_t)time.tv_sec * second + (uint64_t)time.tv_nsec;
	say("torture: seed %" PRIu64, options.seed);
	check_init();
	open_data_file();
	shared_init();
	sigsegv_init();
	worker_count = options.threads + service_count;
	workers = shared_allocate(worker_count * sizeof(*workers));
	pthread_t *threads = calloc(worker_count, sizeof(*threads));

	// malloc now has what it wants of the break. A page that stays keeps malloc_trim from giving back the end of it: it
	// does so only while nobody else has moved the break.
	if (!threads || sbrk(PAGE) == (void *)-1)
		setup_error("the heap");

	for (unsigned int i = 0; i < worker_count; i++) {
		struct worker *w = workers[i] = shared_allocate(sizeof(*w));

		w->id = i;
		w->random = options.seed * 0x2545f4914f6cdd1d + i;
		w->deadline = options.seconds * second;
		if (i >= options.threads)
			continue;
		regions_init(w);
		io_init(w);
		family_init(w);
	}
	for (unsigned int i = 0; i < worker_count; i++) {
		workers[i]->since = now();
		int result = pthread_create(&threads[i], NULL,
					    i < options.threads ? worker_thread : services[i - options.threads], workers[i]);

		if (result) {
			errno = result;
			setup_error("pthread_create");
		}
	}
	watch();
	for (unsigned int i = 0; i < worker_count; i++)
		pthread_join(threads[i], NULL);
	free(threads);
	print_result();
	return 0;
}

static const char *const sabotages[SABOTAGE_KINDS] = {
	"none", "flip", "zero", "swap", "write", "discard", "free",  "map",  "kernel", "direct",
	"pin",  "child", "wipe", "signal", "heap", "malloc", "board", "lane", "futex",  "hang",
};

// Runs the program once per way to break it. Each must be noticed, and a run without any must end well.
static int self_test(void)
{
	char seed[32], threads[16];
	int failures = 0;

	snprintf(seed, sizeof(seed), "--seed=%" PRIu64, options.seed);
	snprintf(threads, sizeof(threads), "--threads=%u", options.threads);
	for (unsigned int kind = SABOTAGE_NONE; kind < SABOTAGE_KINDS; kind++) {
		char sabotage[32], directory[4096], name[] = "torture", seconds[] = "--seconds=20", patience[] = "--hang=4";
		char *arguments[] = {name, seed, threads, seconds, patience, sabotage, directory, NULL};
		int want = kind == SABOTAGE_NONE ? 0 : kind == SABOTAGE_HANG ? EXIT_HANG : EXIT_WRONG;
		posix_spawn_file_actions_t actions;
		int status, result;
		pid_t pid;

		snprintf(sabotage, sizeof(sabotage), "--sabotage=%s", sabotages[kind]);
		snprintf(directory, sizeof(directory), "--directory=%s", options.directory);
		if (posix_spawn_file_actions_init(&actions) ||
		    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0))
			setup_error("self-test");
		result = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, arguments, environ);
		posix_spawn_file_actions_destroy(&actions);
		if (result || waitpid(pid, &status, 0) != pid)
			setup_error("self-test");
		bool right = WIFEXITED(status) && WEXITSTATUS(status) == want;

		failures += !right;
		printf("self-test %-8s %s (status 0x%x, expected exit %d)\n", sabotages[kind], right ? "ok" : "NOT NOTICED",
		       (unsigned int)status, want);
		fflush(stdout);
	}
	return failures ? EXIT_WRONG : 0;
}

static int write_data(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, data, (size_t)DATA_PAGES * PAGE) != (ssize_t)DATA_PAGES * PAGE || close(fd))
		setup_error(path);
	return 0;
}

static const char usage[] =
	"usage: torture [--seed N] [--seconds N] [--threads N] [--hang SECONDS] [--slow MS] [--raw] [--directory DIR]\n"
	"               [--image FILE]\n"
	"       torture --write-data FILE     write what an image given with --image must contain\n"
	"       torture --self-test           check that every kind of fault is noticed\n"
	"       torture --sabotage KIND …     run with one kind of fault\n"
	"ends with 0 if no byte was wrong, 1 at the first wrong byte or result, 2 if it could not run, 3 if it hangs\n";

static uint64_t number(const char *text, uint64_t least, uint64_t most)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 0);

	if (errno || end == text || *end || value < least || value > most) {
		say("torture: %s is not a number from %" PRIu64 " to %" PRIu64, text, least, most);
		_exit(EXIT_SETUP);
	}
	return value;
}

static enum sabotage sabotage_named(const char *name)
{
	for (unsigned int i = 0; i < SABOTAGE_KINDS; i++)
		if (!strcmp(name, sabotages[i]))
			return i;
	say("torture: no such sabotage: %s", name);
	_exit(EXIT_SETUP);
}

int main(int argc, char **argv)
{
	static const struct option long_options[] = {
		{"seed", required_argument, NULL, 's'},      {"seconds", required_argument, NULL, 't'},
		{"threads", required_argument, NULL, 'n'},   {"hang", required_argument, NULL, 'h'},
		{"raw", no_argument, NULL, 'r'},             {"directory", required_argument, NULL, 'd'},
		{"image", required_argument, NULL, 'i'},     {"write-data", required_argument, NULL, 'w'},
		{"self-test", no_argument, NULL, 'T'},       {"sabotage", required_argument, NULL, 'S'},
		{"exit", required_argument, NULL, 'e'},      {"slow", required_argument, NULL, 'l'},
		{NULL, 0, NULL, 0},
	};
	const char *data_path = NULL;
	bool test = false;
	int letter;

	// The break is the heap thread's: malloc must not shrink it, nor fall back on it for want of arenas.
	if (!mallopt(M_TRIM_THRESHOLD, INT_MAX) || !mallopt(M_ARENA_MAX, 1024))
		setup_error("mallopt");

	options.seed = (uint64_t)time(NULL) << 16 ^ (uint64_t)getpid();
	while ((letter = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
		switch (letter) {
		case 's': options.seed = number(optarg, 0, UINT64_MAX); break;
		case 't': options.seconds = (unsigned int)number(optarg, 1, 1000000); break;
		case 'n': options.threads = (unsigned int)number(optarg, 1, 64); break;
		case 'h': options.hang = (unsigned int)number(optarg, 4, 3600); break;
		case 'l': options.slow = (unsigned int)number(optarg, 1, 100000); break;
		case 'r': options.raw = true; break;
		case 'd': options.directory = optarg; break;
		case 'i': options.image = optarg; break;
		case 'w': data_path = optarg; break;
		case 'T': test = true; break;
		case 'S': options.sabotage = sabotage_named(optarg); break;
		case 'e': return (int)number(optarg, 0, 255);
		default: fputs(usage, stderr); return EXIT_SETUP;
		}
	}
	if (optind != argc) {
		fputs(usage, stderr);
		return EXIT_SETUP;
	}
	if (test)
		return self_test();
	shared_init_memory();
	content_init();
	return data_path ? write_data(data_path) : torture();
}
