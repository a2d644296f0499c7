/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The replay fence of a device with several NBD sockets.
 *
 * With more than one socket the kernel's nbd gives a socket up when one of its requests has waited
 * for queue/io_timeout, and at once sends that request again on another (nbd_xmit_timeout). The
 * first copy may still be in a ring, or unread in its socket, and could land after something
 * newer. So nothing is received on any socket once something on any of them has waited for
 * PVF_NBD_PATIENCE_SECONDS, long before the kernel gives up, or a peer has hung one up. From there
 * all sockets are closed, what they hold unread is thrown away, and a new one is taken only when all
 * rings are empty. One socket alone needs no fence: the kernel sends nothing again on it.
 *
 * Each queue shows the others since when its oldest request may have been waiting; none waits for
 * another's lock.
 */
#ifndef PVF_FENCE_H
#define PVF_FENCE_H

#include "pvf.h"

struct pvf_fence {
	uint32_t closed; /* atomic: nothing is to be received */
	struct {
		_Alignas(64) uint64_t since; /* atomic, ns; 0: nothing waits */
	} queue[PVF_MAX_QUEUES];
};

/* How old the unread bytes of a socket may be. Positions count from the stream's beginning. */
struct pvf_unread {
	uint64_t received;
	uint64_t since;   /* ns: when the oldest unparsed byte may have come; 0: none waits */
	uint64_t mark;    /* what was before this position at `mark_at` had come by then */
	uint64_t mark_at; /* ns; 0: no mark */
};

enum pvf_fence_state {
	PVF_FENCE_OPEN,
	PVF_FENCE_CLOSED,  /* receive nothing; whoever closed it has said why */
	PVF_FENCE_OVERDUE, /* something has waited for too long: it is closed from now on */
};

/* Before anything is received on one of `queues` sockets. One alone has no fence. */
enum pvf_fence_state pvf_fence_look(struct pvf_fence *fence, uint32_t queues, uint64_t now);

/* A socket was lost: nothing is received on any from now on, until pvf_fence_open(). */
void pvf_fence_close(struct pvf_fence *fence);

/* All sockets are closed, and so their streams cannot go on. */
void pvf_fence_open(struct pvf_fence *fence);

/* What a queue has under way: since when; 0: nothing. */
void pvf_fence_show(struct pvf_fence *fence, uint32_t queue, uint64_t since);

/* Updates `unread->since`, at the end of a turn. `dry`: the socket had nothing more; `left`: bytes
 * that were received and are not yet parsed. */
void pvf_unread_update(struct pvf_unread *unread, int fd, uint64_t now, bool dry, uint32_t left);

#endif
