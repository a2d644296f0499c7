/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker in a thread, a backend in another, supervisor and client in the main one: what
 * the thread sanitizer needs in order to see the two ends of a ring meet.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <linux/nbd.h>

#include "backend.h"
#include "worker.h"

#define DISK (4u << 20)
#define POOL 48u
#define PORT 9u

static struct pvf_worker worker;
static struct backend backend;
static unsigned char disk[DISK], expected[DISK];
static struct pvf_channel *channel;
static int control, client;
static int wakeup[2]; /* the eventfds: the worker's, the backend's */
static int hub_event, hub_grants;

static void *run_worker(void *status)
{
	*(int *)status = pvf_worker_run(&worker);
	return NULL;
}

/* The backend's end of the channel, until the worker lets the hub's connection go. */
static void *run_backend(void *arg)
{
	struct pollfd polled[2] = {{.fd = wakeup[1], .events = POLLIN}, {.fd = hub_event}};
	uint64_t seed = 11;

	(void)arg;
	for (;;) {
		bool event = false;

		CHECK(poll(polled, 2, -1) > 0);
		if (pvf_channel_take(channel, 1, wakeup[1])) {
			backend_take(&backend);
			while (backend.held)
				event |= backend_answer(&backend, below(&seed, backend.held),
							BLKIF_RSP_OKAY);
			if (event)
				CHECK_EQ(pvf_channel_notify(channel, 1, wakeup[0]), 0);
			CHECK_EQ(pvf_channel_unmask(channel, 1, wakeup[1]), 0);
		} else if (polled[1].revents & POLLHUP) {
			return NULL;
		}
	}
}

static void send_packet(int sock, const void *data, size_t size, const int *fds, size_t n)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(3 * sizeof(int))];
	} c = {0};
	struct iovec iov = {(void *)(uintptr_t)data, size};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (n) {
		msg.msg_control = &c;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * n);
		struct cmsghdr *h = CMSG_FIRSTHDR(&msg);

		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int) * n);
		memcpy(CMSG_DATA(h), fds, sizeof(int) * n);
	}
	CHECK(sendmsg(sock, &msg, 0) == (ssize_t)size);
}

static void tell(void *message, uint16_t type, size_t size, int fd1, int fd2)
{
	struct pvf_ctl_hdr *hdr = message;
	int fds[2] = {fd1, fd2};

	*hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type, 1, (uint32_t)size};
	send_packet(control, message, size, fds, (size_t)((fd1 >= 0) + (fd2 >= 0)));
}

static int memfd(size_t bytes)
{
	int fd = memfd_create("test", MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	return fd;
}

/* What the hub does: the two connections that ATTACH brings, with a packet in each. */
static void hand_over(int grants, int *event_source, int *grant_source)
{
	struct pvf_host_packet event = {PVF_HOST_MAGIC, PVF_HOST_EVENT, PORT, 0};
	struct pvf_host_packet pages = {.magic = PVF_HOST_MAGIC, .kind = PVF_HOST_PAGES};
	int fds[3] = {memfd(4096)}, pair[2];

	channel = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(channel != MAP_FAILED);
	pvf_channel_init(channel);
	for (int side = 0; side < 2; side++)
		CHECK((fds[1 + side] = wakeup[side] = eventfd(0, EFD_NONBLOCK)) >= 0);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	send_packet(pair[0], &event, sizeof(event), fds, 3);
	close(fds[0]);
	hub_event = pair[0];
	*event_source = pair[1];
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	send_packet(pair[0], &pages, sizeof(pages), &grants, 1);
	hub_grants = pair[0];
	*grant_source = pair[1];
}

static void hear(uint16_t type)
{
	union {
		struct pvf_ctl_hdr hdr;
		char bytes[PVF_CTL_MAX];
	} m;

	do
		CHECK(recv(control, &m, sizeof(m), 0) >= (ssize_t)sizeof(m.hdr));
	while (m.hdr.type == PVF_CTL_LOG || m.hdr.type == PVF_CTL_HELLO);
	CHECK_EQ(m.hdr.type, type);
}

static void all(bool out, void *data, size_t size)
{
	char *at = data;

	while (size) {
		ssize_t n = out ? send(client, at, size, MSG_NOSIGNAL) : recv(client, at, size, 0);

		CHECK(n > 0);
		at += n;
		size -= (size_t)n;
	}
}

static void ask(uint32_t type, uint64_t from, uint32_t length) /* its handle: `from` */
{
	struct nbd_request r = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32(type),
		.from = htobe64(from),
		.len = htobe32(length),
	};

	memcpy(r.handle, &from, sizeof(from));
	all(true, &r, sizeof(r));
}

/* Replies come in the order of completion. */
static uint64_t answer(void)
{
	struct nbd_reply r;
	uint64_t from;

	all(false, &r, sizeof(r));
	CHECK_EQ(be32toh(r.magic), NBD_REPLY_MAGIC);
	CHECK_EQ(r.error, 0);
	memcpy(&from, r.handle, sizeof(from));
	return from;
}

static void *send_writes(void *arg)
{
	uint64_t seed = 5;

	(void)arg;
	for (uint32_t at = 0; at < DISK;) {
		uint32_t n = 512 * (1 + below(&seed, 300));

		if (n > DISK - at)
			n = DISK - at;
		ask(NBD_CMD_WRITE, at, n);
		all(true, expected + at, n);
		at += n;
	}
	return NULL;
}

