// SPDX-License-Identifier: MIT
// The digest of a page: XXH3_128bits, seed 0, of its 4096 bytes. Header-only from libxxhash-dev, so that libudedup.so
// links libc only. Digests say where to look; they are never trusted with content (the agent compares bytes).
#ifndef UDD_DIGEST_H
#define UDD_DIGEST_H

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "wire.h"

struct udd_digest {
	uint64_t low;
	uint64_t high;
};

static inline struct udd_digest udd_digest_page(const void *page)
{
	XXH128_hash_t hash = XXH3_128bits(page, UDD_PAGE_SIZE);

	return (struct udd_digest){.low = hash.low64, .high = hash.high64};
}

#endif
