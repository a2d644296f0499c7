/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A queue on its way to another worker: written between two of its turns, read before the other's
 * first.
 */
#include "queue_int.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "image.h"

const char *pvf_queue_stays(const struct pvf_queue *q)
{
	if (q->source_ops)
		return "its requests do not come from an NBD socket: it cannot be handed over";
	if (q->cons)
		return "a console is not handed over: it is connected anew";
	if (!q->attached || q->stopped || q->blk.fault.rule)
		return "its ring is not usable any more";
	if (q->net)
		return NULL;
	if (q->target.gone || q->lost || q->blk.stream_error ||
	    q->notes & (PVF_NOTE_BROKEN | PVF_NOTE_TARGET_GONE))
		return "its NBD socket has just ended";
	return NULL;
}

/* A network's: packets in the rings, and two descriptors more at most. */
static uint32_t save_net(const struct pvf_queue *q, struct pvf_image_queue *image, int *fds)
{
	const struct pvf_netq *n = q->net;
	const struct pvf_blk_stats *shared = &q->blk.stats;
	struct pvf_image_net *to = &image->net;
	uint32_t count = n->split ? pvf_port_share(&n->rx_port, &to->rx_port, fds) : 0;

	memcpy(&to->tx, &n->tx, sizeof(to->tx));
	memcpy(&to->rx, &n->rx, sizeof(to->rx));
	to->ended = n->ended;
	to->full = n->full;
	to->tap_errors = n->tap_errors;
	to->groups_told = n->groups_told;
	to->notifies = shared->notifies;
	to->events = shared->events;
	to->events_spurious = shared->events_spurious;
	to->watchdog_hits = shared->watchdog_hits;
	to->wakeups = shared->wakeups;
	to->stall_seconds = q->blk.geo.stall_seconds;
	to->split = n->split;
	image->target = n->tap_fd >= 0;
	if (image->target)
		fds[count++] = n->tap_fd;
	return count;
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
	if (q->net)
		return n + save_net(q, to, fds + n);
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

static int take_blk(struct pvf_queue *q, const struct pvf_image_queue *from, uint32_t pool_pages,
		    int *target, const char **why)
{
	*why = pvf_blk_take_over(&q->blk, &from->blk, q->port.ring, q->port.ring_bytes, q->port.pool,
				 pool_pages);
	if (*why)
		return -EINVAL;
	return target ? take_socket(q, from, target, why) : 0;
}

/* `fds`: of RX's port, if it has one of its own. */
static int take_net(struct pvf_queue *q, const struct pvf_image_net *from, uint32_t pool_pages, int *fds,
		    uint32_t count, int *target, const char **why)
{
	struct pvf_netq *n = q->net;
	struct pvf_blk_stats *shared = &q->blk.stats;
	struct pvf_port_image port = from->rx_port;
	int rc;

	*why = pvf_net_take_over(&n->tx, &n->rx, from, q->port.ring, q->port.ring_bytes, q->port.pool,
				 pool_pages);
	if (*why)
		return -EINVAL;
	if (count) {
		rc = pvf_port_take_over(&n->rx_port, &port, fds, count, why);
		if (rc)
			return rc;
		n->split = true;
		*why = "RX's event channel cannot be watched";
		rc = pvf_queue_watch_port(q, &n->rx_port, PVF_TAG_EVENT_RX);
		if (rc)
			return rc;
	}
	rc = target ? pvf_netq_target(q, *target, why) : 0;
	if (rc)
		return rc;
	if (target)
		*target = -1;
	n->tx.groups = n->groups;
	pvf_queue_trace(q, n->trace);
	n->delivered[0] = n->delivered[1] = true; /* nobody knows: unmasking does no harm */
	n->ended = from->ended;
	n->full = from->full;
	n->tap_errors = from->tap_errors;
	n->groups_told = from->groups_told;
	shared->notifies = from->notifies;
	shared->events = from->events;
	shared->events_spurious = from->events_spurious;
	shared->watchdog_hits = from->watchdog_hits;
	shared->wakeups = from->wakeups;
	q->blk.geo.stall_seconds = from->stall_seconds;
	return 0;
}

int pvf_queue_take_over(struct pvf_queue *q, const struct pvf_image_queue *from, uint32_t queues,
			int *fds, uint32_t count, const char **why)
{
	struct pvf_port_image port = from->port;
	uint32_t targets = from->target != 0;
	uint32_t second = q->net && from->net.split ? from->net.rx_port.fds : 0;

	q->queues = queues;
	*why = "descriptors of the queue are missing";
	if (second > PVF_EVENT_FDS || count < targets + second)
		return -EINVAL;
	uint32_t first = count - targets - second;
	int *target = targets ? &fds[count - 1] : NULL;
	int rc = pvf_port_take_over(&q->port, &port, fds, first, why);

	if (rc)
		return rc;
	if (q->net)
		rc = take_net(q, &from->net, port.pool_pages, fds + first, second, target, why);
	else
		rc = take_blk(q, from, port.pool_pages, target, why);
	if (!rc) {
		*why = "the event channel cannot be watched";
		rc = pvf_queue_watch_port(q, &q->port, PVF_TAG_EVENT);
	}
	if (rc) {
		if (q->net) {
			pvf_netq_drop_target(q);
			pvf_netq_detach(q);
		}
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
	if (q->net) {
		q->watching = true;
		pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
	}
	return 0;
}
