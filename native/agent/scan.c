// SPDX-License-Identifier: MIT
#include "scan.h"

#include <string.h>
#include <sys/uio.h>

#include "../common/digest.h"
#include "../common/uffd.h"
#include "fault.h"
#include "hooks.h"
#include "sys.h"
#include "transaction.h"

enum {
	REGIONS = 64,          // regions of one PAGEMAP_SCAN
	BATCH = 64,            // pages copied and hashed at a time: they should stay in the processor's cache
	PART = 512,            // bytes of a page looked at first
	LAYOUT_SHARE = 50,     // reading the layout may take one part in so many of the time …
	LAYOUT_DEAR_NS = 20000000,
	LAYOUT_OWN_SHARE = 200, // … and so many where it takes longer than that for our own runs' sake
	LAYOUT_AGE_S = 10,     // raw system calls change it too
};

// Pages that are being looked at: present, of one candidate.
struct batch {
	uint32_t first;      // slot of the copy area that the first one is copied to; the others follow
	uint64_t addresses[BATCH];
	uint32_t count;
	uint64_t huge; // bit mask: those that lie in a transparent huge page
	bool file;     // they are a file's, and can't change
};

// Of tens of thousands of mappings, with room for more, most are runs or what is left between two: reading all of them again finds
// little that is new.
static bool mostly_runs(const struct udd_layout *layout)
{
	return layout->read_cost > LAYOUT_DEAR_NS && layout->runs > layout->mappings / 4 &&
	       layout->mappings < udd_live()->vma_limit / 4 * 3;
}

// Only if it has changed, and no more often than it is worth.
static bool layout_is_due(const struct udd_layout *layout)
{
	uint64_t age = udd_now() - layout->read_at;
	uint64_t share = mostly_runs(layout) ? LAYOUT_OWN_SHARE : LAYOUT_SHARE;

	if (age < layout->read_cost * share)
		return false;
	return __atomic_load_n(&udd_live()->mapped, __ATOMIC_RELAXED) || udd_live()->stale_count || layout->stale ||
	       age > LAYOUT_AGE_S * 1000000000UL;
}

void udd_refresh_layout(void)
{
	struct udd_layout *layout = &udd_agent.layout;
	struct udd_stats *stats = udd_live()->stats;
	uint64_t started;

	if (!layout_is_due(layout))
		return;
	// What changes while smaps is being read must stay stale, so what is pending is taken in before, and nothing after.
	if (!udd_worker_lock(&started))
		return;
	__atomic_store_n(&udd_live()->mapped, 0, __ATOMIC_RELAXED);
	udd_layout_note_files(layout);
	udd_look_for_handlers();
	udd_worker_unlock(started);
	udd_layout_read(layout, udd_agent.arena);
	udd_marks_sweep(&udd_agent.marks, layout);
	__atomic_store_n(&stats->vmas, layout->mappings, __ATOMIC_RELAXED);
	__atomic_store_n(&stats->managed_pages, udd_pages(layout->present), __ATOMIC_RELAXED);
}

// Copies `pages` pages from `address` to slot `at` of the copy area. Returns how many could be.
static uint32_t copy_out(const struct udd_scan_state *state, uint64_t address, uint64_t pages, uint32_t at)
{
	long got = udd_sys(SYS_pwrite64, state->shared_fd, address, udd_bytes(pages), UDD_SHARED_COPY + udd_bytes(at));

	return udd_failed(got) ? 0 : (uint32_t)udd_pages((uint64_t)got);
}

// Present pages of `span` that are not zero-mapped, and a file's if that is what it is, else not a file's. Returns the number
// of regions, each with PAGE_IS_HUGE among its categories or without; *end is how far it looked.
static long find_present(struct udd_span span, uint64_t pages, bool file, struct page_region *regions, uint64_t *end)
{
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = span.start,
		.end = span.end,
		.vec = (uint64_t)(uintptr_t)regions,
		.vec_len = REGIONS,
		.max_pages = pages,
		.category_inverted = PAGE_IS_PFNZERO | (file ? 0 : PAGE_IS_FILE),
		.category_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO | PAGE_IS_FILE,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE,
	};
	long ret = udd_sys(SYS_ioctl, udd_fault_pagemap(), PAGEMAP_SCAN, &arg);

	*end = udd_failed(ret) ? span.end : arg.walk_end;
	return udd_failed(ret) ? 0 : ret;
}

