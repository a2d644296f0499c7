/* SPDX-License-Identifier: BSD-2-Clause */
#include <unistd.h>

#include "check.h"
#include "frames.h"
#include "net.h"

/* One thread plays both ends. */
#define mb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define rmb() mb()
#define wmb() mb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#define PAGES 300u
#define GREF 5000u
#define ALL (PVF_NET_SG | PVF_NET_CSUM4 | PVF_NET_CSUM6 | PVF_NET_GSO4 | PVF_NET_GSO6)

static _Alignas(4096) uint8_t tx_page[4096], rx_page[4096], tx_pool[PAGES * 4096],
	rx_pool[PAGES * 4096];
static struct pvf_net_tx tx;
static struct pvf_net_rx rx;
static struct netif_tx_back_ring tx_back;
static struct netif_rx_back_ring rx_back;
static uint32_t grefs[PAGES];

static void fresh(uint32_t features)
{
	for (uint32_t i = 0; i < PAGES; i++)
		grefs[i] = GREF + i;
	memset(tx_pool, 0, sizeof(tx_pool));
	memset(rx_pool, 0, sizeof(rx_pool));
	pvf_net_tx_init(&tx, tx_page, tx_pool, PAGES, grefs, false, features);
	pvf_net_rx_init(&rx, rx_page, rx_pool, PAGES, grefs);
	BACK_RING_INIT(&tx_back, (struct netif_tx_sring *)tx_page, 4096);
	BACK_RING_INIT(&rx_back, (struct netif_rx_sring *)rx_page, 4096);
}

/* TX: a program's frame goes in through the iovecs, and a backend puts it together again. */

static bool transmit(const struct frame *f, const struct virtio_net_hdr *vnet)
{
	struct iovec iov[1 + PVF_NET_PAGES];
	int n = pvf_net_tx_begin(&tx, iov);
	uint32_t at = 0;

	CHECK(n > 0);
	memcpy(iov[0].iov_base, vnet, iov[0].iov_len);
	for (int i = 1; i < n && at < f->size; i++) {
		uint32_t bytes = pvf_min32(f->size - at, (uint32_t)iov[i].iov_len);

		memcpy(iov[i].iov_base, f->bytes + at, bytes);
		at += bytes;
	}
	return pvf_net_tx_end(&tx, (ssize_t)(sizeof(*vnet) + f->size));
}

struct sent { /* as the backend finds it */
	uint16_t flags;
	uint32_t size, slots, extras;
	struct netif_extra_info extra;
	uint16_t ids[PVF_NET_SLOTS];
	uint8_t bytes[65600];
};

static struct sent sent;

/* Pages with slots, and what lies behind their bytes, must hold nothing but the packet. */
static void copy_slot(const struct netif_tx_request *r, uint32_t size, uint32_t *at)
{
	const uint8_t *page = tx_pool + (size_t)(r->gref - GREF) * 4096;

	CHECK(r->gref >= GREF && r->gref < GREF + PAGES && size);
	CHECK(r->offset + size <= 4096);
	memcpy(sent.bytes + *at, page + r->offset, size);
	for (uint32_t i = r->offset + size; i < 4096; i++)
		CHECK_EQ(page[i], 0);
	*at += size;
}

static void backend_takes(void)
{
	struct netif_tx_request r, first;
	uint32_t at = 0, rest = 0, n = 0;
	struct netif_tx_request slots[PVF_NET_SLOTS];

	pvf_ring_push(&tx.ring);
	memset(&sent, 0, sizeof(sent));
	CHECK(RING_HAS_UNCONSUMED_REQUESTS(&tx_back));
	RING_COPY_REQUEST(&tx_back, tx_back.req_cons++, &first);
	sent.flags = first.flags;
	sent.size = first.size;
	sent.ids[0] = first.id;
	if (first.flags & NETTXF_extra_info) {
		RING_COPY_REQUEST(&tx_back, tx_back.req_cons++, &r);
		memcpy(&sent.extra, &r, sizeof(sent.extra));
		CHECK(!(sent.extra.flags & XEN_NETIF_EXTRA_FLAG_MORE));
		sent.extras = 1;
	}
	slots[n++] = first;
	for (r = first; r.flags & NETTXF_more_data;) {
		CHECK(n < PVF_NET_SLOTS);
		RING_COPY_REQUEST(&tx_back, tx_back.req_cons++, &r);
		sent.ids[n] = r.id;
		slots[n++] = r;
		rest += r.size;
	}
	sent.slots = n;
	if (!first.size)
		return;
	CHECK(rest < first.size);
	copy_slot(&first, first.size - rest, &at);
	for (uint32_t i = 1; i < n; i++)
		copy_slot(&slots[i], slots[i].size, &at);
}

