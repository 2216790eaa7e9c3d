// SPDX-License-Identifier: MIT
// Many writes to merged memory: storms of lone ones, for which the agent leaves merged pages to the kernel's own
// copy-on-write for a while, and overwriting in order, for which it takes many pages at a time.
#include "merged.h"

#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/uio.h>

enum { PAGES = 1024, SKIPPED = 77, STRIDE = 74, THREADS = 4 };

static const uint64_t MARK = 0x5bd1e995ba5eba11;

static enum layout layout; // argv[2]

// ---- storms ----

static size_t marked_word(size_t page)
{
	return page * 7 % WORDS;
}

// Pages [from, to) of the storm's order: even ones, that merge in either layout, and no two that follow each other.
static size_t storm_page(size_t turn)
{
	return turn * STRIDE % PAGES;
}

static void storm(char *at, size_t from, size_t to)
{
	for (size_t turn = from; turn < to; turn++) {
		size_t page = storm_page(turn);

		((uint64_t *)(at + page * PAGE))[marked_word(page)] ^= MARK;
	}
}

// Is page `page` what fill() wrote, with the mark if it was hit?
static bool page_after(const char *at, size_t page, bool hit)
{
	for (size_t word = 0; word < WORDS; word++) {
		uint64_t wanted = word_of(tag_of(layout, 1, page, 0), page, word) ^ (hit && word == marked_word(page) ? MARK : 0);

		if (((const volatile uint64_t *)(at + page * PAGE))[word] != wanted)
			return false;
	}
	return true;
}

// Pages [first, last) after the first `turns` turns of a storm.
static bool after_storm(const char *at, size_t first, size_t last, size_t turns)
{
	bool hit[PAGES] = {false};

	for (size_t turn = 0; turn < turns; turn++)
		hit[storm_page(turn)] = true;
	for (size_t page = first; page < last; page++) {
		if (!page_after(at, page, hit[page]))
			return false;
	}
	return true;
}

// Write-protected by userfaultfd, hence served by the agent when it breaks.
static bool all_protected(const char *at)
{
	for (size_t page = 0; page < PAGES; page++) {
		if (is_merged(at + page * PAGE) && !(pagemap(at + page * PAGE) >> 57 & 1))
			return false;
	}
	return true;
}

enum { TURNS = PAGES / 4 }; // half of the even pages

static void counted(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	size_t mergeable = count_merged(at, PAGES);
	struct udedup_stats before = stats();

	storm(at, 0, TURNS);
	check(count_merged(at, PAGES) == mergeable - TURNS);
	check(stats().break_events - before.break_events < TURNS * 9 / 10);
	check(after_storm(at, 0, PAGES, TURNS));
	// The agent comes to know of every one, and serves again what is left.
	await(stats().break_pages - before.break_pages == TURNS);
	await(all_protected(at));
	check(before.pages_merged - stats().pages_merged == TURNS);
	check(count_merged(at, PAGES) == mergeable - TURNS);
	storm(at, TURNS, 2 * TURNS);
	await(stats().break_pages - before.break_pages == 2 * TURNS);
	await(all_protected(at));
	check(after_storm(at, 0, PAGES, 2 * TURNS));
	check(intact(twin, PAGES, 1, layout, 1));
	check(count_merged(twin, PAGES) == mergeable);
}

static void discarded(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	long ret;

	storm(at, 0, TURNS);
	check(madvise(at + 256 * PAGE, 300 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at + 256 * PAGE, 300));
	check(after_storm(at, 0, 256, TURNS) && after_storm(at, 556, PAGES, TURNS));
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(SYS_madvise), "D"(at + 600 * PAGE), "S"(100 * PAGE), "d"(MADV_DONTNEED)
			 : "rcx", "r11", "memory");
	check(ret == 0);
	check(is_zero(at + 600 * PAGE, 100));
	check(after_storm(at, 556, 600, TURNS) && after_storm(at, 700, PAGES, TURNS));
	await(all_protected(at));
	check(is_zero(at + 256 * PAGE, 300) && is_zero(at + 600 * PAGE, 100));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
}

static void forked(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	int ends[2];
	char byte;
	pid_t pid;

	storm(at, 0, TURNS);
	check(pipe(ends) == 0);
	pid = fork();
	if (!pid) {
		close(ends[1]);
		check(read(ends[0], &byte, 1) == 0);
		check(after_storm(at, 0, PAGES, TURNS));
		storm(at, TURNS, 2 * TURNS);
		check(after_storm(at, 0, PAGES, 2 * TURNS));
		check(madvise(at, PAGES * PAGE, MADV_DONTNEED) == 0);
		check(is_zero(at, PAGES));
		_exit(0);
	}
	close(ends[0]);
	fill(at, PAGES / 2, 2, layout, 0);
	close(ends[1]);
	check(wait_child(pid) == 0);
	check(intact(at, PAGES / 2, 2, layout, 0));
	check(after_storm(at, PAGES / 2, PAGES, TURNS));
}

