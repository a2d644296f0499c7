/* SPDX-License-Identifier: BSD-2-Clause */
#include "queue.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000ull
#define SECOND (1000 * MS)
#define SPURIOUS_FREE 4           /* in a row, before the unmask is delayed */
#define SPURIOUS_FORGET (2 * SECOND)
#define UNMASK_CAP SECOND
#define WATCHDOG_TICK (250 * MS)
#define PATIENCE SECOND

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

static void arm(int timer, uint64_t ns)
{
	struct itimerspec spec = {
		.it_value = {.tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND)}};

	timerfd_settime(timer, 0, &spec, NULL);
}

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

int pvf_queue_init(struct pvf_queue *q, int epoll_fd)
{
	memset(q, 0, sizeof(*q));
	q->epoll_fd = epoll_fd;
	q->target.fd = q->port.event_fd = -1;
	pvf_blk_init(&q->blk);
	q->unmask_timer = make_timer(q, PVF_TAG_UNMASK);
	if (q->unmask_timer < 0)
		return q->unmask_timer;
	q->watchdog_timer = make_timer(q, PVF_TAG_WATCHDOG);
	return q->watchdog_timer < 0 ? q->watchdog_timer : 0;
}

static void broken(struct pvf_queue *q)
{
	q->notes |= PVF_NOTE_BROKEN;
	q->blk.pool.quarantined = true;
	q->again = false;
	/* A readable event channel would keep a level-triggered epoll awake. */
	epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->port.event_fd, NULL);
}

static void port_failed(struct pvf_queue *q, int error, const char *text)
{
	if (q->blk.fault.rule)
		return;
	q->blk.fault = (struct pvf_fault){23, (uint64_t)error, "event-channel", text};
	broken(q);
}

int pvf_queue_attach(struct pvf_queue *q, int event_fd, int grant_fd,
		     const struct pvf_ctl_attach *a, const char **why)
{
	int rc = pvf_port_open(&q->port, event_fd, grant_fd, a, why);

	if (rc)
		return rc;
	rc = watch(q, q->port.event_fd, PVF_TAG_EVENT, q->port.ops->edges ? EPOLLET : 0);
	if (rc) {
		*why = "the event channel cannot be watched";
		pvf_port_release(&q->port);
		return rc;
	}
	pvf_blk_attach(&q->blk, q->port.ring, q->port.ring_bytes, q->port.pool, a->pool_pages,
		       a->pool_grefs, a->flags & PVF_ATTACH_SCRUB);
	q->attached = true;
	q->serving = q->no_new = false;
	/* An event from before may be waiting; the ring is new, so begin as if one had come. */
	q->masked = q->delayed = q->stalled = q->unseen = q->polling = q->owed = false;
	q->idle = true;
	q->patience = 0;
	q->spurious_run = 0;
	q->features_told = 0;
	q->notes &= PVF_NOTE_TARGET_GONE;
	return 0;
}

void pvf_queue_drop_target(struct pvf_queue *q)
{
	pvf_target_close(&q->target);
	pvf_blk_drop_target(&q->blk);
}

void pvf_queue_detach(struct pvf_queue *q, bool keep)
{
	if (q->target.fd >= 0 && keep && q->attached && !pvf_blk_portable(&q->blk)) {
		q->target.gone = true;
		q->target.error = ECANCELED;
		q->target.why = "the connection was left with requests or data in its pages";
		q->notes |= PVF_NOTE_TARGET_GONE;
		keep = false;
	}
	if (!keep)
		pvf_target_close(&q->target);
	if (q->target.fd < 0 && !q->source_ops)
		pvf_blk_drop_target(&q->blk);
	if (!q->attached)
		return;
	if (q->source_ops)
		q->source_ops->deliver(q->source, &q->blk);
	epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->port.event_fd, NULL);
	if (q->source_ops) {
		pvf_blk_drop_target(&q->blk);
		q->source_ops->restart(q->source);
	}
	pvf_blk_detach(&q->blk);
	pvf_port_close(&q->port);
	q->attached = q->serving = q->no_new = q->again = q->masked = q->delayed = false;
	q->stalled = false;
	q->watching = false;
	arm(q->unmask_timer, 0);
	arm(q->watchdog_timer, 0);
}

