// SPDX-License-Identifier: MIT
#include <errno.h>
#include <malloc.h>
#include <sys/mman.h>

#include "engine.h"

void *udd_area_map(int descriptor)
{
	void *area = mmap(NULL, UDD_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);

	return area == MAP_FAILED ? NULL : area;
}

size_t udd_area_resident(void *area)
{
	unsigned char resident[UDD_SHARED_BYTES / UDD_PAGE_SIZE];
	size_t pages = 0;

	// Whoever put it there: it is a file, to which we may write.
	if (mincore(area, UDD_SHARED_BYTES, resident))
		return UDD_SHARED_BYTES;
	for (size_t i = 0; i < sizeof(resident); i++)
		pages += resident[i] & 1;
	return pages * UDD_PAGE_SIZE;
}

int udd_area_drop_copies(void *area)
{
	return madvise((char *)area + UDD_SHARED_COPY, UDD_SHARED_BYTES - UDD_SHARED_COPY, MADV_REMOVE) ? -errno : 0;
}

void udd_memory_buffers_go(size_t least)
{
	mallopt(M_MMAP_THRESHOLD, (int)least);
}

void udd_memory_trim(void)
{
	malloc_trim(0);
}

void udd_area_unmap(void *area)
{
	if (area)
		munmap(area, UDD_SHARED_BYTES);
}
