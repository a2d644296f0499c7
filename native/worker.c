/* SPDX-License-Identifier: BSD-2-Clause */
#include "worker.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define TAG_LISTEN 16
#define TAG_CONTROL 17
#define CONTROL_MESSAGES 8 /* per wake-up */

static void copy_text(char *to, size_t size, const char *from)
{
	size_t n = strnlen(from, size - 1);

	memcpy(to, from, n);
	memset(to + n, 0, size - n);
}

/* Upwards */

static void send_simple(struct pvf_worker *w, uint16_t type)
{
	struct pvf_ctl_simple m;

	pvf_ctl_send(&w->ctl, &m, type, w->generation, sizeof(m), -1);
}

static void send_error(struct pvf_worker *w, uint32_t type, int error, const char *text)
{
	struct pvf_ctl_error m = {.in_reply_to = type, .error = error};

	copy_text(m.text, sizeof(m.text), text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_ERROR, w->generation, sizeof(m), -1);
}

void pvf_worker_log(struct pvf_worker *w, uint32_t level, const char *text)
{
	struct pvf_ctl_log m = {.level = level};

	copy_text(m.text, sizeof(m.text), text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_LOG, w->generation, sizeof(m), -1);
}

static void send_broken(struct pvf_worker *w)
{
	struct pvf_ctl_broken m = {.rule = w->fault.rule, .value = w->fault.value};

	copy_text(m.field, sizeof(m.field), w->fault.field);
	copy_text(m.text, sizeof(m.text), w->fault.text);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_BROKEN, w->generation, sizeof(m), -1);
}

static void send_target_gone(struct pvf_worker *w)
{
	const struct pvf_target *t = &w->queue.target;
	struct pvf_ctl_target_gone m = {.error = t->error, .in_flight = w->queue.blk.in_flight};

	copy_text(m.text, sizeof(m.text), t->why);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_TARGET_GONE, w->generation, sizeof(m), -1);
}

static void send_features_off(struct pvf_worker *w, uint32_t features)
{
	for (uint32_t bit = PVF_BLK_FLUSH; bit <= PVF_BLK_BARRIER; bit <<= 1) {
		struct pvf_ctl_feature_off m = {.feature = bit};

		if (features & bit)
			pvf_ctl_send(&w->ctl, &m, PVF_CTL_FEATURE_OFF, w->generation, sizeof(m),
				     -1);
	}
}

static void send_stalled(struct pvf_worker *w)
{
	struct pvf_ctl_stalled m = {
		.seconds = w->queue.stalled ? w->queue.stall_for : 0,
		.in_flight = w->queue.blk.in_flight,
	};

	pvf_ctl_send(&w->ctl, &m, PVF_CTL_STALLED, w->generation, sizeof(m), -1);
}

/* To every new supervisor: the state, and again what it could not know from the state alone. */
static void send_hello(struct pvf_worker *w)
{
	struct pvf_ctl_hello m = {
		.state = w->state,
		.device_class = w->device_class,
		.pid = w->pid,
		.in_flight = w->queue.blk.in_flight,
		.targets = w->queue.target.fd >= 0 || w->queue.source_ops,
		.stats_size = PVF_STATS_SIZE,
		.queues = 1,
		.attached = w->queue.attached,
	};

	copy_text(m.name, sizeof(m.name), w->name);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_HELLO, w->generation, sizeof(m), w->stats.fd);
	if (w->state == PVF_BROKEN)
		send_broken(w);
	send_features_off(w, w->queue.features_told);
	if (w->queue.stalled)
		send_stalled(w);
	if (w->start_notes[0])
		pvf_worker_log(w, 4, w->start_notes);
	w->start_notes[0] = 0;
}

/* States */

static void settle(struct pvf_worker *w)
{
	struct pvf_queue *q = &w->queue;

	if (q->notes & PVF_NOTE_BROKEN && q->blk.fault.rule) {
		w->fault = q->blk.fault;
		w->state = PVF_BROKEN;
		q->serving = false;
		send_broken(w);
		if (w->quiesce_asked)
			send_error(w, PVF_CTL_QUIESCE, EIO, "the backend broke the ring");
		w->quiesce_asked = false;
	}
	if (q->notes & PVF_NOTE_TARGET_GONE) {
		send_target_gone(w);
		if (w->state == PVF_RUNNING)
			w->state = PVF_TARGET_LOST;
	}
	if (q->notes & PVF_NOTE_FEATURE_OFF) {
		uint32_t news = q->blk.features_off & ~q->features_told;

		q->features_told |= news;
		send_features_off(w, news);
	}
	if (q->notes & PVF_NOTE_STALL)
		send_stalled(w);
	q->notes = 0;
	if ((w->state == PVF_DRAINING || w->state == PVF_TARGET_LOST) && pvf_queue_drained(q)) {
		/* A lost target drains unasked; the supervisor waits for this to bring a new one. */
		w->state = PVF_DRAINED;
		q->serving = false;
		w->quiesce_asked = false;
		send_simple(w, PVF_CTL_DRAINED);
	}
}

