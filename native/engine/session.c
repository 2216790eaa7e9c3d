// SPDX-License-Identifier: MIT
// Requests to the mount that we answer ourselves, past pyfuse3: fallocate(2), for which it has no handler, and reads, for which its
// way through a coroutine takes longer than the read.
//
// pyfuse3 makes its session by giving fuse_session_new(), which is libfuse's, a table of handlers. The dynamic linker has put the
// address of that function into a slot of pyfuse3's own table of such. We put ours there, which changes a copy of the handlers
// and calls the one that was there. All else is libfuse's public interface, as pyfuse3 has it: what we call of it are the
// functions that pyfuse3's slots lead to. An object that lacks one of these slots is left as it is: fallocate fails with EOPNOTSUPP
// then, and reads take the longer way.
//
// pyfuse3 takes each request by fuse_session_receive_buf(), which has such a slot too. Ours answers reads for as long as there are
// more, and gives pyfuse3 what is none.
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/fuse.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include "engine.h"

enum {
	// How long reads may be answered one after the other, before the rest of the loop has its turn.
	HOLD_NS = 500000,
	PAUSE_MAX = 63,
};

typedef struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *handlers, size_t size, void *data);
typedef int session_receive(struct fuse_session *session, struct fuse_buf *buffer);
typedef void session_process(struct fuse_session *session, const struct fuse_buf *buffer);
typedef int session_fd(struct fuse_session *session);
typedef int reply_err(fuse_req_t request, int error);
typedef int reply_buf(fuse_req_t request, const char *data, size_t size);

// Of the process, as pyfuse3's own session is. For the thread that has the GIL.
static struct {
	session_new *make;
	session_receive *receive;
	session_process *process;
	session_fd *descriptor;
	reply_err *fail;
	reply_buf *reply;
	bool ours;  // the session that was made last has our handlers
	bool waits; // its device does when there is no request
	int loop;   // readable when the rest of the loop has something to do; -1: that can't be told
	uint64_t spin_ns;
	uint32_t pause;       // see comes_soon()
	uint32_t passed_over;
} libfuse;

// The slots of an object by which it calls others, and what of it the linker has made read-only since.
struct object {
	const char *name;
	ElfW(Addr) base;
	const ElfW(Dyn) *dynamic;
	uintptr_t sealed;
	uintptr_t sealed_end;
};

// Python's: see udedup/vdi/requests.py.
void udd_read_asked(void *request, uint64_t file, uint64_t offset, uint64_t size);
void udd_fallocate_asked(void *request, uint64_t file, int mode, uint64_t offset, uint64_t length);
void udd_reads_done(void);

static void handle_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *file)
{
	size_t length = size;
	const char *data = udd_express_read(file->fh, (uint64_t)offset, &length);

	(void)inode;
	// Who was interrupted needs no answer, and nothing else can be wrong with one.
	if (data)
		libfuse.reply(request, data, length);
	else
		udd_read_asked(request, file->fh, (uint64_t)offset, size);
}

static void handle_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length, struct fuse_file_info *file)
{
	(void)inode;
	udd_fallocate_asked(request, file->fh, mode, (uint64_t)offset, (uint64_t)length);
}

static struct fuse_session *make_session(struct fuse_args *args, const struct fuse_lowlevel_ops *handlers, size_t size, void *data)
{
	struct fuse_lowlevel_ops changed = {0};

	libfuse.ours = size >= offsetof(struct fuse_lowlevel_ops, fallocate) + sizeof(changed.fallocate) && size <= sizeof(changed);
	libfuse.waits = true;
	if (!libfuse.ours)
		return libfuse.make(args, handlers, size, data);
	memcpy(&changed, handlers, size);
	changed.read = handle_read;
	changed.fallocate = handle_fallocate;
	return libfuse.make(args, &changed, size, data);
}

static bool is_read(const struct fuse_buf *buffer, int received)
{
	const struct fuse_in_header *header = buffer->mem;

	return received >= (int)sizeof(*header) && !(buffer->flags & FUSE_BUF_IS_FD) && header->opcode == FUSE_READ;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Has the device tell when there is nothing, instead of waiting: to ask costs a system call more for each request.
static void open_up(struct fuse_session *session)
{
	int device = libfuse.descriptor(session), flags = fcntl(device, F_GETFL);

	libfuse.waits = flags < 0 || fcntl(device, F_SETFL, flags | O_NONBLOCK) < 0;
}

// Whether another request comes soon, after there was none: looks for it for a while, as long as that finds some. After each look
// in vain, twice as many times are passed over before the next.
static bool comes_soon(struct fuse_session *session)
{
	bool found;

	if (libfuse.passed_over < libfuse.pause) {
		libfuse.passed_over++;
		return false;
	}
	found = udd_request_wait(libfuse.descriptor(session), libfuse.loop, libfuse.spin_ns) == UDD_REQUEST_THERE;
	libfuse.pause = found ? 0 : 2 * libfuse.pause + 1 < PAUSE_MAX ? 2 * libfuse.pause + 1 : PAUSE_MAX;
	libfuse.passed_over = 0;
	return found;
}

// Answers reads for as long as there are any; returns what else was received, as libfuse does.
static int answer_reads(struct fuse_session *session, struct fuse_buf *buffer)
{
	int64_t end = now_ns() + HOLD_NS;
	bool answered = false;

	do {
		int received = libfuse.receive(session, buffer);

		if (received == -EAGAIN && answered && comes_soon(session))
			continue;
		if (!libfuse.ours || !is_read(buffer, received))
			return received;
		libfuse.process(session, buffer);
		answered = true;
	} while (!libfuse.waits && udd_express_answered() < UDD_EXPRESS_BATCH && now_ns() < end);
	return -EINTR;
}

// Instead of libfuse's. -EINTR, on which pyfuse3 looks for the next request, when there is none left that is not answered.
static int receive(struct fuse_session *session, struct fuse_buf *buffer)
{
	int received;

	if (libfuse.waits)
		open_up(session);
	received = answer_reads(session, buffer);
	if (udd_express_answered())
		udd_reads_done();
	return received == -EAGAIN ? -EINTR : received;
}

static int object_look(struct dl_phdr_info *info, size_t size, void *data)
{
	struct object *object = data;

	(void)size;
	if (!info->dlpi_name || strcmp(info->dlpi_name, object->name))
		return 0;
	object->base = info->dlpi_addr;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *header = &info->dlpi_phdr[i];

		if (header->p_type == PT_DYNAMIC)
			object->dynamic = (const ElfW(Dyn) *)(info->dlpi_addr + header->p_vaddr);
		if (header->p_type == PT_GNU_RELRO) {
			object->sealed = info->dlpi_addr + header->p_vaddr;
			object->sealed_end = object->sealed + header->p_memsz;
		}
	}
	return 1;
}

