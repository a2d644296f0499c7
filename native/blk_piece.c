/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Pieces: the pages that a blkif request carries, and its way into the ring.
 *
 * A piece of up to eleven pages is a direct request. A larger one is an indirect request: its
 * segments stand in one more page of the pool, which comes back with the answer.
 */
#include "blk_int.h"

#include <string.h>

#include <linux/nbd.h>
#include <xen/xen.h>
#include <xen/io/blkif.h>

#define INDEX_BITS 16
#define PAGE_SECTORS (PVF_PAGE_SIZE / PVF_SECTOR)

_Static_assert(PVF_BLK_DIRECT == BLKIF_MAX_SEGMENTS_PER_REQUEST, "blkif segments");
_Static_assert(PVF_BLK_SEGMENTS * sizeof(struct blkif_request_segment) <= PVF_PAGE_SIZE,
	       "one page of descriptors");
_Static_assert(PVF_PIECES < PVF_NONE, "indices are 16 bits");
_Static_assert(sizeof(struct blkif_request_discard) <= sizeof(struct blkif_request), "blkif");
_Static_assert(sizeof(struct blkif_request_indirect) <= sizeof(struct blkif_request), "blkif");

void pvf_piece_limits(struct pvf_blk *blk, uint32_t max_segments)
{
	uint32_t most = pvf_min32(max_segments, pvf_min32(PVF_BLK_SEGMENTS, blk->pool.pages / 2));

	blk->segments_max = most;
	blk->least = pvf_min32(most, most / 4 > PVF_BLK_DIRECT ? most / 4 : PVF_BLK_DIRECT);
	blk->reserve = blk->least + (blk->least > PVF_BLK_DIRECT);
}

uint32_t pvf_piece_need(const struct pvf_blk *blk, uint32_t bytes)
{
	uint32_t pages = pvf_pages_of(bytes);

	return blk->segments_max > PVF_BLK_DIRECT ? pages + pages / blk->least + 1 : pages;
}

static void free_descriptors(struct pvf_blk *blk, struct pvf_piece *p)
{
	if (p->descriptors != PVF_NONE)
		pvf_pool_give(&blk->pool, p->descriptors);
	p->descriptors = PVF_NONE;
}

void pvf_piece_free(struct pvf_blk *blk, uint16_t index)
{
	struct pvf_piece *p = &blk->piece[index];

	if (p->pages)
		pvf_pool_give_chain(&blk->pool, p->first, p->pages);
	p->pages = 0;
	free_descriptors(blk, p);
	blk->free_piece[blk->free_pieces++] = index;
}

static struct pvf_piece *new_piece(struct pvf_blk *blk, uint16_t request, uint8_t op)
{
	PVF_ASSERT(blk->free_pieces);
	struct pvf_piece *p = &blk->piece[blk->free_piece[--blk->free_pieces]];

	*p = (struct pvf_piece){
		.request = request, .next = PVF_NONE, .descriptors = PVF_NONE, .op = op};
	return p;
}

/* The pages that a piece gets which wants `want`, of `have`; 0: it waits for more. */
static uint32_t share(const struct pvf_blk *blk, uint32_t want, uint32_t have)
{
	if (have > PVF_BLK_DIRECT)
		have = have > PVF_BLK_DIRECT + 1 ? have - 1 : PVF_BLK_DIRECT; /* descriptors */
	return pvf_min32(want, have) < pvf_min32(want, blk->least) ? 0 : pvf_min32(want, have);
}

struct pvf_piece *pvf_piece_new(struct pvf_blk *blk, uint16_t request)
{
	struct pvf_request *r = &blk->request[request];
	bool write = r->type == NBD_CMD_WRITE;
	uint32_t left = r->bytes - r->issued - blk->prepared, have = pvf_pool_available(&blk->pool);
	uint32_t spare = write ? 0 : pvf_min32(blk->reserve, have);
	uint32_t pages = share(blk, pvf_min32(pvf_pages_of(left), blk->segments_max), have - spare);
	uint16_t *link;

	if (!pages)
		return NULL;
	struct pvf_piece *p = new_piece(blk, request, write ? BLKIF_OP_WRITE : BLKIF_OP_READ);

	p->bytes = pvf_min32(left, pages * PVF_PAGE_SIZE);
	left = p->bytes;
	for (link = &p->first; p->pages < pages; p->pages++) {
		uint32_t part = pvf_min32(left, PVF_PAGE_SIZE);

		*link = pvf_pool_take(&blk->pool, part, write);
		link = &blk->pool.next[*link];
		left -= part;
	}
	*link = PVF_NONE;
	if (pages > PVF_BLK_DIRECT)
		p->descriptors = pvf_pool_take(
			&blk->pool, pages * sizeof(struct blkif_request_segment), true);
	return p;
}

void pvf_piece_done(struct pvf_blk *blk, struct pvf_piece *p)
{
	p->done = true;
	free_descriptors(blk, p);
}

/* Ring */

static void put(struct pvf_blk *blk, struct pvf_piece *p, const void *request, size_t size)
{
	struct pvf_request *r = &blk->request[p->request];

	PVF_ASSERT(pvf_ring_put(&blk->ring, request, size));
	p->in_flight = true;
	r->outstanding++;
	blk->in_flight++;
	if (blk->in_flight > blk->stats.in_flight_peak)
		blk->stats.in_flight_peak = blk->in_flight;
	blk->stats.segments += p->pages;
	pvf_blk_op_stats(blk, r->type)->ring_requests++;
}

