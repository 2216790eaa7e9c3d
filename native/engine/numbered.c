// SPDX-License-Identifier: MIT
#include "numbered.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void udd_numbered_deinit(struct udd_numbered *things)
{
	free(things->items);
	*things = (struct udd_numbered){0};
}

// Where the number is, or would be.
static uint32_t numbered_place(const struct udd_numbered *things, uint32_t number)
{
	uint32_t low = 0, high = things->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (things->items[middle].number < number)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

void *udd_numbered_find(const struct udd_numbered *things, uint32_t number)
{
	uint32_t at = numbered_place(things, number);

	return at < things->count && things->items[at].number == number ? things->items[at].thing : NULL;
}

int udd_numbered_add(struct udd_numbered *things, uint32_t number, void *thing)
{
	uint32_t at = numbered_place(things, number);

	if (things->count == things->capacity) {
		uint32_t wanted = things->capacity + things->capacity / 2 + 8;
		struct udd_numbered_item *bigger = realloc(things->items, wanted * sizeof(*bigger));

		if (!bigger)
			return -ENOMEM;
		things->items = bigger;
		things->capacity = wanted;
	}
	memmove(&things->items[at + 1], &things->items[at], (things->count - at) * sizeof(*things->items));
	things->items[at] = (struct udd_numbered_item){.number = number, .thing = thing};
	things->count++;
	return 0;
}

void udd_numbered_remove(struct udd_numbered *things, uint32_t number)
{
	uint32_t at = numbered_place(things, number);

	if (at == things->count || things->items[at].number != number)
		return;
	things->count--;
	memmove(&things->items[at], &things->items[at + 1], (things->count - at) * sizeof(*things->items));
}