// Gives a stretch of pages that were zero a moment ago to the kernel's zero page.
static uint32_t merge_zeros(const uint64_t *addresses, uint32_t count)
{
	struct udd_span span = {addresses[0], addresses[0] + udd_bytes(count)};
	uint64_t zero = udd_merge_zero(span);

	for (uint32_t i = 0; i < count; i++) {
		uint32_t *mark = zero >> i & 1 ? udd_mark(&udd_agent.marks, addresses[i]) : NULL;

		if (mark)
			udd_mark_set(&udd_agent.marks, mark, UDD_MARK_ZERO);
	}
	return (uint32_t)__builtin_popcountll(zero);
}

static void merge_zero_pages(const uint64_t *addresses, uint32_t count, struct udd_reports *ret)
{
	uint32_t from = 0;

	for (uint32_t i = 1; i <= count; i++) {
		if (i < count && i - from < UDD_RUN_MAX && addresses[i] == addresses[i - 1] + UDD_PAGE_SIZE)
			continue;
		ret->zero += merge_zeros(addresses + from, i - from);
		from = i;
	}
}

// Where the part of a page begins that is looked at first: what changes may be at the same place everywhere.
static uint64_t part_of(uint64_t address)
{
	return udd_pages(address) * 0x9E3779B97F4A7C15 >> 32 & (UDD_PAGE_SIZE - PART);
}

static uint32_t mark_of_part(const char *part)
{
	return udd_mark_of_part(udd_digest_part(part, PART));
}

// Is the page to be reported though nobody knows yet whether it keeps still?
static bool first_sight(const struct udd_scan_state *state, const uint32_t *mark)
{
	return state->flags & UDD_CONFIG_FIRST_SIGHT && mark && *mark == UDD_MARK_NONE;
}

// Does this look at a page begin with a part of it?
static bool wants_part(const struct udd_scan_state *state, const uint32_t *mark)
{
	return !mark || (udd_mark_age(*mark) == 0 && !first_sight(state, mark));
}

static void keep_page(struct batch *batch, uint32_t *kept, uint32_t i)
{
	uint64_t huge = batch->huge >> i & 1;

	batch->addresses[*kept] = batch->addresses[i];
	batch->huge = (batch->huge & ~(1UL << *kept)) | huge << *kept;
	++*kept;
}

// Takes those pages out of the batch that a look at a part of them settles: they are new, or have changed.
static void look_at_parts(struct udd_scan_state *state, struct batch *batch, struct udd_reports *ret)
{
	const char *parts = state->copy + udd_bytes(batch->first);
	struct iovec vector[BATCH];
	uint32_t wanted = 0;
	uint32_t kept = 0;
	uint32_t got;
	long bytes;

	for (uint32_t i = 0; i < batch->count; i++) {
		uint64_t address = batch->addresses[i];

		if (wants_part(state, udd_mark(&udd_agent.marks, address)))
			vector[wanted++] = (struct iovec){udd_pointer(address + part_of(address)), PART};
	}
	if (wanted == 0)
		return;
	bytes = udd_sys(SYS_pwritev, state->shared_fd, vector, wanted, UDD_SHARED_COPY + udd_bytes(batch->first), 0);
	got = udd_failed(bytes) ? 0 : (uint32_t)bytes / PART;
	for (uint32_t i = 0, part = 0; i < batch->count; i++) {
		uint32_t *mark = udd_mark(&udd_agent.marks, batch->addresses[i]);
		uint32_t value;

		if (!wants_part(state, mark)) {
			keep_page(batch, &kept, i);
			continue;
		}
		// What can't be read ends the batch's parts: those behind it wait for the next round.
		if (part == got)
			continue;
		value = mark_of_part(parts + part++ * PART);
		if (mark && udd_mark_has_part(*mark, value)) {
			keep_page(batch, &kept, i);
			continue;
		}
		if (mark)
			udd_mark_set(&udd_agent.marks, mark, udd_mark_after_change(*mark, value));
		ret->visited++;
		ret->changed++;
	}
	batch->count = kept;
}

// Copies the pages of the batch out; those that can't be are dropped.
static void copy_batch(const struct udd_scan_state *state, struct batch *batch)
{
	uint32_t kept = 0;

	for (uint32_t from = 0, to; from < batch->count; from = to) {
		uint32_t got;

		for (to = from + 1; to < batch->count && batch->addresses[to] == batch->addresses[to - 1] + UDD_PAGE_SIZE;)
			to++;
		got = copy_out(state, batch->addresses[from], to - from, batch->first + kept);
		for (uint32_t i = from; i < from + got; i++)
			keep_page(batch, &kept, i);
	}
	batch->count = kept;
}

