/* SPDX-License-Identifier: BSD-2-Clause
 *
 * An engine that another process had: is what it left possible?
 *
 * Not a defence against that process, which had the same rights: it is so that a mistake in either
 * program ends in a refusal, after which the old worker goes on, and not in writes to the wrong
 * place. Everything that is an index is within its table, each page and each entry has one holder,
 * and the counts agree with what they count.
 */
#include "blk_int.h"
#include "image.h"
#include "image_check.h"

#include <string.h>

#include <linux/nbd.h>
#include <xen/xen.h>
#include <xen/io/blkif.h>

#define INDEX_MASK 0xffffu

uint64_t pvf_image_shape(void)
{
	const size_t parts[] = {
		sizeof(struct pvf_image), offsetof(struct pvf_image, state),
		sizeof(struct pvf_image_queue), offsetof(struct pvf_image_queue, serving),
		offsetof(struct pvf_image_queue, blk), sizeof(struct pvf_port_image),
		sizeof(struct pvf_unread), sizeof(struct pvf_ring), sizeof(struct pvf_geometry),
		sizeof(struct pvf_fault), sizeof(struct pvf_pool),
		offsetof(struct pvf_pool, gref), offsetof(struct pvf_pool, next),
		offsetof(struct pvf_pool, state), sizeof(struct pvf_blk),
		offsetof(struct pvf_blk, features_off), offsetof(struct pvf_blk, serial),
		offsetof(struct pvf_blk, filling), offsetof(struct pvf_blk, flush),
		offsetof(struct pvf_blk, reply), offsetof(struct pvf_blk, free_request),
		offsetof(struct pvf_blk, free_piece), offsetof(struct pvf_blk, request),
		offsetof(struct pvf_blk, piece), offsetof(struct pvf_blk, stats),
		sizeof(struct pvf_request), offsetof(struct pvf_request, sector),
		offsetof(struct pvf_request, type), offsetof(struct pvf_request, reply_sent),
		sizeof(struct pvf_image_net), offsetof(struct pvf_image_net, rx),
		offsetof(struct pvf_image_net, ended), sizeof(struct pvf_net_tx),
		offsetof(struct pvf_net_tx, page_of), offsetof(struct pvf_net_tx, cut),
		offsetof(struct pvf_net_tx, stats), sizeof(struct pvf_net_cut), sizeof(struct pvf_packet),
		sizeof(struct pvf_net_rx), offsetof(struct pvf_net_rx, stats),
		sizeof(struct pvf_net_way), sizeof(struct pvf_group_set), sizeof(struct pvf_group),
		offsetof(struct pvf_image, groups),
		sizeof(struct pvf_piece), offsetof(struct pvf_piece, request),
		offsetof(struct pvf_piece, descriptors), sizeof(struct pvf_blk_stats),
	};
	uint64_t hash = 14695981039346656037ull; /* FNV-1a, of words */

	for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++)
		hash = (hash ^ parts[i]) * 1099511628211ull;
	return hash;
}

/* What of the tables has a holder. */
struct used {
	bool request[PVF_REQUESTS];
	bool piece[PVF_PIECES];
	bool page[PVF_MAX_POOL_PAGES];
	uint16_t outstanding[PVF_REQUESTS]; /* as the pieces have it */
	bool listed[PVF_PIECES];
};

static bool good_bools(const struct pvf_blk *blk)
{
	bool good = pvf_image_bool(&blk->pool.scrub) && pvf_image_bool(&blk->pool.quarantined);

	for (uint32_t i = 0; good && i < PVF_PIECES; i++)
		good = pvf_image_bool(&blk->piece[i].in_flight) && pvf_image_bool(&blk->piece[i].done);
	for (uint32_t i = 0; good && i < PVF_REQUESTS; i++) {
		const struct pvf_request *r = &blk->request[i];

		good = pvf_image_bool(&r->fua) && pvf_image_bool(&r->stream) && pvf_image_bool(&r->queued) &&
		       pvf_image_bool(&r->orphan);
	}
	return good;
}