static void answer(uint16_t id, int16_t status)
{
	struct netif_tx_response *r = RING_GET_RESPONSE(&tx_back, tx_back.rsp_prod_pvt++);

	r->id = id;
	r->status = status;
	RING_PUSH_RESPONSES(&tx_back);
}

static void drain(void)
{
	uint32_t n = pvf_ring_poll(&tx.ring, &tx.fault);

	CHECK(!tx.fault.rule);
	pvf_net_tx_drain(&tx, n);
}

static void answer_all(void)
{
	for (uint32_t i = 0; i < sent.extras; i++)
		answer(0xdead, NETIF_RSP_NULL);
	for (uint32_t i = 0; i < sent.slots; i++)
		answer(sent.ids[i], NETIF_RSP_OKAY);
	drain();
	CHECK(!tx.fault.rule);
}

static void nothing_out(void)
{
	CHECK_EQ(tx.in_flight, 0);
	CHECK_EQ(tx.extras, 0);
	CHECK_EQ(tx.ids, PVF_NET_RING);
	CHECK_EQ(tx.pool.free, PAGES);
	CHECK_EQ(pvf_ring_free(&tx.ring), PVF_NET_RING);
}

static struct virtio_net_hdr unfinished(const struct frame *f, uint16_t field)
{
	return (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
				       .csum_start = (uint16_t)f->l4, .csum_offset = field};
}

/* The field holds the sum of the pseudo-header, as the kernel leaves it. */
static void leave_unfinished(struct frame *f, uint16_t field)
{
	uint16_t want = right_sum(f);
	uint8_t *at = f->bytes + f->l4 + field;

	memset(at, 0, 2);
	uint32_t data = slow_sum(0, f->bytes + f->l4, f->size - f->l4);
	uint32_t pseudo = (uint16_t)~want + 0xffffu - data;

	put16(at, (pseudo & 0xffff) + (pseudo >> 16));
	CHECK_EQ((uint16_t)~slow_sum(0, f->bytes + f->l4, f->size - f->l4), want);
}

static void every_size(void)
{
	static struct frame f;
	uint64_t seed = 11;

	fresh(ALL);
	for (uint32_t i = 0; i < sizeof(f.bytes); i++)
		f.bytes[i] = (uint8_t)(1 + i % 251);
	for (uint32_t round = 0; round < 600; round++) {
		uint32_t exact[] = {14, 4095, 4096, 4097, 8192, 61440, 61441, 65534, 65535};

		f.size = round < 9 ? exact[round] : 14 + below(&seed, 65535 - 13);
		CHECK(transmit(&f, &(struct virtio_net_hdr){0}));
		backend_takes();
		CHECK_EQ(sent.size, f.size);
		CHECK_EQ(sent.slots, (f.size + 4095) / 4096);
		CHECK_EQ(sent.flags & ~NETTXF_more_data, 0);
		CHECK(!memcmp(sent.bytes, f.bytes, f.size));
		answer_all();
	}
	nothing_out();
	CHECK_EQ(tx.stats.packets, 600);
}

static void refused_sizes(void)
{
	static struct frame f;

	fresh(ALL);
	f.size = 13;
	CHECK(!transmit(&f, &(struct virtio_net_hdr){0}));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_TOO_SMALL], 1);
	f.size = 65536;
	CHECK(!transmit(&f, &(struct virtio_net_hdr){0}));
	f.size = 65600; /* cut by readv(), which says how long it was */
	CHECK(!transmit(&f, &(struct virtio_net_hdr){0}));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_TOO_LARGE], 2);
	nothing_out();
	fresh(ALL & ~PVF_NET_SG);
	f.size = 4097;
	CHECK(!transmit(&f, &(struct virtio_net_hdr){0}));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_TOO_LARGE], 1);
	f.size = 4096;
	CHECK(transmit(&f, &(struct virtio_net_hdr){0}));
}

