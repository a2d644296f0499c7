/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker of a network with its threads, the embedded host's netback at its rings, programs and a network
 * at both TAPs, the supervisor in the main thread. The TAPs are sockets that keep packets apart.
 */
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

static struct pvf_worker worker, next;
static struct side sides[MOST];
static struct pvf_nb *nb;
static struct pvf_grant *table;
static int table_fd, track_fd, control, status;
static uint32_t queues, ends, generation, features;
static struct frame largest; /* of which each packet is the beginning */
static pthread_t worker_thread, next_thread;

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
	for (uint32_t i = 0; i < queues; i++) {
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
	for (uint32_t i = 0; i < queues; i++)
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
	for (uint32_t i = 0; i < queues; i++)
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

/* Tests */

static void both_ways(uint32_t n, uint32_t ports)
{
	struct pvf_ctl_simple simple;

	begin(n, ports, ALL);
	start_traffic(600);
	end_traffic();
	tell_of(control, &simple, PVF_CTL_QUIESCE, generation, sizeof(simple), NULL, 0);
	hear_from(control, PVF_CTL_DRAINED);
	for (uint32_t i = 0; i < n; i++) {
		struct pvf_net_stats s = shown(&worker, i);

		CHECK_EQ(s.tx.packets, 600);
		CHECK_EQ(s.rx.packets, 600);
		CHECK(s.tx.large > 50 && s.rx.large > 50 && s.tx.gso > 50);
		for (uint32_t k = 0; k < PVF_DROPS; k++)
			CHECK_EQ(s.tx.dropped[k] + s.rx.dropped[k], 0);
	}
	end(&worker);
}

static void one_queue(void)
{
	both_ways(1, 1);
}

static void four_queues(void)
{
	both_ways(4, 1);
}

static void two_ports(void)
{
	both_ways(1, 2);
	both_ways(3, 2);
}

static void asked(void)
{
	struct pvf_ctl_simple simple;
	struct pvf_ctl_start_net m = {.features = ALL, .stall_seconds = 5};

	begin(2, 2, ALL);
	start_traffic(600);
	for (int round = 0; round < 40; round++) {
		tell_of(control, &simple, PVF_CTL_QUIESCE, generation, sizeof(simple), NULL, 0);
		hear_from(control, PVF_CTL_DRAINED);
		tell_of(control, &m, PVF_CTL_START_NET, generation, sizeof(m), NULL, 0);
		hear_from(control, PVF_CTL_STARTED);
	}
	end_traffic();
	end(&worker);
}

/* Another worker takes over; returns it. `from`: the one that serves. */
static void move(struct pvf_worker *from, struct pvf_worker *to, pthread_t *thread)
{
	int pair[2], peers[2], image = memfd(PVF_HAND_OVER_BYTES);
	struct pvf_ctl_simple m;
	const char *why;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, peers));
	CHECK(!pvf_worker_init(to, -1, "vif-1", MOST, &why) && !pvf_worker_net(to, &why));
	CHECK(!pvf_worker_start(to, &why));
	pvf_worker_connect(to, pair[1]);
	CHECK(!pthread_create(thread, NULL, run, to));
	tell_of(pair[0], &m, PVF_CTL_TAKE_OVER, 0, sizeof(m), (int[2]){peers[0], image}, 2);
	tell_of(control, &m, PVF_CTL_HAND_OVER, generation, sizeof(m), (int[2]){peers[1], image}, 2);
	hear_from(control, PVF_CTL_HANDED_OVER);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	status = -1;
	close(control);
	control = pair[0];
	hear_from(control, PVF_CTL_TAKEN_OVER);
	worker_thread = *thread;
	if (from != &worker)
		pvf_worker_end(from);
	close(peers[0]);
	close(peers[1]);
	close(image);
}

