/* SPDX-License-Identifier: BSD-2-Clause */
#include "ctl.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "scm.h"

_Static_assert(sizeof(struct pvf_ctl_broken) <= PVF_CTL_UP_MAX, "largest message upwards");
_Static_assert(sizeof(struct pvf_ctl_attach) + PVF_MAX_POOL_PAGES * 4 <= PVF_CTL_MAX, "attach");

static void watch(struct pvf_ctl *ctl, int op, bool out)
{
	struct epoll_event event = {
		.events = EPOLLIN | (out ? EPOLLOUT : 0),
		.data.u64 = ctl->tag,
	};

	epoll_ctl(ctl->epoll_fd, op, ctl->fd, &event);
}

void pvf_ctl_accept(struct pvf_ctl *ctl, int fd)
{
	pvf_ctl_drop(ctl);
	ctl->fd = fd;
	watch(ctl, EPOLL_CTL_ADD, false);
}

void pvf_ctl_drop(struct pvf_ctl *ctl)
{
	if (ctl->fd >= 0)
		close(ctl->fd);
	ctl->fd = -1;
	ctl->head = ctl->count = 0;
	ctl->blocked = false;
}

/* Checking */

static bool terminated(const char *text, size_t size)
{
	return memchr(text, 0, size) != NULL;
}

static const char *check_attach(const struct pvf_ctl_attach *a, size_t bytes, uint32_t nfds)
{
	if (bytes < sizeof(*a))
		return "ATTACH is too short";
	bool console = a->device_class == PVF_CLASS_CONS;

	if (console ? a->pool_pages : a->pool_pages < 2 || a->pool_pages > PVF_MAX_POOL_PAGES)
		return "ATTACH: pool_pages must be 2 to 1056, a console's 0";
	if (bytes != sizeof(*a) + (size_t)a->pool_pages * 4)
		return "ATTACH: length does not fit pool_pages";
	if (nfds != (a->rx_port ? 3 : 2))
		return "ATTACH wants two descriptors, event channel and gntalloc, and RX's event channel with "
		       "rx_port";
	if (a->device_class != PVF_CLASS_BLK && a->device_class != PVF_CLASS_NET && !console)
		return "ATTACH: there are disks (class 1), networks (class 2) and consoles (class 3)";
	if (console && (a->ring_pages != 1 || a->queues != 1))
		return "ATTACH: a console has one ring page and one queue";
	if (a->device_class == PVF_CLASS_NET
		    ? a->ring_pages != PVF_NET_RING_PAGES || !a->tx_pages || a->tx_pages >= a->pool_pages
		    : a->tx_pages)
		return "ATTACH: a network has 2 ring_pages and tx_pages within the pool, a disk none";
	if (a->rx_port && (a->device_class != PVF_CLASS_NET || a->rx_port == a->port))
		return "ATTACH: rx_port is a network's, and another than port";
	if (!a->ring_pages || a->ring_pages > PVF_MAX_RING_PAGES ||
	    a->ring_pages & (a->ring_pages - 1))
		return "ATTACH: ring_pages must be 1, 2, 4, 8 or 16";
	if ((a->ring_offset | a->pool_offset) % PVF_PAGE_SIZE ||
	    a->ring_offset > INT64_MAX / 2 || a->pool_offset > INT64_MAX / 2)
		return "ATTACH: an mmap offset is no page's";
	if (!terminated(a->name, sizeof(a->name)) || !a->name[0])
		return "ATTACH: name must be 1 to 63 characters";
	if (a->flags & ~PVF_ATTACH_SCRUB)
		return "ATTACH: unknown flags";
	if (!a->queues || a->queues > PVF_MAX_QUEUES || a->queue >= a->queues)
		return "ATTACH: queues must be 1 to 16, and queue one of them";
	for (uint32_t i = 0; i < a->pool_pages; i++)
		for (uint32_t k = 0; k < i; k++)
			if (a->pool_grefs[i] == a->pool_grefs[k])
				return "ATTACH: a gref is listed twice";
	return NULL;
}

