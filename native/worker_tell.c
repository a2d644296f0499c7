/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a worker says to its supervisor. What is of a queue: under its lock.
 */
#include "worker_int.h"

#include <string.h>

void pvf_copy_text(char *to, size_t size, const char *from)
{
	size_t n = strnlen(from, size - 1);

	memcpy(to, from, n);
	memset(to + n, 0, size - n);
}

void pvf_tell_simple(struct pvf_worker *w, uint16_t type)
{
	struct pvf_ctl_simple m;

	pvf_ctl_send(&w->ctl, &m, type, w->generation, sizeof(m), -1);
}

void pvf_tell_error(struct pvf_worker *w, uint32_t type, int error, const char *text)
{
	struct pvf_ctl_error m = {.in_reply_to = type, .error = error};

	pvf_copy_text(m.text, sizeof(m.text), text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_ERROR, w->generation, sizeof(m), -1);
}

void pvf_worker_log(struct pvf_worker *w, uint32_t level, const char *text)
{
	struct pvf_ctl_log m = {.level = level};

	pvf_copy_text(m.text, sizeof(m.text), text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_LOG, w->generation, sizeof(m), -1);
}

void pvf_tell_broken(struct pvf_worker *w)
{
	struct pvf_ctl_broken m = {
		.rule = w->fault.rule, .queue = w->fault_queue, .value = w->fault.value};

	pvf_copy_text(m.field, sizeof(m.field), w->fault.field);
	pvf_copy_text(m.text, sizeof(m.text), w->fault.text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_BROKEN, w->generation, sizeof(m), -1);
}

void pvf_tell_target_gone(struct pvf_worker *w, const struct pvf_queue *q)
{
	struct pvf_ctl_target_gone m = {
		.error = q->target.error, .queue = q->index, .in_flight = pvf_queue_in_flight(q)};

	pvf_copy_text(m.text, sizeof(m.text), q->target.why);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_TARGET_GONE, w->generation, sizeof(m), -1);
}

/* A feature is the device's: told once, for the queue where it turned out first. */
void pvf_tell_features_off(struct pvf_worker *w, const struct pvf_queue *q)
{
	uint32_t news = q->blk.features_off & ~w->features_told;

	w->features_told |= news;
	for (uint32_t bit = PVF_BLK_FLUSH; bit <= PVF_BLK_BARRIER; bit <<= 1) {
		struct pvf_ctl_feature_off m = {.feature = bit, .queue = q->index};

		if (news & bit)
			pvf_ctl_send(&w->ctl, &m, PVF_CTL_FEATURE_OFF, w->generation, sizeof(m),
				     -1);
	}
}

void pvf_tell_stalled(struct pvf_worker *w, const struct pvf_queue *q)
{
	struct pvf_ctl_stalled m = {
		.seconds = q->stalled ? q->stall_for : 0,
		.queue = q->index,
		.in_flight = pvf_queue_in_flight(q),
	};

	pvf_ctl_send(&w->ctl, &m, PVF_CTL_STALLED, w->generation, sizeof(m), -1);
}

/* To every new supervisor: the state, and again what it could not know from the state alone. */
void pvf_tell_hello(struct pvf_worker *w)
{
	struct pvf_ctl_hello m = {
		.state = w->state,
		.device_class = w->device_class,
		.pid = w->pid,
		.stats_size = w->queues * PVF_PAGE_SIZE,
		.queues = w->queues,
		.attached = w->attached,
	};

	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		m.in_flight += pvf_queue_in_flight(q);
		m.targets |= (uint32_t)pvf_queue_has_target(q) << i;
		pvf_queue_unlock(q);
	}
	pvf_copy_text(m.name, sizeof(m.name), w->name);
	pvf_copy_text(m.build, sizeof(m.build), w->build);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_HELLO, w->generation, sizeof(m), w->stats.fd);
	if (w->state == PVF_BROKEN)
		pvf_tell_broken(w);
	w->features_told = 0;
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		pvf_tell_features_off(w, q);
		if (q->stalled)
			pvf_tell_stalled(w, q);
		pvf_queue_unlock(q);
	}
	if (w->start_notes[0])
		pvf_worker_log(w, 4, w->start_notes);
	w->start_notes[0] = 0;
}
