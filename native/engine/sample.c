// SPDX-License-Identifier: MIT
// An observer of merging that trusts nobody's account: from outside, through /proc, it looks at which pages of some
// processes have the same content and which of these are the same physical page. KSM's work and udedup's look alike to it.
//
// A *place* is a page of a process: (process, address). Between two samples the sampler keeps the content of each place, so
// that it sees when a place came to hold what another holds too (an *opportunity*) and when it came to be one page with
// another (a *merge*). Times are those of samples, and the doubt is counted against whoever merges: an opportunity is as old
// as the last sample that did not have it.
//
// All-zero pages are counted apart: they say little about how well equal content is found.
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/digest.h"
#include "engine.h"
#include "look.h"

enum {
	TABLE_LEAST = 1024,
};

// What a sample found at a place. Its digest is half of the page's: a chance equality among 2^64 does not matter here.
struct place {
	uint64_t page;   // address / 4096
	uint64_t digest; // of the content, never 0
	uint64_t frame;  // page frame number
	double since;    // s, last sample without the opportunity
	uint32_t pid;
	bool opportunity; // another place has the content
	bool merged;      // another place is on the frame
	bool known;       // the content is a block of an image
};

// Numbers by key, open addressing; key 0 is empty.
struct table {
	struct {
		uint64_t key;
		uint64_t value;
	} *slots;
	size_t mask; // slots - 1
	size_t used;
};

struct places {
	struct place *items;
	size_t count;
	size_t room;
};

struct udd_sampler {
	struct places before; // the sample before, and
	struct table index;   // where in it a place is: by pid and address
	struct table known;   // digests of image blocks
	double seconds;       // of the sample before
	float *latencies;     // s, of each merge so far
	size_t latency_room;
	struct udd_sample sample; // the last one
	uint64_t zero_digest;
	uint8_t *buffer;   // UDD_LOOK_BATCH pages
	struct table seen; // digests by frame, of the sample being taken: what is merged is read once
};

static uint64_t mix(uint64_t key)
{
	key ^= key >> 32;
	key *= 0x9e3779b97f4a7c15ULL;
	return key ^ key >> 29;
}

static void table_deinit(struct table *table)
{
	free(table->slots);
	*table = (struct table){0};
}

// Room for `count` keys at half load.
static int table_init(struct table *ret, size_t count)
{
	size_t slots = TABLE_LEAST;

	while (slots < count * 2)
		slots *= 2;
	*ret = (struct table){.slots = calloc(slots, sizeof(*ret->slots)), .mask = slots - 1};
	return ret->slots ? 0 : -ENOMEM;
}

// The value of a key, which is entered with 0 if it is not there. There must be room.
static uint64_t *table_at(struct table *table, uint64_t key)
{
	size_t slot = mix(key) & table->mask;

	while (table->slots[slot].key && table->slots[slot].key != key)
		slot = (slot + 1) & table->mask;
	if (!table->slots[slot].key) {
		table->slots[slot].key = key;
		table->used++;
	}
	return &table->slots[slot].value;
}

// The same, NULL if it is not there.
static const uint64_t *table_find(const struct table *table, uint64_t key)
{
	if (!table->slots)
		return NULL;
	for (size_t slot = mix(key) & table->mask; table->slots[slot].key; slot = (slot + 1) & table->mask)
		if (table->slots[slot].key == key)
			return &table->slots[slot].value;
	return NULL;
}

// Addresses have 47 bits, so page numbers 35, and process numbers 22.
static uint64_t place_key(uint32_t pid, uint64_t page)
{
	return (uint64_t)pid << 36 | page;
}

static uint64_t digest(const void *page)
{
	uint64_t low = udd_digest_page(page).low;

	return low ? low : 1;
}

struct udd_sampler *udd_sampler_create(void)
{
	static const uint8_t zero[UDD_PAGE_SIZE] __attribute__((aligned(64)));
	struct udd_sampler *sampler = calloc(1, sizeof(*sampler));

	if (!sampler)
		return NULL;
	sampler->buffer = aligned_alloc(UDD_PAGE_SIZE, UDD_LOOK_BATCH * UDD_PAGE_SIZE);
	sampler->zero_digest = digest(zero);
	if (!sampler->buffer || table_init(&sampler->known, 0)) {
		udd_sampler_destroy(sampler);
		return NULL;
	}
	return sampler;
}

void udd_sampler_destroy(struct udd_sampler *sampler)
{
	if (!sampler)
		return;
	table_deinit(&sampler->index);
	table_deinit(&sampler->known);
	free(sampler->before.items);
	free(sampler->latencies);
	free(sampler->buffer);
	free(sampler);
}

