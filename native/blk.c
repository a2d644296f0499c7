/* SPDX-License-Identifier: BSD-2-Clause */
#include "blk_int.h"

#include <string.h>

#include <linux/nbd.h>
#include <xen/xen.h>
#include <xen/io/blkif.h>

#define INDEX_MASK 0xffffu /* of an id: the piece's entry */

_Static_assert(PVF_REQUESTS < PVF_NONE, "indices are 16 bits");

struct pvf_blk_op_stats *pvf_blk_op_stats(struct pvf_blk *blk, uint16_t type)
{
	switch (type) {
	case NBD_CMD_READ:
		return &blk->stats.read;
	case NBD_CMD_WRITE:
		return &blk->stats.write;
	case NBD_CMD_FLUSH:
		return &blk->stats.flush;
	default:
		return &blk->stats.discard;
	}
}

/* Tables */

static void clear_tables(struct pvf_blk *blk)
{
	blk->current = PVF_NONE;
	blk->fillings = blk->prepared = blk->filled = blk->skip = 0;
	blk->flush_count = blk->reply_count = 0;
	blk->pending = blk->stream_error = 0;
	blk->free_requests = PVF_REQUESTS;
	for (uint32_t i = 0; i < PVF_REQUESTS; i++)
		blk->free_request[i] = (uint16_t)(PVF_REQUESTS - 1 - i);
}

static void clear_pieces(struct pvf_blk *blk)
{
	blk->in_flight = 0;
	blk->free_pieces = PVF_PIECES;
	for (uint32_t i = 0; i < PVF_PIECES; i++) {
		blk->piece[i].in_flight = false;
		blk->free_piece[i] = (uint16_t)(PVF_PIECES - 1 - i);
	}
}

void pvf_blk_init(struct pvf_blk *blk)
{
	memset(blk, 0, sizeof(*blk));
	clear_tables(blk);
	clear_pieces(blk);
}

static uint16_t index_of(const struct pvf_blk *blk, const struct pvf_request *r)
{
	return (uint16_t)(r - blk->request);
}

static void free_fillings(struct pvf_blk *blk)
{
	while (blk->fillings)
		pvf_piece_free(blk, blk->filling[--blk->fillings]);
	blk->prepared = blk->filled = 0;
}

static void free_request(struct pvf_blk *blk, struct pvf_request *r)
{
	PVF_ASSERT(!r->outstanding && blk->free_requests < PVF_REQUESTS);
	blk->free_request[blk->free_requests++] = index_of(blk, r);
}

/* Gives back what a read has received: rule 19, a failed read has no payload. */
static void drop_data(struct pvf_blk *blk, struct pvf_request *r)
{
	uint16_t *link = &r->first;

	r->last = PVF_NONE;
	while (*link != PVF_NONE) {
		uint16_t index = *link;
		struct pvf_piece *p = &blk->piece[index];

		if (p->in_flight) { /* still the backend's: it stays until answered (rule 20) */
			r->last = index;
			link = &p->next;
			continue;
		}
		*link = p->next;
		pvf_piece_free(blk, index);
	}
}

/* The life of a request */

static void queue_reply(struct pvf_blk *blk, struct pvf_request *r)
{
	r->queued = true;
	pvf_queue_put(blk->reply, blk->reply_head, &blk->reply_count, index_of(blk, r));
}

void pvf_blk_settle(struct pvf_blk *blk, struct pvf_request *r)
{
	bool current = blk->current == index_of(blk, r);

	if (r->error && r->type == NBD_CMD_READ)
		drop_data(blk, r);
	if (r->orphan) {
		if (!current && !r->outstanding) {
			drop_data(blk, r);
			free_request(blk, r);
		}
		return;
	}
	if (r->queued)
		return;
	if (r->stream && !r->error && r->first != PVF_NONE && blk->piece[r->first].done) {
		queue_reply(blk, r);
		return;
	}
	if (current || r->outstanding)
		return;
	if (r->fua && !r->error) {
		r->fua = false;
		pvf_queue_put(blk->flush, blk->flush_head, &blk->flush_count, index_of(blk, r));
		return;
	}
	queue_reply(blk, r);
}

