// SPDX-License-Identifier: MIT
// A program that is linked with libudedup.so and joins by itself.
#include "merged.h"

#include <pthread.h>
#include <stdatomic.h>

enum { PAGES = 32 };

static const char *engine;

static void joins(void)
{
	struct udedup_stats now;
	char *at;

	check(udedup_stats(&now) == -ENOTCONN);
	check(udedup_advise(&now, sizeof(now)) == -ENOTCONN);
	check(udedup_join(engine, NULL) == 0);
	check(udedup_join(engine, NULL) == 0);
	check(udedup_join(NULL, "") == 0);
	check(udedup_stats(&now) == 0 && now.merging == 1 && now.reason[0] == '\0');
	at = merged(PAGES, 1, WHOLE, NULL);
	check(udedup_stats(&now) == 0 && now.pages_merged >= 2 * PAGES && now.runs >= 2);
	at[0] ^= 1;
	check(udedup_stats(&now) == 0 && now.break_pages >= 1 && now.break_events >= 1);
	// Advice about nothing, or about what is not there, does no harm.
	check(udedup_advise(NULL, 0) == 0);
	check(udedup_advise(at, 100) == 0);
	check(udedup_advise((void *)1, 1UL << 40) == 0);
	at[0] ^= 1;
	check(intact(at, PAGES, 1, WHOLE, 0));
}

static atomic_bool stop;

static void *busy(void *unused)
{
	char byte;
	int ends[2];

	(void)unused;
	check(pipe(ends) == 0);
	while (!stop) {
		char *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		check(at != MAP_FAILED);
		check(munmap(at, PAGE) == 0);
		check(write(ends[1], "x", 1) == 1 && read(ends[0], &byte, 1) == 1);
		check(madvise(&byte, 0, MADV_NORMAL) == 0 || errno == EINVAL);
	}
	return NULL;
}

// Hooks are put in place while other threads are in and out of the functions.
static void joins_among_threads(void)
{
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		check(pthread_create(&threads[i], NULL, busy, NULL) == 0);
	check(udedup_join(engine, NULL) == 0);
	check(intact(merged(PAGES, 1, WHOLE, NULL), PAGES, 1, WHOLE, 0));
	stop = true;
	for (int i = 0; i < 4; i++)
		check(pthread_join(threads[i], NULL) == 0);
}

// How many of two equal areas' pages merge within so many milliseconds; less if it is all of them. `tag`: not used before.
static size_t merged_within(unsigned ms, uint64_t tag)
{
	char *at = plain(PAGES);
	char *other = plain(PAGES);
	size_t ret = 0;

	fill(at, PAGES, tag, WHOLE, 0);
	fill(other, PAGES, tag, WHOLE, 1);
	for (unsigned waited = 0; waited < ms && ret < 2 * PAGES; waited += 10) {
		advise(at, PAGES * PAGE);
		advise(other, PAGES * PAGE);
		usleep(10000);
		ret = count_merged(at, PAGES) + count_merged(other, PAGES);
	}
	check(intact(at, PAGES, tag, WHOLE, 0) && intact(other, PAGES, tag, WHOLE, 1));
	return ret;
}

static void pauses(void)
{
	struct udedup_stats now;
	int status;
	pid_t child;

	check(udedup_pause() == -ENOTCONN && udedup_resume() == -ENOTCONN);
	check(udedup_join(engine, NULL) == 0);
	check(udedup_resume() == 0); // once too often: nothing
	check(udedup_pause() == 0 && udedup_pause() == 0);
	check(udedup_stats(&now) == 0 && now.merging == 0 && strcmp(now.reason, "the program has paused it") == 0);
	check(merged_within(500, 1) == 0);
	check(udedup_resume() == 0);
	check(udedup_stats(&now) == 0 && now.merging == 0);
	check(merged_within(100, 2) == 0);
	child = fork();
	if (child == 0) {
		check(udedup_join(engine, NULL) == 0);
		check(udedup_stats(&now) == 0 && now.merging == 1);
		check(merged_within(1000 * PATIENCE_SECONDS, 3) == 2 * PAGES);
		check(udedup_resume() == 0);
		_exit(0);
	}
	check(waitpid(child, &status, 0) == child && status == 0);
	check(udedup_stats(&now) == 0 && now.merging == 0);
	check(udedup_resume() == 0);
	check(udedup_stats(&now) == 0 && now.merging == 1 && now.reason[0] == '\0');
	check(merged_within(1000 * PATIENCE_SECONDS, 4) == 2 * PAGES);
}

static void *pauses_often(void *unused)
{
	(void)unused;
	for (int i = 0; i < 2000; i++)
		check(udedup_pause() == 0 && udedup_resume() == 0);
	return NULL;
}

// However they meet, the last one out lets the merging go on.
static void pauses_among_threads(void)
{
	struct udedup_stats now;
	pthread_t threads[4];

	check(udedup_join(engine, NULL) == 0);
	for (int i = 0; i < 4; i++)
		check(pthread_create(&threads[i], NULL, pauses_often, NULL) == 0);
	check(intact(merged(PAGES, 1, WHOLE, NULL), PAGES, 1, WHOLE, 0));
	for (int i = 0; i < 4; i++)
		check(pthread_join(threads[i], NULL) == 0);
	check(udedup_stats(&now) == 0 && now.merging == 1);
	check(intact(merged(PAGES, 2, WHOLE, NULL), PAGES, 2, WHOLE, 0));
}

static void no_engine(void)
{
	struct udedup_stats now;

	check(udedup_join(engine, NULL) == -ECONNREFUSED);
	check(udedup_stats(&now) == 0 && now.merging == 0);
}

static void refused(void)
{
	struct udedup_stats now;

	check(setresuid(1000, 1000, 1000) == 0);
	check(udedup_join(engine, "not-allowed") < 0);
	check(udedup_stats(&now) == 0 && now.merging == 0);
}

// Why is said whole, for the longest path too.
static void forbidden(void)
{
	struct udedup_stats now;
	char expected[200];

	check(setresuid(1000, 1000, 1000) == 0);
	check(udedup_join(engine, NULL) == -EACCES);
	check(udedup_stats(&now) == 0 && now.merging == 0);
	snprintf(expected, sizeof(expected), "may not connect to %s", engine);
	check(strcmp(now.reason, expected) == 0);
	check(udedup_join(engine, NULL) == -EACCES);
}

static void bad_arguments(void)
{
	char path[200], label[100];

	memset(path, 'x', sizeof(path));
	path[sizeof(path) - 1] = '\0';
	memset(label, 'x', sizeof(label));
	label[sizeof(label) - 1] = '\0';
	check(udedup_join(path, NULL) == -ENAMETOOLONG);
	// A mistake is no reason never to try again.
	check(udedup_join(engine, label) == -ENAMETOOLONG);
	check(udedup_join(engine, NULL) == 0);
}

static const struct test_case cases[] = {
	{"joins", joins},         {"joins-among-threads", joins_among_threads}, {"no-engine", no_engine},
	{"pauses", pauses},       {"pauses-among-threads", pauses_among_threads},
	{"refused", refused},     {"forbidden", forbidden},                     {"bad-arguments", bad_arguments},
};

int main(int argc, char **argv)
{
	check(argc == 3);
	engine = argv[2];
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
