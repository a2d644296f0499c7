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

/* Since when the oldest request in the ring, or on its way there, has been known. */
static uint64_t oldest_request(const struct pvf_blk *blk)
{
	uint64_t oldest = blk->now;

	for (uint32_t i = 0; i < PVF_REQUESTS; i++) {
		const struct pvf_request *r = &blk->request[i];

		if ((r->outstanding || i == blk->current) && r->began < oldest)
			oldest = r->began;
	}
	return oldest;
}

/* Events */

/* 1: the port was delivered. `rx`: a network's second one. */
static int take_event(struct pvf_queue *q, bool rx)
{
	struct pvf_port *port = rx ? &q->net->rx_port : &q->port;
	int rc = port->ops->read(port);

	if (rc < 0)
		port_failed(q, -rc, "the event channel cannot be read");
	if (rc <= 0)
		return 0;
	q->blk.stats.events++;
	q->masked = true;
	if (q->net)
		q->net->delivered[rx] = true;
	q->responses_since_event = 0;
	return 1;
}

static void unmask(struct pvf_queue *q)
{
	int rc = q->net ? pvf_netq_unmask(q) : q->port.ops->unmask(&q->port);

	if (rc)
		port_failed(q, -rc, "the event channel cannot be unmasked");
	q->masked = q->delayed = false;
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

/* With a recent `blk->now`: in a guest, reading the clock may be a system call. */
static void drain(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	uint32_t n = pvf_ring_poll(&blk->ring, &blk->fault);

	if (n)
		n = pvf_blk_drain(blk, n);
	if (blk->fault.rule) {
		pvf_queue_broken(q);
		return;
	}
	if (!n)
		return;
	if (q->poll_until)
		blk->stats.polled++;
	q->soon = blk->now - q->progress_at <= blk->geo.poll_us * PVF_US;
	q->poll_until = 0;
	pvf_queue_progress(q, n);
	if (blk->features_off & ~q->features_noted)
		q->notes |= PVF_NOTE_FEATURE_OFF;
	q->features_noted |= blk->features_off;
}

/* Responses that nobody has taken. */
static uint32_t waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	if (q->cons)
		return pvf_consq_waiting(q, fault);
	return q->net ? pvf_netq_waiting(q, fault) : pvf_ring_poll(&q->blk.ring, fault);
}

/* How far they were taken. */
static uint32_t taken(const struct pvf_queue *q)
{
	if (q->cons)
		return q->cons->ring.in_cons + q->cons->ring.out_cons;
	return q->net ? pvf_netq_taken(q) : q->blk.ring.rsp_cons;
}

static void watchdog(struct pvf_queue *q)
{
	bool disk = !q->net && !q->cons;
	struct pvf_blk *blk = &q->blk;
	struct pvf_fault fault = {0};

	q->watching = false;
	if (!q->attached || q->stopped)
		return;
	if (!q->masked)
		take_event(q, false); /* it may just not have had its turn */
	if (!q->masked && !q->stopped && q->net && q->net->split)
		take_event(q, true);
	if (q->stopped)
		return;
	uint64_t now = pvf_now_ns();

	blk->now = now;
	if (q->net && !q->delayed)
		pvf_netq_answers(q);
	if (q->stopped)
		return;
	uint64_t silent = now - q->progress_at;

	if (!pvf_queue_in_flight(q) && disk) {
		if (now < q->patience) {
			q->watching = true;
			pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
		}
		return;
	}
	if (disk && (q->delayed || q->polling)) {
		drain(q);
	} else if (!q->masked && waiting(q, &fault) && !fault.rule) {
		uint32_t at = taken(q);

		if (q->unseen && q->unseen_at == at) {
			blk->stats.watchdog_hits++;
			if (disk)
				drain(q);
			else
				q->masked = true; /* as if the event had come */
			q->again = true;
		} else {
			q->unseen = true;
			q->unseen_at = at;
		}
	}
	if (fault.rule) {
		blk->fault = fault;
		pvf_queue_broken(q);
	}
	if (q->stopped)
		return;
	if (disk)
		q->oldest = oldest_request(blk);
	if (blk->geo.stall_seconds && !q->stalled && silent >= blk->geo.stall_seconds * PVF_SECOND &&
	    pvf_queue_in_flight(q)) {
		q->stalled = true;
		q->stall_for = (uint32_t)(silent / PVF_SECOND);
		q->notes |= PVF_NOTE_STALL;
	}
	q->watching = true;
	/* A network's ring is never without requests, and a console's backend may always have something to say: they
	 * are looked at for ever, but seldom while it is quiet. */
	bool quiet = !disk && !pvf_queue_in_flight(q) && !q->unseen && silent > QUIET && now >= q->patience;

	pvf_arm(q->watchdog_timer, quiet ? QUIET : PVF_WATCHDOG_TICK);
}

