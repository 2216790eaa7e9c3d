// SPDX-License-Identifier: MIT
// The index of one trust domain: digest → store slot, and digest → candidate.
//
// Both are open-addressing tables of 24-byte entries with linear probing and backward-shift deletion (no tombstones, so that
// ageing costs nothing later). A table grows by 1.4 when four fifths are in use: 30 to 42 bytes an entry. The place of a digest
// depends on a secret, because digests come from agents, and one that could choose where its entries land could make every
// look-up slow.
//
// Candidates that nobody looks at any more, because their pages are parked (see store.c), are in a table of their own.
//
// The index does not know whether a candidate still has the content it had; merges are verified where the page lives.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "../common/digest.h"
#include "engine.h"

enum {
	PAGE_BITS = 35, // page numbers below 2^47
	STAMP_BITS = 9,
	STAMP_MASK = 511,
	STALE_ROUNDS = 3,
	INITIAL_CAPACITY = 1024,
	PREFETCH_DISTANCE = 8,
};

struct entry {
	uint64_t low;
	uint64_t high;
	uint64_t value; // 0: free
};

struct table {
	struct entry *entries;
	size_t capacity;
	size_t count;
};

struct agent_state {
	uint32_t round;
	uint32_t count; // candidates in the table
	uint32_t limit;
};

struct udd_index {
	struct table candidates; // value: agent number, page number, low bits of the agent's round
	struct table parked;     // candidates that don't age: no digest is in both. Value: likewise, without the round
	struct table shared;     // value: segment, slot
	size_t most;             // candidates that are not parked
	uint64_t secret[2];
	struct agent_state *agents; // by number
	uint32_t agents_capacity;
	struct udd_digest zero; // of the zero page: agents merge those by themselves
};

// `round`: the last one in which the candidate will have been confirmed.
static uint64_t candidate_value(uint32_t agent, uint64_t address, uint32_t round)
{
	return (uint64_t)agent << (PAGE_BITS + STAMP_BITS) | address >> UDD_PAGE_SHIFT << STAMP_BITS | (round & STAMP_MASK);
}

static uint32_t candidate_agent(uint64_t value)
{
	return value >> (PAGE_BITS + STAMP_BITS);
}

static uint64_t candidate_address(uint64_t value)
{
	return (value >> STAMP_BITS & ((1ULL << PAGE_BITS) - 1)) << UDD_PAGE_SHIFT;
}

static int entry_is(const struct entry *entry, uint32_t agent, uint64_t address)
{
	return candidate_agent(entry->value) == agent && candidate_address(entry->value) == address;
}

static size_t table_home(const struct udd_index *index, const struct table *table, uint64_t low, uint64_t high)
{
	unsigned __int128 mixed = (unsigned __int128)(low ^ index->secret[0]) * (high ^ index->secret[1]);
	uint64_t hash = (uint64_t)mixed ^ (uint64_t)(mixed >> 64);

	return (unsigned __int128)hash * table->capacity >> 64;
}

static size_t table_next(const struct table *table, size_t i)
{
	return i + 1 == table->capacity ? 0 : i + 1;
}

