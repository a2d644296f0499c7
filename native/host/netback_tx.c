/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the frontend sends: taken, checked, written to the TAP, answered.
 */
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "netback_int.h"

#define LEAST 14u

/* Responses */

static void publish(struct nb_queue *q)
{
	struct netif_tx_sring *shared = q->tx.sring;
	RING_IDX old = q->tx_published, new = q->tx.rsp_prod_pvt;
	uint64_t off;

	if (old == new)
		return;
	if (nb_fires(q->nb, PVF_NB_PRODUCER, &off))
		new += (RING_IDX)off;
	/* RING_PUSH_RESPONSES_AND_CHECK_NOTIFY: rsp_event is read after rsp_prod is seen. */
	__atomic_store_n(&shared->rsp_prod, new, __ATOMIC_SEQ_CST);
	q->tx_published = q->tx.rsp_prod_pvt;
	RING_IDX event = __atomic_load_n(&shared->rsp_event, __ATOMIC_SEQ_CST);

	if ((RING_IDX)(new - event) < (RING_IDX)(new - old))
		nb_notify(q, false);
}

static void put(struct nb_queue *q, uint16_t id, int16_t status)
{
	struct netif_tx_response *r = RING_GET_RESPONSE(&q->tx, q->tx.rsp_prod_pvt++);

	r->id = id;
	r->status = status;
}

static void respond(struct nb_queue *q, uint16_t id, int16_t status)
{
	uint64_t value;

	if (nb_fires(q->nb, PVF_NB_TX_DROP, &value))
		return;
	if (nb_fires(q->nb, PVF_NB_TX_ID, &value))
		id = (uint16_t)value;
	if (nb_fires(q->nb, PVF_NB_TX_STATUS, &value))
		status = (int16_t)value;
	put(q, id, status);
	if (nb_fires(q->nb, PVF_NB_TX_DUPLICATE, &value))
		put(q, id, status);
}

/* Requests */

struct packet {
	struct netif_tx_request slot[NB_SLOTS_FATAL];
	uint32_t slots, extras;
	struct netif_extra_info extra[XEN_NETIF_EXTRA_TYPE_MAX];
	bool has[XEN_NETIF_EXTRA_TYPE_MAX];
};

static void answer(struct nb_queue *q, const struct packet *p, int16_t status)
{
	for (uint32_t i = 0; i < p->slots; i++) {
		respond(q, p->slot[i].id, status);
		for (uint32_t extra = 0; !i && extra < p->extras; extra++)
			RING_GET_RESPONSE(&q->tx, q->tx.rsp_prod_pvt++)->status = NETIF_RSP_NULL;
	}
}

static bool next_request(struct nb_queue *q, RING_IDX prod, struct netif_tx_request *r)
{
	if (q->tx.req_cons == prod)
		return false;
	memcpy(r, RING_GET_REQUEST(&q->tx, q->tx.req_cons), sizeof(*r));
	__asm__ volatile("" ::: "memory"); /* nothing is read there again */
	q->tx.req_cons++;
	return true;
}

static bool take_extras(struct nb_queue *q, RING_IDX prod, struct packet *p)
{
	struct netif_extra_info extra;
	struct netif_tx_request r;

	do {
		if (!next_request(q, prod, &r)) {
			nb_fatal(q, "missing extra info", p->extras);
			return false;
		}
		memcpy(&extra, &r, sizeof(extra));
		p->extras++;
		if (!extra.type || extra.type >= XEN_NETIF_EXTRA_TYPE_MAX) {
			nb_fatal(q, "invalid extra type", extra.type);
			return false;
		}
		p->extra[extra.type] = extra;
		p->has[extra.type] = true;
	} while (extra.flags & XEN_NETIF_EXTRA_FLAG_MORE);
	return true;
}

