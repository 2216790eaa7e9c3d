// SPDX-License-Identifier: MIT
// A library, and the program that calls it all the while it is being merged. -DLIBRARY: a hundred pages of functions and as many
// of constants. The program finds two copies of it, with the names in argv, loaded when it was started.
#include <stdint.h>

#define TEN(macro, n) macro(n##0) macro(n##1) macro(n##2) macro(n##3) macro(n##4) macro(n##5) macro(n##6) macro(n##7) macro(n##8) macro(n##9)
#define HUNDRED(macro, n) TEN(macro, n##0) TEN(macro, n##1) TEN(macro, n##2) TEN(macro, n##3) TEN(macro, n##4) \
	TEN(macro, n##5) TEN(macro, n##6) TEN(macro, n##7) TEN(macro, n##8) TEN(macro, n##9)
enum { FUNCTIONS = 100 };

// What function number n makes of x.
static inline uint64_t expected(uint64_t n, uint64_t x)
{
	return (x ^ n * 0x9e3779b97f4a7c15) * (2 * n + 1);
}

#ifdef LIBRARY
// A page each, none like another.
#define FUNCTION(n)                                                                                                    \
	__attribute__((aligned(4096))) static uint64_t function##n(uint64_t x)                                         \
	{                                                                                                              \
		return expected(n - 1000, x);                                                                          \
	}
HUNDRED(FUNCTION, 10)
#define ADDRESS(n) function##n,
uint64_t (*const functions[FUNCTIONS])(uint64_t) = {HUNDRED(ADDRESS, 10)};
#define CONSTANTS(n) {n, [511] = n},
const uint64_t constants[FUNCTIONS][512] = {HUNDRED(CONSTANTS, 10)};
#else
#include <pthread.h>

#include "merged.h"

struct copy {
	uint64_t (*const *functions)(uint64_t);
	const uint64_t (*constants)[512];
	uint64_t calls;
};

static bool stop;

static void call_all(struct copy *copy)
{
	for (uint64_t n = 0; n < FUNCTIONS; n++, copy->calls++) {
		check(copy->functions[n](copy->calls) == expected(n, copy->calls));
		check(copy->constants[n][0] == 1000 + n && copy->constants[n][511] == 1000 + n && copy->constants[n][9] == 0);
	}
}

static void *keep_calling(void *argument)
{
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED))
		call_all(argument);
	return NULL;
}

// How many pages from `at` on are the store's, with these permissions.
static size_t merged_pages(const void *at, size_t pages, const char *permissions)
{
	uint64_t from = (uintptr_t)at & ~(uint64_t)(PAGE - 1);
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[8192];
	size_t found = 0;

	check(maps);
	while (fgets(line, sizeof(line), maps)) {
		unsigned long start, end;
		char given[5];

		check(sscanf(line, "%lx-%lx %4s", &start, &end, given) == 3);
		if (!strstr(line, "/memfd:udedup-store") || strcmp(given, permissions) != 0)
			continue;
		for (uint64_t page = from; page < from + pages * PAGE; page += PAGE)
			found += start <= page && page < end;
	}
	fclose(maps);
	return found;
}

int main(int argc, char **argv)
{
	struct copy copies[2] = {0};
	pthread_t threads[2];
	double deadline = seconds() + PATIENCE_SECONDS;

	check(argc == 3);
	await_agent();
	for (int i = 0; i < 2; i++) {
		void *library = dlopen(argv[1 + i], RTLD_NOW | RTLD_NOLOAD);

		check(library);
		copies[i].functions = dlsym(library, "functions");
		copies[i].constants = dlsym(library, "constants");
		check(copies[i].functions && copies[i].constants);
		check(pthread_create(&threads[i], NULL, keep_calling, &copies[i]) == 0);
	}
	for (int i = 0; i < 2 && wrapped(); i++) {
		while (merged_pages(copies[i].functions[0], FUNCTIONS, "r-xp") < FUNCTIONS ||
		       merged_pages(copies[i].constants, FUNCTIONS - 1, "r--p") < FUNCTIONS - 1) {
			check(seconds() < deadline && "merged in time");
			breathe();
		}
	}
	for (int i = 0; i < 50; i++)
		breathe();
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int i = 0; i < 2; i++)
		check(pthread_join(threads[i], NULL) == 0);
	call_all(&copies[0]);
	call_all(&copies[1]);
	return 0;
}
#endif
