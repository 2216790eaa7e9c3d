// SPDX-License-Identifier: MIT
// With vm.overcommit_memory=2, a process for which all memory is promised already: the kernel refuses it every further page, even
// in place of one that it has just given up. What it has merged must be there all the same.
//
// The limit is far above what the machine's processes have together; only to this one, which has reserved more addresses than
// that, nothing is left below it (vm.user_reserve_kbytes; the test sets both).
#include "merged.h"

#include <sys/resource.h>

enum { PAGES = 512 };

static void set_mode(char mode)
{
	int fd = open("/proc/sys/vm/overcommit_memory", O_WRONLY | O_CLOEXEC);

	check(fd >= 0 && write(fd, &mode, 1) == 1);
	close(fd);
	// The agent looks now and then.
	for (int i = 0; i < 25; i++)
		breathe();
}

static void reserve_addresses(void)
{
	const size_t bytes = 64UL << 40;

	check(mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED);
}

static bool nothing_left(void)
{
	return mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == ENOMEM;
}

static void write_to(char *at, size_t page, uint64_t tag)
{
	fill_page(at + page * PAGE, tag, page);
}

// Moves memory that merging has cut in pieces. Refused or not, every page is where it belongs.
static void move_pieces(char *at, char *place, uint64_t tag)
{
	char *moved = mremap(at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);

	check(moved != MAP_FAILED || errno == ENOMEM);
	check(intact(moved == MAP_FAILED ? at : moved, PAGES, tag, CUT, 0));
}

// Merged pages of tag 1: lone ones get tag 2, then all in order 3.
static void write_lone_then_all(char *at)
{
	for (size_t page = 0; page < PAGES; page += 8)
		write_to(at, page, 2);
	for (size_t page = 0; page < PAGES; page++)
		check(page_is(at + page * PAGE, page % 8 ? 1 : 2, page));
	for (size_t page = 0; page < PAGES; page++)
		write_to(at, page, 3);
	check(intact(at, PAGES, 3, WHOLE, 0));
}

static void writes(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	reserve_addresses();
	set_mode('2');
	check(nothing_left());
	write_lone_then_all(at);
	check(intact(twin, PAGES, 1, WHOLE, 1));
	set_mode('0');
	for (size_t page = 0; page < PAGES; page += 2)
		write_to(twin, page, 4);
	check(intact(at, PAGES, 3, WHOLE, 0));
	for (size_t page = 0; page < PAGES; page++)
		check(page_is(twin + page * PAGE, page % 2 ? 1 : 4, page));
}

// Calls whose hooks make merged memory private, or put other memory in its place.
static void calls(void)
{
	const size_t part = PAGES / 4 * PAGE;
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	char *pieces = merged(PAGES, 7, CUT, NULL);
	char *place = plain(PAGES);

	reserve_addresses();
	set_mode('2');
	check(nothing_left());
	move_pieces(pieces, place, 7);
	check(mprotect(at, part, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
	check(madvise(at + part, part, MADV_DONTNEED) == 0);
	check(mprotect(at + 2 * part, part, PROT_READ) == 0);
	check(mprotect(at + 2 * part, part, PROT_READ | PROT_WRITE) == 0 || errno == ENOMEM);
	check(intact(at, PAGES / 4, 1, WHOLE, 0));
	check(is_zero(at + part, PAGES / 4));
	check(intact_from(at + 2 * part, PAGES / 2, PAGES / 2, 1, WHOLE, 0));
	write_to(at, 0, 2);
	write_to(at, PAGES / 4, 2);
	write_to(at, PAGES - 1, 2);
	set_mode('0');
	check(page_is(at, 2, 0));
	check(page_is(at + part, 2, PAGES / 4));
	check(page_is(at + (PAGES - 1) * PAGE, 2, PAGES - 1));
	check(intact_from(at + PAGE, 1, PAGES / 4 - 1, 1, WHOLE, 0));
	check(intact(twin, PAGES, 1, WHOLE, 1));
}

// The process limits itself to less than it has already (RLIMIT_AS, RLIMIT_DATA): nothing more is to be had from then on.
static void limited(int resource)
{
	struct rlimit limit = {.rlim_cur = 1 << 20, .rlim_max = RLIM_INFINITY};
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	char *pieces = merged(PAGES, 7, CUT, NULL);
	char *place = plain(PAGES);

	check(setrlimit(resource, &limit) == 0);
	move_pieces(pieces, place, 7);
	write_lone_then_all(at);
	check(mprotect(twin, PAGES / 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
	for (int turn = 0; turn < 2; turn++) {
		check(madvise(twin, PAGE, MADV_DONTNEED) == 0);
		check(madvise(twin + (PAGES - 3) * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
		check(is_zero(twin, 1) && is_zero(twin + (PAGES - 3) * PAGE, 2));
		check(intact_from(twin + PAGE, 1, PAGES - 4, 1, WHOLE, 1));
		check(page_is(twin + (PAGES - 1) * PAGE, 1, PAGES - 1));
		// What is private by now is dropped as well.
		write_to(twin, 0, 5);
		write_to(twin, PAGES - 2, 5);
	}
	check(madvise(twin, PAGES * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(twin, PAGES));
}

static void limited_addresses(void)
{
	limited(RLIMIT_AS);
}

static void limited_data(void)
{
	limited(RLIMIT_DATA);
}

// To addresses that are free, where the kernel would put whatever is mapped next.
static void moves_to_free_addresses(void)
{
	for (uint64_t turn = 0; turn < 4; turn++) {
		char *pieces = merged(PAGES, 7 + turn, CUT, NULL);
		char *place = plain(PAGES);

		check(munmap(place - PAGE, (PAGES + 2) * PAGE) == 0);
		check(mremap(pieces, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
		check(intact(place, PAGES, 7 + turn, CUT, 0));
	}
}

static const struct test_case cases[] = {
	{"moves-to-free-addresses", moves_to_free_addresses},
	{"limited-addresses", limited_addresses},
	{"limited-data", limited_data},
	{"writes", writes},
	{"calls", calls},
};

int main(int argc, char **argv)
{
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argc > 1 ? argv[1] : NULL);
}