int udd_sampler_know(struct udd_sampler *sampler, const void *blocks, size_t count)
{
	struct table grown;
	int r = table_init(&grown, sampler->known.used + count);

	if (r)
		return r;
	for (size_t i = 0; i <= sampler->known.mask; i++)
		if (sampler->known.slots[i].key)
			table_at(&grown, sampler->known.slots[i].key);
	for (size_t i = 0; i < count; i++) {
		uint64_t each = digest((const uint8_t *)blocks + i * UDD_PAGE_SIZE);

		if (each != sampler->zero_digest)
			table_at(&grown, each);
	}
	table_deinit(&sampler->known);
	sampler->known = grown;
	return 0;
}

size_t udd_sampler_latencies(const struct udd_sampler *sampler, const float **ret)
{
	*ret = sampler->latencies;
	return sampler->sample.merges;
}

// ---- reading ----

// The descriptors of one process.
struct process {
	uint32_t pid;
	int memory;
	int pagemap;
};

static int places_add(struct places *places, struct place place)
{
	if (places->count == places->room) {
		size_t room = places->room ? places->room * 2 : 65536;
		struct place *items = realloc(places->items, room * sizeof(*items));

		if (!items)
			return -ENOMEM;
		places->items = items;
		places->room = room;
	}
	places->items[places->count++] = place;
	return 0;
}

// What is on a frame is remembered as far as there is room.
static void remember(struct table *seen, uint64_t frame, uint64_t digest)
{
	if (seen->used * 2 <= seen->mask)
		*table_at(seen, frame) = digest;
}

// Pages that have just been found present. What is on a frame that was seen needs no reading; what is gone meanwhile is left out.
static int read_pages(struct udd_sampler *sampler, const struct process *process, struct udd_seen_page *pages, size_t count, struct places *ret)
{
	size_t unseen = 0;

	for (size_t i = 0; i < count; i++) {
		uint64_t frame = pages[i].entry & UDD_ENTRY_FRAME;
		const uint64_t *seen = frame ? table_find(&sampler->seen, frame) : NULL;
		int r = 0;

		if (!frame)
			return -EPERM; // the kernel shows frames to root only
		if (seen)
			r = places_add(ret, (struct place){.page = pages[i].page, .pid = process->pid, .digest = *seen, .frame = frame});
		else
			pages[unseen++] = pages[i];
		if (r)
			return r;
	}
	unseen = udd_look_read(process->memory, pages, unseen, sampler->buffer);
	for (size_t i = 0; i < unseen; i++) {
		struct place place = {
			.page = pages[i].page,
			.pid = process->pid,
			.digest = digest(sampler->buffer + i * UDD_PAGE_SIZE),
			.frame = pages[i].entry & UDD_ENTRY_FRAME,
		};
		int r = places_add(ret, place);

		if (r)
			return r;
		remember(&sampler->seen, place.frame, place.digest);
	}
	return 0;
}

// All present pages of a mapping.
static int read_mapping(struct udd_sampler *sampler, const struct process *process, uint64_t page, uint64_t end,
			struct places *ret)
{
	struct udd_seen_page pages[UDD_LOOK_BATCH];
	struct udd_look look;

	udd_look_init(&look, process->pagemap, page, end, 0);
	for (;;) {
		int count = udd_look_next(&look, pages, UDD_LOOK_BATCH);
		int r = count > 0 ? read_pages(sampler, process, pages, count, ret) : count;

		if (r || !count)
			return r;
	}
}

// Whether a line of /proc/PID/maps is of private memory that can be merged, or is merged.
static bool of_interest(const char *permissions, const char *path)
{
	static const char store[] = "/memfd:udedup-store";

	if (permissions[3] != 'p')
		return false;
	if (!strncmp(path, store, sizeof(store) - 1))
		return true;
	return permissions[1] == 'w' && (!*path || !strncmp(path, "[heap]", 6) || !strncmp(path, "[anon", 5));
}

static int read_mappings(struct udd_sampler *sampler, const struct process *process, FILE *maps, struct places *ret)
{
	char *line = NULL;
	size_t room = 0;
	int r = 0;

	while (!r && getline(&line, &room, maps) > 0) {
		unsigned long start, end;
		char permissions[5];
		int path = 0;

		if (sscanf(line, "%lx-%lx %4s %*s %*s %*s %n", &start, &end, permissions, &path) < 3 || !path)
			continue;
		line[strcspn(line, "\n")] = 0;
		if (of_interest(permissions, line + path))
			r = read_mapping(sampler, process, start / UDD_PAGE_SIZE, end / UDD_PAGE_SIZE, ret);
	}
	free(line);
	return r;
}

static bool refused(int descriptor)
{
	return descriptor == -EACCES || descriptor == -EPERM;
}

// A process that is gone has no pages.
static int read_pid(struct udd_sampler *sampler, uint32_t pid, struct places *ret)
{
	struct process process = {
		.pid = pid,
		.memory = udd_look_open(pid, "mem"),
		.pagemap = udd_look_open(pid, "pagemap"),
	};
	int maps_fd = udd_look_open(pid, "maps");
	FILE *maps = maps_fd < 0 ? NULL : fdopen(maps_fd, "r");
	int r = 0;

	if (maps && process.memory >= 0 && process.pagemap >= 0)
		r = read_mappings(sampler, &process, maps, ret);
	else if (refused(process.memory) || refused(process.pagemap) || refused(maps_fd))
		r = -EPERM;
	if (maps)
		fclose(maps);
	else if (maps_fd >= 0)
		close(maps_fd);
	if (process.memory >= 0)
		close(process.memory);
	if (process.pagemap >= 0)
		close(process.pagemap);
	return r;
}

