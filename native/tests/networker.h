/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A world for the whole worker of a network: its threads, the embedded host's netback at its rings, a hub that
 * gives it event channels and pages, TAPs that are sockets, which keep packets apart, and numbered packets that go
 * both ways and are checked where they come out. The supervisor is the main thread.
 */
#ifndef PVF_TEST_NETWORKER_H
#define PVF_TEST_NETWORKER_H

#include <errno.h>
#include <fcntl.h>
#include <sys/un.h>

#include "frames.h"
#include "grants.h"
#include "hub.h"
#include "netback.h"
#include "worker.h"

#define MOST 4u
#define TX_PAGES 288u
#define RX_PAGES 256u
#define POOL_PAGES (TX_PAGES + RX_PAGES)
#define ALL_PAGES (2 + POOL_PAGES)
#define GREF(queue, page) (30u + (queue) * 1000u + (page))
#define ARENA(queue) (3u + (queue))
#define HANDED 800u /* packets each way while workers take over */
#define WINDOW 24u /* packets under way: what every socket has room for */
#define ALL (PVF_NET_SG | PVF_NET_CSUM4 | PVF_NET_CSUM6 | PVF_NET_GSO4 | PVF_NET_GSO6)

struct packet {
	struct virtio_net_hdr vnet;
	uint8_t bytes[65536];
};

struct lane { /* packets one way, from one socket to another */
	int from, to;
	uint32_t count, got; /* atomic */
	uint64_t seed;
	pthread_t sender, receiver;
	struct packet out, in;
};

struct end { /* of an event channel */
	struct pvf_channel *channel;
	int channel_fd, wakeup[2], hub;
};

struct side { /* what is on the other side of one queue */
	struct end event[2];
	int hub_grants, arena_fd;
	unsigned char *arena;
	int guest[2], network[2]; /* the worker's TAP, the backend's; [1]: ours */
	struct lane lane[2];
};

static struct pvf_worker worker;
static struct side sides[MOST];
static struct pvf_nb *nb;
static struct pvf_grant *table;
static int table_fd, track_fd, control, status;
static uint32_t queues, ends, generation, features;
static uint32_t ours; /* queues from the first on whose backend is the test itself */
static struct frame largest; /* of which each packet is the beginning */
static pthread_t worker_thread;

static void *run(void *arg)
{
	status = pvf_worker_run(arg);
	return NULL;
}

/* The hub */