static const char *check_start(const struct pvf_ctl_start *s, size_t bytes, uint32_t nfds)
{
	uint32_t known = PVF_BLK_READ_ONLY | PVF_BLK_FLUSH | PVF_BLK_DISCARD |
			 PVF_BLK_BARRIER;

	if (bytes != sizeof(*s))
		return "START has a wrong length";
	if (s->first_queue >= PVF_MAX_QUEUES || nfds > PVF_MAX_QUEUES - s->first_queue)
		return "START: NBD sockets for queues that cannot be";
	if (s->sector_size < 512 || s->sector_size > 4096 || s->sector_size & (s->sector_size - 1))
		return "START: sector_size must be 512, 1024, 2048 or 4096";
	if (s->sectors > INT64_MAX / 512 || s->sectors % (s->sector_size / 512))
		return "START: sectors is no whole number of sector_size, or too large";
	if (s->flags & ~known || s->options & ~PVF_START_CLIENTS)
		return "START: unknown flags";
	if (s->poll_us > PVF_POLL_MAX_US)
		return "START: poll_us is 100000 at most";
	if (!s->max_segments || s->max_segments > 256)
		return "START: max_segments must be 1 to 256";
	if (s->discard_granularity % 512 || s->discard_alignment % 512)
		return "START: discard granularity and alignment must be multiples of 512";
	return NULL;
}

static const char *check_start_net(const struct pvf_ctl_start_net *s, size_t bytes, uint32_t nfds)
{
	uint32_t known = PVF_NET_SG | PVF_NET_CSUM4 | PVF_NET_CSUM6 | PVF_NET_GSO4 | PVF_NET_GSO6 |
			 PVF_NET_MULTICAST;

	if (bytes != sizeof(*s))
		return "START_NET has a wrong length";
	if (s->first_queue >= PVF_MAX_QUEUES || nfds > PVF_MAX_QUEUES - s->first_queue)
		return "START_NET: TAPs for queues that cannot be";
	if (s->features & ~known)
		return "START_NET: unknown features";
	if (s->groups > PVF_NET_GROUPS)
		return "START_NET: more groups than there is room for";
	for (uint32_t i = 0; i < s->groups; i++)
		if (!(s->group[i][0] & 1))
			return "START_NET: a group that is no multicast address";
	return NULL;
}

static const char *check_start_cons(const struct pvf_ctl_start_cons *s, size_t bytes, uint32_t nfds)
{
	if (bytes != sizeof(*s) || nfds > 1)
		return "START_CONS has a wrong length, or more than one descriptor";
	return s->reserved ? "START_CONS: unknown flags" : NULL;
}

const char *pvf_ctl_check(const union pvf_ctl_down *m, size_t bytes, uint32_t nfds)
{
	if (bytes < sizeof(m->hdr))
		return "a packet shorter than its header";
	if (m->hdr.magic != PVF_CTL_MAGIC)
		return "wrong magic";
	if (m->hdr.version != PVF_CTL_VERSION)
		return "another version of the protocol: supervisor and worker differ in build";
	if (m->hdr.length != bytes)
		return "length is not the packet's";
	switch (m->hdr.type) {
	case PVF_CTL_ATTACH:
		return check_attach(pvf_ctl_attach(m), bytes, nfds);
	case PVF_CTL_START:
		return check_start(&m->start, bytes, nfds);
	case PVF_CTL_START_NET:
		return check_start_net(&m->start_net, bytes, nfds);
	case PVF_CTL_START_CONS:
		return check_start_cons(&m->start_cons, bytes, nfds);
	case PVF_CTL_DETACH:
		if (bytes != sizeof(m->detach) || nfds)
			return "DETACH has a wrong length, or descriptors";
		if (m->detach.flags & ~(PVF_DETACH_KEEP_TARGET | PVF_DETACH_PARK) || m->detach.reserved)
			return "DETACH: unknown flags";
		return NULL;
	case PVF_CTL_HAND_OVER:
	case PVF_CTL_TAKE_OVER:
		return bytes != sizeof(m->simple) || nfds != 2 ?
			       "HAND_OVER and TAKE_OVER want two descriptors: a socket, a memfd" :
			       NULL;
	case PVF_CTL_TRACE:
		return bytes != sizeof(m->simple) || nfds > 1 ?
			       "TRACE has a wrong length, or more than one descriptor" : NULL;
	case PVF_CTL_QUIESCE:
	case PVF_CTL_EXIT:
	case PVF_CTL_LAST:
		return bytes != sizeof(m->simple) || nfds ?
			       "QUIESCE, EXIT or LAST has a wrong length, or descriptors" : NULL;
	default:
		return "a type that no supervisor sends";
	}
}

/* Receiving */

