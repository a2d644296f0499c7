/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Two TAPs, each in a network namespace, and nothing between them but two threads that read from one and
 * write to the other: the most that an interface behind a TAP can do. Packets are as large, and checksums as
 * unfinished, as between a frontend and a backend. "ready" on standard output once both are there.
 *
 *   tap_pair NAMESPACE-FILE NAME NAMESPACE-FILE NAME
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define LARGEST (10 + 65535)

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int tap_in(const char *namespace, const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	int there = open(namespace, O_RDONLY | O_CLOEXEC);

	if (there < 0 || setns(there, CLONE_NEWNET))
		fail(namespace);
	close(there);
	int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	if (tap < 0)
		fail("/dev/net/tun");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(tap, TUNSETIFF, &request) ||
	    ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN))
		fail(name);
	return tap;
}

static void *pass(void *fds)
{
	const int *fd = fds;
	char *packet = malloc(LARGEST);

	while (packet) {
		ssize_t got = read(fd[0], packet, LARGEST);

		/* An interface that is down takes nothing: that packet is lost. */
		if (got > 0 && write(fd[1], packet, (size_t)got) < 0)
			continue;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: tap_pair NAMESPACE-FILE NAME NAMESPACE-FILE NAME\n");
		return 2;
	}
	int a = tap_in(argv[1], argv[2]), b = tap_in(argv[3], argv[4]);
	int there[] = {a, b}, back[] = {b, a};
	pthread_t thread;

	if (pthread_create(&thread, NULL, pass, there))
		return 1;
	puts("ready");
	fflush(stdout);
	pass(back);
	return 1;
}
