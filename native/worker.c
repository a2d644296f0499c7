/* SPDX-License-Identifier: BSD-2-Clause */
#include "worker_int.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define TAG_LISTEN 16
#define TAG_CONTROL 17
#define TAG_NOTES 18
#define CONTROL_MESSAGES 8 /* per wake-up */

/* States */

/* One queue's ring was broken: its backend is every queue's. */
static void stop_all(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		pvf_queue_stop(q);
		pvf_queue_unlock(q);
	}
	w->state = PVF_BROKEN;
	pvf_tell_broken(w);
	if (w->quiesce_asked)
		pvf_tell_error(w, PVF_CTL_QUIESCE, EIO, "the backend broke the ring");
	w->quiesce_asked = false;
}

/* The sockets of the queues in `lost` have ended. With several queues all are closed: what was in one
 * is sent again on another (fence.h). No queue receives any more. */
static void lose_targets(struct pvf_worker *w, uint32_t lost)
{
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		if (w->attached < 2 && !(lost >> i & 1))
			continue;
		pvf_queue_lock(q);
		pvf_queue_drop_target(q);
		q->serving = false;
		q->no_new = true;
		q->drained = false;
		if (lost >> i & 1)
			pvf_tell_target_gone(w, q);
		pvf_queue_unlock(q);
		pvf_queue_wake(q);
	}
	pvf_fence_open(&w->fence);
	if (w->state == PVF_RUNNING)
		w->state = PVF_TARGET_LOST;
}

static bool all_drained(struct pvf_worker *w)
{
	bool all = true;

	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		all &= w->queue[i].drained;
		pvf_queue_unlock(&w->queue[i]);
	}
	return all;
}

/* Brings the state up to what the queues have noted. */
static void settle(struct pvf_worker *w)
{
	uint32_t lost = 0;
	bool broken = false;

	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		if (q->notes & PVF_NOTE_BROKEN && w->state != PVF_BROKEN && !broken) {
			broken = true;
			w->fault = q->blk.fault;
			w->fault_queue = i;
		}
		if (q->notes & PVF_NOTE_TARGET_GONE)
			lost |= 1u << i;
		if (q->notes & PVF_NOTE_FEATURE_OFF)
			pvf_tell_features_off(w, q);
		if (q->notes & PVF_NOTE_STALL)
			pvf_tell_stalled(w, q);
		q->notes = q->notes_told = 0;
		pvf_queue_unlock(q);
	}
	if (broken)
		stop_all(w);
	if (lost)
		lose_targets(w, lost);
	if ((w->state == PVF_DRAINING || w->state == PVF_TARGET_LOST) && all_drained(w)) {
		/* A lost target drains unasked; the supervisor waits for this to bring a new one. */
		w->state = PVF_DRAINED;
		w->quiesce_asked = false;
		pvf_tell_simple(w, PVF_CTL_DRAINED);
	}
}

/* Leaves the connection, also one of which not all queues are attached. */
static void leave(struct pvf_worker *w, bool keep, bool park)
{
	uint32_t lost = 0;

	/* No queue receives what is sent again because the socket of another was closed. */
	for (uint32_t i = 0; i < w->queues; i++) {
		pvf_queue_lock(&w->queue[i]);
		w->queue[i].serving = false;
		pvf_queue_unlock(&w->queue[i]);
	}
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		if (park && q->attached) {
			w->parked = true;
			pvf_queue_park(q);
		}
		pvf_queue_detach(q, keep);
		if (q->notes & PVF_NOTE_TARGET_GONE)
			lost |= 1u << i;
		q->notes = q->notes_told = 0;
		q->queues = 0;
		pvf_queue_unlock(q);
	}
	if (lost)
		lose_targets(w, lost);
	w->attached = w->attaching = 0;
}

/* Messages */