// Hashes the batch and reports what is worth looking up.
static void report_batch(struct udd_scan_state *state, const struct batch *batch, bool hinted, struct udd_reports *ret,
			 struct udd_report *reports)
{
	static const char zeros[UDD_PAGE_SIZE];
	// The engine decides which huge pages are worth splitting.
	uint64_t kept_zeros = state->flags & UDD_CONFIG_KEEP_HUGE && !state->split ? batch->huge : 0;
	uint64_t zero_addresses[BATCH];
	uint32_t zero_count = 0;

	for (uint32_t i = 0; i < batch->count; i++) {
		const char *page = state->copy + udd_bytes(batch->first + i);
		struct udd_digest digest = udd_digest_page(page);
		uint32_t *mark = udd_mark(&udd_agent.marks, batch->addresses[i]);
		uint32_t value = udd_mark_of(digest.low);
		// Without a mark only what is hinted, or a file's, comes here; with one of a part, that was the same a moment ago.
		bool kept = hinted || batch->file || udd_mark_age(*mark) == 0 || udd_mark_has(*mark, value);
		bool zero = page[0] == 0 && memcmp(page, zeros, UDD_PAGE_SIZE) == 0;

		ret->visited++;
		if (mark)
			udd_mark_set(&udd_agent.marks, mark,
				     kept ? udd_mark_after(*mark, value)
					  : udd_mark_after_change(*mark, mark_of_part(page + part_of(batch->addresses[i]))));
		if (!kept) {
			ret->changed++;
		} else if (zero && (batch->file || !(state->flags & UDD_CONFIG_ZERO_PAGES))) {
			continue;
		} else if (zero && !(kept_zeros >> i & 1)) {
			zero_addresses[zero_count++] = batch->addresses[i];
		} else {
			// The next batch leaves what is reported where it is; what is not, it overwrites: that is still in the cache.
			state->copies = batch->first + i + 1;
			reports[ret->header.count++] = (struct udd_report){
				.address = batch->addresses[i],
				.digest = {digest.low, digest.high},
				.flags = (hinted ? UDD_REPORT_HINTED : 0) | (zero ? UDD_REPORT_ZERO : 0) |
					 (mark ? udd_mark_skips(*mark) : 0) << UDD_REPORT_SKIPS_SHIFT |
					 (uint64_t)state->copies << UDD_REPORT_COPY_SHIFT,
			};
		}
	}
	if (zero_count)
		merge_zero_pages(zero_addresses, zero_count, ret);
	__atomic_store_n(&udd_live()->stats->zero_pages, udd_agent.marks.zero_pages, __ATOMIC_RELAXED);
}

// The next part of `region` without pages to pass over, which are counted in `skipped`; takes both from the region.
static bool next_part(struct udd_span *region, bool smart, struct udd_span *ret, uint64_t *skipped)
{
	ret->start = ret->end = region->start;
	while (region->start < region->end) {
		uint32_t *mark = smart ? udd_mark(&udd_agent.marks, region->start) : NULL;
		bool skip = mark && udd_mark_skip(mark);

		region->start += UDD_PAGE_SIZE;
		*skipped += skip;
		if (!skip)
			ret->end = region->start;
		else if (ret->end > ret->start)
			break;
		else
			ret->start = ret->end = region->start;
	}
	return ret->end > ret->start;
}

static void take_in(struct udd_span part, bool huge, struct batch *batch)
{
	for (; part.start < part.end; part.start += UDD_PAGE_SIZE) {
		if (huge)
			batch->huge |= 1UL << batch->count;
		batch->addresses[batch->count++] = part.start;
	}
}

// The first part of `span` that is not merged; empty if what is merged comes first, and then it ends where that does. To the
// kernel, merged pages are a file's too.
static struct udd_span first_unmerged(struct udd_span span)
{
	struct udd_lock *lock = &udd_live()->lock;
	const struct udd_run_entry *run;

	udd_lock_shared(lock);
	run = udd_runs_first(&udd_agent.runs, span);
	if (run && run->address <= span.start)
		span.start = span.end = udd_min(span.end, udd_run_span(run).end);
	else if (run)
		span.end = run->address;
	udd_unlock_shared(lock);
	return span;
}

// Looks at up to `pages` present pages of `span`, which lies in one candidate. Returns how far it came.
static uint64_t look_at(struct udd_scan_state *state, struct udd_span span, bool file, uint32_t pages, bool hinted,
			struct udd_reports *ret, struct udd_report *reports)
{
	struct page_region regions[REGIONS];
	struct batch batch = {.first = state->copies, .file = file};
	uint64_t end;
	bool smart = !hinted && state->flags & UDD_CONFIG_SMART_SCAN;
	long found;

	if (file && udd_span_empty(span = first_unmerged(span)))
		return span.end;
	found = find_present(span, udd_min(pages, BATCH), file, regions, &end);

