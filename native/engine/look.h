// SPDX-License-Identifier: MIT
// Another process's memory, looked at from outside: which of its pages are present, and what they hold. Absent pages and those
// in swap are never asked for, so that looking brings nothing in; one that goes between the two steps may be, as by any access.
//
// Mappings of devices must not be looked at: to read a device's memory may do something. Which mappings are worth looking at, and what a page's content means, is for those who look.
#ifndef UDD_LOOK_H
#define UDD_LOOK_H

#include <stddef.h>
#include <stdint.h>

#include "../common/uffd.h"

enum {
	UDD_LOOK_BATCH = 256, // pages at a time
	UDD_LOOK_REGIONS = 64,
};

// Bits of a page's entry in /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
#define UDD_ENTRY_FRAME ((1ULL << 55) - 1) // page frame number; 0 without CAP_SYS_ADMIN
#define UDD_ENTRY_ALONE (1ULL << 56)	   // mapped once
#define UDD_ENTRY_FILE (1ULL << 61)	   // of a file, or shared memory
#define UDD_ENTRY_PRESENT (1ULL << 63)

struct udd_seen_page {
	uint64_t page;	// address / 4096
	uint64_t entry; // of pagemap
};

// A walk over the present pages of a range.
struct udd_look {
	int pagemap;	  // descriptor, the caller's
	uint64_t without; // categories of PAGEMAP_SCAN that are left out
	uint64_t next;	  // page to go on at
	uint64_t end;	  // of the range
	uint64_t scanned; // page up to which regions are known
	struct page_region regions[UDD_LOOK_REGIONS];
	size_t region; // the one at hand
	size_t count;  // of regions
};

// Opens a file in /proc/PID; a descriptor or a negative errno.
int udd_look_open(uint32_t pid, const char *name);
void udd_look_init(struct udd_look *look, int pagemap, uint64_t page, uint64_t end, uint64_t without);
// The next present pages, at most `max`; 0: there are no more, or the process is gone. A negative errno where the kernel can't tell.
int udd_look_next(struct udd_look *look, struct udd_seen_page *ret, size_t max);
// Reads at most UDD_LOOK_BATCH pages, one after the other, into `buffer`. Pages that can't be read are taken out of `pages`; returns
// how many are left. `memory`: /proc/PID/mem.
//
// Not process_vm_readv(2), which is faster: it pins what it reads, and a page that is to be pinned and is shared, by fork or KSM, is
// first copied for the process. Pages read are marked as used, as by any reader.
size_t udd_look_read(int memory, struct udd_seen_page *pages, size_t count, void *buffer);

#endif
