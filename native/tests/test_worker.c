/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker with its threads, a backend for each queue and its clients in others, the
 * supervisor in the main one: what the thread sanitizer needs in order to see all ends meet.
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

#define PART (1u << 20) /* of the disk: each queue has one */
#define MOST 4u
#define DISK (MOST * PART)
#define POOL 48u
#define PORT 9u

/* What is on the other side of one queue. */
struct side {
	struct backend backend;
	struct pvf_channel *channel;
	int wakeup[2]; /* the eventfds: the worker's, the backend's */
	int hub_event, hub_grants;
	int client;
	uint64_t base; /* of its part of the disk */
	pthread_t backend_thread, writer, reader;
	unsigned char *shared;
};

static struct pvf_worker worker;
static struct side sides[MOST];
static unsigned char disk[DISK], expected[DISK];
static uint32_t queues;
static int control, status;
static pthread_t worker_thread;
/* Atomic, a bit for each queue: its backend answers nothing; it lies, once. */
static uint32_t held, liars;

static void *run_worker(void *arg)
{
	(void)arg;
	status = pvf_worker_run(&worker);
	return NULL;
}

/* The backend's end of the channel, until the worker lets the hub's connection go. */
static void *run_backend(void *arg)
{
	struct side *s = arg;
	struct pollfd polled[2] = {{.fd = s->wakeup[1], .events = POLLIN}, {.fd = s->hub_event}};
	uint64_t seed = 11;

	for (;;) {
		bool event = false;

		CHECK(poll(polled, 2, -1) > 0);
		if (pvf_channel_take(s->channel, 1, s->wakeup[1])) {
			if (__atomic_load_n(&liars, __ATOMIC_SEQ_CST) >> (s - sides) & 1) {
				__atomic_store_n(&s->backend.ring.sring->rsp_prod, 1u << 30,
						 __ATOMIC_SEQ_CST);
				CHECK_EQ(pvf_channel_notify(s->channel, 1, s->wakeup[0]), 0);
			}
			backend_take(&s->backend);
			while (s->backend.held &&
			       !(__atomic_load_n(&held, __ATOMIC_SEQ_CST) >> (s - sides) & 1))
				event |= backend_answer(&s->backend, below(&seed, s->backend.held),
							BLKIF_RSP_OKAY);
			if (event)
				CHECK_EQ(pvf_channel_notify(s->channel, 1, s->wakeup[0]), 0);
			CHECK_EQ(pvf_channel_unmask(s->channel, 1, s->wakeup[1]), 0);
		} else if (polled[1].revents & POLLHUP) {
			return NULL;
		}
	}
}

/* Its backend answers nothing from now on, or again. */
static void hold(uint32_t queue, bool on)
{
	if (on)
		__atomic_or_fetch(&held, 1u << queue, __ATOMIC_SEQ_CST);
	else
		__atomic_and_fetch(&held, ~(1u << queue), __ATOMIC_SEQ_CST);
	CHECK_EQ(pvf_channel_notify(sides[queue].channel, 0, sides[queue].wakeup[1]), 0);
}

static void send_packet(int sock, const void *data, size_t size, const int *fds, size_t n)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MOST * sizeof(int))];
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

static void tell(void *message, uint16_t type, size_t size, const int *fds, size_t n)
{
	struct pvf_ctl_hdr *hdr = message;

	*hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type, 1, (uint32_t)size};
	send_packet(control, message, size, fds, n);
}

