/* SPDX-License-Identifier: BSD-2-Clause */
#include "port.h"

#include <errno.h>
#include <sys/socket.h>

static int embedded_read(struct pvf_port *port)
{
	struct pvf_port_packet packet;
	ssize_t n = recv(port->event_fd, &packet, sizeof(packet), MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (!n)
		return -EPIPE; /* the host has gone */
	return n == sizeof(packet) && packet.op == PVF_PORT_EVENT && packet.port == port->port;
}

static int say(struct pvf_port *port, uint32_t op)
{
	struct pvf_port_packet packet = {.port = port->port, .op = op};
	ssize_t n = send(port->event_fd, &packet, sizeof(packet), MSG_DONTWAIT | MSG_NOSIGNAL);

	return n == sizeof(packet) ? 0 : n < 0 ? -errno : -EIO;
}

static int embedded_unmask(struct pvf_port *port)
{
	return say(port, PVF_PORT_UNMASK);
}

static int embedded_notify(struct pvf_port *port)
{
	return say(port, PVF_PORT_NOTIFY);
}

const struct pvf_port_ops pvf_port_embedded = {
	.name = "embedded",
	.read = embedded_read,
	.unmask = embedded_unmask,
	.notify = embedded_notify,
};
