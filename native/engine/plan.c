// SPDX-License-Identifier: MIT
// From matches to runs: which pages get a slot, in what order, and which stretches of memory map to stretches of the store.
//
// A mapping costs the same for 1 page and for 64, so everything here serves one aim: what is adjacent in the newcomer's memory
// gets adjacent slots. The older candidate usually has the same layout (the same file, the same heap), so it profits too.
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static int match_compare(const void *left, const void *right)
{
	const struct udd_match *a = left, *b = right;

	return a->address < b->address ? -1 : a->address > b->address;
}

void udd_matches_sort(struct udd_match *matches, size_t count)
{
	for (size_t i = 1; i < count; i++) {
		if (matches[i].address < matches[i - 1].address) {
			qsort(matches, count, sizeof(*matches), match_compare);
			return;
		}
	}
}

size_t udd_matches_without(struct udd_match *matches, size_t count, const struct udd_target *targets, size_t target_count)
{
	size_t kept = 0, t = 0;

	for (size_t i = 0; i < count; i++) {
		while (t < target_count && targets[t].address < matches[i].address)
			t++;
		if (t == target_count || targets[t].address != matches[i].address)
			matches[kept++] = matches[i];
	}
	return kept;
}

size_t udd_matches_without_alone(uint32_t agent, const struct udd_match *matches, size_t count, struct udd_match *ret)
{
	size_t kept = 0;

	for (size_t i = 0; i < count; i++) {
		if (matches[i].other != agent || matches[i].other_address != matches[i].address)
			ret[kept++] = matches[i];
	}
	return kept;
}

size_t udd_matches_outside(uint32_t agent, const struct udd_match *matches, size_t count, const struct udd_run *runs,
			   size_t run_count, struct udd_match *ret)
{
	size_t kept = 0, r = 0;

	for (size_t i = 0; i < count; i++) {
		uint64_t address = matches[i].address;

		while (r < run_count && runs[r].address + (uint64_t)runs[r].pages * UDD_PAGE_SIZE <= address)
			r++;
		if (r < run_count && runs[r].address <= address)
			continue;
		ret[kept] = matches[i];
		ret[kept].other = agent;
		ret[kept++].other_address = address;
	}
	return kept;
}

// End of the stretch of pages, adjacent in memory, that starts at `start` and waits for new slots.
static size_t stretch_end(const struct udd_match *matches, size_t count, size_t start)
{
	size_t end = start + 1;

	while (end < count && matches[end].other && matches[end].address == matches[end - 1].address + UDD_PAGE_SIZE)
		end++;
	return end;
}

// The digests of one batch of fresh pages, to have each once.
struct seen {
	uint16_t buckets[4 * UDD_COPY_MAX]; // index in fresh + 1
	const struct udd_fresh *fresh;
};

static int seen_add(struct seen *seen, const uint64_t *digest, size_t next)
{
	size_t i = (digest[0] ^ digest[1]) % (4 * UDD_COPY_MAX);

	for (; seen->buckets[i]; i = (i + 1) % (4 * UDD_COPY_MAX)) {
		const uint64_t *other = seen->fresh[seen->buckets[i] - 1].digest;

		if (other[0] == digest[0] && other[1] == digest[1])
			return 0;
	}
	seen->buckets[i] = next + 1;
	return 1;
}

size_t udd_plan_fresh(const struct udd_index *index, const struct udd_match *matches, size_t count, uint32_t least, int copied,
		      size_t *position, struct udd_fresh *ret)
{
	struct seen seen = {.fresh = ret};
	size_t fresh = 0;

	while (*position < count && fresh < UDD_COPY_MAX) {
		size_t i = *position;

		if (!matches[i].other) {
			++*position;
			continue;
		}
		// A stretch that an earlier call began is known to be long enough.
		int inside = i > 0 && matches[i - 1].other && matches[i].address == matches[i - 1].address + UDD_PAGE_SIZE;
		size_t end = stretch_end(matches, count, i);

		if (!inside && end - i < least) {
			*position = end;
			continue;
		}
		for (; i < end && fresh < UDD_COPY_MAX; i++) {
			uint32_t segment, slot;

			if ((copied && !matches[i].copy) ||
			    udd_index_find_shared(index, matches[i].digest, &segment, &slot) ||
			    !seen_add(&seen, matches[i].digest, fresh))
				continue;
			ret[fresh++] = (struct udd_fresh){
				.address = matches[i].address,
				.digest = {matches[i].digest[0], matches[i].digest[1]},
				.copy = copied ? matches[i].copy : 0,
			};
		}
		*position = i;
	}
	return fresh;
}