static int memfd(size_t bytes)
{
	int fd = memfd_create("test", MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	return fd;
}

/* What the hub does: the two connections that ATTACH brings, with a packet in each. */
static void hand_over(struct side *s, int grants, int *sources)
{
	struct pvf_host_packet event = {PVF_HOST_MAGIC, PVF_HOST_EVENT, PORT, 0};
	struct pvf_host_packet pages = {.magic = PVF_HOST_MAGIC, .kind = PVF_HOST_PAGES};
	int fds[3] = {memfd(4096)}, pair[2];

	s->channel = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(s->channel != MAP_FAILED);
	pvf_channel_init(s->channel);
	for (int side = 0; side < 2; side++)
		CHECK((fds[1 + side] = s->wakeup[side] = eventfd(0, EFD_NONBLOCK)) >= 0);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	send_packet(pair[0], &event, sizeof(event), fds, 3);
	close(fds[0]);
	s->hub_event = pair[0];
	sources[0] = pair[1];
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	send_packet(pair[0], &pages, sizeof(pages), &grants, 1);
	s->hub_grants = pair[0];
	sources[1] = pair[1];
}

/* Waits for a message of this type; returns the queue that it names, if it names one. */
static uint32_t hear(uint16_t type)
{
	union {
		struct pvf_ctl_hdr hdr;
		struct pvf_ctl_broken broken;
		struct pvf_ctl_target_gone gone;
		char bytes[PVF_CTL_MAX];
	} m;

	do
		CHECK(recv(control, &m, sizeof(m), 0) >= (ssize_t)sizeof(m.hdr));
	while (m.hdr.type == PVF_CTL_LOG || m.hdr.type == PVF_CTL_HELLO);
	CHECK_EQ(m.hdr.type, type);
	return type == PVF_CTL_BROKEN ? m.broken.queue : m.gone.queue;
}

static void all(int client, bool out, void *data, size_t size)
{
	char *at = data;

	while (size) {
		ssize_t n = out ? send(client, at, size, MSG_NOSIGNAL) : recv(client, at, size, 0);

		CHECK(n > 0);
		at += n;
		size -= (size_t)n;
	}
}

static void ask(int client, uint32_t type, uint64_t from, uint32_t length) /* its handle: `from` */
{
	struct nbd_request r = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32(type),
		.from = htobe64(from),
		.len = htobe32(length),
	};

	memcpy(r.handle, &from, sizeof(from));
	all(client, true, &r, sizeof(r));
}

/* Replies come in the order of completion. */
static uint64_t answer(int client)
{
	struct nbd_reply r;
	uint64_t from;

	all(client, false, &r, sizeof(r));
	CHECK_EQ(be32toh(r.magic), NBD_REPLY_MAGIC);
	CHECK_EQ(r.error, 0);
	memcpy(&from, r.handle, sizeof(from));
	return from;
}

static uint32_t next_size(uint64_t *seed, uint32_t at)
{
	uint32_t n = 512 * (1 + below(seed, 300));

	return n > PART - at ? PART - at : n;
}

static void *send_writes(void *arg)
{
	const struct side *s = arg;
	uint64_t seed = 5;

	for (uint32_t at = 0, n; at < PART; at += n) {
		n = next_size(&seed, at);
		ask(s->client, NBD_CMD_WRITE, s->base + at, n);
		all(s->client, true, expected + s->base + at, n);
	}
	return NULL;
}

static void *take_writes(void *arg)
{
	const struct side *s = arg;
	uint64_t seed = 5;

	for (uint32_t at = 0; at < PART; at += next_size(&seed, at))
		answer(s->client);
	return NULL;
}

static void *send_reads(void *arg)
{
	const struct side *s = arg;

	for (uint32_t at = 0; at < PART; at += 32768)
		ask(s->client, NBD_CMD_READ, s->base + at, 32768);
	return NULL;
}

static void *take_reads(void *arg)
{
	const struct side *s = arg;
	unsigned char data[32768];

	for (uint32_t at = 0; at < PART; at += sizeof(data)) {
		uint64_t from = answer(s->client);

		CHECK(from - s->base < PART);
		all(s->client, false, data, sizeof(data));
		CHECK(!memcmp(data, expected + from, sizeof(data)));
	}
	return NULL;
}

/* All clients at once. */
static void use(void *(*out)(void *), void *(*in)(void *))
{
	for (uint32_t i = 0; i < queues; i++) {
		CHECK(!pthread_create(&sides[i].writer, NULL, out, &sides[i]));
		CHECK(!pthread_create(&sides[i].reader, NULL, in, &sides[i]));
	}
	for (uint32_t i = 0; i < queues; i++) {
		pthread_join(sides[i].writer, NULL);
		pthread_join(sides[i].reader, NULL);
	}
}

static struct pvf_ctl_start start = {.sectors = DISK / 512, .sector_size = 512,
				     .flags = PVF_BLK_FLUSH, .max_segments = 64,
				     .stall_seconds = 5, .options = PVF_START_CLIENTS};

static void new_clients(void)
{
	int fds[MOST], pair[2];

	for (uint32_t i = 0; i < queues; i++) {
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
		sides[i].client = pair[0];
		fds[i] = pair[1];
	}
	tell(&start, PVF_CTL_START, sizeof(start), fds, queues);
	hear(PVF_CTL_STARTED);
	for (uint32_t i = 0; i < queues; i++)
		close(fds[i]);
}

