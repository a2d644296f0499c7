/* SPDX-License-Identifier: BSD-2-Clause */
#include "blk.h"

#include <string.h>

#include <linux/nbd.h>
#include <xen/xen.h>
#include <xen/io/blkif.h>

#define INDEX_BITS 16
#define PAGE_SECTORS (PVF_PAGE_SIZE / PVF_SECTOR)

_Static_assert(PVF_BLK_SEGMENTS == BLKIF_MAX_SEGMENTS_PER_REQUEST, "blkif segments");
_Static_assert(PVF_PIECES < PVF_NONE && PVF_REQUESTS < PVF_NONE, "indices are 16 bits");
_Static_assert(sizeof(struct blkif_request_discard) <= sizeof(struct blkif_request), "blkif");

static struct pvf_blk_op_stats *op_stats(struct pvf_blk *blk, uint16_t type)
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

static void queue_put(uint16_t *queue, uint32_t head, uint32_t *count, uint16_t value)
{
	PVF_ASSERT(*count < PVF_REQUESTS);
	queue[(head + (*count)++) % PVF_REQUESTS] = value;
}

static uint16_t queue_take(const uint16_t *queue, uint32_t *head, uint32_t *count)
{
	uint16_t value = queue[*head];

	*head = (*head + 1) % PVF_REQUESTS;
	(*count)--;
	return value;
}

static void free_piece(struct pvf_blk *blk, uint16_t index)
{
	struct pvf_piece *p = &blk->piece[index];

	/* In reverse, so that they are taken again in the same order and stay neighbours. */
	while (p->pages)
		pvf_pool_give(&blk->pool, p->page[--p->pages]);
	blk->free_piece[blk->free_pieces++] = index;
}

static void free_fillings(struct pvf_blk *blk)
{
	while (blk->fillings)
		free_piece(blk, blk->filling[--blk->fillings]);
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
		free_piece(blk, index);
	}
}

/* The life of a request */

static void queue_reply(struct pvf_blk *blk, struct pvf_request *r)
{
	r->queued = true;
	queue_put(blk->reply, blk->reply_head, &blk->reply_count, index_of(blk, r));
}

/* Takes a request as far as it can go without a slot, a page or a byte from the client. */
static void settle(struct pvf_blk *blk, struct pvf_request *r)
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
		queue_put(blk->flush, blk->flush_head, &blk->flush_count, index_of(blk, r));
		return;
	}
	queue_reply(blk, r);
}

