/* SPDX-License-Identifier: BSD-2-Clause */
#include "direct.h"

#include <string.h>

#include <linux/nbd.h>

#define STEPS 512               /* a turn */
#define COPY_BYTES (256u << 10) /* a turn: the backend begins while the rest is copied */
#define COPY_IOV 64

_Static_assert(PVF_DISK_DEPTH <= PVF_REQUESTS, "every request can be in the engine");

static uint16_t index_of(const struct pvf_direct *d, const struct pvf_io *io)
{
	return (uint16_t)(io - d->io);
}

/* Queues of entries, as rings. */
static void put(uint16_t *queue, uint32_t head, uint32_t *count, uint16_t value)
{
	PVF_ASSERT(*count < PVF_DISK_DEPTH);
	queue[(head + (*count)++) % PVF_DISK_DEPTH] = value;
}

static uint16_t take(const uint16_t *queue, uint32_t *head, uint32_t *count)
{
	uint16_t value = queue[*head];

	*head = (*head + 1) % PVF_DISK_DEPTH;
	(*count)--;
	return value;
}

void pvf_direct_init(struct pvf_direct *d)
{
	memset(d, 0, sizeof(*d));
	d->part_io = PVF_NONE;
	d->frees = PVF_DISK_DEPTH;
	for (uint32_t i = 0; i < PVF_DISK_DEPTH; i++)
		d->free[i] = (uint16_t)(PVF_DISK_DEPTH - 1 - i);
}

struct pvf_io *pvf_direct_ask(struct pvf_direct *d, uint16_t type, uint64_t offset, uint32_t bytes,
			      const struct iovec *iov, uint16_t iovs)
{
	if (!d->frees)
		return NULL;
	uint16_t index = d->free[--d->frees];
	struct pvf_io *io = &d->io[index];

	/* Field by field: the vector's unused entries are most of it. */
	io->cookie = 0;
	io->offset = offset;
	io->order = ++d->orders;
	io->bytes = bytes;
	io->begun = 0;
	io->type = type;
	io->flags = io->parts = 0;
	io->iovs = iovs;
	io->state = PVF_IO_WAITING;
	io->error = 0;
	for (uint16_t i = 0; i < iovs; i++)
		io->iov[i] = iov[i];
	d->used++;
	put(d->waiting, d->waiting_head, &d->waiting_count, index);
	return io;
}

static void finish(struct pvf_direct *d, struct pvf_io *io)
{
	io->state = PVF_IO_DONE;
	put(d->done, d->done_head, &d->done_count, index_of(d, io));
}

/* Copies between a request's memory, from byte `at` on, and all of `pages`. */
static void copy(const struct pvf_io *io, size_t at, const struct iovec *pages, int n, bool to_pages)
{
	size_t done = 0; /* of the present entry of `pages` */
	int page = 0;

	for (uint32_t i = 0; i < io->iovs && page < n; i++) {
		const struct iovec *v = &io->iov[i];

		if (at >= v->iov_len) {
			at -= v->iov_len;
			continue;
		}
		while (at < v->iov_len && page < n) {
			unsigned char *theirs = (unsigned char *)v->iov_base + at;
			unsigned char *ours = (unsigned char *)pages[page].iov_base + done;
			size_t part = v->iov_len - at;

			if (part > pages[page].iov_len - done)
				part = pages[page].iov_len - done;
			if (to_pages)
				memcpy(ours, theirs, part);
			else
				memcpy(theirs, ours, part);
			at += part;
			done += part;
			if (done == pages[page].iov_len) {
				done = 0;
				page++;
			}
		}
		at = 0;
	}
}

/* Intake */

static void begin_part(struct pvf_direct *d, struct pvf_blk *blk)
{
	uint16_t index = d->waiting[d->waiting_head];
	struct pvf_io *io = &d->io[index];
	struct pvf_nbd_request n = {
		.flags = io->flags,
		.type = io->type,
		.from = io->offset + io->begun,
		.length = io->bytes - io->begun,
	};

	if (io->type == NBD_CMD_READ || io->type == NBD_CMD_WRITE)
		n.length = pvf_blk_part(blk, n.length);
	d->part_io = index;
	d->part_at = io->begun;
	d->part = 0;
	memcpy(n.handle, &index, sizeof(index));
	memcpy(n.handle + 4, &io->begun, sizeof(io->begun));
	io->begun += n.length;
	io->parts++;
	if (io->begun == io->bytes) {
		io->state = PVF_IO_BEGUN;
		take(d->waiting, &d->waiting_head, &d->waiting_count);
	}
	pvf_blk_begin(blk, &n);
}