static void nothing_read(void)
{
	struct iovec iov[1 + PVF_NET_PAGES];

	fresh(ALL);
	CHECK(pvf_net_tx_begin(&tx, iov));
	CHECK(!pvf_net_tx_end(&tx, -1));
	nothing_out();
}

static void tails(void)
{
	struct frame f = tcp(4, 0, 10);
	static struct frame large;

	fresh(ALL);
	memset(large.bytes, 0xee, sizeof(large.bytes));
	large.size = 65535;
	CHECK(transmit(&large, &(struct virtio_net_hdr){0}));
	backend_takes();
	answer_all();
	large.size = 65536; /* dropped, but its bytes are in the pages */
	CHECK(!transmit(&large, &(struct virtio_net_hdr){0}));
	for (uint32_t i = 0; i < 20; i++) {
		CHECK(transmit(&f, &(struct virtio_net_hdr){0}));
		backend_takes(); /* looks behind its bytes */
		if (i & 1)
			answer_all();
	}
}

static void csum_left(void)
{
	fresh(ALL);
	for (int family = 4; family <= 6; family += 2)
		for (int t = 0; t < 2; t++) {
			struct frame f = t ? tcp(family, 0, 999) : udp(family, 0, 999);
			struct virtio_net_hdr v = unfinished(&f, t ? 16 : 6);

			leave_unfinished(&f, v.csum_offset);
			CHECK(transmit(&f, &v));
			backend_takes();
			CHECK_EQ(sent.flags, NETTXF_csum_blank | NETTXF_data_validated);
			CHECK(!memcmp(sent.bytes, f.bytes, f.size));
			answer_all();
		}
	CHECK_EQ(tx.stats.csum_left, 4);
}

static void finished(struct frame *f, uint16_t field, uint32_t features)
{
	struct virtio_net_hdr v = unfinished(f, field);
	uint16_t want = right_sum(f);

	fresh(features);
	leave_unfinished(f, field);
	CHECK(transmit(f, &v));
	backend_takes();
	CHECK_EQ(sent.flags & (NETTXF_csum_blank | NETTXF_data_validated), 0);
	uint32_t at = f->l4 + field;

	CHECK_EQ(sent.bytes[at] << 8 | sent.bytes[at + 1], want ? want : 0xffff);
	CHECK_EQ(tx.stats.csum_done, 1);
}

static void csum_done(void)
{
	static struct frame f;

	f = udp(4, 0, 9001), finished(&f, 6, ALL & ~PVF_NET_CSUM4);
	f = tcp(6, 0, 9000), finished(&f, 16, ALL & ~PVF_NET_CSUM6);
	f = tcp(4, 1, 4096), finished(&f, 16, ALL); /* netif says nothing of tags */
	f = udp(6, 2, 17), finished(&f, 6, ALL);
	f = udp(6, 0, 5000), extend(&f, 60, 2), finished(&f, 6, ALL);
	for (uint32_t i = 0; i < 300; i++)
		f = udp(4, 1, 4000 + i), finished(&f, 6, ALL); /* all places on the border of two pages */
}

static void csum_elsewhere(void)
{
	struct frame f = udp(4, 0, 100);
	struct virtio_net_hdr v = unfinished(&f, 40); /* not UDP's: of something in it */

	fresh(ALL);
	put16(f.bytes + f.l4 + 40, 0);
	CHECK(transmit(&f, &v));
	backend_takes();
	CHECK_EQ(sent.flags, 0);
	CHECK_EQ(slow_sum(0, sent.bytes + f.l4, f.size - f.l4), 0xffff);
	answer_all();
	v.csum_start = (uint16_t)f.size - 1;
	v.csum_offset = 0;
	CHECK(!transmit(&f, &v));
	v.csum_start = 13;
	CHECK(!transmit(&f, &v));
	v.csum_start = v.csum_offset = 0xffff;
	CHECK(!transmit(&f, &v));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_CSUM], 3);
	nothing_out();
}

