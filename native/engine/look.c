// SPDX-License-Identifier: MIT
#include "look.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../common/wire.h"

int udd_look_open(uint32_t pid, const char *name)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%u/%s", pid, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

void udd_look_init(struct udd_look *look, int pagemap, uint64_t page, uint64_t end, uint64_t without)
{
	*look = (struct udd_look){.pagemap = pagemap, .without = without, .next = page, .scanned = page, .end = end};
}

// Finds more regions; 0: there are none.
static int look_scan(struct udd_look *look)
{
	look->region = look->count = 0;
	while (!look->count && look->scanned < look->end) {
		struct pm_scan_arg arg = {
			.size = sizeof(arg),
			.start = look->scanned * UDD_PAGE_SIZE,
			.end = look->end * UDD_PAGE_SIZE,
			.vec = (uintptr_t)look->regions,
			.vec_len = UDD_LOOK_REGIONS,
			.category_mask = PAGE_IS_PRESENT | look->without,
			.category_inverted = look->without,
			.return_mask = PAGE_IS_PRESENT,
		};
		int count = ioctl(look->pagemap, PAGEMAP_SCAN, &arg);

		if (count < 0)
			return errno == ESRCH ? 0 : -errno; // ESRCH: its memory is gone
		look->count = count;
		look->scanned = arg.walk_end / UDD_PAGE_SIZE;
	}
	return look->count;
}

// The entries of some pages that follow each other; those that are no longer present are left out.
static int look_entries(const struct udd_look *look, uint64_t page, size_t count, struct udd_seen_page *ret)
{
	uint64_t entries[UDD_LOOK_BATCH];
	ssize_t got = pread(look->pagemap, entries, count * sizeof(*entries), page * sizeof(*entries));
	int present = 0;

	if (got < 0)
		return -errno;
	for (size_t i = 0; i < got / sizeof(*entries); i++)
		if (entries[i] & UDD_ENTRY_PRESENT)
			ret[present++] = (struct udd_seen_page){.page = page + i, .entry = entries[i]};
	return present;
}

int udd_look_next(struct udd_look *look, struct udd_seen_page *ret, size_t max)
{
	size_t filled = 0;

	while (filled < max) {
		if (look->region == look->count) {
			int r = look_scan(look);

			if (r < 0)
				return r;
			if (!r) {
				look->next = look->end;
				break;
			}
		}
		const struct page_region *region = &look->regions[look->region];
		uint64_t start = region->start / UDD_PAGE_SIZE, end = region->end / UDD_PAGE_SIZE;
		uint64_t page = start > look->next ? start : look->next;
		uint64_t count = end - page;

		if (count > max - filled)
			count = max - filled;
		if (count > UDD_LOOK_BATCH)
			count = UDD_LOOK_BATCH;
		int present = look_entries(look, page, count, ret + filled);

		if (present < 0)
			return present;
		filled += present;
		look->next = page + count;
		if (look->next == end)
			look->region++;
	}
	return filled;
}

// How many of some pages follow each other, at least 1.
static size_t in_a_row(const struct udd_seen_page *pages, size_t count)
{
	size_t row = 1;

	while (row < count && pages[row].page == pages[0].page + row)
		row++;
	return row;
}

size_t udd_look_read(int memory, struct udd_seen_page *pages, size_t count, void *buffer)
{
	size_t kept = 0, next = 0;

	while (next < count) {
		size_t row = in_a_row(pages + next, count - next);
		ssize_t got = pread(memory, (char *)buffer + kept * UDD_PAGE_SIZE, row * UDD_PAGE_SIZE, pages[next].page * UDD_PAGE_SIZE);
		size_t read = got > 0 ? got / UDD_PAGE_SIZE : 0;

		for (size_t i = 0; i < read; i++)
			pages[kept++] = pages[next + i];
		next += read;
		// What stopped it is the page after those.
		if (read < row)
			next++;
	}
	return kept;
}
