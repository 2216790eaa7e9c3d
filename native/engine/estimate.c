// SPDX-License-Identifier: MIT
// What could be shared in some processes, seen from outside and before anything is done: Barker et al.'s study (USENIX ATC 2012).
//
// What counts is the page frame: one that several mappings show is shared already, and is looked at once. Frames are remembered
// in a bitmap, a bit each. Of each frame that is not all zero a record of 12 bytes goes to a log, its digest and where it was found;
// sorted in place at the end, the log has equal contents next to each other, and all figures come of one walk over it. That is 0.3%
// of what was read, and the log's growth copies nothing.
//
// Without CAP_SYS_ADMIN the kernel shows no frames. A page that is mapped more than once is then taken as shared already.
//
// Sampling. To take a part of the pages at random does not do: of a pair of equal pages it rarely gets both. But with m frames of
// a content, each of them stands for 1 - 1/m frames that would be saved; so it is enough to know m for the frames of a random
// sample, and their mean is within Hoeffding's bound, whatever the distribution (Harnik et al., MSST 2012). Two passes: the first
// takes the fingerprint of a small part of each sampled frame, the second looks at the same part of all frames and reads
// those whole whose fingerprint is known. All-zero pages are always among these.
//
// Digests are half of the page's: a chance equality among 2^64 does not matter here.
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/digest.h"
#include "engine.h"
#include "look.h"

enum {
	PART_OFFSET = 1024, // of a page, in bytes: the beginnings of pages are more alike
	PART_BYTES = 64,
	FILTER_BITS = 64, // for each fingerprint: then 1 in 64 others passes
	LOG_LEAST = 65536,
	SORT_SMALL = 32,

	// A bitmap of frames, in pieces of 4 GiB of memory, for the 2^52 bytes that x86-64 can have.
	PIECE_FRAMES = 1 << 20,
	PIECES = 1 << 20,

	// Beside the place in a record.
	RECORD_FILE = 1U << 31,
	RECORD_SAMPLED = 1U << 30,
	RECORD_PLACE = RECORD_SAMPLED - 1,
};

struct record {
	uint64_t digest;
	uint32_t place; // number, and RECORD_… bits
} __attribute__((packed, aligned(4)));

struct log {
	struct record *items;
	size_t count;
	size_t room;
};

struct udd_estimate {
	struct udd_place *places;
	size_t place_count;
	struct log frames;    // those that are not all zero
	struct log known;     // blocks of images
	uint64_t **seen;      // PIECES of the bitmap of frames
	uint64_t *filter;     // of fingerprints; NULL: everything is read
	uint64_t filter_mask; // bits - 1
	uint64_t part;	      // hashes of frames below it are sampled
	uint64_t zero_digest;
	uint8_t *buffer;      // UDD_LOOK_BATCH pages
	bool gathers;	      // fingerprints: the first of two passes
	bool has_frames;      // the kernel shows them
};

static uint64_t digest(const void *page)
{
	return udd_digest_page(page).low;
}

// ---- logs ----

static int log_add(struct log *log, struct record record)
{
	if (log->count == log->room) {
		// What is not written to takes no memory, and so large a block is moved by its page tables.
		size_t room = log->room ? log->room * 2 : LOG_LEAST;
		struct record *items = realloc(log->items, room * sizeof(*items));

		if (!items)
			return -ENOMEM;
		log->items = items;
		log->room = room;
	}
	log->items[log->count++] = record;
	return 0;
}

static bool record_before(const struct record *a, const struct record *b)
{
	if (a->digest != b->digest)
		return a->digest < b->digest;
	return (a->place & RECORD_PLACE) < (b->place & RECORD_PLACE);
}

// Byte of the key, digest and place, highest first.
static unsigned record_byte(const struct record *record, unsigned byte)
{
	return (byte < 8 ? record->digest >> (56 - 8 * byte) : (record->place & RECORD_PLACE) >> (24 - 8 * (byte - 8))) & 255;
}

// Radix sort in place, by the bytes of the key from `byte` on.
static void records_sort(struct record *records, size_t count, unsigned byte)
{
	size_t ends[256] = {0}, next[256];

	if (count <= SORT_SMALL) {
		for (size_t i = 1; i < count; i++) {
			struct record record = records[i];
			size_t at = i;

			for (; at && record_before(&record, &records[at - 1]); at--)
				records[at] = records[at - 1];
			records[at] = record;
		}
		return;
	}
	for (size_t i = 0; i < count; i++)
		ends[record_byte(&records[i], byte)]++;
	for (size_t i = 0, sum = 0; i < 256; i++) {
		next[i] = sum;
		ends[i] = sum += ends[i];
	}
	for (size_t bucket = 0; bucket < 256; bucket++) {
		while (next[bucket] < ends[bucket]) {
			struct record record = records[next[bucket]];
			unsigned right;

			while ((right = record_byte(&record, byte)) != bucket) {
				struct record other = records[next[right]];

				records[next[right]++] = record;
				record = other;
			}
			records[next[bucket]++] = record;
		}
	}
	if (byte == 11)
		return;
	for (size_t bucket = 0, start = 0; bucket < 256; start = ends[bucket++])
		records_sort(records + start, ends[bucket] - start, byte + 1);
}