static void make_end(struct end *e, uint32_t port, int *source)
{
	struct pvf_host_packet packet = {PVF_HOST_MAGIC, PVF_HOST_EVENT, port, 0};
	int fds[3], pair[2];

	e->channel_fd = fds[0] = memfd(4096);
	e->channel = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(e->channel != MAP_FAILED);
	pvf_channel_init(e->channel);
	for (int i = 0; i < 2; i++)
		CHECK((fds[1 + i] = e->wakeup[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	send_packet(pair[0], &packet, sizeof(packet), fds, 3);
	e->hub = pair[0];
	*source = pair[1];
}

static void attach(uint32_t i)
{
	static _Alignas(8) unsigned char message[sizeof(struct pvf_ctl_attach) + POOL_PAGES * 4];
	struct pvf_ctl_attach *m = (struct pvf_ctl_attach *)(void *)message;
	struct pvf_host_packet pages = {.magic = PVF_HOST_MAGIC, .kind = PVF_HOST_PAGES};
	struct side *s = &sides[i];
	int sources[3], pair[2];

	make_end(&s->event[0], PORT, &sources[0]);
	s->arena_fd = memfd(ALL_PAGES * 4096);
	s->arena = mmap(NULL, ALL_PAGES * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, s->arena_fd, 0);
	CHECK(s->arena != MAP_FAILED);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	send_packet(pair[0], &pages, sizeof(pages), &s->arena_fd, 1);
	s->hub_grants = pair[0];
	sources[1] = pair[1];
	if (ends > 1)
		make_end(&s->event[1], PORT + 1, &sources[2]);
	for (uint32_t k = 0; k < ALL_PAGES; k++)
		pvf_grant_begin(&table[GREF(i, k)], 0, (uint16_t)ARENA(i), k, k < 2 || k >= 2 + TX_PAGES);
	*m = (struct pvf_ctl_attach){
		.device_class = PVF_CLASS_NET, .port = PORT, .rx_port = ends > 1 ? PORT + 1 : 0,
		.ring_pages = 2, .pool_pages = POOL_PAGES, .pool_offset = 8192, .name = "vif-1",
		.queue = (uint16_t)i, .queues = (uint16_t)queues, .tx_pages = TX_PAGES};
	for (uint32_t k = 0; k < POOL_PAGES; k++)
		m->pool_grefs[k] = GREF(i, 2 + k);
	tell_of(control, m, PVF_CTL_ATTACH, generation, sizeof(message), sources, 1 + ends);
	hear_from(control, PVF_CTL_ATTACHED);
	for (uint32_t k = 0; k < 1 + ends; k++)
		close(sources[k]);
}

static void start_backend(void)
{
	char why[PVF_NB_TEXT] = "";

	CHECK_EQ(pvf_nb_connect(nb, table_fd, track_fd, 0, 7, -1, PVF_NB_SG | PVF_NB_GSO4 | PVF_NB_GSO6,
			     0),
		 0);
	for (uint32_t i = ours; i < queues; i++) {
		struct pvf_nb_channel its[2];

		for (uint32_t k = 0; k < ends; k++) {
			struct end *e = &sides[i].event[k];

			its[k] = (struct pvf_nb_channel){e->channel_fd, e->wakeup[1], e->wakeup[0], 1};
		}
		CHECK_EQ(pvf_nb_arena(nb, (uint16_t)ARENA(i), sides[i].arena_fd), 0);
		CHECK_EQ(pvf_nb_queue(nb, GREF(i, 0), GREF(i, 1), its, ends, sides[i].network[0], why), 0);
	}
	CHECK_EQ(pvf_nb_start(nb), 0);
}

static void connect_all(void)
{
	struct pvf_ctl_start_net m = {.features = features, .stall_seconds = 5};
	int fds[MOST];

	generation++;
	for (uint32_t i = 0; i < queues; i++)
		attach(i);
	start_backend();
	for (uint32_t i = 0; i < queues; i++)
		fds[i] = sides[i].guest[0];
	tell_of(control, &m, PVF_CTL_START_NET, generation, sizeof(m), fds, queues);
	hear_from(control, PVF_CTL_STARTED);
}

static void let_go(struct end *e)
{
	char byte;

	CHECK_EQ(recv(e->hub, &byte, 1, MSG_DONTWAIT), 0); /* the worker has closed it */
	munmap(e->channel, 4096);
	int fds[] = {e->channel_fd, e->wakeup[0], e->wakeup[1], e->hub};

	for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		close(fds[i]);
}

static void disconnect_all(void)
{
	struct pvf_ctl_detach detach = {0};

	pvf_nb_disconnect(nb);
	tell_of(control, &detach, PVF_CTL_DETACH, generation, sizeof(detach), NULL, 0);
	hear_from(control, PVF_CTL_DETACHED);
	for (uint32_t i = 0; i < queues; i++) {
		struct side *s = &sides[i];

		for (uint32_t k = 0; k < ends; k++)
			let_go(&s->event[k]);
		for (uint32_t k = 0; k < ALL_PAGES; k++)
			CHECK_EQ(pvf_grant_maps(&table[GREF(i, k)]), 0);
		munmap(s->arena, ALL_PAGES * 4096);
		close(s->arena_fd);
		close(s->hub_grants);
	}
}

static void make_taps(void)
{
	int bytes = 8 << 20;

	for (uint32_t i = 0; i < queues; i++) {
		int *pairs[] = {sides[i].guest, sides[i].network};

		for (int k = 0; k < 2; k++) {
			CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pairs[k]));
			CHECK(!fcntl(pairs[k][0], F_SETFL, O_NONBLOCK));
			for (int end = 0; end < 2; end++)
				setsockopt(pairs[k][end], SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
		}
	}
}

static void *new_table(size_t bytes, int *fd)
{
	*fd = memfd(bytes);
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void begin(uint32_t n, uint32_t ports, uint32_t what)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
	socklen_t length = sizeof(name);
	const char *why;

	largest = tcp(4, 0, 60010);
	queues = n;
	ends = ports;
	features = what;
	generation = 0;
	status = -1;
	table = new_table(PVF_GRANTS * sizeof(*table), &table_fd);
	munmap(new_table(PVF_GRANTS * 4, &track_fd), PVF_GRANTS * 4);
	make_taps();
	CHECK((nb = pvf_nb_new()));
	CHECK(!bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t)) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&name, &length));
	CHECK(!pvf_worker_init(&worker, listener, "vif-1", n, &why) && !pvf_worker_net(&worker, &why));
	CHECK(!pvf_worker_start(&worker, &why));
	CHECK(!pthread_create(&worker_thread, NULL, run, &worker));
	control = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	CHECK(!connect(control, (struct sockaddr *)&name, length));
	connect_all();
}

