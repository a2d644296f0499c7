/* SPDX-License-Identifier: BSD-2-Clause
 *
 * LD_PRELOAD for Debian's oxenstored on a machine without Xen: the calls that
 * it makes at its start, answered as if there were a hypervisor that has no
 * domain but this one. Everything behind its Unix socket then works. The socket
 * is made at $OXENSTORED_SOCKET; the one of a real store is left alone.
 */
#undef _FILE_OFFSET_BITS /* with 64 this would define setrlimit64, which nobody calls */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static const char run_dir[] = "/var/run/xenstored";
static int handle;

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
	int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	const char *path = getenv("OXENSTORED_SOCKET");

	if (address->sa_family != AF_UNIX || !path || strlen(path) >= sizeof un.sun_path)
		return real(fd, address, length);
	strcpy(un.sun_path, path);
	return real(fd, (struct sockaddr *)&un, sizeof un);
}

int unlink(const char *path)
{
	int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");

	return strncmp(path, run_dir, sizeof run_dir - 1) ? real(path) : 0;
}

int mkdir(const char *path, mode_t mode)
{
	int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");

	return strncmp(path, run_dir, sizeof run_dir - 1) ? real(path, mode) : 0;
}

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limits)
{
	(void)resource;
	(void)limits;
	return 0;
}

void *xc_interface_open(void *logger, void *dombuild_logger, unsigned flags)
{
	(void)logger;
	(void)dombuild_logger;
	(void)flags;
	return &handle;
}

int xc_interface_close(void *xch)
{
	(void)xch;
	return 0;
}

void *xengnttab_open(void *logger, unsigned flags)
{
	(void)logger;
	(void)flags;
	return &handle;
}

void *xenevtchn_open(void *logger, unsigned flags)
{
	(void)logger;
	(void)flags;
	return &handle;
}

void *xenevtchn_fdopen(void *logger, int fd, unsigned flags)
{
	(void)logger;
	(void)fd;
	(void)flags;
	return &handle;
}

int xenevtchn_fd(void *xce)
{
	static int fd = -1;

	(void)xce;
	if (fd < 0)
		fd = eventfd(0, EFD_NONBLOCK);
	return fd;
}

int xenevtchn_bind_virq(void *xce, unsigned virq)
{
	(void)xce;
	(void)virq;
	return 1;
}

int xenevtchn_unmask(void *xce, uint32_t port)
{
	(void)xce;
	(void)port;
	return 0;
}

int xenevtchn_notify(void *xce, uint32_t port)
{
	(void)xce;
	(void)port;
	return 0;
}