static void handle_attach(struct pvf_worker *w)
{
	const struct pvf_ctl_attach *m = pvf_ctl_attach(&w->ctl.in);
	const char *why = NULL;

	if (w->parked)
		return send_error(w, PVF_CTL_ATTACH, EBUSY, "this worker is parked for ever");
	if (w->state != PVF_IDLE)
		return send_error(w, PVF_CTL_ATTACH, EBUSY, "a connection is attached: DETACH first");
	if (m->hdr.generation <= w->generation)
		return send_error(w, PVF_CTL_ATTACH, ESTALE, "ATTACH needs a newer generation");
	if (m->queues > 1)
		return send_error(w, PVF_CTL_ATTACH, EINVAL,
				  "more queues than this worker was started with");
	int rc = pvf_queue_attach(&w->queue, w->ctl.fds[0], w->ctl.fds[1], m, &why);

	if (rc)
		return send_error(w, PVF_CTL_ATTACH, -rc, why);
	w->ctl.fds[0] = w->ctl.fds[1] = -1;
	w->generation = m->hdr.generation;
	w->device_class = m->device_class;
	copy_text(w->name, sizeof(w->name), m->name);
	w->state = PVF_ATTACHED;
	send_simple(w, PVF_CTL_ATTACHED);
}

static bool stream_socket(int fd)
{
	int type = 0;
	socklen_t len = sizeof(type);

	return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_STREAM;
}

static void handle_start(struct pvf_worker *w)
{
	const struct pvf_ctl_start *m = &w->ctl.in.start;
	struct pvf_queue *q = &w->queue;
	struct pvf_geometry geo = {
		.sectors = m->sectors,
		.sector_size = m->sector_size,
		.features = m->flags,
		.max_segments = m->max_segments,
		.discard_granularity = m->discard_granularity,
		.discard_alignment = m->discard_alignment,
		.vdev = m->vdev,
		.stall_seconds = m->stall_seconds,
	};

	if (w->state == PVF_IDLE || w->state == PVF_BROKEN)
		return send_error(w, PVF_CTL_START, ENOTCONN,
				  "no usable connection: DETACH and ATTACH first");
	if (m->first_queue + w->ctl.nfds > 1)
		return send_error(w, PVF_CTL_START, EINVAL, "a queue that is not attached");
	if (w->ctl.nfds && q->source_ops)
		return send_error(w, PVF_CTL_START, EINVAL,
				  "requests do not come from a socket here");
	if (w->ctl.nfds) {
		/* The fence: a new client's write, or a replayed one, must not be overtaken by an old
		 * one that is still in the ring. */
		if (q->blk.in_flight || w->state == PVF_DRAINING ||
		    (w->state == PVF_RUNNING && q->target.fd >= 0))
			return send_error(w, PVF_CTL_START, EBUSY,
					  "a new NBD socket needs an empty ring: QUIESCE first");
		if (!stream_socket(w->ctl.fds[0]))
			return send_error(w, PVF_CTL_START, ENOTSOCK,
					  "the NBD descriptor is no stream socket");
		int rc = pvf_queue_target(q, w->ctl.fds[0]);

		if (rc)
			return send_error(w, PVF_CTL_START, -rc, "the NBD socket cannot be watched");
		w->ctl.fds[0] = -1;
	} else if (q->target.fd < 0 && !q->source_ops && !(m->options & PVF_START_CLIENTS)) {
		return send_error(w, PVF_CTL_START, ENOTCONN,
				  "there is no NBD socket to keep: pass one");
	}
	pvf_blk_start(&q->blk, &geo);
	if (w->state == PVF_TARGET_LOST && q->target.fd < 0) {
		/* A resize while the former client's requests are still in the ring: DRAINED is owed. */
		send_simple(w, PVF_CTL_STARTED);
		return;
	}
	q->serving = true;
	q->no_new = false;
	w->quiesce_asked = false;
	w->state = PVF_RUNNING;
	send_simple(w, PVF_CTL_STARTED);
}

static void handle_quiesce(struct pvf_worker *w)
{
	switch (w->state) {
	case PVF_BROKEN:
		return send_error(w, PVF_CTL_QUIESCE, EIO, "the backend broke the ring: DETACH");
	case PVF_RUNNING:
	case PVF_DRAINING:
		w->state = PVF_DRAINING;
		pvf_queue_quiesce(&w->queue);
		w->quiesce_asked = true;
		return; /* settle() answers */
	case PVF_TARGET_LOST:
		w->quiesce_asked = true;
		return;
	default:
		return send_simple(w, PVF_CTL_DRAINED);
	}
}

