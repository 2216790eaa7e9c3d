// SPDX-License-Identifier: MIT
// Torture for mappings of images. Some threads map, unmap, protect, write, move, drop and fork windows of their own; each
// knows from a copy of its own (made by read(), kept up by hand) what every byte must be. One more window belongs to all: some
// threads do it no lasting harm, others read it all the while and must never see anything but the image.
// argv: seed, seconds, the images. Prints how often it did what, as JSON. It shares nothing with native/.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	IMAGES = 2,
	OWNERS = 3,      // threads with windows of their own
	WINDOWS = 3,     // of each
	WINDOW_PAGES = 48,
	READERS = 2,
	CHILD_STEPS = 6, // what a fork child does
};

enum base { NOTHING, FILE_PAGE, ANONYMOUS };

// What a page of a window must be.
struct page {
	enum base base;
	int protection;
	int type;
	unsigned image;
	size_t number; // in the image
};

struct window {
	char *at; // NULL: not mapped
	struct page pages[WINDOW_PAGES];
	char expected[WINDOW_PAGES][PAGE];
};

struct owner {
	pthread_t thread;
	uint64_t random;
	struct window windows[WINDOWS];
};

static const char *const operations[] = {"map",  "unmap", "map over", "anonymous", "protect", "write",
					 "drop", "move",  "advise",   "fork",      "copy out"};

enum { MAP, UNMAP, MAP_OVER, COVER, PROTECT, WRITE, DROP, MOVE, ADVISE, FORK, COPY_OUT, OPERATIONS };

static struct owner owners[OWNERS];
static uint64_t counts[OPERATIONS], read_pages;
static int images[IMAGES];
static size_t image_pages;
static char *contents[IMAGES]; // read()
static bool stop;
static const char *steady;

#define check(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: not so: %s (errno %d, process %d)\n", __FILE__, __LINE__, #condition,  \
				errno, getpid());                                                                      \
			fflush(NULL);                                                                                  \
			_exit(1);                                                                                      \
		}                                                                                                      \
	} while (0)

static uint64_t draw(struct owner *owner, uint64_t below)
{
	owner->random ^= owner->random << 13;
	owner->random ^= owner->random >> 7;
	owner->random ^= owner->random << 17;
	return owner->random % below;
}

static const char *original(const struct page *page)
{
	static const char zeros[PAGE];

	return page->base == FILE_PAGE ? contents[page->image] + page->number * PAGE : zeros;
}

static void complain(const struct window *window, size_t i)
{
	const struct page *page = &window->pages[i];
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "re");

	fprintf(stderr, "wrong byte: process %d, address %p, base %d, image %u, page %zu, protection %d, type %d\n", getpid(),
		(void *)(window->at + i * PAGE), page->base, page->image, page->number, page->protection, page->type);
	for (size_t at = 0; at < PAGE; at++) {
		if (window->at[i * PAGE + at] != window->expected[i][at]) {
			fprintf(stderr, "byte %zu is %02x, not %02x\n", at, window->at[i * PAGE + at] & 255, window->expected[i][at] & 255);
			break;
		}
	}
	while (maps && fgets(line, sizeof(line), maps))
		fputs(line, stderr);
	fflush(NULL);
	_exit(1);
}

static void verify(const struct window *window, size_t from, size_t to)
{
	for (size_t i = from; i < to; i++) {
		if (window->pages[i].base == NOTHING || !(window->pages[i].protection & PROT_READ))
			continue;
		if (memcmp(window->at + i * PAGE, window->expected[i], PAGE) != 0)
			complain(window, i);
	}
}

// A stretch of pages that are there; false if none was drawn.
static bool stretch(struct owner *owner, const struct window *window, size_t *from, size_t *to)
{
	*from = draw(owner, WINDOW_PAGES);
	*to = *from;
	if (!window->at)
		return false;
	for (size_t most = *from + 1 + draw(owner, WINDOW_PAGES); *to < WINDOW_PAGES && *to < most && window->pages[*to].base != NOTHING;)
		++*to;
	return *to > *from;
}

