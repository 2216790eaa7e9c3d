// SPDX-License-Identifier: MIT
// Does what it is told, line by line, and answers with one line each: for tests with several processes, or odd engines. It has
// 64 pages, or as many as PAGES says: number i holds contents that all puppets with the same SALT have, or, after "own", its own.
#include "merged.h"

static char *at;
static size_t pages;
static bool *written;
static size_t *holds; // whose contents a page has

static void *moved(void *from, void *to)
{
	return mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
}

// By way of the page before them all.
static void swap(size_t a, size_t b)
{
	char *spare = at - PAGE, *first = at + a * PAGE, *second = at + b * PAGE;
	size_t contents = holds[a];
	bool own = written[a];

	check(moved(first, spare) == spare && moved(second, first) == first && moved(spare, second) == second);
	holds[a] = holds[b];
	holds[b] = contents;
	written[a] = written[b];
	written[b] = own;
}

static bool all_right(void)
{
	for (size_t i = 0; i < pages; i++) {
		if (!page_is(at + i * PAGE, written[i] ? 2 : 1, holds[i]))
			return false;
	}
	return true;
}

int main(void)
{
	char line[64], command[32];
	unsigned long number, byte;

	setvbuf(stdout, NULL, _IOLBF, 0);
	pages = getenv("PAGES") ? strtoul(getenv("PAGES"), NULL, 0) : 64;
	written = calloc(pages, sizeof(*written));
	holds = calloc(pages, sizeof(*holds));
	check(written && holds);
	for (size_t i = 0; i < pages; i++)
		holds[i] = i;
	at = plain(pages);
	fill(at, pages, 1, WHOLE, 0);
	printf("%lu\n", (unsigned long)at);
	while (fgets(line, sizeof(line), stdin)) {
		number = byte = 0;
		if (sscanf(line, "%31s %lu %lu", command, &number, &byte) < 1)
			continue;
		if (strcmp(command, "merged") == 0) {
			printf("%zu\n", count_merged(at, pages));
		} else if (strcmp(command, "advise") == 0) {
			advise(at, pages * PAGE);
			printf("ok\n");
		} else if (strcmp(command, "check") == 0) {
			printf("%s\n", all_right() ? "right" : "wrong");
		} else if (strcmp(command, "write") == 0) {
			double started = seconds();

			fill_page(at + number * PAGE, 2, holds[number]);
			written[number] = true;
			printf("%.6f\n", seconds() - started);
		} else if (strcmp(command, "flip") == 0) {
			at[number * PAGE + byte] ^= 1;
			printf("ok\n");
		} else if (strcmp(command, "map") == 0) {
			// Some memory comes and goes.
			check(munmap(plain(1), PAGE) == 0);
			printf("ok\n");
		} else if (strcmp(command, "lock") == 0) {
			check(mlock2(at, pages * PAGE, MLOCK_ONFAULT) == 0);
			printf("ok\n");
		} else if (strcmp(command, "locked") == 0) {
			printf("%ld\n", status_value("VmLck:"));
		} else if (strcmp(command, "swap") == 0) {
			swap(number, byte);
			printf("ok\n");
		} else if (strcmp(command, "fork") == 0) {
			pid_t child = fork();

			check(child >= 0);
			// The child goes on as the puppet; who was it so far waits for its end.
			if (child) {
				int status;

				check(waitpid(child, &status, 0) == child);
				_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
			}
			printf("%d\n", getpid());
		} else if (strcmp(command, "stats") == 0) {
			struct udedup_stats now = stats();

			printf("%lu %lu %s\n", now.merging, now.pages_merged, now.reason);
		} else {
			printf("?\n");
		}
	}
	return all_right() ? 0 : 1;
}