void pvf_queue_park(struct pvf_queue *q)
{
	q->port.parked = true;
}

int pvf_queue_target(struct pvf_queue *q, int fd)
{
	pvf_queue_drop_target(q);
	return pvf_target_open(&q->target, fd, q->epoll_fd, PVF_TAG_TARGET);
}

/* Events */

/* 1: the port was delivered. */
static int take_event(struct pvf_queue *q)
{
	int rc = q->port.ops->read(&q->port);

	if (rc < 0)
		port_failed(q, -rc, "the event channel cannot be read");
	if (rc <= 0)
		return 0;
	q->blk.stats.events++;
	q->masked = true;
	q->responses_since_event = 0;
	return 1;
}

static void unmask(struct pvf_queue *q)
{
	int rc = q->port.ops->unmask(&q->port);

	if (rc)
		port_failed(q, -rc, "the event channel cannot be unmasked");
	q->masked = q->delayed = false;
}

/* Ends the attention to one event: unmask now, or later if events keep coming for nothing. */
static void finish_event(struct pvf_queue *q)
{
	if (q->responses_since_event || q->owed) {
		q->owed = false;
		q->spurious_run = 0;
		unmask(q);
		return;
	}
	uint64_t now = now_ns();

	q->blk.stats.events_spurious++;
	if (now - q->spurious_at > SPURIOUS_FORGET)
		q->spurious_run = 0;
	q->spurious_at = now;
	if (++q->spurious_run <= SPURIOUS_FREE) {
		unmask(q);
		return;
	}
	uint32_t doublings = pvf_min32(q->spurious_run - SPURIOUS_FREE - 1, 10);
	uint64_t delay = MS << doublings;

	q->delayed = true;
	arm(q->unmask_timer, delay < UNMASK_CAP ? delay : UNMASK_CAP);
}

static void notify(struct pvf_queue *q)
{
	int rc = q->port.ops->notify(&q->port);

	if (rc)
		port_failed(q, -rc, "the backend cannot be notified");
	else
		q->blk.stats.notifies++;
}

static void watch_ring(struct pvf_queue *q)
{
	bool idle = q->idle;

	q->idle = !q->blk.in_flight;
	if (q->idle)
		return;
	if (idle)
		q->progress_at = now_ns();
	if (q->watching)
		return;
	q->watching = true;
	q->unseen = false;
	arm(q->watchdog_timer, WATCHDOG_TICK);
}

void pvf_queue_quiesce(struct pvf_queue *q)
{
	q->no_new = true;
	q->patience = now_ns() + PATIENCE;
	if (!q->watching) {
		q->watching = true;
		arm(q->watchdog_timer, WATCHDOG_TICK);
	}
}

static void drain(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	uint32_t n = pvf_ring_poll(&blk->ring, &blk->fault);

	if (n)
		n = pvf_blk_drain(blk, n);
	if (blk->fault.rule) {
		broken(q);
		return;
	}
	if (!n)
		return;
	q->responses_since_event += n;
	if (!q->masked)
		q->owed = true;
	q->progress_at = now_ns();
	q->unseen = false;
	if (q->stalled) {
		q->stalled = false;
		q->notes |= PVF_NOTE_STALL;
	}
	if (blk->features_off & ~q->features_told)
		q->notes |= PVF_NOTE_FEATURE_OFF;
}

