// SPDX-License-Identifier: MIT
#include <malloc.h>
#include <sys/mman.h>

#include "engine.h"

void *udd_area_map(int descriptor)
{
	void *area = mmap(NULL, UDD_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);

	return area == MAP_FAILED ? NULL : area;
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
