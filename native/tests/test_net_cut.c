/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What netif cannot say is done before the ring: large packets are cut, checksums of other kinds finished. The
 * receiver here checks what every receiver checks.
 */
#include "crc32c.h"
#include "netpeer.h"

static struct frame whole, piece;
static uint32_t got; /* of the payload */

static uint32_t be(const uint8_t *at, uint32_t bytes)
{
	uint32_t value = 0;

	for (uint32_t i = 0; i < bytes; i++)
		value = value << 8 | at[i];
	return value;
}

/* A TCP packet to be cut, with everything that a cut changes. */
static struct virtio_net_hdr to_be_cut(int family, uint32_t tags, uint32_t payload, uint16_t size, bool extended)
{
	whole = tcp(family, tags, payload);
	uint8_t *header = whole.bytes + whole.l4;

	if (family == 4)
		put16(whole.bytes + whole.l3 + 4, 0xfff0); /* its identification wraps */
	memcpy(header + 4, (const uint8_t[]){0xff, 0xff, 0x80, 0x01}, 4); /* and its sequence number */
	header[13] = 0x80 | 0x10 | 0x08 | 0x01; /* CWR, ACK, PSH, FIN */
	leave_unfinished(&whole, 16);
	if (extended)
		extend(&whole, 60, 1);
	struct virtio_net_hdr v = unfinished(&whole, 16);

	v.gso_type = family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
	v.gso_size = size;
	got = 0;
	return v;
}

/* The next piece, as it came into `sent`. `left`: its checksum is the backend's to finish. */
static void check_piece(uint32_t size, bool left)
{
	uint32_t l3 = whole.l3, l4 = whole.l4, header = l4 + 20, total = whole.size - header, more;
	const uint8_t *was = whole.bytes, *is = sent.bytes;

	more = pvf_min32(size, total - got);
	CHECK_EQ(sent.size, header + more);
	CHECK_EQ(sent.extras, 0);
	CHECK_EQ(!!(sent.flags & NETTXF_csum_blank), left);
	CHECK(!memcmp(is, was, l3));
	if (whole.family == 4) {
		CHECK_EQ(be(is + l3 + 2, 2), sent.size - l3);
		CHECK_EQ(be(is + l3 + 4, 2), (be(was + l3 + 4, 2) + got / size) & 0xffff);
		CHECK_EQ(slow_sum(0, is + l3, 20), 0xffff);
		CHECK(!memcmp(is + l3 + 12, was + l3 + 12, 8));
	} else {
		CHECK_EQ(be(is + l3 + 4, 2), sent.size - l3 - 40);
		CHECK(!memcmp(is + l3 + 6, was + l3 + 6, l4 - l3 - 6));
	}
	CHECK_EQ(be(is + l4 + 4, 4), be(was + l4 + 4, 4) + got);
	CHECK_EQ(is[l4 + 13], 0x10 | (got ? 0 : 0x80) | (got + more == total ? 0x09 : 0));
	CHECK(!memcmp(is + header, was + header + got, more));
	piece = whole;
	memcpy(piece.bytes, is, sent.size);
	piece.size = sent.size;
	uint32_t sum = slow_sum(0, is + l4, sent.size - l4);

	if (left)
		CHECK_EQ((uint16_t)~sum, right_sum(&piece)); /* its field has the sum of the pseudo-header */
	else
		CHECK_EQ(be(is + l4 + 16, 2), right_sum(&piece));
	got += more;
}

static void cut(int family, uint32_t tags, uint32_t payload, uint16_t size, bool extended, uint32_t features)
{
	struct virtio_net_hdr v = to_be_cut(family, tags, payload, size, extended);
	uint32_t pieces = 0;
	bool left = !tags && !extended && features & (family == 4 ? PVF_NET_CSUM4 : PVF_NET_CSUM6);

	fresh(features);
	CHECK(transmit(&whole, &v));
	while (got < payload) {
		backend_takes();
		check_piece(size, left);
		answer_all();
		pvf_net_tx_cut(&tx);
		pieces++;
	}
	nothing_out();
	CHECK_EQ(tx.stats.cut, 1);
	CHECK_EQ(tx.stats.pieces, pieces);
	CHECK_EQ(tx.stats.packets, pieces);
	CHECK_EQ(left ? tx.stats.csum_left : tx.stats.csum_done, pieces);
}