void pvf_ctl_release(struct pvf_ctl *ctl)
{
	pvf_scm_close(ctl->fds, PVF_CTL_MAX_FDS);
	ctl->nfds = 0;
}

int pvf_ctl_receive(struct pvf_ctl *ctl, const char **why)
{
	union {
		struct cmsghdr align;
		/* Room for what the kernel can send at most would be 253; what does not fit here is
		 * closed by the kernel and shows as MSG_CTRUNC. */
		char bytes[CMSG_SPACE(sizeof(int) * (PVF_CTL_MAX_FDS + 4))];
	} control;
	struct iovec iov = {.iov_base = &ctl->in, .iov_len = sizeof(ctl->in)};
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n = recvmsg(ctl->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n < 0)
		msg.msg_controllen = 0;
	uint32_t came = pvf_scm_take(&msg, ctl->fds, PVF_CTL_MAX_FDS);

	ctl->nfds = pvf_min32(came, PVF_CTL_MAX_FDS);
	if (n <= 0) {
		pvf_ctl_release(ctl);
		pvf_ctl_drop(ctl);
		return -1;
	}
	if (came > PVF_CTL_MAX_FDS || msg.msg_flags & MSG_CTRUNC)
		*why = "more descriptors than any message has";
	else if (msg.msg_flags & MSG_TRUNC)
		*why = "a packet larger than any message";
	else
		*why = pvf_ctl_check(&ctl->in, (size_t)n, ctl->nfds);
	if (!*why)
		return 1;
	if ((size_t)n < sizeof(ctl->in.hdr))
		memset(&ctl->in.hdr, 0, sizeof(ctl->in.hdr));
	pvf_ctl_release(ctl);
	return -2;
}

/* Sending */

/* 1: sent, 0: the socket is full, -1: the peer is gone. */
static int transmit(const struct pvf_ctl *ctl, const struct pvf_ctl_packet *packet)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {.iov_base = (void *)packet->bytes, .iov_len = packet->length};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (packet->fd >= 0) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = &control;
		msg.msg_controllen = sizeof(control);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &packet->fd, sizeof(int));
	}
	if (sendmsg(ctl->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return 1;
	return errno == EAGAIN || errno == EINTR || errno == ENOBUFS ? 0 : -1;
}

static bool drop_log(struct pvf_ctl *ctl)
{
	for (uint32_t i = 0; i < ctl->count; i++) {
		uint32_t at = (ctl->head + i) % PVF_CTL_QUEUE;

		if (ctl->queue[at].hdr.type != PVF_CTL_LOG)
			continue;
		for (; i + 1 < ctl->count; i++) {
			uint32_t next = (ctl->head + i + 1) % PVF_CTL_QUEUE;

			ctl->queue[at] = ctl->queue[next];
			at = next;
		}
		ctl->count--;
		return true;
	}
	return false;
}

void pvf_ctl_send(struct pvf_ctl *ctl, void *message, uint16_t type, uint32_t generation,
		  uint32_t length, int fd)
{
	struct pvf_ctl_hdr *hdr = message;

	PVF_ASSERT(length <= PVF_CTL_UP_MAX);
	if (ctl->fd < 0)
		return;
	*hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type, generation, length};
	if (ctl->count == PVF_CTL_QUEUE)
		pvf_ctl_flush(ctl);
	if (ctl->fd < 0)
		return;
	if (ctl->count == PVF_CTL_QUEUE && !drop_log(ctl)) {
		pvf_ctl_drop(ctl);
		return;
	}
	struct pvf_ctl_packet *p = &ctl->queue[(ctl->head + ctl->count++) % PVF_CTL_QUEUE];

	p->length = length;
	p->fd = fd;
	memcpy(p->bytes, message, length);
}

void pvf_ctl_flush(struct pvf_ctl *ctl)
{
	while (ctl->fd >= 0 && ctl->count) {
		int rc = transmit(ctl, &ctl->queue[ctl->head]);

		if (rc < 0) {
			pvf_ctl_drop(ctl);
			return;
		}
		if (!rc) {
			if (!ctl->blocked)
				watch(ctl, EPOLL_CTL_MOD, true);
			ctl->blocked = true;
			return;
		}
		ctl->head = (ctl->head + 1) % PVF_CTL_QUEUE;
		ctl->count--;
	}
	if (ctl->fd >= 0 && ctl->blocked) {
		ctl->blocked = false;
		watch(ctl, EPOLL_CTL_MOD, false);
	}
}
