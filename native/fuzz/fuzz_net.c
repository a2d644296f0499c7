/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A network's queue between a TAP and a backend that both are the input: the TAP gives any bytes behind any
 * virtio_net_hdr, the backend writes anything anywhere in the shared pages between any two steps.
 *
 * What must hold: a page has one owner; what is in flight is what the ring has; a slot that is sent lies
 * within its page, and behind its bytes are zeroes (rule 17); what is received has between 14 and 65,535 bytes,
 * all within pages that are ours, and what is said of its checksum and segments lies within its private head; a
 * packet that is cut ends, and its pieces are no larger than a backend takes; the set of multicast groups stays
 * possible. At any moment all of it moves to another worker, by a table that may be bent: it is taken whole, or
 * refused.
 */
#include "fuzz.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#include "frames.h"
#include "image.h"

#define PAGES 280u
#define GREF(page) (900u + 3u * (page))

static _Alignas(4096) unsigned char rings[2 * 4096], all_pages[2 * PAGES * 4096];
static unsigned char *const tx_ring = rings, *const rx_ring = rings + 4096, *const tx_pages = all_pages;
static unsigned char *rx_pages;
static struct pvf_net_tx tx;
static struct pvf_net_rx rx;
static struct pvf_groups groups;
static struct pvf_trace trace;
static struct pvf_image_net image;
static struct frame frame;
static uint32_t seen, tx_rsp, rx_rsp;

static void begin(struct input *in)
{
	uint32_t grefs[PAGES], features = upto(in, 64);
	uint32_t pages = upto(in, 8) ? 17 + upto(in, PAGES - 17) : 1 + upto(in, 30);

	for (uint32_t i = 0; i < PAGES; i++)
		grefs[i] = GREF(i);
	memset(all_pages, 0, sizeof(all_pages));
	rx_pages = tx_pages + (size_t)pages * 4096;
	pvf_groups_init(&groups);
	pvf_net_tx_init(&tx, tx_ring, tx_pages, pages, grefs, upto(in, 2), features);
	pvf_net_rx_init(&rx, rx_ring, rx_pages, pages, grefs);
	tx.groups = &groups;
	tx.trace = rx.trace = upto(in, 2) ? &trace : NULL;
	pvf_net_rx_fill(&rx);
	pvf_ring_push(&rx.ring);
	seen = tx_rsp = rx_rsp = 0;
}

/* What the engine put into the ring, before anybody can change it. */
static void look_at_slots(void)
{
	for (; seen != tx.ring.req_prod_pvt; seen++) {
		struct netif_tx_request r;

		memcpy(&r, tx_ring + 64 + (seen % PVF_NET_RING) * 12, sizeof(r));
		if (r.gref < GREF(0)) /* extra info */
			continue;
		uint32_t page = (r.gref - GREF(0)) / 3, bytes = r.size;

		if (page >= tx.pool.pages || r.id >= PVF_NET_RING || tx.page_of[r.id] != page)
			continue; /* extra info that looks like a request */
		CHECK(tx.pool.state[page] == PVF_PAGE_USED);
		if (bytes > 4096 || r.flags & NETTXF_more_data)
			bytes = 4096;
		for (uint32_t i = bytes; i < 4096; i++)
			CHECK(!tx_pages[page * 4096 + i]);
	}
}

static void consistent(void)
{
	uint32_t in_flight = 0, in_ring = 0;

	for (uint32_t i = 0; i < PVF_NET_RING; i++) {
		in_flight += tx.page_of[i] != PVF_NONE;
		in_ring += rx.page_of[i] != PVF_NONE;
	}
	CHECK(in_flight == tx.in_flight && tx.ids + in_flight == PVF_NET_RING);
	CHECK(tx.pool.free + in_flight + tx.borrowed_count == tx.pool.pages);
	CHECK(!tx.borrowed_count == !tx.cut.total);
	CHECK(pvf_groups_possible(&groups.set));
	CHECK(rx.pool.free + in_ring == rx.pool.pages);
}

