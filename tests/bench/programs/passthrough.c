// SPDX-License-Identifier: MIT
// passthrough FILE MOUNTPOINT: shows FILE in a mount as C does it with libfuse, by copying: what a file system of user space can
// reach without being clever. The mount has one file, called "file"; SIGTERM ends it. Nothing is digested or hinted.
//
// libfuse's own way of threads, several for one mount. A file that is opened with O_DIRECT is read through the page cache all the
// same, as udedup's mount reads it.
#define FUSE_USE_VERSION 31

#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const name = "/file";

// The file shown; set before the mount is made.
static int source;

static int show_attributes(const char *path, struct stat *ret, struct fuse_file_info *info)
{
	(void)info;
	memset(ret, 0, sizeof(*ret));
	if (!strcmp(path, "/")) {
		ret->st_mode = S_IFDIR | 0500;
		ret->st_nlink = 2;
		return 0;
	}
	if (strcmp(path, name))
		return -ENOENT;
	return fstat(source, ret) ? -errno : 0;
}

static int list(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *info,
		enum fuse_readdir_flags flags)
{
	(void)path;
	(void)offset;
	(void)info;
	(void)flags;
	fill(buffer, name + 1, NULL, 0, 0);
	return 0;
}

static int open_file(const char *path, struct fuse_file_info *info)
{
	if (strcmp(path, name))
		return -ENOENT;
	if ((info->flags & O_ACCMODE) != O_RDONLY)
		return -EROFS;
	info->keep_cache = 1;
	return 0;
}

static int read_file(const char *path, char *buffer, size_t size, off_t offset, struct fuse_file_info *info)
{
	(void)path;
	(void)info;
	ssize_t done = pread(source, buffer, size, offset);

	return done < 0 ? -errno : (int)done;
}

static const struct fuse_operations operations = {
	.getattr = show_attributes,
	.readdir = list,
	.open = open_file,
	.read = read_file,
};

int main(int argc, char **argv)
{
	char foreground[] = "-f";

	if (argc != 3) {
		fprintf(stderr, "usage: passthrough FILE MOUNTPOINT\n");
		return 2;
	}
	source = open(argv[1], O_RDONLY);
	if (source < 0) {
		perror(argv[1]);
		return 1;
	}
	char *words[] = {argv[0], foreground, argv[2], NULL};

	return fuse_main(3, words, &operations, NULL);
}
