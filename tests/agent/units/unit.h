// SPDX-License-Identifier: MIT
// What every unit test of the agent's C needs: a check that says where it failed, and random numbers with a seed.
#ifndef UDD_TEST_UNIT_H
#define UDD_TEST_UNIT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define check(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                        \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

// splitmix64: the whole sequence follows from the seed, which the test is given and prints when it fails.
static inline uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static inline uint64_t random_below(uint64_t *state, uint64_t limit)
{
	return random_next(state) % limit;
}

#endif