// ---- frames ----

// Whether a frame was seen before; it is from now on. -ENOMEM.
static int see_frame(struct udd_estimate *estimate, uint64_t frame)
{
	size_t piece = frame / PIECE_FRAMES, bit = frame % PIECE_FRAMES;

	if (piece >= PIECES)
		return -ERANGE;
	if (!estimate->seen[piece]) {
		estimate->seen[piece] = calloc(PIECE_FRAMES / 64, sizeof(uint64_t));
		if (!estimate->seen[piece])
			return -ENOMEM;
	}
	uint64_t *word = &estimate->seen[piece][bit / 64], mask = 1ULL << bit % 64;
	bool seen = *word & mask;

	*word |= mask;
	return seen;
}

static void forget_frames(struct udd_estimate *estimate)
{
	for (size_t i = 0; i < PIECES; i++) {
		free(estimate->seen[i]);
		estimate->seen[i] = NULL;
	}
}

static bool frames_visible(void)
{
	struct udd_seen_page page;
	struct udd_look look;
	int pagemap = udd_look_open(getpid(), "pagemap");

	if (pagemap < 0)
		return false;
	udd_look_init(&look, pagemap, (uintptr_t)&page / UDD_PAGE_SIZE, (uintptr_t)&page / UDD_PAGE_SIZE + 1, 0);
	bool visible = udd_look_next(&look, &page, 1) > 0 && page.entry & UDD_ENTRY_FRAME;

	close(pagemap);
	return visible;
}

// ---- fingerprints ----

static uint64_t *filter_word(const struct udd_estimate *estimate, const void *part, uint64_t *ret_mask)
{
	uint64_t bit = udd_digest_part(part, PART_BYTES) & estimate->filter_mask;

	*ret_mask = 1ULL << bit % 64;
	return &estimate->filter[bit / 64];
}

static void filter_add(struct udd_estimate *estimate, const void *part)
{
	uint64_t mask, *word = filter_word(estimate, part, &mask);

	*word |= mask;
}

static bool filter_has(const struct udd_estimate *estimate, const void *part)
{
	uint64_t mask;

	return *filter_word(estimate, part, &mask) & mask;
}

// ---- life ----

struct udd_estimate *udd_estimate_create(double part, uint64_t pages)
{
	static const uint8_t zero[UDD_PAGE_SIZE] __attribute__((aligned(64)));
	struct udd_estimate *estimate = calloc(1, sizeof(*estimate));

	if (!estimate)
		return NULL;
	estimate->has_frames = frames_visible();
	estimate->zero_digest = digest(zero);
	estimate->buffer = aligned_alloc(UDD_PAGE_SIZE, UDD_LOOK_BATCH * UDD_PAGE_SIZE);
	estimate->seen = calloc(PIECES, sizeof(*estimate->seen));
	if (part < 1) {
		uint64_t bits = 65536;

		while (bits < pages * part * FILTER_BITS)
			bits *= 2;
		estimate->filter = calloc(bits / 64, sizeof(uint64_t));
		estimate->filter_mask = bits - 1;
		estimate->part = part * 0x1p64;
		estimate->gathers = true;
	}
	if (!estimate->buffer || !estimate->seen || (part < 1 && !estimate->filter)) {
		udd_estimate_destroy(estimate);
		return NULL;
	}
	if (estimate->filter)
		filter_add(estimate, zero);
	return estimate;
}

void udd_estimate_destroy(struct udd_estimate *estimate)
{
	if (!estimate)
		return;
	if (estimate->seen)
		forget_frames(estimate);
	free(estimate->seen);
	free(estimate->places);
	free(estimate->frames.items);
	free(estimate->known.items);
	free(estimate->filter);
	free(estimate->buffer);
	free(estimate);
}

int udd_estimate_has_frames(const struct udd_estimate *estimate)
{
	return estimate->has_frames;
}

int64_t udd_estimate_add_place(struct udd_estimate *estimate, uint32_t process)
{
	size_t count = estimate->place_count;

	if (count > RECORD_PLACE)
		return -ERANGE;
	// Doubled at each power of two.
	if (!(count & (count - 1))) {
		struct udd_place *places = realloc(estimate->places, (count ? count * 2 : 1) * sizeof(*places));

		if (!places)
			return -ENOMEM;
		estimate->places = places;
	}
	estimate->places[count] = (struct udd_place){.process = process};
	return estimate->place_count++;
}

