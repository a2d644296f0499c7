/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A backend in memory for the C tests, with the macros of xen/io/ring.h: nothing of the frontend's
 * ring code is used. It takes requests into private memory and answers them when it is told to.
 */
#ifndef PVF_TEST_BACKEND_H
#define PVF_TEST_BACKEND_H

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define xen_mb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#include <xen/xen.h>
#include <xen/io/blkif.h>

#include "blk.h"
#include "check.h"

#define GREF_BASE 5000u
#define GREF_STEP 7u

struct backend_request {
	uint64_t id;
	uint64_t sector_number;
	uint64_t nr_sectors; /* of a discard */
	uint8_t operation;   /* of an indirect request the inner one */
	bool indirect;
	uint16_t nr_segments;
	uint32_t descriptors; /* the page that an indirect one's segments were in */
	struct blkif_request_segment seg[PVF_BLK_SEGMENTS];
};

struct backend {
	blkif_back_ring_t ring;
	unsigned char *pool;
	uint32_t pool_pages;
	unsigned char *disk;
	uint64_t disk_bytes;
	uint32_t held;
	struct backend_request request[512];
	uint64_t taken, notified;
	uint8_t in_use[PVF_MAX_POOL_PAGES]; /* pages of requests not yet answered */
};

static inline void backend_grefs(uint32_t *grefs, uint32_t pages)
{
	for (uint32_t i = 0; i < pages; i++)
		grefs[i] = GREF_BASE + GREF_STEP * i;
}

static inline void backend_init(struct backend *b, void *ring, size_t ring_bytes, void *pool,
				uint32_t pool_pages, void *disk, uint64_t disk_bytes)
{
	memset(b, 0, sizeof(*b));
	BACK_RING_INIT(&b->ring, (blkif_sring_t *)ring, ring_bytes);
	b->pool = pool;
	b->pool_pages = pool_pages;
	b->disk = disk;
	b->disk_bytes = disk_bytes;
}

static inline uint32_t backend_page(const struct backend *b, uint32_t gref)
{
	CHECK(gref >= GREF_BASE && (gref - GREF_BASE) % GREF_STEP == 0);
	uint32_t page = (gref - GREF_BASE) / GREF_STEP;

	CHECK(page < b->pool_pages);
	return page;
}

static inline void backend_use(struct backend *b, uint32_t page)
{
	CHECK(!b->in_use[page]); /* a gref twice at once is an alert in blkback */
	b->in_use[page] = 1;
}

/* Copies a request out of its slot, with the segments that it leads to, and checks them. */
static inline void backend_fetch(struct backend *b, const struct blkif_request *slot,
				 struct backend_request *r)
{
	struct blkif_request_indirect i;
	struct blkif_request_discard d;

	*r = (struct backend_request){
		.id = slot->id,
		.sector_number = slot->sector_number,
		.operation = slot->operation,
		.nr_segments = slot->nr_segments,
	};
	switch (slot->operation) {
	case BLKIF_OP_DISCARD:
		memcpy(&d, slot, sizeof(d));
		r->id = d.id;
		r->sector_number = d.sector_number;
		r->nr_sectors = d.nr_sectors;
		return;
	case BLKIF_OP_FLUSH_DISKCACHE:
	case BLKIF_OP_WRITE_BARRIER:
		CHECK_EQ(slot->nr_segments, 0);
		return;
	case BLKIF_OP_INDIRECT:
		memcpy(&i, slot, sizeof(i));
		r->id = i.id;
		r->sector_number = i.sector_number;
		r->operation = i.indirect_op;
		r->indirect = true;
		r->nr_segments = i.nr_segments;
		r->descriptors = backend_page(b, i.indirect_grefs[0]);
		backend_use(b, r->descriptors);
		CHECK(r->nr_segments > BLKIF_MAX_SEGMENTS_PER_REQUEST);
		CHECK(r->nr_segments <= PVF_BLK_SEGMENTS);
		memcpy(r->seg, b->pool + (size_t)r->descriptors * PVF_PAGE_SIZE,
		       r->nr_segments * sizeof(r->seg[0]));
		break;
	default:
		CHECK(r->nr_segments >= 1 && r->nr_segments <= BLKIF_MAX_SEGMENTS_PER_REQUEST);
		memcpy(r->seg, slot->seg, r->nr_segments * sizeof(r->seg[0]));
	}
	CHECK(r->operation == BLKIF_OP_READ || r->operation == BLKIF_OP_WRITE);
	for (int k = 0; k < r->nr_segments; k++) {
		backend_use(b, backend_page(b, r->seg[k].gref));
		CHECK(r->seg[k].first_sect <= r->seg[k].last_sect);
		CHECK(r->seg[k].last_sect < 8);
	}
}

