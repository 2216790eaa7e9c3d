// SPDX-License-Identifier: MIT
// Sums over /proc/PID/smaps. A process with many merged runs has tens of thousands of mappings, about 700 bytes of text each:
// too much for a loop in Python.
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

static const char STORE_NAME[] = "/memfd:udedup-store";

// The value in bytes of a line such as "Pss:        12 kB", if it is the one of `name`.
static int field(const char *line, const char *name, uint64_t *ret)
{
	size_t length = strlen(name);

	if (strncmp(line, name, length) || line[length] != ':')
		return 0;
	*ret = strtoull(line + length + 1, NULL, 10) * 1024;
	return 1;
}

// What the mapping at hand is.
enum kind {
	OTHER,
	STORE_SHARED,  // the engine's, or an agent's for comparing
	STORE_PRIVATE, // merged runs
};

static enum kind mapping_kind(const char *line)
{
	const char *permissions = strchr(line, ' ');
	const char *name = strchr(line, '/');

	if (!permissions || !name || strncmp(name, STORE_NAME, sizeof(STORE_NAME) - 1))
		return OTHER;
	return permissions[4] == 'p' ? STORE_PRIVATE : STORE_SHARED;
}

static void take_line(const char *line, enum kind *kind, struct udd_smaps *sums)
{
	uint64_t bytes;

	// Mappings start with their address, in lower case; fields with a capital letter.
	if (isxdigit((unsigned char)*line) && !isupper((unsigned char)*line)) {
		*kind = mapping_kind(line);
		sums->mappings++;
	} else if (field(line, "Pss", &bytes)) {
		sums->pss += bytes;
		if (*kind != OTHER)
			sums->store_pss += bytes;
	} else if (*kind == STORE_PRIVATE && field(line, "Rss", &bytes)) {
		sums->merged_rss += bytes;
	} else if (*kind == STORE_PRIVATE && field(line, "Anonymous", &bytes)) {
		sums->merged_anonymous += bytes;
	}
}

int udd_smaps_read(int fd, struct udd_smaps *ret)
{
	enum { SIZE = 65536 };
	char *buffer = malloc(SIZE + 1);
	size_t filled = 0;
	enum kind kind = OTHER;

	*ret = (struct udd_smaps){0};
	if (!buffer)
		return -ENOMEM;
	for (;;) {
		ssize_t got = read(fd, buffer + filled, SIZE - filled);

		if (got <= 0) {
			int r = got < 0 ? -errno : 0;

			free(buffer);
			return r;
		}
		filled += got;
		buffer[filled] = 0;
		char *line = buffer;

		for (char *end; (end = strchr(line, '\n')); line = end + 1) {
			*end = 0;
			take_line(line, &kind, ret);
		}
		filled -= line - buffer;
		memmove(buffer, line, filled);
		// A path longer than the buffer can't be: PATH_MAX is 4096.
		if (filled == SIZE)
			filled = 0;
	}
}