const struct udd_place *udd_estimate_place(const struct udd_estimate *estimate, uint32_t place)
{
	return &estimate->places[place];
}

int udd_estimate_know(struct udd_estimate *estimate, const uint64_t *digests, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		struct record block = {.digest = digests[2 * i]};
		bool missing = !digests[2 * i] && !digests[2 * i + 1];
		int r = missing || block.digest == estimate->zero_digest ? 0 : log_add(&estimate->known, block);

		if (r)
			return r;
	}
	return 0;
}

// ---- looking ----

// Whether a page is of the sample: by its frame, or where that is not known by its address.
static bool sampled(const struct udd_estimate *estimate, const struct udd_mapped *range, const struct udd_seen_page *page)
{
	uint64_t frame = page->entry & UDD_ENTRY_FRAME;
	uint64_t key[2] = {frame ? frame : page->page, frame ? 0 : estimate->places[range->place].process + 1};

	return !estimate->filter || udd_digest_part(key, sizeof(key)) < estimate->part;
}

// Leaves those pages that are to be counted, and counts the others.
static int unseen(struct udd_estimate *estimate, const struct udd_mapped *range, struct udd_seen_page *pages, size_t count)
{
	struct udd_place *place = &estimate->places[range->place];
	size_t left = 0;

	for (size_t i = 0; i < count; i++) {
		int seen = estimate->has_frames ? see_frame(estimate, pages[i].entry & UDD_ENTRY_FRAME)
						: !(pages[i].entry & UDD_ENTRY_ALONE);

		if (seen < 0)
			return seen;
		if (!seen)
			pages[left++] = pages[i];
	}
	if (!estimate->gathers) {
		place->pages += count;
		place->already += count - left;
	}
	return left;
}

// Leaves the pages of the sample.
static size_t in_sample(const struct udd_estimate *estimate, const struct udd_mapped *range, struct udd_seen_page *pages, size_t count)
{
	size_t left = 0;

	for (size_t i = 0; i < count; i++)
		if (sampled(estimate, range, &pages[i]))
			pages[left++] = pages[i];
	return left;
}

// Leaves the pages that must be read whole; those that can't be read are counted.
static size_t worth_reading(struct udd_estimate *estimate, uint32_t pid, const struct udd_mapped *range, struct udd_seen_page *pages,
			    size_t count)
{
	size_t readable = udd_look_read(pid, pages, count, PART_OFFSET, PART_BYTES, estimate->buffer), left = 0;

	estimate->places[range->place].unreadable += count - readable;
	for (size_t i = 0; i < readable; i++)
		if (filter_has(estimate, estimate->buffer + i * PART_BYTES) || sampled(estimate, range, &pages[i]))
			pages[left++] = pages[i];
	return left;
}

static int take_page(struct udd_estimate *estimate, const struct udd_mapped *range, const struct udd_seen_page *page,
		     const void *content)
{
	struct udd_place *place = &estimate->places[range->place];
	bool file = page->entry & UDD_ENTRY_FILE;
	struct record record = {
		.digest = digest(content),
		.place = range->place | (file ? RECORD_FILE : 0) | (sampled(estimate, range, page) ? RECORD_SAMPLED : 0),
	};

	if (record.digest != estimate->zero_digest)
		return log_add(&estimate->frames, record);
	place->zero++;
	place->zero_file += file;
	return 0;
}

static int take_pages(struct udd_estimate *estimate, uint32_t pid, const struct udd_mapped *range, struct udd_seen_page *pages,
		      size_t count)
{
	int r = unseen(estimate, range, pages, count);

	if (r <= 0)
		return r;
	size_t left = r;

	if (estimate->gathers) {
		left = in_sample(estimate, range, pages, left);
		left = udd_look_read(pid, pages, left, PART_OFFSET, PART_BYTES, estimate->buffer);
		for (size_t i = 0; i < left; i++)
			filter_add(estimate, estimate->buffer + i * PART_BYTES);
		return 0;
	}
	for (size_t i = 0; i < left; i++)
		estimate->places[range->place].file += pages[i].entry & UDD_ENTRY_FILE ? 1 : 0;
	if (estimate->filter)
		left = worth_reading(estimate, pid, range, pages, left);
	size_t read = udd_look_read(pid, pages, left, 0, UDD_PAGE_SIZE, estimate->buffer);

	estimate->places[range->place].unreadable += left - read;
	for (size_t i = 0; i < read; i++) {
		r = take_page(estimate, range, &pages[i], estimate->buffer + i * UDD_PAGE_SIZE);
		if (r)
			return r;
	}
	return 0;
}

