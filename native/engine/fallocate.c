// SPDX-License-Identifier: MIT
// fallocate(2) on files of the mount: the one request we want that pyfuse3 has no handler for.
//
// pyfuse3 makes its session by giving fuse_session_new(), which is libfuse's, a table of handlers, and leaves that one empty. The
// dynamic linker has put the address of that function into a slot of pyfuse3's own table of such. We put ours there, which
// fills the gap in a copy of the handlers and calls the one that was there. All else is libfuse's public interface, as pyfuse3 has
// it: the answer, too, is given by the function that pyfuse3's slot for that leads to. An object that has no such slot is
// left as it is, and fallocate fails with EOPNOTSUPP, as without us.
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include "engine.h"

typedef struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *handlers, size_t size, void *data);
typedef int reply_err(fuse_req_t request, int error);

// Of the process, as pyfuse3's own session is. For the thread that has the GIL.
static struct {
	session_new *make;
	reply_err *reply;
	bool handled; // the session that was made last has the handler
} libfuse;

// The slots of an object by which it calls others, and what of it the linker has made read-only since.
struct object {
	const char *name;
	ElfW(Addr) base;
	const ElfW(Dyn) *dynamic;
	uintptr_t sealed;
	uintptr_t sealed_end;
};

// Python's: see udedup/vdi/holes.py.
void udd_fallocate_asked(struct udd_fallocate *asked);

static void handle(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length, struct fuse_file_info *file)
{
	struct udd_fallocate asked = {
		.request = request,
		.file = file->fh,
		.mode = mode,
		.offset = (uint64_t)offset,
		.length = (uint64_t)length,
	};

	(void)inode;
	udd_fallocate_asked(&asked);
}

static struct fuse_session *make_session(struct fuse_args *args, const struct fuse_lowlevel_ops *handlers, size_t size, void *data)
{
	struct fuse_lowlevel_ops more = {0};

	libfuse.handled = size >= offsetof(struct fuse_lowlevel_ops, fallocate) + sizeof(more.fallocate) && size <= sizeof(more);
	if (!libfuse.handled)
		return libfuse.make(args, handlers, size, data);
	memcpy(&more, handlers, size);
	more.fallocate = handle;
	return libfuse.make(args, &more, size, data);
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

int udd_fallocate_prepare(const char *name)
{
	struct object object = {.name = name};
	void **make, **reply;

	libfuse.handled = false;
	if (!dl_iterate_phdr(object_look, &object) || !object.dynamic)
		return -ENOENT;
	make = object_slot(&object, "fuse_session_new");
	reply = object_slot(&object, "fuse_reply_err");
	if (!make || !reply)
		return -ENOSYS;
	if (*make == (void *)make_session)
		return 0;
	libfuse.make = (session_new *)*make;
	libfuse.reply = (reply_err *)*reply;
	return object_put(&object, make, (void *)make_session);
}

int udd_fallocate_handled(void)
{
	return libfuse.handled;
}

int udd_fallocate_answer(void *request, int error)
{
	return libfuse.reply(request, error);
}
