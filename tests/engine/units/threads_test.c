// SPDX-License-Identifier: MIT
// The engine's C beside other threads, for the thread sanitizer: agents that fill their drop rings while the engine empties them,
// and threads that take the digests of pages and of whole segments, as the engine's helpers do. (Hint rings are read while they are
// being overwritten, by design, and what was torn is dropped: a sanitizer would call that a race, so they are not in here.)
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../agent/units/unit.h"
#include "engine/engine.h"

enum { AGENTS = 3, PAGE = 4096, SLOTS = 64, DROPS = 9600, HELPERS = 2, ROUNDS = 20, SEGMENT = 1 };

struct agent {
	struct udd_drop_ring *ring;
	struct udd_holder *holder;
	atomic_uint_least64_t granted; // pages it has merged
};

static struct agent agents[AGENTS];
static atomic_int busy;

// As udd_drop_push() in native/agent/rings.c: lets go of what it was granted, page by page.
static void *drop(void *argument)
{
	struct agent *agent = argument;

	for (uint64_t head = 0; head < DROPS;) {
		if (head == agent->granted || head - __atomic_load_n(&agent->ring->tail, __ATOMIC_ACQUIRE) >= UDD_DROP_SLOTS) {
			sched_yield();
			continue;
		}
		agent->ring->slots[head % UDD_DROP_SLOTS] = (struct udd_drop){
			.address = (head % SLOTS + 1) * PAGE,
			.segment = SEGMENT,
			.slot = (uint32_t)(head % SLOTS),
			.pages = 1,
			.flags = head % 3 ? 0 : UDD_DROP_BREAK,
		};
		__atomic_store_n(&agent->ring->head, ++head, __ATOMIC_RELEASE);
	}
	busy--;
	return NULL;
}

static int make_segment(const char *pages)
{
	int fd = memfd_create("segment", MFD_CLOEXEC);

	check(fd >= 0 && ftruncate(fd, (off_t)UDD_SEGMENT_SLOTS * PAGE) == 0);
	check(write(fd, pages, (size_t)SLOTS * PAGE) == (ssize_t)SLOTS * PAGE);
	return fd;
}

static char pages[SLOTS * PAGE];
static uint64_t expected[2 * SLOTS];

static void *help(void *segment)
{
	uint64_t *digests = calloc(2 * UDD_SEGMENT_SLOTS, sizeof(*digests));

	check(digests);
	for (int i = 0; i < ROUNDS; i++) {
		check(udd_segment_digests(*(int *)segment, digests) == SLOTS);
		check(memcmp(digests, expected, sizeof(expected)) == 0);
		udd_digest_pages(pages, SLOTS, digests);
		check(memcmp(digests, expected, sizeof(expected)) == 0);
	}
	free(digests);
	return NULL;
}

// Grants agents pages and takes them back, as the server does between two requests.
static uint64_t serve(void)
{
	uint64_t total = 0;

	for (int i = 0; busy; i = (i + 1) % AGENTS) {
		struct agent *agent = &agents[i];
		struct udd_drop_counts dropped = {0};

		if (agent->granted < DROPS && udd_holder_pages(agent->holder) == 0) {
			const struct udd_run run = {.address = PAGE, .pages = SLOTS, .segment = SEGMENT};
			const struct udd_merge_result result = {.merged = UINT64_MAX};
			struct udd_merge_counts counts = {0};

			check(udd_holder_take(agent->holder, &run, &result, 1, &counts) == 0);
			check(counts.merged == SLOTS);
			agent->granted += SLOTS; // DROPS is a multiple
		}
		check(udd_holder_drain(agent->holder, agent->ring, SEGMENT, &dropped) == 0);
		total += dropped.pages;
	}
	for (int i = 0; i < AGENTS; i++) {
		struct udd_drop_counts dropped = {0};

		check(udd_holder_drain(agents[i].holder, agents[i].ring, SEGMENT, &dropped) == 0);
		total += dropped.pages;
	}
	return total;
}

int main(void)
{
	struct udd_store *store = udd_store_create();
	struct udd_index *index = udd_index_create();
	pthread_t droppers[AGENTS], helpers[HELPERS];
	char *base;
	int segment;

	for (size_t i = 0; i < sizeof(pages); i++)
		pages[i] = (char)(i * 2654435761U >> 13);
	udd_digest_pages(pages, SLOTS, expected);
	segment = make_segment(pages);
	base = mmap(NULL, (size_t)UDD_SEGMENT_SLOTS * PAGE, PROT_READ, MAP_SHARED, segment, 0);
	check(store && index && base != MAP_FAILED);
	check(udd_store_adopt_segment(store, index, SEGMENT, base, SLOTS, expected) == 0);
	busy = AGENTS;
	for (int i = 0; i < AGENTS; i++) {
		agents[i].ring = mmap(NULL, sizeof(*agents[i].ring), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		agents[i].holder = udd_holder_create(store);
		check(agents[i].ring != MAP_FAILED && agents[i].holder);
		check(!pthread_create(&droppers[i], NULL, drop, &agents[i]));
	}
	for (int i = 0; i < HELPERS; i++)
		check(!pthread_create(&helpers[i], NULL, help, &segment));
	check(serve() == (uint64_t)AGENTS * DROPS);
	for (int i = 0; i < AGENTS; i++)
		check(!pthread_join(droppers[i], NULL));
	for (int i = 0; i < HELPERS; i++)
		check(!pthread_join(helpers[i], NULL));
	for (int i = 0; i < AGENTS; i++)
		udd_holder_destroy(agents[i].holder);
	udd_store_destroy(store);
	udd_index_destroy(index);
	return 0;
}
