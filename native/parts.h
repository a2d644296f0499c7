/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Requests that are larger than the engine takes at once: in parts, in order, again if need be; pure.
 * For sources whose data is at hand (source.h).
 *
 * Theory of operation
 *
 *   A source numbers its requests, and tells by that number where the data of one is. A request waits,
 *   in the order in which it came, until ring and pool have room for it. It becomes one or more
 *   *parts*, each a request of the engine that its pool can hold, and has finished when all of them
 *   are answered. Only the first that waits may have begun.
 *
 *   A connection to the backend may end with requests half done: with the next one they begin again,
 *   in their old order (pvf_parts_restart).
 */
#ifndef PVF_PARTS_H
#define PVF_PARTS_H

#include "blk.h"

#define PVF_PARTS_MOST 256 /* requests of a source */

enum pvf_whole_state {
	PVF_WHOLE_NONE = 0, /* not asked for, or finished */
	PVF_WHOLE_WAITING,  /* not all of it has begun */
	PVF_WHOLE_BEGUN,    /* all its parts are the engine's */
};

/* One request. */
struct pvf_whole {
	uint64_t order;
	uint64_t from;  /* bytes */
	uint32_t bytes; /* 0: a flush */
	uint32_t begun; /* bytes that became parts */
	uint16_t type;  /* NBD_CMD_* */
	uint16_t flags; /* PVF_NBD_FLAG_FUA */
	uint16_t parts; /* not yet answered */
	uint8_t state;  /* enum pvf_whole_state */
	int error;      /* positive errno, the first part's that failed */
};

/* What a source does for request `index`. */
struct pvf_parts_ops {
	/* Copies data of a write, from byte `at` of the request on, to the pages. Returns how many bytes; 0:
	 * the source has ended. */
	size_t (*fill)(void *source, uint16_t index, uint32_t at, const struct iovec *pages, int n);
	/* Copies `bytes` bytes of a read, which pvf_blk_answer_data() has, to byte `at` on. 0 or a positive
	 * errno. */
	int (*take)(void *source, const struct pvf_blk *blk, uint16_t index, uint32_t at,
		    uint32_t bytes);
	/* It has finished: see its `error`. */
	void (*finish)(void *source, uint16_t index);
};

struct pvf_parts {
	const struct pvf_parts_ops *ops;
	void *source;
	uint64_t orders;
	uint16_t part_index; /* whose part is at intake */
	uint32_t part_at;    /* where in its request that part begins */
	uint32_t part;       /* bytes of its payload that have been copied */
	bool starved;        /* intake waits for what a delivery frees */
	uint16_t waiting[PVF_PARTS_MOST]; /* a queue of indices */
	uint32_t waiting_head, waiting_count;
	struct pvf_whole whole[PVF_PARTS_MOST];
};

void pvf_parts_init(struct pvf_parts *parts, const struct pvf_parts_ops *ops, void *source);

/* A request has come: the entry, which was PVF_WHOLE_NONE, waits from now on. */
void pvf_parts_ask(struct pvf_parts *parts, uint16_t index, uint16_t type, uint16_t flags,
		   uint64_t from, uint32_t bytes);

/* Begins what waits while there is room in ring and pool, a bounded amount. `no_new`: finishes the
 * part at intake, begins no other. True: stopped by the bound, more may be waiting. */
bool pvf_parts_intake(struct pvf_parts *parts, struct pvf_blk *blk, bool no_new);

/* Takes the engine's answers, all there are. True: intake may go on now. */
bool pvf_parts_deliver(struct pvf_parts *parts, struct pvf_blk *blk);

/* The engine has dropped its requests: whatever has not finished begins again. */
void pvf_parts_restart(struct pvf_parts *parts);

/* The engine has dropped its requests, and there will be no other connection: they finish with
 * `error`. */
void pvf_parts_fail(struct pvf_parts *parts, int error);

#endif
