// SPDX-License-Identifier: MIT
// Processes, threads, signals and descriptors of a wrapped program are as they would be without the agent.
#include "merged.h"

#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/single_threaded.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/user.h>

enum { PAGES = 16 };

// ---- children ----

static void child_keeps_pages_merged(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	pid_t pid = fork();

	if (pid == 0) {
		char pss[64];
		pid_t grandchild;

		check(count_merged(at, PAGES) == PAGES);
		check(intact(at, PAGES, 1, WHOLE, 0));
		check(smaps_line(at, "Pss:", pss, sizeof(pss)) && atol(pss) < PAGES * PAGE / 1024 / 2);
		grandchild = fork();
		if (grandchild == 0) {
			check(count_merged(at, PAGES) == PAGES);
			check(madvise(at, 2 * PAGE, MADV_DONTNEED) == 0);
			check(is_zero(at, 2));
			check(intact_from(at + 2 * PAGE, 2, PAGES - 2, 1, WHOLE, 0));
			_exit(43);
		}
		check(WEXITSTATUS(wait_child(grandchild)) == 43);
		check(count_merged(at, PAGES) == PAGES);
		_exit(42);
	}
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(count_merged(at, PAGES) == PAGES && count_merged(twin, PAGES) == PAGES);
}

// Before its agent is up, the kernel breaks a child's pages by itself; what merged memory means must hold all the same.
static void child_before_its_agent(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	pid_t pid = fork();

	if (pid == 0) {
		fill_page(at, 7, 0); // breaks
		check(page_is(at, 7, 0));
		check(madvise(at, 4 * PAGE, MADV_DONTNEED) == 0); // broken and merged pages alike
		check(is_zero(at, 4));
		fill_page(at + 8 * PAGE, 7, 8);
		check(mprotect(at + 8 * PAGE, PAGE, PROT_READ) == 0);
		check(touch(at + 8 * PAGE, true) == SIGSEGV);
		check(page_is(at + 8 * PAGE, 7, 8));
		check(mremap(at + 8 * PAGE, 4 * PAGE, 2 * PAGE, 0) == MAP_FAILED ? page_is(at + 9 * PAGE, 1, 9)
										 : touch(at + 10 * PAGE, false) == SIGSEGV);
		check(munmap(at + 12 * PAGE, 4 * PAGE) == 0);
		check(touch(at + 12 * PAGE, false) == SIGSEGV);
		// Later it must hold, too.
		await(stats().merging);
		check(is_zero(at, 4));
		check(madvise(at + 8 * PAGE, PAGE, MADV_DONTNEED) == 0);
		check(is_zero(at + 8 * PAGE, 1));
		check(page_is(at + 7 * PAGE, 1, 7));
		_exit(42);
	}
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(intact(at, PAGES, 1, WHOLE, 0) && intact(twin, PAGES, 1, WHOLE, 1));
	check(count_merged(at, PAGES) == PAGES);
}

static void child_joins_and_merges(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	pid_t pid = fork();

	if (pid == 0) {
		char *more;

		await(stats().merging);
		check(stats().pages_merged >= 2 * PAGES); // those it inherited
		more = merged(PAGES, 2, WHOLE, NULL);
		check(intact(more, PAGES, 2, WHOLE, 0));
		fill(at, PAGES, 3, WHOLE, 0);
		fill(more, PAGES, 4, WHOLE, 0);
		check(intact(at, PAGES, 3, WHOLE, 0) && intact(more, PAGES, 4, WHOLE, 0));
		check(intact(twin, PAGES, 1, WHOLE, 1));
		check(stats().break_pages > 0);
		_exit(42);
	}
	fill_page(twin, 9, 0); // at the same time, in the parent
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(intact(at, PAGES, 1, WHOLE, 0));
	check(page_is(twin, 9, 0) && intact_from(twin + PAGE, 1, PAGES - 1, 1, WHOLE, 1));
}

// Memory that a child shared for a while merges once the child is gone.
static void shared_with_a_child_then_merged(void)
{
	char *at = plain(PAGES);
	char *twin = plain(PAGES);
	pid_t pid;

	fill(at, PAGES, 1, WHOLE, 0);
	fill(twin, PAGES, 1, WHOLE, 1);
	await_agent();
	pid = fork();
	if (pid == 0)
		_exit(intact(at, PAGES, 1, WHOLE, 0) ? 42 : 1);
	check(WEXITSTATUS(wait_child(pid)) == 42);
	await_merged(at, PAGES, WHOLE);
	await_merged(twin, PAGES, WHOLE);
	check(intact(at, PAGES, 1, WHOLE, 0));
}

