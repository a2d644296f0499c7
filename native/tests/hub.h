/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the hub and a supervisor do for a worker, or for a program that has a disk to itself: the
 * control protocol's other end, and one queue's event channel and pages with a backend behind them.
 */
#ifndef PVF_TEST_HUB_H
#define PVF_TEST_HUB_H

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "backend.h"
#include "channel.h"
#include "ctl.h"

#define POOL_MOST 64u
#define PORT 9u
#define PATIENCE 60000 /* ms: for what must come */

struct connection { /* one queue of one generation, as the other end has it */
	struct pvf_channel *channel;
	int wakeup[2]; /* the eventfds: the frontend's, the backend's */
	int hub_event, hub_grants;
	uint32_t pool;
	unsigned char *shared; /* the ring's page, and the pool's behind it */
	struct backend backend;
	pthread_t thread; /* the backend's */
};

static inline void send_packet(int sock, const void *data, size_t size, const int *fds, size_t n)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(4 * sizeof(int))];
	} c = {0};
	struct iovec iov = {(void *)(uintptr_t)data, size};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	CHECK(n <= 4);
	if (n) {
		msg.msg_control = &c;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * n);
		struct cmsghdr *h = CMSG_FIRSTHDR(&msg);

		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int) * n);
		memcpy(CMSG_DATA(h), fds, sizeof(int) * n);
	}
	CHECK(sendmsg(sock, &msg, MSG_NOSIGNAL) == (ssize_t)size);
}

/* The supervisor */

static inline void tell_of(int control, void *message, uint16_t type, uint32_t generation,
			   size_t size, const int *fds, size_t n)
{
	struct pvf_ctl_hdr *hdr = message;

	*hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type, generation, (uint32_t)size};
	send_packet(control, message, size, fds, n);
}

/* Waits for a message of this type; returns the queue that it names, if it names one. A machine that has too much to
 * do stalls a backend too: that is heard only by who waits for it. */
static inline uint32_t hear_from(int control, uint16_t type)
{
	struct pollfd polled = {.fd = control, .events = POLLIN};
	union {
		struct pvf_ctl_hdr hdr;
		struct pvf_ctl_broken broken;
		struct pvf_ctl_target_gone gone;
		char bytes[PVF_CTL_MAX];
	} m;

	do {
		CHECK_EQ(poll(&polled, 1, PATIENCE), 1);
		CHECK(recv(control, &m, sizeof(m), 0) >= (ssize_t)sizeof(m.hdr));
	} while (m.hdr.type == PVF_CTL_LOG || m.hdr.type == PVF_CTL_HELLO ||
		 (m.hdr.type == PVF_CTL_STALLED && type != PVF_CTL_STALLED));
	CHECK_EQ(m.hdr.type, type);
	return type == PVF_CTL_BROKEN ? m.broken.queue : m.gone.queue;
}

/* The hub */

static inline int memfd(size_t bytes)
{
	int fd = memfd_create("test", MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	return fd;
}

/* The two connections that ATTACH brings, with a packet in each. */
static inline void hand_over(struct connection *c, int grants, int *sources)
{
	struct pvf_host_packet event = {PVF_HOST_MAGIC, PVF_HOST_EVENT, PORT, 0};
	struct pvf_host_packet pages = {.magic = PVF_HOST_MAGIC, .kind = PVF_HOST_PAGES};
	int fds[3] = {memfd(4096)}, pair[2];

	c->channel = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(c->channel != MAP_FAILED);
	pvf_channel_init(c->channel);
	for (int side = 0; side < 2; side++)
		CHECK((fds[1 + side] = c->wakeup[side] = eventfd(0, EFD_NONBLOCK)) >= 0);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	send_packet(pair[0], &event, sizeof(event), fds, 3);
	close(fds[0]);
	c->hub_event = pair[0];
	sources[0] = pair[1];
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	send_packet(pair[0], &pages, sizeof(pages), &grants, 1);
	c->hub_grants = pair[0];
	sources[1] = pair[1];
}

/* One queue's ATTACH, and a backend of this disk behind it that `run` serves in a thread. */
static inline void attach_queue(struct connection *c, int control, uint32_t generation,
				uint32_t queue, uint32_t queues, uint32_t pool, unsigned char *disk,
				uint64_t size, void *(*run)(void *), void *arg)
{
	static _Alignas(8) unsigned char message[sizeof(struct pvf_ctl_attach) + POOL_MOST * 4];
	struct pvf_ctl_attach *m = (struct pvf_ctl_attach *)(void *)message;
	int grants = memfd(4096 * (1 + pool)), sources[2];

	CHECK(pool <= POOL_MOST);
	c->pool = pool;
	hand_over(c, grants, sources);
	*m = (struct pvf_ctl_attach){.device_class = PVF_CLASS_BLK, .port = PORT, .ring_pages = 1,
				     .pool_pages = pool, .ring_offset = 0, .pool_offset = 4096,
				     .name = "vbd-1", .queue = (uint16_t)queue,
				     .queues = (uint16_t)queues};
	backend_grefs(m->pool_grefs, pool);
	tell_of(control, m, PVF_CTL_ATTACH, generation, sizeof(*m) + pool * 4, sources, 2);
	hear_from(control, PVF_CTL_ATTACHED);
	close(sources[0]);
	close(sources[1]);
	c->shared = mmap(NULL, 4096 * (1 + pool), PROT_READ | PROT_WRITE, MAP_SHARED, grants, 0);
	CHECK(c->shared != MAP_FAILED);
	close(grants);
	backend_init(&c->backend, c->shared, 4096, c->shared + 4096, pool, disk, size);
	CHECK(!pthread_create(&c->thread, NULL, run, arg));
}

/* After the answer to DETACH: everything that ATTACH brought has been let go. */
static inline void let_go_of(struct connection *c)
{
	char end;

	pthread_join(c->thread, NULL); /* the event channel is closed */
	CHECK_EQ(recv(c->hub_grants, &end, 1, MSG_DONTWAIT), 0); /* and the pages */
	munmap(c->channel, 4096);
	munmap(c->shared, 4096 * (1 + c->pool));
	int own[] = {c->wakeup[0], c->wakeup[1], c->hub_event, c->hub_grants};

	for (size_t i = 0; i < sizeof(own) / sizeof(*own); i++)
		close(own[i]);
}

#endif
