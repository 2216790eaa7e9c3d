// SPDX-License-Identifier: MIT
// What the test programs share: memory with known contents, and waiting until it is merged. Whether a page is merged is read
// from the kernel's page table, not asked of the agent. The programs run wrapped or bare; bare, nothing is waited for.
#ifndef UDD_TEST_MERGED_H
#define UDD_TEST_MERGED_H

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent/udedup.h"

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), PATIENCE_SECONDS = 15 };

#define check(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);      \
			fflush(NULL);                                                                                  \
			_exit(1);                                                                                      \
		}                                                                                                      \
	} while (0)

static inline bool wrapped(void)
{
	return dlsym(RTLD_DEFAULT, "udedup_stats") != NULL;
}

static inline struct udedup_stats stats(void)
{
	int (*get)(struct udedup_stats *) = (int (*)(struct udedup_stats *))dlsym(RTLD_DEFAULT, "udedup_stats");
	struct udedup_stats ret;

	check(get && get(&ret) == 0);
	return ret;
}

static inline void advise(const void *at, size_t bytes)
{
	int (*give)(const void *, size_t) = (int (*)(const void *, size_t))dlsym(RTLD_DEFAULT, "udedup_advise");

	check(give && give(at, bytes) == 0);
}

static inline double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static inline void breathe(void)
{
	struct timespec moment = {.tv_nsec = 2000000};

	syscall(SYS_nanosleep, &moment, NULL);
}

