/* SPDX-License-Identifier: BSD-2-Clause
 *
 * NBD, transmission phase, the server's side with simple replies; pure.
 * https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Transmission phase".
 */
#ifndef PVF_NBD_H
#define PVF_NBD_H

#include "pvf.h"

#define PVF_NBD_HEADER 28u
#define PVF_NBD_REPLY 16u

/* Error values of the protocol; they are Linux's numbers by intent. */
enum pvf_nbd_error {
	PVF_NBD_EPERM = 1,
	PVF_NBD_EIO = 5,
	PVF_NBD_EINVAL = 22,
	PVF_NBD_ENOSPC = 28,
	PVF_NBD_ENOTSUP = 95,
};

#define PVF_NBD_FLAG_FUA 1u /* command flag, as it stands in the 16-bit field */

struct pvf_nbd_request {
	uint16_t flags;
	uint16_t type;      /* NBD_CMD_* of linux/nbd.h */
	uint8_t handle[8];  /* opaque, echoed */
	uint64_t from;      /* bytes */
	uint32_t length;    /* bytes */
};

/* What the disk is and can do. */
struct pvf_geometry {
	uint64_t sectors; /* of 512 bytes */
	uint32_t sector_size;
	uint32_t features; /* PVF_BLK_* offered */
	uint32_t max_segments;
	uint32_t discard_granularity; /* bytes; 0: a sector */
	uint32_t discard_alignment;
	uint32_t vdev;
	uint32_t stall_seconds;
	uint32_t poll_us;
};

/* Parses 28 bytes. False: the magic is wrong and the stream cannot be understood any more. */
bool pvf_nbd_parse(const uint8_t header[PVF_NBD_HEADER], struct pvf_nbd_request *request);

/* 0, or the error that the request is refused with. `off` holds the features that the backend
 * turned out not to have. Not for NBD_CMD_DISC. */
uint32_t pvf_nbd_check(const struct pvf_nbd_request *request, const struct pvf_geometry *geo,
		       uint32_t off);

void pvf_nbd_reply(uint8_t reply[PVF_NBD_REPLY], const uint8_t handle[8], uint32_t error);

#endif
