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
 *   Tags wait in the order in which they came. The first becomes one or more *parts*, each
 *   a request of the engine that its pool can hold; it is committed when all its parts are
 *   answered.
 *
 *   A connection to the backend may end with tags half done. They are ours all the same: with the
 *   next connection they begin again, in their old order (pvf_ublk_restart). So nothing has to
 *   be asked of the kernel as long as the worker lives. If it dies, the kernel has every tag
 *   back and hands it to the next worker (UBLK_F_USER_RECOVERY_REISSUE).
 *
 *   This file knows tags, descriptors and the descriptor of the device, and no ring; ublk_ring.c
 *   fetches and commits.
 */
#ifndef PVF_UBLK_TARGET_H
#define PVF_UBLK_TARGET_H

#include "blk.h"
#include "pvf_ublk.h"

enum pvf_tag_state {
	PVF_UBLK_KERNELS = 0,
	PVF_UBLK_WAITING, /* fetched, nothing of it has begun, or not all of it */
	PVF_UBLK_BEGUN,   /* all its parts are the engine's */
};

struct pvf_tag {
	uint64_t order;     /* of its fetch */
	uint32_t bytes;     /* of the request */
	uint32_t begun;     /* bytes that became parts */
	uint16_t parts;     /* not yet answered */
	uint8_t state;      /* enum pvf_tag_state */
	int error;          /* positive errno, the first part's that failed */
};

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
	uint64_t orders;
	uint32_t ours;   /* tags fetched and not committed */
	uint32_t part;   /* bytes of the part at intake whose payload has been copied */
	uint32_t part_at; /* where in its request that part begins */
	uint16_t part_tag;
	uint16_t waiting[PVF_UBLK_DEPTH]; /* a queue of tags; the first may have begun */
	uint32_t waiting_head, waiting_count;
	struct pvf_commit commit[PVF_UBLK_DEPTH]; /* to be told to the kernel */
	uint32_t commits;
	struct pvf_tag tag[PVF_UBLK_DEPTH];
};

/* All tags are the kernel's. */
void pvf_ublk_init(struct pvf_ublk *ublk, int fd, uint16_t queue,
		   const struct ublksrv_io_desc *desc);

/* The kernel has handed over a tag. False: it was ours already, which ends the target. */
bool pvf_ublk_fetched(struct pvf_ublk *ublk, uint32_t tag);

/* Begins what waits while there is room in ring and pool, a bounded amount. `no_new`: finish the
 * part at intake, begin no other. True: stopped by the bound, more may be waiting. */
bool pvf_ublk_intake(struct pvf_ublk *ublk, struct pvf_blk *blk, bool no_new);

/* Delivers the engine's answers; results of finished tags are in `commit` then. */
void pvf_ublk_deliver(struct pvf_ublk *ublk, struct pvf_blk *blk);

/* The connection was left, with the engine's requests dropped: what is ours begins again. */
void pvf_ublk_restart(struct pvf_ublk *ublk);

/* The target ended; said once. */
void pvf_ublk_end(struct pvf_ublk *ublk, int error, const char *why);

#endif
