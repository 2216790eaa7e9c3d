// SPDX-License-Identifier: MIT
#include "layout.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include "agent.h"
#include "sys.h"

// One mapping, as the lines of smaps describe it.
struct mapping {
	uint64_t start;
	uint64_t end;
	uint64_t device;
	uint64_t inode;
	uint64_t rss;   // bytes
	uint64_t key;   // protection key
	bool candidate; // by its first line
	bool data;      // a file's, private and writable: .data of a program or library
	bool barred;    // by its flags
	bool watched;   // by userfaultfd
	bool store;     // a store segment
	bool merged;    // one that private, writable memory was merged with
	bool written;   // pages of it are its own
	uint16_t read_only; // a file's, to be read only: PROT_*; else 0
	bool shared;
	uint32_t attributes;
};

static const char *parse_hex(const char *text, uint64_t *ret)
{
	uint64_t value = 0;

	for (;; text++) {
		char c = *text;

		if (c >= '0' && c <= '9')
			value = value << 4 | (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			value = value << 4 | (uint64_t)(c - 'a' + 10);
		else
			break;
	}
	*ret = value;
	return text;
}

static const char *parse_decimal(const char *text, uint64_t *ret)
{
	uint64_t value = 0;

	while (*text == ' ')
		text++;
	for (; *text >= '0' && *text <= '9'; text++)
		value = value * 10 + (uint64_t)(*text - '0');
	*ret = value;
	return text;
}

static bool starts_with(const char *text, const char *prefix)
{
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

// "start-end perms offset major:minor inode   name"
static void parse_header(const char *line, struct mapping *ret)
{
	const char *permissions;
	const char *text;
	uint64_t ignored;
	uint64_t major;
	uint64_t minor;

	memset(ret, 0, sizeof(*ret));
	text = parse_hex(line, &ret->start);
	text = parse_hex(text + 1, &ret->end);
	permissions = text + 1;
	text = parse_hex(permissions + 5, &ignored);
	text = parse_hex(text + 1, &major);
	text = parse_hex(text + 1, &minor);
	ret->device = makedev(major, minor);
	text = parse_decimal(text, &ret->inode);
	while (*text == ' ')
		text++;
	ret->store = starts_with(text, "/memfd:udedup-store");
	ret->data = memcmp(permissions, "rw-p", 4) == 0 && ret->inode && !ret->store;
	if (ret->inode && !ret->store && (memcmp(permissions, "r--", 3) == 0 || memcmp(permissions, "r-x", 3) == 0))
		ret->read_only = permissions[2] == 'x' ? PROT_READ | PROT_EXEC : PROT_READ;
	ret->shared = permissions[3] == 's';
	ret->merged = memcmp(permissions, "rw-p", 4) == 0 && starts_with(text, "/memfd:udedup-store (");
	ret->candidate = memcmp(permissions, "rw-p", 4) == 0 && ret->inode == 0 &&
			 (*text == '\0' || starts_with(text, "[heap]") || starts_with(text, "[anon:"));
}

// "VmFlags: rd wr mr mw me ac sd ": two letters each
static void parse_flags(const char *text, struct mapping *mapping)
{
	static const struct {
		char name[3];
		uint32_t attribute; // 0: bars merging
	} flags[] = {
		{"dc", UDD_ATTRIBUTE_DONTFORK}, {"dd", UDD_ATTRIBUTE_DONTDUMP},     {"mg", UDD_ATTRIBUTE_MERGEABLE},
		{"hg", UDD_ATTRIBUTE_HUGEPAGE}, {"nh", UDD_ATTRIBUTE_NOHUGEPAGE}, {"lo", 0},
		{"wf", 0},                      {"gd", 0},                          {"io", 0},
		{"pf", 0},                      {"ht", 0},                          {"sl", 0},
		{"dp", 0},                      {"ss", 0},
	};

	for (; text[0] && text[1]; text += text[2] == ' ' ? 3 : 2) {
		if (memcmp(text, "um", 2) == 0 || memcmp(text, "uw", 2) == 0 || memcmp(text, "ui", 2) == 0)
			mapping->watched = true;
		for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
			if (memcmp(text, flags[i].name, 2) != 0)
				continue;
			if (flags[i].attribute)
				mapping->attributes |= flags[i].attribute;
			else
				mapping->barred = true;
		}
	}
}

static bool is_stack(const struct udd_layout *layout, struct udd_span span)
{
	for (uint32_t i = 0; i < layout->stack_count; i++) {
		if (udd_span_overlaps(layout->stacks[i], span))
			return true;
	}
	return false;
}

// The state of one reading of smaps.
struct reading {
	struct udd_layout *layout;
	struct udd_span own;
	struct mapping mapping; // the one whose lines are being read
	bool any;               // `mapping` holds one
	uint64_t data_end;      // where the last .data ended
};

static void add_candidate(struct udd_layout *layout, const struct mapping *mapping, struct udd_span span, uint16_t file)
{
	if (layout->count == UDD_LAYOUT_MAX)
		return;
	layout->candidates[layout->count++] = (struct udd_candidate){
		.start = span.start,
		.end = span.end,
		.attributes = (uint16_t)mapping->attributes,
		.file = file,
		.merged = mapping->merged,
	};
}

// Mappings of the same file that follow each other are one to the kernel.
static void add_files(struct udd_layout *layout, const struct mapping *mapping)
{
	struct udd_span whole = {mapping->start, mapping->end};
	bool found = false;

	// In a child that does not get it, nothing could put the file back.
	if (mapping->barred || mapping->watched || mapping->key || mapping->attributes & UDD_ATTRIBUTE_DONTFORK)
		return;
	for (uint32_t i = 0; i < layout->file_count; i++) {
		const struct udd_layout_file *file = &layout->files[i];
		struct udd_span span = udd_span_clip(file->span, whole);

		if (udd_span_empty(span) || file->device != mapping->device || file->inode != mapping->inode ||
		    file->shared != mapping->shared || file->protection != mapping->read_only)
			continue;
		add_candidate(layout, mapping, span, file->number);
		found = true;
	}
	if (found)
		layout->present += mapping->rss;
}

static void mapping_done(struct reading *reading)
{
	const struct mapping *mapping = &reading->mapping;
	struct udd_layout *layout = reading->layout;
	struct udd_span span = {mapping->start, mapping->end};
	bool bss = mapping->start == reading->data_end;

	if (!reading->any)
		return;
	layout->mappings++;
	if (mapping->store || (mapping->candidate && !udd_span_overlaps(span, reading->own)))
		layout->present += mapping->rss;
	if (mapping->data)
		reading->data_end = mapping->end;
	if (mapping->read_only)
		add_files(layout, mapping);
	// What was written to in a mapping of the store is never merged again, where it is.
	if (mapping->merged ? mapping->written : !mapping->candidate || mapping->watched)
		return;
	if (mapping->barred || mapping->key || bss || udd_span_overlaps(span, reading->own) || is_stack(layout, span))
		return;
	add_candidate(layout, mapping, span, 0);
}

static void parse_line(struct reading *reading, const char *line)
{
	uint64_t value;

	// Only a mapping's first line starts in lower case or with a digit.
	if (line[0] >= '0' && line[0] != 'F' && (line[0] <= '9' || (line[0] >= 'a' && line[0] <= 'f'))) {
		mapping_done(reading);
		parse_header(line, &reading->mapping);
		reading->any = true;
	} else if (starts_with(line, "Rss:")) {
		parse_decimal(line + 4, &value);
		reading->mapping.rss = value << 10;
	} else if (starts_with(line, "Anonymous:")) {
		parse_decimal(line + 10, &value);
		reading->mapping.written = value != 0;
	} else if (starts_with(line, "ProtectionKey:")) {
		parse_decimal(line + 14, &reading->mapping.key);
	} else if (starts_with(line, "VmFlags: ")) {
		parse_flags(line + 9, &reading->mapping);
	}
}

void udd_layout_note_files(struct udd_layout *layout)
{
	layout->file_count = 0;
	for (uint32_t i = 0; i < udd_agent.files_used; i++) {
		const struct udd_file *file = &udd_agent.files[i];
		uint32_t at = layout->file_count;

		if (!file->mergeable)
			continue;
		for (; at && layout->files[at - 1].span.start > file->span.start; at--)
			layout->files[at] = layout->files[at - 1];
		layout->files[at] = (struct udd_layout_file){
			.span = file->span,
			.device = file->device,
			.inode = file->inode,
			.number = (uint16_t)(i + 1),
			.protection = file->protection,
			.shared = file->shared,
		};
		layout->file_count++;
	}
}

int udd_layout_read(struct udd_layout *layout, struct udd_span own)
{
	struct reading reading = {.layout = layout, .own = own};
	// Of the processor: where threads map and unmap all the time, the waiting for them is no reason to look less often.
	uint64_t started = udd_clock(CLOCK_THREAD_CPUTIME_ID);
	size_t filled = 0;
	int ret = 0;

	layout->count = 0;
	layout->mappings = 0;
	layout->stale = 0;
	layout->runs = udd_agent.runs.count;
	layout->present = 0;
	udd_sys(SYS_lseek, layout->smaps_fd, 0, 0);
	for (;;) {
		long got = udd_sys(SYS_read, layout->smaps_fd, layout->buffer + filled, UDD_LAYOUT_BUFFER - 1 - filled);
		char *line = layout->buffer;
		char *end;

		if (got == -EINTR)
			continue;
		if (udd_failed(got)) {
			layout->count = 0;
			ret = (int)got;
			break;
		}
		filled += (size_t)got;
		layout->buffer[filled] = '\0';
		while ((end = strchr(line, '\n'))) {
			*end = '\0';
			parse_line(&reading, line);
			line = end + 1;
		}
		filled = (size_t)(layout->buffer + filled - line);
		memmove(layout->buffer, line, filled);
		// A line longer than the buffer can only be a path; what it is the path of is no candidate.
		if (filled == UDD_LAYOUT_BUFFER - 1)
			filled = 0;
		if (got == 0) {
			mapping_done(&reading);
			break;
		}
	}
	layout->read_at = udd_now();
	layout->read_cost = udd_clock(CLOCK_THREAD_CPUTIME_ID) - started;
	return ret;
}

struct udd_candidate *udd_layout_find(const struct udd_layout *layout, uint64_t address)
{
	uint32_t low = 0;
	uint32_t high = layout->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (layout->candidates[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < layout->count ? &layout->candidates[low] : NULL;
}

static void forget_stacks(struct udd_layout *layout, struct udd_span span)
{
	for (uint32_t i = 0; i < layout->stack_count; i++) {
		if (udd_span_overlaps(layout->stacks[i], span))
			layout->stacks[i] = (struct udd_span){0};
	}
}

static void remember_stack(struct udd_layout *layout, struct udd_span span)
{
	if (layout->stack_count < UDD_STACKS_MAX) {
		layout->stacks[layout->stack_count++] = span;
	} else {
		// Forgetting one costs time, not correctness: a stack may be merged like any memory.
		layout->stacks[layout->stack_next] = span;
		layout->stack_next = (layout->stack_next + 1) % UDD_STACKS_MAX;
	}
}

void udd_stale_note(struct udd_stale *stale, uint32_t *count, struct udd_span span, enum udd_stale_kind kind)
{
	enum { LOOK_BACK = 8 };
	uint32_t seen = (uint32_t)udd_min(__atomic_load_n(count, __ATOMIC_ACQUIRE), UDD_STALE_SLOTS);
	uint32_t slot;

	for (uint32_t back = 1; back <= udd_min(seen, LOOK_BACK); back++) {
		const struct udd_stale *last = &stale[seen - back];
		uint64_t end = __atomic_load_n(&last->end, __ATOMIC_ACQUIRE);
		uint64_t start = __atomic_load_n(&last->start, __ATOMIC_RELAXED);

		if (start >= span.end || (end && end <= span.start))
			continue;
		if (end >= span.end && start <= span.start && __atomic_load_n(&last->kind, __ATOMIC_RELAXED) == kind)
			return;
		// The last word on some of this memory is another one, or is just being written.
		break;
	}
	slot = __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
	if (slot >= UDD_STALE_SLOTS) {
		__atomic_store_n(count, UDD_STALE_SLOTS + 1, __ATOMIC_RELAXED);
		return;
	}
	__atomic_store_n(&stale[slot].start, span.start, __ATOMIC_RELAXED);
	__atomic_store_n(&stale[slot].kind, kind, __ATOMIC_RELAXED);
	__atomic_store_n(&stale[slot].end, span.end, __ATOMIC_RELEASE);
}

void udd_layout_apply(struct udd_layout *layout, struct udd_stale *stale, uint32_t *stale_count)
{
	uint32_t count = (uint32_t)udd_min(*stale_count, UDD_STALE_SLOTS);

	layout->stale += *stale_count;
	if (*stale_count > UDD_STALE_SLOTS)
		layout->count = 0;
	for (uint32_t i = 0; i < count; i++) {
		struct udd_span span = {stale[i].start, stale[i].end};
		struct udd_candidate *candidate = udd_layout_find(layout, span.start);
		struct udd_candidate *last = layout->candidates + layout->count;

		for (; candidate && candidate < last && candidate->start < span.end; candidate++)
			candidate->stale = 1;
		if (stale[i].kind == UDD_STALE_STACK)
			remember_stack(layout, span);
		else
			forget_stacks(layout, span);
	}
	memset(stale, 0, count * sizeof(*stale));
	*stale_count = 0;
}
