/* SPDX-License-Identifier: BSD-2-Clause */
#include "ring.h"

#include <string.h>

#include <xen/xen.h>
#include <xen/io/blkif.h>

/* Every ring of ring.h has the same header; blkif's stands for all. */
_Static_assert(offsetof(struct blkif_sring, ring) == PVF_RING_HEADER, "sring header");

#define FIELD(ring, name) ((uint32_t *)((ring)->shared + offsetof(struct blkif_sring, name)))

uint32_t pvf_ring_entries(size_t bytes, uint32_t entry_size)
{
	if (!entry_size || bytes < PVF_RING_HEADER + (size_t)entry_size)
		return 0;
	uint64_t fit = (bytes - PVF_RING_HEADER) / entry_size;
	uint32_t entries = 1;

	while ((uint64_t)entries * 2 <= fit && entries < (1u << 30))
		entries *= 2;
	return entries;
}

void pvf_ring_init(struct pvf_ring *ring, void *shared, size_t bytes, uint32_t entry_size,
		   uint32_t first)
{
	memset(shared, 0, bytes);
	*ring = (struct pvf_ring){
		.shared = shared,
		.entries = pvf_ring_entries(bytes, entry_size),
		.entry_size = entry_size,
		.req_prod_pvt = first,
		.req_published = first,
		.rsp_cons = first,
		.rsp_seen = first,
	};
	PVF_ASSERT(ring->entries);
	__atomic_store_n(FIELD(ring, req_prod), first, __ATOMIC_RELAXED);
	__atomic_store_n(FIELD(ring, rsp_prod), first, __ATOMIC_RELAXED);
	__atomic_store_n(FIELD(ring, req_event), first + 1, __ATOMIC_RELAXED);
	__atomic_store_n(FIELD(ring, rsp_event), first + 1, __ATOMIC_SEQ_CST);
}

static unsigned char *slot(const struct pvf_ring *ring, uint32_t index)
{
	return ring->shared + PVF_RING_HEADER +
	       (size_t)(index & (ring->entries - 1)) * ring->entry_size;
}

uint32_t pvf_ring_free(const struct pvf_ring *ring)
{
	return ring->entries - (ring->req_prod_pvt - ring->rsp_cons);
}

bool pvf_ring_put(struct pvf_ring *ring, const void *request, size_t size)
{
	PVF_ASSERT(size <= ring->entry_size);
	if (!pvf_ring_free(ring))
		return false;
	memcpy(slot(ring, ring->req_prod_pvt), request, size);
	ring->req_prod_pvt++;
	return true;
}

bool pvf_ring_push(struct pvf_ring *ring)
{
	uint32_t old = ring->req_published, new = ring->req_prod_pvt;

	if (old == new)
		return false;
	ring->req_published = new;
	/* The store must be visible before req_event is read, or both ends could sleep. Two
	 * sequentially consistent accesses order exactly that. */
	__atomic_store_n(FIELD(ring, req_prod), new, __ATOMIC_SEQ_CST);
	uint32_t event = __atomic_load_n(FIELD(ring, req_event), __ATOMIC_SEQ_CST);

	return new - event < new - old;
}

static uint32_t accept_prod(struct pvf_ring *ring, uint32_t prod, struct pvf_fault *fault)
{
	uint32_t moved = prod - ring->rsp_seen;
	uint32_t allowed = ring->req_published - ring->rsp_seen; /* requests not yet answered */

	if (moved <= allowed) {
		ring->rsp_seen = prod;
		return prod - ring->rsp_cons;
	}
	fault->value = prod;
	fault->field = "rsp_prod";
	if (moved > UINT32_MAX / 2) {
		fault->rule = 2;
		fault->text = "the response index moved backwards";
	} else {
		fault->rule = 1;
		fault->text = "more responses than requests";
	}
	return 0;
}

bool pvf_ring_changed(const struct pvf_ring *ring)
{
	return __atomic_load_n(FIELD(ring, rsp_prod), __ATOMIC_RELAXED) != ring->rsp_cons;
}

uint32_t pvf_ring_poll(struct pvf_ring *ring, struct pvf_fault *fault)
{
	return accept_prod(ring, __atomic_load_n(FIELD(ring, rsp_prod), __ATOMIC_ACQUIRE), fault);
}

void pvf_ring_get(struct pvf_ring *ring, void *response, size_t size)
{
	PVF_ASSERT(ring->rsp_cons != ring->rsp_seen && size <= ring->entry_size && !(size % 4));
	const uint32_t *from = (const uint32_t *)(const void *)slot(ring, ring->rsp_cons);

	/* Word by word: memcpy() may read a byte twice, and a compiler may go back to the slot. The
	 * copy is what is checked and used. */
	for (size_t i = 0; i < size / 4; i++) {
		uint32_t word = __atomic_load_n(from + i, __ATOMIC_RELAXED);

		memcpy((unsigned char *)response + 4 * i, &word, sizeof(word));
	}
	ring->rsp_cons++;
}

uint32_t pvf_ring_ask(struct pvf_ring *ring, uint32_t after, struct pvf_fault *fault)
{
	uint32_t more = pvf_ring_poll(ring, fault);

	PVF_ASSERT(after);
	if (more >= after || fault->rule)
		return more;
	__atomic_store_n(FIELD(ring, rsp_event), ring->rsp_cons + after, __ATOMIC_SEQ_CST);
	more = accept_prod(ring, __atomic_load_n(FIELD(ring, rsp_prod), __ATOMIC_SEQ_CST), fault);
	/* Fewer than were asked for: the event is still to come. */
	return more < after ? 0 : more;
}

uint32_t pvf_ring_final_check(struct pvf_ring *ring, struct pvf_fault *fault)
{
	return pvf_ring_ask(ring, 1, fault);
}
