/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A ring and its thread: take, do or hold, answer, sleep. blkback.h has the theory.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "blkback_int.h"

#define WINDOW_US 2000

uint64_t bb_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Responses */

void bb_notify(struct bb_ring *r)
{
	ADD(r->stats.notifies, 1);
	pvf_channel_notify(r->channel, r->side, r->other_fd);
}

static void publish(struct bb_ring *r, int32_t off, bool silent)
{
	struct blkif_sring *shared = r->ring.sring;
	RING_IDX old = r->published, new = r->ring.rsp_prod_pvt + (RING_IDX)off;

	if (!off && r->ring.rsp_prod_pvt == r->pushed)
		return;
	r->pushed = r->ring.rsp_prod_pvt;
	/* RING_PUSH_RESPONSES_AND_CHECK_NOTIFY: rsp_event is read after rsp_prod is seen. */
	__atomic_store_n(&shared->rsp_prod, new, __ATOMIC_SEQ_CST);
	r->published = new;
	ADD(r->stats.pushes, 1);
	RING_IDX event = __atomic_load_n(&shared->rsp_event, __ATOMIC_SEQ_CST);

	if (!silent && (off || (RING_IDX)(new - event) < (RING_IDX)(new - old)))
		bb_notify(r);
}

static void respond(struct bb_ring *r, uint64_t id, uint8_t op, int16_t status)
{
	struct blkif_response *rsp = RING_GET_RESPONSE(&r->ring, r->ring.rsp_prod_pvt);

	r->ring.rsp_prod_pvt++;
	rsp->id = id;
	rsp->operation = op;
	rsp->status = status;
	ADD(r->stats.responses, 1);
}

/* The end of a request: do it, answer it, forget it. */
static void finish(struct bb_ring *r, struct bb_request *q)
{
	const struct pvf_bb_rule *fail = bb_action(q, PVF_BB_FAIL), *brief = bb_action(q, PVF_BB_SHORT);
	const struct pvf_bb_rule *drop = bb_action(q, PVF_BB_DROP), *a;
	const struct pvf_bb_rule *pages = bb_action(q, PVF_BB_PAGES);
	const struct pvf_bb_rule *slots = bb_action(q, PVF_BB_SLOTS);
	const struct pvf_bb_rule *producer = bb_action(q, PVF_BB_PRODUCER);
	const struct pvf_bb_rule *lost = bb_action(q, PVF_BB_LOST_EVENT);
	bool late = pages && pages->mode == PVF_BB_AFTER;
	int16_t status = q->status;
	uint64_t id = q->id;
	uint8_t op = q->op;

	if (fail)
		status = (int16_t)fail->value;
	else if (status == BLKIF_RSP_OKAY && !(drop && !drop->mode))
		status = bb_execute(r, q, brief ? brief->value : UINT64_MAX);
	if (status == BLKIF_RSP_EOPNOTSUPP)
		ADD(r->stats.unsupported, 1);
	else if (status != BLKIF_RSP_OKAY)
		ADD(r->stats.rejected, 1);
	if ((a = bb_action(q, PVF_BB_OUTSIDE)))
		bb_write_outside(r, q, a);
	if (pages && pages->mode == PVF_BB_BEFORE)
		bb_rewrite_pages(r, q, pages);
	/* The frontend may end its grants as soon as it sees the response. */
	if (!late)
		bb_unmap_all(r, q);
	if (!drop) {
		bool alone = slots || producer || lost;
		RING_IDX first;

		if ((a = bb_action(q, PVF_BB_CORRUPT)))
			bb_corrupt(r, a, &id, &op, &status);
		if (alone)
			publish(r, 0, false);
		first = r->ring.rsp_prod_pvt;
		respond(r, id, op, status);
		a = bb_action(q, PVF_BB_DUPLICATE);
		for (uint64_t i = 0; a && i < a->value; i++, r->unasked++)
			respond(r, id, op, status);
		if (slots && slots->mode == PVF_BB_BEFORE)
			bb_rewrite_slots(r, first, r->ring.rsp_prod_pvt, slots);
		if (alone || late ||
		    r->ring.rsp_prod_pvt - r->published >= LOAD(r->bb->features.batch))
			publish(r, producer ? (int32_t)producer->value : 0, lost);
		if (slots && slots->mode == PVF_BB_AFTER)
			bb_rewrite_slots(r, first, r->ring.rsp_prod_pvt, slots);
		r->last_id = q->id;
		r->answered = true;
	}
	if (late) {
		bb_rewrite_pages(r, q, pages);
		bb_unmap_all(r, q);
	}
	if (q->op == BLKIF_OP_WRITE_BARRIER)
		r->barrier = false;
	r->idle[r->idle_count++] = (uint16_t)(q - r->request);
}