/* Takes what was published, and checks that every request is well formed. */
static inline void backend_take(struct backend *b)
{
	int more;

	do {
		uint32_t prod = __atomic_load_n(&b->ring.sring->req_prod, __ATOMIC_ACQUIRE);

		CHECK(prod - b->ring.rsp_prod_pvt <= RING_SIZE(&b->ring));
		while (b->ring.req_cons != prod) {
			struct blkif_request slot;

			memcpy(&slot, RING_GET_REQUEST(&b->ring, b->ring.req_cons), sizeof(slot));
			backend_fetch(b, &slot, &b->request[b->held]);
			b->ring.req_cons++;
			b->held++;
			b->taken++;
		}
		__atomic_store_n(&b->ring.sring->req_event, b->ring.req_cons + 1, __ATOMIC_SEQ_CST);
		more = __atomic_load_n(&b->ring.sring->req_prod, __ATOMIC_SEQ_CST) !=
		       b->ring.req_cons;
	} while (more);
}

/* Does what the request says, as an honest disk would. */
static inline void backend_execute(struct backend *b, const struct backend_request *r)
{
	uint64_t at = r->sector_number * 512;

	if (r->operation == BLKIF_OP_DISCARD) {
		CHECK(at + r->nr_sectors * 512 <= b->disk_bytes);
		memset(b->disk + at, 0, r->nr_sectors * 512);
	}
	for (int i = 0; i < r->nr_segments; i++) {
		size_t n = (size_t)(r->seg[i].last_sect - r->seg[i].first_sect + 1) * 512;
		unsigned char *page = b->pool +
				      (size_t)backend_page(b, r->seg[i].gref) * PVF_PAGE_SIZE +
				      r->seg[i].first_sect * 512;

		CHECK(at + n <= b->disk_bytes);
		if (r->operation == BLKIF_OP_WRITE)
			memcpy(b->disk + at, page, n);
		else
			memcpy(page, b->disk + at, n);
		at += n;
	}
}

/* Writes one response; true: the frontend wants an event. */
static inline bool backend_respond(struct backend *b, uint64_t id, uint8_t op, int16_t status)
{
	struct blkif_response *rsp = RING_GET_RESPONSE(&b->ring, b->ring.rsp_prod_pvt);
	uint32_t old = b->ring.rsp_prod_pvt++;

	*rsp = (struct blkif_response){.id = id, .operation = op, .status = status};
	__atomic_store_n(&b->ring.sring->rsp_prod, b->ring.rsp_prod_pvt, __ATOMIC_SEQ_CST);
	uint32_t event = __atomic_load_n(&b->ring.sring->rsp_event, __ATOMIC_SEQ_CST);

	return b->ring.rsp_prod_pvt - event < b->ring.rsp_prod_pvt - old;
}

/* Answers the held request number `k` with `status`; an OKAY one is executed first. */
static inline bool backend_answer(struct backend *b, uint32_t k, int16_t status)
{
	struct backend_request r = b->request[k];

	CHECK(k < b->held);
	b->request[k] = b->request[--b->held];
	if (status == BLKIF_RSP_OKAY)
		backend_execute(b, &r);
	for (int i = 0; i < r.nr_segments; i++)
		b->in_use[backend_page(b, r.seg[i].gref)] = 0;
	if (r.indirect)
		b->in_use[r.descriptors] = 0;
	return backend_respond(b, r.id, r.operation, status);
}

#endif