static void leave_intake(struct pvf_blk *blk)
{
	struct pvf_request *r = &blk->request[blk->current];

	blk->current = PVF_NONE;
	settle(blk, r);
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

void pvf_blk_begin(struct pvf_blk *blk, const struct pvf_nbd_request *n)
{
	PVF_ASSERT(blk->current == PVF_NONE && !blk->skip && blk->free_requests);
	uint16_t index = blk->free_request[--blk->free_requests];
	struct pvf_request *r = &blk->request[index];
	uint32_t readable = blk->pool.pages - blk->reserve;

	*r = (struct pvf_request){
		.sector = n->from / PVF_SECTOR,
		.bytes = n->length,
		.type = n->type,
		.first = PVF_NONE,
		.last = PVF_NONE,
		.error = pvf_nbd_check(n, &blk->geo, blk->features_off),
	};
	memcpy(r->handle, n->handle, sizeof(r->handle));
	blk->pending++;
	if (r->error) {
		blk->stats.rejected++;
		blk->skip = n->type == NBD_CMD_WRITE ? n->length : 0;
		queue_reply(blk, r);
		return;
	}
	if (n->type == NBD_CMD_READ) {
		r->to_send = r->bytes;
		r->stream = (r->bytes + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE > readable;
	}
	r->fua = n->flags & PVF_NBD_FLAG_FUA && (n->type == NBD_CMD_WRITE || n->type == NBD_CMD_TRIM);
	blk->current = index;
}

/* Issue */

static struct pvf_piece *new_piece(struct pvf_blk *blk, uint16_t request, uint8_t op)
{
	PVF_ASSERT(blk->free_pieces);
	struct pvf_piece *p = &blk->piece[blk->free_piece[--blk->free_pieces]];

	*p = (struct pvf_piece){.request = request, .next = PVF_NONE, .op = op};
	return p;
}

/* Takes pages for the next bytes of a read or write: a full piece, or all that is left of it. */
static struct pvf_piece *new_data_piece(struct pvf_blk *blk, uint16_t request)
{
	struct pvf_request *r = &blk->request[request];
	bool write = r->type == NBD_CMD_WRITE;
	uint32_t bytes = pvf_min32(r->bytes - r->issued - blk->prepared,
				   blk->segments_max * PVF_PAGE_SIZE);
	uint32_t pages = (bytes + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;

	if (pvf_pool_available(&blk->pool) < pages + (write ? 0 : blk->reserve))
		return NULL;
	struct pvf_piece *p = new_piece(blk, request, write ? BLKIF_OP_WRITE : BLKIF_OP_READ);

	p->bytes = bytes;
	for (uint32_t left = bytes; left; left -= pvf_min32(left, PVF_PAGE_SIZE))
		p->page[p->pages++] =
			pvf_pool_take(&blk->pool, pvf_min32(left, PVF_PAGE_SIZE), write);
	return p;
}

/* Puts a piece into the ring; the caller has checked that there is a slot. */
static void issue(struct pvf_blk *blk, struct pvf_piece *p, const void *request, size_t size)
{
	struct pvf_request *r = &blk->request[p->request];

	PVF_ASSERT(pvf_ring_put(&blk->ring, request, size));
	p->in_flight = true;
	r->outstanding++;
	blk->in_flight++;
	if (blk->in_flight > blk->stats.in_flight_peak)
		blk->stats.in_flight_peak = blk->in_flight;
	blk->stats.segments += p->pages;
	op_stats(blk, r->type)->ring_requests++;
}

static uint64_t new_id(struct pvf_blk *blk, struct pvf_piece *p)
{
	p->id = ++blk->serial << INDEX_BITS | (uint64_t)(p - blk->piece);
	return p->id;
}

static void issue_data(struct pvf_blk *blk, struct pvf_piece *p)
{
	struct pvf_request *r = &blk->request[p->request];
	uint32_t left = p->bytes / PVF_SECTOR;
	struct blkif_request req = {
		.operation = p->op,
		.nr_segments = p->pages,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
		.sector_number = r->sector + r->issued / PVF_SECTOR,
	};

	for (uint32_t i = 0; i < p->pages; i++) {
		uint32_t sectors = pvf_min32(left, PAGE_SECTORS);

		req.seg[i].gref = blk->pool.gref[p->page[i]];
		req.seg[i].first_sect = 0;
		req.seg[i].last_sect = (uint8_t)(sectors - 1);
		left -= sectors;
	}
	r->issued += p->bytes;
	issue(blk, p, &req, sizeof(req));
}

static void issue_flush(struct pvf_blk *blk, uint16_t request)
{
	struct pvf_piece *p = new_piece(blk, request, BLKIF_OP_FLUSH_DISKCACHE);
	struct blkif_request req = {
		.operation = p->op,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
	};

	issue(blk, p, &req, sizeof(req));
}

/* TRIM is advice: it is cut down to whole discard granules, as NBD cannot tell the client where
 * they lie. False: nothing is left of it. */
static bool issue_discard(struct pvf_blk *blk, uint16_t request)
{
	const struct pvf_request *r = &blk->request[request];
	uint64_t granule = blk->geo.discard_granularity / PVF_SECTOR;
	uint64_t start = r->sector, end = r->sector + r->bytes / PVF_SECTOR;

	if (granule > 1) {
		uint64_t shift = blk->geo.discard_alignment / PVF_SECTOR % granule;
		uint64_t ahead = (start % granule + granule - shift) % granule;
		uint64_t behind = (end % granule + granule - shift) % granule;

		start += ahead ? granule - ahead : 0;
		if (end < start + behind)
			return false;
		end -= behind;
	}
	if (start >= end)
		return false;
	struct pvf_piece *p = new_piece(blk, request, BLKIF_OP_DISCARD);
	struct blkif_request_discard req = {
		.operation = p->op,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
		.sector_number = start,
		.nr_sectors = end - start,
	};

	issue(blk, p, &req, sizeof(req));
	return true;
}

static enum pvf_step step_read(struct pvf_blk *blk, struct pvf_request *r)
{
	while (!r->error && r->issued < r->bytes) {
		if (!pvf_ring_free(&blk->ring))
			return PVF_STEP_SLOT;
		struct pvf_piece *p = new_data_piece(blk, blk->current);

		if (!p)
			return PVF_STEP_PAGE;
		uint16_t index = (uint16_t)(p - blk->piece);

		if (r->last == PVF_NONE)
			r->first = index;
		else
			blk->piece[r->last].next = index;
		r->last = index;
		issue_data(blk, p);
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
		issue_data(blk, p);
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
	while (blk->fillings < PVF_BLK_FILLING && r->issued + blk->prepared < r->bytes) {
		struct pvf_piece *p = new_data_piece(blk, blk->current);

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
		issue_flush(blk, queue_take(blk->flush, &blk->flush_head, &blk->flush_count));
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
				issue_flush(blk, blk->current);
			else
				issue_discard(blk, blk->current);
			leave_intake(blk);
			step = PVF_STEP_HEADER;
		}
		if (step != PVF_STEP_HEADER)
			return step;
	}
	return blk->free_requests ? PVF_STEP_HEADER : PVF_STEP_REQUEST;
}

/* Adds what of a piece begins at its byte `at`; neighbouring pages are one entry. */
static int add_pages(const struct pvf_blk *blk, const struct pvf_piece *p, uint32_t at,
		     struct iovec *iov, int n, int max)
{
	while (at < p->bytes) {
		uint32_t offset = at % PVF_PAGE_SIZE;
		uint32_t bytes = pvf_min32(p->bytes - at, PVF_PAGE_SIZE - offset);
		unsigned char *from = pvf_pool_page(&blk->pool, p->page[at / PVF_PAGE_SIZE]) + offset;

		if (n && (unsigned char *)iov[n - 1].iov_base + iov[n - 1].iov_len == from)
			iov[n - 1].iov_len += bytes;
		else if (n < max)
			iov[n++] = (struct iovec){.iov_base = from, .iov_len = bytes};
		else
			break;
		at += bytes;
	}
	return n;
}

int pvf_blk_payload(const struct pvf_blk *blk, struct iovec *iov, bool *last)
{
	const struct pvf_request *r = &blk->request[blk->current];
	uint32_t at = blk->filled;
	int n = 0;

	for (uint32_t i = 0; i < blk->fillings; i++) {
		const struct pvf_piece *p = &blk->piece[blk->filling[i]];

		n = add_pages(blk, p, at, iov, n, PVF_BLK_PAYLOAD);
		at -= pvf_min32(at, p->bytes);
	}
	*last = r->issued + blk->prepared == r->bytes;
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
	if (status == BLKIF_RSP_EOPNOTSUPP && op == BLKIF_OP_FLUSH_DISKCACHE) {
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
	uint64_t index = rsp->id & ((1u << INDEX_BITS) - 1);
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
		p->done = true; /* stays with its request until sent or dropped */
	else
		free_piece(blk, (uint16_t)index);
	settle(blk, r);
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

/* Replies */

int pvf_blk_reply(struct pvf_blk *blk, struct iovec *iov, int max)
{
	int n = 0;

	for (uint32_t i = 0; i < blk->reply_count && n < max; i++) {
		struct pvf_request *r =
			&blk->request[blk->reply[(blk->reply_head + i) % PVF_REQUESTS]];
		uint32_t covered = 0;

		if (!r->reply_sent)
			pvf_nbd_reply(r->reply, r->handle, r->error);
		if (r->reply_sent < PVF_NBD_REPLY)
			iov[n++] = (struct iovec){.iov_base = r->reply + r->reply_sent,
						  .iov_len = PVF_NBD_REPLY - r->reply_sent};
		if (r->error || r->type != NBD_CMD_READ)
			continue;
		for (uint16_t k = r->first; k != PVF_NONE && n < max; k = blk->piece[k].next) {
			const struct pvf_piece *p = &blk->piece[k];

			if (!p->done)
				return n;
			n = add_pages(blk, p, p->sent, iov, n, max);
			covered += p->bytes - p->sent;
		}
		if (covered < r->to_send)
			return n; /* the rest is still on its way, and nothing may overtake it */
	}
	return n;
}

static void answered(struct pvf_blk *blk, struct pvf_request *r)
{
	struct pvf_blk_op_stats *stats = op_stats(blk, r->type);

	queue_take(blk->reply, &blk->reply_head, &blk->reply_count);
	stats->requests++;
	if (r->error)
		stats->errors++;
	else if (r->type != NBD_CMD_FLUSH)
		stats->bytes += r->bytes;
	blk->pending--;
	r->orphan = true; /* a failed streaming read may still have pieces in the ring */
	settle(blk, r);
}

void pvf_blk_reply_sent(struct pvf_blk *blk, size_t bytes)
{
	while (blk->reply_count) {
		struct pvf_request *r = &blk->request[blk->reply[blk->reply_head]];
		uint32_t part = PVF_NBD_REPLY - r->reply_sent;

		if (part > bytes)
			part = (uint32_t)bytes;
		r->reply_sent += (uint8_t)part;
		bytes -= part;
		if (r->reply_sent < PVF_NBD_REPLY)
			return;
		if (!r->error && r->type == NBD_CMD_READ) {
			while (bytes && r->to_send) {
				uint16_t index = r->first;
				struct pvf_piece *p = &blk->piece[index];

				PVF_ASSERT(index != PVF_NONE && p->done);
				part = p->bytes - p->sent;
				if (part > bytes)
					part = (uint32_t)bytes;
				p->sent += part;
				r->to_send -= part;
				bytes -= part;
				if (p->sent < p->bytes)
					break;
				r->first = p->next;
				if (r->first == PVF_NONE)
					r->last = PVF_NONE;
				free_piece(blk, index);
			}
			if (r->to_send)
				return;
		}
		answered(blk, r);
		if (!bytes)
			return;
	}
	PVF_ASSERT(!bytes);
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
	blk->segments_max = blk->reserve = pvf_min32(PVF_BLK_SEGMENTS, pool_pages / 2);
}

void pvf_blk_start(struct pvf_blk *blk, const struct pvf_geometry *geo)
{
	blk->geo = *geo;
	blk->segments_max = pvf_min32(geo->max_segments, pvf_min32(PVF_BLK_SEGMENTS,
								   blk->pool.pages / 2));
	blk->reserve = blk->segments_max;
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
		r->stream = (r->bytes + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE >
			    blk->pool.pages - blk->reserve;
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
		settle(blk, r);
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
