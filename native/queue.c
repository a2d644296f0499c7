/* SPDX-License-Identifier: BSD-2-Clause */
#include "queue_int.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "stats.h"

#define PATIENCE PVF_SECOND

static int watch(const struct pvf_queue *q, int fd, uint32_t tag, uint32_t how)
{
	struct epoll_event event = {.events = EPOLLIN | how, .data.u64 = tag};

	return epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static int make_timer(const struct pvf_queue *q, uint32_t tag)
{
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);

	if (fd < 0)
		return -errno;
	int rc = watch(q, fd, tag, 0);

	if (rc) {
		close(fd);
		return rc;
	}
	return fd;
}

static void close_own(struct pvf_queue *q)
{
	int own[] = {q->unmask_timer, q->watchdog_timer, q->wake_fd, q->epoll_fd};

	for (size_t i = 0; i < sizeof(own) / sizeof(*own); i++)
		if (own[i] >= 0)
			close(own[i]);
}

int pvf_queue_init(struct pvf_queue *q, uint32_t index, struct pvf_fence *fence, int notes_fd,
		   void *page)
{
	int rc;

	memset(q, 0, sizeof(*q));
	q->index = index;
	q->fence = fence;
	q->notes_fd = notes_fd;
	q->page = page;
	q->target.fd = q->port.event_fd = q->ublk.ublk.fd = -1;
	q->unmask_timer = q->watchdog_timer = q->wake_fd = -1;
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (q->epoll_fd < 0)
		return -errno;
	pthread_mutex_init(&q->gate, NULL);
	pthread_mutex_init(&q->lock, NULL);
	pvf_blk_init(&q->blk);
	rc = q->unmask_timer = make_timer(q, PVF_TAG_UNMASK);
	if (rc >= 0)
		rc = q->watchdog_timer = make_timer(q, PVF_TAG_WATCHDOG);
	if (rc >= 0) {
		q->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		/* Never read: each write is a new edge. */
		rc = q->wake_fd < 0 ? -errno : watch(q, q->wake_fd, PVF_TAG_WAKE, EPOLLET);
	}
	if (rc < 0)
		close_own(q);
	return rc < 0 ? rc : 0;
}

/* All of a worker's memory is locked, so a thread costs what its stack is long: turns need little. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STACK (1u << 20)
#else
#define STACK (128u << 10)
#endif

static void *serve(void *arg)
{
	struct pvf_queue *q = arg;
	bool again = false;

	pthread_barrier_wait(&q->begun);
	while (!__atomic_load_n(&q->ending, __ATOMIC_ACQUIRE))
		again = pvf_queue_turn(q, again ? 0 : -1) || pvf_queue_linger(q);
	return NULL;
}

int pvf_queue_spawn(struct pvf_queue *q)
{
	pthread_attr_t attr;
	int rc = -pthread_attr_init(&attr);

	if (rc)
		return rc;
	pthread_barrier_init(&q->begun, NULL, 2);
	rc = -pthread_attr_setstacksize(&attr, STACK);
	if (!rc)
		rc = -pthread_create(&q->thread, &attr, serve, q);
	q->threaded = !rc;
	if (q->threaded)
		pthread_barrier_wait(&q->begun);
	else
		pthread_barrier_destroy(&q->begun);
	pthread_attr_destroy(&attr);
	return rc;
}

void pvf_queue_free(struct pvf_queue *q)
{
	if (q->threaded) {
		__atomic_store_n(&q->ending, 1, __ATOMIC_RELEASE);
		pvf_queue_wake(q);
		pthread_join(q->thread, NULL);
		pthread_barrier_destroy(&q->begun);
	}
	pvf_queue_detach(q, false);
	pvf_uring_free(&q->ublk.uring);
	if (q->net)
		pvf_netq_drop_target(q);
	free(q->net);
	if (q->cons)
		pvf_consq_drop_target(q);
	free(q->cons);
	close_own(q);
	pthread_mutex_destroy(&q->lock);
	pthread_mutex_destroy(&q->gate);
}

void pvf_queue_lock(struct pvf_queue *q)
{
	pthread_mutex_lock(&q->gate);
	pthread_mutex_lock(&q->lock);
	pthread_mutex_unlock(&q->gate);
}

void pvf_queue_unlock(struct pvf_queue *q)
{
	pthread_mutex_unlock(&q->lock);
}

void pvf_queue_wake(struct pvf_queue *q)
{
	pvf_signal(q->wake_fd);
}

void pvf_queue_stop(struct pvf_queue *q)
{
	if (q->stopped || !q->attached)
		return;
	q->stopped = true;
	q->serving = q->again = false;
	if (q->net)
		q->net->tx.pool.quarantined = q->net->rx.pool.quarantined = true;
	else if (!q->cons)
		q->blk.pool.quarantined = true;
	/* A readable event channel would keep a level-triggered epoll awake. */
	epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->port.event_fd, NULL);
	if (q->net && q->net->split)
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->net->rx_port.event_fd, NULL);
}

