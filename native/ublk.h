/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The kernel's ublk device: requests between its tags and the engine's pages.
 * Linux 6.12 drivers/block/ublk_drv.c, Documentation/block/ublk.rst.
 *
 * Theory of operation
 *
 *   The kernel numbers the requests of a queue by *tag*. A tag is either the kernel's, or it was
 *   *fetched* and is ours until its result is *committed*. What it wants stands in a descriptor that
 *   the kernel shows us, unchanged for as long as the tag is ours.
 *
 *   Data is copied by preadv() and pwritev() between the request's own pages and granted ones
 *   (UBLK_F_USER_COPY): one copy each way, no buffer in between. Neither waits for anybody.
 *
 *   A tag's request goes to the engine in parts (parts.h), and is committed when it has finished. A
 *   connection to the backend may end with tags half done. They are ours all the same, and begin
 *   again with the next connection (pvf_parts_restart). So nothing has to be asked of the kernel
 *   as long as the worker lives. If it dies, the kernel has every tag back and hands it to the
 *   next worker (UBLK_F_USER_RECOVERY_REISSUE).
 *
 *   This file knows tags, descriptors and the descriptor of the device, and no ring; ublk_ring.c
 *   fetches and commits.
 */
#ifndef PVF_UBLK_TARGET_H
#define PVF_UBLK_TARGET_H

#include "parts.h"
#include "pvf_ublk.h"

struct pvf_commit {
	uint16_t tag;
	int32_t result; /* bytes, or negative errno */
};

struct pvf_ublk {
	int fd;         /* /dev/ublkcN; -1: none */
	uint16_t queue; /* which of the device's */
	bool gone;      /* `error` and `why` say how it ended */
	int error;      /* 0: in order */
	const char *why;
	const struct ublksrv_io_desc *desc; /* [PVF_UBLK_DEPTH], written by the kernel */
	struct pvf_parts parts; /* by tag */
	bool ours[PVF_UBLK_DEPTH]; /* fetched and not committed */
	struct pvf_commit commit[PVF_UBLK_DEPTH]; /* to be told to the kernel */
	uint32_t commits;
};

/* All tags are the kernel's. */
void pvf_ublk_init(struct pvf_ublk *ublk, int fd, uint16_t queue,
		   const struct ublksrv_io_desc *desc);

/* The kernel has handed over a tag. False: it was ours already, which ends the target. From then on
 * it is in `parts`; when it has finished, its result is in `commit`. */
bool pvf_ublk_fetched(struct pvf_ublk *ublk, uint32_t tag);

/* The target ended; said once. */
void pvf_ublk_end(struct pvf_ublk *ublk, int error, const char *why);

#endif