static bool timer_fired(int timer)
{
	uint64_t times;

	return read(timer, &times, sizeof(times)) == sizeof(times);
}

static void lose(struct pvf_queue *q, int error, const char *why)
{
	if (q->target.gone)
		return;
	q->target.gone = true;
	q->target.error = error;
	q->target.why = why;
}

/* What a peer leaves unread when it hangs up, it sends again on another socket, if it has one. */
static void check_end(struct pvf_queue *q)
{
	if (q->queues > 1 && q->target.ended)
		lose(q, 0, "the client closed the NBD socket");
}

static void take_socket(struct pvf_queue *q, uint32_t events)
{
	struct pvf_target *t = &q->target;

	if (t->fd < 0)
		return;
	pvf_target_event(t, events);
	if (q->queues != 1 && t->rx_ready && !q->unread.since)
		q->unread.since = pvf_now_ns();
	check_end(q);
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
	case PVF_TAG_EVENT_RX:
		if (q->attached && !q->stopped && q->net->split)
			take_event(q, true);
		break;
	case PVF_TAG_TARGET:
		if (data != q->target.tag)
			break;
		if (q->net)
			q->net->tap_ready = true;
		else if (!q->cons)
			take_socket(q, events);
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

static bool take_requests(struct pvf_queue *q)
{
	struct pvf_target *t = &q->target;

	if (q->source_ops)
		return q->source_ops->intake(q->source, &q->blk, q->no_new);
	check_end(q);
	switch (pvf_fence_look(q->fence, q->queues, q->blk.now)) {
	case PVF_FENCE_OVERDUE:
		lose(q, ETIMEDOUT, "a request has waited for so long that it may be sent again");
		return false;
	case PVF_FENCE_CLOSED:
		return false;
	case PVF_FENCE_OPEN:
		break;
	}
	bool more = pvf_target_receive(t, &q->blk, q->no_new);

	if (q->queues > 1) {
		q->unread.received += t->turn;
		pvf_unread_update(&q->unread, t->fd, q->blk.now, !t->rx_ready,
				  t->ahead_end - t->ahead_at);
	}
	return more;
}

static void check_source(struct pvf_queue *q)
{
	const char *why;
	int error;

	if (q->source_ops && q->source_ops->ended && q->source_ops->ended(q->source, &error, &why))
		lose(q, error, why);
}

static bool give_answers(struct pvf_queue *q)
{
	if (!q->source_ops)
		return pvf_target_send(&q->target, &q->blk);
	bool more = q->source_ops->deliver(q->source, &q->blk);

	check_source(q);
	return more;
}

/* The socket stays open until the worker closes it: no other queue receives any more by then. */
static void target_ended(struct pvf_queue *q)
{
	q->lost = true;
	q->again = false;
	pvf_fence_close(q->fence);
	q->serving = false;
	q->no_new = true;
	q->notes |= PVF_NOTE_TARGET_GONE;
}

static void serve_ring(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	if (q->net)
		return pvf_netq_serve(q);
	if (q->cons)
		return pvf_consq_serve(q);
	q->again = false;
	if (!q->attached || q->stopped)
		return;
	blk->now = pvf_now_ns();
	if ((q->masked && !q->delayed) || q->polling)
		drain(q);
	if (q->stopped)
		return;
	if (pvf_queue_has_target(q) && q->serving)
		q->again |= take_requests(q);
	/* The backend has its work before the client has its answers: they go on side by side. */
	if (pvf_ring_push(&blk->ring))
		pvf_queue_notify(q, &q->port);
	if (pvf_queue_has_target(q))
		q->again |= give_answers(q);
	pvf_queue_watch(q, blk->in_flight);
	if (q->soon && q->threaded)
		q->polling = true;
	if (q->stopped || !q->masked || q->delayed || q->polling)
		return;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		q->again = true;
	else if (blk->fault.rule)
		pvf_queue_broken(q);
	else
		pvf_queue_finish_event(q);
}

/* True: no request is in the ring, and none can come there without the client doing something. */
static bool is_drained(const struct pvf_queue *q)
{
	const struct pvf_blk *blk = &q->blk;
	const struct pvf_target *t = &q->target;

	if (q->net)
		return pvf_netq_drained(q);
	if (q->cons)
		return pvf_consq_drained(q);
	if (pvf_queue_in_flight(q))
		return false;
	if (q->source_ops)
		return t->gone || (blk->current == PVF_NONE && !blk->flush_count && !blk->reply_count);
	if (t->fd < 0)
		return true;
	if (t->gone) /* until the worker has closed it */
		return false;
	if (blk->flush_count || (blk->reply_count && t->tx_ready))
		return false;
	if (blk->current == PVF_NONE && !blk->skip)
		return true;
	return (!t->rx_ready || !t->tx_ready) && pvf_now_ns() >= q->patience;
}

static void show_fence(struct pvf_queue *q)
{
	uint64_t since = q->oldest;

	if (q->queues < 2)
		return;
	if (q->unread.since && (!since || q->unread.since < since))
		since = q->unread.since;
	pvf_fence_show(q->fence, q->index, since);
}

/* Wakes the worker for what is newly noted. */
static void tell(struct pvf_queue *q)
{
	if (q->notes & ~q->notes_told)
		pvf_signal(q->notes_fd);
	q->notes_told = q->notes;
}

void pvf_queue_service(struct pvf_queue *q)
{
	serve_ring(q);
	if (!q->attached || !q->serving) { /* the kernel is heard all the same */
		pvf_uring_turn(&q->ublk.uring, &q->ublk.ublk);
		check_source(q);
	}
	if (q->target.gone && !q->lost && !q->stopped && (q->source_ops || q->target.fd >= 0))
		target_ended(q);
	if (q->attached && q->no_new && !q->drained && !q->stopped && is_drained(q)) {
		/* It stays so: nothing is received any more. */
		q->drained = true;
		q->serving = q->again = false;
		q->notes |= PVF_NOTE_DRAINED;
	}
	show_fence(q);
	tell(q);
}

bool pvf_queue_arm(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	if (!q->polling || !q->attached || q->stopped)
		return false;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		return true;
	if (blk->fault.rule) {
		pvf_queue_broken(q);
		tell(q);
		return false;
	}
	q->polling = false;
	if (q->masked && !q->delayed)
		pvf_queue_finish_event(q);
	return false;
}

#define LOOKS 8 /* at the ring, between two at everything else */

bool pvf_queue_linger(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	bool again = false;

	pvf_queue_lock(q);
	for (int i = 0; i < LOOKS && q->polling && q->attached && !q->stopped && blk->in_flight; i++) {
		uint64_t now = pvf_now_ns();

		if (!q->poll_until)
			q->poll_until = now + blk->geo.poll_us * PVF_US;
		again = true;
		if (pvf_ring_changed(&blk->ring))
			break;
		if (now >= q->poll_until || !q->soon) {
			q->poll_until = 0;
			q->soon = false;
			again = pvf_queue_arm(q);
			break;
		}
		pvf_queue_unlock(q);
		sched_yield();
		pvf_queue_lock(q);
	}
	pvf_queue_unlock(q);
	return again;
}

/* Whether somebody wakes us who has more to send. A network's queue gives way otherwise (queue_net.c). */
static bool client_calls(const struct pvf_queue *q, const struct epoll_event *events, int n)
{
	for (int i = 0; i < n && !q->net; i++) {
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
	bool again = q->again, owes = q->net && q->net->owes;

	if (owes)
		q->net->owes = false;
	pvf_queue_unlock(q);
	if (owes)
		sched_yield();
	return again;
}
