/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The control ring: how received packets are steered to queues (as Linux's netback: xenvif_set_hash_*), and which
 * grants stay mapped (static grants of io/netif.h, which Linux's does not have).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "netback_int.h"

#define ALL_TYPES                                                                                       \
	(XEN_NETIF_CTRL_HASH_TYPE_IPV4 | XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP | XEN_NETIF_CTRL_HASH_TYPE_IPV6 | \
	 XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP)

/* Toeplitz */

static uint32_t toeplitz(const uint8_t *key, const uint8_t *data, uint32_t bytes)
{
	uint32_t window = (uint32_t)key[0] << 24 | (uint32_t)key[1] << 16 | (uint32_t)key[2] << 8 | key[3];
	uint32_t hash = 0;

	for (uint32_t i = 0; i < bytes; i++) {
		uint8_t next = i + 4 < NB_KEY ? key[i + 4] : 0;

		for (int bit = 7; bit >= 0; bit--) {
			if (data[i] >> bit & 1)
				hash ^= window;
			window = window << 1 | (next >> bit & 1);
		}
	}
	return hash;
}

/* What is hashed of a frame: 12 or 36 bytes with TCP's ports, 8 or 32 without. The type, or -1. */
static int flow(const struct nb_hash *h, const uint8_t *frame, uint32_t size, uint8_t *data, uint32_t *bytes)
{
	uint32_t kind = size < 14 ? 0 : (uint32_t)frame[12] << 8 | frame[13];
	bool six = kind == 0x86dd;
	uint32_t addresses = six ? 32 : 8, header = six ? 40 : 20, ports = 14 + header;

	if ((kind != 0x0800 && !six) || size < 14 + header)
		return -1;
	memcpy(data, frame + 14 + (six ? 8 : 12), addresses);
	if (!six)
		ports = 14 + (frame[14] & 15u) * 4;
	bool tcp = frame[14 + (six ? 6 : 9)] == 6 && ports + 4 <= size &&
		   (six || !((frame[20] & 0x3f) | frame[21]));
	int type = six ? _XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP : _XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP;

	*bytes = addresses;
	if (tcp && h->types >> type & 1) {
		memcpy(data + addresses, frame + ports, 4);
		*bytes = addresses + 4;
		return type;
	}
	type = six ? _XEN_NETIF_CTRL_HASH_TYPE_IPV6 : _XEN_NETIF_CTRL_HASH_TYPE_IPV4;
	return h->types >> type & 1 ? type : -1;
}

struct nb_queue *nb_steer(struct nb_queue *q, const uint8_t *frame, uint32_t size,
			  struct netif_extra_info *extra)
{
	struct pvf_nb *nb = q->nb;
	struct nb_queue *to = q;
	uint32_t bytes = 0;
	uint8_t data[36];

	extra->type = XEN_NETIF_EXTRA_TYPE_NONE;
	if (!LOAD(nb->hash.algorithm))
		return q;
	pthread_mutex_lock(&nb->lock);
	const struct nb_hash *h = &nb->hash;
	int type = h->algorithm ? flow(h, frame, size, data, &bytes) : -1;

	if (type >= 0) {
		uint32_t hash = toeplitz(h->key, data, bytes);
		uint32_t n = h->entries ? h->mapping[hash % h->entries] : hash % nb->queues;

		to = nb->queue[n < nb->queues ? n : 0];
		*extra = (struct netif_extra_info){
			.type = XEN_NETIF_EXTRA_TYPE_HASH,
			.u.hash = {.type = (uint8_t)type,
				   .algorithm = XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ}};
		memcpy(extra->u.hash.value, &hash, sizeof(hash));
	}
	pthread_mutex_unlock(&nb->lock);
	return to;
}

/* Requests. Each returns a status. */

static uint32_t copy_from(struct pvf_nb *nb, uint32_t ref, void *to, uint32_t bytes)
{
	unsigned char *page;

	if (pvf_peer_map(&nb->peer, ref, false, &page))
		return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	memcpy(to, page, bytes);
	pvf_peer_unmap(&nb->peer, ref);
	return XEN_NETIF_CTRL_STATUS_SUCCESS;
}

static uint32_t set_key(struct pvf_nb *nb, uint32_t ref, uint32_t bytes)
{
	uint8_t key[NB_KEY] = {0};
	uint32_t status = XEN_NETIF_CTRL_STATUS_SUCCESS;

	if (bytes > NB_KEY)
		return XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW;
	if (bytes)
		status = copy_from(nb, ref, key, bytes);
	if (status == XEN_NETIF_CTRL_STATUS_SUCCESS) {
		pthread_mutex_lock(&nb->lock);
		memcpy(nb->hash.key, key, sizeof(key));
		pthread_mutex_unlock(&nb->lock);
	}
	return status;
}

static uint32_t set_mapping(struct pvf_nb *nb, uint32_t ref, uint32_t count, uint32_t offset)
{
	uint32_t part[NB_MAPPING];

	if (offset + count < offset || offset + count > nb->hash.entries)
		return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	uint32_t status = copy_from(nb, ref, part, count * sizeof(*part));

	for (uint32_t i = 0; i < count && status == XEN_NETIF_CTRL_STATUS_SUCCESS; i++)
		if (part[i] >= nb->queues)
			status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	if (status == XEN_NETIF_CTRL_STATUS_SUCCESS) {
		pthread_mutex_lock(&nb->lock);
		memcpy(nb->hash.mapping + offset, part, count * sizeof(*part));
		pthread_mutex_unlock(&nb->lock);
	}
	return status;
}

static uint32_t set_hash(struct pvf_nb *nb, const struct xen_netif_ctrl_request *r)
{
	struct nb_hash *h = &nb->hash;
	uint32_t status = XEN_NETIF_CTRL_STATUS_SUCCESS, value = r->data[0];

	pthread_mutex_lock(&nb->lock);
	switch (r->type) {
	case XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM:
		if (value > XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ)
			status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
		else
			STORE(h->algorithm, value);
		break;
	case XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS:
		if (value & ~(uint32_t)ALL_TYPES || !h->algorithm)
			status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
		else
			h->types = value;
		break;
	default:
		if (value > NB_MAPPING) {
			status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
			break;
		}
		h->entries = value;
		memset(h->mapping, 0, sizeof(h->mapping));
	}
	pthread_mutex_unlock(&nb->lock);
	return status;
}

/* Static grants: nb_page() finds them. */

static void forget_ref(struct nb_queue *q, uint32_t ref)
{
	pvf_peer_unmap(&q->nb->peer, ref);
	q->kept[ref] = (struct nb_kept){0};
	q->kept_count--;
}

static bool keep_ref(struct nb_queue *q, const struct xen_netif_gref *g)
{
	bool writable = !(g->flags & XEN_NETIF_CTRLF_GREF_readonly);
	unsigned char *page;

	if (g->ref >= PVF_GRANTS || q->kept[g->ref].page || q->kept_count == q->nb->keep ||
	    pvf_peer_map(&q->nb->peer, g->ref, writable, &page))
		return false;
	q->kept[g->ref] = (struct nb_kept){page, writable};
	q->kept_count++;
	return true;
}

static uint32_t change_kept(struct pvf_nb *nb, const struct xen_netif_ctrl_request *r, uint32_t *done)
{
	bool add = r->type == XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING;
	uint32_t count = r->data[2], n = 0, status = XEN_NETIF_CTRL_STATUS_SUCCESS;
	struct xen_netif_gref list[NB_PAGE / sizeof(struct xen_netif_gref)];
	unsigned char *page;

	if (!nb->keep)
		return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED;
	if (r->data[0] >= nb->queues || count > sizeof(list) / sizeof(*list) ||
	    pvf_peer_map(&nb->peer, r->data[1], true, &page))
		return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	struct nb_queue *q = nb->queue[r->data[0]];

	memcpy(list, page, count * sizeof(*list)); /* shared: read once */
	pthread_mutex_lock(&q->lock);
	for (n = 0; add && n < count && keep_ref(q, &list[n]); n++)
		;
	if (add && n < count) { /* all or none */
		while (n)
			forget_ref(q, list[--n].ref);
		status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	}
	for (uint32_t i = 0; !add && i < count; i++) {
		bool kept = list[i].ref < PVF_GRANTS && q->kept[list[i].ref].page;

		list[i].status = kept ? XEN_NETIF_CTRL_STATUS_SUCCESS
				      : XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
		if (!kept)
			continue;
		forget_ref(q, list[i].ref);
		n++;
	}
	STORE(q->stats.kept, q->kept_count);
	pthread_mutex_unlock(&q->lock);
	if (!add)
		memcpy(page, list, count * sizeof(*list));
	pvf_peer_unmap(&nb->peer, r->data[1]);
	*done = add ? 0 : n;
	return status;
}

static uint32_t process(struct pvf_nb *nb, const struct xen_netif_ctrl_request *r, uint32_t *data)
{
	switch (r->type) {
	case XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM:
	case XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS:
	case XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE:
		return set_hash(nb, r);
	case XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS:
		if (!nb->hash.algorithm)
			return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED;
		*data = ALL_TYPES;
		return XEN_NETIF_CTRL_STATUS_SUCCESS;
	case XEN_NETIF_CTRL_TYPE_SET_HASH_KEY:
		return set_key(nb, r->data[0], r->data[1]);
	case XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE:
		*data = NB_MAPPING;
		return XEN_NETIF_CTRL_STATUS_SUCCESS;
	case XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING:
		return set_mapping(nb, r->data[0], r->data[1], r->data[2]);
	case XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE:
		if (!nb->keep)
			return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED;
		if (r->data[0] >= nb->queues)
			return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
		*data = nb->keep;
		return XEN_NETIF_CTRL_STATUS_SUCCESS;
	case XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING:
	case XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING:
		return change_kept(nb, r, data);
	default:
		return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED;
	}
}

/* The ring */

static void put(struct nb_ctrl *c, const struct xen_netif_ctrl_response *rsp)
{
	*RING_GET_RESPONSE(&c->ring, c->ring.rsp_prod_pvt++) = *rsp;
}

static void notify(struct nb_ctrl *c)
{
	pvf_channel_notify(c->end.channel, c->end.side, c->end.other_fd);
}

static void publish(struct pvf_nb *nb, RING_IDX old)
{
	struct nb_ctrl *c = &nb->ctrl;
	struct xen_netif_ctrl_sring *shared = c->ring.sring;
	RING_IDX new = c->ring.rsp_prod_pvt;
	uint64_t value;

	if (nb_fires(nb, PVF_NB_CTRL_PRODUCER, &value))
		new += (RING_IDX)value;
	__atomic_store_n(&shared->rsp_prod, new, __ATOMIC_SEQ_CST);
	RING_IDX event = __atomic_load_n(&shared->rsp_event, __ATOMIC_SEQ_CST);

	if ((RING_IDX)(new - event) < (RING_IDX)(new - old) && !nb_fires(nb, PVF_NB_CTRL_SILENT, &value))
		notify(c);
}

/* The page that a request names, if it does. */
static void scribble(struct pvf_nb *nb, const struct xen_netif_ctrl_request *r)
{
	bool greferences = r->type == XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING ||
			   r->type == XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING;
	uint32_t ref = r->data[greferences];
	unsigned char *page;

	if (!greferences && r->type != XEN_NETIF_CTRL_TYPE_SET_HASH_KEY &&
	    r->type != XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING)
		return;
	if (pvf_peer_map(&nb->peer, ref, true, &page))
		return;
	memset(page, 0xee, NB_PAGE);
	pvf_peer_unmap(&nb->peer, ref);
}

/* The answer, or what the rules make of it. */
static void answer(struct pvf_nb *nb, const struct xen_netif_ctrl_request *r, uint32_t status, uint32_t data)
{
	struct nb_ctrl *c = &nb->ctrl;
	struct xen_netif_ctrl_response rsp = {.id = r->id, .type = r->type, .status = status, .data = data};
	RING_IDX old = c->ring.rsp_prod_pvt;
	uint64_t value;

	if (nb_fires_of(nb, PVF_NB_CTRL_SCRIBBLE, r->type, &value))
		scribble(nb, r);
	if (nb_fires_of(nb, PVF_NB_CTRL_DROP, r->type, &value))
		return;
	if (nb_fires_of(nb, PVF_NB_CTRL_ID, r->type, &value))
		rsp.id = (uint16_t)value;
	if (nb_fires_of(nb, PVF_NB_CTRL_TYPE, r->type, &value))
		rsp.type = (uint16_t)value;
	if (nb_fires_of(nb, PVF_NB_CTRL_STATUS, r->type, &value))
		rsp.status = (uint32_t)value;
	if (nb_fires_of(nb, PVF_NB_CTRL_DATA, r->type, &value))
		rsp.data = (uint32_t)value;
	if (c->holds < sizeof(c->held) / sizeof(*c->held) &&
	    nb_fires_of(nb, PVF_NB_CTRL_HOLD, r->type, &value)) {
		c->held[c->holds++] = rsp;
		return;
	}
	put(c, &rsp);
	if (nb_fires_of(nb, PVF_NB_CTRL_DUPLICATE, r->type, &value))
		put(c, &rsp);
	publish(nb, old);
}

static void serve(struct pvf_nb *nb)
{
	struct nb_ctrl *c = &nb->ctrl;
	struct xen_netif_ctrl_sring *shared = c->ring.sring;

	if (__atomic_exchange_n(&c->release, false, __ATOMIC_ACQ_REL) && c->holds) {
		RING_IDX old = c->ring.rsp_prod_pvt;

		for (uint32_t i = 0; i < c->holds; i++)
			put(c, &c->held[i]);
		c->holds = 0;
		publish(nb, old);
	}
	for (;;) {
		RING_IDX prod = __atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST);

		if (prod - c->ring.rsp_prod_pvt > RING_SIZE(&c->ring) ||
		    prod - c->ring.req_cons > RING_SIZE(&c->ring))
			return; /* nothing of it can be believed: it is served no more */
		if (prod == c->ring.req_cons) {
			__atomic_store_n(&shared->req_event, prod + 1, __ATOMIC_SEQ_CST);
			if (__atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST) == prod)
				return;
			continue;
		}
		struct xen_netif_ctrl_request r;
		uint32_t data = 0;

		memcpy(&r, RING_GET_REQUEST(&c->ring, c->ring.req_cons++), sizeof(r));
		__asm__ volatile("" ::: "memory"); /* nothing is read there again */
		uint32_t status = process(nb, &r, &data);

		ADD(c->requests, 1);
		ADD(c->refused, status != XEN_NETIF_CTRL_STATUS_SUCCESS);
		answer(nb, &r, status, data);
	}
}

