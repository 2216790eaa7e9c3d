// SPDX-License-Identifier: MIT
// The table of runs against an array with one element per page.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "agent/runs.h"
#include "unit.h"

enum {
	PAGES = 4000, // so that the table has many chunks
	STEPS = 20000,
	CHUNKS = 512,
};

static const uint64_t BASE = 0x7f0000000000;

struct page {
	bool mapped;
	uint32_t slot;
	uint16_t segment;
	uint8_t attributes;
	uint8_t protection;
	uint16_t broken;
	uint16_t armed;
};

static struct page model[PAGES];
static struct udd_runs table;

// As in agent.c: a reservation that becomes memory as it is asked for, so that whoever goes beyond is caught.
static void *reserve_memory(size_t bytes)
{
	void *ret = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(ret != MAP_FAILED);
	return ret;
}

static void table_init(struct udd_runs *runs, uint32_t chunks)
{
	*runs = (struct udd_runs){.limit = chunks};
	runs->chunks = reserve_memory(udd_bytes(chunks));
	runs->directory = calloc(chunks, sizeof(*runs->directory));
	check(runs->directory);
}

static void table_deinit(struct udd_runs *runs)
{
	munmap(runs->chunks, udd_bytes(runs->limit));
	free(runs->directory);
}

static uint64_t address_of(uint32_t page)
{
	return BASE + udd_bytes(page);
}

static bool page_equal(uint32_t page, const struct udd_run_entry *run)
{
	const struct page *m = &model[page];

	return m->mapped && m->slot == run->slot + page - udd_pages(run->address - BASE) && m->segment == run->segment &&
	       m->attributes == run->attributes && m->protection == run->protection && m->broken == run->broken &&
	       m->armed == run->armed;
}

static void check_table(void)
{
	const struct udd_run_entry *run = udd_runs_find(&table, 0);
	uint32_t page = 0;
	uint32_t count = 0;

	for (; run; run = udd_runs_next(run), count++) {
		uint32_t first = (uint32_t)udd_pages(run->address - BASE);

		check(run->pages > 0);
		check(first >= page); // sorted, and no overlap
		while (page < first)
			check(!model[page++].mapped);
		check(first + run->pages <= PAGES);
		while (page < first + run->pages) {
			check(page_equal(page, run));
			page++;
		}
	}
	while (page < PAGES)
		check(!model[page++].mapped);
	check(table.count == count);
	// Neighbouring chunks hold at least half a chunk together, which bounds the memory they take.
	check(table.used <= 2 * (count / (UDD_CHUNK_RUNS / 2) + 1) + 1);
}

static void check_find(uint32_t page)
{
	const struct udd_run_entry *run = udd_runs_find(&table, address_of(page) + 4095);
	uint32_t behind = page;

	while (behind < PAGES && !model[behind].mapped)
		behind++;
	if (behind == PAGES) {
		check(!run);
	} else {
		check(run && run->address <= address_of(behind) && udd_run_span(run).end > address_of(behind));
	}
}

static void check_overlap(uint32_t from, uint32_t to)
{
	struct udd_span span = {address_of(from), address_of(to)};
	const struct udd_run_entry *run = udd_runs_first(&table, span);
	uint32_t page = from;

	// What the iteration passes is what is mapped.
	for (; run; run = udd_runs_next_in(run, span)) {
		while (address_of(page) < run->address)
			check(!model[page++].mapped);
		check(page < to);
		while (page < to && address_of(page) < udd_run_span(run).end)
			check(model[page++].mapped);
	}
	while (page < to)
		check(!model[page++].mapped);
	check(udd_runs_overlap(&table, span) == (udd_runs_first(&table, span) != NULL));
}

static bool joinable(const struct udd_run_entry *a, const struct udd_run_entry *b)
{
	return udd_run_span(a).end == b->address && a->slot + a->pages == b->slot && a->segment == b->segment &&
	       a->attributes == b->attributes && a->protection == b->protection && a->broken == b->broken &&
	       a->armed == b->armed;
}

// At neither end of a run just inserted may there be a neighbour that it could have joined.
static void check_joined(uint32_t from, uint32_t to)
{
	const struct udd_run_entry *run = udd_runs_find(&table, from ? address_of(from - 1) : 0);
	const struct udd_run_entry *next;

	for (; run && run->address <= address_of(to); run = next) {
		next = udd_runs_next(run);
		if (next && (next->address == address_of(from) || next->address == address_of(to)))
			check(!joinable(run, next));
	}
}

