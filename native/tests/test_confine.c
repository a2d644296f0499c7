/* SPDX-License-Identifier: BSD-2-Clause */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "confine.h"
#include "ublk_ring.h"

static void (*deed)(void);
static bool uring;
static bool realtime; /* a ublk target is wanted */
static struct pvf_uring ring;
static struct pvf_ublk none = {.fd = -1};

/* Runs `what` in a child under the filter; returns its wait status. */
static int confined(void (*what)(void))
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child) {
		struct pvf_confine c = {.uring = uring, .realtime = realtime};
		const char *why;

		if (uring && pvf_uring_make(&ring, epoll_create1(0), 1, &why))
			_exit(98);
		if (pvf_confine_user(&c, &why) || pvf_confine_calls(&c, &why))
			_exit(99);
		what();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

/* A thread that began before the filter, as a queue's does. It waits at the gate, and then does it. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t begun;

static void *deed_of_thread(void *arg)
{
	pthread_barrier_wait(&begun);
	pthread_mutex_lock(&gate);
	deed();
	pthread_mutex_unlock(&gate);
	for (;;)
		pthread_mutex_lock(&gate); /* its own: once more, and for ever */
	return arg;
}

/* Runs `what` in a child under the filter, in a thread that is older than that. */
static int confined_thread(void (*what)(void))
{
	pid_t child = fork();
	pthread_t thread;
	int status;

	CHECK(child >= 0);
	if (!child) {
		struct pvf_confine c = {0};
		const char *why;

		deed = what;
		pthread_barrier_init(&begun, NULL, 2);
		pthread_mutex_lock(&gate);
		if (pthread_create(&thread, NULL, deed_of_thread, NULL))
			_exit(98);
		pthread_barrier_wait(&begun);
		if (pvf_confine_user(&c, &why) || pvf_confine_calls(&c, &why))
			_exit(99);
		for (int i = 0; i < 1000; i++)
			sched_yield(); /* it sleeps at the gate by now, or comes too late for that */
		pthread_mutex_unlock(&gate);
		for (;;)
			pthread_barrier_wait(&begun); /* of two: for ever */
	}
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

static void nothing(void)
{
}

static void make_socket(void)
{
	socket(AF_UNIX, SOCK_STREAM, 0);
}

static void open_file(void)
{
	FILE *f = fopen("/etc/passwd", "r");

	if (f)
		fclose(f);
}

static void map_code(void)
{
	mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static void bind_port(void)
{
	ioctl(0, _IOC(_IOC_NONE, 'E', 2, 4), &deed); /* IOCTL_EVTCHN_BIND_UNBOUND_PORT */
}

static void fork_again(void)
{
	if (!fork())
		_exit(0);
}

/* What io_uring answers to an operation; it is confined too. */
static int asked(uint8_t opcode, int fd, const char *path)
{
	struct io_uring_cqe *cqe;

	ring.fetch = true; /* as for a new device: that enables it */
	pvf_uring_turn(&ring, &none);
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring.ring);

	io_uring_prep_rw(opcode, sqe, fd, path, 0, 0);
	if (io_uring_submit_and_get_events(&ring.ring) != 1 || io_uring_peek_cqe(&ring.ring, &cqe))
		_exit(97);
	return cqe->res;
}

static void ask_a_file(void)
{
	if (asked(IORING_OP_URING_CMD, 1, NULL) != -EOPNOTSUPP)
		_exit(1);
}

static void open_through_ring(void)
{
	if (asked(IORING_OP_OPENAT, AT_FDCWD, "/etc/passwd") != -EACCES)
		_exit(1);
}

static void make_ring(void)
{
	struct io_uring another;

	io_uring_queue_init(1, &another, 0);
}

/* RLIMIT_RTPRIO or not: the filter is what is asked here. */
static void want_processor(void)
{
	sched_setscheduler(0, SCHED_RR, &(struct sched_param){1});
}

static void give_processor_to_another(void)
{
	sched_setscheduler(1, SCHED_RR, &(struct sched_param){1});
}

static void lift_restrictions(void)
{
	io_uring_register_restrictions(&ring.ring, NULL, 0);
}

static void dies(void (*what)(void))
{
	int status = confined(what);

	CHECK(WIFSIGNALED(status));
	CHECK_EQ(WTERMSIG(status), SIGSYS);
}

static void lives(void (*what)(void))
{
	int status = confined(what);

	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 0);
}

static void lives_test(void)
{
	lives(nothing);
}

static void uring_test(void)
{
	uring = true;
	lives(ask_a_file);
	lives(open_through_ring);
	dies(make_ring);
	dies(lift_restrictions);
	dies(open_file);
	uring = false;
	dies(make_ring);
}

static void realtime_test(void)
{
	dies(want_processor);
	realtime = true;
	lives(want_processor);
	dies(give_processor_to_another);
	realtime = false;
}

static void socket_test(void)
{
	dies(make_socket);
}

static void file_test(void)
{
	dies(open_file);
}

static void code_test(void)
{
	dies(map_code);
}

static void port_test(void)
{
	dies(bind_port);
}

static void *end_at_once(void *arg)
{
	return arg;
}

static void make_thread(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, end_at_once, NULL);
}

static void end_in_order(void)
{
	_exit(7);
}

static void thread_test(void)
{
	dies(make_thread);
}

static void older_thread_test(void)
{
	int status = confined_thread(make_socket);

	CHECK(WIFSIGNALED(status));
	CHECK_EQ(WTERMSIG(status), SIGSYS);
}

static void gate_test(void)
{
	int status = confined_thread(end_in_order);

	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 7);
}

static void fork_test(void)
{
	dies(fork_again);
}

int main(void)
{
	static const struct test tests[] = {
		{"a confined process goes on with what it may do", lives_test},
		{"making a socket kills a confined process", socket_test},
		{"opening a file kills a confined process", file_test},
		{"mapping executable memory kills a confined process", code_test},
		{"binding a port kills a confined process", port_test},
		{"a fork kills a confined process", fork_test},
		{"making a thread kills a confined process", thread_test},
		{"a thread that began before is confined as well", older_thread_test},
		{"threads of a confined process wait for each other's locks", gate_test},
		{"a network's worker may be a real-time task, and make nobody else one", realtime_test},
		{"a ublk worker's io_uring passes ublk's commands on, and is no way around the filter",
		 uring_test},
	};

	return RUN_TESTS(tests);
}
