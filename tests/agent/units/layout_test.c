// SPDX-License-Identifier: MIT
// Reading smaps: crafted text behind a real descriptor.
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "agent/agent.h"
#include "agent/layout.h"
#include "unit.h"

struct udd_agent udd_agent;

static struct udd_layout layout;
static const struct udd_span OWN = {0x700000000000, 0x700000100000};
static FILE *text;

static void begin(void)
{
	int fd = memfd_create("smaps", 0);

	check(fd >= 0);
	if (text)
		fclose(text);
	text = fdopen(fd, "w");
	check(text);
	layout.smaps_fd = fd;
}

// One mapping as the kernel prints it; `rest` is permissions to name.
static void add(uint64_t start, uint64_t end, const char *rest, uint64_t rss, const char *flags)
{
	fprintf(text, "%lx-%lx %s\nSize:           %8lu kB\nRss:            %8lu kB\nPss:            %8lu kB\n", start, end, rest,
		(end - start) >> 10, rss, rss);
	fprintf(text, "Anonymous:      %8lu kB\nFilePmdMapped:         0 kB\nProtectionKey:         0\nVmFlags: %s \n", rss, flags);
}

static void done(void)
{
	fflush(text);
	check(udd_layout_read(&layout, OWN) == 0);
}

static const char ANON[] = "rw-p 00000000 00:00 0 ";
static const char PLAIN[] = "rd wr mr mw me ac sd";

static bool is_candidate(uint64_t start, uint64_t end, uint32_t attributes)
{
	const struct udd_candidate *found = udd_layout_find(&layout, start);

	return found && found->start == start && found->end == end && found->attributes == attributes && !found->stale;
}

static void attributes(void)
{
	begin();
	add(0x10000, 0x20000, ANON, 16, PLAIN);
	add(0x30000, 0x40000, ANON, 0, "rd wr mr mw me dc ac sd");
	add(0x50000, 0x60000, ANON, 0, "rd wr mr mw me ac dd sd");
	add(0x70000, 0x80000, ANON, 0, "rd wr mr mw me ac sd mg hg");
	add(0x90000, 0xa0000, ANON, 0, "rd wr mr mw me dc ac dd nh");
	add(0xb0000, 0xc0000, "rw-p 00000000 00:00 0                          [heap]", 4, PLAIN);
	add(0xd0000, 0xe0000, "rw-p 00000000 00:00 0                          [anon:glibc: malloc]", 8, PLAIN);
	done();
	check(layout.count == 7);
	check(layout.mappings == 7);
	check(layout.present == 28 << 10);
	check(is_candidate(0x10000, 0x20000, 0));
	check(is_candidate(0x30000, 0x40000, UDD_ATTRIBUTE_DONTFORK));
	check(is_candidate(0x50000, 0x60000, UDD_ATTRIBUTE_DONTDUMP));
	check(is_candidate(0x70000, 0x80000, UDD_ATTRIBUTE_MERGEABLE | UDD_ATTRIBUTE_HUGEPAGE));
	check(is_candidate(0x90000, 0xa0000, UDD_ATTRIBUTE_DONTFORK | UDD_ATTRIBUTE_DONTDUMP | UDD_ATTRIBUTE_NOHUGEPAGE));
	check(udd_layout_find(&layout, 0)->start == 0x10000);
	check(udd_layout_find(&layout, 0x1ffff)->start == 0x10000);
	check(udd_layout_find(&layout, 0x20000)->start == 0x30000);
	check(!udd_layout_find(&layout, 0xe0000));
}

static void exclusions(void)
{
	static const char *const rests[] = {
		"r--p 00000000 00:00 0 ",
		"---p 00000000 00:00 0 ",
		"rw-s 00000000 00:00 0 ",
		"rwxp 00000000 00:00 0 ",
		"rw-s 00000000 00:01 1025                       /dev/zero (deleted)",
		"rw-s 00000000 00:01 32768                      /SYSV00000000 (deleted)",
		"rw-p 00000000 fe:01 99                         /usr/lib/libx.so",
		"rw-p 00000000 00:00 0                          [stack]",
		"rw-p 00000000 00:00 0                          [vvar]",
		"rw-p 00000000 00:00 0                          [uprobes]",
	};
	static const char *const flags[] = {"lo", "wf", "gd", "io", "pf", "ht", "um", "uw", "ui", "sl", "dp", "ss"};
	uint64_t at = 0x100000;

	begin();
	for (size_t i = 0; i < sizeof(rests) / sizeof(rests[0]); i++, at += 0x20000)
		add(at, at + 0x10000, rests[i], 64, PLAIN);
	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++, at += 0x20000) {
		char line[64];

		snprintf(line, sizeof(line), "rd wr mr mw me %s ac sd", flags[i]);
		add(at, at + 0x10000, ANON, 64, line);
	}
	// The agent's own memory, inside, around, and at either end.
	add(OWN.start - 0x2000, OWN.start, ANON, 4, PLAIN);
	add(OWN.start, OWN.start + 0x1000, ANON, 4, PLAIN);
	add(OWN.end - 0x1000, OWN.end + 0x1000, ANON, 4, PLAIN);
	add(OWN.end + 0x1000, OWN.end + 0x2000, ANON, 4, PLAIN);
	fprintf(text, "7f0000000000-7f0000001000 %s\nRss: 4 kB\nProtectionKey:         5\nVmFlags: %s \n", ANON, PLAIN);
	done();
	check(layout.count == 2);
	check(is_candidate(OWN.start - 0x2000, OWN.start, 0));
	check(is_candidate(OWN.end + 0x1000, OWN.end + 0x2000, 0));
}

