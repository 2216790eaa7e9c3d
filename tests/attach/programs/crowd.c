// SPDX-License-Identifier: MIT
// A program with many threads that do what threads do, each of which knows what must come of it. It is attached to and detached
// from meanwhile, and must not notice: no call fails that would not have failed, none returns early, none waits from the
// beginning again, no register, no errno and no byte of memory changes. Ends in order when its standard input does.
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

enum {
	PAGE = 4096,
	STACK = 1 << 18,
	ECHOES = 8,            // bytes in flight
	PAUSE_NS = 3000000,    // between two bytes, and between two rounds of what would use a processor for itself
	TABLE_PAGES = 64,
	ALARM_US = 1500,
};

static volatile bool over;
static bool tolerant; // that a call which the kernel does not make again by itself fails with EINTR
static volatile sig_atomic_t alarms;

#define must(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			int error = errno;                                                                             \
			fprintf(stderr, "%s:%d: %s: not %s (errno %d)\n", __FILE__, __LINE__, __func__, #condition, error); \
			_exit(3);                                                                                      \
		}                                                                                                      \
	} while (0)

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void rest(void)
{
	struct timespec time = {.tv_nsec = PAUSE_NS};

	must(clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL) == 0);
}

// ---- waiting ----

// One that began anew each time it is interrupted would not end while somebody attaches all the time.
static void sleeps(void)
{
	struct timespec time = {.tv_sec = 1};
	double before = now();

	errno = 4711;
	must(nanosleep(&time, NULL) == 0);
	must(errno == 4711);
	must(now() - before >= 1.0 && now() - before < 20.0);
}

static void polls_with_timeout(void)
{
	double before = now();

	must(poll(NULL, 0, 700) == 0);
	must(now() - before >= 0.7 && now() - before < 20.0);
}

static void selects_with_timeout(void)
{
	struct timeval time = {.tv_usec = 300000};

	must(select(0, NULL, NULL, NULL, &time) == 0);
}

// The kernel does not make these again by itself; nobody is to see that (signal(7)).
static void epolls_with_timeout(void)
{
	struct epoll_event event;
	double before = now();
	int fd = epoll_create1(EPOLL_CLOEXEC);

	must(fd >= 0);
	if (epoll_wait(fd, &event, 1, 40) == 0)
		must(now() - before >= 0.04);
	else
		must(tolerant && errno == EINTR);
	must(close(fd) == 0);
}

static void waits_for_signal(void)
{
	struct timespec time = {.tv_nsec = 30000000};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	must(sigtimedwait(&set, NULL, &time) == -1 && (errno == EAGAIN || (tolerant && errno == EINTR)));
}

static void waits_for_semaphore_set(void)
{
	struct timespec time = {.tv_nsec = 30000000};
	struct sembuf take = {.sem_op = -1};
	int id = semget(IPC_PRIVATE, 1, 0600);

	must(id >= 0);
	must(semtimedop(id, &take, 1, &time) == -1 && (errno == EAGAIN || (tolerant && errno == EINTR)));
	must(semctl(id, 0, IPC_RMID) == 0);
}

static void waits_on_condition(void)
{
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	time.tv_sec += 1;
	must(pthread_mutex_lock(&mutex) == 0);
	must(pthread_cond_timedwait(&condition, &mutex, &time) == ETIMEDOUT);
	must(pthread_mutex_unlock(&mutex) == 0);
}

static void *answer(void *argument)
{
	int fd = *(int *)argument;
	char byte;

	while (read(fd, &byte, 1) == 1) {
		rest();
		must(write(fd, &byte, 1) == 1);
	}
	return NULL;
}

// Bytes that go to another thread and back; `wait` waits for them.
static void converses(void (*wait)(int fd))
{
	int ends[2];
	pthread_t other;

	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
	must(pthread_create(&other, NULL, answer, &ends[1]) == 0);
	for (int i = 0; i < ECHOES; i++) {
		char byte = (char)(i * 37);
		char back;

		must(write(ends[0], &byte, 1) == 1);
		wait(ends[0]);
		errno = 815;
		must(read(ends[0], &back, 1) == 1 && back == byte);
		must(errno == 815);
	}
	must(shutdown(ends[0], SHUT_WR) == 0);
	must(pthread_join(other, NULL) == 0);
	must(close(ends[0]) == 0 && close(ends[1]) == 0);
}

