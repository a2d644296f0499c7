/* SPDX-License-Identifier: BSD-2-Clause */
#include <endian.h>
#include <netinet/in.h>
#include <string.h>

#include "net_int.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#include "crc32c.h"
#include "csum.h"

_Static_assert(__CONST_RING_SIZE(netif_tx, PVF_PAGE_SIZE) == PVF_NET_RING, "TX ring");
_Static_assert(sizeof(struct netif_extra_info) <= sizeof(struct netif_tx_request), "extra info");
_Static_assert(PVF_NET_PAGES + 1 <= PVF_NET_SLOTS && PVF_NET_SLOTS == XEN_NETIF_NR_SLOTS_MIN, "slots");
_Static_assert(PVF_NET_LARGEST == XEN_NETIF_MAX_TX_SIZE, "size");

#define MOST_SLOTS (PVF_NET_PAGES + 1) /* of a packet: its pages, and what it says of GSO */

/* With so many slots and pages, three quarters of them are under way whenever a packet finds no room. */
#define LAZY_ROOM (4 * (MOST_SLOTS + PVF_NET_PAGES))

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

/* Without scatter/gather a large packet is read all the same, to be cut; what is more than there are pages for
 * is the sender's to repeat. */
static uint32_t pages_wanted(const struct pvf_net_tx *tx)
{
	uint32_t there = pvf_pool_available(&tx->pool);

	return tx->features & PVF_NET_SG || !there ? PVF_NET_PAGES : pvf_min32(there, PVF_NET_PAGES);
}