/* A packet that makes sense, but for a byte or two. */
static void send_frame(struct input *in, struct iovec *iov, int iovs)
{
	struct virtio_net_hdr v = {0};
	uint32_t payload = upto(in, 2) ? upto(in, 3000) : number(in, 2) % 65000, at = 0;
	int family = upto(in, 2) ? 4 : 6;
	const uint8_t types[] = {6, 6, 6, 17, 2, 58, 132, 47};
	uint8_t type = types[upto(in, 8)];
	uint32_t tags = upto(in, 4) % 3;

	frame = type == 6 ? tcp(family, tags, payload) : type == 17 ? udp(family, tags, payload)
							    : ip(family, tags, type, 24 + payload % 2000);
	if (family == 6 && upto(in, 2))
		extend(&frame, 0, (uint8_t)upto(in, 3));
	frame.bytes[0] |= upto(in, 2);
	if (upto(in, 3)) {
		v.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		v.csum_start = (uint16_t)frame.l4;
		v.csum_offset = type == 6 ? 16 : type == 132 ? 8 : 6;
		if (type == 6 && upto(in, 4)) {
			v.gso_type = family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
			v.gso_size = (uint16_t)(upto(in, 2) ? 1 + upto(in, 9000) : number(in, 2));
		}
	}
	for (uint32_t k = upto(in, 3); k; k--)
		frame.bytes[upto(in, 120)] = (uint8_t)number(in, 1);
	if (type == 2 || type == 58)
		raw(in, frame.bytes + frame.l4, 24);
	memcpy(iov[0].iov_base, &v, sizeof(v));
	for (int i = 1; i < iovs && at < frame.size; i++) {
		uint32_t bytes = pvf_min32(frame.size - at, 4096);

		memcpy(iov[i].iov_base, frame.bytes + at, bytes);
		at += bytes;
	}
	pvf_net_tx_end(&tx, (ssize_t)(sizeof(v) + frame.size));
	look_at_slots();
}

static bool tell(void *arg, const uint8_t *mac, bool add)
{
	CHECK(arg == &tx && mac[0] & 1);
	return pvf_net_tx_multicast(&tx, mac, add);
}

/* To another worker. */
static void move(struct input *in)
{
	uint32_t pages = tx.pool.pages, all = tx.pool.pages + rx.pool.pages, bits = upto(in, 3);

	memcpy(&image.tx, &tx, sizeof(tx));
	memcpy(&image.rx, &rx, sizeof(rx));
	for (uint32_t i = bits; i; i--)
		((unsigned char *)&image)[number(in, 3) % (sizeof(image.tx) + sizeof(image.rx))] ^=
			(unsigned char)(1u << upto(in, 8));
	struct pvf_net_tx was = tx;
	struct pvf_net_rx had = rx;
	const char *why = pvf_net_take_over(&tx, &rx, &image, rings, sizeof(rings), all_pages, all);

	CHECK(why || (tx.pool.pages < all && tx.pool.base == all_pages && rx.ring.shared == rx_ring));
	CHECK(!why || bits || was.fault.rule || had.fault.rule);
	/* What was bent and is possible all the same goes no further here: it is another truth than the backend's. */
	if (why || bits) {
		tx = was;
		rx = had;
	}
	tx.groups = &groups;
	tx.trace = rx.trace = was.trace;
	CHECK(tx.pool.pages == pages);
}

static void send(struct input *in)
{
	struct iovec iov[1 + PVF_NET_PAGES];
	int n = pvf_net_tx_begin(&tx, iov);

	if (!n)
		return;
	if (upto(in, 2)) {
		send_frame(in, iov, n);
		return;
	}
	/* No more is written than is said, and no more is said than was asked for, or there was. */
	size_t size = upto(in, 2) ? upto(in, 400) : number(in, 2), head = size < 300 ? size : 300;

	raw(in, iov[0].iov_base, iov[0].iov_len);
	raw(in, iov[1].iov_base, head);
	for (int i = 1; i < n && (size_t)(i - 1) * 4096 < size; i++) {
		size_t from = i == 1 ? head : 0, to = size - (size_t)(i - 1) * 4096;

		to = to < 4096 ? to : 4096;
		if (to > from)
			memset((char *)iov[i].iov_base + from, 0x57, to - from);
	}
	pvf_net_tx_end(&tx, (ssize_t)(size ? sizeof(tx.vnet) + size : upto(in, 12)) - 1 + (size != 0));
	look_at_slots();
}

