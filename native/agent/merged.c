// SPDX-License-Identifier: MIT
#include "merged.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "commit.h"
#include "rings.h"
#include "sys.h"

enum {
	POPULATE_FROM = 4 * UDD_PAGE_SIZE, // bytes from which populating pays
};

void udd_publish_runs(void)
{
	__atomic_store_n(&udd_live()->stats->runs, udd_agent.runs.count, __ATOMIC_RELAXED);
}

void udd_count_merged(int64_t pages)
{
	__atomic_add_fetch(&udd_live()->stats->pages_merged, (uint64_t)pages, __ATOMIC_RELAXED);
}

// Lets go of the store's pages that a run refers to.
void udd_release_run(const struct udd_run_entry *run, uint32_t reason)
{
	struct udd_segment_map *segment = udd_segment_of(run);

	if (run->broken)
		return;
	segment->references -= run->pages;
	udd_count_merged(-(int64_t)run->pages);
	udd_drop_push(run, segment, reason);
}

// Takes the runs of `span`, which ends on run borders, out of the table.
void udd_remove_runs(struct udd_span span)
{
	const struct udd_runs *runs = &udd_agent.runs;

	udd_agent.run_pages -= udd_runs_pages(runs, span);
	udd_runs_remove(&udd_agent.runs, span);
}

void udd_insert_run(const struct udd_run_entry *run)
{
	udd_agent.run_pages += run->pages;
	udd_runs_insert(&udd_agent.runs, run);
}

// The first of the runs inside a span, split at its ends; the others follow by udd_runs_next_in().
struct udd_run_entry *udd_first_run(struct udd_span span)
{
	udd_runs_split(&udd_agent.runs, span);
	return udd_runs_first(&udd_agent.runs, span);
}

// However the application cuts merged memory up, it can't make more runs than there are pages: so with that much room,
// splitting never fails, in whatever hook it happens.
int udd_reserve_runs(uint32_t more)
{
	enum { SPARE = 16 };

	return udd_runs_reserve(&udd_agent.runs, udd_agent.run_pages + more + SPARE);
}

void udd_forget(struct udd_span span)
{
	for (const struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span)) {
		udd_release_run(run, 0);
		udd_file_put(run->file, run->pages);
	}
	udd_remove_runs(span);
	udd_publish_runs();
}

void udd_count_breaks(uint64_t pages, uint64_t events)
{
	struct udd_stats *stats = udd_live()->stats;

	__atomic_add_fetch(&stats->break_events, events, __ATOMIC_RELAXED);
	__atomic_add_fetch(&stats->break_pages, pages, __ATOMIC_RELAXED);
	udd_test_count(UDD_TEST_BROKEN, pages);
}

void udd_broke_in_place(struct udd_span span)
{
	for (struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span)) {
		udd_release_run(run, UDD_DROP_BREAK);
		run->broken = 1;
	}
	udd_publish_runs();
}

// While the engine is being told of all runs, a part at a time, they are known by their address: one that moves across the border
// would be given back although it was never counted, or counted twice.
static void cut_count_short(uint64_t from, uint64_t to)
{
	struct udd_live *live = udd_live();
	uint64_t border = live->reported;
	// It may have joined a neighbour that lies across.
	struct udd_span now = udd_run_span(udd_runs_find(&udd_agent.runs, to));

	if (!border || border == UINT64_MAX || ((from < border) == (now.start < border) && (now.start < border) == (now.end <= border)))
		return;
	live->reported = 0;
	__atomic_add_fetch(&live->stats->drops_lost, 1, __ATOMIC_RELAXED);
}

void udd_readdress(struct udd_span from, uint64_t to)
{
	struct udd_run_entry run = *udd_first_run(from);

	udd_remove_runs(from);
	run.address = to;
	run.armed = 0;
	udd_insert_run(&run);
	cut_count_short(from.start, to);
	udd_publish_runs();
	udd_ring(UDD_BELL_ARM);
}

// The next run from `address` on that the child did not get, or NULL.
static const struct udd_run_entry *find_missing(uint64_t address)
{
	const struct udd_run_entry *run = udd_agent.runs.count ? udd_runs_find(&udd_agent.runs, address) : NULL;

	while (run && !(run->attributes & UDD_ATTRIBUTE_DONTFORK))
		run = udd_runs_next(run);
	return run;
}

void udd_runs_forked(void)
{
	const struct udd_runs *runs = &udd_agent.runs;
	const struct udd_run_entry *missing;
	uint64_t at = 0;

	for (struct udd_run_entry *run = runs->count ? udd_runs_find(runs, 0) : NULL; run; run = udd_runs_next(run)) {
		// Neither userfaultfd nor memory locks are inherited.
		run->armed = 0;
		run->attributes &= (uint8_t)~UDD_ATTRIBUTE_LOCKED;
		if (!run->broken)
			udd_count_merged(run->pages);
	}
	while ((missing = find_missing(at))) {
		struct udd_span span = udd_run_span(missing);

		udd_forget(span);
		at = span.end;
	}
	udd_publish_runs();
}