static void large_packets(void)
{
	static struct frame f;

	fresh(ALL);
	for (int family = 4; family <= 6; family += 2) {
		f = tcp(family, 0, 60000);
		struct virtio_net_hdr v = unfinished(&f, 16);

		v.gso_type = family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN
					 : VIRTIO_NET_HDR_GSO_TCPV6;
		v.gso_size = 1448;
		CHECK(transmit(&f, &v));
		backend_takes();
		CHECK_EQ(sent.extras, 1);
		CHECK_EQ(sent.extra.type, XEN_NETIF_EXTRA_TYPE_GSO);
		CHECK_EQ(sent.extra.u.gso.size, 1448);
		CHECK_EQ(sent.extra.u.gso.type, family == 4 ? XEN_NETIF_GSO_TYPE_TCPV4
							    : XEN_NETIF_GSO_TYPE_TCPV6);
		CHECK(sent.flags & NETTXF_csum_blank);
		CHECK(!memcmp(sent.bytes, f.bytes, f.size));
		answer_all();
	}
	nothing_out();
	CHECK_EQ(tx.stats.gso, 2);
}

static void not_to_be_cut(void)
{
	static struct frame f;
	struct virtio_net_hdr good, v;

	f = tcp(4, 0, 9000);
	good = unfinished(&f, 16);
	good.gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
	good.gso_size = 1448;
	fresh(ALL);
	v = good, v.gso_size = 0;
	CHECK(!transmit(&f, &v));
	v = good, v.gso_type = VIRTIO_NET_HDR_GSO_TCPV6;
	CHECK(!transmit(&f, &v));
	v = good, v.gso_type = VIRTIO_NET_HDR_GSO_UDP;
	CHECK(!transmit(&f, &v));
	v = good, v.flags = 0;
	CHECK(!transmit(&f, &v));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_GSO], 4);
	nothing_out();
	fresh(ALL & ~PVF_NET_GSO4);
	CHECK(!transmit(&f, &good));
	f = tcp(4, 1, 9000); /* tagged */
	v = unfinished(&f, 16), v.gso_type = good.gso_type, v.gso_size = 1448;
	fresh(ALL);
	CHECK(!transmit(&f, &v));
	CHECK(pvf_net_tx_begin(&tx, (struct iovec[1 + PVF_NET_PAGES]){0}));
}

static void full_ring(void)
{
	struct frame f = tcp(4, 0, 10);
	struct iovec iov[1 + PVF_NET_PAGES];
	uint32_t packets = 0;

	fresh(ALL);
	while (pvf_net_tx_begin(&tx, iov)) {
		tx.vnet = (struct virtio_net_hdr){0};
		memcpy(iov[1].iov_base, f.bytes, f.size);
		CHECK(pvf_net_tx_end(&tx, (ssize_t)(sizeof(tx.vnet) + f.size)));
		packets++;
	}
	CHECK_EQ(packets, PVF_NET_RING - PVF_NET_PAGES); /* the next might want as many and one */
	CHECK_EQ(pvf_net_tx_patience(&tx), packets / 2);
	while (packets--) {
		backend_takes();
		answer(sent.ids[0], NETIF_RSP_ERROR);
	}
	drain();
	CHECK_EQ(tx.stats.dropped[PVF_DROP_ERROR], PVF_NET_RING - PVF_NET_PAGES);
	nothing_out();
}

static void multicast(void)
{
	const uint8_t group[6] = {0x01, 0, 0x5e, 0, 0, 5};

	fresh(ALL);
	for (int add = 0; add < 2; add++) {
		CHECK(pvf_net_tx_multicast(&tx, group, add));
		backend_takes();
		CHECK_EQ(sent.extra.type,
			 add ? XEN_NETIF_EXTRA_TYPE_MCAST_ADD : XEN_NETIF_EXTRA_TYPE_MCAST_DEL);
		CHECK(!memcmp(sent.extra.u.mcast.addr, group, 6));
		answer_all();
	}
	nothing_out();
	while (pvf_net_tx_multicast(&tx, group, true))
		;
	CHECK_EQ(tx.extras, PVF_NET_RING / 2);
}