int64_t udd_estimate_look(struct udd_estimate *estimate, uint32_t pid, int pagemap, const struct udd_mapped *ranges, size_t count,
			  uint64_t limit, struct udd_position *position)
{
	struct udd_seen_page pages[UDD_LOOK_BATCH];
	uint64_t looked = 0;

	for (; position->range < count; position->range++, position->page = 0) {
		const struct udd_mapped *range = &ranges[position->range];
		struct udd_look look;

		udd_look_init(&look, pagemap, position->page ? position->page : range->page, range->end, PAGE_IS_PFNZERO);
		while (look.next < range->end) {
			if (looked >= limit)
				return looked;
			int got = udd_look_next(&look, pages, UDD_LOOK_BATCH);
			int r = got > 0 ? take_pages(estimate, pid, range, pages, got) : got;

			if (r)
				return r;
			looked += got;
			position->page = look.next;
		}
	}
	return looked;
}

void udd_estimate_next_pass(struct udd_estimate *estimate)
{
	forget_frames(estimate);
	estimate->gathers = false;
}

// ---- judging ----

// All frames with one content.
struct content {
	const struct record *records; // sorted by place
	size_t count;
	size_t sampled;	  // of them
	size_t file;	  // of them
	size_t processes; // that have some
	bool known;	  // a block of an image has it
};

static uint32_t process_of(const struct udd_estimate *estimate, const struct record *record)
{
	return estimate->places[record->place & RECORD_PLACE].process;
}

// How many records from `at` on are of one process.
static size_t of_process(const struct udd_estimate *estimate, const struct content *content, size_t at)
{
	uint32_t process = process_of(estimate, &content->records[at]);
	size_t next = at + 1;

	while (next < content->count && process_of(estimate, &content->records[next]) == process)
		next++;
	return next - at;
}

static struct content content_at(const struct udd_estimate *estimate, size_t at)
{
	const struct log *frames = &estimate->frames;
	struct content content = {.records = &frames->items[at]};

	for (; at < frames->count && frames->items[at].digest == content.records->digest; at++, content.count++) {
		content.sampled += frames->items[at].place & RECORD_SAMPLED ? 1 : 0;
		content.file += frames->items[at].place & RECORD_FILE ? 1 : 0;
	}
	for (size_t next = 0; next < content.count; next += of_process(estimate, &content, next))
		content.processes++;
	return content;
}

// `weight`: of each of its frames.
static void judge_content(struct udd_estimate *estimate, const struct content *content, double weight, struct udd_estimate_total *ret)
{
	size_t anonymous = content->count - content->file;

	ret->contents += weight;
	ret->within += weight * (content->count - content->processes);
	ret->between += weight * (content->processes - 1);
	ret->anonymous += weight * (anonymous ? anonymous - 1 : 0);
	ret->file += weight * (content->file ? content->file - 1 : 0);
	ret->mixed += anonymous && content->file ? weight : 0;
	ret->known += content->known ? weight * content->count : 0;
	for (size_t at = 0, own; at < content->count; at += own) {
		own = of_process(estimate, content, at);
		// What a process saves, in equal parts to its frames.
		double within = weight * (own - 1) / own;
		double between = weight * (content->processes - 1) / content->processes / own;

		for (size_t i = at; i < at + own; i++) {
			struct udd_place *place = &estimate->places[content->records[i].place & RECORD_PLACE];

			place->within += within;
			place->between += between;
			place->known += content->known ? weight : 0;
		}
	}
}

void udd_estimate_judge(struct udd_estimate *estimate, struct udd_estimate_total *ret)
{
	const struct log *frames = &estimate->frames, *known = &estimate->known;
	uint64_t nonzero = 0, in_sample = 0;

	*ret = (struct udd_estimate_total){0};
	records_sort(frames->items, frames->count, 0);
	records_sort(known->items, known->count, 0);
	for (size_t i = 0; i < estimate->place_count; i++) {
		const struct udd_place *place = &estimate->places[i];

		nonzero += place->pages - place->already - place->unreadable - place->zero;
	}
	for (size_t i = 0; i < frames->count; i++)
		in_sample += frames->items[i].place & RECORD_SAMPLED ? 1 : 0;
	ret->sampled = in_sample;
	for (size_t at = 0, block = 0; at < frames->count;) {
		struct content content = content_at(estimate, at);

		while (block < known->count && known->items[block].digest < content.records->digest)
			block++;
		content.known = block < known->count && known->items[block].digest == content.records->digest;
		if (content.sampled)
			judge_content(estimate, &content, (double)nonzero / in_sample * content.sampled / content.count, ret);
		at += content.count;
	}
}