static void tagged(void)
{
	for (int family = 4; family <= 6; family += 2) {
		cut(family, 1, 60000, 1448, false, ALL);
		cut(family, 2, 30000, 1440, false, ALL);
	}
	cut(6, 0, 60000, 1420, true, ALL);
}

static void of_any_size(void)
{
	uint64_t seed = 91;

	for (uint32_t i = 0; i < 300; i++) {
		uint32_t payload = 2 + below(&seed, 65000), size = 100 + below(&seed, 9000);

		cut(below(&seed, 2) ? 4 : 6, below(&seed, 2), payload, (uint16_t)size, false,
		    below(&seed, 2) ? PVF_NET_SG : PVF_NET_SG | PVF_NET_CSUM4 | PVF_NET_CSUM6);
	}
}

static void for_the_poor(void)
{
	cut(4, 0, 60000, 1448, false, 0); /* not even scatter/gather */
	cut(6, 0, 60000, 1428, false, PVF_NET_CSUM6);
	cut(4, 0, 60000, 1448, false, ALL & ~PVF_NET_GSO4);
	struct virtio_net_hdr v = to_be_cut(4, 0, 60000, 4090, false);

	fresh(0); /* the pieces would be too large */
	CHECK(!transmit(&whole, &v));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_TOO_LARGE], 1);
	nothing_out();
}

/* More pieces than the ring has slots: it goes on as there is room, and nothing is read before its end. */
static void in_a_full_ring(void)
{
	struct virtio_net_hdr v = to_be_cut(4, 0, 60000, 100, false);
	struct iovec iov[1 + PVF_NET_PAGES];

	fresh(PVF_NET_SG);
	CHECK(transmit(&whole, &v));
	CHECK_EQ(pvf_ring_free(&tx.ring), 0);
	for (uint32_t i = 0; got < 60000; i++) {
		backend_takes();
		check_piece(100, false);
		if (got < 30000)
			CHECK(!pvf_net_tx_begin(&tx, iov));
		answer_all();
		if (i % 7 == 0 || !tx.in_flight)
			pvf_net_tx_cut(&tx);
	}
	CHECK(!tx.cut.total);
	nothing_out();
}

static void in_a_small_pool(void)
{
	struct virtio_net_hdr v = to_be_cut(4, 0, 64000, 9000, false);

	fresh(PVF_NET_SG);
	pvf_net_tx_init(&tx, tx_page, tx_pool, 17, grefs, false, PVF_NET_SG);
	CHECK(transmit(&whole, &v)); /* of which nothing can ever go */
	CHECK_EQ(tx.stats.dropped[PVF_DROP_TOO_LARGE], 1);
	CHECK_EQ(tx.pool.free, 17);
	v = to_be_cut(4, 0, 64000, 1000, false);
	CHECK(transmit(&whole, &v));
	while (got < 64000) {
		backend_takes();
		check_piece(1000, false);
		answer_all();
		pvf_net_tx_cut(&tx);
	}
	CHECK_EQ(tx.pool.free, 17);
}

static void stop_in_between(void)
{
	struct virtio_net_hdr v = to_be_cut(4, 0, 60000, 100, false);

	fresh(PVF_NET_SG);
	CHECK(transmit(&whole, &v));
	backend_takes();
	answer(PVF_NET_RING, NETIF_RSP_OKAY);
	drain();
	CHECK_EQ(tx.fault.rule, 5);
	CHECK(!pvf_net_tx_cut(&tx));
	CHECK(!pvf_net_tx_begin(&tx, (struct iovec[1 + PVF_NET_PAGES]){0}));
}

static void sctp(void)
{
	static struct frame f;

	CHECK_EQ(pvf_crc32c(~0u, "123456789", 9), (uint32_t)~0xe3069283u); /* RFC 3720's kind of check value */
	for (uint32_t i = 0; i < 200; i++) {
		f = ip(i & 1 ? 4 : 6, i % 3, 132, 12 + 4000 + i);
		struct virtio_net_hdr v = unfinished(&f, 8);
		uint8_t *field = f.bytes + f.l4 + 8;

		fresh(ALL);
		CHECK(transmit(&f, &v));
		backend_takes();
		CHECK_EQ(sent.flags & NETTXF_csum_blank, 0);
		memset(field, 0, 4);
		uint32_t crc = ~pvf_crc32c(~0u, f.bytes + f.l4, f.size - f.l4);

		for (uint32_t k = 0; k < 4; k++)
			field[k] = (uint8_t)(crc >> 8 * k);
		CHECK(!memcmp(sent.bytes, f.bytes, f.size));
		CHECK_EQ(tx.stats.csum_done, 1);
	}
	f = ip(4, 0, 47, 100); /* a tunnel, and SCTP in it */
	struct virtio_net_hdr v = unfinished(&f, 8);

	v.csum_start += 30;
	fresh(ALL);
	CHECK(!transmit(&f, &v));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_CSUM], 1);
}

