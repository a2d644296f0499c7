/* SPDX-License-Identifier: BSD-2-Clause
 *
 * pvfront/disk.h: what a program may ask of its disk now, and how it asks. All under the disk's lock;
 * what was asked is parts.c's and begins with the next service.
 */
#include <errno.h>
#include <string.h>

#include <linux/nbd.h>

#include "disk_int.h"

#define DISCARD_MOST (1u << 30)

EXPORT void pvf_disk_get_info(struct pvf_disk *d, struct pvf_disk_info *info)
{
	pthread_mutex_lock(&d->lock);
	const struct pvf_blk *blk = &d->worker.queue->blk;
	const struct pvf_geometry *geo = &blk->geo;

	*info = (struct pvf_disk_info){
		.size = geo->sectors * PVF_SECTOR,
		.sector_size = geo->sector_size,
		.flags = geo->features & PVF_BLK_READ_ONLY ? PVF_DISK_READ_ONLY : 0,
		.discard_granularity = geo->discard_granularity,
		.discard_alignment = geo->discard_alignment,
		.state = d->state,
		.generation = d->starts,
		.pending = d->direct.used - d->direct.done_count,
	};
	if (geo->features & (PVF_BLK_FLUSH | PVF_BLK_BARRIER) && !(blk->features_off & PVF_BLK_FLUSH))
		info->flags |= PVF_DISK_FLUSH;
	if (geo->features & PVF_BLK_DISCARD && !(blk->features_off & PVF_BLK_DISCARD))
		info->flags |= PVF_DISK_DISCARD;
	memcpy(info->name, d->worker.name, sizeof(info->name));
	pthread_mutex_unlock(&d->lock);
}

/* 0, or why a request cannot be. What changes later (a resize, a feature that goes) fails it then. */
static int check(const struct pvf_disk *d, uint16_t type, size_t bytes, uint64_t offset, bool fua)
{
	const struct pvf_blk *blk = &d->worker.queue->blk;
	const struct pvf_geometry *geo = &blk->geo;
	bool writes = type == NBD_CMD_WRITE || type == NBD_CMD_TRIM;
	bool flush = geo->features & (PVF_BLK_FLUSH | PVF_BLK_BARRIER) &&
		     !(blk->features_off & PVF_BLK_FLUSH);
	uint64_t size = geo->sectors * PVF_SECTOR;

	if (d->state == PVF_DISK_GONE)
		return -ENODEV;
	if (!d->starts)
		return -ENOTCONN;
	if (writes && geo->features & PVF_BLK_READ_ONLY)
		return -EROFS;
	if ((fua || type == NBD_CMD_FLUSH) && !flush)
		return -EOPNOTSUPP;
	if (type == NBD_CMD_TRIM &&
	    (!(geo->features & PVF_BLK_DISCARD) || blk->features_off & PVF_BLK_DISCARD))
		return -EOPNOTSUPP;
	if (type == NBD_CMD_FLUSH)
		return 0;
	if (!bytes || bytes % geo->sector_size || offset % geo->sector_size || offset > size ||
	    bytes > size - offset ||
	    bytes > (type == NBD_CMD_TRIM ? DISCARD_MOST : PVF_DISK_MAX_BYTES))
		return -EINVAL;
	return 0;
}

static int ask(struct pvf_disk *d, uint16_t type, const struct iovec *iov, int count, size_t bytes,
	       uint64_t offset, uint32_t flags, uint64_t cookie)
{
	bool fua = flags & PVF_DISK_FUA;
	int rc;

	pthread_mutex_lock(&d->lock);
	rc = check(d, type, bytes, offset, fua);
	if (!rc && !pvf_direct_ask(&d->direct, type, fua ? PVF_NBD_FLAG_FUA : 0, offset,
				   (uint32_t)bytes, iov, (uint16_t)count, cookie))
		rc = -EAGAIN;
	pthread_mutex_unlock(&d->lock);
	return rc;
}

static int ask_vector(struct pvf_disk *d, uint16_t type, const struct iovec *iov, int count,
		      uint64_t offset, uint32_t flags, uint64_t cookie)
{
	size_t bytes = 0;

	if (count < 1 || count > PVF_DISK_IOV || flags & ~PVF_DISK_FUA)
		return -EINVAL;
	for (int i = 0; i < count; i++) {
		if (iov[i].iov_len > PVF_DISK_MAX_BYTES)
			return -EINVAL;
		bytes += iov[i].iov_len;
	}
	return ask(d, type, iov, count, bytes, offset, flags, cookie);
}

EXPORT int pvf_disk_read(struct pvf_disk *d, void *buffer, size_t bytes, uint64_t offset,
			 uint64_t cookie)
{
	struct iovec iov = {.iov_base = buffer, .iov_len = bytes};

	return ask(d, NBD_CMD_READ, &iov, 1, bytes, offset, 0, cookie);
}

EXPORT int pvf_disk_write(struct pvf_disk *d, const void *buffer, size_t bytes, uint64_t offset,
			  uint64_t cookie)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buffer, .iov_len = bytes};

	return ask(d, NBD_CMD_WRITE, &iov, 1, bytes, offset, 0, cookie);
}

EXPORT int pvf_disk_readv(struct pvf_disk *d, const struct iovec *iov, int count, uint64_t offset,
			  uint64_t cookie)
{
	return ask_vector(d, NBD_CMD_READ, iov, count, offset, 0, cookie);
}

EXPORT int pvf_disk_writev(struct pvf_disk *d, const struct iovec *iov, int count, uint64_t offset,
			   uint32_t flags, uint64_t cookie)
{
	return ask_vector(d, NBD_CMD_WRITE, iov, count, offset, flags, cookie);
}

EXPORT int pvf_disk_flush(struct pvf_disk *d, uint64_t cookie)
{
	return ask(d, NBD_CMD_FLUSH, NULL, 0, 0, 0, 0, cookie);
}

EXPORT int pvf_disk_discard(struct pvf_disk *d, size_t bytes, uint64_t offset, uint64_t cookie)
{
	return ask(d, NBD_CMD_TRIM, NULL, 0, bytes, offset, 0, cookie);
}