static const char *check_limits(const struct pvf_blk *blk)
{
	const struct pvf_geometry *g = &blk->geo;

	if (g->sector_size < 512 || g->sector_size > 4096 || g->sector_size & (g->sector_size - 1) ||
	    g->sectors > INT64_MAX / 512)
		return "the disk's numbers are impossible";
	if (!blk->segments_max || blk->segments_max > PVF_BLK_SEGMENTS || !blk->least ||
	    blk->least > blk->segments_max || blk->reserve > blk->pool.pages)
		return "the limits of a piece are impossible";
	return NULL;
}

static const char *check_pages(const struct pvf_blk *blk, struct used *u)
{
	const struct pvf_pool *pool = &blk->pool;

	const char *why = pvf_image_pool(pool, u->page);

	if (why)
		return why;
	for (uint32_t i = 0; i < PVF_PIECES; i++) {
		const struct pvf_piece *p = &blk->piece[i];
		uint16_t page = p->first;

		if (!u->piece[i])
			continue;
		if (p->pages > PVF_BLK_SEGMENTS)
			return "a piece is too large";
		for (uint32_t k = 0; k < p->pages; k++, page = pool->next[page])
			if (!pvf_image_hold(pool, u->page, page))
				return "a piece's pages are not its own";
		if (p->descriptors != PVF_NONE && !pvf_image_hold(pool, u->page, p->descriptors))
			return "a piece's descriptors are not its own";
	}
	for (uint32_t i = 0; i < pool->pages; i++)
		if (u->page[i])
			return "a page is in use by nobody";
	return NULL;
}

static const char *check_pieces(const struct pvf_blk *blk, struct used *u)
{
	uint32_t in_flight = 0;

	if (!pvf_image_mark(u->piece, PVF_PIECES, blk->free_piece, blk->free_pieces))
		return "the free pieces are impossible";
	for (uint32_t i = 0; i < PVF_PIECES; i++) {
		const struct pvf_piece *p = &blk->piece[i];

		if (!u->piece[i]) {
			if (p->in_flight)
				return "a free piece is in the ring";
			continue;
		}
		if (p->request >= PVF_REQUESTS || !u->request[p->request])
			return "a piece belongs to no request";
		if (p->sent > p->bytes ||
		    (p->op <= BLKIF_OP_WRITE &&
		     (p->bytes - p->sent / PVF_PAGE_SIZE * PVF_PAGE_SIZE + PVF_PAGE_SIZE - 1) /
				     PVF_PAGE_SIZE != p->pages))
			return "a piece has pages for other bytes than its own";
		if (!p->in_flight)
			continue;
		if ((p->id & INDEX_MASK) != i || p->id >> 16 > blk->serial)
			return "a piece in the ring has an id of another";
		in_flight++;
		u->outstanding[p->request]++;
	}
	if (in_flight != blk->in_flight ||
	    in_flight != blk->ring.req_prod_pvt - blk->ring.rsp_cons)
		return "the pieces in the ring are not as many as the ring has";
	return NULL;
}

/* A read's pieces that are not yet sent. */
static bool good_list(const struct pvf_blk *blk, struct used *u, uint16_t index)
{
	const struct pvf_request *r = &blk->request[index];
	uint16_t last = PVF_NONE;

	for (uint16_t k = r->first; k != PVF_NONE; k = blk->piece[k].next) {
		if (k >= PVF_PIECES || !u->piece[k] || u->listed[k] || blk->piece[k].request != index)
			return false;
		u->listed[k] = true;
		last = k;
	}
	return last == r->last;
}