static void insert(uint64_t *random, uint32_t from, uint32_t to)
{
	struct udd_run_entry run = {
		.address = address_of(from),
		.segment = (uint16_t)random_below(random, 2),
		.attributes = (uint8_t)random_below(random, 2),
		.protection = random_below(random, 8) ? 3 : 1,
		.broken = random_below(random, 8) == 0,
		.armed = (uint16_t)random_below(random, 2),
	};

	while (from < PAGES && model[from].mapped)
		from++;
	for (run.pages = 0; from + run.pages < to && !model[from + run.pages].mapped;)
		run.pages++;
	if (!run.pages)
		return;
	// Slots follow addresses, mostly: so that neighbours join often.
	run.address = address_of(from);
	run.slot = from + (uint32_t)(random_below(random, 4) ? 0 : random_below(random, 3) * 1000);
	for (uint32_t page = from; page < from + run.pages; page++) {
		model[page] = (struct page){true,           run.slot + page - from, run.segment, run.attributes,
					    run.protection, run.broken,             run.armed};
	}
	udd_runs_insert(&table, &run);
	check_joined(from, from + run.pages);
}

static void against_model(uint64_t seed)
{
	uint64_t random = seed;

	table_init(&table, CHUNKS);
	for (int step = 0; step < STEPS; step++) {
		uint32_t from = (uint32_t)random_below(&random, PAGES);
		uint32_t to = from + 1 + (uint32_t)random_below(&random, random_below(&random, 64) ? 3 : PAGES - from);
		struct udd_span span;

		if (to > PAGES)
			to = PAGES;
		span = (struct udd_span){address_of(from), address_of(to)};
		// An insertion makes one more, a split two.
		check(udd_runs_reserve(&table, table.count + 2) == 0);
		switch (random_below(&random, 5)) {
		case 0:
		case 1:
			insert(&random, from, to);
			break;
		case 2:
			udd_runs_split(&table, span);
			for (const struct udd_run_entry *run = udd_runs_first(&table, span); run;
			     run = udd_runs_next_in(run, span))
				check(run->address >= span.start && udd_run_span(run).end <= span.end);
			break;
		case 3:
			udd_runs_split(&table, span);
			udd_runs_remove(&table, span);
			memset(&model[from], 0, (to - from) * sizeof(model[0]));
			break;
		default:
			check_find(from);
			check_overlap(from, to);
			break;
		}
		check_table();
	}
	check(!udd_runs_overlap(&table, (struct udd_span){BASE, BASE}));
	udd_runs_remove(&table, (struct udd_span){BASE, address_of(PAGES)});
	check(table.count == 0 && !udd_runs_find(&table, 0));
	table_deinit(&table);
	memset(model, 0, sizeof(model));
}

// Lone pages in the worst order, as many as were announced, then every other one goes: never more room than was reserved.
static void keeps_to_what_was_reserved(bool ascending)
{
	enum { RUNS = 30000, STEP = 7919 }; // coprime
	struct udd_runs runs;

	table_init(&runs, CHUNKS * 4);
	check(udd_runs_reserve(&runs, RUNS) == 0);
	for (uint32_t i = 0; i < RUNS; i++) {
		uint64_t number = ascending ? i : (uint64_t)i * STEP % RUNS;
		struct udd_run_entry run = {.address = BASE + udd_bytes(2 * number), .pages = 1};

		udd_runs_insert(&runs, &run);
		check(runs.count == i + 1);
	}
	for (uint32_t i = 0; i < RUNS; i += 2)
		udd_runs_remove(&runs, (struct udd_span){BASE + udd_bytes(2 * i), BASE + udd_bytes(2 * i + 1)});
	check(runs.count == RUNS / 2);
	for (uint32_t i = 0; i < RUNS; i++) {
		const struct udd_run_entry *run = udd_runs_find(&runs, BASE + udd_bytes(2 * i));

		check(!run ? i == RUNS : run->address == BASE + udd_bytes(2 * (i | 1)));
	}
	table_deinit(&runs);
}

static void refuses_beyond_its_limit(void)
{
	struct udd_runs runs;

	table_init(&runs, 64);
	check(udd_runs_reserve(&runs, 1) == 0);
	check(udd_runs_reserve(&runs, 64 * UDD_CHUNK_RUNS) == -ENOMEM);
	check(udd_runs_reserve(&runs, 1UL << 40) == -ENOMEM);
	check(udd_runs_reserve(&runs, 1) == 0);
	table_deinit(&runs);
}

int main(int argc, char **argv)
{
	check(argc == 2);
	against_model(strtoull(argv[1], NULL, 0));
	keeps_to_what_was_reserved(true);
	keeps_to_what_was_reserved(false);
	refuses_beyond_its_limit();
	return 0;
}
