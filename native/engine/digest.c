// SPDX-License-Identifier: MIT
#include <string.h>

#include "../common/digest.h"
#include "engine.h"

void udd_digest_pages(const void *pages, size_t count, uint64_t *ret)
{
	const char *page = pages;

	for (size_t i = 0; i < count; i++, page += UDD_PAGE_SIZE) {
		struct udd_digest digest = udd_digest_page(page);

		ret[2 * i] = digest.low;
		ret[2 * i + 1] = digest.high;
	}
}

void udd_fill_digests(uint64_t *table, const void *digests, size_t count)
{
	for (size_t i = 0; i < 2 * count; i += 2) {
		if (!table[i] && !table[i + 1])
			memcpy(&table[i], (const char *)digests + i * sizeof(*table), 2 * sizeof(*table));
	}
}
