/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A network's queue in memory, for the C tests: its rings and pages, and a backend on the same thread that takes
 * what is sent as netback does.
 */
#ifndef PVF_TEST_NETPEER_H
#define PVF_TEST_NETPEER_H

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

static inline void fresh(uint32_t features)
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

static inline bool transmit(const struct frame *f, const struct virtio_net_hdr *vnet)
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
static inline void copy_slot(const struct netif_tx_request *r, uint32_t size, uint32_t *at)
{
	const uint8_t *page = tx_pool + (size_t)(r->gref - GREF) * 4096;

	CHECK(r->gref >= GREF && r->gref < GREF + PAGES && size);
	CHECK(r->offset + size <= 4096);
	memcpy(sent.bytes + *at, page + r->offset, size);
	for (uint32_t i = r->offset + size; i < 4096; i++)
		CHECK_EQ(page[i], 0);
	*at += size;
}

static inline void backend_takes(void)
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

static inline void answer(uint16_t id, int16_t status)
{
	struct netif_tx_response *r = RING_GET_RESPONSE(&tx_back, tx_back.rsp_prod_pvt++);

	r->id = id;
	r->status = status;
	RING_PUSH_RESPONSES(&tx_back);
}

static inline void drain(void)
{
	uint32_t n = pvf_ring_poll(&tx.ring, &tx.fault);

	CHECK(!tx.fault.rule);
	pvf_net_tx_drain(&tx, n);
}

static inline void answer_all(void)
{
	for (uint32_t i = 0; i < sent.extras; i++)
		answer(0xdead, NETIF_RSP_NULL);
	for (uint32_t i = 0; i < sent.slots; i++)
		answer(sent.ids[i], NETIF_RSP_OKAY);
	drain();
	CHECK(!tx.fault.rule);
}

static inline void nothing_out(void)
{
	CHECK_EQ(tx.in_flight, 0);
	CHECK_EQ(tx.extras, 0);
	CHECK_EQ(tx.ids, PVF_NET_RING);
	CHECK_EQ(tx.pool.free, PAGES);
	CHECK_EQ(pvf_ring_free(&tx.ring), PVF_NET_RING);
}

static inline struct virtio_net_hdr unfinished(const struct frame *f, uint16_t field)
{
	return (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
				       .csum_start = (uint16_t)f->l4, .csum_offset = field};
}

/* The field holds the sum of the pseudo-header, as the kernel leaves it. */
static inline void leave_unfinished(struct frame *f, uint16_t field)
{
	uint16_t want = right_sum(f);
	uint8_t *at = f->bytes + f->l4 + field;

	memset(at, 0, 2);
	uint32_t data = slow_sum(0, f->bytes + f->l4, f->size - f->l4);
	uint32_t pseudo = (uint16_t)~want + 0xffffu - data;

	put16(at, (pseudo & 0xffff) + (pseudo >> 16));
	CHECK_EQ((uint16_t)~slow_sum(0, f->bytes + f->l4, f->size - f->l4), want);
}

#endif
