// SPDX-License-Identifier: MIT
#include "files.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

#include "agent.h"
#include "merged.h"
#include "sys.h"
#include "transaction.h"

enum {
	WRITE_BITS = 0222,
};

// A spare doubles the addresses that a mapping takes.
static const uint64_t SPAN_MOST = 1UL << 40;

static struct udd_file *file_of(uint32_t file)
{
	return &udd_agent.files[file - 1];
}

static bool may_be_on_mount(uint64_t device)
{
	return !udd_live()->mount_known || device == udd_live()->mount_dev;
}

bool udd_file_wanted(struct udd_span span, int protection, int flags, int fd, struct udd_file *ret)
{
	const int type = flags & MAP_TYPE;
	struct stat status;

	if (fd < 0 || protection != PROT_READ || (flags & (MAP_ANONYMOUS | MAP_LOCKED | MAP_GROWSDOWN | MAP_HUGETLB)) ||
	    (type != MAP_PRIVATE && type != MAP_SHARED) || udd_span_empty(span) || span.end - span.start > SPAN_MOST)
		return false;
	if (udd_sys(SYS_fstat, fd, &status) != 0 || !may_be_on_mount(status.st_dev) || !S_ISREG(status.st_mode) || (status.st_mode & WRITE_BITS))
		return false;
	*ret = (struct udd_file){
		.span = span,
		.device = status.st_dev,
		.inode = status.st_ino,
		.mergeable = 1,
		.shared = type == MAP_SHARED,
		.protection = PROT_READ,
	};
	return true;
}

void udd_file_add(const struct udd_file *file)
{
	// What was there has gone, whoever may not have said so.
	udd_files_changed(file->span);
	for (uint32_t i = 0; may_be_on_mount(file->device) && i < UDD_FILES_MAX; i++) {
		if (udd_agent.files[i].mergeable || udd_agent.files[i].references)
			continue;
		udd_agent.files[i] = *file;
		udd_agent.files_used = (uint32_t)udd_max(udd_agent.files_used, i + 1);
		return;
	}
}

// One line of /proc/self/maps. Is it a mapping that may be known?
static bool parse_mapping(const char *line, struct udd_file *ret)
{
	unsigned major, minor;
	char permissions[5];
	struct stat status;
	int path = 0;

	*ret = (struct udd_file){.mergeable = 1, .protection = PROT_READ};
	if (sscanf(line, "%lx-%lx %4s %*x %x:%x %lu %n", &ret->span.start, &ret->span.end, permissions, &major, &minor, &ret->inode,
		   &path) != 6 || line[path] != '/')
		return false;
	if (strcmp(permissions, "r-xp") == 0)
		ret->protection |= PROT_EXEC;
	else if (strcmp(permissions, "r--p") != 0)
		return false;
	ret->device = makedev(major, minor);
	return stat(line + path, &status) == 0 && status.st_dev == ret->device && status.st_ino == ret->inode &&
	       S_ISREG(status.st_mode) && !(status.st_mode & WRITE_BITS);
}

void udd_files_at_start(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[PATH_MAX + 128];
	struct udd_file file;

	while (maps && fgets(line, sizeof(line), maps)) {
		line[strcspn(line, "\n")] = '\0';
		if (parse_mapping(line, &file))
			udd_file_add(&file);
	}
	if (maps)
		fclose(maps);
}

void udd_files_choose(uint64_t device)
{
	udd_live()->mount_dev = device;
	udd_live()->mount_known = 1;
	udd_agent.files_served = device;
	for (uint32_t i = 0; i < udd_agent.files_used; i++) {
		if (udd_agent.files[i].device != device)
			udd_agent.files[i].mergeable = 0;
	}
}

void udd_files_changed(struct udd_span span)
{
	for (uint32_t i = 0; i < udd_agent.files_used; i++) {
		struct udd_file *file = &udd_agent.files[i];

		if (__atomic_load_n(&file->mergeable, __ATOMIC_RELAXED) && udd_span_overlaps(file->span, span))
			__atomic_store_n(&file->mergeable, 0, __ATOMIC_RELAXED);
	}
}

// Is this page, or what was in its place, a private copy?
static bool is_copy(uint64_t address)
{
	uint64_t copies;

	return udd_private_copies((struct udd_span){address, address + UDD_PAGE_SIZE}, &copies) || copies;
}

static int map_back(const struct udd_file *file, struct udd_span span)
{
	uint64_t bytes = span.end - span.start;
	long ret = udd_sys(SYS_mremap, file->spare + (span.start - file->span.start), bytes, bytes,
			   MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, span.start);

	return udd_failed(ret) ? (int)ret : 0;
}

// A second mapping of one page, which then is made longer. The page goes along, and then back.
static int make_spare(struct udd_file *file)
{
	uint64_t bytes = file->span.end - file->span.start;
	struct udd_span first = {file->span.start, file->span.start + UDD_PAGE_SIZE};
	long page;
	long ret;

	if (is_copy(first.start))
		return -EBUSY;
	page = udd_sys(SYS_mremap, first.start, UDD_PAGE_SIZE, UDD_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0);
	if (udd_failed(page))
		return (int)page;
	if (is_copy((uint64_t)page)) {
		// A debugger wrote to it this very moment.
		ret = udd_sys(SYS_mremap, page, UDD_PAGE_SIZE, UDD_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, first.start);
		return udd_failed(ret) ? (int)ret : -EBUSY;
	}
	ret = bytes > UDD_PAGE_SIZE ? udd_sys(SYS_mremap, page, UDD_PAGE_SIZE, bytes, MREMAP_MAYMOVE) : page;
	if (udd_failed(ret)) {
		udd_sys(SYS_munmap, page, UDD_PAGE_SIZE);
		return (int)ret;
	}
	file->spare = (uint64_t)ret;
	return map_back(file, first);
}