static size_t copy_payload(struct pvf_direct *d, struct pvf_blk *blk)
{
	struct iovec iov[PVF_BLK_PAYLOAD];
	bool last;
	int n = pvf_blk_payload(blk, iov, &last);
	size_t bytes = 0;

	for (int i = 0; i < n; i++)
		bytes += iov[i].iov_len;
	copy(&d->io[d->part_io], (size_t)d->part_at + d->part, iov, n, true);
	d->part += (uint32_t)bytes;
	pvf_blk_payload_add(blk, bytes);
	return bytes;
}

bool pvf_direct_intake(struct pvf_direct *d, struct pvf_blk *blk, bool no_new)
{
	size_t copied = 0;

	d->starved = false;
	for (int i = 0; i < STEPS && copied < COPY_BYTES; i++)
		switch (pvf_blk_step(blk)) {
		case PVF_STEP_HEADER:
			if (no_new || !d->waiting_count)
				return false;
			begin_part(d, blk);
			break;
		case PVF_STEP_PAYLOAD:
			copied += copy_payload(d, blk);
			break;
		case PVF_STEP_SKIP: /* of a refused write; nobody is waiting to hand it over */
			pvf_blk_skip(blk, blk->skip);
			break;
		case PVF_STEP_SLOT:
			blk->stats.ring_full++;
			return false;
		case PVF_STEP_PAGE:
			blk->stats.pool_empty++;
			d->starved = true;
			return false;
		case PVF_STEP_REQUEST:
			d->starved = true;
			return false;
		}
	return true;
}

/* Completion */

static void copy_answer(const struct pvf_blk *blk, const struct pvf_io *io, uint32_t at,
			uint32_t bytes)
{
	struct iovec iov[COPY_IOV];
	uint32_t done = 0;

	while (done < bytes) {
		int n = pvf_blk_answer_data(blk, done, iov, COPY_IOV);

		PVF_ASSERT(n > 0);
		copy(io, (size_t)at + done, iov, n, false);
		for (int i = 0; i < n; i++)
			done += (uint32_t)iov[i].iov_len;
	}
}

bool pvf_direct_deliver(struct pvf_direct *d, struct pvf_blk *blk)
{
	struct pvf_answer answer;
	bool some = false;

	while (pvf_blk_answer(blk, &answer)) {
		uint16_t index;
		uint32_t at;

		memcpy(&index, answer.handle, sizeof(index));
		memcpy(&at, answer.handle + 4, sizeof(at));
		struct pvf_io *io = &d->io[index];

		if (!answer.error && answer.type == NBD_CMD_READ)
			copy_answer(blk, io, at, answer.bytes);
		pvf_blk_answered(blk);
		some = true;
		if (answer.error && !io->error)
			io->error = (int)answer.error; /* NBD's numbers are Linux's */
		io->parts--;
		if (io->parts)
			continue;
		if (io->error && io->state == PVF_IO_WAITING) {
			/* The rest of a request that has failed is not begun. Only the first that
			 * waits can have parts. */
			PVF_ASSERT(d->waiting[d->waiting_head] == index);
			take(d->waiting, &d->waiting_head, &d->waiting_count);
			io->state = PVF_IO_BEGUN;
		}
		if (io->state == PVF_IO_BEGUN)
			finish(d, io);
	}
	return some && d->starved;
}

int pvf_direct_take(struct pvf_direct *d, struct pvf_disk_done *done, int max)
{
	int n;

	for (n = 0; n < max && d->done_count; n++) {
		uint16_t index = take(d->done, &d->done_head, &d->done_count);
		struct pvf_io *io = &d->io[index];

		done[n] = (struct pvf_disk_done){
			.cookie = io->cookie,
			.result = io->error ? -io->error : (int32_t)io->bytes,
		};
		io->state = PVF_IO_FREE;
		d->free[d->frees++] = index;
		d->used--;
	}
	return n;
}

/* Connections come and go */

void pvf_direct_restart(struct pvf_direct *d)
{
	uint16_t found[PVF_DISK_DEPTH];
	uint32_t n = 0;

	for (uint32_t index = 0; index < PVF_DISK_DEPTH; index++) {
		struct pvf_io *io = &d->io[index];
		uint32_t at = n;

		if (io->state != PVF_IO_WAITING && io->state != PVF_IO_BEGUN)
			continue;
		io->state = PVF_IO_WAITING;
		io->begun = 0;
		io->parts = 0;
		io->error = 0;
		for (; at && d->io[found[at - 1]].order > io->order; at--)
			found[at] = found[at - 1];
		found[at] = (uint16_t)index;
		n++;
	}
	d->part_io = PVF_NONE;
	d->waiting_head = d->waiting_count = 0;
	for (uint32_t i = 0; i < n; i++)
		put(d->waiting, d->waiting_head, &d->waiting_count, found[i]);
}

void pvf_direct_fail(struct pvf_direct *d, int error)
{
	pvf_direct_restart(d);
	while (d->waiting_count) {
		struct pvf_io *io =
			&d->io[take(d->waiting, &d->waiting_head, &d->waiting_count)];

		io->error = error;
		finish(d, io);
	}
}