static void *send_reads(void *arg)
{
	(void)arg;
	for (uint32_t at = 0; at < DISK; at += 32768)
		ask(NBD_CMD_READ, at, 32768);
	return NULL;
}

static void new_client(struct pvf_ctl_start *start)
{
	int nbd[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, nbd));
	client = nbd[0];
	tell(start, PVF_CTL_START, sizeof(*start), nbd[1], -1);
	hear(PVF_CTL_STARTED);
	close(nbd[1]);
}

static void serve(uint32_t poll_us)
{
	static _Alignas(8) unsigned char message[sizeof(struct pvf_ctl_attach) + POOL * 4];
	struct pvf_ctl_attach *attach = (struct pvf_ctl_attach *)(void *)message;
	struct pvf_ctl_start start = {.sectors = DISK / 512, .sector_size = 512,
				      .flags = PVF_BLK_FLUSH, .max_segments = 11,
				      .stall_seconds = 5, .options = PVF_START_CLIENTS,
				      .poll_us = poll_us};
	struct pvf_ctl_simple simple;
	struct pvf_ctl_detach detach = {0};
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	pthread_t threads[3];
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0), status = -1;
	int sources[2];
	socklen_t length = sizeof(name);
	const char *why;
	uint64_t seed = 99, sizes = 5;

	memset(disk, 0, sizeof(disk));
	for (uint32_t i = 0; i < DISK; i++)
		expected[i] = (unsigned char)draw(&seed);
	CHECK(!bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t))); /* any name */
	CHECK(!listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&name, &length));
	CHECK(!pvf_worker_init(&worker, listener, "vbd-1", 1, &why));
	CHECK(!pvf_worker_start(&worker, &why));
	CHECK(!pthread_create(&threads[0], NULL, run_worker, &status));
	control = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	CHECK(!connect(control, (struct sockaddr *)&name, length));

	int grants = memfd(4096 * (1 + POOL));

	hand_over(grants, &sources[0], &sources[1]);
	*attach = (struct pvf_ctl_attach){.device_class = PVF_CLASS_BLK, .port = PORT,
					  .ring_pages = 1, .pool_pages = POOL, .ring_offset = 0,
					  .pool_offset = 4096, .name = "vbd-1",
					  .queues = 1};
	backend_grefs(attach->pool_grefs, POOL);
	tell(attach, PVF_CTL_ATTACH, sizeof(message), sources[0], sources[1]);
	hear(PVF_CTL_ATTACHED);
	unsigned char *shared = mmap(NULL, 4096 * (1 + POOL), PROT_READ | PROT_WRITE, MAP_SHARED,
				     grants, 0);

	CHECK(shared != MAP_FAILED);
	backend_init(&backend, shared, 4096, shared + 4096, POOL, disk, DISK);
	CHECK(!pthread_create(&threads[1], NULL, run_backend, NULL));
	tell(&start, PVF_CTL_START, sizeof(start), -1, -1);
	hear(PVF_CTL_STARTED);
	close(sources[0]);
	close(sources[1]);

	new_client(&start);
	CHECK(!pthread_create(&threads[2], NULL, send_writes, NULL));
	for (uint32_t at = 0; at < DISK;) {
		at += 512 * (1 + below(&sizes, 300));
		answer();
	}
	pthread_join(threads[2], NULL);
	close(client);
	hear(PVF_CTL_TARGET_GONE);
	hear(PVF_CTL_DRAINED);
	new_client(&start);
	CHECK(!pthread_create(&threads[2], NULL, send_reads, NULL));
	for (uint32_t at = 0; at < DISK; at += 32768) {
		static unsigned char data[32768];

		uint64_t from = answer();

		CHECK(from < DISK);
		all(false, data, sizeof(data));
		CHECK(!memcmp(data, expected + from, sizeof(data)));
	}
	pthread_join(threads[2], NULL);

	tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), -1, -1);
	hear(PVF_CTL_DRAINED);
	tell(&detach, PVF_CTL_DETACH, sizeof(detach), -1, -1);
	hear(PVF_CTL_DETACHED);
	tell(&simple, PVF_CTL_EXIT, sizeof(simple), -1, -1);
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL); /* DETACH has closed the event channel */
	char end;

	CHECK_EQ(recv(hub_grants, &end, 1, MSG_DONTWAIT), 0); /* and the pages */
	CHECK_EQ(status, 0);
	CHECK(!memcmp(disk, expected, DISK));
	CHECK_EQ(pvf_stats_page(&worker.stats, 0)->write.bytes, DISK);
	CHECK_EQ(pvf_stats_page(&worker.stats, 0)->read.bytes, DISK);
	CHECK_EQ(pvf_stats_page(&worker.stats, 0)->sequence % 2, 0);
	CHECK_EQ(pvf_stats_page(&worker.stats, 0)->polled > 0, poll_us > 0);
	pvf_worker_end(&worker);
}

static void sleeping(void)
{
	serve(0);
}

static void polling(void)
{
	serve(PVF_POLL_MAX_US);
}

int main(void)
{
	static const struct test tests[] = {
		{"a worker serves one client's writes and another's reads, a backend in a thread", sleeping},
		{"so it does while it looks for responses instead of sleeping", polling},
	};

	return RUN_TESTS(tests);
}