static void hold(struct bb_ring *r, struct bb_request *q, enum bb_held how, uint64_t due)
{
	q->held = (uint8_t)how;
	q->due = due;
	r->held[r->held_count++] = (uint16_t)(q - r->request);
	STORE(r->stats.in_flight, r->held_count);
}

static void take(struct bb_ring *r, const struct blkif_request *req)
{
	struct bb_request *q = &r->request[r->idle[--r->idle_count]];
	const struct pvf_bb_rule *a;

	ADD(r->stats.requests, 1);
	q->status = bb_parse(r, q, req);
	q->actions = bb_rules_match(&r->bb->rules, q->op, q->sector, q->sectors, q->action);
	if (q->status == BLKIF_RSP_OKAY)
		q->status = bb_map_all(r, q);
	if (q->op == BLKIF_OP_WRITE_BARRIER)
		r->barrier = true;
	if (q->actions) {
		if ((a = bb_action(q, PVF_BB_DIE)))
			_exit((int)a->value);
		if ((a = bb_action(q, PVF_BB_LOOK)) && q->status == BLKIF_RSP_OKAY)
			bb_look(r, q, a->value);
		if (bb_action(q, PVF_BB_STALL)) {
			hold(r, q, BB_STALLED, BB_NEVER);
			return;
		}
		if ((a = bb_action(q, PVF_BB_DELAY))) {
			uint64_t span = a->extra - a->value + 1;
			uint64_t us = a->value + (span > 1 ? bb_rules_draw(&r->bb->rules) % span : 0);

			hold(r, q, BB_DELAYED, bb_now() + us);
			return;
		}
		if ((a = bb_action(q, PVF_BB_REORDER))) {
			hold(r, q, BB_WINDOW, bb_now() + (a->extra ? a->extra : WINDOW_US));
			return;
		}
	}
	finish(r, q);
}

/* Takes what is in the ring. Returns the number of requests taken. */
static uint32_t work(struct bb_ring *r)
{
	struct blkif_sring *shared = r->ring.sring;
	uint32_t taken = 0;

	r->more = false;
	for (;;) {
		RING_IDX prod = __atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST);

		/* RING_REQUEST_PROD_OVERFLOW, without the responses that nobody asked for; and, as
		 * requests may be held, an index that moved back behind what was taken */
		if (prod - (r->ring.rsp_prod_pvt - r->unasked) > RING_SIZE(&r->ring) ||
		    prod - r->ring.req_cons > RING_SIZE(&r->ring)) {
			r->halted = true;
			ADD(r->stats.bogus, 1);
			return taken;
		}
		if (prod == r->ring.req_cons) {
			/* RING_FINAL_CHECK_FOR_REQUESTS */
			__atomic_store_n(&shared->req_event, prod + 1, __ATOMIC_SEQ_CST);
			if (__atomic_load_n(&shared->req_prod, __ATOMIC_SEQ_CST) == prod)
				return taken;
			continue;
		}
		while (r->ring.req_cons != prod) {
			struct blkif_request req;

			if (LOAD(r->conn->stop))
				return taken;
			memcpy(&req, RING_GET_REQUEST(&r->ring, r->ring.req_cons), sizeof(req));
			__asm__ volatile("" ::: "memory"); /* nothing is read there again */
			if (!r->idle_count || r->barrier ||
			    (req.operation == BLKIF_OP_WRITE_BARRIER && r->held_count)) {
				r->more = true;
				return taken;
			}
			r->ring.req_cons++;
			take(r, &req);
			taken++;
		}
		publish(r, 0, false);
	}
}