static void enter_file(struct window *window, size_t from, size_t to, unsigned image, size_t number, int type)
{
	for (size_t i = from; i < to; i++) {
		window->pages[i] = (struct page){FILE_PAGE, PROT_READ, type, image, number + i - from};
		memcpy(window->expected[i], original(&window->pages[i]), PAGE);
	}
}

static void do_unmap(struct window *window, size_t from, size_t to)
{
	bool left = false;

	check(munmap(window->at + from * PAGE, (to - from) * PAGE) == 0);
	for (size_t i = from; i < to; i++)
		window->pages[i].base = NOTHING;
	for (size_t i = 0; i < WINDOW_PAGES; i++)
		left |= window->pages[i].base != NOTHING;
	if (!left)
		window->at = NULL;
}

static void do_map(struct owner *owner, struct window *window)
{
	unsigned image = draw(owner, IMAGES);
	size_t number = draw(owner, image_pages - WINDOW_PAGES);
	int type = draw(owner, 2) ? MAP_SHARED : MAP_PRIVATE;

	for (size_t i = 0; i < WINDOW_PAGES && window->at; i++) {
		if (window->pages[i].base != NOTHING)
			do_unmap(window, i, i + 1);
	}
	window->at = mmap(NULL, WINDOW_PAGES * PAGE, PROT_READ, type, images[image], (off_t)(number * PAGE));
	check(window->at != MAP_FAILED);
	enter_file(window, 0, WINDOW_PAGES, image, number, type);
}

static void do_map_over(struct owner *owner, struct window *window, size_t from, size_t to)
{
	unsigned image = draw(owner, IMAGES);
	size_t number = draw(owner, image_pages - WINDOW_PAGES);
	int type = draw(owner, 2) ? MAP_SHARED : MAP_PRIVATE;
	char *at = window->at + from * PAGE;

	check(mmap(at, (to - from) * PAGE, PROT_READ, type | MAP_FIXED, images[image], (off_t)(number * PAGE)) == at);
	enter_file(window, from, to, image, number, type);
}

