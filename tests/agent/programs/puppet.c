// SPDX-License-Identifier: MIT
// Does what it is told, line by line, and answers with one line each: for tests with several processes, or odd engines. It has
// 64 pages: number i holds contents that all puppets with the same SALT have, or, after "own", its own.
#include "merged.h"

enum { PAGES = 64 };

static char *at;
static bool written[PAGES];

static bool all_right(void)
{
	for (size_t i = 0; i < PAGES; i++) {
		if (!page_is(at + i * PAGE, written[i] ? 2 : 1, i))
			return false;
	}
	return true;
}

int main(void)
{
	char line[64], command[32];
	unsigned long number;

	setvbuf(stdout, NULL, _IOLBF, 0);
	at = plain(PAGES);
	fill(at, PAGES, 1, WHOLE, 0);
	printf("%lu\n", (unsigned long)at);
	while (fgets(line, sizeof(line), stdin)) {
		number = 0;
		if (sscanf(line, "%31s %lu", command, &number) < 1)
			continue;
		if (strcmp(command, "merged") == 0) {
			printf("%zu\n", count_merged(at, PAGES));
		} else if (strcmp(command, "advise") == 0) {
			advise(at, PAGES * PAGE);
			printf("ok\n");
		} else if (strcmp(command, "check") == 0) {
			printf("%s\n", all_right() ? "right" : "wrong");
		} else if (strcmp(command, "write") == 0) {
			double started = seconds();

			fill_page(at + number * PAGE, 2, number);
			written[number] = true;
			printf("%.6f\n", seconds() - started);
		} else if (strcmp(command, "stats") == 0) {
			struct udedup_stats now = stats();

			printf("%lu %lu %s\n", now.merging, now.pages_merged, now.reason);
		} else {
			printf("?\n");
		}
	}
	return all_right() ? 0 : 1;
}