static void handle_attach(struct pvf_worker *w)
{
	const struct pvf_ctl_attach *m = pvf_ctl_attach(&w->ctl.in);
	const char *why = NULL;

	if (w->parked)
		return pvf_tell_error(w, PVF_CTL_ATTACH, EBUSY, "this worker is parked for ever");
	if (w->state != PVF_IDLE)
		return pvf_tell_error(w, PVF_CTL_ATTACH, EBUSY, "a connection is attached: DETACH first");
	if (m->device_class != w->device_class)
		return pvf_tell_error(w, PVF_CTL_ATTACH, EINVAL,
				  "a device of another class than this worker was started for");
	if (m->queues > w->queues)
		return pvf_tell_error(w, PVF_CTL_ATTACH, EINVAL,
				  "more queues than this worker was started with");
	if (m->queue ? m->hdr.generation != w->generation : m->hdr.generation <= w->generation)
		return pvf_tell_error(w, PVF_CTL_ATTACH, ESTALE,
				  m->queue ? "ATTACH of a queue of another generation" :
					     "ATTACH needs a newer generation");
	if (m->queue && (m->queue != w->attached || m->queues != w->attaching))
		return pvf_tell_error(w, PVF_CTL_ATTACH, EINVAL,
				  "queues are attached in order, and are as many as the first said");
	if (!m->queue) /* a supervisor that died in between leaves a connection unfinished */
		leave(w, true, false);
	struct pvf_queue *q = &w->queue[m->queue];

	pvf_queue_lock(q);
	int rc = pvf_queue_attach(q, w->ctl.fds, m, &why);

	pvf_queue_unlock(q);
	if (rc)
		return pvf_tell_error(w, PVF_CTL_ATTACH, -rc, why);
	w->ctl.fds[0] = w->ctl.fds[1] = w->ctl.fds[2] = -1;
	w->generation = m->hdr.generation;
	pvf_copy_text(w->name, sizeof(w->name), m->name);
	if (!m->queue)
		w->features_told = 0;
	w->attaching = m->queues;
	if (++w->attached == w->attaching)
		w->state = PVF_ATTACHED;
	pvf_tell_simple(w, PVF_CTL_ATTACHED);
}

bool pvf_stream_socket(int fd)
{
	int type = 0;
	socklen_t len = sizeof(type);

	return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_STREAM;
}

bool pvf_character_device(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && S_ISCHR(st.st_mode);
}

/* 0, or why the sockets of START cannot be taken. */
static int refuse_sockets(struct pvf_worker *w, uint32_t first, const char **why)
{
	/* The fence: a new client's write, or a replayed one, must not be overtaken by an old one that
	 * is still in a ring. */
	bool busy = w->state == PVF_DRAINING || w->state == PVF_TARGET_LOST;

	for (uint32_t i = 0; i < w->attached; i++) {
		struct pvf_queue *q = &w->queue[i];
		bool named = i - first < w->ctl.nfds;

		pvf_queue_lock(q);
		if (w->state != PVF_RUNNING || named)
			busy |= pvf_queue_in_flight(q);
		if (w->state == PVF_RUNNING && named)
			busy |= pvf_queue_has_target(q);
		pvf_queue_unlock(q);
	}
	*why = "a new NBD socket needs an empty ring: QUIESCE first";
	if (busy)
		return EBUSY;
	*why = "the target is neither a stream socket nor a ublk device";
	for (uint32_t i = 0; i < w->ctl.nfds; i++)
		if (!pvf_stream_socket(w->ctl.fds[i]) &&
		    !(w->queue->ublk.uring.made && pvf_character_device(w->ctl.fds[i])))
			return ENOTSOCK;
	return 0;
}

/* 0 or errno: then none was taken. */
int pvf_worker_targets(struct pvf_worker *w, uint32_t first, const char **why)
{
	for (uint32_t i = 0; i < w->ctl.nfds; i++) {
		struct pvf_queue *q = &w->queue[first + i];

		pvf_queue_lock(q);
		int rc = pvf_queue_target(q, w->ctl.fds[i], why);

		pvf_queue_unlock(q);
		if (!rc) {
			w->ctl.fds[i] = -1;
			continue;
		}
		while (i--) {
			pvf_queue_lock(--q);
			pvf_queue_drop_target(q);
			pvf_queue_unlock(q);
		}
		return -rc;
	}
	return 0;
}

/* All queues are set up: they begin. */
void pvf_worker_serve(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		pvf_queue_run(&w->queue[i]);
		pvf_queue_unlock(&w->queue[i]);
		pvf_queue_wake(&w->queue[i]);
	}
	w->quiesce_asked = false;
	w->state = PVF_RUNNING;
}