static void other_programs(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);
	char *const argv[] = {"sh", "-c", "exit 5", NULL};
	FILE *pipe;
	char line[16];
	pid_t pid;

	check(WEXITSTATUS(system("exit 3")) == 3);
	check(posix_spawn(&pid, "/bin/sh", NULL, NULL, argv, environ) == 0);
	check(WEXITSTATUS(wait_child(pid)) == 5);
	pid = vfork();
	if (pid == 0) {
		execv("/bin/sh", argv);
		_exit(99);
	}
	check(WEXITSTATUS(wait_child(pid)) == 5);
	pid = fork();
	if (pid == 0) {
		execv("/bin/sh", argv);
		_exit(99);
	}
	check(WEXITSTATUS(wait_child(pid)) == 5);
	pipe = popen("echo hello", "r");
	check(pipe && fgets(line, sizeof(line), pipe) && strcmp(line, "hello\n") == 0 && pclose(pipe) == 0);
	check(count_merged(at, PAGES) == PAGES && count_merged(twin, PAGES) == PAGES);
	at[0] ^= 1;
	at[0] ^= 1;
	check(intact(at, PAGES, 1, WHOLE, 0));
}

static int clone_body(void *at)
{
	return page_is(at, 1, 0) && madvise(at, PAGE, MADV_DONTNEED) == 0 && is_zero(at, 1) ? 42 : 1;
}

static void cloned(void)
{
	static char stack[65536] __attribute__((aligned(16)));
	char *at = merged(PAGES, 1, WHOLE, NULL);
	pid_t pid = clone(clone_body, stack + sizeof(stack), SIGCHLD, at);

	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(intact(at, PAGES, 1, WHOLE, 0));
	pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); // past libc
	if (pid == 0)
		_exit(clone_body(at));
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(intact(at, PAGES, 1, WHOLE, 0));
}

// ---- looked at and written to from outside ----

static void written_by_a_debugger(void)
{
	char *at = merged(PAGES, 1, WHOLE, NULL);
	char byte = 'd';
	struct iovec local = {&byte, 1}, remote = {at + 2 * PAGE + 5, 1};
	int mem = open("/proc/self/mem", O_RDWR);
	pid_t pid;

	check(process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == 1);
	check(at[2 * PAGE + 5] == 'd');
	// The kernel can't wait for a fault here; the README says so. Nothing must change then.
	check(pwrite(mem, &byte, 1, (off_t)(uintptr_t)(at + 4 * PAGE + 5)) == -1 && errno == EIO);
	check(page_is(at + 4 * PAGE, 1, 4));
	pid = fork();
	if (pid == 0) {
		pid_t parent = getppid();
		char *target = at + 6 * PAGE;
		int status;

		check(ptrace(PTRACE_SEIZE, parent, NULL, NULL) == 0);
		check(ptrace(PTRACE_INTERRUPT, parent, NULL, NULL) == 0);
		check(waitpid(parent, &status, __WALL) == parent);
		errno = 0;
		check(ptrace(PTRACE_PEEKDATA, parent, target, NULL) == (long)word_of(1, 6, 0) && errno == 0);
		check(ptrace(PTRACE_POKEDATA, parent, target, 4711L) == -1 && errno == EIO);
		check(ptrace(PTRACE_DETACH, parent, NULL, NULL) == 0);
		_exit(42);
	}
	prctl(PR_SET_PTRACER, pid);
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(page_is(at + 6 * PAGE, 1, 6));
	check(page_is(at + 7 * PAGE, 1, 7));
}

// ---- cancellation ----

static int blocked_ends[2];
static volatile pid_t blocked_tid;

static void *blocked_reader(void *unused)
{
	char byte;

	(void)unused;
	blocked_tid = gettid();
	(void)!read(blocked_ends[0], &byte, 1);
	return NULL;
}

// Is that thread in read(2)? Its number is 0.
static bool waits_in_read(pid_t tid)
{
	char path[64], line[64] = "";
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", (int)tid);
	fd = open(path, O_RDONLY);
	check(fd >= 0);
	check(read(fd, line, sizeof(line) - 1) > 0);
	close(fd);
	return strncmp(line, "0 ", 2) == 0;
}

