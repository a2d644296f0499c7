/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The frontend's end of a shared ring (xen/io/ring.h), for any class and any order.
 *
 * Everything that decides lives in private memory: the page is written, and read at exactly two
 * places, rsp_prod (once per poll, with acquire) and the response slots (each copied once). The
 * backend may write anything anywhere in the page at any time; a lie is found by rules 1 and 2 here
 * or by whoever interprets the responses. This file knows no descriptor.
 */
#ifndef PVF_RING_H
#define PVF_RING_H

#include "pvf.h"

#define PVF_RING_HEADER 64u /* bytes before the first slot, in every ring.h ring */

struct pvf_ring {
	unsigned char *shared;  /* the mapped sring */
	uint32_t entries;       /* a power of two */
	uint32_t entry_size;    /* bytes of union request/response */
	uint32_t req_prod_pvt;  /* next request slot to fill */
	uint32_t req_published; /* the req_prod that the backend was last shown */
	uint32_t rsp_cons;      /* next response to read */
	uint32_t rsp_seen;      /* the rsp_prod last accepted */
};

/* Slots of a ring of `bytes` bytes: the largest power of two that fits; 0 if none does. */
uint32_t pvf_ring_entries(size_t bytes, uint32_t entry_size);

/* Lays out an empty ring in `shared` (bytes long, all of it cleared), as SHARED_RING_INIT and
 * FRONT_RING_INIT do. `first` is the index that both ends start at: 0, except in tests of wrap. */
void pvf_ring_init(struct pvf_ring *ring, void *shared, size_t bytes, uint32_t entry_size,
		   uint32_t first);

/* Slots that can be filled now. */
uint32_t pvf_ring_free(const struct pvf_ring *ring);

/* Copies one request into the next slot; false when the ring is full. */
bool pvf_ring_put(struct pvf_ring *ring, const void *request, size_t size);

/* Shows the filled slots to the backend. True: it must be notified (its req_event lies within what
 * was just published; RING_PUSH_REQUESTS_AND_CHECK_NOTIFY). */
bool pvf_ring_push(struct pvf_ring *ring);

/* Responses that can be read now. Sets `fault` and returns 0 when rsp_prod breaks rule 1 or 2. */
uint32_t pvf_ring_poll(struct pvf_ring *ring, struct pvf_fault *fault);

/* True: rsp_prod is not where responses were last read up to. For who looks again and again; whether it is
 * a lie is for pvf_ring_poll() to say. */
bool pvf_ring_changed(const struct pvf_ring *ring);

/* Copies the next response out, each byte once. Only after pvf_ring_poll() counted it; `size` is a
 * multiple of 4, as that of every response is. */
void pvf_ring_get(struct pvf_ring *ring, void *response, size_t size);

/* Asks for an event with the next response and looks once more (RING_FINAL_CHECK_FOR_RESPONSES):
 * 0 means that every later response brings an event. Sets `fault` as pvf_ring_poll(). */
uint32_t pvf_ring_final_check(struct pvf_ring *ring, struct pvf_fault *fault);

/* The same with the event put off until `after` more responses are there: for who can wait for several.
 * 1 is the next. */
uint32_t pvf_ring_ask(struct pvf_ring *ring, uint32_t after, struct pvf_fault *fault);

#endif
