/* SPDX-License-Identifier: BSD-2-Clause */
#include "queue_int.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define PATIENCE PVF_SECOND

static int watch(const struct pvf_queue *q, int fd, uint64_t tag, uint32_t how)
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
	q->ops = &pvf_blkq_ops;
	q->target.fd = q->port.event_fd = q->second.event_fd = q->ublk.ublk.fd = -1;
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
	free(q->own);
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

int pvf_queue_watch_port(struct pvf_queue *q, const struct pvf_port *port, const char **why)
{
	*why = "the event channel cannot be watched";
	return watch(q, port->event_fd, port == &q->port ? PVF_TAG_EVENT : PVF_TAG_SECOND,
		     port->ops->edges ? EPOLLET : 0);
}

static void unwatch_port(const struct pvf_queue *q, const struct pvf_port *port)
{
	if (port->event_fd >= 0)
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, port->event_fd, NULL);
}

void pvf_queue_close_ports(struct pvf_queue *q)
{
	unwatch_port(q, &q->port);
	unwatch_port(q, &q->second);
	pvf_port_close(&q->second);
	pvf_port_close(&q->port);
}

void pvf_queue_stop(struct pvf_queue *q)
{
	if (q->stopped || !q->attached)
		return;
	q->stopped = true;
	q->serving = q->again = false;
	if (q->ops->quarantine)
		q->ops->quarantine(q);
	/* A readable event channel would keep a level-triggered epoll awake. */
	unwatch_port(q, &q->port);
	unwatch_port(q, &q->second);
}

static int open_second(struct pvf_queue *q, int fd, uint32_t number, const char **why)
{
	int rc = pvf_port_open_event(&q->second, fd, number, why);

	if (rc)
		return rc;
	rc = pvf_queue_watch_port(q, &q->second, why);
	if (rc)
		pvf_port_release(&q->second);
	return rc;
}

int pvf_queue_attach(struct pvf_queue *q, const int *fds, const struct pvf_ctl_attach *a,
		     const char **why)
{
	int rc = pvf_port_open(&q->port, fds[0], fds[1], a, why);

	if (rc)
		return rc;
	rc = pvf_queue_watch_port(q, &q->port, why);
	if (!rc && a->rx_port)
		rc = open_second(q, fds[2], a->rx_port, why);
	if (rc) {
		unwatch_port(q, &q->port);
		pvf_port_release(&q->port);
		return rc;
	}
	q->blk.fault = (struct pvf_fault){0};
	q->ops->attach(q, a);
	q->attached = true;
	q->serving = q->no_new = q->drained = q->stopped = false;
	/* An event from before may be waiting; the ring is new, so begin as if one had come. */
	q->masked = q->delayed = q->stalled = q->unseen = q->polling = q->owed = false;
	q->delivered[0] = q->delivered[1] = false;
	q->soon = false;
	q->poll_until = 0;
	q->idle = true;
	q->patience = 0;
	q->spurious_run = 0;
	q->features_noted = 0;
	q->notes &= PVF_NOTE_TARGET_GONE;
	return 0;
}

uint64_t pvf_queue_next_tag(struct pvf_queue *q)
{
	return (uint64_t)++q->sockets << 32 | PVF_TAG_TARGET;
}

int pvf_queue_watch_target(struct pvf_queue *q, int fd, uint32_t events)
{
	q->target.tag = pvf_queue_next_tag(q);
	return watch(q, fd, q->target.tag, EPOLLET | events);
}

void pvf_queue_close_target(struct pvf_queue *q, int *fd)
{
	if (*fd >= 0) {
		/* Another process may have the same open file. */
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
		close(*fd);
	}
	*fd = -1;
}

int pvf_queue_target(struct pvf_queue *q, int fd, const char **why)
{
	return q->ops->take_target(q, fd, why);
}

void pvf_queue_drop_target(struct pvf_queue *q)
{
	q->ops->drop_target(q);
}

bool pvf_queue_has_target(const struct pvf_queue *q)
{
	return q->ops->has_target(q);
}

void pvf_queue_detach(struct pvf_queue *q, bool keep)
{
	q->ops->detach(q, keep);
	if (!q->attached)
		return;
	pvf_queue_close_ports(q);
	q->attached = q->serving = q->no_new = q->drained = q->stopped = false;
	q->again = q->masked = q->delayed = q->stalled = q->watching = false;
	q->oldest = 0;
	pvf_arm(q->unmask_timer, 0);
	pvf_arm(q->watchdog_timer, 0);
}

void pvf_queue_park(struct pvf_queue *q)
{
	q->port.parked = true;
	q->second.parked = pvf_queue_has_second(q);
}

void pvf_queue_expect(struct pvf_queue *q, uint32_t stall_seconds)
{
	q->blk.geo.stall_seconds = stall_seconds;
	q->masked = true;
	q->watching = true;
	pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
}

uint32_t pvf_queue_in_flight(const struct pvf_queue *q)
{
	return q->ops->in_flight(q);
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
	q->ops->publish(q);
}