static void leave_intake(struct pvf_blk *blk)
{
	struct pvf_request *r = &blk->request[blk->current];

	blk->current = PVF_NONE;
	pvf_blk_settle(blk, r);
}

/* Ends the current request's intake with an error; a write's payload is still to come. */
static void fail_current(struct pvf_blk *blk, uint32_t error)
{
	struct pvf_request *r = &blk->request[blk->current];

	r->error = error;
	if (r->type == NBD_CMD_WRITE) {
		blk->skip = r->bytes - r->issued - blk->filled;
		free_fillings(blk);
	}
	if (r->queued && r->reply_sent)
		blk->stream_error = error;
	leave_intake(blk);
}

bool pvf_blk_whole(const struct pvf_blk *blk, uint32_t bytes)
{
	return pvf_piece_need(blk, bytes) <= blk->pool.pages - blk->reserve;
}

uint32_t pvf_blk_part(const struct pvf_blk *blk, uint32_t bytes)
{
	uint32_t room = blk->pool.pages - blk->reserve, pages = room;

	if (blk->segments_max > PVF_BLK_DIRECT)
		pages -= room / (blk->least + 1); /* descriptors; a page or two too many yet */
	while (pages > 1 && !pvf_blk_whole(blk, pages * PVF_PAGE_SIZE))
		pages--;
	return pvf_blk_whole(blk, bytes) ? bytes : pvf_min32(bytes, pages * PVF_PAGE_SIZE);
}

void pvf_blk_begin(struct pvf_blk *blk, const struct pvf_nbd_request *n)
{
	PVF_ASSERT(blk->current == PVF_NONE && !blk->skip && blk->free_requests);
	uint16_t index = blk->free_request[--blk->free_requests];
	struct pvf_request *r = &blk->request[index];

	*r = (struct pvf_request){
		.sector = n->from / PVF_SECTOR,
		.bytes = n->length,
		.type = n->type,
		.first = PVF_NONE,
		.last = PVF_NONE,
		.error = pvf_nbd_check(n, &blk->geo, blk->features_off),
	};
	memcpy(r->handle, n->handle, sizeof(r->handle));
	r->began = blk->now;
	blk->pending++;
	blk->begun++;
	if (r->error) {
		blk->stats.rejected++;
		blk->skip = n->type == NBD_CMD_WRITE ? n->length : 0;
		queue_reply(blk, r);
		return;
	}
	if (n->type == NBD_CMD_READ) {
		r->to_send = r->bytes;
		r->stream = !pvf_blk_whole(blk, r->bytes);
	}
	r->fua = n->flags & PVF_NBD_FLAG_FUA && (n->type == NBD_CMD_WRITE || n->type == NBD_CMD_TRIM);
	blk->current = index;
}

/* Issue */

static enum pvf_step step_read(struct pvf_blk *blk, struct pvf_request *r)
{
	while (!r->error && r->issued < r->bytes) {
		if (!pvf_ring_free(&blk->ring))
			return PVF_STEP_SLOT;
		struct pvf_piece *p = pvf_piece_new(blk, blk->current);

		if (!p)
			return PVF_STEP_PAGE;
		uint16_t index = (uint16_t)(p - blk->piece);

		if (r->last == PVF_NONE)
			r->first = index;
		else
			blk->piece[r->last].next = index;
		r->last = index;
		pvf_piece_issue(blk, p);
	}
	leave_intake(blk);
	return PVF_STEP_HEADER;
}

/* Puts the full ones of the filling pieces into the ring. False: it has no slot. */
static bool issue_filled(struct pvf_blk *blk)
{
	uint32_t n = 0;

	while (n < blk->fillings) {
		struct pvf_piece *p = &blk->piece[blk->filling[n]];

		if (blk->filled < p->bytes || !pvf_ring_free(&blk->ring))
			break;
		blk->filled -= p->bytes;
		blk->prepared -= p->bytes;
		pvf_piece_issue(blk, p);
		n++;
	}
	blk->fillings -= n;
	memmove(blk->filling, blk->filling + n, blk->fillings * sizeof(*blk->filling));
	return !blk->fillings || blk->filled < blk->piece[blk->filling[0]].bytes;
}

