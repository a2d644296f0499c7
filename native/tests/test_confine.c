/* SPDX-License-Identifier: BSD-2-Clause */
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "confine.h"

static void (*deed)(void);

/* Runs `what` in a child under the filter; returns its wait status. */
static int confined(void (*what)(void))
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child) {
		struct pvf_confine c = {0};
		const char *why;

		if (pvf_confine_user(&c, &why) || pvf_confine_calls(&c, &why))
			_exit(99);
		what();
		_exit(0);
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

static void dies(void (*what)(void))
{
	int status = confined(what);

	CHECK(WIFSIGNALED(status));
	CHECK_EQ(WTERMSIG(status), SIGSYS);
}

static void lives_test(void)
{
	int status = confined(nothing);

	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 0);
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
	};

	return RUN_TESTS(tests);
}
