/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a supervisor says to a network's worker only.
 */
#include "worker_int.h"

#include <errno.h>
#include <sys/mman.h>

#include "memfd.h"
#include "scm.h"

void pvf_handle_start_net(struct pvf_worker *w)
{
	const struct pvf_ctl_start_net *m = &w->ctl.in.start_net;
	const char *why = NULL;

	if (w->device_class != PVF_CLASS_NET)
		return pvf_tell_error(w, PVF_CTL_START_NET, EINVAL, "this worker serves no network");
	if (w->state == PVF_IDLE || w->state == PVF_BROKEN)
		return pvf_tell_error(w, PVF_CTL_START_NET, ENOTCONN,
				  "no usable connection: DETACH and ATTACH first");
	if (m->first_queue + w->ctl.nfds > w->attached)
		return pvf_tell_error(w, PVF_CTL_START_NET, EINVAL,
				  "a TAP for a queue that is not attached");
	for (uint32_t i = 0; i < w->ctl.nfds; i++)
		if (!pvf_character_device(w->ctl.fds[i]) && !pvf_scm_packets(w->ctl.fds[i]))
			return pvf_tell_error(w, PVF_CTL_START_NET, EINVAL,
					      "the target is neither a TAP nor a socket for packets");
	int error = pvf_worker_targets(w, m->first_queue, &why);

	if (error)
		return pvf_tell_error(w, PVF_CTL_START_NET, error, why);
	if (m->groups)
		pvf_groups_replace(&w->groups, m->group, m->groups);
	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		w->queue[i].queues = w->attached;
		pvf_queue_start_net(&w->queue[i], m->features, m->stall_seconds);
		pvf_queue_unlock(&w->queue[i]);
	}
	pvf_worker_serve(w);
	pvf_tell_simple(w, PVF_CTL_STARTED);
}

static void trace_to(struct pvf_worker *w, struct pvf_trace *trace)
{
	struct pvf_trace *old = w->trace;

	w->trace = trace;
	for (uint32_t i = 0; i < w->queues; i++) {
		if (trace)
			pvf_trace_init(&trace[i], i);
		pvf_queue_lock(&w->queue[i]);
		pvf_queue_trace(&w->queue[i], trace ? &trace[i] : NULL);
		pvf_queue_unlock(&w->queue[i]);
	}
	if (old)
		munmap(old, w->queues * sizeof(*old));
}

void pvf_handle_trace(struct pvf_worker *w)
{
	void *where = NULL;

	if (w->device_class != PVF_CLASS_NET)
		return pvf_tell_error(w, PVF_CTL_TRACE, EINVAL, "this worker serves no network");
	int rc = w->ctl.nfds ? pvf_memfd_map(w->ctl.fds[0], w->queues * sizeof(struct pvf_trace), true, &where)
			     : 0;

	if (rc)
		return pvf_tell_error(w, PVF_CTL_TRACE, -rc,
				      "the memfd is none, too small, or can be shrunk");
	trace_to(w, where);
	pvf_tell_simple(w, PVF_CTL_TRACING);
}