static void do_cover(struct window *window, size_t from, size_t to)
{
	char *at = window->at + from * PAGE;

	check(mmap(at, (to - from) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
	for (size_t i = from; i < to; i++) {
		window->pages[i] = (struct page){.base = ANONYMOUS, .protection = PROT_READ | PROT_WRITE, .type = MAP_PRIVATE};
		memset(window->expected[i], 0, PAGE);
	}
}

static void do_protect(struct owner *owner, struct window *window, size_t from, size_t to)
{
	static const int protections[] = {PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_NONE, PROT_READ | PROT_EXEC};
	int protection = protections[draw(owner, 5)];
	bool may = true;

	for (size_t i = from; i < to; i++)
		may &= window->pages[i].type == MAP_PRIVATE || !(protection & PROT_WRITE);
	if (!may) {
		// In the order of addresses, up to the first that must not: one page tells.
		for (; window->pages[from].type == MAP_PRIVATE; from++)
			;
		check(mprotect(window->at + from * PAGE, PAGE, protection) == -1 && errno == EACCES);
		return;
	}
	check(mprotect(window->at + from * PAGE, (to - from) * PAGE, protection) == 0);
	for (size_t i = from; i < to; i++)
		window->pages[i].protection = protection;
}

static void do_write(struct owner *owner, struct window *window, size_t from, size_t to)
{
	for (size_t i = from; i < to; i++) {
		size_t at = draw(owner, PAGE - 64);
		int value = (int)draw(owner, 256);

		if (!(window->pages[i].protection & PROT_WRITE))
			continue;
		memset(window->at + i * PAGE + at, value, 64);
		memset(window->expected[i] + at, value, 64);
	}
}

// Anonymous memory also gets a file's content, which merges with the mappings.
static void do_copy_in(struct owner *owner, struct window *window, size_t from, size_t to)
{
	for (size_t i = from; i < to; i++) {
		size_t number = draw(owner, image_pages);

		if (window->pages[i].base != ANONYMOUS || !(window->pages[i].protection & PROT_WRITE))
			continue;
		memcpy(window->at + i * PAGE, contents[0] + number * PAGE, PAGE);
		memcpy(window->expected[i], contents[0] + number * PAGE, PAGE);
	}
}

static void do_drop(struct window *window, size_t from, size_t to)
{
	check(madvise(window->at + from * PAGE, (to - from) * PAGE, MADV_DONTNEED) == 0);
	for (size_t i = from; i < to; i++)
		memcpy(window->expected[i], original(&window->pages[i]), PAGE);
}

static bool follows(const struct page *a, const struct page *b)
{
	return a->base == b->base && a->base == FILE_PAGE && a->protection == b->protection && a->type == b->type &&
	       a->image == b->image && a->number + 1 == b->number;
}

// A stretch of one mapping goes to an address of its own, where it becomes all there is of the window.
static void do_move(struct window *window, size_t from, size_t to)
{
	struct window moved = {0};
	char *room;
	size_t end = from + 1;

	if (window->pages[from].base != FILE_PAGE)
		return;
	while (end < to && follows(&window->pages[end - 1], &window->pages[end]))
		end++;
	to = end;
	room = mmap(NULL, WINDOW_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	check(room != MAP_FAILED);
	if (mremap(window->at + from * PAGE, (to - from) * PAGE, (to - from) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room + from * PAGE) ==
	    MAP_FAILED) {
		// What was written to and what was not may be two mappings for ever.
		check(errno == EFAULT && !munmap(room, WINDOW_PAGES * PAGE));
		return;
	}
	for (size_t i = 0; i < WINDOW_PAGES; i++) {
		if (i >= from && i < to) {
			moved.pages[i] = window->pages[i];
			memcpy(moved.expected[i], window->expected[i], PAGE);
			window->pages[i].base = NOTHING;
		} else {
			check(munmap(room + i * PAGE, PAGE) == 0);
		}
	}
	for (size_t i = 0; i < WINDOW_PAGES; i++) {
		if (window->pages[i].base != NOTHING)
			check(munmap(window->at + i * PAGE, PAGE) == 0);
	}
	moved.at = room;
	*window = moved;
}

static void do_advise(struct owner *owner, struct window *window, size_t from, size_t to)
{
	static const int advices[] = {MADV_DONTDUMP, MADV_DODUMP, MADV_RANDOM, MADV_NORMAL, MADV_WILLNEED, MADV_COLD};

	check(madvise(window->at + from * PAGE, (to - from) * PAGE, advices[draw(owner, 6)]) == 0);
}

static void do_copy_out(struct window *window, size_t from, size_t to)
{
	static __thread char copy[WINDOW_PAGES * PAGE];
	struct iovec local = {copy, (to - from) * PAGE};
	struct iovec remote = {window->at + from * PAGE, (to - from) * PAGE};
	long got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);

	for (size_t i = from; i < to && window->pages[i].protection & PROT_READ; i++) {
		check(got >= (long)((i + 1 - from) * PAGE));
		check(memcmp(copy + (i - from) * PAGE, window->expected[i], PAGE) == 0);
	}
}

static void step(struct owner *owner, bool may_fork);

static void do_fork(struct owner *owner)
{
	pid_t child = fork();
	int status;

	check(child >= 0);
	if (child == 0) {
		for (int i = 0; i < CHILD_STEPS; i++)
			step(owner, false);
		for (int i = 0; i < WINDOWS; i++) {
			if (owner->windows[i].at)
				verify(&owner->windows[i], 0, WINDOW_PAGES);
		}
		_exit(0);
	}
	check(waitpid(child, &status, 0) == child);
	check(status == 0);
}

static void step(struct owner *owner, bool may_fork)
{
	struct window *window = &owner->windows[draw(owner, WINDOWS)];
	unsigned operation = draw(owner, OPERATIONS);
	size_t from = 0, to = 0;

	if (operation == FORK && (!may_fork || draw(owner, 8)))
		return;
	if (operation == MAP && window->at && draw(owner, 4))
		return;
	if (operation != MAP && operation != FORK && !stretch(owner, window, &from, &to))
		return;
	if (operation == MAP)
		do_map(owner, window);
	else if (operation == UNMAP)
		do_unmap(window, from, from + 1 + (to - from) / 4);
	else if (operation == MAP_OVER)
		do_map_over(owner, window, from, to);
	else if (operation == COVER)
		do_cover(window, from, from + 1 + (to - from) / 4);
	else if (operation == PROTECT)
		do_protect(owner, window, from, to);
	else if (operation == WRITE)
		draw(owner, 2) ? do_write(owner, window, from, to) : do_copy_in(owner, window, from, to);
	else if (operation == DROP)
		do_drop(window, from, to);
	else if (operation == MOVE)
		do_move(window, from, to);
	else if (operation == ADVISE)
		do_advise(owner, window, from, to);
	else if (operation == COPY_OUT)
		do_copy_out(window, from, to);
	else
		do_fork(owner);
	__atomic_add_fetch(&counts[operation], 1, __ATOMIC_RELAXED);
	if (window->at)
		verify(window, 0, WINDOW_PAGES);
}

static void *own(void *argument)
{
	struct owner *owner = argument;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		struct timespec pause = {.tv_nsec = (long)draw(owner, 8000000)};

		step(owner, true);
		// To be merged takes a while.
		if (draw(owner, 4) == 0)
			nanosleep(&pause, NULL);
	}
	return NULL;
}

// The window of all: the whole first image, always readable, never written to.
static void *meddle(void *argument)
{
	struct owner *owner = argument;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		static const int protections[] = {PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC};
		struct timespec pause = {.tv_nsec = (long)draw(owner, 20000000)};
		size_t page = draw(owner, image_pages - 8);
		char *at = (char *)steady + page * PAGE;
		unsigned operation = draw(owner, 4);

		if (operation == 0) {
			check(madvise(at, 8 * PAGE, MADV_DONTNEED) == 0);
		} else if (operation == 1) {
			check(mprotect(at, 8 * PAGE, protections[draw(owner, 3)]) == 0);
			check(mprotect(at, 8 * PAGE, PROT_READ) == 0);
		} else if (operation == 2) {
			// All of it: what has been protected otherwise in the meantime is not merged again.
			check(mmap((char *)steady, image_pages * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, images[0], 0) == steady);
		} else {
			check(mmap(at, 8 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, images[0], (off_t)(page * PAGE)) == at);
		}
		nanosleep(&pause, NULL);
	}
	return NULL;
}

