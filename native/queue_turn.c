/* SPDX-License-Identifier: BSD-2-Clause */
#include "queue_int.h"

#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <unistd.h>

#define SPURIOUS_FREE 4           /* in a row, before the unmask is delayed */
#define SPURIOUS_FORGET (2 * PVF_SECOND)
#define UNMASK_CAP PVF_SECOND
#define QUIET (2 * PVF_SECOND)

void pvf_queue_broken(struct pvf_queue *q)
{
	q->notes |= PVF_NOTE_BROKEN;
	pvf_queue_stop(q);
}

static void port_failed(struct pvf_queue *q, int error, const char *text)
{
	if (q->stopped)
		return;
	q->blk.fault = (struct pvf_fault){23, (uint64_t)error, "event-channel", text};
	pvf_queue_broken(q);
}

/* Events */

/* `second`: that port's. */
static void take_event(struct pvf_queue *q, bool second)
{
	struct pvf_port *port = second ? &q->second : &q->port;
	int rc = port->ops->read(port);

	if (rc < 0)
		port_failed(q, -rc, "the event channel cannot be read");
	if (rc <= 0)
		return;
	q->blk.stats.events++;
	q->masked = q->delivered[second] = true;
	q->responses_since_event = 0;
}

/* Of two ports only what was delivered is masked. */
static void unmask(struct pvf_queue *q)
{
	bool two = pvf_queue_has_second(q);
	int rc = 0;

	if (!two || q->delivered[0])
		rc = q->port.ops->unmask(&q->port);
	if (!rc && two && q->delivered[1])
		rc = q->second.ops->unmask(&q->second);
	if (rc)
		port_failed(q, -rc, "the event channel cannot be unmasked");
	q->masked = q->delayed = q->delivered[0] = q->delivered[1] = false;
}

void pvf_queue_finish_event(struct pvf_queue *q)
{
	if (q->responses_since_event || q->owed) {
		q->owed = false;
		q->spurious_run = 0;
		unmask(q);
		return;
	}
	uint64_t now = pvf_now_ns();

	q->blk.stats.events_spurious++;
	if (now - q->spurious_at > SPURIOUS_FORGET)
		q->spurious_run = 0;
	q->spurious_at = now;
	if (++q->spurious_run <= SPURIOUS_FREE) {
		unmask(q);
		return;
	}
	uint32_t doublings = pvf_min32(q->spurious_run - SPURIOUS_FREE - 1, 10);
	uint64_t delay = PVF_MS << doublings;

	q->delayed = true;
	pvf_arm(q->unmask_timer, delay < UNMASK_CAP ? delay : UNMASK_CAP);
}

void pvf_queue_notify(struct pvf_queue *q, struct pvf_port *port)
{
	int rc = port->ops->notify(port);

	if (rc)
		port_failed(q, -rc, "the backend cannot be notified");
	else
		q->blk.stats.notifies++;
}

void pvf_queue_watch(struct pvf_queue *q, uint32_t in_flight)
{
	bool idle = q->idle;

	q->idle = !in_flight;
	if (q->idle) {
		q->oldest = 0;
		return;
	}
	if (idle)
		q->progress_at = q->oldest = q->blk.now;
	if (q->watching)
		return;
	q->watching = true;
	q->unseen = false;
	pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
}

/* `responses` were taken. With a recent `blk->now`. */
void pvf_queue_progress(struct pvf_queue *q, uint32_t responses)
{
	q->responses_since_event += responses;
	if (!q->masked || q->delayed)
		q->owed = true;
	q->progress_at = q->blk.now;
	q->unseen = false;
	if (q->stalled) {
		q->stalled = false;
		q->notes |= PVF_NOTE_STALL;
	}
}

bool pvf_queue_check(struct pvf_queue *q, const struct pvf_fault *fault)
{
	if (!fault->rule)
		return true;
	q->blk.fault = *fault;
	pvf_queue_broken(q);
	return false;
}

