/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the frontend receives: read from the TAP, put into its pages.
 */
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "netback_int.h"

/* Of a packet: its pages, and what it says of GSO and of its hash. With room before it, it has more pages, up to
 * XEN_NETIF_NR_SLOTS_MIN, and says so. */
#define MOST_SLOTS 18u
#define MOST_ROOMY (XEN_NETIF_NR_SLOTS_MIN + 3u)

static uint32_t most_slots(struct pvf_nb *nb)
{
	return LOAD(nb->headroom) || LOAD(nb->rules) ? MOST_ROOMY : MOST_SLOTS;
}

/* How many requests can be used; more than the ring has slots: the frontend broke the protocol. */
static uint32_t requests(struct nb_queue *q)
{
	RING_IDX prod = __atomic_load_n(&q->rx.sring->req_prod, __ATOMIC_SEQ_CST);
	uint32_t n = prod - q->rx.req_cons;

	if (prod - q->rx.rsp_prod_pvt > RING_SIZE(&q->rx)) {
		nb_fatal(q, "impossible number of empty pages", prod);
		return 0;
	}
	return n;
}

bool nb_rx_room(struct nb_queue *q)
{
	uint32_t most = most_slots(q->nb);

	if (requests(q) >= most)
		return true;
	__atomic_store_n(&q->rx.sring->req_event, q->rx.req_cons + most, __ATOMIC_SEQ_CST);
	return requests(q) >= most;
}

static void publish(struct nb_queue *q, RING_IDX old)
{
	struct netif_rx_sring *shared = q->rx.sring;
	RING_IDX new = q->rx.rsp_prod_pvt;
	uint64_t off;

	if (nb_fires(q->nb, PVF_NB_RX_PRODUCER, &off))
		new += (RING_IDX)off;
	__atomic_store_n(&shared->rsp_prod, new, __ATOMIC_SEQ_CST);
	RING_IDX event = __atomic_load_n(&shared->rsp_event, __ATOMIC_SEQ_CST);

	if ((RING_IDX)(new - event) < (RING_IDX)(new - old))
		nb_notify(q, true);
}

static void take(struct nb_queue *q, struct netif_rx_request *r)
{
	memcpy(r, RING_GET_REQUEST(&q->rx, q->rx.req_cons), sizeof(*r));
	__asm__ volatile("" ::: "memory"); /* nothing is read there again */
	q->rx.req_cons++;
	ADD(q->stats.rx_slots, 1);
}

/* A request is used up for each: the response has its slot. */
static void put_extra(struct nb_queue *q, const struct netif_extra_info *extra)
{
	struct netif_rx_request r;

	take(q, &r);
	memcpy(RING_GET_RESPONSE(&q->rx, q->rx.rsp_prod_pvt++), extra, sizeof(*extra));
}

static int16_t fill(struct nb_queue *q, const struct netif_rx_request *r, uint32_t room, const uint8_t *from,
		    uint32_t bytes)
{
	struct nb_access a;

	if (nb_page(q, r->gref, true, &a)) {
		ADD(q->stats.map_errors, 1);
		return NETIF_RSP_ERROR;
	}
	memcpy(a.page + room, from, bytes);
	nb_page_done(q, r->gref, &a);
	return (int16_t)bytes;
}

static void lie(struct nb_queue *q, struct netif_rx_response *rsp)
{
	uint64_t value;

	if (nb_fires(q->nb, PVF_NB_RX_ID, &value))
		rsp->id = (uint16_t)value;
	if (nb_fires(q->nb, PVF_NB_RX_OFFSET, &value))
		rsp->offset = (uint16_t)value;
	if (nb_fires(q->nb, PVF_NB_RX_STATUS, &value))
		rsp->status = (int16_t)value;
	if (nb_fires(q->nb, PVF_NB_RX_FLAGS, &value))
		rsp->flags ^= (uint16_t)value;
}

static void rewrite(struct nb_queue *q, const uint32_t *refs, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		unsigned char *page;

		if (pvf_peer_map(&q->nb->peer, refs[i], true, &page))
			continue;
		memset(page, 0xee, NB_PAGE);
		pvf_peer_unmap(&q->nb->peer, refs[i]);
	}
}

struct extras {
	struct netif_extra_info info[4];
	uint32_t count;
};

static uint8_t gso_of(const struct virtio_net_hdr *v)
{
	return v->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
}

