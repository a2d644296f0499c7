/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A queue on its way to another worker: written between two of its turns, read before the other's
 * first.
 */
#include "queue_int.h"

#include <errno.h>

#include "image.h"

const char *pvf_queue_stays(const struct pvf_queue *q)
{
	if (!q->ops->save)
		return "a device of its class is not handed over: it is connected anew";
	const char *why = q->ops->stays ? q->ops->stays(q) : NULL;

	if (!why && (!q->attached || q->stopped || q->blk.fault.rule))
		return "its ring is not usable any more";
	return why;
}

uint32_t pvf_queue_save(const struct pvf_queue *q, struct pvf_image_queue *to, int *fds)
{
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
	return n + q->ops->save(q, to, fds + n);
}

int pvf_queue_take_over(struct pvf_queue *q, const struct pvf_image_queue *from, uint32_t queues,
			int *fds, uint32_t count, const char **why)
{
	struct pvf_port_image port = from->port;

	q->queues = queues;
	*why = "a device of this class is not taken over";
	if (!q->ops->take_over)
		return -EINVAL;
	*why = "descriptors of the queue are missing";
	if (port.fds > count)
		return -EINVAL;
	int rc = pvf_port_take_over(&q->port, &port, fds, port.fds, why);

	if (rc)
		return rc;
	rc = pvf_queue_watch_port(q, &q->port, why);
	if (!rc)
		rc = q->ops->take_over(q, from, fds + port.fds, count - port.fds, why);
	if (rc) {
		pvf_queue_close_ports(q);
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
	q->delivered[0] = q->delivered[1] = true; /* nobody knows: unmasking does no harm */
	return 0;
}
