// SPDX-License-Identifier: MIT
// What the programs of the benchmarks share: clocks, content, and what the agent counts if the process is wrapped.
//
// Protocol: a command per line on standard input, an answer per line on standard output; "error …" and the end for
// whatever goes wrong. The end of input is the end.
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../../../native/agent/udedup.h"

enum { PAGE = 4096 };

__attribute__((format(printf, 1, 2))) static inline void answer(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	putchar('\n');
	fflush(stdout);
}

__attribute__((noreturn)) static inline void fail(const char *what)
{
	answer("error %s: %s", what, strerror(errno));
	exit(1);
}

static inline uint64_t nanoseconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline char *map_pages(size_t pages)
{
	char *ret = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (ret == MAP_FAILED)
		fail("mmap");
	return ret;
}

static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

// Content that no other (seed, number) has.
static inline void fill_page(char *page, uint64_t seed, uint64_t number)
{
	uint64_t state = (seed + 1) * 0x9E3779B97F4A7C15 ^ (number + 1) * 0xD1B54A32D192ED03;
	uint64_t *words = (uint64_t *)page;

	for (size_t i = 0; i < PAGE / sizeof(*words); i++)
		words[i] = next_random(&state);
}

// What the agent of this process counts. All zero if there is none.
static inline struct udedup_stats agent_stats(void)
{
	static int (*get)(struct udedup_stats *);
	struct udedup_stats ret = {0};

	if (!get)
		*(void **)&get = dlsym(RTLD_DEFAULT, "udedup_stats");
	if (get)
		get(&ret);
	return ret;
}

static inline void nap(long microseconds)
{
	struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};

	nanosleep(&time, NULL);
}

// Waits until at least so many pages of the process are merged. False if that takes longer than `seconds`.
static inline bool wait_merged(uint64_t pages, unsigned seconds)
{
	uint64_t end = nanoseconds(CLOCK_MONOTONIC) + seconds * 1000000000UL;

	while (agent_stats().pages_merged < pages) {
		if (nanoseconds(CLOCK_MONOTONIC) > end)
			return false;
		nap(1000);
	}
	return true;
}

#endif
