// SPDX-License-Identifier: MIT
// Looking at pages: the linear scan and the visit of hinted pages. Contents are copied out with pwrite() to the shared copy
// area, in batches: the kernel copies safely from memory that may vanish at any moment, where reading it ourselves could
// raise a signal in the application. That costs more than all the rest, so the linear scan first looks at a part of the page:
// whether it is worth its copy shows when that is the same a round later. Absent, zero-mapped and merged pages are skipped by PAGEMAP_SCAN.
#ifndef UDD_SCAN_H
#define UDD_SCAN_H

#include "agent.h"

// What scanning needs besides the agent's state; the worker's own.
struct udd_scan_state {
	int shared_fd;    // the shared area's descriptor, to copy into
	char *copy;       // its copy area, as mapped here
	uint64_t cursor;  // next address of the linear scan
	uint32_t flags;   // enum udd_config_flags
	bool split;       // this visit may split huge pages for zero pages
	uint32_t copies;  // slots of the copy area that this request's reports refer to
};

// Visits up to `pages` pages from the cursor on, UDD_SCAN_MAX at most. Fills `ret` and at most UDD_REPORTS_MAX reports.
void udd_scan(struct udd_scan_state *state, uint32_t pages, struct udd_reports *ret, struct udd_report *reports);
// Visits hinted ranges.
void udd_visit(struct udd_scan_state *state, const struct udd_range *ranges, uint32_t count, struct udd_reports *ret,
	       struct udd_report *reports);
// Copies ranges densely to the copy area. Bit i of `valid` says that page i was copied.
void udd_copy(struct udd_scan_state *state, const struct udd_range *ranges, uint32_t count, uint64_t valid[UDD_COPY_WORDS]);
// Bit i of `huge` says that address i lies in a transparent huge page.
void udd_find_huge(const uint64_t *addresses, uint32_t count, uint64_t huge[UDD_ITEMS_MAX / 64]);
// Reads the layout anew, if the last reading is long enough ago for what it costs.
void udd_refresh_layout(void);
// The same, if it does not know all of `span`: what is asked for may be younger.
void udd_refresh_layout_of(struct udd_span span);

#endif