static void end(struct pvf_worker *last)
{
	struct pvf_ctl_simple simple;

	disconnect_all();
	tell_of(control, &simple, PVF_CTL_EXIT, generation, sizeof(simple), NULL, 0);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	for (uint32_t i = 0; i < queues; i++)
		for (int k = 0; k < 2; k++) {
			close(sides[i].guest[k]);
			if (k)
				close(sides[i].network[k]);
		}
	pvf_nb_free(nb);
	close(control);
	close(worker.listen_fd);
	pvf_worker_end(last);
	munmap(table, PVF_GRANTS * sizeof(*table));
	close(table_fd);
	close(track_fd);
	for (uint32_t i = 0; i < queues; i++)
		close(sides[i].network[0]);
}

/* Packets */

static void draw_packet(struct packet *p, uint32_t *size, uint64_t *seed, uint32_t number)
{
	struct virtio_net_hdr *v = &p->vnet;
	uint32_t payload = below(seed, 4) ? 4 + below(seed, 1400) : 4 + below(seed, 60000);
	const struct frame *f = &largest;

	*v = (struct virtio_net_hdr){0};
	*size = f->l4 + 20 + payload;
	memcpy(p->bytes, f->bytes, *size);
	put16(p->bytes + f->l3 + 2, *size - f->l3);
	memcpy(p->bytes + f->l4 + 20, &number, 4);
	if (payload > 1400) {
		v->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		v->csum_start = (uint16_t)f->l4;
		v->csum_offset = 16;
		v->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
		v->gso_size = 1400;
		v->hdr_len = (uint16_t)(f->l4 + 20);
	}
}

static void *send_lane(void *arg)
{
	struct lane *l = arg;
	uint64_t seed = l->seed;

	for (uint32_t i = 0, size; i < l->count; i++) {
		while (i - __atomic_load_n(&l->got, __ATOMIC_ACQUIRE) >= WINDOW)
			usleep(100);
		draw_packet(&l->out, &size, &seed, i);
		CHECK_EQ(write(l->from, &l->out, sizeof(l->out.vnet) + size), sizeof(l->out.vnet) + size);
	}
	return NULL;
}

static void *receive_lane(void *arg)
{
	static _Thread_local struct packet want;
	struct lane *l = arg;
	uint64_t seed = l->seed;

	for (uint32_t i = 0, size; i < l->count; i++) {
		struct pollfd p = {.fd = l->to, .events = POLLIN};

		draw_packet(&want, &size, &seed, i);
		CHECK_EQ(poll(&p, 1, PATIENCE), 1);
		CHECK_EQ(read(l->to, &l->in, sizeof(l->in)), sizeof(l->in.vnet) + size);
		CHECK_EQ(l->in.vnet.gso_type, want.vnet.gso_type);
		CHECK_EQ(l->in.vnet.gso_size, want.vnet.gso_size);
		/* All but the sum of the pseudo-header, which is whoever's. */
		CHECK(!memcmp(l->in.bytes, want.bytes, 50));
		CHECK(!memcmp(l->in.bytes + 52, want.bytes + 52, size - 52));
		__atomic_store_n(&l->got, i + 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void start_traffic(uint32_t count)
{
	for (uint32_t i = ours; i < queues; i++)
		for (int way = 0; way < 2; way++) {
			struct side *s = &sides[i];
			struct lane *l = &s->lane[way];

			l->from = way ? s->network[1] : s->guest[1];
			l->to = way ? s->guest[1] : s->network[1];
			l->count = count;
			l->got = 0;
			l->seed = 1 + i * 2 + (uint64_t)way;
			CHECK(!pthread_create(&l->sender, NULL, send_lane, l));
			CHECK(!pthread_create(&l->receiver, NULL, receive_lane, l));
		}
}

static void end_traffic(void)
{
	for (uint32_t i = ours; i < queues; i++)
		for (int way = 0; way < 2; way++) {
			pthread_join(sides[i].lane[way].sender, NULL);
			pthread_join(sides[i].lane[way].receiver, NULL);
		}
}

static struct pvf_net_stats shown(struct pvf_worker *w, uint32_t queue)
{
	struct pvf_net_stats s;

	pvf_queue_lock(&w->queue[queue]); /* nobody writes them now */
	memcpy(&s, pvf_stats_page(&w->stats, queue), sizeof(s));
	pvf_queue_unlock(&w->queue[queue]);
	return s;
}

#endif