static void in_read(int fd)
{
	(void)fd;
}

static void in_poll(int fd)
{
	struct pollfd poller = {.fd = fd, .events = POLLIN};

	must(poll(&poller, 1, -1) == 1);
}

static void in_epoll(int fd)
{
	struct epoll_event event = {.events = EPOLLIN};
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	must(epoll >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
	while (epoll_wait(epoll, &event, 1, -1) != 1)
		must(tolerant && errno == EINTR);
	must(close(epoll) == 0);
}

// With a timeout, recv() is not made again by the kernel either.
static void in_recv(int fd)
{
	struct timeval time = {.tv_sec = 30};
	char byte;

	must(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time)) == 0);
	while (recv(fd, &byte, 1, MSG_PEEK) != 1)
		must(tolerant && errno == EINTR);
}

static void converses_by_read(void)
{
	converses(in_read);
}

static void converses_by_poll(void)
{
	converses(in_poll);
}

static void converses_by_epoll(void)
{
	converses(in_epoll);
}

static void converses_by_recv(void)
{
	converses(in_recv);
}

// ---- computing ----

// In vector registers, whose contents are the result; and errno must stay what it was.
static void computes(void)
{
	typedef double vector __attribute__((vector_size(32)));
	static const double step = 1.0 / 1024;
	vector sums = {0, 1, 2, 3};

	errno = 1234;
	for (int i = 0; i < 20000; i++)
		sums = sums * 0.5 + (vector){step, 2 * step, 3 * step, 4 * step};
	// It has converged to twice what is added, exactly.
	for (int i = 0; i < 4; i++)
		must(sums[i] == 2 * (i + 1) * step);
	must(errno == 1234);
	rest();
	rest();
}

static void fill(unsigned char *page, unsigned seed)
{
	for (unsigned i = 0; i < PAGE; i += 64)
		memset(page + i, (int)((seed * 131 + i / 64) & 255), 64);
}

static void check(const unsigned char *page, unsigned seed)
{
	unsigned char wanted[PAGE];

	fill(wanted, seed);
	must(memcmp(page, wanted, PAGE) == 0);
}