static void *read_on(void *argument)
{
	(void)argument;
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		check(memcmp(steady, contents[0], image_pages * PAGE) == 0);
		__atomic_add_fetch(&read_pages, image_pages, __ATOMIC_RELAXED);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t readers[READERS], meddler;
	struct owner meddling;

	check(argc == 3 + IMAGES);
	meddling.random = strtoull(argv[1], NULL, 0) * 2654435761 + 1;
	for (unsigned i = 0; i < IMAGES; i++) {
		images[i] = open(argv[3 + i], O_RDONLY | O_CLOEXEC);
		check(images[i] >= 0);
		image_pages = (size_t)lseek(images[i], 0, SEEK_END) / PAGE;
		// Shared memory is never merged: what is right must not depend on what is tested.
		contents[i] = mmap(NULL, image_pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		check(contents[i] != MAP_FAILED);
		check(pread(images[i], contents[i], image_pages * PAGE, 0) == (long)(image_pages * PAGE));
	}
	steady = mmap(NULL, image_pages * PAGE, PROT_READ, MAP_PRIVATE, images[0], 0);
	check(steady != MAP_FAILED);
	for (unsigned i = 0; i < OWNERS; i++) {
		owners[i].random = meddling.random + i + 1;
		check(pthread_create(&owners[i].thread, NULL, own, &owners[i]) == 0);
	}
	check(pthread_create(&meddler, NULL, meddle, &meddling) == 0);
	for (unsigned i = 0; i < READERS; i++)
		check(pthread_create(&readers[i], NULL, read_on, NULL) == 0);
	sleep((unsigned)atoi(argv[2]));
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < OWNERS; i++)
		check(pthread_join(owners[i].thread, NULL) == 0);
	check(pthread_join(meddler, NULL) == 0);
	for (unsigned i = 0; i < READERS; i++)
		check(pthread_join(readers[i], NULL) == 0);
	printf("{\"read pages\": %lu", read_pages);
	for (unsigned i = 0; i < OPERATIONS; i++)
		printf(", \"%s\": %lu", operations[i], counts[i]);
	puts("}");
	return 0;
}