static void cancelled_while_blocked(void)
{
	pthread_t thread;
	void *result;

	await_agent();
	check(pipe(blocked_ends) == 0);
	check(pthread_create(&thread, NULL, blocked_reader, NULL) == 0);
	await(blocked_tid && waits_in_read(blocked_tid));
	check(pthread_cancel(thread) == 0);
	check(pthread_join(thread, &result) == 0);
	check(result == PTHREAD_CANCELED);
}

static int regular;
static int point;
static pthread_barrier_t barrier;
static volatile int passed;

// Arrives at each cancellation point with the cancellation pending.
static void *arrive(void *unused)
{
	static char buffer[2 * PAGE];
	struct iovec vector = {buffer, sizeof(buffer)};
	int state;

	(void)unused;
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier); // now it is pending
	// While it is disabled nothing happens.
	(void)!pread(regular, buffer, sizeof(buffer), 0);
	passed = 1;
	pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state);
	switch (point) {
	case 0:
		(void)!read(regular, buffer, sizeof(buffer));
		break;
	case 1:
		(void)!pread(regular, buffer, sizeof(buffer), 0);
		break;
	case 2:
		(void)!readv(regular, &vector, 1);
		break;
	case 3:
		(void)!preadv(regular, &vector, 1, 0);
		break;
	case 4:
		(void)!write(regular, buffer, sizeof(buffer));
		break;
	case 5:
		(void)!pwrite(regular, buffer, sizeof(buffer), 0);
		break;
	case 6:
		(void)!writev(regular, &vector, 1);
		break;
	case 7:
		(void)!pwritev(regular, &vector, 1, 0);
		break;
	case 8:
		(void)!preadv2(regular, &vector, 1, 0, 0);
		break;
	case 9:
		(void)!pwritev2(regular, &vector, 1, 0, 0);
		break;
	default:
		close(regular);
		break;
	}
	passed = 2;
	return NULL;
}

static void every_cancellation_point(void)
{
	await_agent();
	for (point = 0; point < 11; point++) {
		pthread_t thread;
		void *result;

		regular = memfd_create("regular", 0);
		check(ftruncate(regular, 4 * PAGE) == 0);
		passed = 0;
		check(pthread_barrier_init(&barrier, NULL, 2) == 0);
		check(pthread_create(&thread, NULL, arrive, NULL) == 0);
		pthread_barrier_wait(&barrier);
		check(pthread_cancel(thread) == 0);
		pthread_barrier_wait(&barrier);
		check(pthread_join(thread, &result) == 0);
		check(result == PTHREAD_CANCELED && passed == 1);
		close(regular);
	}
}

static volatile int mapping_turns;

