/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Answers: as a stream of NBD replies, or one by one.
 */
#include "blk_int.h"

#include <string.h>

#include <linux/nbd.h>

/* As a stream */

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
			size_t left = p->bytes - p->sent;

			if (!p->done)
				return n;
			covered += (uint32_t)left;
			n = pvf_piece_iov(blk, p, p->sent % PVF_PAGE_SIZE, &left, iov, n, max);
			if (left)
				return n;
		}
		if (covered < r->to_send)
			return n; /* the rest is still on its way, and nothing may overtake it */
	}
	return n;
}

/* floor(log2) of the time in microseconds. */
static uint32_t latency_bucket(uint64_t ns)
{
	uint64_t us = ns / 1000;

	return us < 2 ? 0 : pvf_min32(63 - (uint32_t)__builtin_clzll(us), PVF_LATENCY_BUCKETS - 1);
}

static void answered(struct pvf_blk *blk, struct pvf_request *r)
{
	struct pvf_blk_op_stats *stats = pvf_blk_op_stats(blk, r->type);

	pvf_queue_take(blk->reply, &blk->reply_head, &blk->reply_count);
	stats->requests++;
	if (r->error)
		stats->errors++;
	else if (r->type != NBD_CMD_FLUSH)
		stats->bytes += r->bytes;
	stats->latency[latency_bucket(blk->now - r->began)]++;
	blk->pending--;
	r->orphan = true; /* a failed streaming read may still have pieces in the ring */
	pvf_blk_settle(blk, r);
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
				pvf_piece_sent(blk, p, part);
				r->to_send -= part;
				bytes -= part;
				if (p->sent < p->bytes)
					break;
				r->first = p->next;
				if (r->first == PVF_NONE)
					r->last = PVF_NONE;
				pvf_piece_free(blk, index);
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

/* One by one */

static struct pvf_request *head(const struct pvf_blk *blk)
{
	PVF_ASSERT(blk->reply_count);
	return (struct pvf_request *)&blk->request[blk->reply[blk->reply_head]];
}

bool pvf_blk_answer(const struct pvf_blk *blk, struct pvf_answer *answer)
{
	if (!blk->reply_count)
		return false;
	const struct pvf_request *r = head(blk);

	PVF_ASSERT(!r->stream);
	*answer = (struct pvf_answer){.type = r->type, .error = r->error, .bytes = r->bytes};
	memcpy(answer->handle, r->handle, sizeof(answer->handle));
	return true;
}

int pvf_blk_answer_data(const struct pvf_blk *blk, uint32_t from, struct iovec *iov, int max)
{
	int n = 0;

	for (uint16_t k = head(blk)->first; k != PVF_NONE; k = blk->piece[k].next) {
		const struct pvf_piece *p = &blk->piece[k];
		size_t left = p->bytes;

		if (from >= p->bytes) {
			from -= p->bytes;
			continue;
		}
		left -= from;
		n = pvf_piece_iov(blk, p, from, &left, iov, n, max);
		if (left)
			break;
		from = 0;
	}
	return n;
}

void pvf_blk_answered(struct pvf_blk *blk)
{
	answered(blk, head(blk)); /* an orphan's pages go back as it is settled */
}