// ---- judging ----

static int latency_add(struct udd_sampler *sampler, float seconds)
{
	size_t count = sampler->sample.merges;

	if (count == sampler->latency_room) {
		size_t room = count ? count * 2 : 65536;
		float *latencies = realloc(sampler->latencies, room * sizeof(*latencies));

		if (!latencies)
			return -ENOMEM;
		sampler->latencies = latencies;
		sampler->latency_room = room;
	}
	sampler->latencies[count] = seconds;
	return 0;
}

// What became of a place since the sample before. `place` knows what it has in common with others now.
static int follow(struct udd_sampler *sampler, struct place *place, double seconds)
{
	const uint64_t *found = table_find(&sampler->index, place_key(place->pid, place->page));
	const struct place *before = found ? &sampler->before.items[*found] : NULL;
	struct udd_sample *sample = &sampler->sample;

	if (before && before->digest != place->digest)
		before = NULL;
	place->known = table_find(&sampler->known, place->digest) != NULL;
	place->since = sampler->seconds;
	if (!place->opportunity)
		return 0;
	if (!before || !before->opportunity) {
		sample->opportunities++;
		sample->known_opportunities += place->known;
	} else if (place->merged == before->merged || place->merged) {
		place->since = before->since;
	}
	if (!place->merged || (before && before->merged))
		return 0;
	bool at_once = place->since >= sampler->seconds;
	int r = latency_add(sampler, seconds - place->since);

	if (r)
		return r;
	sample->merges++;
	sample->merges_at_once += at_once;
	sample->known_merges += place->known;
	sample->known_merges_at_once += place->known && at_once;
	return 0;
}

// How many places have each content, and how many are on each frame.
static void count_places(struct udd_sampler *sampler, const struct places *places, struct table *contents, struct table *frames)
{
	for (size_t i = 0; i < places->count; i++) {
		++*table_at(frames, places->items[i].frame);
		if (places->items[i].digest != sampler->zero_digest)
			++*table_at(contents, places->items[i].digest);
	}
}

static int judge(struct udd_sampler *sampler, struct places *places, const struct table *contents, const struct table *frames,
		 double seconds)
{
	struct udd_sample *sample = &sampler->sample;
	double used = 0, shared = 0; // frames: the sum of each place's part of its own

	sample->present = places->count;
	sample->zero_pages = sample->zero_shared = 0;
	for (size_t i = 0; i < places->count; i++) {
		struct place *place = &places->items[i];
		uint64_t on_frame = *table_find(frames, place->frame);

		place->merged = on_frame > 1;
		if (place->digest == sampler->zero_digest) {
			sample->zero_pages++;
			sample->zero_shared += place->merged;
			continue;
		}
		used += 1.0 / on_frame;
		shared += place->merged ? 1.0 / on_frame : 0;
		place->opportunity = *table_find(contents, place->digest) > 1;
		int r = follow(sampler, place, seconds);

		if (r)
			return r;
	}
	sample->opportunity = places->count - sample->zero_pages - contents->used;
	sample->shared = (uint64_t)(shared + 0.5);
	sample->sharing = places->count - sample->zero_pages - (uint64_t)(used + 0.5);
	return 0;
}

// The sample just judged becomes the one before the next.
static int keep(struct udd_sampler *sampler, struct places *places, double seconds)
{
	struct table index;
	int r = table_init(&index, places->count);

	if (r)
		return r;
	for (size_t i = 0; i < places->count; i++)
		*table_at(&index, place_key(places->items[i].pid, places->items[i].page)) = i;
	table_deinit(&sampler->index);
	free(sampler->before.items);
	sampler->index = index;
	sampler->before = *places;
	sampler->seconds = seconds;
	*places = (struct places){0};
	return 0;
}

int udd_sampler_take(struct udd_sampler *sampler, const uint32_t *pids, size_t count, double seconds, struct udd_sample *ret)
{
	struct places places = {0};
	struct table contents = {0}, frames = {0};
	int r = table_init(&sampler->seen, sampler->before.count);

	for (size_t i = 0; !r && i < count; i++)
		r = read_pid(sampler, pids[i], &places);
	if (!r)
		r = table_init(&contents, places.count);
	if (!r)
		r = table_init(&frames, places.count);
	if (!r) {
		count_places(sampler, &places, &contents, &frames);
		r = judge(sampler, &places, &contents, &frames, seconds);
	}
	if (!r)
		r = keep(sampler, &places, seconds);
	*ret = sampler->sample;
	free(places.items);
	table_deinit(&contents);
	table_deinit(&frames);
	table_deinit(&sampler->seen);
	return r;
}