static void bss_neighbours(void)
{
	static const char FILE_PAGES[] = "rw-p 00002000 fe:01 99                         /usr/lib/libx.so";
	static const char STORE[] = "rw-p 00003000 00:01 2051                       /memfd:udedup-store (deleted)";

	begin();
	add(0x10000, 0x20000, FILE_PAGES, 64, PLAIN);
	add(0x20000, 0x30000, ANON, 64, PLAIN); // .bss: borders on its file
	add(0x30000, 0x40000, ANON, 64, PLAIN); // borders on .bss only
	add(0x50000, 0x60000, ANON, 64, PLAIN);
	add(0x60000, 0x70000, FILE_PAGES, 64, PLAIN); // the file is behind, not before
	// A store mapping is not a file's: what follows it was one mapping with it before.
	add(0x80000, 0x90000, STORE, 40, PLAIN);
	add(0x90000, 0xa0000, ANON, 8, PLAIN);
	add(0xb0000, 0xc0000, "rw-p 00000000 00:01 2052                       /memfd:udedup-stores", 0, PLAIN);
	done();
	check(layout.mappings == 8);
	check(!udd_layout_find(&layout, 0x20000) || udd_layout_find(&layout, 0x20000)->start == 0x30000);
	check(is_candidate(0x30000, 0x40000, 0));
	check(is_candidate(0x50000, 0x60000, 0));
	check(is_candidate(0x90000, 0xa0000, 0));
	check(layout.count == 3);
	check(layout.present == (64 * 3 + 40 + 8) << 10);
}

// Merged memory may become plain again at any time, and is known by then.
static void merged_memory(void)
{
	static const char STORE[] = "rw-p 00003000 00:01 2051                       /memfd:udedup-store (deleted)";
	static const char *const rests[] = {
		"r--p 00003000 00:01 2051                       /memfd:udedup-store (deleted)",
		"rw-s 00003000 00:01 2051                       /memfd:udedup-store (deleted)",
		"rw-p 00003000 00:01 2051                       /memfd:udedup-stores (deleted)",
		"rw-p 00003000 fe:01 2051                       /srv/udedup-store",
	};
	static const char ARMED[] = "rd wr mr mw me uw ui ac sd";
	uint64_t at = 0x100000;

	begin();
	add(0x10000, 0x20000, STORE, 0, ARMED);
	add(0x20000, 0x30000, STORE, 4, ARMED); // a page was written to
	add(0x30000, 0x40000, STORE, 0, "rd wr mr mw me dc ac dd uw ui sd hg");
	add(0x40000, 0x50000, STORE, 0, "rd wr mr mw me uw ui lo ac sd");
	add(0x50000, 0x60000, ANON, 0, PLAIN);
	for (size_t i = 0; i < sizeof(rests) / sizeof(rests[0]); i++, at += 0x20000)
		add(at, at + 0x10000, rests[i], 0, ARMED);
	done();
	check(layout.count == 3);
	check(is_candidate(0x10000, 0x20000, 0) && udd_layout_find(&layout, 0x10000)->merged);
	check(is_candidate(0x30000, 0x40000, UDD_ATTRIBUTE_DONTFORK | UDD_ATTRIBUTE_DONTDUMP | UDD_ATTRIBUTE_HUGEPAGE));
	check(udd_layout_find(&layout, 0x30000)->merged);
	check(is_candidate(0x50000, 0x60000, 0) && !udd_layout_find(&layout, 0x50000)->merged);
}

