/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The worker whose supervisor fuzz_ctl.c is: the hub, targets and pages that it is given, and all that it says,
 * which is checked as it is heard. Its threads are taken in turns here.
 */
#ifndef PVF_FUZZ_CTL_WORKER_H
#define PVF_FUZZ_CTL_WORKER_H

#include "fuzz.h"

#include <endian.h>
#include <errno.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <linux/nbd.h>
#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/blkif.h>
#include <xen/io/netif.h>

#include "image.h"
#include "scm.h"
#include "worker.h"

#define ARENA_PAGES 96u
#define QUEUES 3u
#define MANY 20u /* descriptors, more than any message has */
#define PORT 9u /* of queue 0 */
#define RX_PORT 90u

static struct pvf_worker worker;
static int listener, control, client[QUEUES]; /* -1: none */
static struct sockaddr_un address;
static socklen_t address_size;
static unsigned char *arena[QUEUES];
static struct pvf_channel *channel[QUEUES];
static int arena_fd[QUEUES], channel_fd[QUEUES], wakeup[QUEUES][2], hub[8];
static uint32_t hubs;
static uint32_t generation; /* the last that was ATTACHED */
static bool net; /* the worker is a network's */
static bool quiesce_owed;
static bool scribbled; /* over the channels: who maps them anew may refuse them */
static bool over;      /* nothing is to be said of what comes after */

static int memory(size_t bytes, void **where)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes) && !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	*where = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(*where != MAP_FAILED);
	return fd;
}

static void send_packet(int to, const void *bytes, size_t n, const int *fds, uint32_t count)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(MANY * sizeof(int))];
	} c = {0};
	struct iovec iov = {(void *)(uintptr_t)bytes, n};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (count) {
		msg.msg_control = &c;
		msg.msg_controllen = CMSG_SPACE(count * sizeof(int));
		struct cmsghdr *h = CMSG_FIRSTHDR(&msg);

		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(h), fds, count * sizeof(int));
	}
	CHECK(sendmsg(to, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)n);
}

/* A connection to the hub in which a packet waits, as for ATTACH. */
static int handed_over_port(uint32_t kind, uint32_t queue, uint32_t port)
{
	struct pvf_host_packet packet = {.magic = PVF_HOST_MAGIC, .kind = kind};
	int event[3] = {channel_fd[queue], wakeup[queue][0], wakeup[queue][1]}, pair[2];

	if (kind == PVF_HOST_EVENT)
		packet.port = port;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	if (kind == PVF_HOST_EVENT)
		send_packet(pair[0], &packet, sizeof(packet), event, 3);
	else
		send_packet(pair[0], &packet, sizeof(packet), &arena_fd[queue], 1);
	if (hubs < 8)
		hub[hubs++] = pair[0];
	else
		close(pair[0]);
	return pair[1];
}

static int handed_over(uint32_t kind, uint32_t queue)
{
	return handed_over_port(kind, queue, PORT + queue);
}

