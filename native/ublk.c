/* SPDX-License-Identifier: BSD-2-Clause */
#include "ublk.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include <linux/nbd.h>

#define STEPS 256               /* a turn */
#define COPY_BYTES (256u << 10) /* a turn */
#define COPY_IOV 256

_Static_assert(PVF_UBLK_DEPTH <= PVF_REQUESTS, "every tag can be in the engine");
_Static_assert(PVF_UBLK_MAX_IO <= 1 << UBLK_TAG_OFF, "a request's data has 25 bits of offset");

void pvf_ublk_init(struct pvf_ublk *u, int fd, uint16_t queue, const struct ublksrv_io_desc *desc)
{
	memset(u, 0, sizeof(*u));
	u->fd = fd;
	u->queue = queue;
	u->desc = desc;
}

void pvf_ublk_end(struct pvf_ublk *u, int error, const char *why)
{
	if (u->gone)
		return;
	u->gone = true;
	u->error = error;
	u->why = why;
}

static void wait_at_end(struct pvf_ublk *u, uint16_t tag)
{
	PVF_ASSERT(u->waiting_count < PVF_UBLK_DEPTH);
	u->waiting[(u->waiting_head + u->waiting_count++) % PVF_UBLK_DEPTH] = tag;
	u->tag[tag].state = PVF_UBLK_WAITING;
}

static void first_leaves(struct pvf_ublk *u)
{
	u->waiting_head = (u->waiting_head + 1) % PVF_UBLK_DEPTH;
	u->waiting_count--;
}

static void commit(struct pvf_ublk *u, uint16_t tag)
{
	struct pvf_tag *t = &u->tag[tag];

	u->commit[u->commits++] = (struct pvf_commit){
		.tag = tag, .result = t->error ? -t->error : (int32_t)t->bytes};
	t->state = PVF_UBLK_KERNELS;
	u->ours--;
}

/* What the engine is to be asked for on behalf of a tag. False: nothing that we know. */
static bool translate(const struct ublksrv_io_desc *desc, struct pvf_nbd_request *n)
{
	uint64_t bytes = (uint64_t)desc->nr_sectors * PVF_SECTOR;

	*n = (struct pvf_nbd_request){
		.flags = ublksrv_get_flags(desc) & UBLK_IO_F_FUA ? PVF_NBD_FLAG_FUA : 0,
		.from = desc->start_sector * PVF_SECTOR,
		.length = (uint32_t)bytes,
	};
	switch (ublksrv_get_op(desc)) {
	case UBLK_IO_OP_READ:
		n->type = NBD_CMD_READ;
		return bytes <= PVF_UBLK_MAX_IO;
	case UBLK_IO_OP_WRITE:
		n->type = NBD_CMD_WRITE;
		return bytes <= PVF_UBLK_MAX_IO;
	case UBLK_IO_OP_FLUSH:
		n->type = NBD_CMD_FLUSH;
		n->from = n->length = 0;
		return true;
	case UBLK_IO_OP_DISCARD:
		n->type = NBD_CMD_TRIM;
		return bytes <= INT32_MAX;
	default:
		return false;
	}
}

bool pvf_ublk_fetched(struct pvf_ublk *u, uint32_t tag)
{
	struct pvf_nbd_request n;

	if (tag >= PVF_UBLK_DEPTH || u->tag[tag].state != PVF_UBLK_KERNELS) {
		pvf_ublk_end(u, EPROTO, "the kernel handed over a tag that it does not have");
		return false;
	}
	u->ours++;
	u->tag[tag] = (struct pvf_tag){.order = ++u->orders};
	if (translate(&u->desc[tag], &n)) {
		u->tag[tag].bytes = n.length;
		wait_at_end(u, (uint16_t)tag);
	} else {
		u->tag[tag].error = EOPNOTSUPP;
		commit(u, (uint16_t)tag);
	}
	return true;
}

static off_t position(const struct pvf_ublk *u, uint16_t tag, uint32_t at)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)u->queue << UBLK_QID_OFF) +
		       ((uint64_t)tag << UBLK_TAG_OFF) + at);
}

/* Begins the next part of the first that waits. */
static void begin_part(struct pvf_ublk *u, struct pvf_blk *blk)
{
	uint16_t tag = u->waiting[u->waiting_head];
	struct pvf_tag *t = &u->tag[tag];
	struct pvf_nbd_request n;

	translate(&u->desc[tag], &n);
	/* The kernel does not change a descriptor of ours; what has begun goes by what was read. */
	n.length = t->bytes;
	if (n.type == NBD_CMD_READ || n.type == NBD_CMD_WRITE) {
		n.from += t->begun;
		n.length = pvf_blk_part(blk, t->bytes - t->begun);
	}
	u->part = 0;
	u->part_at = t->begun;
	u->part_tag = tag;
	memcpy(n.handle, &tag, sizeof(tag));
	memcpy(n.handle + 4, &t->begun, sizeof(t->begun));
	t->begun += n.length;
	t->parts++;
	if (t->begun == t->bytes) {
		t->state = PVF_UBLK_BEGUN;
		first_leaves(u);
	}
	pvf_blk_begin(blk, &n);
}

