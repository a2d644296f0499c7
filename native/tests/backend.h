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

#include "check.h"
#include "pvf.h"

#define GREF_BASE 5000u
#define GREF_STEP 7u

struct backend {
	blkif_back_ring_t ring;
	unsigned char *pool;
	uint32_t pool_pages;
	unsigned char *disk;
	uint64_t disk_bytes;
	uint32_t held;
	struct blkif_request request[512];
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

/* Takes what was published, and checks that every request is well formed. */
static inline void backend_take(struct backend *b)
{
	int more;

	do {
		uint32_t prod = __atomic_load_n(&b->ring.sring->req_prod, __ATOMIC_ACQUIRE);

		CHECK(prod - b->ring.rsp_prod_pvt <= RING_SIZE(&b->ring));
		while (b->ring.req_cons != prod) {
			struct blkif_request *r = &b->request[b->held];

			memcpy(r, RING_GET_REQUEST(&b->ring, b->ring.req_cons), sizeof(*r));
			b->ring.req_cons++;
			b->held++;
			b->taken++;
			if (r->operation != BLKIF_OP_READ && r->operation != BLKIF_OP_WRITE)
				continue;
			CHECK(r->nr_segments >= 1 && r->nr_segments <= 11);
			for (int i = 0; i < r->nr_segments; i++) {
				uint32_t page = backend_page(b, r->seg[i].gref);

				CHECK(!b->in_use[page]); /* a gref twice at once is an alert in blkback */
				b->in_use[page] = 1;
				CHECK(r->seg[i].first_sect <= r->seg[i].last_sect);
				CHECK(r->seg[i].last_sect < 8);
			}
		}
		__atomic_store_n(&b->ring.sring->req_event, b->ring.req_cons + 1, __ATOMIC_SEQ_CST);
		more = __atomic_load_n(&b->ring.sring->req_prod, __ATOMIC_SEQ_CST) !=
		       b->ring.req_cons;
	} while (more);
}

/* Does what the request says, as an honest disk would. */
static inline void backend_execute(struct backend *b, const struct blkif_request *r)
{
	uint64_t at = r->sector_number * 512;

	if (r->operation == BLKIF_OP_DISCARD) {
		struct blkif_request_discard d;

		memcpy(&d, r, sizeof(d));
		CHECK(d.sector_number * 512 + d.nr_sectors * 512 <= b->disk_bytes);
		memset(b->disk + d.sector_number * 512, 0, d.nr_sectors * 512);
		return;
	}
	if (r->operation == BLKIF_OP_FLUSH_DISKCACHE)
		return;
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
	struct blkif_request r = b->request[k];

	CHECK(k < b->held);
	b->request[k] = b->request[--b->held];
	if (status == BLKIF_RSP_OKAY)
		backend_execute(b, &r);
	if (r.operation == BLKIF_OP_READ || r.operation == BLKIF_OP_WRITE)
		for (int i = 0; i < r.nr_segments; i++)
			b->in_use[backend_page(b, r.seg[i].gref)] = 0;
	return backend_respond(b, r.id, r.operation, status);
}

#endif
