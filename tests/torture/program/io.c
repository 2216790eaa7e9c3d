// SPDX-License-Identifier: MIT
// Memory that the kernel or a device reads and writes: system calls, direct I/O, io_uring, process_vm_writev.
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "torture.h"

enum {
	RING_ENTRIES = 64,
	BOUNCE_PAGES = 64,
	PIPE_BYTES = 65536,
};

struct io {
	struct io_uring ring;
	struct region *pinned;  // the region registered with the ring
	int pipe[2];
	int sockets[2];
	int direct;             // the data file, O_DIRECT
	int image;              // -1 while it can't be read
	off_t scratch;          // this worker's part of the data file
	unsigned char *bounce;  // BOUNCE_PAGES in oracle memory
};

static off_t offset_of(unsigned int pages)
{
	return (off_t)pages * PAGE;
}

void io_init(struct worker *w)
{
	struct io *io = w->io = shared_allocate(sizeof(*io));
	char path[64];

	io->bounce = shared_allocate((size_t)BOUNCE_PAGES * PAGE);
	io->scratch = offset_of(DATA_PAGES + w->id * BOUNCE_PAGES);
	io->image = -1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", data_file);
	io->direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (io->direct < 0)
		setup_error("opening the data file with O_DIRECT (give --directory on a file system that can)");
	if (pipe2(io->pipe, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, io->sockets))
		setup_error("pipe and socketpair");
	int result = io_uring_queue_init(RING_ENTRIES, &io->ring, 0);

	if (result < 0) {
		errno = -result;
		setup_error("io_uring_queue_init");
	}
}

void io_deinit(struct worker *w)
{
	struct io *io = w->io;

	io_uring_queue_exit(&io->ring);
	close(io->direct);
	if (io->image >= 0)
		close(io->image);
	for (unsigned int i = 0; i < 2; i++) {
		close(io->pipe[i]);
		close(io->sockets[i]);
	}
}

static void expect(const struct region *r, const void *address, ssize_t got, size_t want, const char *what)
{
	if (got != (ssize_t)want)
		fail(r, address, "torture: WRONG RESULT: %s returned %zd (%s), expected %zu", what, got,
		     got < 0 ? strerror(errno) : "success", want);
}

void op_direct_read(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	unsigned int from = below(w, DATA_PAGES - span.count);
	unsigned char *address = page_at(r, span.first);
	size_t size = (size_t)span.count * PAGE;

	note(w, r, span);
	if (sabotaged(w, SABOTAGE_DIRECT) && span.count <= BOUNCE_PAGES)
		address = w->io->bounce;
	expect(r, address, pread(w->io->direct, address, size, offset_of(from)), size, "pread with O_DIRECT");
	memcpy(r->oracle + (size_t)span.first * PAGE, data + (size_t)from * PAGE, size);
	memset(r->maybe + span.first, 0, span.count);
	check_span(w, r, span);
}

// Reads back through the file what was written to it from the region.
static void check_scratch(struct worker *w, struct region *r, struct span span, const char *what)
{
	size_t size = (size_t)span.count * PAGE;

	expect(r, w->io->bounce, pread(w->io->direct, w->io->bounce, size, w->io->scratch), size, "pread of what was written");
	check_bytes(r, w->io->bounce, r->oracle + (size_t)span.first * PAGE, size, what);
	w->verified += span.count;
}

void op_direct_write(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	size_t size = (size_t)span.count * PAGE;

	note(w, r, span);
	settle(w, r, span);
	expect(r, page_at(r, span.first), pwrite(w->io->direct, page_at(r, span.first), size, w->io->scratch), size,
	       "pwrite with O_DIRECT");
	check_scratch(w, r, span, "page as direct I/O wrote it to a file");
}

static void complete(struct worker *w, struct region *r, unsigned int count)
{
	while (count--) {
		struct io_uring_cqe *cqe;
		int result;

		do
			result = io_uring_wait_cqe(&w->io->ring, &cqe);
		while (result == -EINTR);
		if (result < 0 || cqe->res != (int)cqe->user_data)
			fail(r, r->memory, "torture: WRONG RESULT: io_uring completed with %d, expected %d",
			     result < 0 ? result : cqe->res, result < 0 ? 0 : (int)cqe->user_data);
		io_uring_cqe_seen(&w->io->ring, cqe);
	}
}

static void submit(struct worker *w, struct region *r, struct io_uring_sqe *sqe, size_t size)
{
	sqe->user_data = size;
	if (chance(w, 3))
		sqe->flags |= IOSQE_ASYNC; // by a kernel thread
	int result = io_uring_submit(&w->io->ring);

	if (result != 1)
		fail(r, r->memory, "torture: WRONG RESULT: io_uring_submit returned %d", result);
}