/* What is said of a packet beside its bytes; `most`: slots that there are for it. */
static void say_more(struct nb_queue *q, const struct virtio_net_hdr *v,
		     const struct netif_extra_info *hash, uint32_t room, struct extras *e, uint32_t most)
{
	uint8_t gso = gso_of(v);
	uint64_t lie;

	e->count = 0;
	if (gso)
		e->info[e->count++] = (struct netif_extra_info){
			.type = XEN_NETIF_EXTRA_TYPE_GSO,
			.u.gso = {.size = v->gso_size,
				  .type = gso == VIRTIO_NET_HDR_GSO_TCPV4 ? XEN_NETIF_GSO_TYPE_TCPV4
									  : XEN_NETIF_GSO_TYPE_TCPV6}};
	if (room)
		e->info[e->count++] = (struct netif_extra_info){
			.type = NB_EXTRA_XDP, .u.pad = {(uint16_t)room}};
	if (hash->type)
		e->info[e->count++] = *hash;
	if (nb_fires(q->nb, PVF_NB_RX_EXTRA, &lie)) {
		uint32_t times = lie >> 32 & 7 ? (uint32_t)(lie >> 32 & 7) : 1;

		for (e->count = 0; e->count < times && e->count < most && e->count < 4; e->count++)
			e->info[e->count] = (struct netif_extra_info){
				.type = (uint8_t)lie,
				.u.gso = {.type = (uint8_t)(lie >> 8), .size = (uint16_t)(lie >> 16)}};
	}
	for (uint32_t i = 0; i + 1 < e->count; i++)
		e->info[i].flags |= XEN_NETIF_EXTRA_FLAG_MORE;
}

static void give(struct nb_queue *q, const struct nb_frame *f, uint32_t size,
		 const struct netif_extra_info *hash)
{
	const struct virtio_net_hdr *v = &f->vnet;
	uint32_t refs[XEN_NETIF_NR_SLOTS_MIN], room = LOAD(q->nb->headroom);
	RING_IDX old = q->rx.rsp_prod_pvt;
	struct extras extras;
	uint64_t asked, unused;

	if (nb_fires(q->nb, PVF_NB_RX_HEADROOM, &asked))
		room = asked < NB_PAGE / 2 ? (uint32_t)asked : NB_PAGE / 2;
	uint32_t each = NB_PAGE - room, pages = (size + each - 1) / each;

	if (pages > XEN_NETIF_NR_SLOTS_MIN) {
		ADD(q->stats.rx_dropped, 1);
		return;
	}
	say_more(q, v, hash, room, &extras, most_slots(q->nb) - pages);
	for (uint32_t i = 0; i < pages; i++) {
		uint32_t bytes = size - i * each < each ? size - i * each : each;
		struct netif_rx_request r;
		struct netif_rx_response *rsp;

		take(q, &r);
		refs[i] = r.gref;
		int16_t status = fill(q, &r, room, f->bytes + i * each, bytes);

		rsp = RING_GET_RESPONSE(&q->rx, q->rx.rsp_prod_pvt++);
		*rsp = (struct netif_rx_response){
			.id = r.id, .offset = (uint16_t)room, .status = status};
		if (i + 1 < pages)
			rsp->flags |= NETRXF_more_data;
		if (!i && v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
			rsp->flags |= NETRXF_csum_blank | NETRXF_data_validated;
		if (!i && extras.count)
			rsp->flags |= NETRXF_extra_info;
		lie(q, rsp);
		for (uint32_t n = 0; !i && n < extras.count; n++)
			put_extra(q, &extras.info[n]);
	}
	publish(q, old);
	ADD(q->stats.rx_packets, 1);
	ADD(q->stats.rx_bytes, size);
	ADD(q->stats.rx_gso, gso_of(v) != 0);
	ADD(q->stats.rx_roomy, room != 0);
	ADD(q->stats.rx_blank, v->flags != 0);
	if (nb_fires(q->nb, PVF_NB_RX_REWRITE, &unused))
		rewrite(q, refs, pages);
}

#define TURN 64 /* packets */

bool nb_rx(struct nb_queue *q)
{
	bool any = false;

	for (uint32_t n = 0; n < TURN && !LOAD(q->nb->broken); n++) {
		pthread_mutex_lock(&q->lock);
		bool room = nb_rx_room(q);

		pthread_mutex_unlock(&q->lock);
		if (!room)
			break;
		struct iovec iov[2] = {{&q->frame.vnet, sizeof(q->frame.vnet)},
				       {q->frame.bytes, NB_FRAME}};
		ssize_t got = readv(q->tap_fd, iov, 2);

		if (got < 0) {
			if (errno != EAGAIN && errno != EINTR)
				ADD(q->stats.tap_errors, 1);
			break;
		}
		any = true;
		size_t size = (size_t)got - sizeof(q->frame.vnet);

		if (size > XEN_NETIF_MAX_TX_SIZE || (size > NB_PAGE && !(q->nb->flags & PVF_NB_SG))) {
			ADD(q->stats.rx_dropped, 1);
			continue;
		}
		if (!nb_group_passes(q->nb, q->frame.bytes, (uint32_t)size)) {
			ADD(q->stats.multicast_filtered, 1);
			continue;
		}
		struct netif_extra_info hash;
		struct nb_queue *to = nb_steer(q, q->frame.bytes, (uint32_t)size, &hash);

		pthread_mutex_lock(&to->lock);
		ADD(to->stats.rx_steered, to != q);
		if (nb_rx_room(to))
			give(to, &q->frame, (uint32_t)size, &hash);
		else /* another queue's ring is full: dropped, as by a queue that is too long */
			ADD(to->stats.rx_dropped, 1);
		pthread_mutex_unlock(&to->lock);
	}
	return any;
}