static void attach(uint32_t i)
{
	static _Alignas(8) unsigned char message[sizeof(struct pvf_ctl_attach) + POOL * 4];
	struct pvf_ctl_attach *m = (struct pvf_ctl_attach *)(void *)message;
	struct side *s = &sides[i];
	int grants = memfd(4096 * (1 + POOL)), sources[2];

	hand_over(s, grants, sources);
	*m = (struct pvf_ctl_attach){.device_class = PVF_CLASS_BLK, .port = PORT, .ring_pages = 1,
				     .pool_pages = POOL, .ring_offset = 0, .pool_offset = 4096,
				     .name = "vbd-1", .queue = (uint16_t)i,
				     .queues = (uint16_t)queues};
	backend_grefs(m->pool_grefs, POOL);
	tell(m, PVF_CTL_ATTACH, sizeof(message), sources, 2);
	hear(PVF_CTL_ATTACHED);
	close(sources[0]);
	close(sources[1]);
	s->shared = mmap(NULL, 4096 * (1 + POOL), PROT_READ | PROT_WRITE, MAP_SHARED, grants, 0);
	CHECK(s->shared != MAP_FAILED);
	close(grants);
	backend_init(&s->backend, s->shared, 4096, s->shared + 4096, POOL, disk, DISK);
	s->base = (uint64_t)i * PART;
	CHECK(!pthread_create(&s->backend_thread, NULL, run_backend, s));
}

/* A worker that serves `n` queues, each with a client. */
static void begin(uint32_t n)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
	socklen_t length = sizeof(name);
	const char *why;
	uint64_t seed = 99;

	queues = n;
	held = liars = 0;
	status = -1;
	memset(disk, 0, sizeof(disk));
	for (uint32_t i = 0; i < DISK; i++)
		expected[i] = (unsigned char)draw(&seed);
	CHECK(!bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t))); /* any name */
	CHECK(!listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&name, &length));
	CHECK(!pvf_worker_init(&worker, listener, "vbd-1", n, &why));
	CHECK(!pvf_worker_start(&worker, &why));
	CHECK(!pthread_create(&worker_thread, NULL, run_worker, NULL));
	control = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	CHECK(!connect(control, (struct sockaddr *)&name, length));
	for (uint32_t i = 0; i < n; i++)
		attach(i);
	new_clients();
}

static void detach_and_end(void)
{
	struct pvf_ctl_detach detach = {0};
	struct pvf_ctl_simple simple;
	char end;

	tell(&detach, PVF_CTL_DETACH, sizeof(detach), NULL, 0);
	hear(PVF_CTL_DETACHED);
	tell(&simple, PVF_CTL_EXIT, sizeof(simple), NULL, 0);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	for (uint32_t i = 0; i < queues; i++) {
		struct side *s = &sides[i];

		pthread_join(s->backend_thread, NULL); /* DETACH has closed the event channel */
		CHECK_EQ(recv(s->hub_grants, &end, 1, MSG_DONTWAIT), 0); /* and the pages */
		munmap(s->shared, 4096 * (1 + POOL));
		munmap(s->channel, 4096);
		int own[] = {s->wakeup[0], s->wakeup[1], s->hub_event, s->hub_grants, s->client};

		for (size_t k = 0; k < sizeof(own) / sizeof(*own); k++)
			close(own[k]);
	}
	close(control);
	close(worker.listen_fd);
}

static void serve(uint32_t n, uint32_t poll_us)
{
	struct pvf_ctl_simple simple;

	start.poll_us = poll_us;
	begin(n);
	use(send_writes, take_writes);
	close(sides[0].client);
	CHECK_EQ(hear(PVF_CTL_TARGET_GONE), 0);
	hear(PVF_CTL_DRAINED);
	for (uint32_t i = 1; i < n; i++)
		close(sides[i].client);
	new_clients();
	use(send_reads, take_reads);
	tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), NULL, 0);
	hear(PVF_CTL_DRAINED);
	detach_and_end();
	for (uint32_t i = 0; i < n; i++) {
		const struct pvf_blk_stats *s = pvf_stats_page(&worker.stats, i);

		pvf_queue_lock(&worker.queue[i]); /* nobody writes them now */
		CHECK_EQ(s->write.bytes, PART);
		CHECK_EQ(s->read.bytes, PART);
		CHECK_EQ(s->sequence % 2, 0);
		CHECK_EQ(s->polled > 0, poll_us > 0);
		pvf_queue_unlock(&worker.queue[i]);
	}
	CHECK(!memcmp(disk, expected, n * PART));
	pvf_worker_end(&worker);
	start.poll_us = 0;
}

static void one(void)
{
	serve(1, 0);
}

static void two(void)
{
	serve(2, 0);
}

static void four(void)
{
	serve(4, 0);
}

