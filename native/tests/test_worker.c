/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker with its threads, a backend for each queue and its clients in others, the
 * supervisor in the main one: what the thread sanitizer needs in order to see all ends meet.
 */
#include <errno.h>
#include <sys/un.h>

#include <linux/nbd.h>

#include "hub.h"
#include "worker.h"

#define PART (1u << 20) /* of the disk: each queue has one */
#define MOST 4u
#define DISK (MOST * PART)
#define POOL 48u

/* What is on the other side of one queue. */
struct side {
	struct connection link;
	int client;
	uint64_t base; /* of its part of the disk */
	pthread_t writer, reader;
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
	struct connection *c = &s->link;
	struct pollfd polled[2] = {{.fd = c->wakeup[1], .events = POLLIN}, {.fd = c->hub_event}};
	uint64_t seed = 11;

	for (;;) {
		bool event = false;

		CHECK(poll(polled, 2, -1) > 0);
		if (pvf_channel_take(c->channel, 1, c->wakeup[1])) {
			if (__atomic_load_n(&liars, __ATOMIC_SEQ_CST) >> (s - sides) & 1) {
				__atomic_store_n(&c->backend.ring.sring->rsp_prod, 1u << 30,
						 __ATOMIC_SEQ_CST);
				CHECK_EQ(pvf_channel_notify(c->channel, 1, c->wakeup[0]), 0);
			}
			backend_take(&c->backend);
			while (c->backend.held &&
			       !(__atomic_load_n(&held, __ATOMIC_SEQ_CST) >> (s - sides) & 1))
				event |= backend_answer(&c->backend, below(&seed, c->backend.held),
							BLKIF_RSP_OKAY);
			if (event)
				CHECK_EQ(pvf_channel_notify(c->channel, 1, c->wakeup[0]), 0);
			CHECK_EQ(pvf_channel_unmask(c->channel, 1, c->wakeup[1]), 0);
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
	CHECK_EQ(pvf_channel_notify(sides[queue].link.channel, 0, sides[queue].link.wakeup[1]), 0);
}

static void tell(void *message, uint16_t type, size_t size, const int *fds, size_t n)
{
	tell_of(control, message, type, 1, size, fds, n);
}

/* Waits for a message of this type; returns the queue that it names, if it names one. */
static uint32_t hear(uint16_t type)
{
	return hear_from(control, type);
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
	struct side *s = &sides[i];

	s->base = (uint64_t)i * PART;
	attach_queue(&s->link, control, 1, i, queues, POOL, disk, DISK, run_backend, s);
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

	tell(&detach, PVF_CTL_DETACH, sizeof(detach), NULL, 0);
	hear(PVF_CTL_DETACHED);
	tell(&simple, PVF_CTL_EXIT, sizeof(simple), NULL, 0);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	for (uint32_t i = 0; i < queues; i++) {
		let_go_of(&sides[i].link);
		close(sides[i].client);
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
		before[i] = __atomic_load_n((uint32_t *)(void *)sides[i].link.shared, __ATOMIC_SEQ_CST);
	tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), NULL, 0);
	hear(PVF_CTL_ERROR);
	for (uint32_t i = 0; i < queues; i++) {
		uint32_t *published = (uint32_t *)(void *)sides[i].link.shared;

		CHECK_EQ(__atomic_load_n(published, __ATOMIC_SEQ_CST), before[i]);
		CHECK(!shutdown(sides[i].client, SHUT_RDWR));
	}
	end_load();
	detach_and_end();
	pvf_worker_end(&worker);
}

/* Another worker, with threads of its own, takes over while all queues are busy. */
static struct pvf_worker next;
static pthread_t next_thread;

static void *run_next(void *arg)
{
	(void)arg;
	status = pvf_worker_run(&next);
	return NULL;
}

static void tell_at(int sock, uint16_t type, uint32_t generation, const int *fds)
{
	struct pvf_ctl_simple m = {
		{PVF_CTL_MAGIC, PVF_CTL_VERSION, type, generation, sizeof(m)}};

	send_packet(sock, &m, sizeof(m), fds, 2);
}

static void handed_over(void)
{
	int pair[2], peers[2], table = memfd(PVF_HAND_OVER_BYTES);
	const char *why;

	begin(3);
	for (uint32_t i = 0; i < queues; i++) {
		CHECK(!pthread_create(&sides[i].writer, NULL, send_writes, &sides[i]));
		CHECK(!pthread_create(&sides[i].reader, NULL, take_writes, &sides[i]));
	}
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, peers));
	CHECK(!pvf_worker_init(&next, -1, "vbd-1", MOST, &why));
	CHECK(!pvf_worker_start(&next, &why));
	pvf_worker_connect(&next, pair[1]);
	CHECK(!pthread_create(&next_thread, NULL, run_next, NULL));
	tell_at(pair[0], PVF_CTL_TAKE_OVER, 0, (int[2]){peers[0], table});
	tell_at(control, PVF_CTL_HAND_OVER, 1, (int[2]){peers[1], table});
	hear(PVF_CTL_HANDED_OVER);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	close(control);
	control = pair[0];
	hear(PVF_CTL_TAKEN_OVER);
	worker_thread = next_thread;
	for (uint32_t i = 0; i < queues; i++) {
		pvf_queue_lock(&next.queue[i]);
		CHECK(next.queue[i].target.several); /* the replay fence is theirs too */
		pvf_queue_unlock(&next.queue[i]);
	}
	for (uint32_t i = 0; i < queues; i++) {
		pthread_join(sides[i].writer, NULL);
		pthread_join(sides[i].reader, NULL);
	}
	use(send_reads, take_reads);
	detach_and_end();
	CHECK(!memcmp(disk, expected, queues * PART));
	pvf_worker_end(&worker);
	pvf_worker_end(&next);
	close(peers[0]);
	close(peers[1]);
	close(table);
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
		{"another worker takes over from one whose queues are all busy", handed_over},
	};

	return RUN_TESTS(tests);
}