static void one_packet_out(void)
{
	struct frame f = tcp(4, 0, 100);

	fresh(ALL);
	CHECK(transmit(&f, &(struct virtio_net_hdr){0}));
	backend_takes();
}

static void broken_by(uint16_t id, int16_t status, uint32_t rule)
{
	answer(id, status);
	drain();
	CHECK_EQ(tx.fault.rule, rule);
	CHECK(!pvf_net_tx_begin(&tx, (struct iovec[1 + PVF_NET_PAGES]){0}));
}

static void wrong_answers(void)
{
	one_packet_out();
	broken_by(PVF_NET_RING, NETIF_RSP_OKAY, 5);
	one_packet_out();
	broken_by(sent.ids[0] + 1, NETIF_RSP_OKAY, 5);
	one_packet_out();
	broken_by(sent.ids[0], NETIF_RSP_NULL, 14);
	one_packet_out();
	CHECK(pvf_net_tx_multicast(&tx, (const uint8_t[6]){1}, true));
	pvf_ring_push(&tx.ring);
	answer(sent.ids[0], NETIF_RSP_OKAY);
	drain();
	broken_by(sent.ids[0], NETIF_RSP_OKAY, 5); /* twice */
}

/* RX: a backend puts frames into the pages, and what a TAP would get is looked at. */

static struct pvf_net_packet got;
static uint32_t responses;

static void fill(void)
{
	pvf_net_rx_fill(&rx);
	pvf_ring_push(&rx.ring);
}

static void rx_fresh(void)
{
	fresh(ALL);
	fill();
	CHECK_EQ(pvf_ring_free(&rx.ring), 0);
}

static struct netif_rx_response *slot(void)
{
	struct netif_rx_request r;

	CHECK(RING_HAS_UNCONSUMED_REQUESTS(&rx_back));
	RING_COPY_REQUEST(&rx_back, rx_back.req_cons++, &r);
	CHECK_EQ(r.id, rx_back.rsp_prod_pvt % PVF_NET_RING);
	struct netif_rx_response *response = RING_GET_RESPONSE(&rx_back, rx_back.rsp_prod_pvt++);

	*response = (struct netif_rx_response){.id = r.id, .offset = (uint16_t)(r.gref - GREF)};
	return response;
}

/* `offset` of a new slot holds its page. */
static void put_slot(const uint8_t *bytes, uint32_t size, uint16_t offset, uint16_t flags)
{
	struct netif_rx_response *r = slot();

	memcpy(rx_pool + (size_t)r->offset * 4096 + offset, bytes, size);
	r->offset = offset;
	r->status = (int16_t)size;
	r->flags = flags;
}

static void put_extra(uint8_t type, uint8_t flags, uint16_t size, uint8_t gso)
{
	struct netif_extra_info e = {.type = type, .flags = flags, .u.gso = {.size = size, .type = gso}};

	memcpy(slot(), &e, sizeof(e));
}

static bool look(void)
{
	RING_PUSH_RESPONSES(&rx_back);
	responses = pvf_ring_poll(&rx.ring, &rx.fault);
	CHECK(!rx.fault.rule);
	return pvf_net_rx_next(&rx, &responses, &got);
}

static uint32_t gathered(uint8_t *to)
{
	uint32_t at = 0;

	for (uint32_t i = 1; i < got.iovs; i++) {
		memcpy(to + at, got.iov[i].iov_base, got.iov[i].iov_len);
		at += (uint32_t)got.iov[i].iov_len;
	}
	return at;
}

static void all_back(void)
{
	CHECK_EQ(responses, 0);
	fill();
	CHECK_EQ(pvf_ring_free(&rx.ring), 0);
	CHECK_EQ(rx.pool.free, PAGES - PVF_NET_RING);
}

