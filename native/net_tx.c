/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>

#include "net.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#include "csum.h"

_Static_assert(__CONST_RING_SIZE(netif_tx, PVF_PAGE_SIZE) == PVF_NET_RING, "TX ring");
_Static_assert(sizeof(struct netif_extra_info) <= sizeof(struct netif_tx_request), "extra info");
_Static_assert(PVF_NET_PAGES + 1 <= PVF_NET_SLOTS && PVF_NET_SLOTS == XEN_NETIF_NR_SLOTS_MIN, "slots");
_Static_assert(PVF_NET_LARGEST == XEN_NETIF_MAX_TX_SIZE, "size");

#define MOST_SLOTS (PVF_NET_PAGES + 1) /* of a packet: its pages, and what it says of GSO */

void pvf_net_tx_init(struct pvf_net_tx *tx, void *ring, void *pool, uint32_t pages,
		     const uint32_t *grefs, bool scrub, uint32_t features)
{
	memset(tx, 0, sizeof(*tx));
	pvf_ring_init(&tx->ring, ring, PVF_PAGE_SIZE, sizeof(union netif_tx_sring_entry), 0);
	pvf_pool_init(&tx->pool, pool, pages, grefs, scrub);
	tx->features = features;
	tx->ids = PVF_NET_RING;
	for (uint32_t i = 0; i < PVF_NET_RING; i++) {
		tx->id[i] = (uint16_t)(PVF_NET_RING - 1 - i);
		tx->page_of[i] = PVF_NONE;
	}
}

/* The packet that is read */

static uint32_t pages_wanted(const struct pvf_net_tx *tx)
{
	return tx->features & PVF_NET_SG ? PVF_NET_PAGES : 1;
}

int pvf_net_tx_begin(struct pvf_net_tx *tx, struct iovec *iov)
{
	uint32_t want = pages_wanted(tx);

	PVF_ASSERT(!tx->borrowed_count);
	if (tx->fault.rule || pvf_ring_free(&tx->ring) < MOST_SLOTS ||
	    pvf_pool_available(&tx->pool) < want)
		return 0;
	iov[0] = (struct iovec){&tx->vnet, sizeof(tx->vnet)};
	for (uint32_t i = 0; i < want; i++) {
		tx->borrowed[i] = pvf_pool_borrow(&tx->pool);
		iov[1 + i] = (struct iovec){pvf_pool_page(&tx->pool, tx->borrowed[i]), PVF_PAGE_SIZE};
	}
	tx->borrowed_count = want;
	return (int)want + 1;
}

static uint32_t bytes_in(uint32_t total, uint32_t page)
{
	uint32_t before = page * PVF_PAGE_SIZE;

	return total <= before ? 0 : pvf_min32(total - before, PVF_PAGE_SIZE);
}

/* Gives the borrowed pages from the `from`th on back. In reverse, so that they are taken in this order again. */
static void return_pages(struct pvf_net_tx *tx, uint32_t from, uint32_t written)
{
	for (uint32_t i = tx->borrowed_count; i-- > from;)
		pvf_pool_return(&tx->pool, tx->borrowed[i], bytes_in(written, i));
	tx->borrowed_count = 0;
}

static unsigned char *byte(const struct pvf_net_tx *tx, uint32_t at)
{
	return pvf_pool_page(&tx->pool, tx->borrowed[at / PVF_PAGE_SIZE]) + at % PVF_PAGE_SIZE;
}

/* Finishes the checksum that begins at `start` and belongs at `field`: the field holds the sum of the
 * pseudo-header. */
static void finish_checksum(struct pvf_net_tx *tx, uint32_t total, uint32_t start, uint32_t field)
{
	uint64_t sum = 0;
	uint32_t n;

	for (uint32_t at = start; at < total; at += n) {
		n = pvf_min32(total - at, PVF_PAGE_SIZE - at % PVF_PAGE_SIZE);
		sum = pvf_csum_add(sum, byte(tx, at), n, (at - start) & 1);
	}
	uint16_t value = (uint16_t)~pvf_csum_fold(sum);

	if (!value)
		value = 0xffff; /* UDP: 0 says that there is none; elsewhere both are the same */
	/* Byte by byte: the field may lie across two pages. */
	memcpy(byte(tx, field), &value, 1);
	memcpy(byte(tx, field + 1), (unsigned char *)&value + 1, 1);
}

