// SPDX-License-Identifier: MIT
// Hooks of the calls that move content between files and memory. They do what libc's functions do, and then push a place hint
// where whole pages were filled or written out. No lock is taken, and nothing here can change what the caller gets.
#ifndef UDD_HINTS_H
#define UDD_HINTS_H

#include <sys/types.h>
#include <sys/uio.h>

ssize_t udd_hook_read(int fd, void *buffer, size_t bytes);
ssize_t udd_hook_write(int fd, const void *buffer, size_t bytes);
ssize_t udd_hook_pread(int fd, void *buffer, size_t bytes, off_t offset);
ssize_t udd_hook_pwrite(int fd, const void *buffer, size_t bytes, off_t offset);
ssize_t udd_hook_readv(int fd, const struct iovec *vector, int count);
ssize_t udd_hook_writev(int fd, const struct iovec *vector, int count);
ssize_t udd_hook_preadv(int fd, const struct iovec *vector, int count, off_t offset);
ssize_t udd_hook_pwritev(int fd, const struct iovec *vector, int count, off_t offset);
ssize_t udd_hook_preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags);
ssize_t udd_hook_pwritev2(int fd, const struct iovec *vector, int count, off_t offset, int flags);

// These only have it forgotten what a descriptor is.
int udd_hook_close(int fd);
int udd_hook_dup2(int old, int new);
int udd_hook_dup3(int old, int new, int flags);

#endif