/* Held requests */

static void shuffle(struct bb_ring *r, uint16_t *index, uint32_t count)
{
	for (uint32_t i = count; i > 1; i--) {
		uint32_t j = (uint32_t)(bb_rules_draw(&r->bb->rules) % i);
		uint16_t t = index[i - 1];

		index[i - 1] = index[j];
		index[j] = t;
	}
}

/* Finishes what is due: how many. `*next`: when to come again. */
static uint32_t timers(struct bb_ring *r, uint64_t *next)
{
	uint32_t released = __atomic_load_n(&r->bb->released, __ATOMIC_ACQUIRE);
	uint64_t now;
	uint16_t due[BB_SLOTS];
	uint32_t count = 0, kept = 0, window = 0, window_size = 0;
	bool all = released != r->released, open = false;

	r->released = released;
	*next = BB_NEVER;
	if (!r->held_count)
		return 0;
	now = bb_now();
	for (uint32_t i = 0; i < r->held_count; i++) {
		struct bb_request *q = &r->request[r->held[i]];

		if (q->held != BB_WINDOW)
			continue;
		window_size = (uint32_t)bb_action(q, PVF_BB_REORDER)->value;
		open |= ++window >= window_size || q->due <= now;
	}
	for (uint32_t i = 0; i < r->held_count; i++) {
		struct bb_request *q = &r->request[r->held[i]];

		if (all || q->due <= now || (q->held == BB_WINDOW && open)) {
			due[count++] = r->held[i];
		} else {
			r->held[kept++] = r->held[i];
			*next = q->due < *next ? q->due : *next;
		}
	}
	r->held_count = kept;
	if (open)
		shuffle(r, due, count);
	for (uint32_t i = 0; i < count; i++)
		finish(r, &r->request[due[i]]);
	STORE(r->stats.in_flight, kept);
	return count;
}

static void abandon(struct bb_ring *r)
{
	for (uint32_t i = 0; i < r->held_count; i++)
		bb_unmap_all(r, &r->request[r->held[i]]);
	r->held_count = 0;
	STORE(r->stats.in_flight, 0);
}

/* The thread */

/* Answers pvf_bb_disconnect(). */
static void say(struct bb_ring *r, bool ended)
{
	struct pvf_bb_conn *conn = r->conn;

	pthread_mutex_lock(&conn->lock);
	r->ended = ended;
	if (r->busy != conn->asked || ended) {
		r->busy = conn->asked;
		pthread_cond_broadcast(&conn->changed);
	}
	pthread_mutex_unlock(&conn->lock);
}

