// SPDX-License-Identifier: MIT
// The comparison with the oracle, and the report on the first wrong byte.
//
// Reports are made without stdio and without the heap: they also come from fork children of a multi-threaded program.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "torture.h"

enum { LINE = 2048 };

static _Atomic(bool) *reporting; // in oracle memory: one report per family

void check_init(void)
{
	reporting = shared_allocate(sizeof(*reporting));
}

static void put(const char *text, size_t size)
{
	while (size) {
		ssize_t written = write(STDERR_FILENO, text, size);

		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return;
		text += written;
		size -= (size_t)written;
	}
}

static void say_list(const char *format, va_list arguments)
{
	char line[LINE];
	int length = vsnprintf(line, sizeof(line) - 1, format, arguments);

	if (length > LINE - 2)
		length = LINE - 2;
	line[length] = '\n';
	put(line, (size_t)length + 1);
}

void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	say_list(format, arguments);
	va_end(arguments);
}

void setup_error(const char *what)
{
	say("torture: %s: %s", what, strerror(errno));
	_exit(EXIT_SETUP);
}

// What /proc/self/smaps says of the mappings in a range.
static void say_mappings(uintptr_t start, uintptr_t end)
{
	char buffer[8192], header[256] = "";
	size_t kept = 0;
	ssize_t got;
	int fd = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);

	while (fd >= 0 && (got = read(fd, buffer + kept, sizeof(buffer) - 1 - kept)) > 0) {
		char *line = buffer, *line_end;

		buffer[kept + (size_t)got] = 0;
		while ((line_end = strchr(line, '\n'))) {
			uintptr_t first, last;

			*line_end = 0;
			if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &first, &last) == 2)
				snprintf(header, sizeof(header), "%s", first < end && start < last ? line : "");
			else if (*header && !strncmp(line, "VmFlags:", 8))
				say("  mapping      %s [%s]", header, line + 9);
			line = line_end + 1;
		}
		kept = strlen(line);
		memmove(buffer, line, kept);
	}
	if (fd >= 0)
		close(fd);
}

static void say_page(uintptr_t address)
{
	uint64_t entry;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd >= 0 && pread(fd, &entry, sizeof(entry), (off_t)(address / PAGE * sizeof(entry))) == sizeof(entry))
		say("  pagemap      present %d, swapped %d, file or shared %d, uffd-wp %d, exclusive %d", (int)(entry >> 63),
		    (int)(entry >> 62 & 1), (int)(entry >> 61 & 1), (int)(entry >> 57 & 1), (int)(entry >> 56 & 1));
	if (fd >= 0)
		close(fd);
}

// What the page looks like: which known content is it nearest to?
static void say_likeness(const unsigned char *page)
{
	if (is_zero(page)) {
		say("  page is      all zero");
		return;
	}
	for (unsigned int i = 0; i < DATA_PAGES; i++) {
		unsigned int differing = 0;

		for (unsigned int j = 0; j < PAGE && differing < 16; j++)
			differing += page[j] != data[(size_t)i * PAGE + j];
		if (differing < 16) {
			say("  page is      known page %u except for %u bytes", i, differing);
			return;
		}
	}
	say("  page is      no known content");
}

static void say_context(const struct region *r, const void *address)
{
	struct worker *w = self;

	say("  seed         %" PRIu64, options.seed);
	if (w)
		say("  thread       %u (tid %d), process %d, fork depth %u, operation %s, %.6f s after start", w->id, (int)w->tid,
		    (int)getpid(), w->depth, operations[w->doing].name, (double)now() / 1e9);
	say_page((uintptr_t)address);
	if (!r) {
		say_mappings((uintptr_t)address, (uintptr_t)address + 1);
		return;
	}
	say_mappings((uintptr_t)r->memory, (uintptr_t)page_at(r, r->pages));
	say("  region       %u of kind %d at %p, %u pages, page %td, generation %" PRIu64 "%s%s, guard %u+%u, pinned %u+%u",
	    r->index, (int)r->kind, (void *)r->memory, r->pages, ((const unsigned char *)address - r->memory) / PAGE,
	    r->generation, r->split ? ", split" : "", r->locked ? ", locked" : "", r->guard_first, r->guard_count,
	    r->pin_first, r->pin_count);
	for (uint64_t i = r->generation < HISTORY ? 0 : r->generation - HISTORY; i < r->generation; i++) {
		const struct event *event = &r->history[i % HISTORY];

		say("  before       %.6f s %s pages %u+%u", (double)event->time / 1e9, operations[event->operation].name,
		    event->first, event->count);
	}
}