static const char *check_requests(const struct pvf_blk *blk, struct used *u)
{
	uint32_t waited_for = 0;

	for (uint32_t i = 0; i < PVF_REQUESTS; i++) {
		const struct pvf_request *r = &blk->request[i];

		if (!u->request[i])
			continue;
		if (r->type != NBD_CMD_READ && r->type != NBD_CMD_WRITE &&
		    r->type != NBD_CMD_FLUSH && r->type != NBD_CMD_TRIM && !(r->error && r->queued))
			return "a request is of no known type"; /* and was not refused for that */
		if (r->outstanding != u->outstanding[i])
			return "a request waits for more or fewer answers than it has pieces";
		if (r->issued > r->bytes || r->to_send > r->bytes || r->reply_sent > PVF_NBD_REPLY)
			return "a request has got further than its end";
		if (!good_list(blk, u, (uint16_t)i))
			return "a read's pieces are no list of its own";
		waited_for += !r->orphan;
	}
	if (waited_for != blk->pending)
		return "the requests are not as many as are pending";
	return NULL;
}

static bool good_queue(const struct used *u, const uint16_t *queue, uint32_t head, uint32_t count)
{
	bool seen[PVF_REQUESTS] = {false};

	if (head >= PVF_REQUESTS || count > PVF_REQUESTS)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		uint16_t index = queue[(head + i) % PVF_REQUESTS];

		if (index >= PVF_REQUESTS || !u->request[index] || seen[index])
			return false;
		seen[index] = true;
	}
	return true;
}

static const char *check_intake(const struct pvf_blk *blk, const struct used *u)
{
	uint32_t prepared = 0;

	if (blk->current != PVF_NONE &&
	    (blk->current >= PVF_REQUESTS || !u->request[blk->current] || blk->skip))
		return "the request at intake is none";
	if (blk->fillings > PVF_BLK_FILLING || (blk->fillings && blk->current == PVF_NONE))
		return "payload is received for no request";
	for (uint32_t i = 0; i < blk->fillings; i++) {
		uint16_t k = blk->filling[i];

		if (k >= PVF_PIECES || !u->piece[k] || blk->piece[k].in_flight ||
		    blk->piece[k].request != blk->current)
			return "payload is received into no piece";
		for (uint32_t j = 0; j < i; j++)
			if (blk->filling[j] == k)
				return "payload is received twice into one piece";
		prepared += blk->piece[k].bytes;
	}
	if (prepared != blk->prepared || blk->filled > prepared)
		return "payload has come for which there is no room";
	if (!good_queue(u, blk->flush, blk->flush_head, blk->flush_count) ||
	    !good_queue(u, blk->reply, blk->reply_head, blk->reply_count))
		return "a queue of requests is impossible";
	return NULL;
}

static const char *check(const struct pvf_blk *blk, size_t ring_bytes, uint32_t pool_pages)
{
	struct used u = {.outstanding = {0}};
	const char *why = pvf_image_ring(&blk->ring, ring_bytes, sizeof(union blkif_sring_entry));

	if (why)
		return why;
	if (!good_bools(blk))
		return "what is true or false is neither";
	if (blk->fault.rule || blk->pool.quarantined)
		return "the backend has broken its ring";
	if (blk->pool.pages != pool_pages)
		return "the pool has another size";
	if (!pvf_image_mark(u.request, PVF_REQUESTS, blk->free_request, blk->free_requests))
		return "the free requests are impossible";
	why = check_limits(blk);
	if (!why)
		why = check_pieces(blk, &u);
	if (!why)
		why = check_pages(blk, &u);
	if (!why)
		why = check_requests(blk, &u);
	if (!why)
		why = check_intake(blk, &u);
	return why;
}

const char *pvf_blk_take_over(struct pvf_blk *blk, const struct pvf_blk *image, void *ring,
			      size_t ring_bytes, void *pool, uint32_t pool_pages)
{
	memcpy(blk, image, sizeof(*blk));
	blk->ring.shared = ring;
	blk->pool.base = pool;
	blk->fault.field = blk->fault.text = NULL;
	const char *why = check(blk, ring_bytes, pool_pages);

	if (why)
		pvf_blk_init(blk);
	return why;
}