static void note_mapping(uint32_t at, uint64_t start, uint64_t end, uint64_t inode, bool shared)
{
	udd_agent.files[at] = (struct udd_file){
		.span = {start, end},
		.device = makedev(0xfe, 0x123),
		.inode = inode,
		.mergeable = 1,
		.shared = shared,
		.protection = PROT_READ,
	};
	udd_agent.files_used = at + 1;
}

static uint32_t file_at(uint64_t start, uint64_t end)
{
	return is_candidate(start, end, 0) ? udd_layout_find(&layout, start)->file : 0;
}

// Of a file's mappings, those that are known, as far as they are.
static void files(void)
{
	static const char PRIVATE[] = "r--p 00000000 fe:123 99                        /mnt/a.img";
	static const char SHARED[] = "r--s 00000000 fe:123 99                        /mnt/a.img";
	static const char OTHER[] = "r--p 00000000 fe:01 99                         /mnt/a.img";

	// Not in the order of addresses.
	note_mapping(0, 0x30000, 0x38000, 99, false);
	note_mapping(1, 0x10000, 0x14000, 99, false);
	note_mapping(2, 0x50000, 0x60000, 98, false);
	note_mapping(3, 0x70000, 0x80000, 99, true);
	note_mapping(4, 0x90000, 0xa0000, 99, false);
	note_mapping(5, 0xb0000, 0xc0000, 99, false);
	note_mapping(6, 0xd0000, 0xe0000, 99, false);
	note_mapping(7, 0xf0000, 0x100000, 99, false);
	note_mapping(8, 0x110000, 0x120000, 99, false);
	note_mapping(9, 0x14000, 0x18000, 99, false);
	udd_agent.files[4].mergeable = 0;
	udd_layout_note_files(&layout);
	check(layout.file_count == 9);
	begin();
	add(0x10000, 0x20000, PRIVATE, 8, PLAIN);  // two of ours, and more
	add(0x30000, 0x34000, PRIVATE, 4, PLAIN);  // the rest was merged
	add(0x34000, 0x38000, "r--p 00003000 00:01 2051                       /memfd:udedup-store (deleted)", 16, PLAIN);
	add(0x50000, 0x60000, PRIVATE, 4, PLAIN);  // another file
	add(0x70000, 0x80000, SHARED, 4, PLAIN);
	add(0x90000, 0xa0000, PRIVATE, 4, PLAIN);  // changed since
	add(0xb0000, 0xc0000, SHARED, 4, PLAIN);   // not what it was
	add(0xd0000, 0xe0000, OTHER, 4, PLAIN);    // of another file system
	add(0xf0000, 0x100000, PRIVATE, 4, "rd mr mw me lo sd");
	add(0x110000, 0x120000, PRIVATE, 4, "rd mr mw me dc sd");
	done();
	check(layout.count == 4);
	check(file_at(0x10000, 0x14000) == 2 && file_at(0x14000, 0x18000) == 10);
	check(file_at(0x30000, 0x34000) == 1 && file_at(0x70000, 0x80000) == 4);
	check(layout.present == (8 + 4 + 16 + 4) << 10);
	layout.file_count = 0;
}

static void long_lines(size_t length)
{
	char *path = malloc(length + 64);
	int head = sprintf(path, "rw-p 00000000 fe:01 99                         /");

	// Letters that a header could start with, too.
	memset(path + head, 'a', length);
	path[(size_t)head + length] = '\0';
	begin();
	add(0x10000, 0x20000, ANON, 4, PLAIN);
	add(0x30000, 0x40000, path, 4, PLAIN);
	add(0x50000, 0x60000, ANON, 4, PLAIN);
	done();
	free(path);
	check(layout.mappings == 3);
	check(layout.count == 2);
	check(is_candidate(0x10000, 0x20000, 0));
	check(is_candidate(0x50000, 0x60000, 0));
}

// More text than the buffer holds many times over, so that every kind of line is cut somewhere; and more mappings than
// are remembered.
static void many_mappings(void)
{
	enum { COUNT = UDD_LAYOUT_MAX + 100 };
	const uint64_t base = 0x100000000;

	begin();
	for (uint64_t i = 0; i < COUNT; i++)
		add(base + i * 0x4000, base + i * 0x4000 + 0x2000, ANON, 8, i % 3 ? PLAIN : "rd wr mr mw me dc ac sd");
	done();
	check(layout.mappings == COUNT);
	check(layout.count == UDD_LAYOUT_MAX);
	check(layout.present == (uint64_t)COUNT * 0x2000);
	for (uint64_t i = 0; i < UDD_LAYOUT_MAX; i++)
		check(is_candidate(base + i * 0x4000, base + i * 0x4000 + 0x2000, i % 3 ? 0 : UDD_ATTRIBUTE_DONTFORK));
}