static void *ctrl_main(void *arg)
{
	struct pvf_nb *nb = arg;
	struct nb_ctrl *c = &nb->ctrl;
	struct epoll_event events[2];
	uint64_t value;

	for (;;) {
		serve(nb);
		if (c->end.delivered)
			pvf_channel_unmask(c->end.channel, c->end.side, c->end.own_fd);
		if (__atomic_load_n(&nb->stop, __ATOMIC_ACQUIRE))
			return NULL;
		bool storm = nb_fires(nb, PVF_NB_CTRL_STORM, &value);

		if (storm)
			notify(c);
		epoll_wait(c->epoll_fd, events, 2, storm ? 1 : -1);
		if (read(c->ctl_fd, &value, sizeof(value)) < 0)
			value = 0; /* nobody has written */
		c->end.delivered = pvf_channel_take(c->end.channel, c->end.side, -1);
	}
}

static void poke(struct nb_ctrl *c)
{
	const uint64_t one = 1;

	if (c->started && write(c->ctl_fd, &one, sizeof(one)) < 0)
		abort(); /* an eventfd of our own */
}

void nb_ctrl_release(struct pvf_nb *nb)
{
	__atomic_store_n(&nb->ctrl.release, true, __ATOMIC_RELEASE);
	poke(&nb->ctrl);
}