// Waits for a condition; to be used where it must come about.
#define await(condition)                                                                                               \
	do {                                                                                                           \
		double deadline_ = seconds() + PATIENCE_SECONDS;                                                       \
		while (!(condition)) {                                                                                 \
			check(seconds() < deadline_ && #condition);                                                    \
			breathe();                                                                                     \
		}                                                                                                      \
	} while (0)

// Until the agent has joined, if there is one.
static inline void await_agent(void)
{
	if (wrapped())
		await(stats().merging);
}

// The kernel's pagemap entry of a page (Documentation/admin-guide/mm/pagemap.rst).
static inline uint64_t pagemap(const void *at)
{
	uint64_t entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	check(fd >= 0);
	check(syscall(SYS_pread64, fd, &entry, sizeof(entry), (long)((uintptr_t)at / PAGE * sizeof(entry))) == sizeof(entry));
	close(fd);
	return entry;
}

// In memory that was anonymous once, a present page of a file can only be the store's.
static inline bool is_merged(const void *page)
{
	uint64_t entry = pagemap(page);

	return entry >> 63 && entry >> 61 & 1;
}

static inline size_t count_merged(const char *at, size_t pages)
{
	size_t count = 0;

	for (size_t i = 0; i < pages; i++)
		count += is_merged(at + i * PAGE);
	return count;
}

// Contents differ between pages, tags, and programs, unless they are given the same SALT.
static inline uint64_t salt(void)
{
	const char *given = getenv("SALT");
	static uint64_t own;

	if (!own)
		own = given ? strtoull(given, NULL, 0) : (uint64_t)getpid() << 32 ^ (uint64_t)time(NULL);
	return own;
}

static inline uint64_t word_of(uint64_t tag, size_t page, size_t word)
{
	uint64_t z = (salt() * 31 + tag) * 0x9e3779b97f4a7c15 + page * 512 + word;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	return z ^ z >> 31;
}

static inline void fill_page(char *at, uint64_t tag, size_t page)
{
	for (size_t word = 0; word < WORDS; word++)
		((uint64_t *)at)[word] = word_of(tag, page, word);
}

static inline bool page_is(const char *at, uint64_t tag, size_t page)
{
	for (size_t word = 0; word < WORDS; word++) {
		if (((const volatile uint64_t *)at)[word] != word_of(tag, page, word))
			return false;
	}
	return true;
}

static inline bool is_zero(const char *at, size_t pages)
{
	for (size_t word = 0; word < pages * WORDS; word++) {
		if (((const volatile uint64_t *)at)[word])
			return false;
	}
	return true;
}

// Private anonymous memory with a page on either side that nobody may touch. Filling is left to the caller.
static inline char *plain(size_t pages)
{
	char *at = mmap(NULL, (pages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(at != MAP_FAILED);
	check(mprotect(at + PAGE, pages * PAGE, PROT_READ | PROT_WRITE) == 0);
	return at + PAGE;
}

// How memory of `tag` is laid out: whole, or with every other page unlike all others, so that merging cuts it in pieces.
enum layout { WHOLE, CUT };

static inline uint64_t tag_of(enum layout layout, uint64_t tag, size_t page, unsigned copy)
{
	return layout == CUT && page % 2 ? tag + 1000 * (copy + 1) : tag;
}

static inline void fill(char *at, size_t pages, uint64_t tag, enum layout layout, unsigned copy)
{
	for (size_t i = 0; i < pages; i++)
		fill_page(at + i * PAGE, tag_of(layout, tag, i, copy), i);
}

// Are these pages what fill() wrote, `first` being the number that the first one had?
static inline bool intact_from(const char *at, size_t first, size_t pages, uint64_t tag, enum layout layout, unsigned copy)
{
	for (size_t i = 0; i < pages; i++) {
		if (!page_is(at + i * PAGE, tag_of(layout, tag, first + i, copy), first + i))
			return false;
	}
	return true;
}

static inline bool intact(const char *at, size_t pages, uint64_t tag, enum layout layout, unsigned copy)
{
	return intact_from(at, 0, pages, tag, layout, copy);
}

// Until all pages that can be merged are.
static inline void await_merged(const char *at, size_t pages, enum layout layout)
{
	double deadline = seconds() + PATIENCE_SECONDS;
	size_t wanted = layout == CUT ? (pages + 1) / 2 : pages;

	if (!wrapped())
		return;
	await_agent();
	advise(at, pages * PAGE);
	for (unsigned turn = 1; count_merged(at, pages) < wanted; turn++) {
		check(seconds() < deadline && "merged in time");
		breathe();
		if (turn % 50 == 0)
			advise(at, pages * PAGE);
	}
}

// Memory that is merged with `*twin`, which has the same contents (copy 1).
static inline char *merged(size_t pages, uint64_t tag, enum layout layout, char **twin)
{
	char *at = plain(pages);
	char *other = plain(pages);

	fill(at, pages, tag, layout, 0);
	fill(other, pages, tag, layout, 1);
	await_merged(at, pages, layout);
	await_merged(other, pages, layout);
	if (twin)
		*twin = other;
	return at;
}

// ---- faults ----

static sigjmp_buf fault_jump;

static inline void on_fault(int number)
{
	siglongjmp(fault_jump, number);
}

// The signal that a read, or a write of the byte that is there, raises; 0 if none.
static inline int touch(volatile char *at, bool write)
{
	struct sigaction action = {.sa_handler = on_fault}, segv, bus;
	int number;

	sigaction(SIGSEGV, &action, &segv);
	sigaction(SIGBUS, &action, &bus);
	number = sigsetjmp(fault_jump, 1);
	if (!number) {
		char value = *at;

		if (write)
			*at = value;
	}
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return number;
}

// ---- smaps, of the mapping that holds an address ----

static inline bool smaps_line(const void *at, const char *name, char *ret, size_t room)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char line[8192];
	bool inside = false;
	bool found = false;

	check(smaps);
	while (!found && fgets(line, sizeof(line), smaps)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (unsigned long)at && (unsigned long)at < end;
		else if (inside && strncmp(line, name, strlen(name)) == 0)
			found = snprintf(ret, room, "%s", line + strlen(name)) >= 0;
	}
	fclose(smaps);
	return found;
}

static inline bool has_flag(const void *at, const char *flag)
{
	char flags[256] = " ";
	char wanted[8];

	snprintf(wanted, sizeof(wanted), " %s ", flag);
	return smaps_line(at, "VmFlags:", flags, sizeof(flags)) && strstr(flags, wanted);
}

// kB of a line of /proc/self/status.
static inline long status_value(const char *name)
{
	FILE *status = fopen("/proc/self/status", "re");
	char line[256];
	long value = -1;

	check(status);
	while (fgets(line, sizeof(line), status)) {
		if (strncmp(line, name, strlen(name)) == 0)
			value = atol(line + strlen(name));
	}
	fclose(status);
	return value;
}

// ---- cases ----

struct test_case {
	const char *name;
	void (*body)(void);
};

// main() of a program: argv[1] names the case.
static inline int run_case(const struct test_case *cases, size_t count, const char *name)
{
	for (size_t i = 0; i < count; i++) {
		if (name && strcmp(cases[i].name, name) == 0) {
			cases[i].body();
			return 0;
		}
	}
	fprintf(stderr, "no such case: %s\n", name ? name : "");
	return 2;
}

static inline int wait_child(pid_t pid)
{
	int status;

	check(pid > 0);
	while (waitpid(pid, &status, 0) != pid)
		check(errno == EINTR);
	return status;
}

#endif
