// SPDX-License-Identifier: MIT
// Prints the digest of every page on standard input, as xxhash prints it.
#include <stdio.h>

#include "common/digest.h"

int main(void)
{
	static unsigned char page[UDD_PAGE_SIZE];

	while (fread(page, sizeof(page), 1, stdin) == 1) {
		struct udd_digest digest = udd_digest_page(page);

		printf("%016lx%016lx\n", digest.high, digest.low);
	}
	return 0;
}
