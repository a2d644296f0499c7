/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The frontend's queue and the embedded host's netback, over memory that both map and event channels. The
 * TAPs are sockets that keep packets apart.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "check.h"
#include "frames.h"
#include "grants.h"
#include "net.h"
#include "netback.h"

#define PAGES 300u
#define GREF(page) (40u + 3u * (page)) /* of an arena's page */
#define TX_RING 0u
#define RX_RING 1u
#define TX_POOL 2u
#define RX_POOL (TX_POOL + PAGES)
#define ALL_PAGES (RX_POOL + PAGES)
#define ARENA 3
#define DEADLINE 60000 /* ms */
#define ALL (PVF_NET_SG | PVF_NET_CSUM4 | PVF_NET_CSUM6 | PVF_NET_GSO4 | PVF_NET_GSO6)

struct packet {
	struct virtio_net_hdr vnet;
	uint8_t bytes[65536];
};

static struct pvf_nb *nb;
static struct pvf_grant *table;
static unsigned char *arena;
static struct pvf_channel *channel;
static int channel_fd, ends[2], table_fd, track_fd, arena_fd;
static int tap[2]; /* the backend's; the other end is the network */
static struct pvf_net_tx tx;
static struct pvf_net_rx rx;
static struct packet in, out;

static void *shared_memory(size_t bytes, int *fd)
{
	*fd = memfd_create("test", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	CHECK(*fd >= 0 && !ftruncate(*fd, (off_t)bytes) && !fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK));
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void notify(void)
{
	pvf_channel_notify(channel, 0, ends[1]);
}

static void push(void)
{
	bool tell = pvf_ring_push(&tx.ring);

	if (pvf_ring_push(&rx.ring) || tell)
		notify();
}

static void begin(void)
{
	uint32_t grefs[2][PAGES], bytes = 4 << 20;
	char why[PVF_NB_TEXT] = "";

	table = shared_memory(PVF_GRANTS * sizeof(*table), &table_fd);
	shared_memory(PVF_GRANTS * sizeof(uint32_t), &track_fd);
	arena = shared_memory(ALL_PAGES * 4096, &arena_fd);
	for (uint32_t i = 0; i < ALL_PAGES; i++)
		pvf_grant_begin(&table[GREF(i)], 0, ARENA, i, i < TX_POOL || i >= RX_POOL);
	for (uint32_t i = 0; i < PAGES; i++) {
		grefs[0][i] = GREF(TX_POOL + i);
		grefs[1][i] = GREF(RX_POOL + i);
	}
	channel = shared_memory(4096, &channel_fd);
	pvf_channel_init(channel);
	for (int i = 0; i < 2; i++)
		CHECK((ends[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, tap));
	for (int i = 0; i < 2; i++)
		setsockopt(tap[i], SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
	pvf_net_tx_init(&tx, arena + TX_RING * 4096, arena + TX_POOL * 4096, PAGES, grefs[0], false, ALL);
	pvf_net_rx_init(&rx, arena + RX_RING * 4096, arena + RX_POOL * 4096, PAGES, grefs[1]);
	pvf_net_rx_fill(&rx);
	push();
	CHECK((nb = pvf_nb_new()));
	CHECK_EQ(pvf_nb_connect(nb, table_fd, track_fd, 0, 7, -1, PVF_NB_SG | PVF_NB_GSO4 | PVF_NB_GSO6,
			     0),
		 0);
	CHECK_EQ(pvf_nb_arena(nb, ARENA, arena_fd), 0);
	struct pvf_nb_channel its = {channel_fd, ends[1], ends[0], 1};

	CHECK_EQ(pvf_nb_queue(nb, GREF(TX_RING), GREF(RX_RING), &its, 1, tap[0], why), 0);
	CHECK_EQ(pvf_nb_start(nb), 0);
}

static void end(void)
{
	pvf_nb_free(nb);
	for (uint32_t i = 0; i < ALL_PAGES; i++)
		CHECK_EQ(pvf_grant_maps(&table[GREF(i)]), 0);
	munmap(table, PVF_GRANTS * sizeof(*table));
	munmap(arena, ALL_PAGES * 4096);
	munmap(channel, 4096);
	int fds[] = {table_fd, track_fd, arena_fd, channel_fd, ends[0], ends[1], tap[0], tap[1]};

	for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		close(fds[i]);
}

static void take_answers(void)
{
	pvf_net_tx_drain(&tx, pvf_ring_poll(&tx.ring, &tx.fault));
	CHECK(!tx.fault.rule);
}

static void wait_readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	CHECK_EQ(poll(&p, 1, DEADLINE), 1);
}

/* A frame from the frontend's program to the network. */
static void send_frame(const struct frame *f, const struct virtio_net_hdr *v)
{
	struct iovec iov[1 + PVF_NET_PAGES];
	uint32_t at = 0;
	int n;

	while (!(n = pvf_net_tx_begin(&tx, iov))) {
		if (!pvf_ring_ask(&tx.ring, pvf_net_tx_patience(&tx), &tx.fault)) {
			wait_readable(ends[0]);
			pvf_channel_take(channel, 0, ends[0]);
			pvf_channel_unmask(channel, 0, ends[0]);
		}
		take_answers();
	}
	memcpy(iov[0].iov_base, v, sizeof(*v));
	for (int i = 1; i < n && at < f->size; i++) {
		uint32_t bytes = pvf_min32(f->size - at, 4096);

		memcpy(iov[i].iov_base, f->bytes + at, bytes);
		at += bytes;
	}
	CHECK(pvf_net_tx_end(&tx, (ssize_t)(sizeof(*v) + f->size)));
	push();
}

static uint32_t network_gets(void)
{
	wait_readable(tap[1]);
	ssize_t n = read(tap[1], &in, sizeof(in));

	CHECK(n > (ssize_t)sizeof(in.vnet));
	return (uint32_t)((size_t)n - sizeof(in.vnet));
}

static void network_sends(const struct frame *f, const struct virtio_net_hdr *v)
{
	out.vnet = *v;
	memcpy(out.bytes, f->bytes, f->size);
	CHECK_EQ(write(tap[1], &out, sizeof(*v) + f->size), sizeof(*v) + f->size);
}

/* The next packet for the frontend's program, gathered in `in`. */
static uint32_t receive(void)
{
	static struct pvf_net_packet p;
	uint32_t count, at = 0;

	for (;;) {
		count = pvf_ring_final_check(&rx.ring, &rx.fault);
		CHECK(!rx.fault.rule);
		if (count)
			break;
		wait_readable(ends[0]);
		pvf_channel_take(channel, 0, ends[0]);
		pvf_channel_unmask(channel, 0, ends[0]);
	}
	CHECK(pvf_net_rx_next(&rx, &count, &p));
	in.vnet = p.vnet;
	for (uint32_t i = 1; i < p.iovs; i++) {
		memcpy(in.bytes + at, p.iov[i].iov_base, p.iov[i].iov_len);
		at += (uint32_t)p.iov[i].iov_len;
	}
	CHECK_EQ(at, p.total);
	pvf_net_rx_done(&rx, &p, false);
	pvf_net_rx_fill(&rx);
	push();
	return at;
}

static void draw_frame(struct frame *f, struct virtio_net_hdr *v, uint64_t *seed)
{
	int family = below(seed, 2) ? 4 : 6;
	bool is_tcp = below(seed, 2);
	uint32_t payload = below(seed, 3) ? below(seed, 1400) : below(seed, 65535 - 100);

	*v = (struct virtio_net_hdr){0};
	if (!below(seed, 4)) { /* something else */
		*f = ip(family, 0, 47, payload);
		return;
	}
	*f = is_tcp ? tcp(family, 0, payload) : udp(family, 0, payload);
	if (!is_tcp && payload > 1472 && family == 4 && below(seed, 2))
		return;
	v->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	v->csum_start = (uint16_t)f->l4;
	v->csum_offset = is_tcp ? 16 : 6;
	/* The sum of the pseudo-header, as a kernel leaves it. */
	struct pvf_packet what;

	pvf_packet_parse(&what, f->bytes, pvf_min32(f->size, PVF_PACKET_HEAD), f->size);
	uint16_t sum = pvf_packet_pseudo(&what, f->bytes);

	memcpy(f->bytes + f->l4 + v->csum_offset, &sum, 2);
	if (is_tcp && payload > 1400) {
		v->gso_type = family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
		v->gso_size = 1400;
		v->hdr_len = (uint16_t)(f->l4 + 20);
	}
}

static void same(const struct frame *f, const struct virtio_net_hdr *v, uint32_t size)
{
	CHECK_EQ(size, f->size);
	CHECK_EQ(in.vnet.flags, v->flags);
	CHECK_EQ(in.vnet.gso_type, v->gso_type);
	CHECK_EQ(in.vnet.gso_size, v->gso_size);
	CHECK_EQ(in.vnet.csum_start, v->csum_start);
	CHECK_EQ(in.vnet.csum_offset, v->csum_offset);
	CHECK_EQ(in.vnet.hdr_len, v->hdr_len);
	CHECK(!memcmp(in.bytes, f->bytes, f->size));
}

static void both_ways(void)
{
	static struct frame f;
	struct virtio_net_hdr v;
	struct pvf_nb_stats s;
	uint64_t seed = 23;

	begin();
	for (uint32_t round = 0; round < 3000; round++) {
		draw_frame(&f, &v, &seed);
		if (round & 1) {
			send_frame(&f, &v);
			same(&f, &v, network_gets());
		} else {
			network_sends(&f, &v);
			same(&f, &v, receive());
		}
	}
	/* A packet is counted after it was passed on. */
	for (uint32_t ms = 0; ms < DEADLINE; ms++) {
		pvf_nb_get_stats(nb, &s);
		if (s.tx_packets == 1500 && s.rx_packets == 1500)
			break;
		usleep(1000);
	}
	CHECK_EQ(s.tx_packets, 1500);
	CHECK_EQ(s.rx_packets, 1500);
	CHECK_EQ(s.tx_rejected + s.rx_dropped + s.map_errors + s.fatal + s.tap_errors, 0);
	CHECK(s.tx_gso > 50 && s.rx_gso > 50);
	end();
}

static void in_bursts(void)
{
	static struct frame f;
	uint64_t seed = 29;

	begin();
	for (uint32_t burst = 0; burst < 40; burst++) {
		uint32_t n = 1 + below(&seed, 60);

		for (uint32_t i = 0; i < n; i++) {
			f = ip(4, 0, 47, 26 + burst * 60 + i);
			send_frame(&f, &(struct virtio_net_hdr){0});
		}
		for (uint32_t i = 0; i < n; i++)
			CHECK_EQ(network_gets(), 60 + burst * 60 + i);
		for (uint32_t i = 0; i < n; i++) {
			f = ip(4, 0, 47, 26 + burst * 60 + i);
			network_sends(&f, &(struct virtio_net_hdr){0});
		}
		for (uint32_t i = 0; i < n; i++)
			CHECK_EQ(receive(), 60 + burst * 60 + i);
	}
	end();
}

static void multicast(void)
{
	struct pvf_nb_stats s = {0};
	struct frame f = udp(4, 0, 10);

	begin();
	CHECK(pvf_net_tx_multicast(&tx, (const uint8_t[6]){1, 0, 0x5e, 1, 2, 3}, true));
	CHECK(pvf_net_tx_multicast(&tx, (const uint8_t[6]){1, 0, 0x5e, 1, 2, 3}, false));
	send_frame(&f, &(struct virtio_net_hdr){0});
	network_gets();
	pvf_nb_get_stats(nb, &s);
	CHECK_EQ(s.multicast_added, 1);
	CHECK_EQ(s.multicast_deleted, 1);
	CHECK_EQ(s.fatal, 0);
	end();
}

/* Packets that pass, or do not, one behind the other: what comes next shows what did not. */
static void to_group(uint8_t last)
{
	struct frame f = udp(4, 0, 10);

	memcpy(f.bytes, (const uint8_t[6]){1, 0, 0x5e, 1, 2, last}, 6);
	network_sends(&f, &(struct virtio_net_hdr){0});
}

static void filtered(void)
{
	static const uint8_t group[6] = {1, 0, 0x5e, 1, 2, 3};
	struct pvf_nb_stats s = {0};
	struct frame f = udp(4, 0, 10);

	begin();
	to_group(9);
	receive();
	CHECK_EQ(in.bytes[5], 9); /* nobody has asked for less */
	pvf_nb_set_filter(nb, true);
	CHECK(pvf_net_tx_multicast(&tx, group, true));
	send_frame(&f, &(struct virtio_net_hdr){0});
	network_gets();
	to_group(9);
	to_group(3);
	receive();
	CHECK_EQ(in.bytes[5], 3);
	to_group(9);
	memset(f.bytes, 0xff, 6);
	network_sends(&f, &(struct virtio_net_hdr){0});
	receive();
	CHECK_EQ(in.bytes[5], 0xff); /* broadcasts always pass */
	CHECK(pvf_net_tx_multicast(&tx, group, false));
	send_frame(&f, &(struct virtio_net_hdr){0});
	network_gets();
	to_group(3);
	f.bytes[0] = 2;
	network_sends(&f, &(struct virtio_net_hdr){0});
	receive();
	CHECK_EQ(in.bytes[0], 2);
	/* No more addresses than Linux's netback takes: the rest is refused, and costs nothing. */
	for (uint8_t i = 0; i < 70; i++) {
		CHECK(pvf_net_tx_multicast(&tx, (const uint8_t[6]){1, 0, 0x5e, 1, 3, i}, true));
		send_frame(&f, &(struct virtio_net_hdr){0});
		network_gets();
		take_answers();
	}
	pvf_nb_get_stats(nb, &s);
	CHECK_EQ(s.multicast_filtered, 3);
	CHECK_EQ(s.multicast_added, 1 + 64);
	CHECK_EQ(s.multicast_refused, 6);
	CHECK_EQ(s.fatal, 0);
	end();
}

static void with_room(void)
{
	static struct frame f;
	struct virtio_net_hdr v;
	uint64_t seed = 31;

	begin();
	for (uint32_t round = 0; round < 600; round++) {
		uint32_t room = round % 3 ? 1 + below(&seed, 400) : 0;

		draw_frame(&f, &v, &seed);
		pvf_nb_set_headroom(nb, room);
		if (below(&seed, 2)) {
			network_sends(&f, &v);
			same(&f, &v, receive());
		} else { /* not asked for */
			struct pvf_nb_rule rule = {.kind = PVF_NB_RX_HEADROOM, .value = 256};

			CHECK_EQ(pvf_nb_set_rules(nb, &rule, 1), 0);
			network_sends(&f, &v);
			same(&f, &v, receive());
			CHECK_EQ(pvf_nb_set_rules(nb, &rule, 0), 0);
		}
	}
	end();
}

int main(void)
{
	static const struct test tests[] = {
		{"packets of all kinds arrive as they were, both ways", both_ways},
		{"bursts arrive in order, whatever fits into the rings at once", in_bursts},
		{"multicast addresses arrive, and packets behind them", multicast},
		{"of multicast packets those of added addresses pass, if that is asked for", filtered},
		{"packets with room before them in their pages arrive as they were", with_room},
	};

	return RUN_TESTS(tests);
}
