/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What ATTACH brings for the embedded host: two descriptors of any kind with any packet in them, and
 * afterwards another end that writes anything into the channel.
 *
 * What must hold: a failure keeps nothing and leaves the two descriptors the caller's; after a success
 * ring and pool can be touched to their last byte, whatever the peer does with the memory; and in the end
 * no descriptor has been lost or closed twice.
 */
#include "fuzz.h"

#include <errno.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "memfd.h"
#include "port.h"
#include "scm.h"

static struct pvf_channel *seen; /* the channel of the packet, by the other end */

static int memory(size_t bytes, unsigned seals)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes) && !fcntl(fd, F_ADD_SEALS, seals));
	return fd;
}

static int end_of(int domain, int type)
{
	int pair[2];

	CHECK(!socketpair(domain, type, 0, pair));
	close(pair[1]);
	return pair[0];
}

/* A descriptor of some kind; the good ones are the first. */
static int any(uint32_t kind)
{
	int fd, pair[2];

	switch (kind % 11) {
	case 0: /* a channel */
		fd = memory(4096, F_SEAL_SHRINK);
		if (seen)
			munmap(seen, 4096);
		seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		CHECK(seen != MAP_FAILED);
		pvf_channel_init(seen);
		return fd;
	case 1:
		return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	case 2: /* an arena */
		return memory(64 * 4096, F_SEAL_SHRINK);
	case 3:
		return memory(64 * 4096, F_SEAL_GROW);
	case 4:
		return memory(8 * 4096, F_SEAL_SHRINK);
	case 5:
		return memory(4000, F_SEAL_SHRINK | F_SEAL_SEAL);
	case 6:
		return memory(64 * 4096, F_SEAL_SHRINK | F_SEAL_WRITE);
	case 7:
		return open("/dev/null", O_RDWR | O_CLOEXEC);
	case 8:
		CHECK(!pipe2(pair, O_CLOEXEC));
		close(pair[0]);
		return pair[1];
	case 9:
		return end_of(AF_UNIX, SOCK_STREAM);
	default:
		return end_of(AF_UNIX, SOCK_SEQPACKET);
	}
}

/* A connection with a packet in it: what the hub would send for `kind`, then changed. */
static int source(struct input *in, uint32_t kind, uint32_t port, int *peer)
{
	struct pvf_host_packet packet = {PVF_HOST_MAGIC, kind, port, upto(in, 2)};
	unsigned char bytes[sizeof(packet) + 16] = {0};
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(8 * sizeof(int))];
	} control = {0};
	uint32_t how = upto(in, 256), n = kind == PVF_HOST_EVENT ? 3 : 1;
	static const int types[] = {SOCK_SEQPACKET, SOCK_SEQPACKET, SOCK_SEQPACKET, SOCK_STREAM,
				    SOCK_DGRAM};
	size_t length = sizeof(packet);
	int pair[2], fds[8];

	*peer = -1;
	if (how == 255)
		return any(upto(in, 11));
	CHECK(!socketpair(AF_UNIX, types[upto(in, 5)] | SOCK_CLOEXEC, 0, pair));
	memcpy(bytes, &packet, sizeof(packet));
	if (how & 1)
		bytes[upto(in, sizeof(packet))] ^= (unsigned char)number(in, 1);
	if (how & 2)
		length = upto(in, sizeof(bytes) + 1);
	if (how & 4)
		n = upto(in, 9);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t good = kind == PVF_HOST_PAGES ? 2 : i ? 1 : 0;

		fds[i] = any(how & 8 ? upto(in, 11) : good);
		CHECK(fds[i] >= 0);
	}
	struct iovec iov = {bytes, length};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (n) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(n * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(n * sizeof(int));
		memcpy(CMSG_DATA(c), fds, n * sizeof(int));
	}
	if (!(how & 16))
		sendmsg(pair[0], &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (how & 32)
		send(pair[0], bytes, sizeof(bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
	pvf_scm_close(fds, n);
	if (how & 64)
		close(pair[0]);
	else
		*peer = pair[0];
	return pair[1];
}

static void touch(void *memory, size_t bytes)
{
	volatile unsigned char *at = memory;

	for (size_t i = 0; i < bytes; i += 4096)
		at[i] = at[i + 4095] = 1;
}

static void use(struct input *in, struct pvf_port *port)
{
	touch(port->ring, port->ring_bytes);
	touch(port->pool, port->pool_bytes);
	while (more(in)) {
		uint32_t op = upto(in, 6);
		int rc = 0;

		switch (op) {
		case 0:
			rc = port->ops->read(port);
			CHECK(rc <= 1);
			break;
		case 1:
			rc = port->ops->unmask(port);
			CHECK(rc <= 0);
			break;
		case 2:
			rc = port->ops->notify(port);
			CHECK(rc <= 0);
			break;
		case 3: /* the other end, by the rules */
			if (seen)
				pvf_channel_notify(seen, !port->side, port->event_fd);
			break;
		case 4: /* and not */
			if (seen)
				((unsigned char *)seen)[upto(in, 4096)] = (unsigned char)number(in, 1);
			break;
		default:
			if (seen) {
				static const uint64_t full = UINT64_MAX - 1;

				if (write(port->event_fd, &full, sizeof(full)) < 0)
					CHECK(errno);
			}
		}
		CHECK(rc > -4096);
	}
	/* By the rules again: an event that was not masked is delivered once. */
	if (seen && seen->magic == PVF_HOST_MAGIC && port->ops == &pvf_port_embedded) {
		seen->end[port->side].flags = 0;
		CHECK(pvf_channel_notify(seen, !port->side, port->event_fd) <= 0);
		if (port->channel->end[port->side].flags == PVF_CHANNEL_PENDING) {
			CHECK_EQ(port->ops->read(port), 1);
			CHECK_EQ(port->ops->read(port), 0);
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	struct pvf_port port;
	const char *why = NULL;
	uint64_t before = open_fds();
	int peer[2];

	struct pvf_ctl_attach attach = {
		.port = upto(&in, 4),
		.ring_pages = 1u << upto(&in, 5),
		.pool_pages = 2 + upto(&in, 64),
	};

	signal(SIGPIPE, SIG_IGN); /* as confine.c does */
	attach.ring_offset = (uint64_t)upto(&in, 80) * 4096;
	attach.pool_offset = (attach.ring_pages + (uint64_t)upto(&in, 80)) * 4096;
	if (upto(&in, 16) == 15) /* as large as the control protocol lets through */
		attach.pool_offset = (number(&in, 8) & (INT64_MAX / 2)) & ~UINT64_C(4095);
	int events = source(&in, PVF_HOST_EVENT, attach.port, &peer[0]);
	int grants = source(&in, PVF_HOST_PAGES, 0, &peer[1]);

	CHECK(events >= 0 && grants >= 0);
	int rc = pvf_port_open(&port, events, grants, &attach, &why);

	if (rc) {
		CHECK(rc < 0 && why && *why);
		CHECK(!close(events) && !close(grants));
	} else {
		CHECK(port.event_fd >= 0);
		use(&in, &port);
		pvf_port_close(&port);
		CHECK(fcntl(grants, F_GETFD) < 0 && fcntl(events, F_GETFD) < 0);
	}
	pvf_scm_close(peer, 2);
	if (seen)
		munmap(seen, 4096);
	seen = NULL;
	CHECK(open_fds() == before);
	return 0;
}