// Several reads under way at once into neighbouring pages, some direct, some by kernel threads.
void op_uring_read(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	unsigned int requests = 0;

	note(w, r, span);
	for (unsigned int i = 0; i < span.count;) {
		unsigned int count = 1 + below(w, span.count - i);
		unsigned int from = below(w, DATA_PAGES - count);
		size_t size = (size_t)count * PAGE;
		struct io_uring_sqe *sqe = io_uring_get_sqe(&w->io->ring);

		io_uring_prep_read(sqe, chance(w, 2) ? w->io->direct : data_file, page_at(r, span.first + i), (unsigned int)size,
				   (uint64_t)offset_of(from));
		submit(w, r, sqe, size);
		memcpy(r->oracle + (size_t)(span.first + i) * PAGE, data + (size_t)from * PAGE, size);
		i += count;
		requests++;
	}
	if (chance(w, 2))
		nap(w, below(w, 3000000));
	complete(w, r, requests);
	memset(r->maybe + span.first, 0, span.count);
	check_span(w, r, span);
}

void unpin(struct worker *w, struct region *r)
{
	int result = io_uring_unregister_buffers(&w->io->ring);

	if (result)
		fail(r, r->memory, "torture: WRONG RESULT: unregistering buffers returned %d", result);
	w->io->pinned = NULL;
	r->pin_count = 0;
}

// Registered buffers are pinned until they are unregistered: whoever moves such a page cuts it off from the ring.
void op_pin(struct worker *w, struct region *r)
{
	if (w->io->pinned)
		unpin(w, w->io->pinned);
	struct span span = pick(w, r, 64);
	struct iovec buffer = {page_at(r, span.first), (size_t)span.count * PAGE};

	note(w, r, span);
	settle(w, r, span);
	int result = io_uring_register_buffers(&w->io->ring, &buffer, 1);

	if (result == -ENOMEM || result == -EPERM) {
		w->skipped++; // RLIMIT_MEMLOCK
		return;
	}
	if (result)
		fail(r, buffer.iov_base, "torture: WRONG RESULT: registering buffers returned %d", result);
	w->io->pinned = r;
	r->pin_first = span.first;
	r->pin_count = span.count;
	check_span(w, r, span);
}

// I/O through a registered buffer: what the ring sees must be what the program sees, in both directions.
void op_fixed(struct worker *w, struct region *r)
{
	if (!r->pin_count) {
		op_pin(w, r);
		return;
	}
	struct span span;

	span.count = 1 + below(w, r->pin_count);
	span.first = r->pin_first + below(w, r->pin_count - span.count + 1);
	size_t size = (size_t)span.count * PAGE;
	unsigned char *address = page_at(r, span.first);
	struct io_uring_sqe *sqe = io_uring_get_sqe(&w->io->ring);

	note(w, r, span);
	if (sabotaged(w, SABOTAGE_PIN)) {
		if (mmap(address, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != address)
			setup_error("mmap");
		memcpy(address, r->oracle + (size_t)span.first * PAGE, PAGE);
	}
	if (chance(w, 2)) {
		unsigned int from = below(w, DATA_PAGES - span.count);

		io_uring_prep_read_fixed(sqe, chance(w, 2) ? w->io->direct : data_file, address, (unsigned int)size,
					 (uint64_t)offset_of(from), 0);
		submit(w, r, sqe, size);
		complete(w, r, 1);
		memcpy(r->oracle + (size_t)span.first * PAGE, data + (size_t)from * PAGE, size);
	} else {
		for (unsigned int i = span.first; i < span.first + span.count; i++) {
			unsigned char value = (unsigned char)draw(w);

			r->oracle[(size_t)i * PAGE] = value;
			*(volatile unsigned char *)page_at(r, i) = value;
		}
		io_uring_prep_write_fixed(sqe, w->io->direct, address, (unsigned int)size, (uint64_t)w->io->scratch, 0);
		submit(w, r, sqe, size);
		complete(w, r, 1);
		check_scratch(w, r, span, "page as io_uring wrote it from a fixed buffer");
	}
	check_span(w, r, span);
}

// Some bytes of a span, at any alignment. Half of the time the source has the same alignment, so that equal pages arise.
static void pick_bytes(struct worker *w, struct span span, size_t *start, size_t *size, size_t *source)
{
	size_t all = (size_t)span.count * PAGE;

	*start = chance(w, 2) ? 0 : below(w, (unsigned int)all);
	*size = chance(w, 2) ? all - *start : 1 + below(w, (unsigned int)(all - *start));
	*source = (size_t)below(w, DATA_PAGES - span.count - 1) * PAGE + (chance(w, 2) ? *start % PAGE : below(w, PAGE));
}

static void receive(struct worker *w, struct region *r, unsigned char *address, const unsigned char *source, size_t size)
{
	bool stream = chance(w, 2);
	int to = stream ? w->io->sockets[0] : w->io->pipe[1];
	int from = stream ? w->io->sockets[1] : w->io->pipe[0];

	while (size) {
		size_t part = size < PIPE_BYTES / 2 ? size : PIPE_BYTES / 2;

		expect(r, source, write(to, source, part), part, "write to a pipe or socket");
		for (size_t done = 0; done < part;) {
			ssize_t got = stream ? recv(from, address + done, part - done, 0) : read(from, address + done, part - done);

			if (got <= 0)
				fail(r, address + done, "torture: WRONG RESULT: %s returned %zd: %s", stream ? "recv" : "read from a pipe",
				     got, strerror(errno));
			done += (size_t)got;
		}
		address += part;
		source += part;
		size -= part;
	}
}

// The kernel writes to pages that may be merged.
void op_kernel_write(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 16);
	size_t start, size, source;

	pick_bytes(w, span, &start, &size, &source);
	unsigned char *address = page_at(r, span.first) + start;

	note(w, r, span);
	settle(w, r, span);
	size_t real = sabotaged(w, SABOTAGE_KERNEL) ? size / 2 : size;

	switch (below(w, 3)) {
	case 0:
		expect(r, address, pread(data_file, address, real, (off_t)source), real, "pread");
		break;
	case 1: {
		size_t half = real / 2;
		struct iovec parts[2] = {{address, half}, {address + half, real - half}};

		expect(r, address, preadv(data_file, parts, 2, (off_t)source), real, "preadv");
		break;
	}
	default:
		receive(w, r, address, data + source, real);
	}
	memcpy(r->oracle + (size_t)span.first * PAGE + start, data + source, size);
	check_span(w, r, span);
}