int pvf_queue_watch_port(struct pvf_queue *q, const struct pvf_port *port, uint32_t tag)
{
	return watch(q, port->event_fd, tag, port->ops->edges ? EPOLLET : 0);
}

int pvf_queue_attach(struct pvf_queue *q, const int *fds, const struct pvf_ctl_attach *a,
		     const char **why)
{
	int rc = pvf_port_open(&q->port, fds[0], fds[1], a, why);

	if (rc)
		return rc;
	*why = "the event channel cannot be watched";
	rc = pvf_queue_watch_port(q, &q->port, PVF_TAG_EVENT);
	if (!rc && q->net)
		rc = pvf_netq_attach(q, fds[2], a, why);
	if (rc) {
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->port.event_fd, NULL);
		pvf_port_release(&q->port);
		return rc;
	}
	if (q->cons)
		pvf_consq_attach(q);
	else if (!q->net)
		pvf_blk_attach(&q->blk, q->port.ring, q->port.ring_bytes, q->port.pool, a->pool_pages,
			       a->pool_grefs, a->flags & PVF_ATTACH_SCRUB);
	q->attached = true;
	q->serving = q->no_new = q->drained = q->stopped = false;
	/* An event from before may be waiting; the ring is new, so begin as if one had come. */
	q->masked = q->delayed = q->stalled = q->unseen = q->polling = q->owed = false;
	q->soon = false;
	q->poll_until = 0;
	q->idle = true;
	q->patience = 0;
	q->spurious_run = 0;
	q->features_noted = 0;
	q->notes &= PVF_NOTE_TARGET_GONE;
	return 0;
}

static void close_target(struct pvf_queue *q)
{
	pvf_target_close(&q->target);
	if (q->source_ops && q->source_ops->close) {
		q->source_ops->close(q->source);
		q->source_ops = NULL;
	}
}

static void forget_target(struct pvf_queue *q)
{
	pvf_blk_drop_target(&q->blk);
	q->lost = q->source_ops && q->target.gone;
	q->unread = (struct pvf_unread){0};
}

void pvf_queue_drop_target(struct pvf_queue *q)
{
	if (q->net)
		return pvf_netq_drop_target(q);
	if (q->cons)
		return pvf_consq_drop_target(q);
	close_target(q);
	forget_target(q);
	q->notes &= ~(uint32_t)PVF_NOTE_TARGET_GONE;
}

bool pvf_queue_has_target(const struct pvf_queue *q)
{
	if (q->net)
		return q->net->tap_fd >= 0;
	if (q->cons)
		return q->cons->fd >= 0;
	return q->source_ops ? !q->target.gone : q->target.fd >= 0;
}

void pvf_queue_detach(struct pvf_queue *q, bool keep)
{
	if (q->target.fd >= 0 && keep && !q->target.gone && q->attached &&
	    !pvf_blk_portable(&q->blk)) {
		q->target.gone = true;
		q->target.error = ECANCELED;
		q->target.why = "the connection was left with requests or data in its pages";
	}
	if (q->target.fd >= 0 && keep && q->target.gone)
		q->notes |= PVF_NOTE_TARGET_GONE;
	if (q->source_ops && q->attached)
		q->source_ops->deliver(q->source, &q->blk);
	if (q->net && !keep)
		pvf_netq_drop_target(q);
	if (q->cons && !keep)
		pvf_consq_drop_target(q);
	if (!keep || q->target.gone)
		close_target(q);
	if (q->target.fd < 0)
		forget_target(q);
	if (!q->attached)
		return;
	if (q->source_ops) {
		q->source_ops->restart(q->source);
		pvf_queue_wake(q); /* what was delivered just now is told by the serving thread */
	}
	epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->port.event_fd, NULL);
	if (q->net)
		pvf_netq_detach(q);
	else if (q->cons)
		pvf_cons_detach(&q->cons->ring);
	else
		pvf_blk_detach(&q->blk);
	pvf_port_close(&q->port);
	q->attached = q->serving = q->no_new = q->drained = q->stopped = false;
	q->again = q->masked = q->delayed = q->stalled = q->watching = false;
	q->oldest = 0;
	pvf_fence_show(q->fence, q->index, q->unread.since);
	pvf_arm(q->unmask_timer, 0);
	pvf_arm(q->watchdog_timer, 0);
}

