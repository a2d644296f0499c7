/* SPDX-License-Identifier: BSD-2-Clause */
#include "netpeer.h"

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
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{6, 1448, 1}}, 1);
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{1, 1448, 1}, {1, 1448, 1}}, 2);
	extra_nonsense(&four, PVF_DROP_EXTRA, (const uint16_t[][3]){{1, 1448, 1}, {255, 0, 0}, {2, 0, 0}}, 3);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 0, 1}}, 1);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 1448, 0}}, 1);
	extra_nonsense(&four, PVF_DROP_GSO, (const uint16_t[][3]){{1, 1448, 3}}, 1);
	extra_nonsense(&six, PVF_DROP_GSO, &good, 1);
	extra_nonsense(&datagram, PVF_DROP_GSO, &good, 1);
	extra_nonsense(&empty, PVF_DROP_GSO, &good, 1);
}

static void shown_in_bulk(void)
{
	static uint8_t bytes[100];
	uint32_t packets = 0;

	rx_fresh();
	for (uint32_t before = rx.ring.req_published; rx.ring.req_published == before; packets++) {
		put_slot(bytes, sizeof(bytes), 0, 0);
		CHECK(look());
		pvf_net_rx_done(&rx, &got, false);
		pvf_net_rx_show(&rx);
	}
	CHECK_EQ(packets, (PVF_NET_RING - PVF_NET_SLOTS - 1) / 2);
	CHECK_EQ(rx.ring.req_published - rx.ring.rsp_cons, PVF_NET_RING);
	pvf_net_rx_init(&rx, rx_page, rx_pool, 20, grefs); /* hardly enough for a large packet */
	pvf_net_rx_show(&rx);
	CHECK_EQ(rx.ring.req_published, 20);
}

/* Room before the packet (XDP) and a hash say nothing that a TAP wants to know. */
static void passed_over(void)
{
	struct frame f = tcp(4, 0, 3000);

	rx_fresh();
	put_slot(f.bytes, f.size, 256, NETRXF_csum_blank | NETRXF_extra_info);
	put_extra(5, XEN_NETIF_EXTRA_FLAG_MORE, 256, 0);
	put_extra(XEN_NETIF_EXTRA_TYPE_HASH, XEN_NETIF_EXTRA_FLAG_MORE, 0x0101, 7);
	put_extra(XEN_NETIF_EXTRA_TYPE_GSO, 0, 1448, 1);
	CHECK(look());
	CHECK_EQ(got.total, f.size);
	CHECK_EQ(got.vnet.gso_size, 1448);
	CHECK(!memcmp(got.head, f.bytes, 40));
	CHECK_EQ(got.slots, 4);
	pvf_net_rx_done(&rx, &got, false);
	CHECK_EQ(rx.stats.extras, 3);
	CHECK_EQ(rx.stats.slots, 4);
	all_back();
}

static void rx_traced(void)
{
	struct frame f = udp(4, 0, 900);
	struct pvf_trace *t = malloc(sizeof(*t));

	CHECK(t);
	pvf_trace_init(t, 1);
	rx_fresh();
	rx.trace = t;
	put_slot(f.bytes, f.size, 0, NETRXF_csum_blank);
	CHECK(look());
	pvf_net_rx_done(&rx, &got, false);
	put_slot(f.bytes, 500, 0, NETRXF_more_data);
	CHECK(!look());
	CHECK_EQ(t->written, 2);
	CHECK_EQ(t->packet[0].way, 1);
	CHECK_EQ(t->packet[0].length, f.size);
	CHECK_EQ(t->packet[0].offered, 1);
	CHECK_EQ(t->packet[0].dropped, PVF_DROPS);
	CHECK_EQ(t->packet[0].captured, PVF_TRACE_BYTES);
	CHECK(!memcmp(t->packet[0].bytes, f.bytes, 30));
	CHECK_EQ(t->packet[1].dropped, PVF_DROP_TRUNCATED);
	CHECK_EQ(t->packet[1].captured, 0);
	free(t);
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
		{"a received packet of any slots arrives as it was", received},
		{"rule 16: what the backend writes later does not change what was looked at", private_head},
		{"a received checksum, unfinished or known to be right, is the kernel's to finish", rx_csum},
		{"a received checksum that nobody finds is a drop", rx_csum_nowhere},
		{"a received large packet is told to the TAP as one", rx_large},
		{"rules 11 and 12: extra info without sense is a drop, and its slots come back", nonsense},
		{"new pages are shown to the backend when they are many", shown_in_bulk},
		{"extra info that a TAP has no use for is passed over", passed_over},
		{"the trace has what came, and why it was dropped", rx_traced},
		{"rule 10: a packet whose rest is not there is a drop", not_all_there},
		{"received sizes that cannot be are a drop", rx_sizes},
		{"rules 9 and 13: what no honest backend says breaks the queue", rx_lies},
		{"whatever a backend answers, no page is lost and nothing outside is touched", hostile},
	};

	return RUN_TESTS(tests);
}
