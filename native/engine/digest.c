// SPDX-License-Identifier: MIT
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