void udd_settle(void)
{
	struct udd_live *live = udd_live();

	while (live->unsettled_head != __atomic_load_n(&live->unsettled_tail, __ATOMIC_ACQUIRE)) {
		const struct udd_unsettled *next = &live->unsettled[live->unsettled_head % UDD_UNSETTLED_SLOTS];

		if (udd_merged_in(next->span)) {
			if (next->removed)
				udd_discard(next->span);
			else
				udd_broke_in_place(next->span);
		}
		__atomic_store_n(&live->unsettled_head, live->unsettled_head + 1, __ATOMIC_RELEASE);
	}
}

// ---- giving back ----

// Gives the new mapping at `span` what the application had asked for its old one. Advice that a kernel does not know
// could not have been given before either.
void udd_restore_attributes(struct udd_span span, uint32_t attributes)
{
	static const struct {
		uint32_t attribute;
		int advice;
	} table[] = {
		{UDD_ATTRIBUTE_DONTFORK, MADV_DONTFORK},     {UDD_ATTRIBUTE_DONTDUMP, MADV_DONTDUMP},
		{UDD_ATTRIBUTE_MERGEABLE, MADV_MERGEABLE},   {UDD_ATTRIBUTE_HUGEPAGE, MADV_HUGEPAGE},
		{UDD_ATTRIBUTE_NOHUGEPAGE, MADV_NOHUGEPAGE},
	};

	if (!attributes)
		return;
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (attributes & table[i].attribute)
			udd_sys(SYS_madvise, span.start, span.end - span.start, table[i].advice);
	}
}

// Private copies of some pages, put in their place at once. The runs from `first` on cover the span and are alike.
static int dissolve_piece(const struct udd_run_entry *first, struct udd_span span)
{
	uint64_t bytes = span.end - span.start;
	char *blank = udd_agent.blank + span.start % udd_bytes(UDD_STAGING_PAGES);
	bool plain = first->protection == (PROT_READ | PROT_WRITE);
	long ret;

	// One call instead of a fault for each page; where it fails, the faults come.
	if (bytes > POPULATE_FROM)
		udd_sys(SYS_madvise, blank, bytes, MADV_POPULATE_WRITE);
	for (const struct udd_run_entry *run = first; run; run = udd_runs_next_in(run, span)) {
		struct udd_span part = udd_span_clip(udd_run_span(run), span);

		memcpy(blank + (part.start - span.start), udd_store_page(run) + (part.start - run->address), part.end - part.start);
	}
	if (!plain)
		udd_sys(SYS_mprotect, blank, bytes, first->protection);
	ret = udd_sys(SYS_mremap, blank, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, span.start);
	if (!plain)
		udd_sys(SYS_mprotect, blank, bytes, PROT_READ | PROT_WRITE);
	if (udd_failed(ret))
		return (int)ret;
	udd_agent.dissolved = true;
	udd_restore_attributes(span, first->attributes);
	return 0;
}

static bool dissolvable(const struct udd_run_entry *run)
{
	return !run->broken && run->armed && !(run->attributes & UDD_ATTRIBUTE_LOCKED) && !udd_commit_strict();
}

struct udd_span udd_dissolvable(const struct udd_run_entry *run, struct udd_span span)
{
	// The area that the copies are made in ends at multiples of its size, and a piece must not wrap around there.
	const uint64_t area = udd_bytes(UDD_STAGING_PAGES);
	const struct udd_run_entry *next = run;
	struct udd_span ret = udd_span_clip(udd_run_span(run), span);

	if (!dissolvable(run))
		return (struct udd_span){ret.start, ret.start};
	while ((next = udd_runs_next_in(next, span)) && next->address == ret.end && dissolvable(next) &&
	       next->protection == run->protection && next->attributes == run->attributes)
		ret.end = udd_min(udd_run_span(next).end, span.end);
	ret.end = udd_min(ret.end, ret.start - ret.start % area + area);
	return ret;
}

int udd_dissolve(struct udd_span span, uint32_t reason)
{
	int ret = 0;

	// One piece at a time: taking its runs out of the table moves the others.
	for (uint64_t at = span.start; at < span.end && !ret;) {
		const struct udd_run_entry *run = udd_runs_first(&udd_agent.runs, (struct udd_span){at, span.end});
		struct udd_span piece;

		if (!run)
			break;
		piece = udd_dissolvable(run, (struct udd_span){at, span.end});
		if (udd_span_empty(piece)) {
			at = udd_run_span(run).end;
			continue;
		}
		at = piece.end;
		run = udd_first_run(piece);
		ret = dissolve_piece(run, piece);
		if (ret)
			break;
		for (; run; run = udd_runs_next_in(run, piece))
			udd_release_run(run, reason);
		udd_remove_runs(piece);
	}
	udd_publish_runs();
	return ret;
}

int udd_map_like(const struct udd_run_entry *run, struct udd_span span)
{
	long ret = udd_sys(SYS_mmap, span.start, span.end - span.start, run->protection, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);

	if (udd_failed(ret))
		return (int)ret;
	udd_restore_attributes(span, run->attributes);
	return 0;
}

int udd_discard(struct udd_span span)
{
	for (const struct udd_run_entry *run = udd_first_run(span); run; run = udd_runs_next_in(run, span)) {
		int ret = udd_map_like(run, udd_run_span(run));

		if (ret) {
			// What was replaced so far must leave the table, or it would be replaced again.
			udd_forget((struct udd_span){span.start, run->address});
			return ret;
		}
	}
	udd_test_count(UDD_TEST_DISCARDED, udd_runs_pages(&udd_agent.runs, span));
	udd_forget(span);
	return 0;
}