// The kernel reads from pages that may be merged.
void op_kernel_read(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 8);
	size_t start, size, source;

	pick_bytes(w, span, &start, &size, &source);
	unsigned char *address = page_at(r, span.first) + start;
	struct iovec part = {address, size};
	bool stream = chance(w, 2);
	int from = stream ? w->io->sockets[1] : w->io->pipe[0];

	note(w, r, span);
	settle(w, r, span);
	if (stream)
		expect(r, address, send(w->io->sockets[0], address, size, 0), size, "send");
	else if (chance(w, 2))
		expect(r, address, write(w->io->pipe[1], address, size), size, "write to a pipe");
	else
		expect(r, address, vmsplice(w->io->pipe[1], &part, 1, 0), size, "vmsplice");
	if (chance(w, 4))
		nap(w, below(w, 5000000));
	for (size_t done = 0; done < size;) {
		ssize_t got = read(from, w->io->bounce + done, size - done);

		if (got <= 0)
			fail(r, address, "torture: WRONG RESULT: read back %zd: %s", got, strerror(errno));
		done += (size_t)got;
	}
	check_bytes(r, w->io->bounce, r->oracle + (size_t)span.first * PAGE + start, size, "bytes that the kernel read");
	w->verified += span.count;
}

void op_process_vm(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 16);
	size_t start, size, source;

	pick_bytes(w, span, &start, &size, &source);
	unsigned char *address = page_at(r, span.first) + start;
	struct iovec local = {data + source, size}, remote = {address, size};

	note(w, r, span);
	settle(w, r, span);
	expect(r, address, process_vm_writev(getpid(), &local, 1, &remote, 1, 0), size, "process_vm_writev");
	memcpy(r->oracle + (size_t)span.first * PAGE + start, data + source, size);
	local.iov_base = w->io->bounce;
	expect(r, address, process_vm_readv(getpid(), &local, 1, &remote, 1, 0), size, "process_vm_readv");
	check_bytes(r, w->io->bounce, data + source, size, "bytes that process_vm_readv read");
	check_span(w, r, span);
}

// Reads from the mounted image. Whoever serves it may be killed at any moment: then the read fails (as it does for every
// program) and may have filled a part of the memory.
bool image_fill(struct worker *w, unsigned char *memory, unsigned int first, unsigned int count)
{
	if (!options.image || !w->io)
		return false;
	if (w->io->image < 0)
		w->io->image = open(options.image, O_RDONLY | O_CLOEXEC);
	if (w->io->image < 0)
		return false;
	char byte;
	ssize_t size = (ssize_t)count * PAGE;
	ssize_t got = pread(w->io->image, memory, (size_t)size, offset_of(first));

	if (got == size)
		return true;
	// Killed in the middle of a read, the server leaves it short; the next one says why.
	if (got > 0 && pread(w->io->image, &byte, 1, offset_of(first) + got) < 0)
		got = -1;
	if (got >= 0 || (errno != ENOTCONN && errno != ECONNABORTED && errno != EIO && errno != ENODEV && errno != EINTR))
		fail(NULL, memory, "torture: WRONG RESULT: pread of the image returned %zd: %s", got, strerror(errno));
	close(w->io->image);
	w->io->image = -1;
	w->skipped++;
	return false;
}

void op_image_read(struct worker *w, struct region *r)
{
	struct span span = pick(w, r, 32);
	unsigned int from = below(w, DATA_PAGES - span.count);

	note(w, r, span);
	if (image_fill(w, page_at(r, span.first), from, span.count)) {
		memcpy(r->oracle + (size_t)span.first * PAGE, data + (size_t)from * PAGE, (size_t)span.count * PAGE);
		memset(r->maybe + span.first, 0, span.count);
		check_span(w, r, span);
		return;
	}
	compose(w, r->oracle + (size_t)span.first * PAGE, span.count);
	region_store(w, r, span);
}