static void three_mappings(void)
{
	begin();
	add(0x10000, 0x20000, ANON, 4, PLAIN);
	add(0x30000, 0x40000, ANON, 4, PLAIN);
	add(0x50000, 0x60000, ANON, 4, PLAIN);
	done();
}

static struct udd_stale stale[UDD_STALE_SLOTS];
static uint32_t stale_count;

static void note(uint64_t start, uint64_t end, enum udd_stale_kind kind)
{
	udd_stale_note(stale, &stale_count, (struct udd_span){start, end}, kind);
}

static void apply(void)
{
	udd_layout_apply(&layout, stale, &stale_count);
	check(stale_count == 0 && stale[0].end == 0);
}

static void changes_are_stale(void)
{
	three_mappings();
	note(0x1f000, 0x31000, UDD_STALE_CHANGED);
	note(0x60000, 0x70000, UDD_STALE_CHANGED); // right behind the third
	apply();
	check(layout.candidates[0].stale && layout.candidates[1].stale && !layout.candidates[2].stale);
	three_mappings();
	check(is_candidate(0x10000, 0x20000, 0));
	// More changes than there is room for: nothing is known any more.
	for (uint64_t i = 0; i < 2 * UDD_STALE_SLOTS; i++)
		note(0x40000000 + i * 0x10000, 0x40000000 + i * 0x10000 + 0x8000, UDD_STALE_CHANGED);
	check(stale_count > UDD_STALE_SLOTS);
	apply();
	check(layout.count == 0);
}

// Memory that comes and goes at a few addresses takes a few notes, but none that says something new is left out.
static void repeated_changes(void)
{
	three_mappings();
	for (unsigned i = 0; i < 100 * UDD_STALE_SLOTS; i++)
		note(0x40000000 + i % 4 * 0x1000, 0x40001000 + i % 4 * 0x1000, UDD_STALE_CHANGED);
	check(stale_count == 4);
	note(0x40000000, 0x40005000, UDD_STALE_CHANGED);
	check(stale_count == 5);
	note(0x40001000, 0x40002000, UDD_STALE_CHANGED);
	check(stale_count == 5);
	// The last word counts, not any that was the same before it.
	note(0x30000, 0x40000, UDD_STALE_CHANGED);
	note(0x30000, 0x40000, UDD_STALE_STACK);
	note(0x30000, 0x40000, UDD_STALE_CHANGED);
	note(0x30000, 0x40000, UDD_STALE_STACK);
	check(stale_count == 9);
	apply();
	check(layout.candidates[1].stale);
	three_mappings();
	check(layout.count == 2 && !is_candidate(0x30000, 0x40000, 0));
	// What was taken in is noted again when it happens again.
	note(0x40000000, 0x40005000, UDD_STALE_CHANGED);
	note(0x30000, 0x40000, UDD_STALE_CHANGED);
	check(stale_count == 2);
	apply();
	three_mappings();
	check(layout.count == 3);
}

static void stacks_are_left_out(void)
{
	note(0x30000, 0x40000, UDD_STALE_STACK);
	apply();
	three_mappings();
	check(layout.count == 2 && !is_candidate(0x30000, 0x40000, 0));
	note(0x38000, 0x39000, UDD_STALE_CHANGED);
	apply();
	three_mappings();
	check(layout.count == 3);
	// More stacks than are remembered: the newest are.
	for (uint64_t i = 0; i < 3 * UDD_STACKS_MAX; i++) {
		note(0x40000000 + i * 0x10000, 0x40000000 + i * 0x10000 + 0x8000, UDD_STALE_STACK);
		apply();
	}
	note(0x50000, 0x60000, UDD_STALE_STACK);
	apply();
	three_mappings();
	check(layout.count == 2 && !is_candidate(0x50000, 0x60000, 0));
}

static void unreadable(void)
{
	fclose(text);
	text = NULL;
	layout.smaps_fd = -1;
	check(udd_layout_read(&layout, OWN) < 0);
	check(layout.count == 0);
}

int main(void)
{
	layout.candidates = calloc(UDD_LAYOUT_MAX, sizeof(*layout.candidates));
	layout.buffer = malloc(UDD_LAYOUT_BUFFER);
	attributes();
	exclusions();
	bss_neighbours();
	merged_memory();
	files();
	long_lines(4096);
	long_lines(60000);
	long_lines(UDD_LAYOUT_BUFFER);
	long_lines(150000);
	many_mappings();
	changes_are_stale();
	repeated_changes();
	stacks_are_left_out();
	unreadable();
	free(layout.candidates);
	free(layout.buffer);
	return 0;
}
