/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a supervisor says to a console's worker only.
 */
#include "worker_int.h"

#include <errno.h>
#include <string.h>

int pvf_worker_cons(struct pvf_worker *w, const char **why)
{
	*why = "memory of the console";
	w->device_class = PVF_CLASS_CONS;
	for (uint32_t i = 0; i < w->queues; i++) {
		int rc = pvf_queue_cons(&w->queue[i]);

		if (rc)
			return rc;
	}
	return 0;
}

void pvf_handle_start_cons(struct pvf_worker *w)
{
	const struct pvf_ctl_start_cons *m = &w->ctl.in.start_cons;
	const char *why = NULL;

	if (w->device_class != PVF_CLASS_CONS)
		return pvf_tell_error(w, PVF_CTL_START_CONS, EINVAL, "this worker serves no console");
	if (w->state == PVF_IDLE || w->state == PVF_BROKEN)
		return pvf_tell_error(w, PVF_CTL_START_CONS, ENOTCONN,
				      "no usable connection: DETACH and ATTACH first");
	if (w->ctl.nfds && !pvf_stream_socket(w->ctl.fds[0]))
		return pvf_tell_error(w, PVF_CTL_START_CONS, ENOTSOCK, "the target is no stream socket");
	int error = pvf_worker_targets(w, 0, &why);

	if (error)
		return pvf_tell_error(w, PVF_CTL_START_CONS, error, why);
	struct pvf_queue *q = w->queue;

	pvf_queue_lock(q);
	bool missing = !pvf_queue_has_target(q);

	if (!missing) {
		q->queues = w->attached;
		pvf_queue_start_cons(q, m->stall_seconds);
	}
	pvf_queue_unlock(q);
	if (missing)
		return pvf_tell_error(w, PVF_CTL_START_CONS, ENOTCONN,
				      "there is no stream to keep: pass one");
	pvf_worker_serve(w);
	pvf_tell_simple(w, PVF_CTL_STARTED);
}