static enum pvf_step step_write(struct pvf_blk *blk, struct pvf_request *r)
{
	if (!issue_filled(blk))
		return PVF_STEP_SLOT;
	while (blk->fillings < PVF_BLK_FILLING && r->issued + blk->prepared < r->bytes &&
	       blk->prepared - blk->filled < PVF_BLK_PAYLOAD * PVF_PAGE_SIZE) {
		struct pvf_piece *p = pvf_piece_new(blk, blk->current);

		if (!p)
			break;
		blk->filling[blk->fillings++] = (uint16_t)(p - blk->piece);
		blk->prepared += p->bytes;
	}
	if (blk->fillings)
		return PVF_STEP_PAYLOAD;
	if (r->issued < r->bytes)
		return PVF_STEP_PAGE;
	leave_intake(blk);
	return PVF_STEP_HEADER;
}

enum pvf_step pvf_blk_step(struct pvf_blk *blk)
{
	enum pvf_step step;

	while (blk->flush_count) {
		if (!pvf_ring_free(&blk->ring))
			return PVF_STEP_SLOT;
		pvf_piece_issue_flush(blk, pvf_queue_take(blk->flush, &blk->flush_head, &blk->flush_count));
	}
	if (blk->skip)
		return PVF_STEP_SKIP;
	if (blk->current != PVF_NONE) {
		struct pvf_request *r = &blk->request[blk->current];

		switch (r->type) {
		case NBD_CMD_READ:
			step = step_read(blk, r);
			break;
		case NBD_CMD_WRITE:
			step = step_write(blk, r);
			break;
		default:
			if (!pvf_ring_free(&blk->ring))
				return PVF_STEP_SLOT;
			if (r->type == NBD_CMD_FLUSH)
				pvf_piece_issue_flush(blk, blk->current);
			else
				pvf_piece_issue_discard(blk, blk->current);
			leave_intake(blk);
			step = PVF_STEP_HEADER;
		}
		if (step != PVF_STEP_HEADER)
			return step;
	}
	return blk->free_requests ? PVF_STEP_HEADER : PVF_STEP_REQUEST;
}

int pvf_blk_payload(const struct pvf_blk *blk, struct iovec *iov, bool *last)
{
	const struct pvf_request *r = &blk->request[blk->current];
	size_t offered = 0, most = PVF_BLK_PAYLOAD * PVF_PAGE_SIZE;
	uint32_t at = blk->filled;
	int n = 0;

	for (uint32_t i = 0; i < blk->fillings && offered < most; i++) {
		const struct pvf_piece *p = &blk->piece[blk->filling[i]];
		uint32_t skip = pvf_min32(at, p->bytes);
		size_t part = p->bytes - skip, left;

		if (part > most - offered)
			part = most - offered;
		left = part;
		n = pvf_piece_iov(blk, p, skip, &left, iov, n, PVF_BLK_PAYLOAD);
		offered += part - left;
		at -= skip;
		if (left)
			break;
	}
	*last = r->issued + blk->filled + offered == r->bytes;
	return n;
}

void pvf_blk_payload_add(struct pvf_blk *blk, size_t bytes)
{
	PVF_ASSERT(bytes <= blk->prepared - blk->filled);
	blk->filled += (uint32_t)bytes;
}

void pvf_blk_skip(struct pvf_blk *blk, size_t bytes)
{
	PVF_ASSERT(bytes <= blk->skip);
	blk->skip -= (uint32_t)bytes;
}

/* Completion */

static uint32_t map_status(struct pvf_blk *blk, uint8_t op, int16_t status)
{
	if (status == BLKIF_RSP_OKAY)
		return 0;
	if (status == BLKIF_RSP_EOPNOTSUPP &&
	    (op == BLKIF_OP_FLUSH_DISKCACHE || op == BLKIF_OP_WRITE_BARRIER)) {
		blk->features_off |= PVF_BLK_FLUSH;
		return PVF_NBD_ENOTSUP;
	}
	if (status == BLKIF_RSP_EOPNOTSUPP && op == BLKIF_OP_DISCARD) {
		blk->features_off |= PVF_BLK_DISCARD;
		return PVF_NBD_ENOTSUP;
	}
	return PVF_NBD_EIO; /* rule 7: whatever else it says is a failure */
}