static void polling(void)
{
	serve(2, PVF_POLL_MAX_US);
}

/* A supervisor that asks all the time, while all queues are busy. */
static void asked(void)
{
	struct pvf_ctl_simple simple;

	begin(4);
	for (uint32_t i = 0; i < queues; i++) {
		CHECK(!pthread_create(&sides[i].writer, NULL, send_writes, &sides[i]));
		CHECK(!pthread_create(&sides[i].reader, NULL, take_writes, &sides[i]));
	}
	for (int round = 0; round < 40; round++) {
		tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), NULL, 0);
		hear(PVF_CTL_DRAINED);
		for (uint32_t i = 0; i < queues; i++) {
			pvf_queue_lock(&worker.queue[i]);
			CHECK_EQ(worker.queue[i].blk.in_flight, 0);
			pvf_queue_unlock(&worker.queue[i]);
		}
		tell(&start, PVF_CTL_START, sizeof(start), NULL, 0);
		hear(PVF_CTL_STARTED);
	}
	for (uint32_t i = 0; i < queues; i++) {
		pthread_join(sides[i].writer, NULL);
		pthread_join(sides[i].reader, NULL);
	}
	detach_and_end();
	CHECK(!memcmp(disk, expected, DISK));
	pvf_worker_end(&worker);
}

static void *send_until_closed(void *arg)
{
	const struct side *s = arg;
	struct nbd_request r = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe32(NBD_CMD_READ),
				.from = htobe64(s->base), .len = htobe32(32768)};

	while (send(s->client, &r, sizeof(r), MSG_NOSIGNAL) > 0)
		;
	return NULL;
}

static void *take_until_closed(void *arg)
{
	const struct side *s = arg;
	char bytes[32768];

	while (recv(s->client, bytes, sizeof(bytes), 0) > 0)
		;
	return NULL;
}

static void start_load(void)
{
	for (uint32_t i = 0; i < queues; i++) {
		CHECK(!pthread_create(&sides[i].writer, NULL, send_until_closed, &sides[i]));
		CHECK(!pthread_create(&sides[i].reader, NULL, take_until_closed, &sides[i]));
	}
}

static void end_load(void)
{
	for (uint32_t i = 0; i < queues; i++) {
		pthread_join(sides[i].writer, NULL);
		pthread_join(sides[i].reader, NULL);
	}
}

/* The sockets of all queues fall with one's, while all are busy. */
static void lost(void)
{
	begin(3);
	hold(2, true);
	start_load();
	CHECK(!shutdown(sides[1].client, SHUT_WR));
	CHECK_EQ(hear(PVF_CTL_TARGET_GONE), 1);
	end_load();
	for (uint32_t i = 0; i < queues; i++)
		close(sides[i].client);
	hold(2, false);
	hear(PVF_CTL_DRAINED);
	new_clients();
	use(send_writes, take_writes);
	detach_and_end();
	pvf_worker_end(&worker);
}

/* One ring is broken while all queues are busy: all are left alone. */
static void broken(void)
{
	struct pvf_ctl_simple simple;
	uint32_t before[MOST];

	begin(3);
	start_load();
	__atomic_store_n(&liars, 2, __ATOMIC_SEQ_CST);
	hold(1, true);
	CHECK_EQ(hear(PVF_CTL_BROKEN), 1);
	for (uint32_t i = 0; i < queues; i++)
		before[i] = __atomic_load_n((uint32_t *)(void *)sides[i].shared, __ATOMIC_SEQ_CST);
	tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), NULL, 0);
	hear(PVF_CTL_ERROR);
	for (uint32_t i = 0; i < queues; i++) {
		uint32_t *published = (uint32_t *)(void *)sides[i].shared;

		CHECK_EQ(__atomic_load_n(published, __ATOMIC_SEQ_CST), before[i]);
		CHECK(!shutdown(sides[i].client, SHUT_RDWR));
	}
	end_load();
	detach_and_end();
	pvf_worker_end(&worker);
}

int main(void)
{
	static const struct test tests[] = {
		{"a worker serves writes and reads of one queue", one},
		{"a worker serves writes and reads of two queues at the same time", two},
		{"a worker serves writes and reads of four queues at the same time", four},
		{"so it does while it looks for responses instead of sleeping", polling},
		{"queues that are busy are quiesced together, as often as asked", asked},
		{"the socket of one queue falls, and with it all, while they are busy", lost},
		{"a rule broken in one ring stops all queues while they are busy", broken},
	};

	return RUN_TESTS(tests);
}