// Unmaps and maps, and may be cancelled at any instruction of that.
static void *map_until_cancelled(void *unused)
{
	char *at = plain(4);

	(void)unused;
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
	for (;;) {
		at[0] = 1;
		madvise(at, 2 * PAGE, MADV_DONTNEED);
		munmap(at + 3 * PAGE, PAGE);
		mmap(at + 3 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		mapping_turns++;
	}
	return NULL;
}

// Whatever a thread holds in a hook, its cancellation must not leave behind.
static void cancelled_among_hooks(void)
{
	enum { THREADS = 400 };
	char *at;

	await_agent();
	for (int i = 0; i < THREADS; i++) {
		struct timespec moment = {.tv_nsec = i * 977 % 60000};
		pthread_t thread;
		void *result;

		mapping_turns = 0;
		check(pthread_create(&thread, NULL, map_until_cancelled, NULL) == 0);
		while (mapping_turns < 2)
			sched_yield();
		syscall(SYS_nanosleep, &moment, NULL);
		check(pthread_cancel(thread) == 0);
		check(pthread_join(thread, &result) == 0);
		check(result == PTHREAD_CANCELED);
	}
	at = merged(PAGES, 1, WHOLE, NULL);
	check(munmap(at, PAGES * PAGE) == 0);
}

static void block_in_child(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	check(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
}

static void open_in_parent(void)
{
	sigset_t set;

	sigemptyset(&set);
	check(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
}

static bool is_blocked(int number)
{
	sigset_t set;

	check(sigprocmask(SIG_BLOCK, NULL, &set) == 0);
	return sigismember(&set, number);
}

static void do_nothing(int number)
{
	(void)number;
}

// What handlers of fork() do to the signal mask stays, in the child and in its parent, also where hooks block signals.
static void fork_handlers_set_the_mask(void)
{
	sigset_t set;
	pid_t pid;

	await_agent();
	signal(SIGUSR1, do_nothing);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	check(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
	check(pthread_atfork(NULL, open_in_parent, block_in_child) == 0);
	pid = fork();
	if (pid == 0)
		_exit(is_blocked(SIGUSR2) && !is_blocked(SIGUSR1) ? 0 : 1);
	check(!is_blocked(SIGUSR1) && !is_blocked(SIGUSR2));
	check(wait_child(pid) == 0);
}

// Each call that fills or writes out whole pages pushes a hint for each of its buffers.
static void every_transfer_is_a_hint(void)
{
	static char pages[4 * PAGE] __attribute__((aligned(PAGE)));
	struct iovec vector[] = {{pages, 2 * PAGE}, {pages + 2 * PAGE, 2 * PAGE}};
	const ssize_t all = sizeof(pages);
	int fd = memfd_create("regular", 0);
	uint64_t before;

	check(ftruncate(fd, 16 * sizeof(pages)) == 0);
	await_agent();
	await(pread(fd, pages, sizeof(pages), 0) == all && stats().hints > 0);
#define PUSHES(hints_, call_)                                                                                                  \
	before = stats().hints;                                                                                                \
	check((call_) == all);                                                                                                 \
	check(stats().hints - before == (hints_))
	PUSHES(1, read(fd, pages, sizeof(pages)));
	PUSHES(1, pread(fd, pages, sizeof(pages), 0));
	PUSHES(2, readv(fd, vector, 2));
	PUSHES(2, preadv(fd, vector, 2, 0));
	PUSHES(2, preadv2(fd, vector, 2, 0, 0));
	PUSHES(2, preadv2(fd, vector, 2, -1, 0));
	PUSHES(1, write(fd, pages, sizeof(pages)));
	PUSHES(1, pwrite(fd, pages, sizeof(pages), 0));
	PUSHES(2, writev(fd, vector, 2));
	PUSHES(2, pwritev(fd, vector, 2, 0));
	PUSHES(2, pwritev2(fd, vector, 2, 0, 0));
	PUSHES(2, pwritev2(fd, vector, 2, 0, RWF_APPEND));
#undef PUSHES
}

static void *other_thread(void *unused)
{
	return unused;
}

// POSIX lets even the only thread cancel itself.
static void only_thread_cancels_itself(void)
{
	char buffer[16];
	int ends[2];
	pid_t pid;

	await_agent();
	check(pipe(ends) == 0);
	pid = fork();
	if (pid == 0) {
		check(write(ends[1], "x", 1) == 1);
		check(pthread_cancel(pthread_self()) == 0);
		(void)!read(ends[0], buffer, 1);
		_exit(77); // not reached
	}
	check(wait_child(pid) == 0);
}

// ---- threads ----

static void *last_thread(void *unused)
{
	(void)unused;
	breathe();
	return NULL;
}

static void main_thread_exits(void)
{
	pid_t pid;

	await_agent();
	merged(PAGES, 1, WHOLE, NULL);
	pid = fork();
	if (pid == 0) {
		pthread_t thread;

		if (wrapped())
			await(stats().merging); // its agent's threads must not keep it alive
		check(pthread_create(&thread, NULL, last_thread, NULL) == 0);
		pthread_exit(NULL);
	}
	check(wait_child(pid) == 0);
	pthread_exit(NULL);
}

static void single_threaded_to_libc(void)
{
	pthread_t thread;
	char *at;

	await_agent();
	check(__libc_single_threaded == 1);
	at = merged(PAGES, 1, WHOLE, NULL);
	at[0] ^= 1;
	check(__libc_single_threaded == 1);
	check(pthread_create(&thread, NULL, other_thread, NULL) == 0);
	check(pthread_join(thread, NULL) == 0);
}

// ---- signals ----

static volatile unsigned handled;

static void map_something(int number)
{
	char *at = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)number;
	check(at != MAP_FAILED);
	at[0] = 1;
	check(madvise(at, PAGE, MADV_DONTNEED) == 0 && at[0] == 0);
	check(mprotect(at, PAGE, PROT_READ) == 0);
	check(munmap(at, 3 * PAGE) == 0);
	handled++;
}

// The handler's hooks run inside hooks of the thread it interrupted, which works on merged memory.
static void handler_maps_while_main_unmaps(void)
{
	struct sigaction action = {.sa_handler = map_something, .sa_flags = SA_RESTART};
	struct itimerval often = {{0, 300}, {0, 300}}, never = {{0, 0}, {0, 0}};
	char *twin = plain(PAGES);

	fill(twin, PAGES, 1, WHOLE, 0);
	await_agent();
	sigaction(SIGALRM, &action, NULL);
	for (unsigned round = 0; round < 12 || handled < 200; round++) {
		char *at = plain(PAGES);

		fill(at, PAGES, 1, WHOLE, 0);
		await_merged(at, PAGES, WHOLE);
		setitimer(ITIMER_REAL, &often, NULL);
		for (unsigned turn = 0; turn < 200; turn++) {
			char *churn = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			churn[0] = 1;
			check(munmap(churn, PAGE) == 0);
		}
		for (size_t i = 0; i < PAGES; i += 4) {
			at[i * PAGE] ^= 1;
			check(madvise(at + (i + 1) * PAGE, PAGE, MADV_DONTNEED) == 0);
			check(is_zero(at + (i + 1) * PAGE, 1));
			check(munmap(at + (i + 2) * PAGE, PAGE) == 0);
			check(page_is(at + (i + 3) * PAGE, 1, i + 3));
		}
		setitimer(ITIMER_REAL, &never, NULL);
		check(munmap(at, PAGES * PAGE) == 0);
	}
	check(intact(twin, PAGES, 1, WHOLE, 0));
}

// What a traced child works on, and what its handler does meanwhile, which needs the map lock exclusively: a page broke once.
static char *outer, *inner;
static volatile unsigned *moves; // seen by parent and child

static void move_inner(int number)
{
	(void)number;
	inner = mremap(inner, PAGE, PAGE, MREMAP_MAYMOVE);
	++*moves;
	__asm__ volatile("int3"); // the tracer takes over
}

static void work_for_a_tracer(void)
{
	struct sigaction action = {.sa_handler = move_inner};

	sigaction(SIGUSR1, &action, NULL);
	check(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
	raise(SIGSTOP);
	madvise(outer, PAGE, MADV_DONTNEED);
	outer = mremap(outer, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE);
	munmap(outer + PAGE, PAGE);
	raise(SIGSTOP);
	check(is_zero(outer, 1) && page_is(inner, 5, 0));
	_exit(42);
}

static unsigned long stack_pointer(pid_t pid)
{
	struct user_regs_struct registers;

	check(ptrace(PTRACE_GETREGS, pid, NULL, &registers) == 0);
	return registers.rsp;
}

// Runs the child from one SIGSTOP to the next, instruction by instruction, and sends it a signal before each. The handler runs in
// one go, at once or, where the signal is blocked, as soon as it is let through.
static void interrupt_everywhere(pid_t pid)
{
	enum { FRAME = 512 }; // less than a signal's frame has
	unsigned long interrupted = 0;
	bool ready = false; // one instruction after the handler has returned
	unsigned sent = 0;
	int status = wait_child(pid);

	check(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
	do {
		int number = ready || WSTOPSIG(status) == SIGUSR1 ? SIGUSR1 : 0;

		if (number)
			interrupted = stack_pointer(pid);
		sent += ready;
		ready = !number && stack_pointer(pid) + FRAME > interrupted;
		check(ptrace(number ? PTRACE_CONT : PTRACE_SINGLESTEP, pid, NULL, number) == 0);
		status = wait_child(pid);
		check(WIFSTOPPED(status));
	} while (WSTOPSIG(status) != SIGSTOP);
	// The last may have been blocked until now.
	while (*moves != sent) {
		check(ptrace(PTRACE_CONT, pid, NULL, WSTOPSIG(status) == SIGUSR1 ? SIGUSR1 : 0) == 0);
		status = wait_child(pid);
		check(WIFSTOPPED(status));
	}
	check(sent > 50);
	check(ptrace(PTRACE_DETACH, pid, NULL, NULL) == 0);
}

// Wherever in a hook a signal arrives, what its handler does to mappings works.
static void handler_at_every_instruction(void)
{
	char *at = merged(PAGES, 1, WHOLE, NULL);
	pid_t pid;

	at[0] ^= 1;
	outer = plain(2);
	inner = plain(1);
	fill_page(outer, 4, 0);
	fill_page(inner, 5, 0);
	moves = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(moves != MAP_FAILED);
	pid = fork();
	if (pid == 0)
		work_for_a_tracer();
	interrupt_everywhere(pid);
	check(WEXITSTATUS(wait_child(pid)) == 42);
}

// ---- what hooks do about signals ----

static void nothing_to_interrupt(void)
{
	struct sigaction fault = {.sa_handler = move_inner};

	// Not let wait: they come of what the thread itself does.
	check(sigaction(SIGSEGV, &fault, NULL) == 0 && sigaction(SIGTRAP, &fault, NULL) == 0);
	check(signal(SIGPIPE, SIG_IGN) == SIG_DFL && signal(SIGPIPE, SIG_DFL) == SIG_IGN);
}

static void by_sigaction(void)
{
	struct sigaction action = {.sa_handler = map_something}, now;

	check(sigaction(SIGUSR1, &action, NULL) == 0);
	check(sigaction(SIGUSR1, NULL, &now) == 0 && now.sa_handler == map_something);
}

static void by_sigaction_once(void)
{
	by_sigaction();
	check(signal(SIGUSR1, SIG_DFL) == map_something);
}

static void by_signal(void)
{
	check(signal(SIGRTMIN, map_something) == SIG_DFL);
}

static void by_sysv_signal(void)
{
	check(sysv_signal(SIGUSR1, map_something) == SIG_DFL);
}

static void by_sigset(void)
{
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
	check(sigset(SIGUSR1, map_something) == SIG_DFL);
#pragma GCC diagnostic pop
}

// Not through libc: known when memory is looked at the next time.
static void by_system_call(void)
{
	struct sigaction seen;
	struct {
		void (*handler)(int);
		unsigned long flags;
		void (*restorer)(void);
		unsigned long mask;
	} action = {.handler = map_something};

	check(syscall(SYS_rt_sigaction, SIGUSR1, &action, NULL, sizeof(action.mask)) == 0);
	check(sigaction(SIGUSR1, NULL, &seen) == 0 && seen.sa_handler == map_something);
	merged(PAGES, 7, WHOLE, NULL);
}

static void wrong_handlers(void)
{
	struct sigaction action = {.sa_handler = map_something};

	check(sigaction(SIGKILL, &action, NULL) == -1 && errno == EINVAL);
	check(sigaction(0, &action, NULL) == -1 && errno == EINVAL);
	check(sigaction(65, &action, NULL) == -1 && errno == EINVAL);
	check(sigaction(32, &action, NULL) == -1 && errno == EINVAL); // libc's own
	check(sigaction(SIGUSR1, &action, NULL) == 0);
}

static bool blocks_in_munmap(void (*prepare)(void))
{
	uint64_t mask, start = 0;
	bool ret = false;
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		char *at = plain(1);

		if (wrapped())
			await(stats().merging);
		prepare();
		check(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
		kill(getpid(), SIGSTOP); // raise() would block signals itself
		munmap(at, PAGE);
		kill(getpid(), SIGSTOP);
		_exit(42);
	}
	check(WSTOPSIG(wait_child(pid)) == SIGSTOP);
	check(ptrace(PTRACE_GETSIGMASK, pid, sizeof(mask), &start) == 0);
	do {
		check(ptrace(PTRACE_SINGLESTEP, pid, NULL, 0) == 0);
		status = wait_child(pid);
		check(WIFSTOPPED(status));
		check(ptrace(PTRACE_GETSIGMASK, pid, sizeof(mask), &mask) == 0);
		ret |= mask != start;
	} while (WSTOPSIG(status) != SIGSTOP);
	check(mask == start);
	check(ptrace(PTRACE_DETACH, pid, NULL, NULL) == 0);
	check(WEXITSTATUS(wait_child(pid)) == 42);
	return ret;
}

// Two system calls for every munmap() is what a program without handlers need not pay.
static void signals_wait_where_they_have_handlers(void)
{
	static void (*const ways[])(void) = {by_sigaction,   by_sigaction_once, by_signal,     by_sysv_signal,
					     by_sigset,      by_system_call,    wrong_handlers};

	merged(PAGES, 1, WHOLE, NULL);
	check(!blocks_in_munmap(nothing_to_interrupt));
	for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++)
		check(blocks_in_munmap(ways[i]) == wrapped());
	check(!blocks_in_munmap(nothing_to_interrupt));
	// Children inherit handlers.
	by_signal();
	check(blocks_in_munmap(nothing_to_interrupt) == wrapped());
}

static volatile unsigned arrived;
static volatile bool churning;

static void move_a_merged_page(int number)
{
	(void)number;
	inner = mremap(inner, PAGE, PAGE, MREMAP_MAYMOVE);
	__atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
}

static void *churn(void *unused)
{
	(void)unused;
	while (churning) {
		char *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		check(at != MAP_FAILED && madvise(at, PAGE, MADV_DONTNEED) == 0 && munmap(at, PAGE) == 0);
	}
	return NULL;
}

// The first handler comes while another thread is in and out of hooks, which did not have to block signals until then.
static void first_handler_among_hooks(void)
{
	enum { ROUNDS = 40, SIGNALS = 20 };

	// Some of it is merged in every child: so its handler needs the lock exclusively.
	inner = merged(1, 1, WHOLE, NULL);
	for (unsigned round = 0; round < ROUNDS; round++) {
		pid_t pid = fork();

		if (pid == 0) {
			struct sigaction action = {.sa_handler = move_a_merged_page, .sa_flags = SA_RESTART};
			sigset_t here;
			pthread_t thread;

			churning = true;
			check(pthread_create(&thread, NULL, churn, NULL) == 0);
			sigemptyset(&here);
			sigaddset(&here, SIGUSR1);
			check(pthread_sigmask(SIG_BLOCK, &here, NULL) == 0);
			usleep(round * 100);
			check(sigaction(SIGUSR1, &action, NULL) == 0);
			for (unsigned i = 1; i <= SIGNALS; i++) {
				check(pthread_kill(thread, SIGUSR1) == 0);
				while (arrived < i)
					;
			}
			churning = false;
			check(pthread_join(thread, NULL) == 0);
			check(intact(inner, 1, 1, WHOLE, 0));
			_exit(42);
		}
		check(WEXITSTATUS(wait_child(pid)) == 42);
	}
}

// A signal of the application never arrives at an agent's thread, and interrupts what it would interrupt.
static void signals_interrupt(void)
{
	struct sigaction action = {.sa_handler = map_something}; // no SA_RESTART
	struct itimerval once = {{0, 0}, {0, 20000}};
	int ends[2];
	char byte;

	await_agent();
	check(pipe(ends) == 0);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &once, NULL);
	check(read(ends[0], &byte, 1) == -1 && errno == EINTR);
	check(handled == 1);
}

// ---- descriptors ----

static void pipe_ends_at_once(void)
{
	int ends[2];
	char byte;
	pid_t pid;

	// One pipe made before anything joined may be held by nobody else either.
	check(pipe(ends) == 0);
	await_agent();
	check(close(ends[1]) == 0);
	check(read(ends[0], &byte, 1) == 0);
	close(ends[0]);
	check(pipe(ends) == 0);
	merged(PAGES, 1, WHOLE, NULL);
	pid = fork();
	if (pid == 0) {
		close(ends[1]);
		_exit(read(ends[0], &byte, 1) == 0 ? 42 : 1);
	}
	close(ends[1]);
	check(WEXITSTATUS(wait_child(pid)) == 42);
	check(read(ends[0], &byte, 1) == 0);
}

// Prints what a wrapped and a bare process must have alike.
static void print_descriptors(void)
{
	await_agent();
	merged(PAGES, 1, WHOLE, NULL);
	for (int fd = 0; fd < 1024; fd++) {
		if (fcntl(fd, F_GETFD) >= 0)
			printf("%d\n", fd);
	}
	printf("next %d\n", open("/dev/null", O_RDONLY));
	printf("next %d\n", dup(0));
}

// ---- limits ----

static void standard_descriptors_closed(void)
{
	// The test started us with none.
	int fd = open("/dev/null", O_RDWR);

	check(fd == 0);
	await_agent();
	check(open("/dev/null", O_RDWR) == 1 && open("/dev/null", O_RDWR) == 2);
	check(intact(merged(PAGES, 1, WHOLE, NULL), PAGES, 1, WHOLE, 0));
}

static void no_descriptor_free(void)
{
	struct rlimit limit = {3, 3};
	char *at, *twin;

	at = merged(PAGES, 1, WHOLE, &twin);
	check(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	check(open("/dev/null", O_RDONLY) == -1 && errno == EMFILE);
	fill(at, PAGES, 2, WHOLE, 0);
	check(intact(at, PAGES, 2, WHOLE, 0) && intact(twin, PAGES, 1, WHOLE, 1));
	check(munmap(twin, PAGES * PAGE) == 0);
}

static void no_descriptor_free_mremap(void)
{
	struct rlimit limit = {3, 3};
	char *at = merged(PAGES, 1, CUT, NULL);
	char *now;

	check(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	now = mremap(at, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE);
	check(now != MAP_FAILED);
	check(intact(now, PAGES, 1, CUT, 0) && is_zero(now + PAGES * PAGE, PAGES));
}

static void works_under_limits(void)
{
	// Under a limit set by the test: merging may be impossible, the program must not notice.
	char *at = plain(PAGES);
	double until = seconds() + 0.3;

	fill(at, PAGES, 1, WHOLE, 0);
	while (seconds() < until) {
		char *churn = malloc(300000);

		check(churn);
		churn[0] = 1;
		free(churn);
		check(WEXITSTATUS(system("exit 3")) == 3);
		check(intact(at, PAGES, 1, WHOLE, 0));
	}
}

// ---- identity ----

static void drops_privileges(void)
{
	char *twin;
	char *at = merged(PAGES, 1, WHOLE, &twin);

	check(setresgid(1000, 1000, 1000) == 0);
	check(setresuid(1000, 1000, 1000) == 0);
	check(getuid() == 1000 && geteuid() == 1000);
	check(setuid(0) == -1 && errno == EPERM);
	at[0] ^= 1;
	at[0] ^= 1;
	check(intact(at, PAGES, 1, WHOLE, 0) && intact(twin, PAGES, 1, WHOLE, 1));
	check(munmap(twin, PAGES * PAGE) == 0);
	fill(at, PAGES, 2, WHOLE, 0);
	check(intact(at, PAGES, 2, WHOLE, 0));
}

static void unshares(int flags)
{
	char *at = merged(PAGES, 1, WHOLE, NULL);

	check(unshare(flags) == 0);
	fill(at, PAGES, 2, WHOLE, 0);
	check(intact(at, PAGES, 2, WHOLE, 0));
}

static void unshares_mounts(void)
{
	unshares(CLONE_NEWNS);
}

static void unshares_much(void)
{
	unshares(CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWPID | CLONE_FILES | CLONE_FS | CLONE_SYSVSEM);
}

static void unshares_users(void)
{
	// The kernel refuses this to processes with threads, and the agent has two; the README says so.
	check(unshare(CLONE_NEWUSER) == -1 && errno == EINVAL);
}

static void enters_mount_namespace(void)
{
	int fd = open("/proc/self/ns/mnt", O_RDONLY);

	merged(PAGES, 1, WHOLE, NULL);
	check(fd >= 0);
	check(setns(fd, CLONE_NEWNS) == 0);
}

static const struct test_case cases[] = {
	{"child-keeps-pages-merged", child_keeps_pages_merged},
	{"child-before-its-agent", child_before_its_agent},
	{"child-joins-and-merges", child_joins_and_merges},
	{"shared-with-a-child-then-merged", shared_with_a_child_then_merged},
	{"other-programs", other_programs},
	{"cloned", cloned},
	{"written-by-a-debugger", written_by_a_debugger},
	{"cancelled-while-blocked", cancelled_while_blocked},
	{"every-cancellation-point", every_cancellation_point},
	{"cancelled-among-hooks", cancelled_among_hooks},
	{"fork-handlers-set-the-mask", fork_handlers_set_the_mask},
	{"every-transfer-is-a-hint", every_transfer_is_a_hint},
	{"only-thread-cancels-itself", only_thread_cancels_itself},
	{"main-thread-exits", main_thread_exits},
	{"single-threaded-to-libc", single_threaded_to_libc},
	{"handler-maps-while-main-unmaps", handler_maps_while_main_unmaps},
	{"handler-at-every-instruction", handler_at_every_instruction},
	{"signals-wait-where-they-have-handlers", signals_wait_where_they_have_handlers},
	{"first-handler-among-hooks", first_handler_among_hooks},
	{"signals-interrupt", signals_interrupt},
	{"pipe-ends-at-once", pipe_ends_at_once},
	{"print-descriptors", print_descriptors},
	{"standard-descriptors-closed", standard_descriptors_closed},
	{"no-descriptor-free", no_descriptor_free},
	{"no-descriptor-free-mremap", no_descriptor_free_mremap},
	{"works-under-limits", works_under_limits},
	{"drops-privileges", drops_privileges},
	{"unshares-mounts", unshares_mounts},
	{"unshares-much", unshares_much},
	{"unshares-users", unshares_users},
	{"enters-mount-namespace", enters_mount_namespace},
};

int main(int argc, char **argv)
{
	(void)argc;
	return run_case(cases, sizeof(cases) / sizeof(cases[0]), argv[1]);
}
