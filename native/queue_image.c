/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A queue on its way to another worker: written between two of its turns, read before the other's
 * first.
 */
#include "queue_int.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "image.h"

const char *pvf_queue_stays(const struct pvf_queue *q)
{
	if (q->source_ops)
		return "its requests do not come from an NBD socket: it cannot be handed over";
	if (!q->attached || q->stopped || q->blk.fault.rule)
		return "its ring is not usable any more";
	if (q->target.gone || q->lost || q->blk.stream_error ||
	    q->notes & (PVF_NOTE_BROKEN | PVF_NOTE_TARGET_GONE))
		return "its NBD socket has just ended";
	return NULL;
}

uint32_t pvf_queue_save(const struct pvf_queue *q, struct pvf_image_queue *to, int *fds)
{
	const struct pvf_target *t = &q->target;
	uint32_t n = pvf_port_share(&q->port, &to->port, fds);

	to->unread = q->unread;
	to->spurious_at = q->spurious_at;
	to->spurious_run = q->spurious_run;
	to->progress_at = q->progress_at;
	to->oldest = q->oldest;
	to->stall_for = q->stall_for;
	to->features_noted = q->features_noted;
	to->notes = q->notes;
	to->serving = q->serving;
	to->no_new = q->no_new;
	to->drained = q->drained;
	to->idle = q->idle;
	to->stalled = q->stalled;
	memcpy(&to->blk, &q->blk, sizeof(to->blk));
	to->target = t->fd >= 0;
	if (!to->target)
		return n;
	to->disc = t->disc;
	to->starved = t->starved;
	to->bulky = t->bulky;
	to->ended = t->ended;
	to->ahead = t->ahead_end - t->ahead_at;
	memcpy(to->ahead_bytes, t->ahead + t->ahead_at, to->ahead);
	fds[n++] = t->fd;
	return n;
}

/* The client's socket, with what had been received and not yet parsed. */
static int take_socket(struct pvf_queue *q, const struct pvf_image_queue *from, int *fd,
		       const char **why)
{
	struct pvf_target *t = &q->target;
	uint32_t ahead = from->ahead;

	*why = "more bytes were received ahead than there is room for";
	if (ahead > PVF_TARGET_AHEAD)
		return -EINVAL;
	*why = "the NBD socket cannot be watched";
	int rc = pvf_target_open(t, *fd, q->epoll_fd, (uint64_t)++q->sockets << 32 | PVF_TAG_TARGET);

	if (rc)
		return rc;
	*fd = -1;
	t->several = q->queues > 1;
	t->disc = from->disc != 0;
	t->starved = from->starved != 0;
	t->bulky = from->bulky != 0;
	t->ended = from->ended != 0;
	memcpy(t->ahead, from->ahead_bytes, ahead);
	t->ahead_end = ahead;
	return 0;
}

int pvf_queue_take_over(struct pvf_queue *q, const struct pvf_image_queue *from, uint32_t queues,
			int *fds, uint32_t count, const char **why)
{
	struct pvf_port_image port = from->port;
	uint32_t sockets = from->target != 0;

	q->queues = queues;
	*why = "descriptors of the queue are missing";
	if (count < sockets)
		return -EINVAL;
	int rc = pvf_port_take_over(&q->port, &port, fds, count - sockets, why);

	if (rc)
		return rc;
	*why = pvf_blk_take_over(&q->blk, &from->blk, q->port.ring, q->port.ring_bytes, q->port.pool,
				 port.pool_pages);
	if (*why)
		rc = -EINVAL;
	if (!rc && sockets)
		rc = take_socket(q, from, &fds[count - 1], why);
	if (!rc) {
		struct epoll_event event = {
			.events = EPOLLIN | (q->port.ops->edges ? EPOLLET : 0),
			.data.u64 = PVF_TAG_EVENT,
		};

		*why = "the event channel cannot be watched";
		if (epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->port.event_fd, &event))
			rc = -errno;
	}
	if (rc) {
		pvf_target_close(&q->target);
		pvf_blk_init(&q->blk);
		pvf_port_close(&q->port);
		return rc;
	}
	q->unread = from->unread;
	q->spurious_at = from->spurious_at;
	q->spurious_run = from->spurious_run;
	q->progress_at = from->progress_at;
	q->oldest = from->oldest;
	q->stall_for = from->stall_for;
	q->features_noted = from->features_noted;
	q->notes = from->notes & (PVF_NOTE_FEATURE_OFF | PVF_NOTE_STALL);
	q->serving = from->serving != 0;
	q->no_new = from->no_new != 0;
	q->drained = from->drained != 0;
	q->idle = from->idle != 0;
	q->stalled = from->stalled != 0;
	q->attached = true;
	/* Whether the port is masked, an event taken, or a response looked for: all of it is settled by
	 * a turn that begins as if an event had come, and ends with an unmask. */
	q->masked = q->owed = q->again = true;
	return 0;
}
