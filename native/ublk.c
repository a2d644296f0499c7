/* SPDX-License-Identifier: BSD-2-Clause */
#include "ublk.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include <linux/nbd.h>

#define COPY_IOV 256

_Static_assert(PVF_UBLK_DEPTH <= PVF_PARTS_MOST, "every tag can be ours");
_Static_assert(PVF_UBLK_MAX_IO <= 1 << UBLK_TAG_OFF, "a request's data has 25 bits of offset");

void pvf_ublk_end(struct pvf_ublk *u, int error, const char *why)
{
	if (u->gone)
		return;
	u->gone = true;
	u->error = error;
	u->why = why;
}

static void commit(struct pvf_ublk *u, uint16_t tag, int32_t result)
{
	u->commit[u->commits++] = (struct pvf_commit){.tag = tag, .result = result};
	u->ours[tag] = false;
}

/* What the engine is to be asked for. False: nothing that we know. */
static bool translate(const struct ublksrv_io_desc *desc, uint16_t *type, uint32_t *bytes)
{
	uint64_t all = (uint64_t)desc->nr_sectors * PVF_SECTOR;

	*bytes = (uint32_t)all;
	switch (ublksrv_get_op(desc)) {
	case UBLK_IO_OP_READ:
		*type = NBD_CMD_READ;
		return all && all <= PVF_UBLK_MAX_IO;
	case UBLK_IO_OP_WRITE:
		*type = NBD_CMD_WRITE;
		return all && all <= PVF_UBLK_MAX_IO;
	case UBLK_IO_OP_FLUSH:
		*type = NBD_CMD_FLUSH;
		*bytes = 0;
		return true;
	case UBLK_IO_OP_DISCARD:
		*type = NBD_CMD_TRIM;
		return all <= INT32_MAX;
	default:
		return false;
	}
}

bool pvf_ublk_fetched(struct pvf_ublk *u, uint32_t tag)
{
	uint16_t type;
	uint32_t bytes;

	if (tag >= PVF_UBLK_DEPTH || u->ours[tag]) {
		pvf_ublk_end(u, EPROTO, "the kernel handed over a tag that it does not have");
		return false;
	}
	const struct ublksrv_io_desc *desc = &u->desc[tag];

	u->ours[tag] = true;
	if (translate(desc, &type, &bytes))
		pvf_parts_ask(&u->parts, (uint16_t)tag, type,
			      ublksrv_get_flags(desc) & UBLK_IO_F_FUA ? PVF_NBD_FLAG_FUA : 0,
			      bytes ? desc->start_sector * PVF_SECTOR : 0, bytes);
	else
		commit(u, (uint16_t)tag, -EOPNOTSUPP);
	return true;
}

static off_t position(const struct pvf_ublk *u, uint16_t tag, uint32_t at)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)u->queue << UBLK_QID_OFF) +
		       ((uint64_t)tag << UBLK_TAG_OFF) + at);
}

/* As requests in parts. */

static size_t fill(void *source, uint16_t tag, uint32_t at, const struct iovec *pages, int n)
{
	struct pvf_ublk *u = source;
	ssize_t got = u->gone ? 0 : preadv(u->fd, pages, n, position(u, tag, at));

	if (got > 0)
		return (size_t)got;
	pvf_ublk_end(u, got ? errno : EIO, "the data of a write cannot be had");
	return 0;
}

/* A read's bytes into its request's pages. */
static int take(void *source, const struct pvf_blk *blk, uint16_t tag, uint32_t at, uint32_t bytes)
{
	struct pvf_ublk *u = source;
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

static void finish(void *source, uint16_t tag)
{
	struct pvf_ublk *u = source;
	const struct pvf_whole *w = &u->parts.whole[tag];

	commit(u, tag, w->error ? -w->error : (int32_t)w->bytes);
}

static const struct pvf_parts_ops ops = {.fill = fill, .take = take, .finish = finish};

void pvf_ublk_init(struct pvf_ublk *u, int fd, uint16_t queue, const struct ublksrv_io_desc *desc)
{
	memset(u, 0, sizeof(*u));
	u->fd = fd;
	u->queue = queue;
	u->desc = desc;
	pvf_parts_init(&u->parts, &ops, u);
}