static int fail(char *why, int error, const char *what)
{
	snprintf(why, PVF_NB_TEXT, "%s: %s", what, strerror(-error));
	return error;
}

int pvf_nb_control(struct pvf_nb *nb, uint32_t ref, const struct pvf_nb_channel *channel, char *why)
{
	struct nb_ctrl *c = &nb->ctrl;
	uint32_t failed;
	void *shared;
	int rc;

	if (!nb->connected || c->there)
		return fail(why, -EINVAL, "no control ring now");
	*c = (struct nb_ctrl){.ref = ref, .there = true, .ctl_fd = -1, .epoll_fd = -1};
	c->end.own_fd = c->end.other_fd = -1;
	rc = pvf_peer_map_ring(&nb->peer, &ref, 1, &shared, &failed);
	if (rc)
		return fail(why, rc, "mapping ctrl-ring-ref");
	c->shared = shared;
	struct xen_netif_ctrl_sring *ring = shared;
	RING_IDX at = __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE);

	BACK_RING_ATTACH(&c->ring, ring, at, NB_PAGE);
	rc = pvf_channel_map(channel->channel_fd, &c->end.channel);
	if (rc)
		return fail(why, rc, "mapping the control ring's event channel");
	c->end.side = channel->side;
	c->end.own_fd = dup(channel->own_fd);
	c->end.other_fd = dup(channel->other_fd);
	c->ctl_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	c->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event own = {.events = EPOLLIN | EPOLLET}, ctl = {.events = EPOLLIN};

	if (c->end.own_fd < 0 || c->end.other_fd < 0 || c->ctl_fd < 0 || c->epoll_fd < 0 ||
	    epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, c->end.own_fd, &own) ||
	    epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, c->ctl_fd, &ctl))
		return fail(why, -errno, "the control ring's descriptors");
	return 0;
}