static void handle_detach(struct pvf_worker *w)
{
	struct pvf_queue *q = &w->queue;
	uint32_t flags = w->ctl.in.detach.flags;

	if (flags & PVF_DETACH_PARK && q->attached) {
		w->parked = true;
		pvf_queue_park(q);
	}
	pvf_queue_detach(q, flags & PVF_DETACH_KEEP_TARGET);
	if (q->notes & PVF_NOTE_TARGET_GONE)
		send_target_gone(w);
	q->notes = 0;
	w->state = PVF_IDLE;
	w->quiesce_asked = false;
	send_simple(w, PVF_CTL_DETACHED);
}

static void handle(struct pvf_worker *w)
{
	const struct pvf_ctl_hdr *hdr = &w->ctl.in.hdr;

	if (hdr->type != PVF_CTL_ATTACH && hdr->generation != w->generation)
		return send_error(w, hdr->type, ESTALE,
				  hdr->generation < w->generation ?
					  "an older generation than the worker's" :
					  "a generation that was never attached");
	switch (hdr->type) {
	case PVF_CTL_ATTACH:
		return handle_attach(w);
	case PVF_CTL_START:
		return handle_start(w);
	case PVF_CTL_QUIESCE:
		return handle_quiesce(w);
	case PVF_CTL_DETACH:
		return handle_detach(w);
	case PVF_CTL_EXIT:
		if (w->parked)
			return send_error(w, PVF_CTL_EXIT, EBUSY,
					  "parked: ending would unbind a port that must stay bound");
		w->exiting = true;
	}
}

static void control(struct pvf_worker *w, uint32_t events)
{
	if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
		return;
	for (int i = 0; i < CONTROL_MESSAGES && w->ctl.fd >= 0 && !w->exiting; i++) {
		const char *why = NULL;
		int rc = pvf_ctl_receive(&w->ctl, &why);

		if (rc == 0 || rc == -1)
			return;
		if (rc == 1)
			handle(w);
		else
			send_error(w, w->ctl.in.hdr.type, EINVAL, why);
		pvf_ctl_release(&w->ctl);
	}
}

static void accept_control(struct pvf_worker *w)
{
	int fd = accept4(w->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd >= 0)
		pvf_worker_connect(w, fd);
}

void pvf_worker_connect(struct pvf_worker *w, int fd)
{
	pvf_ctl_accept(&w->ctl, fd);
	send_hello(w);
}

static void publish(struct pvf_worker *w)
{
	struct pvf_blk *blk = &w->queue.blk;
	struct pvf_blk_stats *s = &blk->stats;

	s->state = w->state;
	s->queue = 0;
	s->queues = w->queue.attached;
	s->generation = w->generation;
	s->in_flight = blk->in_flight;
	s->pool_pages = blk->pool.pages;
	s->pool_free = blk->pool.free;
	s->pool_free_low = blk->pool.free_low;
	s->ring_slots = blk->ring.entries;
	s->nbd_pending = blk->pending;
	pvf_stats_publish(&w->stats, s);
}

int pvf_worker_init(struct pvf_worker *w, int listen_fd, const char *name, const char **why)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = TAG_LISTEN};

	memset(w, 0, sizeof(*w));
	w->pid = (uint32_t)getpid();
	w->listen_fd = listen_fd;
	w->ctl.fd = -1;
	w->ctl.tag = TAG_CONTROL;
	w->device_class = PVF_CLASS_BLK;
	copy_text(w->name, sizeof(w->name), name);
	*why = "epoll";
	w->epoll_fd = w->ctl.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (w->epoll_fd < 0)
		return -errno;
	*why = "the statistics page";
	int rc = pvf_stats_open(&w->stats);

	if (rc)
		return rc;
	*why = "the timers";
	rc = pvf_queue_init(&w->queue, w->epoll_fd);
	if (rc)
		return rc;
	if (listen_fd < 0)
		return 0;
	*why = "descriptor 3 is no listening socket";
	return epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, listen_fd, &event) ? -errno : 0;
}

void pvf_worker_events(struct pvf_worker *w, const struct epoll_event *events, int n)
{
	w->queue.blk.stats.wakeups++;
	for (int i = 0; i < n; i++) {
		uint32_t tag = (uint32_t)events[i].data.u64;

		if (tag == TAG_LISTEN)
			accept_control(w);
		else if (tag == TAG_CONTROL) {
			if (w->ctl.fd >= 0)
				control(w, events[i].events);
		} else
			pvf_queue_event(&w->queue, tag, events[i].events);
	}
	pvf_queue_service(&w->queue);
	settle(w);
	/* Who gets an answer finds the statistics that go with it. */
	publish(w);
	pvf_ctl_flush(&w->ctl);
}

int pvf_worker_turn(struct pvf_worker *w, int timeout)
{
	struct epoll_event events[8];
	int n = epoll_wait(w->epoll_fd, events, 8, w->queue.again ? 0 : timeout);

	if (n < 0 && errno != EINTR)
		return -errno;
	pvf_worker_events(w, events, n);
	return 0;
}

int pvf_worker_run(struct pvf_worker *w)
{
	publish(w);
	while (!w->exiting)
		if (pvf_worker_turn(w, -1))
			return 1;
	return 0;
}