static int table_init(struct table *table, size_t capacity)
{
	// mmap, not malloc: what a table leaves behind when it grows must go back to the system.
	void *entries = mmap(NULL, capacity * sizeof(struct entry), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (entries == MAP_FAILED)
		return -errno;
	table->entries = entries;
	table->capacity = capacity;
	table->count = 0;
	return 0;
}

static void table_deinit(struct table *table)
{
	if (table->entries)
		munmap(table->entries, table->capacity * sizeof(struct entry));
	table->entries = NULL;
}

// The entry of a digest, or the free entry where it would go.
static struct entry *table_slot(const struct udd_index *index, const struct table *table, uint64_t low, uint64_t high)
{
	size_t i = table_home(index, table, low, high);

	while (table->entries[i].value && (table->entries[i].low != low || table->entries[i].high != high))
		i = table_next(table, i);
	return &table->entries[i];
}

static int table_resize(const struct udd_index *index, struct table *table, size_t capacity)
{
	struct table bigger;
	int r = table_init(&bigger, capacity);

	if (r < 0)
		return r;
	for (size_t i = 0; i < table->capacity; i++) {
		const struct entry *entry = &table->entries[i];

		if (entry->value)
			*table_slot(index, &bigger, entry->low, entry->high) = *entry;
	}
	bigger.count = table->count;
	table_deinit(table);
	*table = bigger;
	return 0;
}

// Makes room for one more entry.
static int table_reserve(const struct udd_index *index, struct table *table)
{
	if (table->count + 1 <= table->capacity / 5 * 4)
		return 0;
	return table_resize(index, table, table->capacity + table->capacity / 5 * 2);
}

static void table_remove(const struct udd_index *index, struct table *table, struct entry *entry)
{
	size_t hole = entry - table->entries;

	for (size_t i = table_next(table, hole); table->entries[i].value; i = table_next(table, i)) {
		size_t home = table_home(index, table, table->entries[i].low, table->entries[i].high);
		// Distances from the entry's home, going round the end of the table.
		size_t to_hole = hole >= home ? hole - home : hole + table->capacity - home;
		size_t to_entry = i >= home ? i - home : i + table->capacity - home;

		if (to_hole <= to_entry) {
			table->entries[hole] = table->entries[i];
			hole = i;
		}
	}
	table->entries[hole].value = 0;
	table->count--;
}

// After many removals: gives memory back. Failing to is harmless.
static void table_shrink(const struct udd_index *index, struct table *table)
{
	size_t wanted = table->count + table->count / 2;

	if (wanted < INITIAL_CAPACITY)
		wanted = INITIAL_CAPACITY;
	if (table->capacity > 2 * wanted)
		table_resize(index, table, wanted);
}

struct udd_index *udd_index_create(void)
{
	static const char zero_page[UDD_PAGE_SIZE];
	struct udd_index *index = calloc(1, sizeof(*index));

	if (!index)
		return NULL;
	if (table_init(&index->candidates, INITIAL_CAPACITY) < 0 || table_init(&index->parked, INITIAL_CAPACITY) < 0 ||
	    table_init(&index->shared, INITIAL_CAPACITY) < 0 ||
	    getrandom(index->secret, sizeof(index->secret), 0) != sizeof(index->secret)) {
		udd_index_destroy(index);
		return NULL;
	}
	index->zero = udd_digest_page(zero_page);
	index->most = SIZE_MAX;
	return index;
}

void udd_index_destroy(struct udd_index *index)
{
	table_deinit(&index->candidates);
	table_deinit(&index->parked);
	table_deinit(&index->shared);
	free(index->agents);
	free(index);
}

size_t udd_index_candidates(const struct udd_index *index)
{
	return index->candidates.count + index->parked.count;
}

size_t udd_index_shared(const struct udd_index *index)
{
	return index->shared.count;
}

size_t udd_index_bytes(const struct udd_index *index)
{
	return (index->candidates.capacity + index->parked.capacity + index->shared.capacity) * sizeof(struct entry) +
	       index->agents_capacity * sizeof(struct agent_state);
}

int udd_index_set_limit(struct udd_index *index, uint32_t agent, uint32_t limit)
{
	if (agent == 0 || agent >= UDD_AGENT_NUMBERS)
		return -EINVAL;
	if (agent >= index->agents_capacity) {
		uint32_t capacity = agent + agent / 2 + 16;
		struct agent_state *agents = realloc(index->agents, capacity * sizeof(*agents));

		if (!agents)
			return -ENOMEM;
		memset(agents + index->agents_capacity, 0, (capacity - index->agents_capacity) * sizeof(*agents));
		index->agents = agents;
		index->agents_capacity = capacity;
	}
	index->agents[agent].limit = limit;
	return 0;
}

void udd_index_set_most(struct udd_index *index, size_t candidates)
{
	index->most = candidates;
}

// Rounds in which the agent will not look at the page.
static uint32_t report_skips(const struct udd_report *report)
{
	uint32_t skips = report->flags >> UDD_REPORT_SKIPS_SHIFT & 0xff;

	return skips < UDD_SKIPS_MAX ? skips : UDD_SKIPS_MAX;
}

static int index_insert_candidate(struct udd_index *index, struct agent_state *state, uint32_t agent,
				  const struct udd_report *report)
{
	int r = table_reserve(index, &index->candidates);

	if (r < 0)
		return r;
	*table_slot(index, &index->candidates, report->digest[0], report->digest[1]) = (struct entry){
		.low = report->digest[0],
		.high = report->digest[1],
		.value = candidate_value(agent, report->address, state->round + report_skips(report)),
	};
	index->candidates.count++;
	state->count++;
	return 0;
}

static void index_prefetch(const struct udd_index *index, const struct udd_report *report)
{
	uint64_t low = report->digest[0], high = report->digest[1];

	__builtin_prefetch(&index->shared.entries[table_home(index, &index->shared, low, high)]);
	__builtin_prefetch(&index->candidates.entries[table_home(index, &index->candidates, low, high)]);
}

// The candidate with a digest, parked or not, or the free entry where it would go.
static struct entry *index_candidate(const struct udd_index *index, uint64_t low, uint64_t high)
{
	struct entry *entry = table_slot(index, &index->parked, low, high);

	return entry->value ? entry : table_slot(index, &index->candidates, low, high);
}

static int index_is_parked(const struct udd_index *index, const struct entry *entry)
{
	return entry >= index->parked.entries && entry < index->parked.entries + index->parked.capacity;
}

static void index_remove_candidate(struct udd_index *index, struct entry *entry)
{
	index->agents[candidate_agent(entry->value)].count--;
	table_remove(index, index_is_parked(index, entry) ? &index->parked : &index->candidates, entry);
}

int udd_index_lookup(struct udd_index *index, uint32_t agent, const struct udd_report *reports, size_t count,
		     enum udd_alone alone, struct udd_match *ret_matches, struct udd_lookup_counts *ret)
{
	int matches = 0;

	if (agent == 0 || agent >= index->agents_capacity)
		return -EINVAL;
	struct agent_state *state = &index->agents[agent];

	for (size_t i = 0; i < count; i++) {
		const struct udd_report *report = &reports[i];
		uint64_t low = report->digest[0], high = report->digest[1];

		if (i + PREFETCH_DISTANCE < count)
			index_prefetch(index, &reports[i + PREFETCH_DISTANCE]);
		uint32_t copy = report->flags >> UDD_REPORT_COPY_SHIFT & 0xffff;

		if (report->address % UDD_PAGE_SIZE || report->address >> (PAGE_BITS + UDD_PAGE_SHIFT) || copy > UDD_COPY_SLOTS)
			return -EPROTO;
		if (report->flags & UDD_REPORT_MERGED) {
			ret->merged++;
			continue;
		}
		// Turned to zero between the agent's look and its hashing.
		if (low == index->zero.low && high == index->zero.high)
			continue;

		if (table_slot(index, &index->shared, low, high)->value) {
			ret->shared++;
			ret_matches[matches++] = (struct udd_match){.address = report->address, .digest = {low, high}};
			continue;
		}
		struct entry *entry = index_candidate(index, low, high);
		int own = entry_is(entry, agent, report->address);
		struct udd_match match = {
			.address = report->address,
			.digest = {low, high},
			.other = entry->value ? candidate_agent(entry->value) : agent,
			.copy = copy,
			.other_address = entry->value ? candidate_address(entry->value) : report->address,
		};

		if (entry->value && !own) {
			ret->candidates++;
			ret_matches[matches++] = match;
			continue;
		}
		if (alone != UDD_ALONE_CANDIDATE) {
			ret->alone++;
			ret_matches[matches++] = match;
		}
		// Left there, a page that is shared alone would be found as its own older twin; and one that was parked no longer is.
		if (own && (alone == UDD_ALONE_SHARE || index_is_parked(index, entry))) {
			index_remove_candidate(index, entry);
			own = 0;
		}
		if (alone == UDD_ALONE_SHARE)
			continue;
		if (own) {
			entry->value = candidate_value(agent, report->address, state->round + report_skips(report));
			ret->own++;
			continue;
		}
		if (state->count >= state->limit || index->candidates.count >= index->most) {
			ret->refused++;
			continue;
		}
		int r = index_insert_candidate(index, state, agent, report);

		if (r < 0)
			return r;
		ret->inserted++;
	}
	return matches;
}

void udd_index_next_round(struct udd_index *index, uint32_t agent)
{
	if (agent < index->agents_capacity)
		index->agents[agent].round++;
}

// Removes an agent's candidates; 0: all that are stale.
static size_t index_sweep(struct udd_index *index, struct table *table, uint32_t agent)
{
	size_t removed = 0;

	for (size_t i = 0; i < table->capacity; i++) {
		struct entry *entry = &table->entries[i];

		// A removal may move a later entry here.
		while (entry->value) {
			struct agent_state *state = &index->agents[candidate_agent(entry->value)];

			if (agent ? candidate_agent(entry->value) != agent
				  : ((state->round + UDD_SKIPS_MAX - entry->value) & STAMP_MASK) < STALE_ROUNDS + UDD_SKIPS_MAX)
				break;
			state->count--;
			table_remove(index, table, entry);
			removed++;
		}
	}
	table_shrink(index, table);
	return removed;
}

size_t udd_index_age(struct udd_index *index)
{
	return index_sweep(index, &index->candidates, 0);
}

size_t udd_index_forget_agent(struct udd_index *index, uint32_t agent)
{
	if (agent == 0 || agent >= index->agents_capacity)
		return 0;
	size_t removed = 0;

	if (index->agents[agent].count)
		removed = index_sweep(index, &index->candidates, agent) + index_sweep(index, &index->parked, agent);
	index->agents[agent] = (struct agent_state){0};
	return removed;
}

size_t udd_index_forget_candidates(struct udd_index *index)
{
	struct table *table = &index->candidates;
	size_t removed = table->count;

	for (size_t i = 0; i < table->capacity; i++) {
		if (table->entries[i].value)
			index->agents[candidate_agent(table->entries[i].value)].count--;
	}
	memset(table->entries, 0, table->capacity * sizeof(struct entry));
	table->count = 0;
	table_shrink(index, table);
	return removed;
}

int udd_index_take_candidate(struct udd_index *index, const uint64_t *digest, uint32_t *ret_agent, uint64_t *ret_address)
{
	struct entry *entry = index_candidate(index, digest[0], digest[1]);

	if (!entry->value)
		return 0;
	*ret_agent = candidate_agent(entry->value);
	*ret_address = candidate_address(entry->value);
	index_remove_candidate(index, entry);
	return 1;
}

int udd_index_park(struct udd_index *index, const uint64_t *digest, uint32_t agent, uint64_t address)
{
	int r = table_reserve(index, &index->parked);
	struct entry *entry = index_candidate(index, digest[0], digest[1]);

	if (r < 0 || agent >= index->agents_capacity)
		return r;
	if (entry->value && (!entry_is(entry, agent, address) || index_is_parked(index, entry)))
		return 0;
	if (entry->value)
		index_remove_candidate(index, entry);
	if (index->agents[agent].count >= index->agents[agent].limit)
		return 0;
	*table_slot(index, &index->parked, digest[0], digest[1]) = (struct entry){
		.low = digest[0],
		.high = digest[1],
		.value = candidate_value(agent, address, 0),
	};
	index->parked.count++;
	index->agents[agent].count++;
	return 0;
}

void udd_index_unpark(struct udd_index *index, const uint64_t *digest, uint32_t agent, uint64_t address)
{
	struct entry *entry = table_slot(index, &index->parked, digest[0], digest[1]);

	if (entry_is(entry, agent, address))
		index_remove_candidate(index, entry);
}

int udd_index_publish(struct udd_index *index, const uint64_t *digest, uint32_t segment, uint32_t slot)
{
	int r = table_reserve(index, &index->shared);

	if (r < 0)
		return r;
	struct entry *entry = table_slot(index, &index->shared, digest[0], digest[1]);

	if (!entry->value)
		index->shared.count++;
	*entry = (struct entry){.low = digest[0], .high = digest[1], .value = (uint64_t)segment << 32 | slot};
	return 0;
}

int udd_index_find_shared(const struct udd_index *index, const uint64_t *digest, uint32_t *ret_segment, uint32_t *ret_slot)
{
	const struct entry *entry = table_slot(index, &index->shared, digest[0], digest[1]);

	if (!entry->value)
		return 0;
	*ret_segment = entry->value >> 32;
	*ret_slot = (uint32_t)entry->value;
	return 1;
}

size_t udd_index_forget_segment(struct udd_index *index, uint32_t segment)
{
	struct table *table = &index->shared;
	size_t removed = 0;

	for (size_t i = 0; i < table->capacity; i++) {
		struct entry *entry = &table->entries[i];

		while (entry->value && entry->value >> 32 == segment) {
			table_remove(index, table, entry);
			removed++;
		}
	}
	table_shrink(index, table);
	return removed;
}