int nb_ctrl_start(struct pvf_nb *nb)
{
	int rc = nb->ctrl.there ? -pthread_create(&nb->ctrl.thread, NULL, ctrl_main, nb) : 0;

	nb->ctrl.started = nb->ctrl.there && !rc;
	return rc;
}

void nb_ctrl_stop(struct pvf_nb *nb)
{
	struct nb_ctrl *c = &nb->ctrl;

	if (!c->there)
		return;
	poke(c);
	if (c->started)
		pthread_join(c->thread, NULL);
	nb->ended.ctrl_requests += c->requests;
	nb->ended.ctrl_refused += c->refused;
	if (c->end.channel)
		pvf_channel_unmap(c->end.channel);
	if (c->shared)
		pvf_mapper_unmap(&nb->peer.mapper, &c->ref, 1, c->shared);
	int fds[] = {c->end.own_fd, c->end.other_fd, c->ctl_fd, c->epoll_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	*c = (struct nb_ctrl){0};
}

int nb_kept_new(struct nb_queue *q)
{
	if (!q->nb->keep)
		return 0;
	q->kept = calloc(PVF_GRANTS, sizeof(*q->kept));
	return q->kept ? 0 : -ENOMEM;
}

void nb_kept_free(struct nb_queue *q)
{
	for (uint32_t ref = 0; q->kept && q->kept_count && ref < PVF_GRANTS; ref++)
		if (q->kept[ref].page)
			forget_ref(q, ref);
	free(q->kept);
	q->kept = NULL;
}

int nb_page(struct nb_queue *q, uint32_t ref, bool writable, struct nb_access *a)
{
	const struct nb_kept *k = q->kept && ref < PVF_GRANTS ? &q->kept[ref] : NULL;

	a->kept = k && k->page && (k->writable || !writable);
	if (!a->kept)
		return pvf_peer_map(&q->nb->peer, ref, writable, &a->page);
	a->page = k->page;
	ADD(q->stats.kept_hits, 1);
	return 0;
}

void nb_page_done(struct nb_queue *q, uint32_t ref, const struct nb_access *a)
{
	if (!a->kept)
		pvf_peer_unmap(&q->nb->peer, ref);
}
