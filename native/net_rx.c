/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>

#include "net.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>


_Static_assert(__CONST_RING_SIZE(netif_rx, PVF_PAGE_SIZE) == PVF_NET_RING, "RX ring");
_Static_assert(sizeof(struct netif_extra_info) == sizeof(struct netif_rx_response), "extra info");

void pvf_net_rx_init(struct pvf_net_rx *rx, void *ring, void *pool, uint32_t pages,
		     const uint32_t *grefs)
{
	memset(rx, 0, sizeof(*rx));
	pvf_ring_init(&rx->ring, ring, PVF_PAGE_SIZE, sizeof(union netif_rx_sring_entry), 0);
	/* Never cleared: nobody but the backend has written there. */
	pvf_pool_init(&rx->pool, pool, pages, grefs, false);
	for (uint32_t i = 0; i < PVF_NET_RING; i++)
		rx->page_of[i] = PVF_NONE;
}

void pvf_net_rx_fill(struct pvf_net_rx *rx)
{
	while (!rx->fault.rule && pvf_pool_available(&rx->pool) && pvf_ring_free(&rx->ring)) {
		uint16_t id = rx->ring.req_prod_pvt % PVF_NET_RING;
		uint16_t page = pvf_pool_borrow(&rx->pool);
		struct netif_rx_request r = {.id = id, .gref = rx->pool.gref[page]};

		PVF_ASSERT(rx->page_of[id] == PVF_NONE && pvf_ring_put(&rx->ring, &r, sizeof(r)));
		rx->page_of[id] = page;
	}
}

bool pvf_net_rx_show(struct pvf_net_rx *rx)
{
	uint32_t all = pvf_min32(rx->pool.pages, PVF_NET_RING);

	pvf_net_rx_fill(rx);
	if (rx->ring.req_prod_pvt - rx->ring.req_published < (all - pvf_min32(all, PVF_NET_SLOTS + 1)) / 2)
		return false;
	return pvf_ring_push(&rx->ring);
}

static void broken(struct pvf_net_rx *rx, uint32_t rule, uint64_t value, const char *field,
		   const char *text)
{
	rx->fault = (struct pvf_fault){rule, value, field, text};
	rx->pool.quarantined = true;
}

/* A packet's slots */

/* Types of extra info: headers before Xen 4.15 do not know the last, which says that there is room before the
 * packet in its page. */
#define EXTRA_TYPES (XEN_NETIF_EXTRA_TYPE_MAX < 6 ? 6 : XEN_NETIF_EXTRA_TYPE_MAX)

struct packet { /* what its responses say */
	uint16_t flags;
	enum pvf_net_drop why; /* PVF_DROPS: none so far */
	struct netif_extra_info extra[EXTRA_TYPES];
	uint32_t extras_seen; /* bit t: one of type t */
	bool headed;          /* its first bytes are private */
};

static void refuse(struct packet *p, enum pvf_net_drop why)
{
	if (p->why == PVF_DROPS)
		p->why = why;
}

/* Copies the next slot out and takes its page. */
static uint16_t take_slot(struct pvf_net_rx *rx, uint32_t *count, void *response)
{
	uint16_t id = rx->ring.rsp_cons % PVF_NET_RING;
	uint16_t page = rx->page_of[id];

	PVF_ASSERT(*count && page != PVF_NONE);
	pvf_ring_get(&rx->ring, response, sizeof(struct netif_rx_response));
	rx->page_of[id] = PVF_NONE;
	rx->stats.slots++;
	--*count;
	return page;
}