// Only the first thread of the family reports. The others leave it the time to do so.
static void report_once(int status)
{
	if (!atomic_exchange(reporting, true))
		return;
	sleep(2);
	_exit(status);
}

void fail(const struct region *r, const void *address, const char *format, ...)
{
	va_list arguments;

	report_once(EXIT_WRONG);
	va_start(arguments, format);
	say_list(format, arguments);
	va_end(arguments);
	say("  address      %p", address);
	say_context(r, address);
	_exit(EXIT_WRONG);
}

static void say_task(pid_t tid, const char *what)
{
	char path[64], text[LINE - 64];

	snprintf(path, sizeof(path), "/proc/self/task/%d/%s", (int)tid, what);
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	ssize_t size = read(fd, text, sizeof(text) - 1);

	close(fd);
	if (size <= 0)
		return;
	text[size] = 0;
	for (char *c = text; *c; c++)
		if (*c == '\n')
			*c = ' ';
	say("      %s: %s", what, text);
}

// Every thread of the process, those included that it knows nothing of.
static void say_threads(void)
{
	char buffer[4096];
	long got;
	int fd = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	while (fd >= 0 && (got = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))) > 0) {
		for (const struct dirent64 *entry = (void *)buffer; (char *)entry < buffer + got;
		     entry = (void *)((char *)entry + entry->d_reclen)) {
			pid_t tid = atoi(entry->d_name);

			if (tid <= 0)
				continue;
			say("    thread %d", (int)tid);
			say_task(tid, "comm");
			say_task(tid, "stat");
			say_task(tid, "schedstat");
			say_task(tid, "syscall");
			say_task(tid, "stack");
		}
	}
	if (fd >= 0)
		close(fd);
}

void say_slow(const struct worker *w)
{
	say("torture: SLOW: thread %u (tid %d), process %d: %s for %.3f s at %p", w->id, (int)w->tid, (int)getpid(), operations[w->doing].name,
	    (double)(now() - w->since) / 1e9, (void *)w->where);
	say_threads();
}

void hang(const char *format, ...)
{
	va_list arguments;
	uint64_t time = now();

	report_once(EXIT_HANG);
	va_start(arguments, format);
	say_list(format, arguments);
	va_end(arguments);
	say("  seed         %" PRIu64, options.seed);
	for (unsigned int i = 0; i < worker_count; i++) {
		const struct worker *w = workers[i];

		say("  thread %u (tid %d): %s for %.3f s at %p%s", w->id, (int)w->tid, operations[w->doing].name,
		    (double)(time - w->since) / 1e9, (void *)w->where, w->done ? ", ended" : "");
		say_task(w->tid, "syscall");
		say_task(w->tid, "wchan");
		say_task(w->tid, "stack");
		for (unsigned int j = 0; j < w->slot_count; j++)
			if (w->slots[j].pid)
				say("    child %d: %s for %.3f s at %p", (int)w->slots[j].pid,
				    operations[w->slots[j].worker.doing].name,
				    (double)(time - w->slots[j].worker.since) / 1e9, (void *)w->slots[j].worker.where);
	}
	_exit(EXIT_HANG);
}

