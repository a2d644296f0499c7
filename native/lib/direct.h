/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A program's own requests, between its memory and the engine's pages; pure.
 *
 * Theory of operation
 *
 *   A request goes to the engine in parts (parts.h). What has completed is put in a queue for the
 *   program; a request's entry is free again only when the program has taken that, so nothing
 *   overflows.
 *
 *   One copy each way, between the program's memory and granted pages, by whoever serves the queue.
 */
#ifndef PVF_DIRECT_H
#define PVF_DIRECT_H

#include "parts.h"
#include "pvfront/disk.h"

struct pvf_io {
	uint64_t cookie;
	uint16_t iovs;
	struct iovec iov[PVF_DISK_IOV];
};

struct pvf_direct {
	struct pvf_parts parts; /* by entry */
	uint32_t used;          /* entries that are not free */
	uint16_t done[PVF_DISK_DEPTH]; /* a queue of entries whose result the program has not taken */
	uint32_t done_head, done_count;
	uint16_t free[PVF_DISK_DEPTH];
	uint32_t frees;
	struct pvf_io io[PVF_DISK_DEPTH];
};

void pvf_direct_init(struct pvf_direct *d);

/* Takes a request of the program's, whose `iov` (iovs entries, of `bytes` bytes together) it copies. False:
 * there is no free entry. */
bool pvf_direct_ask(struct pvf_direct *d, uint16_t type, uint16_t flags, uint64_t offset,
		    uint32_t bytes, const struct iovec *iov, uint16_t iovs, uint64_t cookie);

/* Results for the program, at most `max`; returns how many. */
int pvf_direct_take(struct pvf_direct *d, struct pvf_disk_done *done, int max);

#endif