static void received(void)
{
	static uint8_t bytes[65600];
	static struct frame f;
	uint64_t seed = 5;

	rx_fresh();
	for (uint32_t i = 0; i < sizeof(f.bytes); i++)
		f.bytes[i] = (uint8_t)(i * 3 + i / 256);
	for (uint32_t round = 0; round < 500; round++) {
		uint32_t size = 14 + below(&seed, 65535 - 13), at = 0, left = PVF_NET_SLOTS;

		while (at < size) {
			uint32_t others = --left * 4096, rest = size - at;
			uint32_t least = rest > others ? rest - others : 1;
			uint32_t n = pvf_min32(rest, least + below(&seed, 4097 - least));

			put_slot(f.bytes + at, n, (uint16_t)below(&seed, 4097 - n),
				 at + n < size ? NETRXF_more_data : 0);
			at += n;
		}
		CHECK(look());
		CHECK_EQ(got.total, size);
		CHECK_EQ(got.vnet.flags, 0);
		CHECK_EQ(gathered(bytes), size);
		CHECK(!memcmp(bytes, f.bytes, size));
		pvf_net_rx_done(&rx, &got, false);
		all_back();
	}
}

static void private_head(void)
{
	struct frame f = tcp(4, 0, 1000);

	rx_fresh();
	put_slot(f.bytes, 30, 7, NETRXF_more_data | NETRXF_csum_blank);
	put_slot(f.bytes + 30, f.size - 30, 0, 0);
	CHECK(look());
	memset(rx_pool, 0xbb, sizeof(rx_pool)); /* the backend, later */
	CHECK_EQ(got.iov[1].iov_len, PVF_PACKET_HEAD);
	CHECK_EQ(got.vnet.csum_start, f.l4);
	CHECK(!memcmp(got.head, f.bytes, f.l4 + 16));
	CHECK(!memcmp(got.head + f.l4 + 18, f.bytes + f.l4 + 18, PVF_PACKET_HEAD - f.l4 - 18));
}

static void rx_csum(void)
{
	for (int family = 4; family <= 6; family += 2)
		for (int t = 0; t < 2; t++)
			for (uint32_t tags = 0; tags < 2; tags++) {
				static uint8_t bytes[2000];
				struct frame f = t ? tcp(family, tags, 777) : udp(family, tags, 777);
				uint32_t field = t ? 16 : 6;

				rx_fresh();
				put_slot(f.bytes, f.size, 0,
					 tags ? NETRXF_data_validated
					      : NETRXF_csum_blank | NETRXF_data_validated);
				CHECK(look());
				CHECK_EQ(got.vnet.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
				CHECK_EQ(got.vnet.csum_start, f.l4);
				CHECK_EQ(got.vnet.csum_offset, field);
				gathered(bytes); /* and what the kernel makes of it is right */
				CHECK_EQ((uint16_t)~slow_sum(0, bytes + f.l4, f.size - f.l4),
					 right_sum(&f));
				pvf_net_rx_done(&rx, &got, false);
				CHECK_EQ(rx.stats.csum_left, 1);
			}
}

static void rx_csum_nowhere(void)
{
	struct frame f = ip(4, 0, 1, 100); /* ICMP */

	rx_fresh();
	put_slot(f.bytes, f.size, 0, NETRXF_csum_blank);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_CSUM], 1);
	all_back();
	put_slot(f.bytes, f.size, 0, NETRXF_data_validated); /* the kernel will see for itself */
	CHECK(look());
	CHECK_EQ(got.vnet.flags, 0);
}