/* Extra info has no data: its page goes back into the ring (rule 12). */
static void take_extras(struct pvf_net_rx *rx, uint32_t *count, struct packet *p)
{
	struct netif_extra_info extra = {.flags = XEN_NETIF_EXTRA_FLAG_MORE};

	while (extra.flags & XEN_NETIF_EXTRA_FLAG_MORE) {
		if (!*count) {
			refuse(p, PVF_DROP_TRUNCATED);
			return;
		}
		pvf_pool_give(&rx->pool, take_slot(rx, count, &extra));
		rx->stats.extras++;
		if (!extra.type || extra.type >= EXTRA_TYPES ||
		    p->extras_seen >> extra.type & 1) {
			refuse(p, PVF_DROP_EXTRA);
			continue;
		}
		p->extras_seen |= 1u << extra.type;
		p->extra[extra.type] = extra;
	}
}

/* All slots of a packet, as far as they are there. */
static void gather(struct pvf_net_rx *rx, uint32_t *count, struct packet *p,
		   struct pvf_net_packet *out)
{
	struct netif_rx_response r;
	bool more = true;

	for (bool first = true; more; first = false) {
		if (!*count) {
			refuse(p, PVF_DROP_TRUNCATED);
			return;
		}
		uint16_t id = rx->ring.rsp_cons % PVF_NET_RING, page = take_slot(rx, count, &r);

		if (r.id != id) {
			broken(rx, 13, r.id, "id", "a received packet is not in its request's slot");
		} else if (r.status > 0 && (uint32_t)r.offset + (uint32_t)r.status > PVF_PAGE_SIZE) {
			broken(rx, 9, r.offset, "offset", "received data past the end of its page");
		} else if (out->pages == PVF_NET_SLOTS) {
			broken(rx, 9, out->pages + 1, "flags", "a received packet of too many slots");
		}
		if (rx->fault.rule) {
			pvf_pool_give(&rx->pool, page);
			return;
		}
		if (first)
			p->flags = r.flags;
		more = r.flags & NETRXF_more_data;
		out->page[out->pages] = page;
		out->iov[2 + out->pages] = (struct iovec){
			pvf_pool_page(&rx->pool, page) + r.offset, (size_t)(r.status > 0 ? r.status : 0)};
		out->pages++;
		out->total += (uint32_t)(r.status > 0 ? r.status : 0);
		if (r.status < 0)
			refuse(p, PVF_DROP_ERROR);
		if (first && r.flags & NETRXF_extra_info)
			take_extras(rx, count, p);
	}
}

/* What is told to the TAP */

/* Copies the packet's first bytes out of the shared pages, and leaves the rest there. */
static void take_head(struct pvf_net_packet *out)
{
	uint32_t have = 0;

	for (uint32_t i = 0; i < out->pages && have < PVF_PACKET_HEAD; i++) {
		struct iovec *rest = &out->iov[2 + i];
		size_t n = pvf_min32((uint32_t)rest->iov_len, PVF_PACKET_HEAD - have);

		memcpy(out->head + have, rest->iov_base, n);
		rest->iov_base = (unsigned char *)rest->iov_base + n;
		rest->iov_len -= n;
		have += (uint32_t)n;
	}
	out->iov[0] = (struct iovec){&out->vnet, sizeof(out->vnet)};
	out->iov[1] = (struct iovec){out->head, have};
	out->iovs = 2;
	for (uint32_t i = 0; i < out->pages; i++)
		if (out->iov[2 + i].iov_len)
			out->iov[out->iovs++] = out->iov[2 + i];
}

/* A checksum that is known to be right, or is none yet: the kernel gets it unfinished, as from a program on this
 * machine. So it verifies nothing, and finishes it only if the packet leaves the machine again. */
static void leave_checksum(struct pvf_net_packet *out, const struct pvf_packet *p)
{
	out->vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	out->vnet.csum_start = p->l4;
	out->vnet.csum_offset = p->csum;
	if (p->extensions) /* a routing header has the address that is summed */
		return;
	uint16_t sum = pvf_packet_pseudo(p, out->head);

	memcpy(out->head + p->l4 + p->csum, &sum, sizeof(sum));
}