static int watch(const struct bb_ring *r, int fd, uint32_t how)
{
	struct epoll_event event = {.events = EPOLLIN | how, .data.fd = fd};

	return epoll_ctl(r->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

/* The event channel is watched edge-triggered: nothing is read from it. */
static void sleep_until(struct bb_ring *r, uint64_t when)
{
	struct pollfd ready = {.fd = r->epoll_fd, .events = POLLIN};
	struct epoll_event events[2];
	uint64_t count, now = when && when != BB_NEVER ? bb_now() : 0;

	if (when != BB_NEVER && when > now) { /* epoll counts milliseconds */
		struct timespec pause = {.tv_sec = (time_t)((when - now) / 1000000),
					 .tv_nsec = (long)((when - now) % 1000000 * 1000)};

		ppoll(&ready, 1, &pause, NULL);
	}
	int n = epoll_wait(r->epoll_fd, events, 2, when == BB_NEVER ? -1 : 0);

	for (int i = 0; i < n; i++)
		if (events[i].data.fd == r->ctl_fd && read(r->ctl_fd, &count, sizeof(count)) < 0)
			count = 0; /* somebody else's read: nothing depends on it */
}

static void *ring_main(void *arg)
{
	struct bb_ring *r = arg;
	bool delivered = false, look_there = true; /* a new port has an event */

	for (;;) {
		bool stop = __atomic_load_n(&r->conn->stop, __ATOMIC_ACQUIRE);
		uint64_t next, other;

		if (stop && LOAD(r->conn->abandon))
			abandon(r);
		if (stop && !r->held_count)
			break;
		if (stop)
			say(r, false);
		if (look_there && !stop && !r->halted && !work(r) && delivered)
			ADD(r->stats.spurious, 1);
		if (delivered && !stop && !r->halted)
			pvf_channel_unmask(r->channel, r->side, r->own_fd);
		/* What was left in the ring waits for an end of something held, and for nothing else. */
		look_there = timers(r, &next) && r->more && !stop;
		other = bb_idle_faults(r);
		next = other < next ? other : next;
		publish(r, 0, false);
		sleep_until(r, look_there ? 0 : next);
		delivered = !stop && !r->halted &&
			    pvf_channel_take(r->channel, r->side, -1);
		if (delivered)
			ADD(r->stats.wakeups, 1);
		look_there |= delivered;
	}
	publish(r, 0, false);
	say(r, true);
	return NULL;
}

struct bb_ring *bb_ring_new(struct pvf_bb_conn *conn)
{
	struct bb_ring *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	*r = (struct bb_ring){.conn = conn, .bb = conn->bb, .own_fd = -1, .other_fd = -1,
			      .ctl_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC),
			      .epoll_fd = epoll_create1(EPOLL_CLOEXEC)};
	r->request = calloc(BB_SLOTS, sizeof(*r->request));
	r->segments = calloc((size_t)BB_SLOTS * PVF_BB_SEGMENTS, sizeof(*r->segments));
	r->kept = calloc(PVF_GRANTS, sizeof(*r->kept));
	r->kept_ref = calloc(PVF_GRANTS, sizeof(*r->kept_ref));
	if (r->ctl_fd < 0 || r->epoll_fd < 0 || !r->request || !r->segments || !r->kept || !r->kept_ref) {
		bb_ring_free(r);
		return NULL;
	}
	r->released = __atomic_load_n(&r->bb->released, __ATOMIC_ACQUIRE);
	return r;
}

bool bb_ring_in_order(const struct bb_ring *r)
{
	return !r->halted && !r->held_count && !r->unasked &&
	       r->ring.req_cons == r->ring.rsp_prod_pvt && r->published == r->ring.rsp_prod_pvt;
}

void bb_ring_free(struct bb_ring *r)
{
	struct pvf_bb_conn *conn = r->conn;

	for (uint32_t i = 0; i < r->kept_count; i++)
		pvf_peer_unmap(&conn->peer, r->kept_ref[i]);
	if (r->shared)
		pvf_mapper_unmap(&conn->peer.mapper, r->refs, r->pages, r->shared);
	if (r->channel)
		pvf_channel_unmap(r->channel);
	int fds[] = {r->epoll_fd, r->own_fd, r->other_fd, r->ctl_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	free(r->request);
	free(r->segments);
	free(r->kept);
	free(r->kept_ref);
	free(r);
}

void bb_ring_kick(struct bb_ring *r)
{
	const uint64_t one = 1;

	if (write(r->ctl_fd, &one, sizeof(one)) < 0)
		return; /* full: it is awake */
}

int bb_ring_start(struct bb_ring *r)
{
	uint32_t slots = RING_SIZE(&r->ring);
	int rc;

	for (uint32_t i = 0; i < slots; i++) {
		r->request[i].segment = &r->segments[(size_t)i * PVF_BB_SEGMENTS];
		r->idle[r->idle_count++] = (uint16_t)(slots - 1 - i);
	}
	rc = watch(r, r->ctl_fd, 0);
	if (!rc)
		rc = watch(r, r->own_fd, EPOLLET);
	if (rc)
		return rc;
	rc = -pthread_create(&r->thread, NULL, ring_main, r);
	r->started = !rc;
	return rc;
}
