// SPDX-License-Identifier: MIT
// What the application does to merged memory has the effect it would have on its own.
#include <alloca.h>
#include <pthread.h>
#include <ucontext.h>

#include "merged.h"

enum { PAGES = 16 };

static enum layout layout; // argv[2]

static void write_keeps_the_rest(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);

	for (size_t i = 0; i < PAGES; i++) {
		char *page = at + i * PAGE;
		size_t offset = i * 251 % PAGE;
		char before = page[offset];

		page[offset] = (char)~before;
		check(!is_merged(page));
		check(page[offset] == (char)~before);
		page[offset] = before;
		check(intact(at, PAGES, 1, layout, 0));
	}
	check(intact(twin, PAGES, 1, layout, 1));
	check(count_merged(twin, PAGES) == (layout == CUT ? PAGES / 2 : PAGES));
	check(stats().break_pages >= PAGES / 2);
}

static void written_by_the_kernel(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	static char data[PAGES * PAGE];
	int ends[2];
	int fd = memfd_create("data", 0);

	memset(data, 'x', sizeof(data));
	check(write(fd, data, sizeof(data)) == sizeof(data));
	// In the middle of one page to the middle of another.
	check(pread(fd, at + 2 * PAGE + 100, 4 * PAGE, 0) == 4 * PAGE);
	check(memcmp(at + 2 * PAGE + 100, data, 4 * PAGE) == 0);
	check(intact(at, 2, 1, layout, 0));
	check(intact_from(at + 7 * PAGE, 7, PAGES - 7, 1, layout, 0));
	// And read by the kernel: what is merged stays merged.
	check(pipe(ends) == 0);
	check(write(ends[1], at + 12 * PAGE, 4 * PAGE) == 4 * PAGE);
	check(read(ends[0], data, 4 * PAGE) == 4 * PAGE);
	check(memcmp(data, at + 12 * PAGE, 4 * PAGE) == 0);
	check(is_merged(at + 12 * PAGE));
}