size_t udd_plan_copy(const struct udd_fresh *fresh, size_t count, struct udd_range *ret)
{
	size_t ranges = 0;

	for (size_t i = 0; i < count; i++) {
		if (ranges && ret[ranges - 1].address + ret[ranges - 1].pages * UDD_PAGE_SIZE == fresh[i].address)
			ret[ranges - 1].pages++;
		else
			ret[ranges++] = (struct udd_range){.address = fresh[i].address, .pages = 1};
	}
	return ranges;
}

void udd_plan_copied(struct udd_fresh *fresh, size_t count, const uint64_t *valid)
{
	for (size_t i = 0; i < count; i++)
		fresh[i].copy = valid[i / 64] >> i % 64 & 1 ? i + 1 : 0;
}

size_t udd_plan_targets(const struct udd_index *index, uint32_t agent, const struct udd_match *matches, size_t count,
			struct udd_target *ret)
{
	size_t targets = 0;

	for (size_t i = 0; i < count; i++) {
		struct udd_target *target = &ret[targets];

		*target = (struct udd_target){.address = matches[i].address, .agent = agent};
		if (udd_index_find_shared(index, matches[i].digest, &target->segment, &target->slot))
			targets++;
	}
	return targets;
}

static int target_compare(const void *left, const void *right)
{
	const struct udd_target *a = left, *b = right;

	if (a->agent != b->agent)
		return a->agent < b->agent ? -1 : 1;
	return a->address < b->address ? -1 : a->address > b->address;
}

void udd_targets_sort(struct udd_target *targets, size_t count)
{
	for (size_t i = 1; i < count; i++) {
		if (target_compare(&targets[i - 1], &targets[i]) > 0) {
			qsort(targets, count, sizeof(*targets), target_compare);
			return;
		}
	}
}

size_t udd_target_group(const struct udd_target *targets, size_t count)
{
	size_t i = 0;

	while (i < count && targets[i].agent == targets[0].agent)
		i++;
	return i;
}

static int target_follows(const struct udd_target *previous, const struct udd_target *next)
{
	return next->address == previous->address + UDD_PAGE_SIZE && next->segment == previous->segment &&
	       next->slot == previous->slot + 1;
}

size_t udd_plan_runs(const struct udd_target *targets, size_t count, uint32_t least, struct udd_run *ret, uint64_t *ret_deferred)
{
	size_t runs = 0;

	for (size_t start = 0, end; start < count; start = end) {
		for (end = start + 1; end < count && target_follows(&targets[end - 1], &targets[end]); end++)
			;
		// A page may be asked for twice, when it was reported twice: the first wins.
		if (runs && targets[start].address < ret[runs - 1].address + (uint64_t)ret[runs - 1].pages * UDD_PAGE_SIZE) {
			end = start + 1;
			continue;
		}
		if (end - start < least) {
			*ret_deferred += end - start;
			continue;
		}
		for (size_t i = start; i < end; i += UDD_RUN_MAX) {
			ret[runs++] = (struct udd_run){
				.address = targets[i].address,
				.pages = end - i < UDD_RUN_MAX ? end - i : UDD_RUN_MAX,
				.segment = targets[i].segment,
				.slot = targets[i].slot,
			};
		}
	}
	return runs;
}

static int run_compare(const void *left, const void *right)
{
	const struct udd_run *a = left, *b = right;

	return a->address < b->address ? -1 : a->address > b->address;
}

void udd_runs_sort(struct udd_run *runs, size_t count)
{
	qsort(runs, count, sizeof(*runs), run_compare);
}

size_t udd_run_segments(const struct udd_run *runs, size_t count, uint32_t *ret, size_t max)
{
	size_t segments = 0;

	for (size_t i = 0; i < count; i++) {
		size_t j = 0;

		while (j < segments && j < max && ret[j] != runs[i].segment)
			j++;
		if (j < segments)
			continue;
		if (segments < max)
			ret[segments] = runs[i].segment;
		segments++;
	}
	return segments;
}

size_t udd_plan_moves(uint32_t agent, const struct udd_run *runs, size_t count, uint32_t from, const struct udd_move *moves,
		      struct udd_target *ret, size_t max)
{
	size_t targets = 0;

	for (size_t i = 0; i < count; i++) {
		if (runs[i].segment != from)
			continue;
		for (uint32_t page = 0; page < runs[i].pages && runs[i].slot + page < UDD_SEGMENT_SLOTS && targets < max; page++) {
			const struct udd_move *move = &moves[runs[i].slot + page];

			if (!move->segment)
				continue;
			ret[targets++] = (struct udd_target){
				.address = runs[i].address + (uint64_t)page * UDD_PAGE_SIZE,
				.agent = agent,
				.segment = move->segment,
				.slot = move->slot,
			};
		}
	}
	return targets;
}
