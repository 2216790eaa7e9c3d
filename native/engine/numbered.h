// SPDX-License-Identifier: MIT
// Things by number, where numbers only grow and few of them are in use at a time, as with segments: what is gone takes no room,
// however high the numbers get. An array in the order of numbers; whose the things are, it does not know.
#ifndef UDD_NUMBERED_H
#define UDD_NUMBERED_H

#include <stdint.h>

struct udd_numbered_item {
	uint32_t number;
	void *thing;
};

struct udd_numbered {
	struct udd_numbered_item *items; // ascending
	uint32_t count;
	uint32_t capacity;
};

// All zero is an empty one.
void udd_numbered_deinit(struct udd_numbered *things);
// NULL: there is none.
void *udd_numbered_find(const struct udd_numbered *things, uint32_t number);
// The number must be free. -ENOMEM.
int udd_numbered_add(struct udd_numbered *things, uint32_t number, void *thing);
// Nothing happens if there is none.
void udd_numbered_remove(struct udd_numbered *things, uint32_t number);

#endif