static void handle_start(struct pvf_worker *w)
{
	const struct pvf_ctl_start *m = &w->ctl.in.start;
	struct pvf_geometry geo = {
		.sectors = m->sectors,
		.sector_size = m->sector_size,
		.features = m->flags,
		.max_segments = m->max_segments,
		.discard_granularity = m->discard_granularity,
		.discard_alignment = m->discard_alignment,
		.vdev = m->vdev,
		.stall_seconds = m->stall_seconds,
		.poll_us = m->poll_us,
	};
	const char *why = NULL;

	if (w->state == PVF_IDLE || w->state == PVF_BROKEN)
		return pvf_tell_error(w, PVF_CTL_START, ENOTCONN,
				  "no usable connection: DETACH and ATTACH first");
	if (m->first_queue + w->ctl.nfds > w->attached)
		return pvf_tell_error(w, PVF_CTL_START, EINVAL,
				  "an NBD socket for a queue that is not attached");
	if (w->ctl.nfds && w->queue->source_ops && !w->queue->source_ops->close)
		return pvf_tell_error(w, PVF_CTL_START, EINVAL,
				  "requests do not come from a socket here");
	int error = w->ctl.nfds ? refuse_sockets(w, m->first_queue, &why) : 0;

	if (error)
		return pvf_tell_error(w, PVF_CTL_START, error, why);
	bool missing = false;

	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		missing |= i - m->first_queue >= w->ctl.nfds &&
			   !pvf_queue_has_target(&w->queue[i]);
		pvf_queue_unlock(&w->queue[i]);
	}
	if (missing && !(m->options & PVF_START_CLIENTS))
		return pvf_tell_error(w, PVF_CTL_START, ENOTCONN,
				  "there is no NBD socket to keep: pass one");
	error = pvf_worker_targets(w, m->first_queue, &why);
	if (error)
		return pvf_tell_error(w, PVF_CTL_START, error, why);
	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		w->queue[i].queues = w->attached;
		pvf_queue_start(&w->queue[i], &geo);
		pvf_queue_unlock(&w->queue[i]);
	}
	/* A resize while a former client's requests are still in a ring: DRAINED is owed. */
	if (w->state != PVF_TARGET_LOST)
		pvf_worker_serve(w);
	pvf_tell_simple(w, PVF_CTL_STARTED);
}

static void handle_quiesce(struct pvf_worker *w)
{
	switch (w->state) {
	case PVF_BROKEN:
		return pvf_tell_error(w, PVF_CTL_QUIESCE, EIO, "the backend broke the ring: DETACH");
	case PVF_RUNNING:
	case PVF_DRAINING:
		w->state = PVF_DRAINING;
		w->quiesce_asked = true;
		for (uint32_t i = 0; i < w->attached; i++) {
			pvf_queue_lock(&w->queue[i]);
			pvf_queue_quiesce(&w->queue[i]);
			pvf_queue_unlock(&w->queue[i]);
			pvf_queue_wake(&w->queue[i]);
		}
		return; /* settle() answers */
	case PVF_TARGET_LOST:
		w->quiesce_asked = true;
		return;
	default:
		return pvf_tell_simple(w, PVF_CTL_DRAINED);
	}
}

static void handle_detach(struct pvf_worker *w)
{
	uint32_t flags = w->ctl.in.detach.flags;

	leave(w, flags & PVF_DETACH_KEEP_TARGET, flags & PVF_DETACH_PARK);
	w->state = PVF_IDLE;
	w->quiesce_asked = false;
	pvf_tell_simple(w, PVF_CTL_DETACHED);
}