static void rx_large(void)
{
	for (int family = 4; family <= 6; family += 2) {
		struct frame f = tcp(family, 0, 8000);

		rx_fresh();
		put_slot(f.bytes, 4096, 0, NETRXF_csum_blank | NETRXF_more_data | NETRXF_extra_info);
		put_extra(XEN_NETIF_EXTRA_TYPE_GSO, 0, 1448,
			  family == 4 ? XEN_NETIF_GSO_TYPE_TCPV4 : XEN_NETIF_GSO_TYPE_TCPV6);
		put_slot(f.bytes + 4096, f.size - 4096, 0, 0);
		CHECK(look());
		CHECK_EQ(got.vnet.gso_type, family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4
							: VIRTIO_NET_HDR_GSO_TCPV6);
		CHECK_EQ(got.vnet.gso_size, 1448);
		CHECK_EQ(got.vnet.hdr_len, f.l4 + 20);
		CHECK_EQ(got.vnet.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
		CHECK_EQ(got.total, f.size);
		pvf_net_rx_done(&rx, &got, false);
		all_back();
		CHECK_EQ(rx.stats.gso, 1);
	}
}

static void extra_nonsense(const struct frame *f, enum pvf_net_drop why, const uint16_t (*extras)[3],
			   uint32_t count)
{
	struct frame next = udp(4, 0, 60);

	rx_fresh();
	put_slot(f->bytes, f->size, 0, NETRXF_csum_blank | NETRXF_extra_info);
	for (uint32_t i = 0; i < count; i++)
		put_extra((uint8_t)extras[i][0], i + 1 < count ? XEN_NETIF_EXTRA_FLAG_MORE : 0,
			  extras[i][1], (uint8_t)extras[i][2]);
	put_slot(next.bytes, next.size, 0, 0);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[why], 1);
	CHECK(!rx.fault.rule);
	CHECK(pvf_net_rx_next(&rx, &responses, &got)); /* the next one is whole */
	CHECK_EQ(got.total, next.size);
	pvf_net_rx_done(&rx, &got, false);
	all_back();
}

static void nonsense(void)
{
	struct frame four = tcp(4, 0, 4000), six = tcp(6, 0, 4000), datagram = udp(4, 0, 4000);
	struct frame empty = tcp(4, 0, 0);
	const uint16_t good[] = {1, 1448, 1};

	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{0, 1448, 1}}, 1);
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{5, 1448, 1}}, 1);
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{1, 1448, 1}, {1, 1448, 1}}, 2);
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{1, 1448, 1}, {255, 0, 0}, {2, 0, 0}}, 3);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 0, 1}}, 1);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 1448, 0}}, 1);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 1448, 3}}, 1);
	extra_nonsense(&six, PVF_DROP_GSO, &good, 1);
	extra_nonsense(&datagram, PVF_DROP_GSO, &good, 1);
	extra_nonsense(&empty, PVF_DROP_GSO, &good, 1);
}

static void not_all_there(void)
{
	struct frame f = tcp(4, 0, 1000);

	rx_fresh();
	put_slot(f.bytes, 500, 0, NETRXF_more_data);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_TRUNCATED], 1);
	all_back();
	put_slot(f.bytes, 500, 0, NETRXF_extra_info);
	CHECK(!look());
	all_back();
	put_slot(f.bytes, 500, 0, NETRXF_extra_info);
	put_extra(XEN_NETIF_EXTRA_TYPE_GSO, XEN_NETIF_EXTRA_FLAG_MORE, 1448, 1);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_TRUNCATED], 3);
	all_back();
}

static void rx_sizes(void)
{
	static uint8_t bytes[4096];

	rx_fresh();
	put_slot(bytes, 13, 0, 0);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_TOO_SMALL], 1);
	all_back();
	for (uint32_t i = 0; i < 16; i++)
		put_slot(bytes, 4096, 0, i < 15 ? NETRXF_more_data : 0);
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_TOO_LARGE], 1);
	all_back();
	slot()->status = NETIF_RSP_ERROR;
	RING_GET_RESPONSE(&rx_back, rx_back.rsp_prod_pvt - 1)->offset = 0;
	CHECK(!look());
	CHECK_EQ(rx.stats.dropped[PVF_DROP_ERROR], 1);
	all_back();
}

static void rx_broken(uint32_t rule)
{
	CHECK(!look());
	CHECK_EQ(rx.fault.rule, rule);
	CHECK(!pvf_net_rx_next(&rx, &responses, &got));
	pvf_net_rx_fill(&rx); /* nothing more is given to such a backend */
	CHECK_EQ(rx.ring.req_prod_pvt, PVF_NET_RING);
}