void pvf_queue_park(struct pvf_queue *q)
{
	q->port.parked = true;
	if (q->net && q->net->split)
		q->net->rx_port.parked = true;
}

int pvf_queue_uring(struct pvf_queue *q, const char **why)
{
	return pvf_uring_make(&q->ublk.uring, q->epoll_fd, PVF_TAG_URING, why);
}

static int take_ublk(struct pvf_queue *q, int fd, const char **why)
{
	int rc = pvf_uring_open(&q->ublk.uring, &q->ublk.ublk, fd, (uint16_t)q->index, why);

	if (rc)
		return rc;
	q->source_ops = &pvf_ublk_ops;
	q->source = &q->ublk;
	q->target.gone = q->lost = false;
	return 0;
}

int pvf_queue_target(struct pvf_queue *q, int fd, const char **why)
{
	struct stat st;

	if (q->net)
		return pvf_netq_target(q, fd, why);
	if (q->cons)
		return pvf_consq_target(q, fd, why);
	pvf_queue_drop_target(q);
	if (!fstat(fd, &st) && S_ISCHR(st.st_mode))
		return take_ublk(q, fd, why);
	*why = "the NBD socket cannot be watched";
	int rc = pvf_target_open(&q->target, fd, q->epoll_fd,
				 (uint64_t)++q->sockets << 32 | PVF_TAG_TARGET);

	q->target.several = q->queues > 1;
	return rc;
}

void pvf_queue_start(struct pvf_queue *q, const struct pvf_geometry *geo)
{
	q->blk.now = pvf_now_ns();
	pvf_blk_start(&q->blk, geo);
	/* A kept socket that was hung up meanwhile: no queue may receive before this one has looked. */
	if (q->queues > 1 && q->target.fd >= 0 && q->target.ended)
		pvf_fence_close(q->fence);
}

void pvf_queue_start_net(struct pvf_queue *q, uint32_t features, uint32_t stall_seconds)
{
	q->net->tx.features = features;
	q->blk.geo.stall_seconds = stall_seconds;
	/* The backend may have sent something before we were told that it is connected. */
	q->masked = true;
	q->watching = true;
	pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
}

uint32_t pvf_queue_in_flight(const struct pvf_queue *q)
{
	if (q->cons)
		return pvf_cons_unsent(&q->cons->ring);
	return q->net ? q->net->tx.in_flight : q->blk.in_flight;
}

void pvf_queue_run(struct pvf_queue *q)
{
	q->serving = true;
	q->no_new = q->drained = false;
}

void pvf_queue_quiesce(struct pvf_queue *q)
{
	q->no_new = true;
	q->drained = false;
	q->patience = pvf_now_ns() + PATIENCE;
	if (!q->watching) {
		q->watching = true;
		pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
	}
}

void pvf_queue_publish(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	struct pvf_blk_stats *s = &blk->stats;

	if (q->net)
		return pvf_netq_publish(q);
	if (q->cons)
		return pvf_consq_publish(q);
	s->state = q->state;
	s->generation = q->generation;
	s->queue = q->index;
	s->queues = q->queues;
	s->in_flight = blk->in_flight;
	s->pool_pages = blk->pool.pages;
	s->pool_free = blk->pool.free;
	s->pool_free_low = blk->pool.free_low;
	s->ring_slots = blk->ring.entries;
	s->nbd_pending = blk->pending;
	pvf_stats_publish(q->page, s, sizeof(*s));
}
