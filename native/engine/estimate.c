// SPDX-License-Identifier: MIT
// What could be shared in some processes, seen from outside and before anything is done: Barker et al.'s study (USENIX ATC 2012).
//
// What counts is the page frame: one that several mappings show is shared already, and is looked at once. Frames are remembered
// in a bitmap, a bit each. Of each frame that is not all zero a record of 12 bytes goes to a log, its digest and where it was found;
// sorted in place at the end, the logs have equal contents next to each other, and all figures come of one walk over them. That is
// 0.3% of what was read, and the logs' growth copies nothing.
//
// Without CAP_SYS_ADMIN the kernel shows no frames. A page that is mapped more than once is then taken as shared already.
//
// Of a sample, each frame is in it or not by its number: independently of all others, and of what it holds. What the numbers of
// equal frames in it say of all frames is not decided here.
//
// Several threads look at a time, each with its own log. What they share are the bitmap and the counts of places.
//
// Digests are half of the page's: a chance equality among 2^64 does not matter here.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/digest.h"
#include "engine.h"
#include "look.h"

enum {
	LOG_LEAST = 65536,
	SORT_SMALL = 32,
	KEY_BYTES = 12,
	KEY_PLACE = 8, // byte of the key that the place begins at

	PLACES_CHUNK = 1024,
	PLACES_CHUNKS = 1 << 18,

	// A bitmap of frames, in pieces of 4 GiB of memory, for the 2^52 bytes that x86-64 can have.
	PIECE_FRAMES = 1 << 20,
	PIECES = 1 << 20,

	// Beside the place in a record.
	RECORD_PLACE = (1 << 28) - 1,
};

#define RECORD_FILE (1U << 31)	// the frame is of a file
#define RECORD_KNOWN (1U << 30) // some block of an image has this content: of the first with it in its log

_Static_assert(PLACES_CHUNK * PLACES_CHUNKS == RECORD_PLACE + 1, "records must be able to name all places");

// Bit of an entry of /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst).
#define FLAG_KSM (1ULL << 21)

struct record {
	uint64_t digest;
	uint32_t place; // number, and RECORD_… bits
} __attribute__((packed, aligned(4)));

struct log {
	struct record *items;
	size_t count;
	size_t room;
};

struct udd_reader {
	struct udd_estimate *estimate;
	struct log log;	 // frames that are not all zero
	uint8_t *buffer; // UDD_LOOK_BATCH pages
};

struct udd_estimate {
	struct udd_place **chunks; // PLACES_CHUNK places each
	uint64_t place_count;
	struct udd_reader *readers[UDD_ESTIMATE_READERS];
	size_t reader_count;
	uint64_t **seen; // PIECES of the bitmap of frames
	uint64_t seed;
	uint64_t part; // frames whose hashes are not above it are in the sample
	uint64_t zero_digest;
	int flags;	 // descriptor of /proc/kpageflags, -1 without
	bool has_frames; // the kernel shows them
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
	if (byte < KEY_PLACE)
		return record->digest >> (56 - 8 * byte) & 255;
	return (record->place & RECORD_PLACE) >> (24 - 8 * (byte - KEY_PLACE)) & 255;
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
	if (byte == KEY_BYTES - 1)
		return;
	for (size_t bucket = 0, start = 0; bucket < 256; start = ends[bucket++])
		records_sort(records + start, ends[bucket] - start, byte + 1);
}

// The first record with a digest, NULL if there is none.
static struct record *log_find(const struct log *log, uint64_t wanted)
{
	size_t low = 0, high = log->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (log->items[middle].digest < wanted)
			low = middle + 1;
		else
			high = middle;
	}
	return low < log->count && log->items[low].digest == wanted ? &log->items[low] : NULL;
}

// ---- frames ----