static void rx_lies(void)
{
	static uint8_t bytes[4096];

	rx_fresh();
	put_slot(bytes, 100, 0, 0);
	RING_GET_RESPONSE(&rx_back, 0)->id = 1;
	rx_broken(13);
	rx_fresh();
	put_slot(bytes, 100, 0, 0);
	RING_GET_RESPONSE(&rx_back, 0)->offset = 3997;
	rx_broken(9);
	rx_fresh();
	put_slot(bytes, 100, 0, 0);
	RING_GET_RESPONSE(&rx_back, 0)->offset = 0xffff;
	rx_broken(9);
	rx_fresh();
	for (uint32_t i = 0; i < 19; i++)
		put_slot(bytes, 100, 0, i < 18 ? NETRXF_more_data : 0);
	rx_broken(9);
}

static void hostile(void)
{
	uint64_t seed = 17;
	static uint8_t bytes[70000];

	for (uint32_t round = 0; round < 3000; round++) {
		rx_fresh();
		for (uint32_t i = 0; i < sizeof(rx_pool); i += 4 + below(&seed, 900))
			rx_pool[i] = (uint8_t)draw(&seed);
		for (uint32_t turn = 0; turn < 4 && !rx.fault.rule; turn++) {
			for (uint32_t i = 0, n = below(&seed, 40); i < n; i++) {
				struct netif_rx_response *r = slot();

				r->offset = (uint16_t)below(&seed, 64);
				r->status = (int16_t)(below(&seed, 4032));
				r->flags = (uint16_t)(below(&seed, 4) ? draw(&seed) & 11 : draw(&seed));
				if (!below(&seed, 30))
					memcpy(r, &(uint64_t){draw(&seed)}, sizeof(*r));
				if (r->flags & NETRXF_extra_info && below(&seed, 3) && i + 1 < n) {
					put_extra((uint8_t)below(&seed, 6), (uint8_t)below(&seed, 2),
						  (uint16_t)below(&seed, 3000), (uint8_t)below(&seed, 3));
					i++;
				}
			}
			RING_PUSH_RESPONSES(&rx_back);
			responses = pvf_ring_poll(&rx.ring, &rx.fault);
			while (responses && !rx.fault.rule)
				if (pvf_net_rx_next(&rx, &responses, &got)) {
					CHECK_EQ(gathered(bytes), got.total);
					pvf_net_rx_done(&rx, &got, below(&seed, 2));
				}
			uint32_t in_ring = 0;

			for (uint32_t i = 0; i < PVF_NET_RING; i++)
				in_ring += rx.page_of[i] != PVF_NONE;
			CHECK_EQ(rx.pool.free + in_ring, PAGES);
			if (!rx.fault.rule)
				all_back();
		}
	}
}

int main(void)
{
	static const struct test tests[] = {
		{"a packet of any size arrives as it was, no slot crossing a page", every_size},
		{"what is too small or too large is dropped", refused_sizes},
		{"nothing read costs nothing", nothing_read},
		{"rule 17: behind a packet's bytes its pages hold zeroes", tails},
		{"a checksum is left to a backend that can finish it", csum_left},
		{"a checksum that netif cannot express, or the backend not finish, is finished", csum_done},
		{"a checksum anywhere else is finished, or the packet dropped", csum_elsewhere},
		{"a large TCP packet goes out whole, with its segments' size", large_packets},
		{"a large packet that cannot be cut is dropped", not_to_be_cut},
		{"a full ring takes nothing, and answers make room", full_ring},
		{"a multicast address is told to the backend", multicast},
		{"rules 5 and 14: an answer to no request breaks the queue", wrong_answers},
		{"a received packet of any slots arrives as it was", received},
		{"rule 16: what the backend writes later does not change what was looked at", private_head},
		{"a received checksum, unfinished or known to be right, is the kernel's to finish", rx_csum},
		{"a received checksum that nobody finds is a drop", rx_csum_nowhere},
		{"a received large packet is told to the TAP as one", rx_large},
		{"rules 11 and 12: extra info without sense is a drop, and its slots come back", nonsense},
		{"rule 10: a packet whose rest is not there is a drop", not_all_there},
		{"received sizes that cannot be are a drop", rx_sizes},
		{"rules 9 and 13: what no honest backend says breaks the queue", rx_lies},
		{"whatever a backend answers, no page is lost and nothing outside is touched", hostile},
	};

	return RUN_TESTS(tests);
}