static uint64_t new_id(struct pvf_blk *blk, struct pvf_piece *p)
{
	p->id = ++blk->serial << INDEX_BITS | (uint64_t)(p - blk->piece);
	return p->id;
}

/* Writes a piece's segments; `seg` may be shared memory: it is only written. */
static void set_segments(const struct pvf_blk *blk, const struct pvf_piece *p,
			 struct blkif_request_segment *seg)
{
	uint32_t left = p->bytes / PVF_SECTOR;
	uint16_t page = p->first;

	for (uint32_t i = 0; i < p->pages; i++) {
		uint32_t sectors = pvf_min32(left, PAGE_SECTORS);

		seg[i] = (struct blkif_request_segment){
			.gref = blk->pool.gref[page],
			.first_sect = 0,
			.last_sect = (uint8_t)(sectors - 1),
		};
		left -= sectors;
		page = blk->pool.next[page];
	}
}

static void issue_direct(struct pvf_blk *blk, struct pvf_piece *p, uint64_t sector)
{
	struct blkif_request req = {
		.operation = p->op,
		.nr_segments = (uint8_t)p->pages,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
		.sector_number = sector,
	};

	set_segments(blk, p, req.seg);
	put(blk, p, &req, sizeof(req));
}

static void issue_indirect(struct pvf_blk *blk, struct pvf_piece *p, uint64_t sector)
{
	struct blkif_request_indirect req = {
		.operation = BLKIF_OP_INDIRECT,
		.indirect_op = p->op,
		.nr_segments = p->pages,
		.id = new_id(blk, p),
		.sector_number = sector,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.indirect_grefs = {blk->pool.gref[p->descriptors]},
	};

	set_segments(blk, p, (struct blkif_request_segment *)(void *)
				     pvf_pool_page(&blk->pool, p->descriptors));
	blk->stats.indirect++;
	put(blk, p, &req, sizeof(req));
}

void pvf_piece_issue(struct pvf_blk *blk, struct pvf_piece *p)
{
	struct pvf_request *r = &blk->request[p->request];
	uint64_t sector = r->sector + r->issued / PVF_SECTOR;

	r->issued += p->bytes;
	if (p->descriptors == PVF_NONE)
		issue_direct(blk, p, sector);
	else
		issue_indirect(blk, p, sector);
}

void pvf_piece_issue_flush(struct pvf_blk *blk, uint16_t request)
{
	/* An empty barrier is a flush and more: what older backends have instead. */
	bool flush = blk->geo.features & PVF_BLK_FLUSH;
	struct pvf_piece *p = new_piece(blk, request, flush ? BLKIF_OP_FLUSH_DISKCACHE
							    : BLKIF_OP_WRITE_BARRIER);
	struct blkif_request req = {
		.operation = p->op,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
	};

	put(blk, p, &req, sizeof(req));
}

/* TRIM is advice: it is cut down to whole discard granules, as NBD cannot tell the client where
 * they lie. Nothing may be left of it. */
void pvf_piece_issue_discard(struct pvf_blk *blk, uint16_t request)
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
			return;
		end -= behind;
	}
	if (start >= end)
		return;
	struct pvf_piece *p = new_piece(blk, request, BLKIF_OP_DISCARD);
	struct blkif_request_discard req = {
		.operation = p->op,
		.handle = (blkif_vdev_t)blk->geo.vdev,
		.id = new_id(blk, p),
		.sector_number = start,
		.nr_sectors = end - start,
	};

	put(blk, p, &req, sizeof(req));
}

/* Bytes */

int pvf_piece_iov(const struct pvf_blk *blk, const struct pvf_piece *p, uint32_t at, size_t *bytes,
		  struct iovec *iov, int n, int max)
{
	uint16_t page = p->first;

	for (; at >= PVF_PAGE_SIZE; at -= PVF_PAGE_SIZE)
		page = blk->pool.next[page];
	while (*bytes) {
		size_t part = PVF_PAGE_SIZE - at;
		unsigned char *from = pvf_pool_page(&blk->pool, page) + at;

		if (part > *bytes)
			part = *bytes;
		if (n && (unsigned char *)iov[n - 1].iov_base + iov[n - 1].iov_len == from)
			iov[n - 1].iov_len += part;
		else if (n < max)
			iov[n++] = (struct iovec){.iov_base = from, .iov_len = part};
		else
			break;
		*bytes -= part;
		page = blk->pool.next[page];
		at = 0;
	}
	return n;
}

void pvf_piece_sent(struct pvf_blk *blk, struct pvf_piece *p, uint32_t bytes)
{
	uint32_t whole = (p->sent % PVF_PAGE_SIZE + bytes) / PVF_PAGE_SIZE;

	PVF_ASSERT(bytes <= p->bytes - p->sent);
	p->sent += bytes;
	if (!whole)
		return;
	p->first = pvf_pool_give_chain(&blk->pool, p->first, whole);
	p->pages = (uint16_t)(p->pages - whole);
}