/* An NBD socket, or what stands for a TAP. */
static int target(uint32_t queue)
{
	int pair[2];

	CHECK(!socketpair(AF_UNIX, (net ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_CLOEXEC, 0, pair));
	if (client[queue] >= 0)
		close(client[queue]);
	client[queue] = pair[0];
	return pair[1];
}

static int any(uint32_t kind, uint32_t queue)
{
	switch (kind % 6) {
	case 0:
		return handed_over(PVF_HOST_EVENT, queue);
	case 1:
		return handed_over(PVF_HOST_PAGES, queue);
	case 2:
		return target(queue);
	case 3:
		return eventfd(0, EFD_CLOEXEC);
	case 4:
		return open("/dev/null", O_RDWR | O_CLOEXEC);
	default:
		return fcntl(arena_fd[queue], F_DUPFD_CLOEXEC, 0);
	}
}

/* What the worker says */

static void text_ends(const char *text, size_t size)
{
	CHECK(memchr(text, 0, size) && text[0]);
}

/* Reads all of it. `type`: of the message that was just sent, 0: none; returns its answers. */
static uint32_t hear(uint16_t type)
{
	union {
		struct pvf_ctl_hdr hdr;
		struct pvf_ctl_hello hello;
		struct pvf_ctl_error error;
		struct pvf_ctl_broken broken;
		struct pvf_ctl_target_gone gone;
		struct pvf_ctl_feature_off off;
		struct pvf_ctl_stalled stalled;
		struct pvf_ctl_log log;
		char bytes[PVF_CTL_MAX];
	} m;
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(4 * sizeof(int))];
	} c;
	static const uint16_t good[] = {[PVF_CTL_ATTACH] = PVF_CTL_ATTACHED,
					[PVF_CTL_START] = PVF_CTL_STARTED,
					[PVF_CTL_START_NET] = PVF_CTL_STARTED,
					[PVF_CTL_TRACE] = PVF_CTL_TRACING,
					[PVF_CTL_QUIESCE] = PVF_CTL_DRAINED,
					[PVF_CTL_DETACH] = PVF_CTL_DETACHED,
					[PVF_CTL_HAND_OVER] = PVF_CTL_HANDED_OVER,
					[PVF_CTL_TAKE_OVER] = PVF_CTL_TAKEN_OVER,
					[PVF_CTL_LAST] = PVF_CTL_NOTED};
	uint32_t answers = 0;

	while (control >= 0) {
		struct iovec iov = {&m, sizeof(m)};
		struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &c,
				     .msg_controllen = sizeof(c)};
		ssize_t n = recvmsg(control, &msg, MSG_DONTWAIT);
		int fds[4];

		if (n < 0)
			break;
		if (!n) {
			close(control);
			control = -1;
			break;
		}
		uint32_t came = pvf_scm_take(&msg, fds, 4);

		pvf_scm_close(fds, 4);
		CHECK(n >= (ssize_t)sizeof(m.hdr) && m.hdr.length == (size_t)n);
		CHECK(m.hdr.magic == PVF_CTL_MAGIC && m.hdr.version == PVF_CTL_VERSION);
		CHECK_EQ(came, m.hdr.type == PVF_CTL_HELLO);
		CHECK(m.hdr.generation >= generation);
		switch (m.hdr.type) {
		case PVF_CTL_HELLO:
			CHECK_EQ(n, sizeof(m.hello));
			CHECK(m.hello.state <= PVF_TARGET_LOST && m.hello.pid == worker.pid);
			CHECK(m.hello.targets < 1u << QUEUES && m.hello.queues == QUEUES);
			CHECK(m.hello.attached <= QUEUES);
			text_ends(m.hello.name, sizeof(m.hello.name));
			break;
		case PVF_CTL_ATTACHED:
			CHECK(type == PVF_CTL_ATTACH);
			CHECK(m.hdr.generation > generation || worker.attached > 1);
			generation = m.hdr.generation;
			answers++;
			break;
		case PVF_CTL_TAKEN_OVER:
			generation = m.hdr.generation;
			/* fall through */
		case PVF_CTL_HANDED_OVER:
		case PVF_CTL_STARTED:
		case PVF_CTL_TRACING:
		case PVF_CTL_DETACHED:
			CHECK_EQ(m.hdr.type, good[type]);
			quiesce_owed &= m.hdr.type == PVF_CTL_TRACING;
			answers++;
			break;
		case PVF_CTL_DRAINED: /* an answer, or a client's end */
			answers += type == PVF_CTL_QUIESCE && !answers; /* else it was an ERROR */
			quiesce_owed = false;
			for (uint32_t i = 0; i < QUEUES; i++)
				CHECK_EQ(pvf_queue_in_flight(&worker.queue[i]), 0);
			break;
		case PVF_CTL_ERROR:
			CHECK_EQ(n, sizeof(m.error));
			text_ends(m.error.text, sizeof(m.error.text));
			if (m.error.in_reply_to == PVF_CTL_QUIESCE && quiesce_owed &&
			    type != PVF_CTL_QUIESCE) {
				quiesce_owed = false;
				break;
			}
			CHECK_EQ(m.error.in_reply_to, type);
			answers++;
			break;
		case PVF_CTL_BROKEN:
			CHECK_EQ(n, sizeof(m.broken));
			text_ends(m.broken.text, sizeof(m.broken.text));
			text_ends(m.broken.field, sizeof(m.broken.field));
			CHECK(m.broken.rule && m.broken.rule <= 28 && m.broken.queue < QUEUES);
			break;
		case PVF_CTL_TARGET_GONE:
			CHECK_EQ(n, sizeof(m.gone));
			text_ends(m.gone.text, sizeof(m.gone.text));
			CHECK(m.gone.queue < QUEUES);
			break;
		case PVF_CTL_FEATURE_OFF:
			CHECK_EQ(n, sizeof(m.off));
			break;
		case PVF_CTL_STALLED:
			CHECK_EQ(n, sizeof(m.stalled));
			break;
		case PVF_CTL_LOG:
			break;
		default:
			abort();
		}
	}
	return answers;
}

static void turn(void)
{
	bool again = true;

	for (int round = 0; again && round < 4; round++) {
		CHECK(!pvf_worker_turn(&worker, 0));
		again = false;
		for (uint32_t i = 0; i < QUEUES; i++)
			again |= pvf_queue_turn(&worker.queue[i], 0);
		CHECK(!pvf_worker_turn(&worker, 0));
	}
	CHECK(worker.state <= PVF_TARGET_LOST);
	/* A ring may be broken before the last is attached. */
	CHECK((worker.state == PVF_IDLE) == (!worker.attached || worker.attached < worker.attaching) ||
	      (worker.state == PVF_BROKEN && worker.attached));
	for (uint32_t i = 0; i < QUEUES; i++) {
		const struct pvf_queue *q = &worker.queue[i];

		CHECK(pvf_queue_in_flight(q) <= 512);
		CHECK(q->attached == (i < worker.attached));
		CHECK(!q->serving || worker.state == PVF_RUNNING || worker.state == PVF_DRAINING ||
		      worker.state == PVF_TARGET_LOST);
		CHECK(!q->notes && !q->lost); /* all is told, and a lost socket closed */
	}
	CHECK(!worker.fence.closed);
}

static void supervisor(void)
{
	if (control >= 0)
		close(control);
	control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	CHECK(control >= 0 && !connect(control, (struct sockaddr *)&address, address_size));
	quiesce_owed = worker.quiesce_asked;
	turn();
	hear(0);
}

static void begin_worker(void)
{
	const char *why = NULL;

	CHECK(!pvf_worker_init(&worker, listener, "vbd-51728", QUEUES, &why));
	CHECK(!net || !pvf_worker_net(&worker, &why));
	supervisor();
}

static void forget_worker(void)
{
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct pvf_queue *q = &worker.queue[i];

		pvf_queue_detach(q, false);
		if (q->port.parked) /* the worker would hold it until it dies */
			CHECK(!close(q->port.event_source));
		if (net && q->second.parked)
			CHECK(!close(q->second.event_source));
		CHECK_EQ(q->blk.free_requests, PVF_REQUESTS);
		CHECK_EQ(q->blk.free_pieces, PVF_PIECES);
		CHECK(q->target.fd < 0 && !q->attached);
	}
	pvf_worker_end(&worker);
}

#endif