static uint64_t *seen_piece(struct udd_estimate *estimate, size_t piece)
{
	uint64_t *words = __atomic_load_n(&estimate->seen[piece], __ATOMIC_ACQUIRE), *fresh;

	if (words)
		return words;
	fresh = calloc(PIECE_FRAMES / 64, sizeof(*fresh));
	// Another thread may have been faster.
	if (!fresh || __atomic_compare_exchange_n(&estimate->seen[piece], &words, fresh, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		return fresh;
	free(fresh);
	return words;
}

// Whether a frame was seen before; it is from now on. A negative errno.
static int see_frame(struct udd_estimate *estimate, uint64_t frame)
{
	size_t piece = frame / PIECE_FRAMES, bit = frame % PIECE_FRAMES;
	uint64_t *words = piece < PIECES ? seen_piece(estimate, piece) : NULL, mask = 1ULL << bit % 64;

	if (!words)
		return piece < PIECES ? -ENOMEM : -ERANGE;
	return !!(__atomic_fetch_or(&words[bit / 64], mask, __ATOMIC_RELAXED) & mask);
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

static bool frame_is_ksm(const struct udd_estimate *estimate, uint64_t frame)
{
	uint64_t flags;

	return estimate->flags >= 0 && pread(estimate->flags, &flags, sizeof(flags), frame * sizeof(flags)) == sizeof(flags) &&
	       flags & FLAG_KSM;
}

// ---- life ----

struct udd_estimate *udd_estimate_create(double part, uint64_t seed)
{
	static const uint8_t zero[UDD_PAGE_SIZE] __attribute__((aligned(64)));
	struct udd_estimate *estimate = calloc(1, sizeof(*estimate));

	if (!estimate)
		return NULL;
	estimate->has_frames = frames_visible();
	estimate->flags = estimate->has_frames ? open("/proc/kpageflags", O_RDONLY | O_CLOEXEC) : -1;
	estimate->zero_digest = digest(zero);
	estimate->seed = seed;
	estimate->part = part < 1 ? part * 0x1p64 : UINT64_MAX;
	estimate->seen = calloc(PIECES, sizeof(*estimate->seen));
	estimate->chunks = calloc(PLACES_CHUNKS, sizeof(*estimate->chunks));
	if (!estimate->seen || !estimate->chunks) {
		udd_estimate_destroy(estimate);
		return NULL;
	}
	return estimate;
}

static void reader_destroy(struct udd_reader *reader)
{
	free(reader->log.items);
	free(reader->buffer);
	free(reader);
}

void udd_estimate_destroy(struct udd_estimate *estimate)
{
	if (!estimate)
		return;
	for (size_t i = 0; i < estimate->reader_count; i++)
		reader_destroy(estimate->readers[i]);
	for (size_t i = 0; estimate->seen && i < PIECES; i++)
		free(estimate->seen[i]);
	for (size_t i = 0; i * PLACES_CHUNK < estimate->place_count; i++)
		free(estimate->chunks[i]);
	free(estimate->seen);
	free(estimate->chunks);
	if (estimate->flags >= 0)
		close(estimate->flags);
	free(estimate);
}

struct udd_reader *udd_reader_create(struct udd_estimate *estimate)
{
	struct udd_reader *reader = estimate->reader_count < UDD_ESTIMATE_READERS ? calloc(1, sizeof(*reader)) : NULL;

	if (!reader)
		return NULL;
	reader->estimate = estimate;
	reader->buffer = aligned_alloc(UDD_PAGE_SIZE, UDD_LOOK_BATCH * UDD_PAGE_SIZE);
	if (!reader->buffer) {
		reader_destroy(reader);
		return NULL;
	}
	return estimate->readers[estimate->reader_count++] = reader;
}

int udd_estimate_has_frames(const struct udd_estimate *estimate)
{
	return estimate->has_frames;
}

int64_t udd_estimate_add_place(struct udd_estimate *estimate, uint32_t process)
{
	uint64_t number = estimate->place_count;

	if (number > RECORD_PLACE)
		return -ERANGE;
	if (number % PLACES_CHUNK == 0) {
		struct udd_place *chunk = calloc(PLACES_CHUNK, sizeof(*chunk));

		if (!chunk)
			return -ENOMEM;
		estimate->chunks[number / PLACES_CHUNK] = chunk;
	}
	estimate->place_count++;
	udd_estimate_place(estimate, number)->process = process;
	return number;
}

struct udd_place *udd_estimate_place(const struct udd_estimate *estimate, uint64_t place)
{
	return &estimate->chunks[place / PLACES_CHUNK][place % PLACES_CHUNK];
}

// ---- looking ----

static void add(uint64_t *counter, uint64_t count)
{
	__atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
}

// Whether a page is to be read: by its frame, or where that is not known by its address.
static bool in_sample(const struct udd_estimate *estimate, const struct udd_place *place, const struct udd_seen_page *page)
{
	uint64_t frame = page->entry & UDD_ENTRY_FRAME;
	uint64_t key[3] = {frame ? frame : page->page, frame ? 0 : place->process + 1, estimate->seed};

	return estimate->part == UINT64_MAX || udd_digest_part(key, sizeof(key)) <= estimate->part;
}

// Leaves those pages that are to be read, and counts all. Returns how many are left, or a negative errno.
static int choose(struct udd_estimate *estimate, struct udd_place *place, struct udd_seen_page *pages, size_t count)
{
	size_t left = 0, already = 0, already_file = 0, already_ksm = 0, file = 0;

	for (size_t i = 0; i < count; i++) {
		uint64_t entry = pages[i].entry, frame = entry & UDD_ENTRY_FRAME;
		bool of_file = entry & UDD_ENTRY_FILE;
		int seen = estimate->has_frames ? see_frame(estimate, frame) : !(entry & UDD_ENTRY_ALONE);

		if (seen < 0)
			return seen;
		if (seen) {
			already++;
			already_file += of_file;
			already_ksm += !of_file && frame_is_ksm(estimate, frame);
			continue;
		}
		file += of_file;
		if (in_sample(estimate, place, &pages[i]))
			pages[left++] = pages[i];
	}
	add(&place->pages, count);
	add(&place->already, already);
	add(&place->already_file, already_file);
	add(&place->already_ksm, already_ksm);
	add(&place->file, file);
	add(&place->sampled, left);
	return left;
}

static int take_pages(struct udd_reader *reader, int memory, uint64_t number, struct udd_seen_page *pages, size_t count)
{
	struct udd_place *place = udd_estimate_place(reader->estimate, number);
	int left = choose(reader->estimate, place, pages, count);

	if (left <= 0)
		return left;
	size_t read = udd_look_read(memory, pages, left, reader->buffer), zero = 0, zero_file = 0;

	for (size_t i = 0; i < read; i++) {
		bool file = pages[i].entry & UDD_ENTRY_FILE;
		struct record record = {
			.digest = digest(reader->buffer + i * UDD_PAGE_SIZE),
			.place = number | (file ? RECORD_FILE : 0),
		};

		if (record.digest == reader->estimate->zero_digest) {
			zero++;
			zero_file += file;
		} else if (log_add(&reader->log, record)) {
			return -ENOMEM;
		}
	}
	add(&place->unreadable, left - read);
	add(&place->zero, zero);
	add(&place->zero_file, zero_file);
	return 0;
}

int64_t udd_reader_look(struct udd_reader *reader, int memory, int pagemap, const struct udd_mapped *ranges, size_t count,
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
			int r = got > 0 ? take_pages(reader, memory, range->place, pages, got) : got;

			if (r)
				return r;
			looked += got;
			position->page = look.next;
		}
	}
	return looked;
}

void udd_reader_sort(struct udd_reader *reader)
{
	records_sort(reader->log.items, reader->log.count, 0);
}

uint64_t udd_estimate_know(struct udd_estimate *estimate, const uint64_t *digests, size_t count)
{
	uint64_t known = 0;

	for (size_t i = 0; i < count; i++) {
		if ((!digests[2 * i] && !digests[2 * i + 1]) || digests[2 * i] == estimate->zero_digest)
			continue;
		known++;
		for (size_t j = 0; j < estimate->reader_count; j++) {
			struct record *record = log_find(&estimate->readers[j]->log, digests[2 * i]);

			if (record)
				record->place |= RECORD_KNOWN;
		}
	}
	return known;
}

// ---- judging ----

// Where a walk over all contents is.
struct walk {
	const struct udd_estimate *estimate;
	size_t next[UDD_ESTIMATE_READERS]; // record of each log
	struct log gathered;	  // those of a content that is in several logs
};

// All frames with one content.
struct content {
	const struct record *records; // sorted by place
	size_t count;
	bool known; // a block of an image has it
};

// The next records of a log if they have this digest.
static size_t same_ahead(const struct log *log, size_t next, uint64_t wanted)
{
	size_t end = next;

	while (end < log->count && log->items[end].digest == wanted)
		end++;
	return end - next;
}

// 1: there is another content, 0: there is none; -ENOMEM.
static int walk_next(struct walk *walk, struct content *ret)
{
	const struct udd_estimate *estimate = walk->estimate;
	size_t logs = 0;
	uint64_t least = 0;
	bool any = false;

	for (size_t i = 0; i < estimate->reader_count; i++) {
		const struct log *log = &estimate->readers[i]->log;

		if (walk->next[i] < log->count && (!any || log->items[walk->next[i]].digest < least)) {
			least = log->items[walk->next[i]].digest;
			any = true;
		}
	}
	*ret = (struct content){0};
	walk->gathered.count = 0;
	for (size_t i = 0; any && i < estimate->reader_count; i++) {
		const struct log *log = &estimate->readers[i]->log;
		const struct record *first = &log->items[walk->next[i]];
		size_t count = same_ahead(log, walk->next[i], least);

		if (!count)
			continue;
		// In most cases all are in one log, and stay there.
		if (logs == 1)
			for (size_t j = 0; j < ret->count; j++)
				if (log_add(&walk->gathered, ret->records[j]))
					return -ENOMEM;
		for (size_t j = 0; logs && j < count; j++)
			if (log_add(&walk->gathered, first[j]))
				return -ENOMEM;
		ret->records = logs++ ? walk->gathered.items : first;
		ret->count += count;
		ret->known |= !!(first->place & RECORD_KNOWN);
		walk->next[i] += count;
	}
	if (logs > 1)
		records_sort(walk->gathered.items, walk->gathered.count, KEY_PLACE);
	return any;
}

static struct udd_place *place_of(const struct udd_estimate *estimate, const struct record *record)
{
	return udd_estimate_place(estimate, record->place & RECORD_PLACE);
}

// How many records from `at` on are of one process.
static size_t of_process(const struct udd_estimate *estimate, const struct content *content, size_t at)
{
	uint32_t process = place_of(estimate, &content->records[at])->process;
	size_t next = at + 1;

	while (next < content->count && place_of(estimate, &content->records[next])->process == process)
		next++;
	return next - at;
}

static size_t processes_of(const struct udd_estimate *estimate, const struct content *content)
{
	size_t processes = 0;

	for (size_t at = 0; at < content->count; at += of_process(estimate, content, at))
		processes++;
	return processes;
}

static size_t times(const struct content *content)
{
	return content->count < UDD_ESTIMATE_TIMES ? content->count : UDD_ESTIMATE_TIMES;
}

int udd_estimate_count(const struct udd_estimate *estimate, struct udd_contents *ret)
{
	struct walk walk = {.estimate = estimate};
	struct content content;
	int r;

	*ret = (struct udd_contents){0};
	while ((r = walk_next(&walk, &content)) > 0) {
		ret->seen[times(&content)]++;
		ret->pages += content.count;
	}
	free(walk.gathered.items);
	return r;
}

// Of a content that was found several times. `each`: what is saved with each frame but the first, which is 1 if all are known.
static void judge_several(const struct udd_estimate *estimate, const struct content *content, double each, struct udd_saved *ret)
{
	size_t processes = processes_of(estimate, content), file = 0;

	for (size_t at = 0, own; at < content->count; at += own) {
		own = of_process(estimate, content, at);
		// What a process saves, in equal parts to its frames.
		double within = each * (own - 1) / own, between = each * (processes - 1) / processes / own;

		for (size_t i = at; i < at + own; i++) {
			struct udd_place *place = place_of(estimate, &content->records[i]);

			place->within += within;
			place->between += between;
			place->known += content->known;
			file += content->records[i].place & RECORD_FILE ? 1 : 0;
		}
	}
	size_t anonymous = content->count - file;

	ret->within += each * (content->count - processes);
	ret->between += each * (processes - 1);
	ret->anonymous += each * (anonymous ? anonymous - 1 : 0);
	ret->file += each * (file ? file - 1 : 0);
	ret->mixed += anonymous && file ? each : 0;
}

// Of one that was found once. `within`, `between`: what is saved with it, since there are others beyond the sample.
static void judge_single(const struct udd_estimate *estimate, const struct content *content, double within, double between)
{
	struct udd_place *place = place_of(estimate, content->records);

	place->within += within;
	place->between += between;
	place->known += content->known;
}

static void scale(struct udd_saved *saved, double by)
{
	saved->within *= by;
	saved->between *= by;
	saved->anonymous *= by;
	saved->file *= by;
	saved->mixed *= by;
}

int udd_estimate_judge(struct udd_estimate *estimate, const double *shares, double weight, struct udd_saved *ret)
{
	struct walk several = {.estimate = estimate}, singles = {.estimate = estimate};
	struct content content;
	double single = shares[1] * weight, saved;
	uint64_t single_count = 0;
	int r;

	*ret = (struct udd_saved){0};
	while ((r = walk_next(&several, &content)) > 0) {
		double count = content.count;
		// One copy is left of as many as its frames stand for.
		double share = content.count < UDD_ESTIMATE_TIMES ? shares[content.count] : 1 - 1 / (count * weight);

		if (content.count == 1)
			single_count++;
		else
			judge_several(estimate, &content, weight * share * count / (count - 1), ret);
	}
	free(several.gathered.items);
	if (r)
		return r;
	// With whom those are shared that were found once is not seen: as the others are.
	saved = ret->within + ret->between;
	double within = saved > 0 ? single * ret->within / saved : 0;

	while ((r = walk_next(&singles, &content)) > 0)
		if (content.count == 1)
			judge_single(estimate, &content, within, single - within);
	free(singles.gathered.items);
	if (saved > 0)
		scale(ret, 1 + single * single_count / saved);
	else
		*ret = (struct udd_saved){.between = single * single_count, .anonymous = single * single_count};
	return r;
}