static size_t copy_payload(struct pvf_ublk *u, struct pvf_blk *blk)
{
	struct iovec iov[PVF_BLK_PAYLOAD];
	bool last;
	int n = pvf_blk_payload(blk, iov, &last);
	ssize_t got = preadv(u->fd, iov, n, position(u, u->part_tag, u->part_at + u->part));

	if (got <= 0) {
		pvf_ublk_end(u, got ? errno : EIO, "the data of a write cannot be had");
		return 0;
	}
	pvf_blk_payload_add(blk, (size_t)got);
	u->part += (uint32_t)got;
	return (size_t)got;
}

bool pvf_ublk_intake(struct pvf_ublk *u, struct pvf_blk *blk, bool no_new)
{
	size_t copied = 0;

	for (int i = 0; i < STEPS && copied < COPY_BYTES; i++) {
		if (u->gone)
			return false;
		switch (pvf_blk_step(blk)) {
		case PVF_STEP_HEADER:
			if (no_new || !u->waiting_count)
				return false;
			begin_part(u, blk);
			break;
		case PVF_STEP_PAYLOAD:
			copied += copy_payload(u, blk);
			break;
		case PVF_STEP_SKIP: /* of a refused write; nothing of it has to be taken away */
			pvf_blk_skip(blk, blk->skip);
			break;
		case PVF_STEP_SLOT:
			blk->stats.ring_full++;
			return false;
		case PVF_STEP_PAGE:
			blk->stats.pool_empty++;
			return false;
		case PVF_STEP_REQUEST:
			return false;
		}
	}
	return true;
}

/* A read's bytes into its request's pages. 0 or a positive errno. */
static int copy_answer(struct pvf_ublk *u, const struct pvf_blk *blk, uint16_t tag, uint32_t at,
		       uint32_t bytes)
{
	struct iovec iov[COPY_IOV];
	uint32_t done = 0;

	while (done < bytes) {
		int n = pvf_blk_answer_data(blk, done, iov, COPY_IOV);
		ssize_t put = n > 0 ? pwritev(u->fd, iov, n, position(u, tag, at + done)) : 0;

		if (put <= 0)
			return put ? errno : EIO;
		done += (uint32_t)put;
	}
	return 0;
}

void pvf_ublk_deliver(struct pvf_ublk *u, struct pvf_blk *blk)
{
	struct pvf_answer answer;

	while (pvf_blk_answer(blk, &answer)) {
		uint16_t tag;
		uint32_t at;

		memcpy(&tag, answer.handle, sizeof(tag));
		memcpy(&at, answer.handle + 4, sizeof(at));
		struct pvf_tag *t = &u->tag[tag];
		int error = (int)answer.error; /* NBD's are Linux's */

		if (!error && answer.type == NBD_CMD_READ)
			error = copy_answer(u, blk, tag, at, answer.bytes);
		pvf_blk_answered(blk);
		if (error && !t->error)
			t->error = error;
		t->parts--;
		if (t->error && t->state == PVF_UBLK_WAITING) {
			/* The rest of what has failed is not begun; as it has begun, it is the first. */
			first_leaves(u);
			t->state = PVF_UBLK_BEGUN;
		}
		if (t->state == PVF_UBLK_BEGUN && !t->parts)
			commit(u, tag);
	}
}

void pvf_ublk_restart(struct pvf_ublk *u)
{
	uint16_t tags[PVF_UBLK_DEPTH];
	uint32_t n = 0;

	for (uint32_t tag = 0; tag < PVF_UBLK_DEPTH; tag++) {
		struct pvf_tag *t = &u->tag[tag];
		uint32_t at = n;

		if (t->state == PVF_UBLK_KERNELS)
			continue;
		t->begun = 0;
		t->parts = 0;
		t->error = 0;
		for (; at && u->tag[tags[at - 1]].order > t->order; at--)
			tags[at] = tags[at - 1];
		tags[at] = (uint16_t)tag;
		n++;
	}
	u->waiting_head = u->waiting_count = 0;
	for (uint32_t i = 0; i < n; i++)
		wait_at_end(u, tags[i]);
}
