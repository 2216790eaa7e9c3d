// SPDX-License-Identifier: MIT
// Reads of the mount that Python need not think about: a file that was read in the same way before, of which all digests
// are known and all bytes are in the page cache, or which the store has. Most of a small read's time is Python's.
//
// Python enters an open file once it has answered a read of it, and takes it out when anything changes by which the next would be
// answered in another way. What an entry leads to is Python's too, and lives as long as the entry. All that is not plainly as
// expected is left to Python. It is told what was read at the end of each batch.
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/uio.h>

#include "engine.h"

enum {
	SLOTS = 4096, // a power of two; files whose numbers fall on the same push each other out
};

struct entry {
	uint64_t file; // 0: none
	const struct udd_express_image *image;
	struct udd_shelf *shelf; // NULL: the image's file is read
	struct udd_watch *watch; // the image's
};

// Of the process, as pyfuse3's session is. For the thread that has the GIL.
static struct {
	struct entry entries[SLOTS];
	struct udd_express_done done[UDD_EXPRESS_BATCH];
	uint32_t count;
	char *room;
	size_t room_size;
} express;

static struct entry *slot_of(uint64_t file)
{
	return &express.entries[file % SLOTS];
}

void udd_express_begin(char *room, size_t size)
{
	memset(express.entries, 0, sizeof(express.entries));
	express.count = 0;
	express.room = room;
	express.room_size = size;
}

void udd_express_enter(uint64_t file, const struct udd_express_image *image, struct udd_shelf *shelf, struct udd_watch *watch)
{
	*slot_of(file) = (struct entry){.file = file, .image = image, .shelf = shelf, .watch = watch};
}

void udd_express_leave(uint64_t file)
{
	if (slot_of(file)->file == file)
		*slot_of(file) = (struct entry){0};
}

void udd_express_leave_all(void)
{
	memset(express.entries, 0, sizeof(express.entries));
}

// Where the bytes are in the image's file, in one piece. Negative: that is not known.
static int64_t position_of(const struct udd_express_image *image, uint64_t offset, size_t size)
{
	uint64_t cluster = offset >> image->cluster_bits, first = cluster, within = offset & ((1ULL << image->cluster_bits) - 1);
	uint64_t last = (offset + size - 1) >> image->cluster_bits;

	if (!image->map)
		return (int64_t)offset;
	for (; cluster <= last; cluster++) {
		if (!image->map[cluster] || image->map[cluster] != image->map[first] + ((cluster - first) << image->cluster_bits))
			return -ENOENT;
	}
	return (int64_t)(image->map[first] - 1 + within);
}

static bool digests_known(const struct udd_express_image *image, uint64_t offset, size_t size)
{
	uint64_t first = (offset + UDD_PAGE_SIZE - 1) / UDD_PAGE_SIZE, end = (offset + size) / UDD_PAGE_SIZE;

	// As elsewhere: a digest whose low half is 0 is taken for missing.
	for (uint64_t block = first; block < end; block++) {
		if (!image->digests[2 * block])
			return false;
	}
	return true;
}

static const char *read_file(const struct udd_express_image *image, uint64_t offset, size_t size)
{
	struct iovec part = {.iov_base = express.room, .iov_len = size};
	int64_t position;

	if (image->flags < 0 || !digests_known(image, offset, size))
		return NULL;
	position = position_of(image, offset, size);
	if (position < 0 || preadv2(image->file, &part, 1, position, image->flags) != (ssize_t)size)
		return NULL;
	return express.room;
}

static const char *read_store(const struct entry *entry, uint64_t offset, size_t size, uint64_t *epoch)
{
	struct udd_taken taken;

	if (udd_shelf_take(entry->shelf, entry->watch, offset, size, express.room, &taken) != 0)
		return NULL;
	*epoch = taken.epoch;
	return taken.data;
}

const char *udd_express_read(uint64_t file, uint64_t offset, size_t *size)
{
	const struct entry *entry = slot_of(file);
	const char *data;
	uint64_t epoch = 0;

	if (entry->file != file || express.count == UDD_EXPRESS_BATCH || !*size || *size > express.room_size)
		return NULL;
	if (offset >= entry->image->size)
		return NULL;
	if (*size > entry->image->size - offset)
		*size = entry->image->size - offset;
	data = entry->shelf ? read_store(entry, offset, *size, &epoch) : read_file(entry->image, offset, *size);
	if (data)
		express.done[express.count++] = (struct udd_express_done){file, offset, *size, epoch};
	return data;
}

uint32_t udd_express_answered(void)
{
	return express.count;
}

uint32_t udd_express_take(struct udd_express_done *ret)
{
	uint32_t count = express.count;

	memcpy(ret, express.done, count * sizeof(*ret));
	express.count = 0;
	return count;
}