int pvf_net_tx_begin(struct pvf_net_tx *tx, struct iovec *iov)
{
	if (tx->cut.total && !pvf_net_tx_cut(tx))
		return 0;
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

void pvf_net_tx_return(struct pvf_net_tx *tx, uint32_t from, uint32_t written)
{
	for (uint32_t i = tx->borrowed_count; i-- > from;)
		pvf_pool_return(&tx->pool, tx->borrowed[i], pvf_net_bytes_in(written, i));
	tx->borrowed_count = from;
}

static void store(struct pvf_net_tx *tx, uint32_t field, const void *value, uint32_t bytes)
{
	/* Byte by byte: the field may lie across two pages. */
	for (uint32_t i = 0; i < bytes; i++)
		memcpy(pvf_net_tx_byte(tx, field + i), (const unsigned char *)value + i, 1);
}

/* Finishes the checksum that begins at `start` and belongs at `field`: the field holds the sum of the
 * pseudo-header. */
static void finish_checksum(struct pvf_net_tx *tx, uint32_t total, uint32_t start, uint32_t field)
{
	uint64_t sum = 0;
	uint32_t n;

	for (uint32_t at = start; at < total; at += n) {
		n = pvf_min32(total - at, PVF_PAGE_SIZE - at % PVF_PAGE_SIZE);
		sum = pvf_csum_add(sum, pvf_net_tx_byte(tx, at), n, (at - start) & 1);
	}
	uint16_t value = (uint16_t)~pvf_csum_fold(sum);

	if (!value)
		value = 0xffff; /* UDP: 0 says that there is none; elsewhere both are the same */
	store(tx, field, &value, sizeof(value));
}

/* The same of SCTP, over `bytes` from `start` on. */
static void finish_crc(struct pvf_net_tx *tx, uint32_t start, uint32_t bytes)
{
	uint32_t crc = ~0u, n;

	store(tx, start + SCTP_CHECKSUM, &(uint32_t){0}, 4);
	for (uint32_t at = start; at < start + bytes; at += n) {
		n = pvf_min32(start + bytes - at, PVF_PAGE_SIZE - at % PVF_PAGE_SIZE);
		crc = pvf_crc32c(crc, pvf_net_tx_byte(tx, at), n);
	}
	crc = htole32(~crc);
	store(tx, start + SCTP_CHECKSUM, &crc, 4);
}

enum todo { NOTHING, FINISH, FINISH_CRC, CUT };

struct plan { /* what is said of a packet, and done to it */
	uint16_t flags;
	uint8_t gso_type;
	uint16_t gso_size;
	enum todo todo;
};

static uint32_t csum_feature(const struct pvf_packet *p)
{
	return p->family == 4 ? PVF_NET_CSUM4 : PVF_NET_CSUM6;
}

/* A large packet. `plain`: netif can tell everything of it. */
static enum pvf_net_drop plan_large(struct pvf_net_tx *tx, uint32_t total, const struct pvf_packet *p,
				    bool plain, struct plan *plan)
{
	const struct virtio_net_hdr *v = &tx->vnet;
	uint32_t gso = v->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	bool four = gso == VIRTIO_NET_HDR_GSO_TCPV4 && p->family == 4;
	bool six = gso == VIRTIO_NET_HDR_GSO_TCPV6 && p->family == 6;

	if (p->csum != TCP_CHECKSUM || p->l4 != v->csum_start || v->csum_offset != TCP_CHECKSUM ||
	    (uint32_t)p->l4 + p->l4_bytes != total || p->payload >= total || !v->gso_size ||
	    (!four && !six))
		return PVF_DROP_GSO;
	if (plain && tx->features & (four ? PVF_NET_GSO4 : PVF_NET_GSO6)) {
		plan->gso_type = four ? XEN_NETIF_GSO_TYPE_TCPV4 : XEN_NETIF_GSO_TYPE_TCPV6;
		plan->gso_size = v->gso_size;
		plan->flags = NETTXF_csum_blank | NETTXF_data_validated;
		return PVF_DROPS;
	}
	plan->todo = CUT;
	tx->cut = (struct pvf_net_cut){.what = *p, .at = p->payload, .size = v->gso_size,
				       .leave = plain && tx->features & csum_feature(p)};
	return (uint32_t)p->payload + v->gso_size > pvf_net_tx_largest(tx) ? PVF_DROP_TOO_LARGE : PVF_DROPS;
}

/* PVF_DROPS: it can be sent so. */
static enum pvf_net_drop plan(struct pvf_net_tx *tx, uint32_t total, struct plan *plan)
{
	const struct virtio_net_hdr *v = &tx->vnet;
	uint32_t gso = v->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	uint32_t start = v->csum_start, field = start + v->csum_offset;
	struct pvf_packet p;

	*plan = (struct plan){0};
	if (gso == VIRTIO_NET_HDR_GSO_NONE && total > pvf_net_tx_largest(tx))
		return PVF_DROP_TOO_LARGE;
	if (!(v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return gso == VIRTIO_NET_HDR_GSO_NONE ? PVF_DROPS : PVF_DROP_GSO;
	if (start < PVF_ETH_HEADER || field + 2 > total)
		return PVF_DROP_CSUM;
	pvf_packet_parse(&p, pvf_net_tx_byte(tx, 0), pvf_min32(total, PVF_PACKET_HEAD), total);
	bool plain = pvf_packet_plain(&p) && p.l4 == start && p.csum == v->csum_offset &&
		     (uint32_t)p.l4 + p.l4_bytes == total;

	if (gso != VIRTIO_NET_HDR_GSO_NONE)
		return plan_large(tx, total, &p, plain, plan);
	if (plain && tx->features & csum_feature(&p)) {
		plan->flags = NETTXF_csum_blank | NETTXF_data_validated;
	} else if (v->csum_offset == SCTP_CHECKSUM) {
		/* Nothing else has its checksum there, and SCTP's is another one. */
		if (p.protocol != IPPROTO_SCTP || p.l4 != start || p.l4_bytes < SCTP_CHECKSUM + 4)
			return PVF_DROP_CSUM;
		plan->todo = FINISH_CRC;
	} else {
		plan->todo = FINISH;
	}
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
	tx->stats.extras++;
}

void pvf_net_tx_put(struct pvf_net_tx *tx, const uint16_t *page_list, uint32_t total, uint16_t flags,
		    const struct netif_extra_info *gso)
{
	uint32_t pages = (total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;

	for (uint32_t i = 0; i < pages; i++) {
		uint32_t bytes = pvf_net_bytes_in(total, i);
		uint16_t page = page_list[i];
		struct netif_tx_request r = {
			.gref = tx->pool.gref[page],
			.id = new_id(tx, page),
			.flags = i + 1 < pages ? NETTXF_more_data : 0,
			.size = (uint16_t)(i ? bytes : total), /* the first has the packet's */
		};

		pvf_pool_settle(&tx->pool, page, bytes);
		if (!i)
			r.flags |= flags | (gso ? NETTXF_extra_info : 0);
		put(tx, &r, sizeof(r));
		if (!i && gso)
			put_extra(tx, gso);
	}
	pvf_net_count(&tx->stats, total);
	tx->stats.slots += pages + !!gso;
	tx->stats.gso += !!gso;
	tx->stats.gso_bytes += gso ? total : 0;
	tx->stats.csum_left += !!flags;
}

static void send_whole(struct pvf_net_tx *tx, uint32_t total, const struct plan *plan)
{
	struct netif_extra_info gso = {.type = XEN_NETIF_EXTRA_TYPE_GSO,
				       .u.gso = {.size = plan->gso_size, .type = plan->gso_type}};
	uint32_t pages = (total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;

	pvf_net_tx_put(tx, tx->borrowed, total, plan->flags, plan->gso_type ? &gso : NULL);
	pvf_net_tx_return(tx, pages, total);
	tx->borrowed_count = 0;
}

/* For the trace: a packet that was read. */
static void note(struct pvf_net_tx *tx, uint32_t total, const struct plan *plan, enum pvf_net_drop why)
{
	const struct virtio_net_hdr *v = &tx->vnet;
	uint32_t pages = (total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;
	struct pvf_trace_packet what = {
		.length = total,
		.dropped = (uint8_t)why,
		.slots = (uint16_t)(why == PVF_DROPS && plan->todo != CUT ? pages + !!plan->gso_type : 0),
		.gso_size = v->gso_size,
		.csum_start = v->csum_start,
		.csum_offset = v->csum_offset,
		.flags = v->flags,
		.gso_type = v->gso_type,
		.offered = (uint8_t)((plan->flags ? 1 : 0) | (plan->gso_type ? 2 : 0)),
	};
	struct iovec first = {pvf_net_tx_byte(tx, 0), pvf_min32(total, PVF_PAGE_SIZE)};

	pvf_trace_add(tx->trace, &what, &first, 1);
}

static bool drop(struct pvf_net_tx *tx, enum pvf_net_drop why, uint32_t written)
{
	if (tx->trace)
		note(tx, written, &(struct plan){0}, why);
	tx->stats.dropped[why]++;
	pvf_net_tx_return(tx, 0, written);
	return false;
}

bool pvf_net_tx_end(struct pvf_net_tx *tx, ssize_t got)
{
	uint32_t room = tx->borrowed_count * PVF_PAGE_SIZE;
	struct plan how;

	PVF_ASSERT(tx->borrowed_count);
	if (got <= 0) {
		pvf_net_tx_return(tx, 0, 0);
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
	if (tx->groups)
		pvf_groups_snoop(tx->groups, pvf_net_tx_byte(tx, 0), pvf_min32(total, PVF_PAGE_SIZE), total);
	if (tx->trace)
		note(tx, total, &how, PVF_DROPS);
	if (how.todo == CUT) {
		tx->cut.total = total;
		tx->stats.cut++;
		pvf_net_tx_return(tx, (total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE, total);
		pvf_net_tx_cut(tx);
		return true;
	}
	if (how.todo == FINISH)
		finish_checksum(tx, total, tx->vnet.csum_start,
				(uint32_t)tx->vnet.csum_start + tx->vnet.csum_offset);
	else if (how.todo == FINISH_CRC)
		finish_crc(tx, tx->vnet.csum_start, total - tx->vnet.csum_start);
	tx->stats.csum_done += how.todo != NOTHING;
	send_whole(tx, total, &how);
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
	tx->stats.slots += 2;
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
	uint32_t room = pvf_min32(tx->pool.pages, PVF_NET_RING), out = tx->in_flight + tx->extras;

	if (room >= LAZY_ROOM)
		return room / 4;
	return out > 1 ? out / 2 : 1;
}
