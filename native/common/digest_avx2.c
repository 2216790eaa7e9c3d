// SPDX-License-Identifier: MIT
// xxHash chooses its instructions when it is compiled, so the same function is compiled once more, here.
#pragma GCC target("avx2")

#include "digest.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(XXH_VECTOR == XXH_AVX2, "the pragma must reach xxHash");

struct udd_digest udd_digest_page_avx2(const void *page)
{
	XXH128_hash_t hash = XXH3_128bits(page, UDD_PAGE_SIZE);

	return (struct udd_digest){.low = hash.low64, .high = hash.high64};
}
