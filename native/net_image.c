/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A network's queue that another process had: is what it left possible? As blk_image.c asks of a disk's.
 */
#include <string.h>

#include "image.h"
#include "image_check.h"
#include "net_int.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>

static const char *check_pool(const struct pvf_pool *pool, uint32_t pages, bool *used)
{
	if (!pages || pages > PVF_MAX_POOL_PAGES || pool->pages != pages)
		return "the pool has another size";
	if (!pvf_image_bool(&pool->scrub) || !pvf_image_bool(&pool->quarantined))
		return "what is true or false is neither";
	if (pool->quarantined)
		return "the backend has broken its ring";
	return pvf_image_pool(pool, used);
}

static const char *all_held(const struct pvf_pool *pool, const bool *used)
{
	for (uint32_t i = 0; i < pool->pages; i++)
		if (used[i])
			return "a page is in use by nobody";
	return NULL;
}

static const char *check_cut(const struct pvf_net_tx *tx)
{
	const struct pvf_net_cut *c = &tx->cut;
	const struct pvf_packet *p = &c->what;

	if (!c->total)
		return tx->borrowed_count ? "pages are borrowed for no packet" : NULL;
	if (!pvf_image_bool(&c->leave) || !pvf_image_bool(&p->extensions))
		return "what is true or false is neither";
	if (c->total > PVF_NET_LARGEST || tx->borrowed_count > PVF_NET_PAGES ||
	    tx->borrowed_count != (c->total + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE)
		return "a packet that is cut has not its pages";
	if ((p->family != 4 && p->family != 6) || p->l3 < PVF_ETH_HEADER || p->l3 > PVF_PACKET_HEAD ||
	    p->l4 < p->l3 + 20u || (p->family == 6 && p->l4 < p->l3 + 40u) || p->l4 > PVF_PACKET_HEAD ||
	    p->payload < p->l4 + 20u || p->payload > p->l4 + 60u || p->payload > c->total ||
	    c->at < p->payload || c->at > c->total || !c->size ||
	    p->payload + c->size > pvf_net_tx_largest(tx))
		return "a packet that is cut is none";
	return NULL;
}

static const char *check_tx(const struct pvf_net_tx *tx, uint32_t pages)
{
	bool used[PVF_MAX_POOL_PAGES], busy[PVF_NET_RING];
	uint32_t in_flight = 0;
	const char *why = pvf_image_ring(&tx->ring, PVF_PAGE_SIZE, sizeof(union netif_tx_sring_entry));

	if (!why)
		why = check_pool(&tx->pool, pages, used);
	if (!why)
		why = check_cut(tx);
	if (why)
		return why;
	if (!pvf_image_mark(busy, PVF_NET_RING, tx->id, tx->ids))
		return "the free ids are impossible";
	for (uint32_t i = 0; i < PVF_NET_RING; i++) {
		if (busy[i] != (tx->page_of[i] != PVF_NONE))
			return "an id is free and in flight";
		if (!busy[i])
			continue;
		in_flight++;
		if (!pvf_image_hold(&tx->pool, used, tx->page_of[i]))
			return "a slot's page is not its own";
	}
	for (uint32_t i = 0; i < tx->borrowed_count; i++)
		if (!pvf_image_hold(&tx->pool, used, tx->borrowed[i]))
			return "a borrowed page is somebody else's";
	if (tx->in_flight != in_flight ||
	    tx->extras > PVF_NET_RING || tx->ring.req_prod_pvt - tx->ring.rsp_cons != in_flight + tx->extras)
		return "the slots in flight are not as many as the ring has";
	return all_held(&tx->pool, used);
}

static const char *check_rx(const struct pvf_net_rx *rx, uint32_t pages)
{
	bool used[PVF_MAX_POOL_PAGES];
	uint32_t in_ring = rx->ring.req_prod_pvt - rx->ring.rsp_cons;
	const char *why = pvf_image_ring(&rx->ring, PVF_PAGE_SIZE, sizeof(union netif_rx_sring_entry));

	if (!why)
		why = check_pool(&rx->pool, pages, used);
	if (why)
		return why;
	for (uint32_t i = 0; i < PVF_NET_RING; i++) {
		uint16_t page = rx->page_of[(rx->ring.rsp_cons + i) % PVF_NET_RING];

		if (i >= in_ring ? page != PVF_NONE : !pvf_image_hold(&rx->pool, used, page))
			return "a slot's page is not its own";
	}
	return all_held(&rx->pool, used);
}

const char *pvf_net_take_over(struct pvf_net_tx *tx, struct pvf_net_rx *rx, const struct pvf_image_net *image,
			      void *rings, size_t ring_bytes, void *pool, uint32_t pool_pages)
{
	const char *why = "the rings have another size";

	memcpy(tx, &image->tx, sizeof(*tx));
	memcpy(rx, &image->rx, sizeof(*rx));
	tx->groups = NULL;
	tx->trace = rx->trace = NULL;
	tx->fault.field = tx->fault.text = rx->fault.field = rx->fault.text = NULL;
	if (ring_bytes == (size_t)PVF_NET_RING_PAGES * PVF_PAGE_SIZE)
		why = tx->fault.rule || rx->fault.rule ? "the backend has broken its ring" : NULL;
	if (!why && tx->pool.pages >= pool_pages)
		why = "the pool has another size";
	if (!why)
		why = check_tx(tx, tx->pool.pages);
	if (!why)
		why = check_rx(rx, pool_pages - tx->pool.pages);
	if (why) {
		memset(tx, 0, sizeof(*tx));
		memset(rx, 0, sizeof(*rx));
		return why;
	}
	tx->ring.shared = rings;
	rx->ring.shared = (unsigned char *)rings + PVF_PAGE_SIZE;
	tx->pool.base = pool;
	rx->pool.base = (unsigned char *)pool + (size_t)tx->pool.pages * PVF_PAGE_SIZE;
	return NULL;
}