static void receive(void)
{
	static struct pvf_net_packet p;
	uint32_t count = pvf_ring_poll(&rx.ring, &rx.fault), before;

	while ((before = count) && !rx.fault.rule) {
		if (!pvf_net_rx_next(&rx, &count, &p)) {
			CHECK(count < before || rx.fault.rule);
			continue;
		}
		uint32_t total = 0;

		CHECK(p.iov[1].iov_base == p.head && p.iov[1].iov_len <= PVF_PACKET_HEAD);
		for (uint32_t i = 1; i < p.iovs; i++) {
			const unsigned char *from = p.iov[i].iov_base;

			CHECK(i == 1 || (from >= rx_pages &&
					 from + p.iov[i].iov_len <= rx_pages + (size_t)rx.pool.pages * 4096));
			total += (uint32_t)p.iov[i].iov_len;
		}
		CHECK(total == p.total && total >= 14 && total <= PVF_NET_LARGEST);
		if (p.vnet.flags)
			CHECK(p.vnet.csum_start + p.vnet.csum_offset + 2u <= p.iov[1].iov_len);
		if (p.vnet.gso_type)
			CHECK(p.vnet.gso_size && p.vnet.hdr_len < total && p.vnet.flags);
		pvf_net_rx_done(&rx, &p, total & 1);
	}
	pvf_net_rx_fill(&rx);
	pvf_ring_push(&rx.ring);
}

static void backend(struct input *in)
{
	switch (upto(in, 5)) {
	case 0: /* honest TX answers */
		for (uint32_t n = upto(in, 20); n; n--) {
			struct netif_tx_response r = {.id = (uint16_t)upto(in, PVF_NET_RING),
						      .status = (int16_t)(upto(in, 4) - 2)};

			memcpy(tx_ring + 64 + (tx_rsp++ % PVF_NET_RING) * 12, &r, sizeof(r));
		}
		break;
	case 1: /* RX responses in their slots */
		for (uint32_t n = upto(in, 24); n; n--) {
			struct netif_rx_response r = {
				.id = rx_rsp % PVF_NET_RING, .offset = (uint16_t)upto(in, 80),
				.flags = (uint16_t)upto(in, 16), .status = (int16_t)number(in, 2)};

			r.status = (int16_t)(r.status & 0xfff) - (upto(in, 16) ? 0 : 4000);
			memcpy(rx_ring + 64 + (rx_rsp++ % PVF_NET_RING) * 8, &r, sizeof(r));
		}
		break;
	case 2: /* extra info */
		raw(in, rx_ring + 64 + (rx_rsp++ % PVF_NET_RING) * 8, 8);
		break;
	case 3: /* what is in a page that can be received next */
		raw(in, rx_pages + upto(in, rx.pool.pages) * 4096, 300);
		break;
	case 4: /* anything anywhere */
		raw(in, (upto(in, 2) ? tx_ring : rx_ring) + upto(in, 4000), 90);
		return;
	}
	((struct netif_tx_sring *)(void *)tx_ring)->rsp_prod = tx_rsp;
	((struct netif_rx_sring *)(void *)rx_ring)->rsp_prod = rx_rsp;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};

	begin(&in);
	while (more(&in)) {
		switch (upto(&in, 9)) {
		case 0:
			send(&in);
			break;
		case 1:
			pvf_ring_push(&tx.ring);
			break;
		case 2:
			if (!tx.fault.rule)
				pvf_net_tx_drain(&tx, pvf_ring_poll(&tx.ring, &tx.fault));
			break;
		case 3:
			if (!rx.fault.rule)
				receive();
			break;
		case 4:
			if (pvf_net_tx_cut(&tx))
				CHECK(!tx.borrowed_count);
			else /* somebody's answer goes on with it */
				CHECK(tx.in_flight || tx.fault.rule);
			look_at_slots();
			break;
		case 5:
			move(&in);
			break;
		case 6:
			pvf_groups_tell(&groups, tell, &tx);
			look_at_slots();
			break;
		default:
			backend(&in);
		}
		consistent();
	}
	pvf_groups_free(&groups);
	return 0;
}
