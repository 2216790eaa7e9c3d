// SPDX-License-Identifier: MIT
// Pages grouped by the transparent huge page they may lie in: the address range of 2 MiB that the kernel would map as one.
//
// Items are structs that begin with their page's address; `bytes` is the size of one.
#include <string.h>

#include "engine.h"

static uint64_t address_of(const void *items, size_t bytes, size_t i)
{
	uint64_t address;

	memcpy(&address, (const char *)items + i * bytes, sizeof(address));
	return address;
}

static uint64_t area_of(uint64_t address)
{
	return address & ~((uint64_t)UDD_HUGE_BYTES - 1);
}

// Adds a page to the last area or to a new one; returns how many there are then.
static size_t areas_add(struct udd_huge_area *areas, size_t count, uint64_t address)
{
	unsigned page = address / UDD_PAGE_SIZE % UDD_HUGE_PAGES;

	if (!count || areas[count - 1].address != area_of(address))
		areas[count++] = (struct udd_huge_area){.address = area_of(address)};
	areas[count - 1].pages[page / 64] |= 1ULL << page % 64;
	return count;
}

size_t udd_huge_areas(const void *items, size_t bytes, size_t count, struct udd_huge_area *ret)
{
	size_t areas = 0;

	for (size_t i = 0; i < count; i++)
		areas = areas_add(ret, areas, address_of(items, bytes, i));
	return areas;
}

size_t udd_huge_zeros(const struct udd_report *reports, size_t count, struct udd_huge_area *ret)
{
	size_t areas = 0;

	for (size_t i = 0; i < count; i++) {
		if (reports[i].flags & UDD_REPORT_ZERO)
			areas = areas_add(ret, areas, reports[i].address);
	}
	return areas;
}

// Whether an area is among sorted ones; `*at` only goes forward, so addresses must come sorted, too.
static int areas_have(const uint64_t *areas, size_t count, size_t *at, uint64_t address)
{
	while (*at < count && areas[*at] < area_of(address))
		++*at;
	return *at < count && areas[*at] == area_of(address);
}

size_t udd_huge_others(const struct udd_match *matches, size_t count, const uint64_t *areas, size_t area_count,
		       struct udd_target *ret)
{
	size_t others = 0, at = 0;

	for (size_t i = 0; i < count; i++) {
		if (areas_have(areas, area_count, &at, matches[i].address) && matches[i].other)
			ret[others++] = (struct udd_target){.address = matches[i].other_address, .agent = matches[i].other};
	}
	return others;
}

size_t udd_huge_without(void *items, size_t bytes, size_t count, const uint64_t *areas, size_t area_count)
{
	size_t kept = 0, at = 0;

	for (size_t i = 0; i < count; i++) {
		if (areas_have(areas, area_count, &at, address_of(items, bytes, i)))
			continue;
		if (kept != i)
			memcpy((char *)items + kept * bytes, (const char *)items + i * bytes, bytes);
		kept++;
	}
	return kept;
}