struct plan { /* what is said of a packet, and done to it */
	uint16_t flags;
	uint8_t gso_type;
	uint16_t gso_size;
	bool finish;
};

static uint32_t csum_feature(const struct pvf_packet *p)
{
	return p->family == 4 ? PVF_NET_CSUM4 : PVF_NET_CSUM6;
}

/* PVF_DROPS: it can be sent so. */
static enum pvf_net_drop plan(const struct pvf_net_tx *tx, uint32_t total, struct plan *plan)
{
	const struct virtio_net_hdr *v = &tx->vnet;
	uint32_t gso = v->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	uint32_t start = v->csum_start, field = start + v->csum_offset;
	struct pvf_packet p;

	*plan = (struct plan){0};
	if (!(v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return gso == VIRTIO_NET_HDR_GSO_NONE ? PVF_DROPS : PVF_DROP_GSO;
	if (start < PVF_ETH_HEADER || field + 2 > total)
		return PVF_DROP_CSUM;
	pvf_packet_parse(&p, byte(tx, 0), pvf_min32(total, PVF_PACKET_HEAD), total);
	bool plain = pvf_packet_plain(&p) && p.l4 == start && p.csum == v->csum_offset &&
		     (uint32_t)p.l4 + p.l4_bytes == total;

	if (gso != VIRTIO_NET_HDR_GSO_NONE) {
		bool four = gso == VIRTIO_NET_HDR_GSO_TCPV4 && p.family == 4;
		bool six = gso == VIRTIO_NET_HDR_GSO_TCPV6 && p.family == 6;

		if (!plain || p.csum != 16 || !v->gso_size || (!four && !six) ||
		    !(tx->features & (four ? PVF_NET_GSO4 : PVF_NET_GSO6)))
			return PVF_DROP_GSO;
		plan->gso_type = four ? XEN_NETIF_GSO_TYPE_TCPV4 : XEN_NETIF_GSO_TYPE_TCPV6;
		plan->gso_size = v->gso_size;
	} else if (!plain || !(tx->features & csum_feature(&p))) {
		plan->finish = true;
		return PVF_DROPS;
	}
	plan->flags = NETTXF_csum_blank | NETTXF_data_validated;
	return PVF_DROPS;
}

/* Requests */

static void put(struct pvf_net_tx *tx, const void *request, size_t size)
{
	PVF_ASSERT(pvf_ring_put(&tx->ring, request, size));
}

static uint16_t new_id(struct pvf_net_tx *tx, uint16_t page)
{
	PVF_ASSERT(tx->ids);
	uint16_t id = tx->id[--tx->ids];

	tx->page_of[id] = page;
	tx->in_flight++;
	return id;
}

static void put_extra(struct pvf_net_tx *tx, const struct netif_extra_info *extra)
{
	struct netif_tx_request slot = {0};

	memcpy(&slot, extra, sizeof(*extra));
	put(tx, &slot, sizeof(slot));
	tx->extras++;
}

static void send(struct pvf_net_tx *tx, uint32_t total, const struct plan *plan)
{
	uint32_t pages = (total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;

	for (uint32_t i = 0; i < pages; i++) {
		uint32_t bytes = bytes_in(total, i);
		uint16_t page = tx->borrowed[i];
		struct netif_tx_request r = {
			.gref = tx->pool.gref[page],
			.id = new_id(tx, page),
			.flags = i + 1 < pages ? NETTXF_more_data : 0,
			.size = (uint16_t)(i ? bytes : total), /* the first has the packet's */
		};

		pvf_pool_settle(&tx->pool, page, bytes);
		if (!i)
			r.flags |= plan->flags | (plan->gso_type ? NETTXF_extra_info : 0);
		put(tx, &r, sizeof(r));
		if (i || !plan->gso_type)
			continue;
		put_extra(tx, &(struct netif_extra_info){
			.type = XEN_NETIF_EXTRA_TYPE_GSO,
			.u.gso = {.size = plan->gso_size, .type = plan->gso_type},
		});
	}
	return_pages(tx, pages, total);
	tx->stats.packets++;
	tx->stats.bytes += total;
	tx->stats.slots += pages + !!plan->gso_type;
	tx->stats.gso += !!plan->gso_type;
	tx->stats.gso_bytes += plan->gso_type ? total : 0;
	tx->stats.csum_left += !!plan->flags;
	tx->stats.csum_done += plan->finish;
}

static bool drop(struct pvf_net_tx *tx, enum pvf_net_drop why, uint32_t written)
{
	tx->stats.dropped[why]++;
	return_pages(tx, 0, written);
	return false;
}

bool pvf_net_tx_end(struct pvf_net_tx *tx, ssize_t got)
{
	uint32_t room = tx->borrowed_count * PVF_PAGE_SIZE;
	struct plan how;

	PVF_ASSERT(tx->borrowed_count);
	if (got <= 0) {
		return_pages(tx, 0, 0);
		return false;
	}
	if (got < (ssize_t)(sizeof(tx->vnet) + PVF_ETH_HEADER))
		return drop(tx, PVF_DROP_TOO_SMALL, PVF_ETH_HEADER);
	/* What a TAP's packet was longer than its buffers is cut, and counted in what readv() returns. */
	if (got - (ssize_t)sizeof(tx->vnet) > (ssize_t)pvf_min32(room, PVF_NET_LARGEST))
		return drop(tx, PVF_DROP_TOO_LARGE, room);
	uint32_t total = (uint32_t)((size_t)got - sizeof(tx->vnet));
	enum pvf_net_drop why = plan(tx, total, &how);

	if (why != PVF_DROPS)
		return drop(tx, why, total);
	if (how.finish)
		finish_checksum(tx, total, tx->vnet.csum_start,
				(uint32_t)tx->vnet.csum_start + tx->vnet.csum_offset);
	send(tx, total, &how);
	return true;
}

bool pvf_net_tx_multicast(struct pvf_net_tx *tx, const uint8_t address[6], bool add)
{
	struct netif_extra_info extra = {
		.type = add ? XEN_NETIF_EXTRA_TYPE_MCAST_ADD : XEN_NETIF_EXTRA_TYPE_MCAST_DEL};

	if (tx->fault.rule || pvf_ring_free(&tx->ring) < 2 || !pvf_pool_available(&tx->pool))
		return false;
	/* The backend wants a gref that is one, and reads nothing there. */
	uint16_t page = pvf_pool_take(&tx->pool, 1, false);
	struct netif_tx_request r = {
		.gref = tx->pool.gref[page], .id = new_id(tx, page), .flags = NETTXF_extra_info};

	put(tx, &r, sizeof(r));
	memcpy(extra.u.mcast.addr, address, sizeof(extra.u.mcast.addr));
	put_extra(tx, &extra);
	return true;
}

/* Responses */

static void broken(struct pvf_net_tx *tx, uint32_t rule, uint64_t value, const char *field,
		   const char *text)
{
	tx->fault = (struct pvf_fault){rule, value, field, text};
	tx->pool.quarantined = true;
}

void pvf_net_tx_drain(struct pvf_net_tx *tx, uint32_t count)
{
	struct netif_tx_response r;

	while (count-- && !tx->fault.rule) {
		pvf_ring_get(&tx->ring, &r, sizeof(r));
		if (r.status == NETIF_RSP_NULL) {
			if (!tx->extras)
				broken(tx, 14, r.id, "status", "no answer to a request that wants one");
			else
				tx->extras--;
			continue;
		}
		if (r.id >= PVF_NET_RING || tx->page_of[r.id] == PVF_NONE) {
			broken(tx, 5, r.id, "id", "a response to no request");
			continue;
		}
		if (r.status != NETIF_RSP_OKAY)
			tx->stats.dropped[PVF_DROP_ERROR]++;
		pvf_pool_give(&tx->pool, tx->page_of[r.id]);
		tx->page_of[r.id] = PVF_NONE;
		tx->id[tx->ids++] = r.id;
		tx->in_flight--;
	}
}

uint32_t pvf_net_tx_patience(const struct pvf_net_tx *tx)
{
	uint32_t out = tx->in_flight + tx->extras;

	return out > 1 ? out / 2 : 1;
}
