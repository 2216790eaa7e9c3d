// SPDX-License-Identifier: MIT
#include "remap.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../common/uffd.h"
#include "agent.h"
#include "commit.h"
#include "merged.h"
#include "sys.h"

struct mapping {
	uint64_t start, end;
	uint64_t permissions; // PROCMAP_QUERY_VMA_…
	uint64_t inode;
};

static uint64_t digit_of(char c)
{
	return (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
}

static uint64_t permission_of(char c)
{
	switch (c) {
	case 'r': return PROCMAP_QUERY_VMA_READABLE;
	case 'w': return PROCMAP_QUERY_VMA_WRITABLE;
	case 'x': return PROCMAP_QUERY_VMA_EXECUTABLE;
	case 's': return PROCMAP_QUERY_VMA_SHARED;
	default: return 0;
	}
}

// From the lines of /proc/self/maps: their number is what this costs, so it is for old kernels only.
static bool read_mapping_at(int maps, uint64_t address, struct mapping *ret)
{
	enum { START, END, PERMISSIONS, OFFSET, DEVICE, INODE, NAME } field = START;
	char buffer[4096];
	long got;

	*ret = (struct mapping){0};
	udd_sys(SYS_lseek, maps, 0, SEEK_SET);
	while ((got = udd_sys(SYS_read, maps, buffer, sizeof(buffer))) > 0) {
		for (long i = 0; i < got; i++) {
			char c = buffer[i];

			if (c == '\n') {
				if (ret->start <= address && address < ret->end)
					return true;
				*ret = (struct mapping){0};
				field = START;
			} else if (field < NAME && (c == ' ' || (field == START && c == '-'))) {
				field++;
			} else if (field == START) {
				ret->start = ret->start << 4 | digit_of(c);
			} else if (field == END) {
				ret->end = ret->end << 4 | digit_of(c);
			} else if (field == PERMISSIONS) {
				ret->permissions |= permission_of(c);
			} else if (field == INODE) {
				ret->inode = ret->inode * 10 + digit_of(c);
			}
		}
	}
	return false;
}

// The mapping that holds `address`. False if there is none, or it can't be known.
static bool mapping_at(int maps, uint64_t address, struct mapping *ret)
{
	struct procmap_query query = {.size = sizeof(query), .query_addr = address};
	long error = udd_sys(SYS_ioctl, maps, PROCMAP_QUERY, &query);

	// Linux before 6.11 does not know the question.
	if (error && error != -ENOENT)
		return read_mapping_at(maps, address, ret);
	*ret = (struct mapping){
		.start = query.vma_start,
		.end = query.vma_end,
		.permissions = query.vma_flags,
		.inode = query.inode,
	};
	return !error;
}

// Was `span` one private anonymous mapping before merging cut it in pieces?
static bool once_whole(int maps, struct udd_span span)
{
	struct udd_runs *runs = &udd_agent.runs;
	struct mapping first;
	struct mapping next;

	if (maps < 0)
		return true;
	if (!mapping_at(maps, span.start, &first))
		return false;
	for (uint64_t at = span.start; at < span.end; at = next.end) {
		const struct udd_run_entry *run = udd_runs_find(runs, at);
		bool merged = run && run->address <= at;

		if (!mapping_at(maps, at, &next) || next.permissions != first.permissions ||
		    (next.permissions & PROCMAP_QUERY_VMA_SHARED) || (next.inode && !merged))
			return false;
	}
	return true;
}

// A move under way. The hook of mmap() takes no lock where the kernel chooses the address, so no address may become free before
// the move has succeeded: another thread's new mapping would lie where we still have to put something.
struct move {
	int maps;        // a descriptor of /proc/self/maps, or -1
	bool leaves;     // the old mapping stays, empty: MREMAP_DONTUNMAP
	uint64_t moved;  // what is below is at its new place, …
	uint64_t held;   // … and what is below this still mapped at the old one
};

// Moves mapping by mapping: the kernel moves within one mapping only (from 6.17 on several, but it may give up in the
// middle), and merging may have cut what was one into several. The last one grows by `grow` bytes.
static long move_mappings(struct move *move, struct udd_span span, uint64_t grow, uint64_t target)
{
	for (move->moved = span.start; move->moved < span.end;) {
		struct mapping mapping = {.end = move->moved + UDD_PAGE_SIZE};
		uint64_t old = move->moved;
		bool grows;
		uint64_t bytes;
		long ret;

		if (move->maps >= 0 && !mapping_at(move->maps, old, &mapping))
			return -EFAULT;
		bytes = udd_min(mapping.end, span.end) - old;
		// The last of all: nothing can fail behind it.
		grows = grow && old + bytes == span.end;
		ret = udd_sys(SYS_mremap, old, bytes, grows ? bytes + grow : bytes,
			      MREMAP_MAYMOVE | MREMAP_FIXED | (grows ? 0 : MREMAP_DONTUNMAP), target + (old - span.start));
		if (udd_failed(ret))
			return ret;
		move->moved = old + bytes;
		if (grows)
			break;
		move->held = move->moved;
		// One mapping for all that is only held. Where there is none to be had, the empty one holds the place as well.
		if (!move->leaves)
			udd_sys(SYS_mmap, old, bytes, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	return 0;
}

// Moves merged runs with their pages; the pages that broke in place go along.
static long move_run(struct move *move, struct udd_span span, uint64_t grow, uint64_t target)
{
	const struct udd_run_entry run = *udd_runs_find(&udd_agent.runs, span.start);
	uint64_t behind = target + (span.end - span.start);
	long ret = move_mappings(move, span, 0, target);

	if (move->moved > span.start)
		udd_readdress((struct udd_span){span.start, move->moved}, target);
	if (!udd_failed(ret) && move->leaves)
		ret = udd_map_like(&run, span);
	if (!udd_failed(ret) && grow)
		ret = udd_map_like(&run, (struct udd_span){behind, behind + grow});
	return ret;
}

static long move_all(struct move *move, struct udd_span from, uint64_t grow, uint64_t target)
{
	struct udd_runs *runs = &udd_agent.runs;
	long ret = 0;

	for (move->moved = move->held = from.start; move->moved < from.end && !udd_failed(ret);) {
		uint64_t at = move->moved;
		const struct udd_run_entry *run = udd_runs_find(runs, at);
		struct udd_span piece = {at, from.end};
		bool merged = run && run->address <= at;
		uint64_t more;

		if (merged)
			piece.end = udd_min(piece.end, udd_run_span(run).end);
		else if (run)
			piece.end = udd_min(piece.end, run->address);
		more = piece.end == from.end ? grow : 0;
		if (merged)
			ret = move_run(move, piece, more, target + (at - from.start));
		else
			ret = move_mappings(move, piece, more, target + (at - from.start));
	}
	return ret;
}

// Makes the memory that ends at `end` longer, at its place, with the properties it has.
static long grow_in_place(uint64_t end, uint64_t bytes)
{
	const struct udd_run_entry *run = udd_runs_find(&udd_agent.runs, end - UDD_PAGE_SIZE);
	long ret;

	if (run && run->address < end) {
		struct udd_span added = {end, end + bytes};

		// Only to see whether there is room; udd_map_like then maps over it.
		ret = udd_sys(SYS_mmap, end, bytes, PROT_NONE, MAP_FIXED_NOREPLACE | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		return udd_failed(ret) ? -ENOMEM : udd_map_like(run, added);
	}
	ret = udd_sys(SYS_mremap, end - UDD_PAGE_SIZE, UDD_PAGE_SIZE, UDD_PAGE_SIZE + bytes, 0);
	return udd_failed(ret) ? ret : 0;
}

// mremap on memory that merging cut into several mappings, step by step, as the kernel does it for one. No page is copied:
// every piece keeps its physical pages, so that even memory pinned by a device goes along.
static long move_mapping(int maps, struct udd_span from, uint64_t new_bytes, int flags, uint64_t wanted)
{
	struct move move = {.maps = maps, .leaves = flags & MREMAP_DONTUNMAP};
	uint64_t old_bytes = from.end - from.start;
	uint64_t end;
	long target;
	long ret;

	if (new_bytes < old_bytes) {
		struct udd_span tail = {from.start + new_bytes, from.end};

		ret = udd_sys(SYS_munmap, tail.start, tail.end - tail.start);
		if (udd_failed(ret))
			return ret;
		udd_forget(tail);
		from.end = tail.start;
		old_bytes = new_bytes;
	}
	if (!(flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))) {
		ret = grow_in_place(from.end, new_bytes - old_bytes);
		if (!udd_failed(ret))
			return (long)from.start;
		if (!(flags & MREMAP_MAYMOVE))
			return ret;
	}
	// A step takes as much memory as its mapping has, for a moment, and fails without it only after it has unmapped the place to go
	// to (commit.h).
	if (!udd_commit_has_room())
		return -ENOMEM;
	target = udd_sys(SYS_mmap, wanted, new_bytes, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | (flags & MREMAP_FIXED ? MAP_FIXED : 0), -1, 0);
	if (udd_failed(target))
		return target;
	udd_forget((struct udd_span){(uint64_t)target, (uint64_t)target + new_bytes});
	ret = move_all(&move, from, new_bytes - old_bytes, (uint64_t)target);
	if (!udd_failed(ret)) {
		if (!move.leaves && move.held > from.start)
			udd_sys(SYS_munmap, from.start, move.held - from.start);
		return target;
	}
	// Out of mappings, or of memory. What moved goes back, as if nothing had happened.
	end = move.moved;
	move.leaves = false;
	move_all(&move, (struct udd_span){(uint64_t)target, (uint64_t)target + (end - from.start)}, 0, from.start);
	udd_sys(SYS_munmap, target, new_bytes);
	return ret;
}

// A mapping that merging may have cut in several. The descriptor is the application's for a moment; a thread that counts on
// descriptor numbers would have to be this one. Without one, every page is taken for a mapping of its own.
long udd_remap(struct udd_span from, struct udd_span to, const long *arguments)
{
	uint64_t old_bytes = from.end - from.start;
	uint64_t new_bytes = udd_page_up((uint64_t)arguments[2]);
	int flags = (int)arguments[3];
	bool moves = new_bytes > old_bytes || (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP));
	int maps = moves ? (int)udd_sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC) : -1;
	struct mapping mapping = {0};
	long ret;

	if (moves && maps >= 0)
		mapping_at(maps, from.start, &mapping);
	if (moves && (udd_merged_in(from) || mapping.end < from.end) && once_whole(maps, from)) {
		ret = move_mapping(maps, from, new_bytes, flags, (uint64_t)arguments[4]);
	} else if (moves && udd_merged_in(from)) {
		// Several of the application's own, which the kernel refuses.
		ret = -EFAULT;
	} else {
		ret = udd_syscall6(SYS_mremap, arguments[0], arguments[1], arguments[2], flags, arguments[4], 0);
		if (!udd_failed(ret))
			udd_forget(to);
		if (!udd_failed(ret) && new_bytes < old_bytes)
			udd_forget((struct udd_span){from.start + new_bytes, from.end});
	}
	udd_close(maps);
	return ret;
}
