// SPDX-License-Identifier: MIT
// Mappings of files on the udedup mount that nobody can write to: which there are, and how merged pages in them become the
// file's again.
//
// Such a page needs no freezing to be merged: it can't change, as long as the file doesn't. So only files that their server
// says are read-only (no write permission for anybody) count, and only mappings that are left alone since they were made
// readable and nothing else by libc's mmap(), or readable and perhaps executable when the program was started: the program itself and
// its libraries. What the dynamic linker maps later it also unmaps, past the hooks.
//
// To put the file back, on whatever thread that is, no descriptor is needed: each such mapping gets a *spare*, a second mapping
// of the same file that nobody touches, from which mremap() makes copies (MREMAP_DONTUNMAP). It is made from the application's
// own mapping in the same way, so it is of the same open file, with the same flags, and it goes as soon as nothing merged is
// left: it keeps the file open no longer than the application does.
//
// Merged, they need no userfaultfd either. A debugger that writes into one gets a private copy from the kernel, as it would in
// the file's mapping.
//
// Does no locking: all under the map lock, unless said otherwise.
#ifndef UDD_FILES_H
#define UDD_FILES_H

#include <stdbool.h>
#include <stdint.h>

#include "runs.h"
#include "util.h"

enum {
	UDD_FILES_MAX = 256, // mappings known at a time
};

// A mapping of a file, as the application made it. A slot is free if it is neither mergeable nor referred to.
struct udd_file {
	struct udd_span span;
	uint64_t device;     // of the file
	uint64_t inode;
	uint64_t spare;      // address of our own mapping of the same; 0: none
	uint32_t references; // pages of runs in it, broken ones too
	uint32_t mergeable;  // 1: as it was made. Cleared with the lock held shared, else changed with it held exclusively
	uint16_t shared;     // 1: MAP_SHARED
	uint16_t protection; // PROT_*
};

// Is what mmap() was asked for, and gave, a mapping to be known? Fills `ret` then. The application's thread; no lock.
bool udd_file_wanted(struct udd_span span, int protection, int flags, int fd, struct udd_file *ret);
// Remembers what is mapped when the program starts. Before there is a thread of ours.
void udd_files_at_start(void);
// The mount is known now: forgets what is not on it. The lock is held exclusively.
void udd_files_choose(uint64_t device);
// Remembers it, if there is room, and if it is not known to be elsewhere: what is mapped before the engine has said where its
// mount is may be on it.
void udd_file_add(const struct udd_file *file);
// Something about the application's mappings of `span` was changed, or will be. The lock may be held shared.
void udd_files_changed(struct udd_span span);
// Is all of `span` still as it was made, in the mapping of file number `file`? The number may be another one's by now.
bool udd_file_holds(uint32_t file, struct udd_span span);
// One more stretch of file number `file` (from 1) is about to be merged: sees to the spare. 0 or a negative errno. The worker.
int udd_file_take(uint32_t file, uint32_t pages);
// So many pages of it are no longer in the table, if it is one at all (0: it is not).
void udd_file_put(uint32_t file, uint32_t pages);
// Puts the file back where pages could not be merged after all. They are not in the table.
void udd_file_map_back(uint32_t file, struct udd_span span);
// Puts the file back in place of merged pages of `span`. Not those of a file whose server is gone, unless `forced`: what is
// merged can at least be read.
void udd_files_restore(struct udd_span span, bool forced);
// The file on the mount with this inode may have changed: puts it back wherever it was merged, which it is no more in these
// mappings. Returns the number of pages. The worker, without the lock.
uint64_t udd_files_unmerge(uint64_t inode);
// Merged pages of files in `span` may be written to from now on: the kernel breaks them in place, unseen.
void udd_files_open(struct udd_span span);
// Bit i: page i of [address, address + pages) can be read and has these contents, which are not all zeros. `pages` is at most
// UDD_RUN_MAX. May wait for the file's server: the worker, without the lock.
uint64_t udd_file_compare(uint64_t address, uint32_t pages, const char *contents);

#endif