static void handle(struct pvf_worker *w)
{
	const struct pvf_ctl_hdr *hdr = &w->ctl.in.hdr;

	if (hdr->type != PVF_CTL_ATTACH && hdr->generation != w->generation)
		return pvf_tell_error(w, hdr->type, ESTALE,
				  hdr->generation < w->generation ?
					  "an older generation than the worker's" :
					  "a generation that was never attached");
	switch (hdr->type) {
	case PVF_CTL_ATTACH:
		return handle_attach(w);
	case PVF_CTL_START:
		if (w->device_class == PVF_CLASS_BLK)
			return handle_start(w);
		return pvf_tell_error(w, PVF_CTL_START, EINVAL, "this worker serves no disk");
	case PVF_CTL_START_NET:
		return pvf_handle_start_net(w);
	case PVF_CTL_START_CONS:
		return pvf_handle_start_cons(w);
	case PVF_CTL_TRACE:
		return pvf_handle_trace(w);
	case PVF_CTL_QUIESCE:
		return handle_quiesce(w);
	case PVF_CTL_DETACH:
		return handle_detach(w);
	case PVF_CTL_HAND_OVER:
		return pvf_handle_hand_over(w);
	case PVF_CTL_TAKE_OVER:
		return pvf_handle_take_over(w);
	case PVF_CTL_LAST:
		if (w->parked || !w->obey)
			return pvf_tell_error(w, PVF_CTL_LAST, EBUSY,
					      w->parked ? "parked: must not end" :
							  "a program decides for itself when it ends");
		w->obey();
		return pvf_tell_simple(w, PVF_CTL_NOTED);
	case PVF_CTL_EXIT:
		if (w->parked)
			return pvf_tell_error(w, PVF_CTL_EXIT, EBUSY,
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
		settle(w);
		if (rc == 1)
			handle(w);
		else
			pvf_tell_error(w, w->ctl.in.hdr.type, EINVAL, why);
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
	settle(w); /* what was noted for the former is in HELLO */
	pvf_ctl_accept(&w->ctl, fd);
	pvf_tell_hello(w);
}

/* Who gets an answer finds the statistics that go with it. */
void pvf_worker_publish(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_lock(q);
		q->state = w->state;
		q->generation = w->generation;
		q->queues = w->state != PVF_IDLE && i < w->attached ? w->attached : 0;
		pvf_queue_publish(q);
		pvf_queue_unlock(q);
	}
}

/* Beginning and end */

static int watch(const struct pvf_worker *w, int fd, uint64_t tag, uint32_t how)
{
	struct epoll_event event = {.events = EPOLLIN | how, .data.u64 = tag};

	return epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static int open_own(struct pvf_worker *w, uint32_t queues, const char **why)
{
	*why = "epoll";
	w->epoll_fd = w->ctl.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (w->epoll_fd < 0)
		return -errno;
	*why = "an eventfd";
	w->notes_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (w->notes_fd < 0)
		return -errno;
	/* Never read: each write is a new edge. */
	int rc = watch(w, w->notes_fd, TAG_NOTES, EPOLLET);

	if (rc)
		return rc;
	*why = "the statistics pages";
	rc = pvf_stats_open(&w->stats, queues);
	if (rc)
		return rc;
	*why = "the queues";
	w->queue = calloc(queues, sizeof(*w->queue));
	if (!w->queue)
		return -ENOMEM;
	for (; w->queues < queues; w->queues++) {
		rc = pvf_queue_init(&w->queue[w->queues], w->queues, &w->fence, w->notes_fd,
				    pvf_stats_page(&w->stats, w->queues));
		if (rc)
			return rc;
	}
	*why = "descriptor 3 is no listening socket";
	return w->listen_fd < 0 ? 0 : watch(w, w->listen_fd, TAG_LISTEN, 0);
}

int pvf_worker_init(struct pvf_worker *w, int listen_fd, const char *name, uint32_t queues,
		    const char **why)
{
	memset(w, 0, sizeof(*w));
	w->pid = (uint32_t)getpid();
	w->listen_fd = listen_fd;
	w->epoll_fd = w->notes_fd = w->ctl.fd = w->stats.fd = -1;
	w->ctl.tag = TAG_CONTROL;
	w->device_class = PVF_CLASS_BLK;
	pvf_copy_text(w->name, sizeof(w->name), name);
	int rc = open_own(w, queues, why);

	if (rc)
		pvf_worker_end(w);
	return rc;
}

int pvf_worker_uring(struct pvf_worker *w, const char **why)
{
	for (uint32_t i = 0; i < w->queues; i++) {
		int rc = pvf_queue_uring(&w->queue[i], why);

		if (rc)
			return rc;
	}
	return 0;
}

int pvf_worker_net(struct pvf_worker *w, const char **why)
{
	*why = "memory of the queues";
	w->device_class = PVF_CLASS_NET;
	pvf_groups_init(&w->groups);
	for (uint32_t i = 0; i < w->queues; i++) {
		int rc = pvf_queue_net(&w->queue[i], &w->groups);

		if (rc)
			return rc;
	}
	return 0;
}

int pvf_worker_start(struct pvf_worker *w, const char **why)
{
	*why = "a queue's thread";
	for (uint32_t i = 0; i < w->queues; i++) {
		int rc = pvf_queue_spawn(&w->queue[i]);

		if (rc)
			return rc;
	}
	return 0;
}

void pvf_worker_end(struct pvf_worker *w)
{
	pvf_ctl_drop(&w->ctl);
	for (uint32_t i = 0; i < w->queues; i++)
		pvf_queue_free(&w->queue[i]);
	free(w->queue);
	w->queue = NULL;
	if (w->trace)
		munmap(w->trace, w->queues * sizeof(*w->trace));
	w->trace = NULL;
	if (w->device_class == PVF_CLASS_NET)
		pvf_groups_free(&w->groups);
	w->queues = 0;
	pvf_stats_close(&w->stats);
	if (w->notes_fd >= 0)
		close(w->notes_fd);
	if (w->epoll_fd >= 0)
		close(w->epoll_fd);
	w->notes_fd = w->epoll_fd = -1;
}

void pvf_worker_events(struct pvf_worker *w, const struct epoll_event *events, int n)
{
	for (int i = 0; i < n; i++) {
		uint64_t tag = events[i].data.u64;

		if (tag == TAG_LISTEN)
			accept_control(w);
		else if (tag == TAG_CONTROL && w->ctl.fd >= 0)
			control(w, events[i].events);
	}
	settle(w);
	pvf_worker_publish(w);
	pvf_ctl_flush(&w->ctl);
}

int pvf_worker_turn(struct pvf_worker *w, int timeout)
{
	struct epoll_event events[8];
	int n = epoll_wait(w->epoll_fd, events, 8, timeout);

	if (n < 0 && errno != EINTR)
		return -errno;
	pvf_worker_events(w, events, n);
	return 0;
}

int pvf_worker_run(struct pvf_worker *w)
{
	pvf_worker_publish(w);
	while (!w->exiting)
		if (pvf_worker_turn(w, -1))
			return 1;
	return 0;
}