bool udd_file_holds(uint32_t number, struct udd_span span)
{
	const struct udd_file *file = file_of(number);

	return file->mergeable && file->span.start <= span.start && span.end <= file->span.end;
}

int udd_file_take(uint32_t number, uint32_t pages)
{
	struct udd_file *file = file_of(number);
	int ret = file->spare ? 0 : make_spare(file);

	if (!ret)
		file->references += pages;
	return ret;
}

void udd_file_put(uint32_t number, uint32_t pages)
{
	struct udd_file *file;

	if (!number)
		return;
	file = file_of(number);
	file->references -= pages;
	if (file->references)
		return;
	udd_sys(SYS_munmap, file->spare, file->span.end - file->span.start);
	file->spare = 0;
}

void udd_file_map_back(uint32_t number, struct udd_span span)
{
	map_back(file_of(number), span);
}

// Are the contents what was merged? If not, a debugger wrote there; or the mapping has vanished past the hooks. The kernel looks
// whether there is one, and does nothing more.
static bool is_merged(const struct udd_run_entry *run, struct udd_span span)
{
	uint64_t bytes = span.end - span.start;

	return udd_sys(SYS_msync, span.start, bytes, MS_ASYNC) == 0 &&
	       memcmp(udd_pointer(span.start), udd_store_page(run) + (span.start - run->address), bytes) == 0;
}

// One run, or a part of it that is its own now.
static int restore(struct udd_span span)
{
	const struct udd_run_entry *run = udd_first_run(span);
	uint32_t file = run->file;
	int ret;

	if (!is_merged(run, span)) {
		udd_broke_in_place(span);
		return 0;
	}
	ret = map_back(file_of(file), span);
	if (ret)
		return ret;
	udd_release_run(run, 0);
	udd_remove_runs(span);
	udd_file_put(file, (uint32_t)udd_pages(span.end - span.start));
	return 0;
}

static bool is_served(const struct udd_file *file)
{
	return file->device == udd_agent.files_served;
}

static bool restorable(const struct udd_run_entry *run, bool forced)
{
	return run->file && !run->broken && run->protection == file_of(run->file)->protection &&
	       !(run->attributes & UDD_ATTRIBUTE_LOCKED) && (forced || is_served(file_of(run->file)));
}

void udd_files_restore(struct udd_span span, bool forced)
{
	int ret = 0;

	while (!udd_span_empty(span) && !ret) {
		const struct udd_run_entry *run = udd_runs_first(&udd_agent.runs, span);
		struct udd_span piece;

		if (!run)
			break;
		piece = udd_span_clip(udd_run_span(run), span);
		// One page that a debugger wrote to takes no more than so many with it.
		piece.end = udd_min(piece.end, piece.start + udd_bytes(UDD_RUN_MAX));
		span.start = piece.end;
		if (restorable(run, forced))
			ret = restore(piece);
	}
	udd_publish_runs();
}

uint64_t udd_files_unmerge(uint64_t inode)
{
	struct udd_live *live = udd_live();
	uint64_t pages = 0;

	for (uint32_t i = 0; i < udd_agent.files_used; i++) {
		struct udd_file *file = &udd_agent.files[i];
		struct udd_span span = {0, 0};
		uint64_t started;

		udd_worker_lock_patiently(&started);
		if (file->inode == inode && file->device == live->mount_dev && (file->mergeable || file->references)) {
			span = file->span;
			file->mergeable = 0;
			udd_stale_note(live->stale, &live->stale_count, span, UDD_STALE_CHANGED);
		}
		udd_worker_unlock(started);
		if (!udd_span_empty(span))
			pages += udd_unmerge(span);
	}
	return pages;
}

void udd_files_open(struct udd_span span)
{
	for (struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span)) {
		if (!run->file || run->broken)
			continue;
		udd_release_run(run, 0);
		run->broken = 1;
	}
	udd_publish_runs();
}

uint64_t udd_file_compare(uint64_t address, uint32_t pages, const char *contents)
{
	static const char zeros[UDD_PAGE_SIZE];
	struct iovec local = {.iov_base = udd_agent.file_pages, .iov_len = udd_bytes(pages)};
	struct iovec remote = {.iov_base = udd_pointer(address), .iov_len = udd_bytes(pages)};
	long got = udd_sys(SYS_process_vm_readv, udd_sys(SYS_getpid), &local, 1, &remote, 1, 0);
	uint64_t same = 0;

	for (uint32_t i = 0; !udd_failed(got) && i < udd_pages((uint64_t)got); i++) {
		const char *page = udd_agent.file_pages + udd_bytes(i);

		if (memcmp(page, contents + udd_bytes(i), UDD_PAGE_SIZE) == 0 && memcmp(page, zeros, UDD_PAGE_SIZE) != 0)
			same |= 1UL << i;
	}
	return same;
}