static void offloads(struct packet *p, struct pvf_net_packet *out)
{
	const struct netif_extra_info *gso = &p->extra[XEN_NETIF_EXTRA_TYPE_GSO];
	bool blank = p->flags & NETRXF_csum_blank, large = p->extras_seen >> XEN_NETIF_EXTRA_TYPE_GSO & 1;
	struct pvf_packet what;

	if (!large && !blank && !(p->flags & NETRXF_data_validated))
		return;
	pvf_packet_parse(&what, out->head, (uint32_t)out->iov[1].iov_len, out->total);
	if (large) {
		uint8_t family = gso->u.gso.type == XEN_NETIF_GSO_TYPE_TCPV4   ? 4
				 : gso->u.gso.type == XEN_NETIF_GSO_TYPE_TCPV6 ? 6
									       : 0;
		if (!family || what.family != family || what.csum != 16 || !gso->u.gso.size ||
		    what.payload >= out->total) {
			refuse(p, PVF_DROP_GSO);
			return;
		}
		out->vnet.gso_type = family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
		out->vnet.gso_size = gso->u.gso.size;
		out->vnet.hdr_len = what.payload;
	}
	if (what.payload)
		leave_checksum(out, &what);
	else if (blank)
		refuse(p, PVF_DROP_CSUM);
}

static void give_pages(struct pvf_net_rx *rx, const struct pvf_net_packet *packet)
{
	for (uint32_t i = packet->pages; i-- > 0;)
		pvf_pool_give(&rx->pool, packet->page[i]);
}

/* For the trace: a packet that came, with the bytes of it that can still be found. */
static void note(struct pvf_net_rx *rx, const struct pvf_net_packet *out, const struct packet *p)
{
	const struct virtio_net_hdr *v = &out->vnet;
	struct pvf_trace_packet what = {
		.length = out->total,
		.way = 1,
		.dropped = (uint8_t)p->why,
		.slots = (uint16_t)out->slots,
		.gso_size = v->gso_size,
		.csum_start = v->csum_start,
		.csum_offset = v->csum_offset,
		.flags = v->flags,
		.gso_type = v->gso_type,
		.offered = (uint8_t)((p->flags & (NETRXF_csum_blank | NETRXF_data_validated) ? 1 : 0) |
				     (v->gso_type ? 2 : 0)),
	};

	pvf_trace_add(rx->trace, &what, &out->iov[1], p->headed);
}

bool pvf_net_rx_next(struct pvf_net_rx *rx, uint32_t *count, struct pvf_net_packet *out)
{
	struct packet p = {.why = PVF_DROPS};
	uint32_t before = *count;

	if (!*count || rx->fault.rule)
		return false;
	out->vnet = (struct virtio_net_hdr){0};
	out->total = out->pages = 0;
	gather(rx, count, &p, out);
	if (rx->fault.rule) {
		give_pages(rx, out);
		return false;
	}
	if (p.why == PVF_DROPS && out->total < PVF_ETH_HEADER)
		p.why = PVF_DROP_TOO_SMALL;
	if (p.why == PVF_DROPS && out->total > PVF_NET_LARGEST)
		p.why = PVF_DROP_TOO_LARGE;
	if (p.why == PVF_DROPS) {
		take_head(out);
		p.headed = true;
		offloads(&p, out);
	}
	out->slots = before - *count;
	if (rx->trace)
		note(rx, out, &p);
	if (p.why == PVF_DROPS)
		return true;
	rx->stats.dropped[p.why]++;
	give_pages(rx, out);
	return false;
}

void pvf_net_rx_done(struct pvf_net_rx *rx, const struct pvf_net_packet *packet, bool error)
{
	struct pvf_net_way *s = &rx->stats;

	give_pages(rx, packet);
	if (error) {
		s->dropped[PVF_DROP_TARGET]++;
		return;
	}
	pvf_net_count(s, packet->total);
	s->csum_left += !!packet->vnet.flags;
	if (packet->vnet.gso_type) {
		s->gso++;
		s->gso_bytes += packet->total;
	}
}