	for (long i = 0; i < found; i++) {
		struct udd_span region = {regions[i].start, regions[i].end};

		for (struct udd_span part; next_part(&region, smart, &part, &ret->header.value);)
			take_in(part, regions[i].categories & PAGE_IS_HUGE, &batch);
	}
	// A file's pages don't change.
	if (!hinted && !file)
		look_at_parts(state, &batch, ret);
	copy_batch(state, &batch);
	report_batch(state, &batch, hinted, ret, reports);
	return end;
}

void udd_scan(struct udd_scan_state *state, uint32_t pages, struct udd_reports *ret, struct udd_report *reports)
{
	uint32_t budget = (uint32_t)udd_min(pages, UDD_SCAN_MAX);

	state->copies = 0;
	if (state->cursor == 0)
		udd_refresh_layout();
	while (state->copies < UDD_COPY_SLOTS && ret->visited + ret->header.value / UDD_SKIPS_PER_VISIT < budget) {
		const struct udd_candidate *candidate = udd_layout_find(&udd_agent.layout, state->cursor);
		struct udd_span span;

		if (!candidate) {
			state->cursor = 0;
			ret->wrapped = 1;
			return;
		}
		span = (struct udd_span){udd_max(state->cursor, candidate->start), candidate->end};
		// Where merged memory is in use again, the next reading of the layout says so in time for a linear scan.
		state->cursor = candidate->stale || candidate->merged
					? candidate->end
					: look_at(state, span, candidate->file,
						  udd_min(budget - ret->visited, UDD_COPY_SLOTS - state->copies), false, ret,
						  reports);
	}
}

static void visit_range(struct udd_scan_state *state, struct udd_span span, struct udd_reports *ret, struct udd_report *reports)
{
	while (span.start < span.end && ret->visited < UDD_REPORTS_MAX) {
		const struct udd_candidate *candidate = udd_layout_find(&udd_agent.layout, span.start);
		struct udd_span inside;

		if (!candidate || candidate->start >= span.end)
			return;
		inside = udd_span_clip(span, (struct udd_span){candidate->start, candidate->end});
		span.start = candidate->stale ? candidate->end
					      : look_at(state, inside, candidate->file, UDD_REPORTS_MAX - ret->visited, true, ret, reports);
	}
}

// Does the layout know all of this memory? A hint may be about a mapping that is younger.
static bool known(struct udd_span span)
{
	const struct udd_candidate *candidate = udd_layout_find(&udd_agent.layout, span.start);

	return candidate && !candidate->stale && candidate->start <= span.start && span.end <= candidate->end;
}

void udd_refresh_layout_of(struct udd_span span)
{
	if (!known(span))
		udd_refresh_layout();
}

void udd_visit(struct udd_scan_state *state, const struct udd_range *ranges, uint32_t count, struct udd_reports *ret,
	       struct udd_report *reports)
{
	state->copies = 0;
	for (uint32_t i = 0; i < count; i++) {
		struct udd_span span = {udd_page_down(ranges[i].address),
					udd_page_down(ranges[i].address) + udd_bytes(udd_min(ranges[i].pages, UDD_REPORTS_MAX))};

		udd_refresh_layout_of(span);
		visit_range(state, span, ret, reports);
	}
}

void udd_find_huge(const uint64_t *addresses, uint32_t count, uint64_t huge[UDD_ITEMS_MAX / 64])
{
	memset(huge, 0, UDD_ITEMS_MAX / 8);
	for (uint32_t i = 0; i < count; i++) {
		struct udd_span page = {udd_page_down(addresses[i]), udd_page_down(addresses[i]) + UDD_PAGE_SIZE};
		struct page_region regions[REGIONS];
		uint64_t end;

		if (find_present(page, 1, false, regions, &end) == 1 && regions[0].categories & PAGE_IS_HUGE)
			huge[i / 64] |= 1UL << i % 64;
	}
}

void udd_copy(struct udd_scan_state *state, const struct udd_range *ranges, uint32_t count, uint64_t valid[UDD_COPY_WORDS])
{
	uint32_t at = 0;

	memset(valid, 0, UDD_COPY_WORDS * sizeof(*valid));
	for (uint32_t i = 0; i < count && at < UDD_COPY_MAX; i++) {
		uint64_t pages = udd_min(ranges[i].pages, UDD_COPY_MAX - at);
		uint32_t got = copy_out(state, udd_page_down(ranges[i].address), pages, at);

		for (uint32_t page = at; page < at + got; page++)
			valid[page / 64] |= 1UL << page % 64;
		at += (uint32_t)pages;
	}
}