// What the dynamic section says of `tag`: an address, which glibc has made a real one, or a size. 0: nothing.
static uintptr_t object_entry(const struct object *object, ElfW(Sxword) tag)
{
	for (const ElfW(Dyn) *entry = object->dynamic; entry->d_tag != DT_NULL; entry++) {
		if (entry->d_tag == tag)
			return entry->d_un.d_ptr;
	}
	return 0;
}

static void **object_slot_among(const struct object *object, ElfW(Sxword) table, ElfW(Sxword) size, const char *name)
{
	const ElfW(Rela) *relocations = (const ElfW(Rela) *)object_entry(object, table);
	const ElfW(Sym) *symbols = (const ElfW(Sym) *)object_entry(object, DT_SYMTAB);
	const char *names = (const char *)object_entry(object, DT_STRTAB);
	size_t count = relocations && symbols && names ? object_entry(object, size) / sizeof(*relocations) : 0;

	for (size_t i = 0; i < count; i++) {
		unsigned int type = ELF64_R_TYPE(relocations[i].r_info);
		const ElfW(Sym) *symbol = &symbols[ELF64_R_SYM(relocations[i].r_info)];

		if ((type == R_X86_64_JUMP_SLOT || type == R_X86_64_GLOB_DAT) && !strcmp(names + symbol->st_name, name))
			return (void **)(object->base + relocations[i].r_offset);
	}
	return NULL;
}

// Where the object keeps the address of another's function; NULL: nowhere.
static void **object_slot(const struct object *object, const char *name)
{
	void **slot = object_slot_among(object, DT_JMPREL, DT_PLTRELSZ, name);

	return slot ? slot : object_slot_among(object, DT_RELA, DT_RELASZ, name);
}

static int object_put(const struct object *object, void **slot, void *value)
{
	uintptr_t page = (uintptr_t)slot & ~(uintptr_t)(UDD_PAGE_SIZE - 1);
	bool sealed = (uintptr_t)slot >= object->sealed && (uintptr_t)slot < object->sealed_end;

	if (sealed && mprotect((void *)page, UDD_PAGE_SIZE, PROT_READ | PROT_WRITE))
		return -errno;
	__atomic_store_n(slot, value, __ATOMIC_RELEASE);
	if (sealed && mprotect((void *)page, UDD_PAGE_SIZE, PROT_READ))
		return -errno;
	return 0;
}

int udd_session_prepare(const char *name)
{
	struct object object = {.name = name};
	void **make, **take, **process, **descriptor, **fail, **reply;
	int r;

	libfuse.ours = false;
	if (!dl_iterate_phdr(object_look, &object) || !object.dynamic)
		return -ENOENT;
	make = object_slot(&object, "fuse_session_new");
	take = object_slot(&object, "fuse_session_receive_buf");
	process = object_slot(&object, "fuse_session_process_buf");
	descriptor = object_slot(&object, "fuse_session_fd");
	fail = object_slot(&object, "fuse_reply_err");
	reply = object_slot(&object, "fuse_reply_buf");
	if (!make || !take || !process || !descriptor || !fail || !reply)
		return -ENOSYS;
	if (*make == (void *)make_session)
		return 0;
	libfuse.make = (session_new *)*make;
	libfuse.receive = (session_receive *)*take;
	libfuse.process = (session_process *)*process;
	libfuse.descriptor = (session_fd *)*descriptor;
	libfuse.fail = (reply_err *)*fail;
	libfuse.reply = (reply_buf *)*reply;
	r = object_put(&object, take, (void *)receive);
	return r ? r : object_put(&object, make, (void *)make_session);
}

void udd_session_look(int loop, uint64_t spin_ns)
{
	libfuse.loop = loop;
	libfuse.spin_ns = spin_ns;
	libfuse.pause = libfuse.passed_over = 0;
}

int udd_session_ours(void)
{
	return libfuse.ours;
}

int udd_request_reply(void *request, const char *data, size_t size)
{
	return libfuse.reply(request, data, size);
}

int udd_request_fail(void *request, int error)
{
	return libfuse.fail(request, error);
}