static void moved(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	char *now;

	storm(at, 0, TURNS);
	now = mremap(at, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE);
	check(now != MAP_FAILED && now != at);
	check(after_storm(now, 0, PAGES, TURNS));
	check(is_zero(now + PAGES * PAGE, PAGES));
	storm(now, TURNS, 2 * TURNS);
	check(after_storm(now, 0, PAGES, 2 * TURNS));
	check(madvise(now, PAGES * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(now, PAGES));
}

// What would lose something as a mapping of the store becomes private, also where nobody knows what is by now.
static void executable(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	storm(at, 0, TURNS);
	check(mprotect(at, PAGES * PAGE, PROT_READ | PROT_EXEC) == 0);
	check(count_merged(at, PAGES) == 0);
	check(after_storm(at, 0, PAGES, TURNS));
	check(mprotect(at, PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
	storm(at, TURNS, 2 * TURNS);
	check(after_storm(at, 0, PAGES, 2 * TURNS));
	await(all_protected(at));
	check(after_storm(at, 0, PAGES, 2 * TURNS));
}

static uint64_t frame(const char *at)
{
	return pagemap(at) & ((1UL << 55) - 1);
}

// Pages that a device got hold of in such a storm stay the pages that the device has.
static void pinned(void)
{
	enum { FIRST = 130, COUNT = 40 };
	struct io_uring_params parameters = {0};
	long ring = syscall(SYS_io_uring_setup, 4, &parameters);
	char *at = merged(PAGES, 1, layout, NULL);
	struct iovec vector = {at + FIRST * PAGE, COUNT * PAGE};
	uint64_t frames[COUNT];

	if (ring < 0)
		_exit(SKIPPED);
	storm(at, 0, TURNS);
	check(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) == 0);
	for (size_t i = 0; i < COUNT; i++)
		frames[i] = frame(at + (FIRST + i) * PAGE);
	check(frames[0]);
	check(after_storm(at, 0, PAGES, TURNS));
	await(all_protected(at));
	// In order, so that many pages are replaced at a time.
	fill(at, PAGES, 2, layout, 0);
	advise(at, PAGES * PAGE);
	merged(1, 100, WHOLE, NULL);
	for (size_t i = 0; i < COUNT; i++)
		check(frame(at + (FIRST + i) * PAGE) == frames[i]);
	check(intact(at, PAGES, 2, layout, 0));
}

struct lane {
	pthread_t thread;
	char *at;
	size_t number;
	uint64_t values[PAGES];
};

// Each thread has a word of every page to itself, and finds in it what it wrote last.
static void *write_lane(void *argument)
{
	struct lane *lane = argument;
	uint64_t state = lane->number * 2 + 1;
	double end = seconds() + 3;

	while (seconds() < end) {
		for (unsigned i = 0; i < 64; i++) {
			size_t page = (state = state * 6364136223846793005 + 1442695040888963407) >> 33 & (PAGES - 1);
			volatile uint64_t *word = (uint64_t *)(lane->at + page * PAGE) + lane->number;

			if (*word != lane->values[page])
				return "a write was lost";
			*word = lane->values[page] = state;
		}
		breathe();
	}
	return NULL;
}

static void written_by_threads(void)
{
	static struct lane lanes[THREADS];
	char *at = merged(PAGES, 1, layout, NULL);

	for (size_t i = 0; i < THREADS; i++) {
		lanes[i].at = at;
		lanes[i].number = i;
		for (size_t page = 0; page < PAGES; page++)
			lanes[i].values[page] = word_of(tag_of(layout, 1, page, 0), page, i);
		check(pthread_create(&lanes[i].thread, NULL, write_lane, &lanes[i]) == 0);
	}
	for (size_t i = 0; i < THREADS; i++) {
		void *complaint;

		check(pthread_join(lanes[i].thread, &complaint) == 0);
		check(!complaint);
	}
	for (size_t page = 0; page < PAGES; page++) {
		const uint64_t *words = (const uint64_t *)(at + page * PAGE);

		for (size_t word = 0; word < WORDS; word++)
			check(words[word] == (word < THREADS ? lanes[word].values[page] : word_of(tag_of(layout, 1, page, 0), page, word)));
	}
}

// ---- in order ----

static void overwrite(char *at, size_t first, size_t last, const size_t *numbers)
{
	for (size_t page = first; page < last; page++) {
		check(page_is(at + page * PAGE, 1, numbers[page])); // not touched by what was done before it
		fill_page(at + page * PAGE, 2, page);
	}
	for (size_t page = first; page < last; page++)
		check(page_is(at + page * PAGE, 2, page));
}

// The order of pages in the store can be that of one of these areas at most; in the other, no two neighbours are
// neighbours there.
static void scattered_in_the_store(void)
{
	size_t numbers[2][PAGES];
	char *areas[2];
	uint64_t before;

	for (int i = 0; i < 2; i++) {
		areas[i] = plain(PAGES);
		for (size_t page = 0; page < PAGES; page++) {
			numbers[i][page] = i ? page * 37 % PAGES : page;
			fill_page(areas[i] + page * PAGE, 1, numbers[i][page]);
		}
	}
	for (int i = 0; i < 2; i++)
		await_merged(areas[i], PAGES, WHOLE);
	before = stats().break_events;
	for (int i = 0; i < 2; i++)
		overwrite(areas[i], 0, PAGES, numbers[i]);
	check(stats().break_events - before < PAGES / 16);
}

// Merged pages that must not become one mapping with their neighbours, or are not there, lie in the writer's way.
static void unlike_neighbours(void)
{
	char *at = merged(PAGES, 1, WHOLE, NULL);
	size_t numbers[PAGES];

	for (size_t page = 0; page < PAGES; page++)
		numbers[page] = page;
	check(madvise(at + 100 * PAGE, 10 * PAGE, MADV_DONTDUMP) == 0);
	check(munmap(at + 200 * PAGE, PAGE) == 0);
	check(mprotect(at + 300 * PAGE, 10 * PAGE, PROT_READ) == 0);
	check(madvise(at + 400 * PAGE, PAGE, MADV_DONTNEED) == 0);
	overwrite(at, 0, 200, numbers);
	overwrite(at, 201, 300, numbers);
	overwrite(at, 310, 400, numbers);
	check(is_zero(at + 400 * PAGE, 1));
	overwrite(at, 401, PAGES, numbers);
	check(touch(at + 200 * PAGE, false) == SIGSEGV);
	for (size_t page = 300; page < 310; page++)
		check(touch(at + page * PAGE, true) == SIGSEGV && page_is(at + page * PAGE, 1, page));
	for (size_t page = 95; page < 115; page++)
		check(has_flag(at + page * PAGE, "dd") == (page >= 100 && page < 110));
	check(is_zero(at + 400 * PAGE, 1));
}

// The agent does not learn of what is mapped by a raw system call where merged pages were.
static void replaced_past_the_hooks(void)
{
	enum { FIRST = 20, COUNT = 300 };
	char *at = merged(PAGES, 1, WHOLE, NULL);
	register long flags __asm__("r10") = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	register long fd __asm__("r8") = -1;
	register long offset __asm__("r9") = 0;
	size_t numbers[PAGES];
	long ret;

	for (size_t page = 0; page < PAGES; page++)
		numbers[page] = page;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(SYS_mmap), "D"(at + FIRST * PAGE), "S"(COUNT * PAGE), "d"(PROT_READ | PROT_WRITE), "r"(flags), "r"(fd),
			   "r"(offset)
			 : "rcx", "r11", "memory");
	check(ret == (long)(at + FIRST * PAGE));
	fill(at + FIRST * PAGE, COUNT, 3, WHOLE, 0);
	overwrite(at, 0, FIRST, numbers);
	check(intact(at + FIRST * PAGE, COUNT, 3, WHOLE, 0));
	overwrite(at, FIRST + COUNT, PAGES, numbers);
	check(intact(at + FIRST * PAGE, COUNT, 3, WHOLE, 0));
}

static const struct test_case cases[] = {
	{"counted", counted},
	{"discarded", discarded},
	{"forked", forked},
	{"moved", moved},
	{"executable", executable},
	{"pinned", pinned},
	{"written-by-threads", written_by_threads},
	{"scattered-in-the-store", scattered_in_the_store},
	{"unlike-neighbours", unlike_neighbours},
	{"replaced-past-the-hooks", replaced_past_the_hooks},
};

int main(int argc, char **argv)
{
	layout = argc > 2 && strcmp(argv[2], "cut") == 0 ? CUT : WHOLE;
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argc > 1 ? argv[1] : NULL);
}
