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
	{"refused", refused},     {"forbidden", forbidden},                     {"bad-arguments", bad_arguments},
};

int main(int argc, char **argv)
{
	check(argc == 3);
	engine = argv[2];
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
