/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A program's own requests, between its memory and the engine's pages; pure.
 *
 * Theory of operation
 *
 *   A request waits, in the order in which it was asked for, until ring and pool have room for it. It
 *   becomes one or more *parts*, each a request of the engine that its pool can hold, and has
 *   completed when all of them are answered. What completes is put in a queue for the program;
 *   a request's entry is free again only when the program has taken that, so nothing overflows.
 *
 *   One copy each way, between the program's memory and granted pages, by whoever serves the queue.
 *
 *   A connection to the backend may end with requests half done: with the next one they begin again,
 *   in their old order (pvf_direct_restart).
 */
#ifndef PVF_DIRECT_H
#define PVF_DIRECT_H

#include "blk.h"
#include "pvfront/disk.h"

enum pvf_io_state {
	PVF_IO_FREE = 0,
	PVF_IO_WAITING, /* not all of it has begun */
	PVF_IO_BEGUN,   /* all its parts are the engine's */
	PVF_IO_DONE,    /* the program has not taken its result */
};

struct pvf_io {
	uint64_t cookie;
	uint64_t offset; /* bytes */
	uint64_t order;
	uint32_t bytes;
	uint32_t begun; /* bytes that became parts */
	uint16_t type;  /* NBD_CMD_* */
	uint16_t flags; /* PVF_NBD_FLAG_FUA */
	uint16_t parts; /* not yet answered */
	uint16_t iovs;
	uint8_t state;  /* enum pvf_io_state */
	int error;      /* positive errno, the first part's that failed */
	struct iovec iov[PVF_DISK_IOV];
};

struct pvf_direct {
	uint64_t orders;
	uint32_t used;     /* entries that are not free */
	uint16_t part_io;  /* whose part is at intake */
	uint32_t part_at;  /* where in its request that part begins */
	uint32_t part;     /* bytes of its payload that have been copied */
	bool starved;      /* intake waits for what a delivery frees */
	uint16_t waiting[PVF_DISK_DEPTH]; /* a queue of entries; the first may have begun */
	uint32_t waiting_head, waiting_count;
	uint16_t done[PVF_DISK_DEPTH];
	uint32_t done_head, done_count;
	uint16_t free[PVF_DISK_DEPTH];
	uint32_t frees;
	struct pvf_io io[PVF_DISK_DEPTH];
};

void pvf_direct_init(struct pvf_direct *d);

/* Takes a request, whose `iov` (iovs entries, of `bytes` bytes together) it copies. NULL: there is no
 * free entry. */
struct pvf_io *pvf_direct_ask(struct pvf_direct *d, uint16_t type, uint64_t offset, uint32_t bytes,
			      const struct iovec *iov, uint16_t iovs);

/* Begins what waits while there is room in ring and pool, a bounded amount. `no_new`: finishes the
 * part at intake, begins no other. True: stopped by the bound, more may be waiting. */
bool pvf_direct_intake(struct pvf_direct *d, struct pvf_blk *blk, bool no_new);

/* Takes the engine's answers. True: intake may go on now. */
bool pvf_direct_deliver(struct pvf_direct *d, struct pvf_blk *blk);

/* Results for the program, at most `max`; returns how many. */
int pvf_direct_take(struct pvf_direct *d, struct pvf_disk_done *done, int max);

/* The engine has dropped its requests: whatever has not completed begins again. */
void pvf_direct_restart(struct pvf_direct *d);

/* The engine has dropped its requests, and there will be no other connection: whatever has not
 * completed fails. */
void pvf_direct_fail(struct pvf_direct *d, int error);

#endif
