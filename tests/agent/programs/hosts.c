// SPDX-License-Identifier: MIT
// Programs that are hard to live in: that bypass libc, bind themselves by seccomp filters, close or change what the agent
// stands on, or run out of something. Each does the same wrapped and bare.
#include "merged.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>

enum { PAGES = 16, THREADS = 4, ROUNDS = 300, STACK = 1 << 16 };

// ---- threads and mappings of its own, as a Go runtime has them ----

static long raw(long number, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall" : "=a"(ret) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return ret;
}

static char *raw_map(size_t pages)
{
	return (char *)raw(SYS_mmap, 0, (long)(pages * PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static atomic_int raw_wrong;

// Without libc, and without a thread control block of its own.
static void raw_round(uint64_t tag)
{
	char *at = raw_map(PAGES), *moved;

	fill(at, PAGES, tag, WHOLE, 0);
	raw_wrong += !intact(at, PAGES, tag, WHOLE, 0);
	raw_wrong += raw(SYS_madvise, (long)at, 4 * PAGE, MADV_DONTNEED, 0, 0, 0) != 0;
	raw_wrong += !is_zero(at, 4) || !intact_from(at + 4 * PAGE, 4, PAGES - 4, tag, WHOLE, 0);
	moved = (char *)raw(SYS_mremap, (long)at, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE, 0, 0);
	raw_wrong += !is_zero(moved, 4) || !intact_from(moved + 4 * PAGE, 4, PAGES - 4, tag, WHOLE, 0) || !is_zero(moved + PAGES * PAGE, PAGES);
	raw_wrong += raw(SYS_munmap, (long)moved, 2 * PAGES * PAGE, 0, 0, 0, 0) != 0;
}

static int raw_thread(void *number)
{
	for (int i = 0; i < ROUNDS; i++)
		raw_round((uint64_t)(uintptr_t)number);
	return 0;
}

static void discards_past_libc(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	check(raw(SYS_madvise, (long)at, PAGES * PAGE, MADV_DONTNEED, 0, 0, 0) == 0);
	check(is_zero(at, PAGES));
	check(intact(twin, PAGES, 1, WHOLE, 1));
	if (wrapped()) {
		await(!stats().merging);
		check(strstr(stats().reason, "raw system call"));
	}
	fill(at, PAGES, 2, WHOLE, 0);
	check(intact(at, PAGES, 2, WHOLE, 0));
}

// Once the agent has noticed what kind of program it is in, the program may do whatever it likes.
static void bypasses_libc(void)
{
	const int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_CHILD_CLEARTID;
	static _Atomic(int) running[THREADS];

	discards_past_libc();
	for (int i = 0; i < THREADS; i++) {
		running[i] = 1;
		check(clone(raw_thread, raw_map(STACK / PAGE) + STACK, flags, (void *)(uintptr_t)(i % 2 + 1), NULL, NULL, &running[i]) > 0);
	}
	for (int i = 0; i < THREADS; i++) {
		while (running[i])
			raw(SYS_futex, (long)&running[i], FUTEX_WAIT, 1, 0, 0, 0);
	}
	check(!raw_wrong);
}

// ---- seccomp filters ----

enum scope { THIS_THREAD, ALL_THREADS };

// Binds the thread, or all: the calls in the list get `verdict`, all others pass.
static void forbid(enum scope scope, uint32_t verdict, const int *calls, unsigned count)
{
	struct sock_filter code[64] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	};
	struct sock_fprog program = {.filter = code, .len = (unsigned short)(2 * count + 2)};

	for (unsigned i = 0; i < count; i++) {
		code[2 * i + 1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[i], 0, 1);
		code[2 * i + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, verdict);
	}
	code[2 * count + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	check(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, scope == ALL_THREADS ? SECCOMP_FILTER_FLAG_TSYNC : 0, &program) == 0);
}

// What programs commonly give up: files, sockets, processes of others, and what is exotic.
static const int usual[] = {
	SYS_userfaultfd, SYS_socket, SYS_connect, SYS_bpf, SYS_ptrace, SYS_process_vm_writev, SYS_mount, SYS_init_module, SYS_perf_event_open,
};

enum { USUAL = sizeof(usual) / sizeof(usual[0]) };

static void use_memory(char *at, char *twin)
{
	fill_page(at, 3, 0);
	check(page_is(at, 3, 0) && intact_from(at + PAGE, 1, PAGES - 1, 1, WHOLE, 0));
	check(madvise(at + 4 * PAGE, 4 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at + 4 * PAGE, 4));
	fill(at, PAGES, 4, WHOLE, 0);
	check(intact(at, PAGES, 4, WHOLE, 0) && intact(twin, PAGES, 1, WHOLE, 1));
	check(munmap(at, PAGES * PAGE) == 0);
}

static void filters_itself(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	forbid(THIS_THREAD, SECCOMP_RET_ERRNO | EPERM, usual, USUAL);
	use_memory(at, twin);
	at = merged(PAGES, 5, WHOLE, NULL); // the agent's threads are free to go on
	check(intact(at, PAGES, 5, WHOLE, 0));
}

static void filters_all_threads(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	forbid(ALL_THREADS, SECCOMP_RET_KILL_PROCESS, usual, USUAL);
	use_memory(at, twin);
	at = merged(PAGES, 5, WHOLE, NULL); // they are bound too, but by nothing that they need any more
	check(intact(at, PAGES, 5, WHOLE, 0));
}

// Not even the threads that wait in the agent's faults can be woken the usual way.
static void filters_ioctl_of_all_threads(void)
{
	const int ioctl_only[] = {SYS_ioctl};
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	forbid(ALL_THREADS, SECCOMP_RET_ERRNO | EPERM, ioctl_only, 1);
	use_memory(at, twin);
	if (wrapped()) {
		await(!stats().merging);
		check(strstr(stats().reason, "seccomp"));
	}
	fill(twin, PAGES, 6, WHOLE, 0);
	check(intact(twin, PAGES, 6, WHOLE, 0));
}

// A child under a filter that kills for what only the agent would do.
static void filters_itself_and_forks(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	forbid(THIS_THREAD, SECCOMP_RET_KILL_PROCESS, usual, USUAL);
	for (int i = 0; i < 3; i++) {
		pid_t pid = fork();
		int status;

		if (pid == 0) {
			struct timespec moment = {.tv_nsec = 200000000}; // its agent would be up by then

			nanosleep(&moment, NULL);
			use_memory(at, twin);
			_exit(42);
		}
		status = wait_child(pid);
		check(WIFEXITED(status) && WEXITSTATUS(status) == 42);
		check(waitpid(-1, &status, __WALL) == -1 && errno == ECHILD); // and no child that is not the program's
	}
	use_memory(at, twin);
}

static void filters_itself_and_executes(void)
{
	static char name[] = "/proc/self/exe", option[] = "plain-memory";
	char *const arguments[] = {name, option, NULL};

	forbid(THIS_THREAD, SECCOMP_RET_KILL_PROCESS, usual, USUAL);
	execv(name, arguments);
	check(!"executed");
}

// ---- what the agent stands on ----

static void plain_memory(void)
{
	char *at = plain(PAGES), *twin = plain(PAGES);
	struct timespec moment = {.tv_nsec = 300000000};

	fill(at, PAGES, 1, WHOLE, 0);
	fill(twin, PAGES, 1, WHOLE, 1);
	nanosleep(&moment, NULL);
	use_memory(at, twin);
}

static void closes_everything(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	check(close_range(3, ~0U, 0) == 0);
	use_memory(at, twin);
	at = merged(PAGES, 5, WHOLE, NULL);
	check(intact(at, PAGES, 5, WHOLE, 0));
	check(open("/dev/null", O_RDONLY) == 3);
}

static void changes_root(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	check(chroot("/proc/self/fdinfo") == 0 && chdir("/") == 0);
	use_memory(at, twin);
	at = plain(PAGES);
	fill(at, PAGES, 7, WHOLE, 0);
	check(intact(at, PAGES, 7, WHOLE, 0));
}

static void executes_itself(void)
{
	static char name[] = "/proc/self/exe", option[] = "plain-memory";
	char *const arguments[] = {name, option, NULL};

	merged(PAGES, 1, WHOLE, NULL);
	execv(name, arguments);
	check(!"executed");
}

// ---- what runs out ----

// As many mappings as the kernel gives, with merged memory in between; then some are given back, and all goes on.
static void runs_out_of_mappings(void)
{
	enum { MOST = 1 << 20 };
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	char *base = mmap(NULL, (size_t)MOST * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t cut = 0;

	check(base != MAP_FAILED);
	while (cut < MOST && mprotect(base + cut * PAGE, PAGE, PROT_NONE) == 0)
		cut += 2;
	check(errno == ENOMEM);
	// Writing breaks merged pages, which needs no mapping.
	fill_page(at, 3, 0);
	fill_page(at + 8 * PAGE, 3, 8);
	check(page_is(at, 3, 0) && page_is(at + 8 * PAGE, 3, 8) && intact_from(at + PAGE, 1, 7, 1, WHOLE, 0));
	check(intact(twin, PAGES, 1, WHOLE, 1));
	// Nor does discarding a part.
	check(madvise(at + 2 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at + 2 * PAGE, 2) && page_is(at + PAGE, 1, 1) && intact_from(at + 4 * PAGE, 4, 4, 1, WHOLE, 0));
	check(madvise(at, PAGES * PAGE, MADV_DONTNEED) == 0);
	check(is_zero(at, PAGES));
	check(munmap(base, (size_t)MOST * PAGE) == 0);
	fill(at, PAGES, 4, WHOLE, 0);
	check(intact(at, PAGES, 4, WHOLE, 0));
	at = merged(PAGES, 5, WHOLE, NULL);
	check(intact(at, PAGES, 5, WHOLE, 0));
}

static void runs_out_of_descriptors(void)
{
	struct rlimit none = {.rlim_cur = 0, .rlim_max = 0};
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	check(setrlimit(RLIMIT_NOFILE, &none) == 0);
	check(open("/dev/null", O_RDONLY) == -1 && errno == EMFILE);
	use_memory(at, twin);
	check(fork() == 0 || wait(NULL) > 0);
}

static void *nothing(void *unused)
{
	return unused;
}

// No thread can be made: none of the agent's in a child either.
static void runs_out_of_threads(void)
{
	struct rlimit none = {.rlim_cur = 0, .rlim_max = 0};
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	pthread_t thread;
	pid_t pid = fork();

	if (pid == 0) {
		check(setgid(65534) == 0 && setuid(65534) == 0); // root has no limit
		check(setrlimit(RLIMIT_NPROC, &none) == 0);
		check(pthread_create(&thread, NULL, nothing, NULL) == EAGAIN);
		check(fork() == -1 && errno == EAGAIN);
		use_memory(at, twin);
		_exit(42);
	}
	check(WEXITSTATUS(wait_child(pid)) == 42);
	use_memory(at, twin);
}

int main(int argc, char **argv)
{
	static const struct test_case cases[] = {
		{"bypasses-libc", bypasses_libc},
		{"discards-past-libc", discards_past_libc},
		{"filters-itself", filters_itself},
		{"filters-all-threads", filters_all_threads},
		{"filters-ioctl-of-all-threads", filters_ioctl_of_all_threads},
		{"filters-itself-and-forks", filters_itself_and_forks},
		{"filters-itself-and-executes", filters_itself_and_executes},
		{"plain-memory", plain_memory},
		{"closes-everything", closes_everything},
		{"changes-root", changes_root},
		{"executes-itself", executes_itself},
		{"runs-out-of-mappings", runs_out_of_mappings},
		{"runs-out-of-descriptors", runs_out_of_descriptors},
		{"runs-out-of-threads", runs_out_of_threads},
	};

	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argc > 1 ? argv[1] : NULL);
}