static _Noreturn void wrong(const struct region *r, const unsigned char *got, const unsigned char *want, size_t size,
			    const char *what)
{
	unsigned char copy[PAGE];
	size_t first = size, last = 0, count = 0;

	report_once(EXIT_WRONG);
	if (size > PAGE)
		size = PAGE;
	memcpy(copy, got, size);
	for (size_t i = 0; i < size; i++) {
		if (copy[i] == want[i])
			continue;
		if (!count)
			first = i;
		last = i;
		count++;
	}
	say("torture: WRONG BYTE: %s", what);
	if (count) {
		say("  address      %p (offset %zu in the %zu bytes compared)", (const void *)(got + first), first, size);
		say("  expected     0x%02x", want[first]);
		say("  got          0x%02x", copy[first]);
		say("  differing    %zu bytes, offsets %zu to %zu", count, first, last);
	} else {
		say("  address      %p: it differed at the first look and was right at the second", (const void *)got);
	}
	say("  at another look the bytes are %s", memcmp(got, want, size) ? "still wrong" : "right");
	if (size == PAGE) {
		say_likeness(copy);
		say("  and should be:");
		say_likeness(want);
	}
	say_context(r, got);
	_exit(EXIT_WRONG);
}

void check_bytes(const struct region *r, const unsigned char *got, const unsigned char *want, size_t size,
		 const char *what)
{
	for (size_t done = 0; done < size; done += PAGE) {
		size_t part = size - done < PAGE ? size - done : PAGE;

		if (memcmp(got + done, want + done, part))
			wrong(r, got + done, want + done, part, what);
	}
}

void check_span(struct worker *w, struct region *r, struct span span)
{
	for (unsigned int i = span.first; i < span.first + span.count; i++) {
		const unsigned char *got = page_at(r, i), *want = r->oracle + (size_t)i * PAGE;

		w->where = (uintptr_t)got;
		// A page given to MADV_FREE may go while it is compared; once gone it stays zero.
		if (memcmp(got, want, PAGE) && !(r->maybe[i] && is_zero(got)) && !(r->maybe[i] && is_zero(got)))
			wrong(r, got, want, PAGE, r->maybe[i] ? "freed page is neither as before nor zero" : "page");
		w->verified++;
	}
}

// All of it, except for pages that can't be read now.
void check_region(struct worker *w, struct region *r)
{
	if (!r->guard_count || r->guard != PROT_NONE) {
		check_span(w, r, (struct span){0, r->pages});
		return;
	}
	unsigned int end = r->guard_first + r->guard_count;

	check_span(w, r, (struct span){0, r->guard_first});
	check_span(w, r, (struct span){end, r->pages - end});
}

// After MADV_FREE a write decides whether a page keeps its old content or is zero; from then on it is known.
void settle(struct worker *w, struct region *r, struct span span)
{
	for (unsigned int i = span.first; i < span.first + span.count; i++) {
		if (!r->maybe[i])
			continue;
		unsigned char *page = page_at(r, i), *want = r->oracle + (size_t)i * PAGE;
		unsigned int offset = below(w, PAGE);
		unsigned char value = (unsigned char)draw(w);
		unsigned char zero[PAGE] = {0};

		((volatile unsigned char *)page)[offset] = value;
		if (sabotaged(w, SABOTAGE_FREE))
			page[offset ^ 1] ^= 1;
		want[offset] = value;
		zero[offset] = value;
		if (memcmp(page, want, PAGE) && !memcmp(page, zero, PAGE))
			memcpy(want, zero, PAGE);
		r->maybe[i] = 0;
		check_span(w, r, (struct span){i, 1});
	}
}

// Whether an access raises SIGSEGV, at that address and for lack of permission. A write that goes through has put back
// what was there.
bool faults(struct worker *w, void *address, bool write)
{
	volatile unsigned char *byte = address;

	w->fault_address = NULL;
	if (sigsetjmp(w->landing, 1)) {
		if (w->fault_address != address || w->fault_code != SEGV_ACCERR)
			fail(NULL, address, "torture: WRONG SIGNAL: SIGSEGV tells address %p and code %d", w->fault_address,
			     (int)w->fault_code);
		return true;
	}
	w->expecting = 1;
	atomic_signal_fence(memory_order_seq_cst);
	unsigned char value = *byte;

	if (write)
		*byte = value;
	atomic_signal_fence(memory_order_seq_cst);
	w->expecting = 0;
	return false;
}
