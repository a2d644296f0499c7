/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The embedded host's event channels and pages (pvf_host.h, host/channel.h). The hub's connections
 * bring one packet each and are then only kept: it is their end that tells the hub of ours.
 *
 * The page of the channel and the arena are shared with a backend that may be hostile, so their
 * sizes must be sealed; the flags and the eventfds can only make us look for nothing.
 */
#include "port.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memfd.h"
#include "scm.h"

#define MAX_FDS 3u

/* The packet that waits in `source`, with `count` descriptors. 0 or -errno. */
static int receive(int source, uint32_t kind, struct pvf_host_packet *packet, int *fds,
		   uint32_t count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * (MAX_FDS + 1))];
	} control;
	struct iovec iov = {.iov_base = packet, .iov_len = sizeof(*packet)};
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n = recvmsg(source, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0)
		return errno == EAGAIN ? -ENODATA : -errno;
	uint32_t came = pvf_scm_take(&msg, fds, count);

	if (n == sizeof(*packet) && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && came == count &&
	    packet->magic == PVF_HOST_MAGIC && packet->kind == kind)
		return 0;
	pvf_scm_close(fds, count);
	return n ? -EPROTO : -EPIPE;
}

/* Maps ring and pool out of `arena`, which is the port's from here on unless it fails. */
static int map_pages(struct pvf_port *port, int arena, const char **why)
{
	/* Every offset fits: it was checked. */
	uint64_t ring_end = port->ring_offset + port->ring_bytes;
	uint64_t pool_end = port->pool_offset + port->pool_bytes;

	*why = "the embedded host's arena does not cover ring and pool, or can be shrunk";
	int rc = pvf_memfd_check(arena, ring_end > pool_end ? ring_end : pool_end);

	if (!rc)
		rc = pvf_port_map(port, arena, why);
	if (!rc)
		port->arena_fd = arena;
	return rc;
}

static int open_pages(struct pvf_port *port, const char **why)
{
	struct pvf_host_packet packet;
	int arena;

	if (port->grant_source < 0)
		return 0;
	*why = "no pages wait in the connection to the embedded host";
	int rc = receive(port->grant_source, PVF_HOST_PAGES, &packet, &arena, 1);

	if (rc)
		return rc;
	rc = map_pages(port, arena, why);
	if (rc)
		close(arena);
	return rc;
}

static void close_pages(struct pvf_port *port)
{
	pvf_port_unmap(port);
	if (port->arena_fd >= 0)
		close(port->arena_fd);
	port->arena_fd = -1;
}

static int open_event(struct pvf_port *port, const char **why)
{
	struct pvf_host_packet packet;
	int fds[3]; /* the channel, our eventfd, the other's */

	*why = "no event channel waits in the connection to the embedded host";
	int rc = receive(port->event_source, PVF_HOST_EVENT, &packet, fds, 3);

	if (rc)
		return rc;
	*why = "the embedded host's event channel is not the one that ATTACH names";
	rc = -EINVAL;
	if (packet.port != port->port || packet.side > 1)
		goto fail;
	*why = "the embedded host's eventfd cannot be made non-blocking";
	for (int i = 1; i < 3; i++) {
		int flags = fcntl(fds[i], F_GETFL);

		if (flags < 0 || fcntl(fds[i], F_SETFL, flags | O_NONBLOCK)) {
			rc = -errno;
			goto fail;
		}
	}
	*why = "the embedded host's event channel is no sealed page with its magic";
	rc = pvf_channel_map(fds[0], &port->channel);
	if (rc)
		goto fail;
	port->side = packet.side;
	port->event_fd = fds[1];
	port->other_fd = fds[2];
	port->channel_fd = fds[0];
	return 0;
fail:
	pvf_scm_close(fds, 3);
	return rc;
}

static int embedded_open(struct pvf_port *port, const char **why)
{
	int rc = open_pages(port, why);

	if (rc)
		return rc;
	rc = open_event(port, why);
	if (rc)
		close_pages(port);
	return rc;
}

static void embedded_release(struct pvf_port *port)
{
	pvf_channel_unmap(port->channel);
	port->channel = NULL;
	close(port->event_fd);
	close(port->other_fd);
	close(port->channel_fd);
	if (port->arena_fd >= 0)
		close(port->arena_fd);
	port->channel_fd = port->arena_fd = -1;
}

static void embedded_share(const struct pvf_port *port, int *fds)
{
	fds[0] = port->channel_fd;
	fds[1] = port->event_fd;
	fds[2] = port->other_fd;
	if (port->grant_source >= 0)
		fds[3] = port->arena_fd;
}

static int embedded_take_over(struct pvf_port *port, int *fds, const char **why)
{
	int fd_count = port->grant_source < 0 ? 3 : 4;
	int rc = fd_count == 4 ? map_pages(port, fds[3], why) : 0;

	if (rc)
		return rc;
	*why = "the embedded host's event channel is no sealed page with its magic";
	rc = pvf_channel_map(fds[0], &port->channel);
	if (rc) {
		pvf_port_unmap(port);
		port->arena_fd = -1;
		return rc;
	}
	port->channel_fd = fds[0];
	port->event_fd = fds[1];
	port->other_fd = fds[2];
	for (int i = 0; i < fd_count; i++)
		fds[i] = -1;
	return 0;
}

static int embedded_read(struct pvf_port *port)
{
	return pvf_channel_take(port->channel, port->side, -1);
}

static int embedded_unmask(struct pvf_port *port)
{
	return pvf_channel_unmask(port->channel, port->side, port->event_fd);
}

static int embedded_notify(struct pvf_port *port)
{
	return pvf_channel_notify(port->channel, port->side, port->other_fd);
}

const struct pvf_port_ops pvf_port_embedded = {
	.name = "embedded",
	.edges = true,
	.open = embedded_open,
	.release = embedded_release,
	.read = embedded_read,
	.unmask = embedded_unmask,
	.notify = embedded_notify,
	.share = embedded_share,
	.extra = 3,
	.arena = true,
	.take_over = embedded_take_over,
};
