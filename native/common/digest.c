// SPDX-License-Identifier: MIT
#include "digest.h"

// Header-only from libxxhash-dev, so that libudedup.so links libc only.
#define XXH_INLINE_ALL
#include <xxhash.h>

struct udd_digest udd_digest_page_sse2(const void *page)
{
	XXH128_hash_t hash = XXH3_128bits(page, UDD_PAGE_SIZE);

	return (struct udd_digest){.low = hash.low64, .high = hash.high64};
}

uint64_t udd_digest_part(const void *part, size_t bytes)
{
	return XXH3_64bits(part, bytes);
}

struct udd_digest udd_digest_page(const void *page)
{
	return __builtin_cpu_supports("avx2") ? udd_digest_page_avx2(page) : udd_digest_page_sse2(page);
}