static bool complete(struct pvf_blk *blk, const struct blkif_response *rsp)
{
	uint64_t index = rsp->id & INDEX_MASK;
	struct pvf_piece *p = index < PVF_PIECES ? &blk->piece[index] : NULL;

	if (!p || !p->in_flight || p->id != rsp->id) {
		blk->fault = (struct pvf_fault){5, rsp->id, "id",
						"a response to no request in flight"};
		return false;
	}
	if (rsp->operation != p->op) {
		blk->fault = (struct pvf_fault){6, rsp->operation, "operation",
						"a response with another operation than its request"};
		return false;
	}
	struct pvf_request *r = &blk->request[p->request];
	uint32_t error = map_status(blk, p->op, rsp->status);

	p->in_flight = false;
	r->outstanding--;
	blk->in_flight--;
	if (error && !r->error)
		r->error = error;
	if (error && r->queued && r->reply_sent && !r->orphan)
		blk->stream_error = error;
	if (p->op == BLKIF_OP_READ)
		pvf_piece_done(blk, p);
	else
		pvf_piece_free(blk, (uint16_t)index);
	pvf_blk_settle(blk, r);
	return true;
}

uint32_t pvf_blk_drain(struct pvf_blk *blk, uint32_t available)
{
	uint32_t n;

	for (n = 0; n < available; n++) {
		struct blkif_response rsp;

		pvf_ring_get(&blk->ring, &rsp, sizeof(rsp));
		if (!complete(blk, &rsp))
			break;
	}
	return n;
}

/* Connections come and go */

void pvf_blk_attach(struct pvf_blk *blk, void *ring, size_t ring_bytes, void *pool,
		    uint32_t pool_pages, const uint32_t *grefs, bool scrub)
{
	clear_pieces(blk);
	blk->fault = (struct pvf_fault){0};
	blk->features_off = 0;
	pvf_ring_init(&blk->ring, ring, ring_bytes, sizeof(union blkif_sring_entry), 0);
	pvf_pool_init(&blk->pool, pool, pool_pages, grefs, scrub);
	pvf_piece_limits(blk, PVF_BLK_DIRECT);
}

void pvf_blk_start(struct pvf_blk *blk, const struct pvf_geometry *geo)
{
	blk->geo = *geo;
	pvf_piece_limits(blk, geo->max_segments);
	if (blk->current == PVF_NONE)
		return;
	struct pvf_request *r = &blk->request[blk->current];
	struct pvf_nbd_request n = {
		.flags = r->fua ? PVF_NBD_FLAG_FUA : 0,
		.type = r->type,
		.from = r->sector * PVF_SECTOR,
		.length = r->bytes,
	};
	uint32_t error = pvf_nbd_check(&n, geo, blk->features_off);

	if (r->type == NBD_CMD_READ && !r->queued)
		r->stream = !pvf_blk_whole(blk, r->bytes);
	if (error)
		fail_current(blk, error);
}

bool pvf_blk_portable(struct pvf_blk *blk)
{
	if (!blk->filled)
		free_fillings(blk);
	return !blk->in_flight && blk->pool.free == blk->pool.pages;
}

void pvf_blk_drop_target(struct pvf_blk *blk)
{
	bool used[PVF_REQUESTS];

	for (uint32_t i = 0; i < PVF_REQUESTS; i++)
		used[i] = true;
	for (uint32_t i = 0; i < blk->free_requests; i++)
		used[blk->free_request[i]] = false;
	free_fillings(blk);
	blk->current = PVF_NONE;
	blk->skip = 0;
	blk->flush_count = blk->reply_count = 0;
	blk->pending = blk->stream_error = 0;
	for (uint32_t i = 0; i < PVF_REQUESTS; i++) {
		struct pvf_request *r = &blk->request[i];

		if (!used[i])
			continue;
		r->orphan = true;
		if (r->type == NBD_CMD_READ)
			drop_data(blk, r);
		pvf_blk_settle(blk, r);
	}
}

void pvf_blk_detach(struct pvf_blk *blk)
{
	if (!pvf_blk_portable(blk))
		clear_tables(blk);
	clear_pieces(blk);
	memset(&blk->ring, 0, sizeof(blk->ring));
	blk->pool.base = NULL;
	blk->pool.pages = blk->pool.free = 0;
	blk->fault = (struct pvf_fault){0};
}