/* One of our own hosts: a join, as a kernel sends it. */
static void report_group(uint32_t queue, uint8_t type, uint8_t last)
{
	struct frame f = ip(4, 0, 2, 8);
	struct packet p = {0};

	f.bytes[0] = 1;
	f.bytes[f.l4] = type;
	memcpy(f.bytes + f.l4 + 4, (const uint8_t[]){239, 1, 1, last}, 4);
	memcpy(p.bytes, f.bytes, f.size);
	CHECK_EQ(write(sides[queue].guest[1], &p, sizeof(p.vnet) + f.size), sizeof(p.vnet) + f.size);
	CHECK(read(sides[queue].network[1], &p, sizeof(p)) > 0); /* it goes out as well */
}

static void until_backend_has(uint64_t added, uint64_t deleted)
{
	struct pvf_nb_stats s;

	for (int i = 0; i < PATIENCE; i++) {
		pvf_nb_get_stats(nb, &s);
		if (s.multicast_added == added && s.multicast_deleted == deleted)
			return;
		usleep(1000);
	}
	CHECK_EQ(s.multicast_added, added);
	CHECK_EQ(s.multicast_deleted, deleted);
}

static void handed_over(uint32_t n, uint32_t ports)
{
	static struct pvf_worker third;
	pthread_t thread;

	begin(n, ports, ALL | PVF_NET_MULTICAST);
	report_group(0, 0x16, 9);
	until_backend_has(3, 0);
	start_traffic(HANDED);
	move(&worker, &next, &next_thread);
	move(&next, &third, &thread);
	end_traffic();
	uint64_t sent = 0;

	for (uint32_t i = 0; i < n; i++) {
		struct pvf_net_stats s = shown(&third, i);

		sent += s.tx.packets;
		CHECK_EQ(s.rx.packets, HANDED);
		CHECK(s.events && s.notifies);
	}
	CHECK_EQ(sent, HANDED * n + 1);
	until_backend_has(3, 0); /* nothing is told twice */
	report_group(0, 0x17, 9);
	until_backend_has(3, 1);
	struct pvf_worker *first = &worker;

	end(&third);
	pvf_worker_end(first);
}

static void one_moves(void)
{
	handed_over(1, 1);
}

static void two_move(void)
{
	handed_over(2, 2);
}

static void refused(void)
{
	int pair[2], peers[2], image = memfd(PVF_HAND_OVER_BYTES);
	struct pvf_ctl_simple m;
	const char *why;

	begin(1, 1, ALL);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, peers));
	CHECK(!pvf_worker_init(&next, -1, "vif-1", 1, &why)); /* a disk's */
	CHECK(!pvf_worker_start(&next, &why));
	pvf_worker_connect(&next, pair[1]);
	CHECK(!pthread_create(&next_thread, NULL, run, &next));
	start_traffic(500);
	tell_of(pair[0], &m, PVF_CTL_TAKE_OVER, 0, sizeof(m), (int[2]){peers[0], image}, 2);
	tell_of(control, &m, PVF_CTL_HAND_OVER, generation, sizeof(m), (int[2]){peers[1], image}, 2);
	hear_from(control, PVF_CTL_ERROR);
	hear_from(pair[0], PVF_CTL_ERROR);
	end_traffic(); /* by the one that served */
	tell_of(pair[0], &m, PVF_CTL_EXIT, 0, sizeof(m), NULL, 0);
	pthread_join(next_thread, NULL);
	pvf_worker_end(&next);
	close(pair[0]);
	close(peers[0]);
	close(peers[1]);
	close(image);
	end(&worker);
}

static void groups(void)
{
	begin(2, 1, ALL | PVF_NET_MULTICAST);
	until_backend_has(2, 0); /* all systems */
	report_group(1, 0x16, 1); /* seen by another queue than the one that tells */
	until_backend_has(3, 0);
	report_group(0, 0x16, 2);
	until_backend_has(4, 0);
	report_group(0, 0x17, 1);
	until_backend_has(4, 1);
	disconnect_all();
	make_taps(); /* the worker has closed its ends, and what was under way is lost */
	connect_all();
	until_backend_has(4 + 3, 1); /* all that is joined, again */
	CHECK_EQ(shown(&worker, 0).groups, 3);
	end(&worker);
}

