// SPDX-License-Identifier: MIT
// The digest of a page: XXH3_128bits, seed 0, of its 4096 bytes. Digests say where to look; they are never trusted with
// content (the agent compares bytes).
#ifndef UDD_DIGEST_H
#define UDD_DIGEST_H

#include <stddef.h>

#include "wire.h"

struct udd_digest {
	uint64_t low;
	uint64_t high;
};

// As fast as the processor can.
struct udd_digest udd_digest_page(const void *page);

// What tells two contents of a part of a page apart. Not for look-ups: the same on every processor.
uint64_t udd_digest_part(const void *part, size_t bytes);

// The same on every x86-64, and for processors with AVX2: two to three times as fast.
struct udd_digest udd_digest_page_sse2(const void *page);
struct udd_digest udd_digest_page_avx2(const void *page);

#endif
