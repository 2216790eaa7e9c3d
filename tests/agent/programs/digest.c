// SPDX-License-Identifier: MIT
// Prints the digest of every page on standard input, as xxhash prints it: of each way to compute it that works here.
#include <stdio.h>

#include "common/digest.h"

static void print(struct udd_digest digest)
{
	printf("%016lx%016lx\n", digest.high, digest.low);
}

int main(void)
{
	static unsigned char page[UDD_PAGE_SIZE];

	while (fread(page, sizeof(page), 1, stdin) == 1) {
		print(udd_digest_page(page));
		print(udd_digest_page_sse2(page));
		if (__builtin_cpu_supports("avx2"))
			print(udd_digest_page_avx2(page));
	}
	return 0;
}