static void watchdog(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	struct pvf_fault fault = {0};

	q->watching = false;
	if (!q->attached || blk->fault.rule)
		return;
	if (!q->masked)
		take_event(q); /* it may just not have had its turn */
	if (blk->fault.rule)
		return;
	uint64_t now = now_ns(), silent = now - q->progress_at;

	if (!blk->in_flight) {
		if (now < q->patience) {
			q->watching = true;
			arm(q->watchdog_timer, WATCHDOG_TICK);
		}
		return;
	}
	if (q->delayed || q->polling) {
		drain(q);
	} else if (!q->masked && pvf_ring_poll(&blk->ring, &fault) && !fault.rule) {
		if (q->unseen && q->unseen_at == blk->ring.rsp_cons) {
			blk->stats.watchdog_hits++;
			drain(q);
			q->again = true;
		} else {
			q->unseen = true;
			q->unseen_at = blk->ring.rsp_cons;
		}
	}
	if (fault.rule) {
		blk->fault = fault;
		broken(q);
		return;
	}
	if (blk->geo.stall_seconds && !q->stalled && silent >= blk->geo.stall_seconds * SECOND &&
	    blk->in_flight) {
		q->stalled = true;
		q->stall_for = (uint32_t)(silent / SECOND);
		q->notes |= PVF_NOTE_STALL;
	}
	q->watching = true;
	arm(q->watchdog_timer, WATCHDOG_TICK);
}

static bool timer_fired(int timer)
{
	uint64_t times;

	return read(timer, &times, sizeof(times)) == sizeof(times);
}

void pvf_queue_event(struct pvf_queue *q, uint32_t tag, uint32_t events)
{
	switch (tag) {
	case PVF_TAG_EVENT:
		if (q->attached && !q->blk.fault.rule)
			take_event(q);
		break;
	case PVF_TAG_TARGET:
		if (q->target.fd >= 0)
			pvf_target_event(&q->target, events);
		break;
	case PVF_TAG_UNMASK:
		/* Delayed for its spuriousness: look at the ring again, then unmask. */
		if (timer_fired(q->unmask_timer) && q->delayed && !q->blk.fault.rule) {
			drain(q);
			if (!q->blk.fault.rule)
				unmask(q);
		}
		break;
	case PVF_TAG_WATCHDOG:
		if (timer_fired(q->watchdog_timer) && q->watching)
			watchdog(q);
		break;
	}
}

/* Service */

static void target_ended(struct pvf_queue *q)
{
	q->notes |= PVF_NOTE_TARGET_GONE;
	pvf_queue_drop_target(q);
}

void pvf_queue_service(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	q->again = false;
	if (!q->attached || blk->fault.rule)
		return;
	blk->now = now_ns();
	if ((q->masked && !q->delayed) || q->polling)
		drain(q);
	if (blk->fault.rule)
		return;
	if (q->source_ops && q->serving)
		q->again |= q->source_ops->intake(q->source, blk, q->no_new);
	else if (q->target.fd >= 0 && q->serving)
		q->again |= pvf_target_receive(&q->target, blk, q->no_new);
	/* The backend has its work before the client has its answers: they go on side by side. */
	if (pvf_ring_push(&blk->ring))
		notify(q);
	if (q->source_ops) {
		q->again |= q->source_ops->deliver(q->source, blk);
	} else if (q->target.fd >= 0) {
		q->again |= pvf_target_send(&q->target, blk);
		if (q->target.gone)
			target_ended(q);
	}
	watch_ring(q);
	if (blk->fault.rule || !q->masked || q->delayed || q->polling)
		return;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		q->again = true;
	else if (blk->fault.rule)
		broken(q);
	else
		finish_event(q);
}

bool pvf_queue_arm(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	if (!q->polling || !q->attached || blk->fault.rule)
		return false;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		return true;
	if (blk->fault.rule) {
		broken(q);
		return false;
	}
	q->polling = false;
	if (q->masked && !q->delayed)
		finish_event(q);
	return false;
}

bool pvf_queue_drained(const struct pvf_queue *q)
{
	const struct pvf_blk *blk = &q->blk;
	const struct pvf_target *t = &q->target;

	if (blk->in_flight)
		return false;
	if (q->source_ops && !blk->fault.rule)
		return blk->current == PVF_NONE && !blk->flush_count && !blk->reply_count;
	if (t->fd < 0 || blk->fault.rule)
		return true;
	if (blk->flush_count || (blk->reply_count && t->tx_ready))
		return false;
	if (blk->current == PVF_NONE && !blk->skip)
		return true;
	return (!t->rx_ready || !t->tx_ready) && now_ns() >= q->patience;
}