/* All slots of the next packet. False: the frontend broke the protocol. */
static bool take(struct nb_queue *q, RING_IDX prod, struct packet *p)
{
	memset(p, 0, sizeof(*p));
	next_request(q, prod, &p->slot[p->slots++]);
	if (p->slot[0].flags & NETTXF_extra_info && !take_extras(q, prod, p))
		return false;
	while (p->slot[p->slots - 1].flags & NETTXF_more_data) {
		struct netif_tx_request *r = &p->slot[p->slots];

		if (p->slots == NB_SLOTS_FATAL) {
			nb_fatal(q, "malicious frontend using too many slots", p->slots);
			return false;
		}
		if (!next_request(q, prod, r)) {
			nb_fatal(q, "asked for more slots than there are", p->slots);
			return false;
		}
		p->slots++;
		if ((uint32_t)r->offset + r->size > NB_PAGE) {
			nb_fatal(q, "a slot crosses a page", r->offset);
			return false;
		}
		if (!r->size) {
			nb_fatal(q, "an empty slot", p->slots);
			return false;
		}
	}
	return true;
}

/* Counts a value in what lies in a granted page outside the packet's bytes. */
static void look(struct nb_queue *q, const uint8_t *page, uint32_t from, uint32_t to, uint64_t value)
{
	for (uint32_t at = 0; at + sizeof(value) <= NB_PAGE; at++)
		if ((at + sizeof(value) <= from || at >= to) &&
		    !memcmp(page + at, &value, sizeof(value)))
			ADD(q->stats.canaries, 1);
}

static bool copy(struct nb_queue *q, const struct packet *p, uint32_t size)
{
	uint32_t at = 0, rest = 0;
	uint64_t canary;
	bool looks = nb_fires(q->nb, PVF_NB_TX_LOOK, &canary);

	for (uint32_t i = 1; i < p->slots; i++)
		rest += p->slot[i].size;
	for (uint32_t i = 0; i < p->slots; i++) {
		const struct netif_tx_request *r = &p->slot[i];
		uint32_t bytes = i ? r->size : size - rest;
		struct nb_access a;

		if (nb_page(q, r->gref, false, &a)) {
			ADD(q->stats.map_errors, 1);
			return false;
		}
		memcpy(q->frame.bytes + at, a.page + r->offset, bytes);
		if (looks)
			look(q, a.page, r->offset, r->offset + bytes, canary);
		nb_page_done(q, r->gref, &a);
		at += bytes;
	}
	return true;
}

/* What Linux's netback makes of a packet's flags. False: it cannot be. */
static bool describe(struct nb_queue *q, const struct packet *p, uint32_t size)
{
	struct virtio_net_hdr *v = &q->frame.vnet;
	bool blank = p->slot[0].flags & NETTXF_csum_blank;
	uint16_t start, offset;

	memset(v, 0, sizeof(*v));
	if (!blank && !p->has[XEN_NETIF_EXTRA_TYPE_GSO])
		return true;
	if (!nb_find_checksum(q->frame.bytes, size, &start, &offset))
		return false;
	v->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	v->csum_start = start;
	v->csum_offset = offset;
	if (p->has[XEN_NETIF_EXTRA_TYPE_GSO]) {
		const struct netif_extra_info *gso = &p->extra[XEN_NETIF_EXTRA_TYPE_GSO];

		if (offset != 16 || start + 20u > size)
			return false;
		v->gso_type = gso->u.gso.type == XEN_NETIF_GSO_TYPE_TCPV4 ? VIRTIO_NET_HDR_GSO_TCPV4
									 : VIRTIO_NET_HDR_GSO_TCPV6;
		v->gso_size = gso->u.gso.size;
		v->hdr_len = (uint16_t)(start + (q->frame.bytes[start + 12] >> 4) * 4);
	}
	return true;
}

