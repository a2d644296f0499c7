/* SPDX-License-Identifier: BSD-2-Clause */
#include "nbd.h"

#include <endian.h>
#include <string.h>

#include <linux/nbd.h>

_Static_assert(sizeof(struct nbd_request) == PVF_NBD_HEADER, "NBD request header");
_Static_assert(sizeof(struct nbd_reply) == PVF_NBD_REPLY, "NBD simple reply");

bool pvf_nbd_parse(const uint8_t header[PVF_NBD_HEADER], struct pvf_nbd_request *request)
{
	struct nbd_request wire;

	memcpy(&wire, header, sizeof(wire));
	if (be32toh(wire.magic) != NBD_REQUEST_MAGIC)
		return false;
	uint32_t type = be32toh(wire.type);

	request->flags = (uint16_t)(type >> 16);
	request->type = (uint16_t)type;
	memcpy(request->handle, wire.handle, sizeof(request->handle));
	request->from = be64toh(wire.from);
	request->length = be32toh(wire.len);
	return true;
}

uint32_t pvf_nbd_check(const struct pvf_nbd_request *request, const struct pvf_geometry *geo,
		       uint32_t off)
{
	uint64_t size = geo->sectors * PVF_SECTOR;
	uint32_t features = geo->features & ~off;
	bool flush = geo->features & (PVF_BLK_FLUSH | PVF_BLK_BARRIER) && !(off & PVF_BLK_FLUSH);
	bool writes = request->type == NBD_CMD_WRITE || request->type == NBD_CMD_TRIM;

	if (request->flags & ~PVF_NBD_FLAG_FUA)
		return PVF_NBD_EINVAL;
	switch (request->type) {
	case NBD_CMD_READ:
	case NBD_CMD_WRITE:
		break;
	case NBD_CMD_FLUSH:
		if (request->from || request->length)
			return PVF_NBD_EINVAL;
		return flush ? 0 : PVF_NBD_ENOTSUP;
	case NBD_CMD_TRIM:
		if (!(features & PVF_BLK_DISCARD))
			return PVF_NBD_ENOTSUP;
		break;
	default:
		return PVF_NBD_EINVAL;
	}
	if (writes && features & PVF_BLK_READ_ONLY)
		return PVF_NBD_EPERM;
	/* FUA is a write followed by a flush: without flush there is no honest way to give it. */
	if (writes && request->flags & PVF_NBD_FLAG_FUA && !flush)
		return PVF_NBD_EINVAL;
	if (!request->length || request->from % geo->sector_size ||
	    request->length % geo->sector_size)
		return PVF_NBD_EINVAL;
	if (request->from > size || request->length > size - request->from)
		return request->type == NBD_CMD_WRITE ? PVF_NBD_ENOSPC : PVF_NBD_EINVAL;
	if (request->type != NBD_CMD_TRIM && request->length > PVF_NBD_MAX_PAYLOAD)
		return PVF_NBD_EINVAL;
	return 0;
}

void pvf_nbd_reply(uint8_t reply[PVF_NBD_REPLY], const uint8_t handle[8], uint32_t error)
{
	struct nbd_reply wire = {
		.magic = htobe32(NBD_REPLY_MAGIC),
		.error = htobe32(error),
	};

	memcpy(wire.handle, handle, sizeof(wire.handle));
	memcpy(reply, &wire, sizeof(wire));
}