/* TCP in UDP in IP: the inner checksum is the unfinished one. */
static void tunnels(void)
{
	static struct frame outer, inner;

	for (int family = 4; family <= 6; family += 2) {
		inner = tcp(family, 0, 1300);
		leave_unfinished(&inner, 16);
		outer = udp(4, 0, 8 + inner.size);
		memcpy(outer.bytes + outer.l4 + 16, inner.bytes, inner.size);
		struct virtio_net_hdr v = unfinished(&outer, 16);

		v.csum_start = (uint16_t)(outer.l4 + 16 + inner.l4);
		fresh(ALL);
		CHECK(transmit(&outer, &v));
		backend_takes();
		CHECK_EQ(sent.flags, 0);
		CHECK_EQ(be(sent.bytes + v.csum_start + 16, 2), right_sum(&inner));
	}
}

static struct pvf_trace *trace;

static void traced(void)
{
	struct virtio_net_hdr v;
	struct frame f = udp(4, 0, 1000);

	trace = malloc(sizeof(*trace));
	CHECK(trace);
	pvf_trace_init(trace, 3);
	fresh(ALL);
	tx.trace = rx.trace = trace;
	v = unfinished(&f, 6);
	leave_unfinished(&f, 6);
	CHECK(transmit(&f, &v));
	f.size = 13;
	CHECK(!transmit(&f, &(struct virtio_net_hdr){0}));
	v = to_be_cut(4, 1, 9000, 1448, false);
	CHECK(transmit(&whole, &v));
	CHECK_EQ(trace->written, 3);
	const struct pvf_trace_packet *p = trace->packet;

	CHECK_EQ(p->number, 1);
	CHECK_EQ(p->length, 1042);
	CHECK_EQ(p->captured, PVF_TRACE_BYTES);
	CHECK_EQ(p->way, 0);
	CHECK_EQ(p->dropped, PVF_DROPS);
	CHECK_EQ(p->slots, 1);
	CHECK_EQ(p->offered, 1);
	CHECK_EQ(p->queue, 3);
	CHECK_EQ(p->csum_start, 34);
	CHECK(p->time > 1000000000000000000u);
	CHECK(!memcmp(p->bytes, f.bytes, PVF_TRACE_BYTES));
	CHECK_EQ(p[1].dropped, PVF_DROP_TOO_SMALL);
	CHECK_EQ(p[2].dropped, PVF_DROPS);
	CHECK_EQ(p[2].gso_size, 1448);
	CHECK_EQ(p[2].length, whole.size);
	CHECK_EQ(p[2].offered, 0);
	f = udp(4, 0, 100);
	for (uint32_t i = 0; i < 2 * PVF_TRACE_PACKETS; i++) {
		while (tx.cut.total || pvf_ring_free(&tx.ring) < 20) {
			backend_takes();
			answer_all();
			pvf_net_tx_cut(&tx);
		}
		CHECK(transmit(&f, &(struct virtio_net_hdr){0}));
	}
	CHECK_EQ(trace->written, 3 + 2 * PVF_TRACE_PACKETS); /* the oldest are lost */
	for (uint64_t n = trace->written; n > trace->written - PVF_TRACE_PACKETS; n--)
		CHECK_EQ(trace->packet[(n - 1) % PVF_TRACE_PACKETS].number, n);
	free(trace);
}

int main(void)
{
	static const struct test tests[] = {
		{"a large packet with tags, or behind extension headers, is cut", tagged},
		{"whatever its pieces' size: each is right by itself", of_any_size},
		{"so is one for a backend that cannot cut, or not even gather", for_the_poor},
		{"more pieces than a ring has go as there is room, and no packet before them", in_a_full_ring},
		{"a pool too small for one piece drops it; one for few lets them pass", in_a_small_pool},
		{"a broken rule ends it", stop_in_between},
		{"SCTP gets its own checksum, and in a tunnel it is dropped", sctp},
		{"a checksum within a tunnel is finished", tunnels},
		{"the trace has each packet that came, and the last ones stay", traced},
	};

	return RUN_TESTS(tests);
}