static void write_to_tap(struct nb_queue *q, uint32_t size)
{
	struct iovec iov[2] = {{&q->frame.vnet, sizeof(q->frame.vnet)}, {q->frame.bytes, size}};

	if (writev(q->tap_fd, iov, 2) < 0) {
		ADD(q->stats.tap_errors, 1);
		return;
	}
	ADD(q->stats.tx_packets, 1);
	ADD(q->stats.tx_bytes, size);
	ADD(q->stats.tx_gso, q->frame.vnet.gso_type != 0);
	ADD(q->stats.tx_blank, q->frame.vnet.flags != 0);
}

/* Amends the list of multicast addresses; nothing is passed on. */
static void change_groups(struct nb_queue *q, const struct packet *p)
{
	bool add = p->has[XEN_NETIF_EXTRA_TYPE_MCAST_ADD], done = true;

	if (add)
		done = nb_group_add(q->nb, p->extra[XEN_NETIF_EXTRA_TYPE_MCAST_ADD].u.mcast.addr);
	else
		nb_group_delete(q->nb, p->extra[XEN_NETIF_EXTRA_TYPE_MCAST_DEL].u.mcast.addr);
	ADD(q->stats.multicast_added, add && done);
	ADD(q->stats.multicast_deleted, !add);
	ADD(q->stats.multicast_refused, !done);
	answer(q, p, done ? NETIF_RSP_OKAY : NETIF_RSP_ERROR);
}

/* A packet that is whole: passed on, or refused. False: the frontend broke the protocol. */
static bool handle(struct nb_queue *q, const struct packet *p)
{
	uint32_t size = p->slot[0].size, rest = 0;
	int16_t status = NETIF_RSP_ERROR;

	ADD(q->stats.tx_slots, p->slots + p->extras);
	if (p->has[XEN_NETIF_EXTRA_TYPE_MCAST_ADD] || p->has[XEN_NETIF_EXTRA_TYPE_MCAST_DEL]) {
		change_groups(q, p);
		return true;
	}
	for (uint32_t i = 1; i < p->slots; i++)
		rest += p->slot[i].size;
	if (p->has[XEN_NETIF_EXTRA_TYPE_GSO]) {
		const struct netif_extra_info *gso = &p->extra[XEN_NETIF_EXTRA_TYPE_GSO];

		if (!gso->u.gso.size || !gso->u.gso.type || gso->u.gso.type > XEN_NETIF_GSO_TYPE_TCPV6) {
			nb_fatal(q, "GSO without a size or of an unknown type", gso->u.gso.type);
			return false;
		}
	}
	if (size >= LEAST && rest < size && p->slots <= XEN_NETIF_NR_SLOTS_MIN) {
		if (p->slot[0].offset + size - rest > NB_PAGE) {
			nb_fatal(q, "the first slot crosses a page", p->slot[0].offset);
			return false;
		}
		if (copy(q, p, size) && describe(q, p, size)) {
			status = NETIF_RSP_OKAY;
			write_to_tap(q, size);
		}
	}
	if (status != NETIF_RSP_OKAY)
		ADD(q->stats.tx_rejected, 1);
	answer(q, p, status);
	return true;
}

bool nb_tx(struct nb_queue *q)
{
	struct netif_tx_sring *shared = q->tx.sring;
	bool any = false;
	struct packet p;

	while (!LOAD(q->nb->broken)) {
		RING_IDX prod = __atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST);

		if (prod - q->tx.rsp_prod_pvt > RING_SIZE(&q->tx) ||
		    prod - q->tx.req_cons > RING_SIZE(&q->tx)) {
			nb_fatal(q, "impossible number of requests", prod);
			break;
		}
		if (prod == q->tx.req_cons) {
			publish(q);
			/* RING_FINAL_CHECK_FOR_REQUESTS */
			__atomic_store_n(&shared->req_event, prod + 1, __ATOMIC_SEQ_CST);
			if (__atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST) == prod)
				break;
			continue;
		}
		any = true;
		if (!take(q, prod, &p) || !handle(q, &p))
			break;
		if (q->tx.rsp_prod_pvt - q->tx_published >= 32)
			publish(q);
	}
	return any;
}