/* An event is lost, and nothing is sent that would bring another. */
static void lost_event(uint32_t ports)
{
	const struct pvf_nb_rule silent = {.kind = PVF_NB_SILENT, .count = 1};
	static struct packet p;
	uint32_t size;
	uint64_t seed = 7;

	begin(1, ports, ALL);
	CHECK_EQ(pvf_nb_set_rules(nb, &silent, 1), 0);
	draw_packet(&p, &size, &seed, 0);
	CHECK_EQ(write(sides[0].network[1], &p, sizeof(p.vnet) + size), sizeof(p.vnet) + size);
	struct pollfd polled = {.fd = sides[0].guest[1], .events = POLLIN};

	CHECK_EQ(poll(&polled, 1, PATIENCE), 1);
	CHECK_EQ(read(sides[0].guest[1], &p, sizeof(p)), sizeof(p.vnet) + size);
	end(&worker);
}

static void lost_events(void)
{
	lost_event(1);
	lost_event(2);
}

static void broken(void)
{
	const struct pvf_nb_rule lie = {.kind = PVF_NB_TX_ID, .value = 77, .skip = 3};
	struct packet p = {0};
	struct frame f = udp(4, 0, 100);

	begin(2, 2, ALL);
	CHECK_EQ(pvf_nb_set_rules(nb, &lie, 1), 0);
	memcpy(p.bytes, f.bytes, f.size);
	for (int i = 0; i < 8; i++)
		CHECK(write(sides[1].guest[1], &p, sizeof(p.vnet) + f.size) > 0);
	CHECK_EQ(hear_from(control, PVF_CTL_BROKEN), 1);
	CHECK_EQ(worker.fault.rule, 5);
	end(&worker);
}

static void traced(void)
{
	struct pvf_ctl_simple m;
	int fd = memfd(2 * sizeof(struct pvf_trace));
	struct pvf_trace *trace = mmap(NULL, 2 * sizeof(*trace), PROT_READ, MAP_SHARED, fd, 0);

	CHECK(trace != MAP_FAILED);
	begin(2, 1, ALL);
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), &control, 1); /* no memfd */
	hear_from(control, PVF_CTL_ERROR);
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), &fd, 1);
	hear_from(control, PVF_CTL_TRACING);
	start_traffic(300);
	end_traffic();
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), NULL, 0);
	hear_from(control, PVF_CTL_TRACING);
	for (uint32_t i = 0; i < 2; i++) {
		uint32_t ways[2] = {0};

		CHECK_EQ(trace[i].magic, PVF_TRACE_MAGIC);
		CHECK_EQ(trace[i].queue, i);
		CHECK_EQ(__atomic_load_n(&trace[i].written, __ATOMIC_ACQUIRE), 600);
		for (uint32_t k = 0; k < 600; k++) {
			CHECK_EQ(trace[i].packet[k].dropped, PVF_DROPS);
			ways[trace[i].packet[k].way]++;
		}
		CHECK_EQ(ways[0], 300);
		CHECK_EQ(ways[1], 300);
	}
	start_traffic(50);
	end_traffic();
	CHECK_EQ(trace->written, 600); /* not any more */
	end(&worker);
	munmap(trace, 2 * sizeof(*trace));
	close(fd);
}

int main(void)
{
	static const struct test tests[] = {
		{"packets go both ways through one queue", one_queue},
		{"packets go both ways through four queues", four_queues},
		{"so they do with an event channel for each ring", two_ports},
		{"queues that are busy are quiesced and go on, and nothing is lost", asked},
		{"another worker takes over while packets are under way, and nothing is lost", one_moves},
		{"so does one of several queues with two ports each", two_move},
		{"a disk's worker takes over no network, which goes on", refused},
		{"joins are told to the backend whoever sees them, and again to the next", groups},
		{"rule 24: a received packet whose event was lost is found", lost_events},
		{"a rule broken in one queue stops both", broken},
		{"packets are traced as long as somebody wants it", traced},
	};

	return RUN_TESTS(tests);
}