static void discard(int advice)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);

	check(madvise(at + 4 * PAGE, 8 * PAGE, advice) == 0);
	if (advice == MADV_DONTNEED || layout == WHOLE)
		check(is_zero(at + 4 * PAGE, 8)); // MADV_FREE may leave alone what was not merged
	check(intact(at, 4, 1, layout, 0));
	check(intact_from(at + 12 * PAGE, 12, 4, 1, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
}

static void dontneed(void)
{
	discard(MADV_DONTNEED);
}

static void free_advice(void)
{
	discard(MADV_FREE);
}

// A hole does not keep the kernel from discarding what lies behind it; it only says ENOMEM in the end.
static void dontneed_across_a_hole(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(munmap(at + 6 * PAGE, PAGE) == 0);
	check(madvise(at, PAGES * PAGE, MADV_DONTNEED) == -1 && errno == ENOMEM);
	check(is_zero(at, 6));
	check(is_zero(at + 7 * PAGE, PAGES - 7));
}

static void raw_dontneed(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(SYS_madvise), "D"(at), "S"(PAGES * PAGE), "d"(MADV_DONTNEED)
			 : "rcx", "r11", "memory");
	check(ret == 0);
	check(is_zero(at, PAGES));
	check(intact(twin, PAGES, 1, layout, 1));
	await(!stats().merging);
	check(strstr(stats().reason, "raw system call"));
	// And goes on right.
	fill(at, PAGES, 2, layout, 0);
	twin[0] ^= 1;
	twin[0] ^= 1;
	check(intact(at, PAGES, 2, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
}

static void unmapped(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	char *again;

	check(munmap(at + 4 * PAGE, 4 * PAGE) == 0);
	for (size_t i = 4; i < 8; i++)
		check(touch(at + i * PAGE, false) == SIGSEGV);
	check(intact(at, 4, 1, layout, 0));
	again = mmap(at + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	check(again == at + 4 * PAGE);
	check(is_zero(again, 4));
	memset(again, 7, 4 * PAGE);
	check(again[0] == 7 && again[4 * PAGE - 1] == 7);
	check(intact(at, 4, 1, layout, 0));
	check(intact_from(at + 8 * PAGE, 8, 8, 1, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
	check(munmap(at, PAGES * PAGE) == 0);
	check(touch(at, false) == SIGSEGV && touch(at + (PAGES - 1) * PAGE, false) == SIGSEGV);
}

static void mapped_over(void)
{
	static const int kinds[] = {MAP_PRIVATE | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		char *at = merged(PAGES, 1 + i, layout, NULL);
		int fd = kinds[i] & MAP_ANONYMOUS ? -1 : memfd_create("other", 0);

		check(fd < 0 || ftruncate(fd, 4 * PAGE) == 0);
		check(mmap(at + 3 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, kinds[i] | MAP_FIXED, fd, 0) == at + 3 * PAGE);
		check(is_zero(at + 3 * PAGE, 4));
		memset(at + 3 * PAGE, 5, 4 * PAGE);
		check(at[3 * PAGE] == 5 && at[7 * PAGE - 1] == 5);
		check(intact(at, 3, 1 + i, layout, 0));
		check(intact_from(at + 7 * PAGE, 7, PAGES - 7, 1 + i, layout, 0));
		// MAP_FIXED_NOREPLACE must not replace.
		check(mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED);
		check(errno == EEXIST);
		check(intact(at, 3, 1 + i, layout, 0));
	}
}

static void read_only(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(mprotect(at + 2 * PAGE, 8 * PAGE, PROT_READ) == 0);
	for (size_t i = 0; i < PAGES; i++)
		check(touch(at + i * PAGE, true) == (i >= 2 && i < 10 ? SIGSEGV : 0));
	check(intact(at, PAGES, 1, layout, 0));
	// What becomes of a read-only page that is discarded is read-only.
	check(madvise(at + 2 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at + 2 * PAGE, 2));
	check(touch(at + 2 * PAGE, true) == SIGSEGV);
	check(mprotect(at, PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
	check(intact_from(at + 4 * PAGE, 4, PAGES - 4, 1, layout, 0));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
}

// mprotect() stops at a hole and says ENOMEM; what lies before it has its new protection all the same.
static void read_only_up_to_a_hole(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(munmap(at + 8 * PAGE, PAGE) == 0);
	check(mprotect(at, PAGES * PAGE, PROT_READ) == -1 && errno == ENOMEM);
	check(touch(at, true) == SIGSEGV);
	check(touch(at + 9 * PAGE, true) == 0);
	check(madvise(at, 2 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at, 2));
	check(touch(at, true) == SIGSEGV);
}

static void inaccessible(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(mprotect(at, PAGES * PAGE, PROT_NONE) == 0);
	for (size_t i = 0; i < PAGES; i++)
		check(touch(at + i * PAGE, false) == SIGSEGV);
	check(mprotect(at + 4 * PAGE, 4 * PAGE, PROT_READ) == 0);
	check(intact_from(at + 4 * PAGE, 4, 4, 1, layout, 0));
	check(touch(at + 4 * PAGE, true) == SIGSEGV && touch(at, false) == SIGSEGV);
	check(mprotect(at, PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
	check(intact(at, PAGES, 1, layout, 0));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
}

static void executable(void)
{
	static const unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3}; // mov $42, %eax; ret
	char *at = plain(PAGES);
	char *twin = plain(PAGES);

	for (int copy = 0; copy < 2; copy++) {
		fill(copy ? twin : at, PAGES, 1, WHOLE, 0);
		memcpy(copy ? twin : at, code, sizeof(code));
	}
	await_merged(at, PAGES, WHOLE);
	check(mprotect(at, PAGES * PAGE, PROT_READ | PROT_EXEC) == 0);
	check(((int (*)(void))at)() == 42);
	check(touch(at, true) == SIGSEGV);
	check(intact_from(at + PAGE, 1, PAGES - 1, 1, WHOLE, 0));
}

static void moved_by_growing(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	char *now = mremap(at, PAGES * PAGE, 4 * PAGES * PAGE, MREMAP_MAYMOVE); // a guard page is in its way

	check(now != MAP_FAILED && now != at);
	check(intact(now, PAGES, 1, layout, 0));
	check(is_zero(now + PAGES * PAGE, 3 * PAGES));
	check(touch(at, false) == SIGSEGV);
	fill(now, 4 * PAGES, 2, layout, 0);
	check(intact(now, 4 * PAGES, 2, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
	check(madvise(now, 4 * PAGES * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(now, 4 * PAGES));
}

static void grown_in_place(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(mremap(at, PAGES * PAGE, 2 * PAGES * PAGE, 0) == MAP_FAILED && errno == ENOMEM);
	check(intact(at, PAGES, 1, layout, 0));
	check(munmap(at + 12 * PAGE, 5 * PAGE) == 0); // with the guard
	check(mremap(at, 12 * PAGE, 16 * PAGE, 0) == at);
	check(intact(at, 12, 1, layout, 0));
	check(is_zero(at + 12 * PAGE, 4));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
}

static void shrunk(void)
{
	char *at = merged(PAGES, 1, layout, NULL);

	check(mremap(at, PAGES * PAGE, 5 * PAGE, 0) == at);
	check(intact(at, 5, 1, layout, 0));
	for (size_t i = 5; i < PAGES; i++)
		check(touch(at + i * PAGE, false) == SIGSEGV);
	fill(at, 5, 2, layout, 0);
	check(intact(at, 5, 2, layout, 0));
}

static void moved_onto_merged(void)
{
	char *twin;
	char *at = merged(PAGES, 1, layout, &twin);
	char *target = merged(PAGES, 2, layout, NULL);

	check(mremap(at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
	check(intact(target, PAGES, 1, layout, 0));
	check(touch(at, false) == SIGSEGV);
	target[0] ^= 1;
	target[0] ^= 1;
	check(intact(target, PAGES, 1, layout, 0));
	check(madvise(target, PAGES * PAGE, MADV_DONTNEED) == 0 && is_zero(target, PAGES));
	check(intact(twin, PAGES, 1, layout, 1));
}

static void moved_and_kept_mapped(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	char *now = mremap(at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);

	check(now != MAP_FAILED);
	check(intact(now, PAGES, 1, layout, 0));
	check(is_zero(at, PAGES));
	fill(at, PAGES, 3, layout, 0);
	check(intact(at, PAGES, 3, layout, 0));
	check(intact(now, PAGES, 1, layout, 0));
}

static char *volatile wanted; // by the other thread; NULL: it ends

static void *map_where_it_is_free(void *unused)
{
	char *at;

	(void)unused;
	for (size_t page = 0; (at = wanted); page = (page + 1) % PAGES) {
		char *got = mmap(at + page * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		check(got != MAP_FAILED);
		check(got < at || got >= at + PAGES * PAGE);
		check(munmap(got, PAGE) == 0);
	}
	return NULL;
}

// Nobody else may map something there at any moment, the less as it would be unmapped again with the old mapping.
static void kept_mapped_all_the_while(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	pthread_t other;

	wanted = at;
	check(pthread_create(&other, NULL, map_where_it_is_free, NULL) == 0);
	for (unsigned round = 0; round < 400; round++) {
		char *now = mremap(at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);

		check(now != MAP_FAILED);
		check(is_zero(at, PAGES));
		check(mremap(now, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
		check(intact(at, PAGES, 1, layout, 0));
	}
	wanted = NULL;
	check(pthread_join(other, NULL) == 0);
}

static void heap_shrinks(void)
{
	char *twin = plain(PAGES);
	char *start;
	char *at;

	await_agent(); // looks it up, for which libc may allocate: nothing else must move the break below
	start = sbrk(0);
	check(sbrk(-(intptr_t)start & (PAGE - 1)) != (void *)-1);
	at = sbrk(PAGES * PAGE);
	check(at != (void *)-1);
	fill(at, PAGES, 1, layout, 0);
	fill(twin, PAGES, 1, layout, 1);
	await_merged(at, PAGES, layout);
	check(sbrk(-8 * PAGE) == at + PAGES * PAGE);
	check(touch(at + 8 * PAGE, false) == SIGSEGV);
	check(intact(at, 8, 1, layout, 0));
	check(sbrk(8 * PAGE) == at + 8 * PAGE);
	check(is_zero(at + 8 * PAGE, 8));
	check(intact(at, 8, 1, layout, 0));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
	check(intact(twin, PAGES, 1, layout, 1));
}

static void locked(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	long before = status_value("VmLck:");

	check(mlock(at, PAGES * PAGE) == 0);
	check(status_value("VmLck:") - before == PAGES * PAGE / 1024);
	check(intact(at, PAGES, 1, layout, 0));
	check(madvise(at, PAGES * PAGE, MADV_DONTNEED) == -1 && errno == EINVAL);
	check(intact(at, PAGES, 1, layout, 0));
	fill(at, PAGES, 2, layout, 0);
	check(intact(at, PAGES, 2, layout, 0));
	check(status_value("VmLck:") - before == PAGES * PAGE / 1024);
	check(munlock(at, PAGES * PAGE) == 0);
	check(status_value("VmLck:") == before);
	check(madvise(at, PAGES * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at, PAGES));
}

// Given before merging and after it, attributes stay, also on what broke, and act in a fork child.
static void attributes(void)
{
	char *at = plain(PAGES);
	char *twin;
	char *later = merged(PAGES, 2, layout, &twin);
	pid_t pid;

	check(madvise(at, PAGES * PAGE, MADV_DONTFORK) == 0);
	check(madvise(at, PAGES * PAGE, MADV_DONTDUMP) == 0);
	check(madvise(at, PAGES * PAGE, MADV_HUGEPAGE) == 0);
	fill(at, PAGES, 2, layout, 2);
	await_merged(at, PAGES, layout);
	check(madvise(later, PAGES * PAGE, MADV_DONTFORK) == 0);
	check(madvise(later, PAGES * PAGE, MADV_DONTDUMP) == 0);
	check(madvise(later, PAGES * PAGE, MADV_HUGEPAGE) == 0);
	for (int broken = 0; broken < 2; broken++) {
		for (size_t i = 0; i < PAGES; i++) {
			for (const char *const *flag = (const char *const[]){"dc", "dd", "hg", NULL}; *flag; flag++)
				check(has_flag(at + i * PAGE, *flag) && has_flag(later + i * PAGE, *flag));
		}
		check(!has_flag(twin, "dc") && !has_flag(twin, "dd"));
		at[0] ^= 1;
		later[0] ^= 1;
		check(madvise(at + 2 * PAGE, PAGE, MADV_DONTNEED) == 0);
		check(madvise(later + 2 * PAGE, PAGE, MADV_DONTNEED) == 0);
	}
	pid = fork();
	if (pid == 0) {
		for (size_t i = 0; i < PAGES; i++)
			check(touch(at + i * PAGE, false) == SIGSEGV && touch(later + i * PAGE, false) == SIGSEGV);
		check(intact(twin, PAGES, 2, layout, 1));
		_exit(42);
	}
	check(WEXITSTATUS(wait_child(pid)) == 42);
}

// The answer is the kernel's; the memory is KSM's only if that is asked for, and then stays it.
static void mergeable(void)
{
	bool kept = getenv("UDEDUP_KEEP_KSM") != NULL;
	char *at = plain(PAGES + 3);

	check(madvise(at, PAGES * PAGE, MADV_MERGEABLE) == 0);
	check(has_flag(at, "mg") == kept);
	fill(at, PAGES, 1, layout, 1);
	fill(plain(PAGES), PAGES, 1, layout, 2);
	await_merged(at, PAGES, layout);
	check(has_flag(at, "mg") == kept);
	check(madvise(at, PAGES * PAGE, MADV_MERGEABLE) == 0);
	check(has_flag(at, "mg") == kept);
	check(madvise(at, PAGES * PAGE, MADV_UNMERGEABLE) == 0);
	check(!has_flag(at, "mg"));
	check(munmap(at + (PAGES + 1) * PAGE, PAGE) == 0);
	check(madvise(at + PAGES * PAGE, 3 * PAGE, MADV_MERGEABLE) == -1 && errno == ENOMEM);
	check(has_flag(at + (PAGES + 2) * PAGE, "mg") == kept);
	check(madvise(at + 1, PAGE, MADV_MERGEABLE) == -1 && errno == EINVAL);
}

static void wiped_on_fork(void)
{
	char *at = merged(PAGES, 1, layout, NULL);
	pid_t pid;

	check(madvise(at, PAGES * PAGE, MADV_WIPEONFORK) == 0);
	check(intact(at, PAGES, 1, layout, 0));
	pid = fork();
	if (pid == 0) {
		check(is_zero(at, PAGES));
		_exit(42);
	}
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(intact(at, PAGES, 1, layout, 0));
}

static struct {
	ucontext_t outside;
	ucontext_t inside;
	char *memory;
	size_t depth; // bytes that lie above the frames of the call
} coroutine;

static void protect_own_stack(void)
{
	volatile char *above = alloca(coroutine.depth);

	for (size_t i = 0; i < coroutine.depth; i++)
		above[i] = (char)i;
	check(mprotect(coroutine.memory, PAGES * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
	check(mprotect(coroutine.memory, PAGES * PAGE, PROT_READ | PROT_WRITE) == 0);
	for (size_t i = 0; i < coroutine.depth; i++)
		check(above[i] == (char)i);
}

// A coroutine whose stack is merged but for the page that it writes to, and a call that makes merged memory private. Wherever
// in a page its frames begin: they reach into merged ones while they do it.
static void own_stack(void)
{
	enum { STEP = 272, UNUSED = PAGES - 4 };

	for (coroutine.depth = STEP; coroutine.depth < PAGE + STEP; coroutine.depth += STEP) {
		coroutine.memory = merged(PAGES, coroutine.depth, layout, NULL);
		check(getcontext(&coroutine.inside) == 0);
		coroutine.inside.uc_stack.ss_sp = coroutine.memory;
		coroutine.inside.uc_stack.ss_size = PAGES * PAGE;
		coroutine.inside.uc_link = &coroutine.outside;
		makecontext(&coroutine.inside, protect_own_stack, 0);
		check(swapcontext(&coroutine.outside, &coroutine.inside) == 0);
		check(intact(coroutine.memory, UNUSED, coroutine.depth, layout, 0));
	}
}

static const struct test_case cases[] = {
	{"write-keeps-the-rest", write_keeps_the_rest},
	{"written-by-the-kernel", written_by_the_kernel},
	{"dontneed", dontneed},
	{"free", free_advice},
	{"dontneed-across-a-hole", dontneed_across_a_hole},
	{"raw-dontneed", raw_dontneed},
	{"unmapped", unmapped},
	{"mapped-over", mapped_over},
	{"read-only", read_only},
	{"read-only-up-to-a-hole", read_only_up_to_a_hole},
	{"inaccessible", inaccessible},
	{"executable", executable},
	{"moved-by-growing", moved_by_growing},
	{"grown-in-place", grown_in_place},
	{"shrunk", shrunk},
	{"moved-onto-merged", moved_onto_merged},
	{"moved-and-kept-mapped", moved_and_kept_mapped},
	{"kept-mapped-all-the-while", kept_mapped_all_the_while},
	{"heap-shrinks", heap_shrinks},
	{"locked", locked},
	{"attributes", attributes},
	{"mergeable", mergeable},
	{"wiped-on-fork", wiped_on_fork},
	{"own-stack", own_stack},
};

int main(int argc, char **argv)
{
	layout = argc > 2 && strcmp(argv[2], "cut") == 0 ? CUT : WHOLE;
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