// Every thread has the same, so that there is something to share; and it changes.
static void keeps_a_table(void)
{
	static __thread unsigned char *table;
	static __thread unsigned generation;

	if (!table) {
		table = mmap(NULL, TABLE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		must(table != MAP_FAILED);
		for (unsigned i = 0; i < TABLE_PAGES; i++)
			fill(table + i * PAGE, i);
	}
	for (unsigned i = 0; i < TABLE_PAGES; i++) {
		bool changed = i % 16 == 5;

		check(table + i * PAGE, changed ? i + generation : i);
		if (changed)
			fill(table + i * PAGE, i + generation + 1);
	}
	generation++;
	for (int i = 0; i < 40; i++)
		rest();
}

static void allocates(void)
{
	enum { PIECES = 64 };
	unsigned char *pieces[PIECES];

	for (size_t i = 0; i < PIECES; i++) {
		size_t bytes = (i * 7919) % 70000 + 1;

		pieces[i] = malloc(bytes);
		must(pieces[i]);
		memset(pieces[i], (int)i, bytes);
	}
	for (size_t i = 0; i < PIECES; i++) {
		size_t bytes = (i * 7919) % 70000 + 1;

		must(pieces[i][0] == i && pieces[i][bytes - 1] == i && pieces[i][bytes / 2] == i);
		free(pieces[i]);
	}
	rest();
}

static void maps(void)
{
	enum { BYTES = 64 * PAGE };
	unsigned char *area = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *moved;

	must(area != MAP_FAILED);
	for (unsigned i = 0; i < 64; i++)
		fill(area + i * PAGE, i);
	rest();
	must(madvise(area + 8 * PAGE, 8 * PAGE, MADV_DONTNEED) == 0);
	must(area[8 * PAGE] == 0 && area[16 * PAGE - 1] == 0);
	must(mprotect(area, PAGE, PROT_READ) == 0);
	moved = mremap(area + 16 * PAGE, 48 * PAGE, 96 * PAGE, MREMAP_MAYMOVE);
	must(moved != MAP_FAILED && munmap(area, 16 * PAGE) == 0);
	for (unsigned i = 0; i < 48; i++)
		check(moved + i * PAGE, i + 16);
	must(moved[95 * PAGE] == 0);
	must(munmap(moved, 96 * PAGE) == 0);
	rest();
}

// ---- processes, threads and signals ----

static void spawns(void)
{
	char *const argv[] = {"true", NULL};
	pid_t pid;
	int status;

	must(posix_spawnp(&pid, "true", NULL, NULL, argv, environ) == 0);
	must(waitpid(pid, &status, 0) == pid && status == 0);
	for (int i = 0; i < 30; i++)
		rest();
}

static void forks(void)
{
	static __thread unsigned char page[PAGE];
	pid_t pid;
	int status;

	fill(page, 99);
	pid = fork();
	must(pid >= 0);
	if (pid == 0) {
		check(page, 99);
		_exit(7);
	}
	must(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 7);
	for (int i = 0; i < 30; i++)
		rest();
}

static int token;

static void *nothing(void *argument)
{
	return argument;
}

static void makes_threads(void)
{
	pthread_t thread;
	void *ret;

	must(pthread_create(&thread, NULL, nothing, &token) == 0);
	must(pthread_join(thread, &ret) == 0 && ret == &token);
	rest();
}

// Looks at what it has interrupted the way such handlers do: it uses stack, waits, and leaves no trace.
static void on_alarm(int number)
{
	struct timespec time = {.tv_nsec = 200000};
	unsigned char page[PAGE];
	int error = errno;

	must(number == SIGALRM);
	fill(page, 3);
	nanosleep(&time, NULL);
	check(page, 3);
	alarms++;
	errno = error;
}

// The only thread that gets alarms; they come in the middle of everything, malloc() included.
static void is_interrupted(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGALRM);
	must(pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0);
	for (int i = 0; i < 50; i++) {
		char *text = malloc((size_t)(i % 7) * 9000 + 10);

		must(text);
		text[0] = 1;
		free(text);
	}
	must(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
}

// ---- all of them ----

typedef void work(void);

static work *const works[] = {
	sleeps,           polls_with_timeout,      selects_with_timeout, epolls_with_timeout, waits_for_signal,
	waits_on_condition, waits_for_semaphore_set, converses_by_read,  converses_by_poll,   converses_by_epoll,
	converses_by_recv, computes,               keeps_a_table,        allocates,           maps,
	spawns,           forks,                   makes_threads,        is_interrupted,      keeps_a_table,
};

enum { WORKS = sizeof(works) / sizeof(works[0]) };

static void *worker(void *argument)
{
	work *const *mine = argument;

	while (!over)
		(*mine)();
	return NULL;
}

int main(int argc, char **argv)
{
	const struct itimerval interval = {.it_interval = {.tv_usec = ALARM_US}, .it_value = {.tv_usec = ALARM_US}};
	struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	int count = argc > 1 ? atoi(argv[1]) : 0;
	pthread_t *threads = calloc((size_t)count, sizeof(*threads));
	pthread_attr_t attributes;
	sigset_t set;
	char byte;

	tolerant = argc > 2;
	must(count > 0 && threads);
	sigemptyset(&set);
	sigaddset(&set, SIGALRM);
	sigaddset(&set, SIGUSR2);
	// While it is blocked in one thread only, as posix_spawn() does for a moment, it interrupts others.
	sigaddset(&set, SIGCHLD);
	must(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
	must(sigaction(SIGALRM, &action, NULL) == 0);
	must(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, STACK) == 0);
	for (int i = 0; i < count; i++)
		must(pthread_create(&threads[i], &attributes, worker, (void *)&works[i % WORKS]) == 0);
	if (count >= WORKS)
		must(setitimer(ITIMER_REAL, &interval, NULL) == 0);
	puts("ready");
	fflush(stdout);
	must(read(0, &byte, 1) == 0);
	over = true;
	for (int i = 0; i < count; i++)
		must(pthread_join(threads[i], NULL) == 0);
	must(count < WORKS || alarms > 0);
	printf("%d alarms\n", (int)alarms);
	return 0;
}
