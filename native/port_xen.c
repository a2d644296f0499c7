/* SPDX-License-Identifier: BSD-2-Clause
 *
 * /dev/xen/evtchn (xen/evtchn.h, drivers/xen/evtchn.c): read() gives ports, which stay masked until
 * write() gives them back. One port is bound on the descriptor, so its ring of 64 entries cannot
 * overflow: EFBIG means that the descriptor is not what the supervisor said, and IOCTL_EVTCHN_RESET
 * would only hide that.
 */
#include "port.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <xen/xen.h>
#include <xen/sys/evtchn.h>

static int xen_open(struct pvf_port *port, const char **why)
{
	int flags = fcntl(port->event_source, F_GETFL);

	*why = "the event channel cannot be made non-blocking";
	if (flags < 0 || fcntl(port->event_source, F_SETFL, flags | O_NONBLOCK))
		return -errno;
	port->event_fd = port->event_source;
	return pvf_port_map(port, port->grant_source, why);
}

static void xen_release(struct pvf_port *port)
{
	(void)port;
}

static int xen_read(struct pvf_port *port)
{
	uint32_t ports[16];
	ssize_t n = read(port->event_fd, ports, sizeof(ports));

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	for (size_t i = 0; i < (size_t)n / sizeof(*ports); i++)
		if (ports[i] == port->port)
			return 1;
	return 0; /* other ports stay masked: nothing of ours */
}

static int xen_unmask(struct pvf_port *port)
{
	ssize_t n = write(port->event_fd, &port->port, sizeof(port->port));

	return n == sizeof(port->port) ? 0 : n < 0 ? -errno : -EIO;
}

static int xen_notify(struct pvf_port *port)
{
	struct ioctl_evtchn_notify notify = {.port = port->port};

	return ioctl(port->event_fd, IOCTL_EVTCHN_NOTIFY, &notify) ? -errno : 0;
}

/* The sources are all there is. Which ports are masked lies in the open file, as do the references; a
 * second mapping of a reference counts as a user of its own (gntalloc_mmap). */
static void xen_share(const struct pvf_port *port, int *fds)
{
	(void)port;
	(void)fds;
}

static int xen_take_over(struct pvf_port *port, int *fds, const char **why)
{
	(void)fds;
	return xen_open(port, why);
}

const struct pvf_port_ops pvf_port_xen = {
	.name = "xen",
	.open = xen_open,
	.release = xen_release,
	.read = xen_read,
	.unmask = xen_unmask,
	.notify = xen_notify,
	.share = xen_share,
	.take_over = xen_take_over,
};
