/* SPDX-License-Identifier: BSD-2-Clause */
#include "netpeer.h"

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
	f = udp(4, 0, 9000);
	v = unfinished(&f, 6), v.gso_type = good.gso_type, v.gso_size = 1448;
	fresh(ALL);
	CHECK(!transmit(&f, &v));
	CHECK_EQ(tx.stats.dropped[PVF_DROP_GSO], 1);
	nothing_out();
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
	CHECK_EQ(pvf_net_tx_patience(&tx), PVF_NET_RING / 4);
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
	};

	return RUN_TESTS(tests);
}
