/* SPDX-License-Identifier: BSD-2-Clause */
#include "parts.h"

#include <string.h>

#include <linux/nbd.h>

#define STEPS 512               /* a turn */
#define COPY_BYTES (256u << 10) /* a turn: the backend begins while the rest is copied */

_Static_assert(PVF_PARTS_MOST <= PVF_REQUESTS, "every request can be in the engine");

void pvf_parts_init(struct pvf_parts *p, const struct pvf_parts_ops *ops, void *source)
{
	memset(p, 0, sizeof(*p));
	p->ops = ops;
	p->source = source;
}

static void wait_at_end(struct pvf_parts *p, uint16_t index)
{
	PVF_ASSERT(p->waiting_count < PVF_PARTS_MOST);
	p->waiting[(p->waiting_head + p->waiting_count++) % PVF_PARTS_MOST] = index;
	p->whole[index].state = PVF_WHOLE_WAITING;
}

static void first_leaves(struct pvf_parts *p)
{
	p->whole[p->waiting[p->waiting_head]].state = PVF_WHOLE_BEGUN;
	p->waiting_head = (p->waiting_head + 1) % PVF_PARTS_MOST;
	p->waiting_count--;
}

static void finish(struct pvf_parts *p, uint16_t index)
{
	p->whole[index].state = PVF_WHOLE_NONE;
	p->ops->finish(p->source, index);
}

void pvf_parts_ask(struct pvf_parts *p, uint16_t index, uint16_t type, uint16_t flags,
		   uint64_t from, uint32_t bytes)
{
	PVF_ASSERT(p->whole[index].state == PVF_WHOLE_NONE);
	p->whole[index] = (struct pvf_whole){
		.order = ++p->orders, .from = from, .bytes = bytes, .type = type, .flags = flags};
	wait_at_end(p, index);
}

/* Begins the next part of the first that waits. */
static void begin_part(struct pvf_parts *p, struct pvf_blk *blk)
{
	uint16_t index = p->waiting[p->waiting_head];
	struct pvf_whole *w = &p->whole[index];
	struct pvf_nbd_request n = {
		.flags = w->flags,
		.type = w->type,
		.from = w->from + w->begun,
		.length = w->bytes - w->begun,
	};

	if (w->type == NBD_CMD_READ || w->type == NBD_CMD_WRITE)
		n.length = pvf_blk_part(blk, n.length);
	p->part_index = index;
	p->part_at = w->begun;
	p->part = 0;
	memcpy(n.handle, &index, sizeof(index));
	memcpy(n.handle + 4, &w->begun, sizeof(w->begun));
	w->begun += n.length;
	w->parts++;
	if (w->begun == w->bytes)
		first_leaves(p);
	pvf_blk_begin(blk, &n);
}

static size_t copy_payload(struct pvf_parts *p, struct pvf_blk *blk)
{
	struct iovec pages[PVF_BLK_PAYLOAD];
	bool last;
	int n = pvf_blk_payload(blk, pages, &last);
	size_t bytes = p->ops->fill(p->source, p->part_index, p->part_at + p->part, pages, n);

	pvf_blk_payload_add(blk, bytes);
	p->part += (uint32_t)bytes;
	return bytes;
}

bool pvf_parts_intake(struct pvf_parts *p, struct pvf_blk *blk, bool no_new)
{
	size_t copied = 0, bytes;

	p->starved = false;
	for (int i = 0; i < STEPS && copied < COPY_BYTES; i++)
		switch (pvf_blk_step(blk)) {
		case PVF_STEP_HEADER:
			if (no_new || !p->waiting_count)
				return false;
			begin_part(p, blk);
			break;
		case PVF_STEP_PAYLOAD:
			bytes = copy_payload(p, blk);
			if (!bytes)
				return false;
			copied += bytes;
			break;
		case PVF_STEP_SKIP: /* of a refused write; nothing of it has to be taken away */
			pvf_blk_skip(blk, blk->skip);
			break;
		case PVF_STEP_SLOT:
			blk->stats.ring_full++;
			return false;
		case PVF_STEP_PAGE:
			blk->stats.pool_empty++;
			p->starved = true;
			return false;
		case PVF_STEP_REQUEST:
			p->starved = true;
			return false;
		}
	return true;
}

static void answered(struct pvf_parts *p, uint16_t index, int error)
{
	struct pvf_whole *w = &p->whole[index];

	if (error && !w->error)
		w->error = error;
	w->parts--;
	/* The rest of what has failed is not begun; as it has begun, it is the first that waits. */
	if (w->error && w->state == PVF_WHOLE_WAITING)
		first_leaves(p);
	if (w->state == PVF_WHOLE_BEGUN && !w->parts)
		finish(p, index);
}

bool pvf_parts_deliver(struct pvf_parts *p, struct pvf_blk *blk)
{
	struct pvf_answer answer;
	bool some = false;

	while (pvf_blk_answer(blk, &answer)) {
		uint16_t index;
		uint32_t at;
		int error = (int)answer.error; /* NBD's numbers are Linux's */

		memcpy(&index, answer.handle, sizeof(index));
		memcpy(&at, answer.handle + 4, sizeof(at));
		if (!error && answer.type == NBD_CMD_READ)
			error = p->ops->take(p->source, blk, index, at, answer.bytes);
		pvf_blk_answered(blk);
		answered(p, index, error);
		some = true;
	}
	return some && p->starved;
}

void pvf_parts_restart(struct pvf_parts *p)
{
	uint16_t found[PVF_PARTS_MOST];
	uint32_t n = 0;

	for (uint32_t index = 0; index < PVF_PARTS_MOST; index++) {
		struct pvf_whole *w = &p->whole[index];
		uint32_t at = n;

		if (w->state == PVF_WHOLE_NONE)
			continue;
		w->begun = 0;
		w->parts = 0;
		w->error = 0;
		for (; at && p->whole[found[at - 1]].order > w->order; at--)
			found[at] = found[at - 1];
		found[at] = (uint16_t)index;
		n++;
	}
	p->waiting_head = p->waiting_count = 0;
	for (uint32_t i = 0; i < n; i++)
		wait_at_end(p, found[i]);
}

void pvf_parts_fail(struct pvf_parts *p, int error)
{
	pvf_parts_restart(p);
	while (p->waiting_count) {
		uint16_t index = p->waiting[p->waiting_head];

		first_leaves(p);
		p->whole[index].error = error;
		finish(p, index);
	}
}
