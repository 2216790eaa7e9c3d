// SPDX-License-Identifier: MIT
// Says that it is ready, and ends when its input does. With an argument, it has a filter that lets through all system calls.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sock_filter filter[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	const struct sock_fprog program = {.len = 1, .filter = filter};
	char byte;

	(void)argv;
	if (argc > 1 && (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)))
		return 1;
	puts("ready");
	fflush(stdout);
	return read(0, &byte, 1) == 0 ? 0 : 1;
}