static void watchdog(struct pvf_queue *q)
{
	const struct pvf_queue_ops *ops = q->ops;
	struct pvf_fault fault = {0};

	q->watching = false;
	if (!q->attached || q->stopped)
		return;
	if (!q->masked)
		take_event(q, false); /* it may just not have had its turn */
	if (!q->masked && !q->stopped && pvf_queue_has_second(q))
		take_event(q, true);
	if (q->stopped)
		return;
	uint64_t now = pvf_now_ns();

	q->blk.now = now;
	if (ops->requests && !ops->in_flight(q)) {
		if (now < q->patience) {
			q->watching = true;
			pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
		}
		return;
	}
	if (ops->tick)
		ops->tick(q);
	if (q->stopped)
		return;
	if (!q->masked && ops->waiting(q, &fault) && !fault.rule) {
		uint32_t at = ops->taken(q);

		if (q->unseen && q->unseen_at == at) {
			q->blk.stats.watchdog_hits++;
			q->masked = true; /* as if the event had come */
			q->again = true;
		} else {
			q->unseen = true;
			q->unseen_at = at;
		}
	}
	if (!pvf_queue_check(q, &fault))
		return;
	uint32_t stall_seconds = q->blk.geo.stall_seconds;
	uint64_t silent = now - q->progress_at;
	bool busy = ops->in_flight(q);

	if (stall_seconds && !q->stalled && silent >= stall_seconds * PVF_SECOND && busy) {
		q->stalled = true;
		q->stall_for = (uint32_t)(silent / PVF_SECOND);
		q->notes |= PVF_NOTE_STALL;
	}
	q->watching = true;
	/* A network's ring is never without requests, and a console's backend may always have something to say: they
	 * are looked at for ever, but seldom while it is quiet. */
	bool quiet = !ops->requests && !busy && !q->unseen && silent > QUIET && now >= q->patience;

	pvf_arm(q->watchdog_timer, quiet ? QUIET : PVF_WATCHDOG_TICK);
}

static bool timer_fired(int timer)
{
	uint64_t times;

	return read(timer, &times, sizeof(times)) == sizeof(times);
}

/* Between epoll_wait() and the lock the worker may have closed what an event is about, and even
 * opened the next. Of most, an event says no more than "look there"; of a socket it says which. */
void pvf_queue_event(struct pvf_queue *q, uint64_t data, uint32_t events)
{
	switch ((uint32_t)data) {
	case PVF_TAG_EVENT:
		if (q->attached && !q->stopped)
			take_event(q, false);
		break;
	case PVF_TAG_SECOND:
		if (q->attached && !q->stopped && pvf_queue_has_second(q))
			take_event(q, true);
		break;
	case PVF_TAG_TARGET:
		if (data == q->target.tag && q->ops->target_event)
			q->ops->target_event(q, events);
		break;
	case PVF_TAG_UNMASK:
		/* Whatever has come meanwhile brings its event now. */
		if (timer_fired(q->unmask_timer) && q->delayed && !q->stopped)
			unmask(q);
		break;
	case PVF_TAG_WATCHDOG:
		if (timer_fired(q->watchdog_timer) && q->watching)
			watchdog(q);
		break;
	}
}

/* Service */

/* Wakes the worker for what is newly noted. */
void pvf_queue_tell(struct pvf_queue *q)
{
	if (q->notes & ~q->notes_told)
		pvf_signal(q->notes_fd);
	q->notes_told = q->notes;
}

void pvf_queue_service(struct pvf_queue *q)
{
	q->again = false;
	q->ops->serve(q);
	if (q->attached && q->no_new && !q->drained && !q->stopped && q->ops->drained(q)) {
		/* It stays so: nothing is received any more. */
		q->drained = true;
		q->serving = q->again = false;
		q->notes |= PVF_NOTE_DRAINED;
	}
	pvf_queue_tell(q);
}

/* Whether a client wakes us, who may have more to send. */
static bool client_calls(const struct pvf_queue *q, const struct epoll_event *events, int n)
{
	for (int i = 0; i < n && q->ops->requests; i++) {
		uint32_t tag = (uint32_t)events[i].data.u64;

		if (tag == PVF_TAG_TARGET || tag == PVF_TAG_URING)
			return true;
	}
	return false;
}

#define EVENTS 8

/* As epoll_wait(), of EVENTS. */
static int wait_for(const struct pvf_queue *q, struct epoll_event *events, int timeout)
{
	int n = epoll_wait(q->epoll_fd, events, EVENTS, timeout);

	PVF_ASSERT(n >= 0 || errno == EINTR);
	return n < 0 ? 0 : n;
}

bool pvf_queue_turn(struct pvf_queue *q, int timeout)
{
	struct epoll_event events[2 * EVENTS];
	int n = wait_for(q, events, timeout);
	bool give_way = timeout < 0 && client_calls(q, events, n) && pvf_batch_wait(&q->batch);
	uint64_t waited = 0;

	if (give_way) {
		uint64_t began = pvf_coarse_ns();

		sched_yield();
		waited = (pvf_coarse_ns() - began) / PVF_MS;
		n += wait_for(q, events + n, 0); /* or they would wake us for what is taken now */
	}
	pvf_queue_lock(q);
	uint32_t before = q->blk.begun;

	q->blk.stats.wakeups++;
	for (int i = 0; i < n; i++)
		pvf_queue_event(q, events[i].data.u64, events[i].events);
	pvf_queue_service(q);
	if (give_way)
		pvf_batch_found(&q->batch, q->blk.begun - before, waited);
	pvf_queue_publish(q);
	bool again = q->again, owes = q->owes;

	q->owes = false;
	pvf_queue_unlock(q);
	if (owes)
		sched_yield();
	return again;
}
