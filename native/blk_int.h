/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the disk engine's files share with each other only: blk.c (a request's life), blk_piece.c
 * (pages and ring), blk_reply.c (answers).
 */
#ifndef PVF_BLK_INT_H
#define PVF_BLK_INT_H

#include "blk.h"

static inline uint32_t pvf_pages_of(uint32_t bytes)
{
	return bytes / PVF_PAGE_SIZE + (bytes % PVF_PAGE_SIZE != 0);
}

/* Queues of request indices, as rings. */
static inline void pvf_queue_put(uint16_t *queue, uint32_t head, uint32_t *count, uint16_t value)
{
	PVF_ASSERT(*count < PVF_REQUESTS);
	queue[(head + (*count)++) % PVF_REQUESTS] = value;
}

static inline uint16_t pvf_queue_take(const uint16_t *queue, uint32_t *head, uint32_t *count)
{
	uint16_t value = queue[*head];

	*head = (*head + 1) % PVF_REQUESTS;
	(*count)--;
	return value;
}

struct pvf_blk_op_stats *pvf_blk_op_stats(struct pvf_blk *blk, uint16_t type);

/* blk.c: takes a request as far as it can go without a slot, a page or a byte from the client. */
void pvf_blk_settle(struct pvf_blk *blk, struct pvf_request *r);

/* blk_piece.c */

/* What a connection's numbers allow for one piece, and what reads leave to writes. */
void pvf_piece_limits(struct pvf_blk *blk, uint32_t max_segments);

/* Pages that a read of `bytes` bytes takes at most, those of its descriptors included. */
uint32_t pvf_piece_need(const struct pvf_blk *blk, uint32_t bytes);

void pvf_piece_free(struct pvf_blk *blk, uint16_t index);

/* Takes pages for the next bytes of a read or write: a full piece, or all that is left of it, or at
 * least `blk->least` pages. NULL: there are not enough. */
struct pvf_piece *pvf_piece_new(struct pvf_blk *blk, uint16_t request);

/* A read's bytes have come: it stays with its request until they are sent or dropped. */
void pvf_piece_done(struct pvf_blk *blk, struct pvf_piece *p);

/* Put a piece into the ring; the caller has checked that there is a slot. */
void pvf_piece_issue(struct pvf_blk *blk, struct pvf_piece *p);
void pvf_piece_issue_flush(struct pvf_blk *blk, uint16_t request);
void pvf_piece_issue_discard(struct pvf_blk *blk, uint16_t request);

/* Adds what of a piece begins at byte `at` of the pages it holds, `bytes` at most; neighbouring
 * pages are one entry. Takes off `*bytes` what was added; returns the new number of entries. */
int pvf_piece_iov(const struct pvf_blk *blk, const struct pvf_piece *p, uint32_t at, size_t *bytes,
		  struct iovec *iov, int n, int max);

/* A read's bytes were handed on: gives back the pages that they were in. */
void pvf_piece_sent(struct pvf_blk *blk, struct pvf_piece *p, uint32_t bytes);

#endif
