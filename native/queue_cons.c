/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A console's queue: a stream socket on one side, the ring of two byte streams on the other. queue.h has the theory
 * of what all classes share; cons.h that of the ring.
 *
 *   Both ways go on as far as the other side takes bytes, and wait there: what the socket does not take stays in the
 *   ring, what the ring has no room for stays in the socket. A backend that reads nothing is no trouble of ours: it is
 *   said (STALLED), and nothing is thrown away.
 *
 *   The socket's end is no trouble either: the supervisor that had the other end has died. The ring stays as it is,
 *   and the next supervisor brings another socket (START_CONS).
 *
 *   QUIESCE stops reading the socket. The queue is drained when the backend has taken every byte; one that does not
 *   within the supervisor's patience loses none: they are the first in the next ring.
 */
#include "queue_int.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cons.h"
#include "stats.h"

#define TURN 8u /* full rings either way in a turn: a bounded amount (rule 8) */

struct consq { /* what it has instead of a disk's */
	struct pvf_cons ring; /* over all connections */
	int fd;               /* the stream socket; -1: none */
	bool ended;           /* its other end is gone */
	uint64_t in_bytes, out_bytes, full, blocked;
};

int pvf_queue_cons(struct pvf_queue *q)
{
	struct consq *c = q->own = calloc(1, sizeof(*c));

	if (!c)
		return -ENOMEM;
	q->ops = &pvf_consq_ops;
	c->fd = -1;
	return 0;
}

static void attach(struct pvf_queue *q, const struct pvf_ctl_attach *a)
{
	(void)a;
	pvf_cons_attach(&((struct consq *)q->own)->ring, q->port.ring);
}

void pvf_queue_start_cons(struct pvf_queue *q, uint32_t stall_seconds)
{
	pvf_queue_expect(q, stall_seconds);
}

static uint32_t in_flight(const struct pvf_queue *q)
{
	return pvf_cons_unsent(&((const struct consq *)q->own)->ring);
}

static bool drained(const struct pvf_queue *q)
{
	return !in_flight(q);
}

static void drop_target(struct pvf_queue *q)
{
	pvf_queue_close_target(q, &((struct consq *)q->own)->fd);
}

static bool has_target(const struct pvf_queue *q)
{
	return ((const struct consq *)q->own)->fd >= 0;
}

static int take_target(struct pvf_queue *q, int fd, const char **why)
{
	drop_target(q);
	*why = "the stream cannot be watched";
	int rc = pvf_queue_watch_target(q, fd, EPOLLIN | EPOLLOUT);

	if (!rc)
		((struct consq *)q->own)->fd = fd;
	return rc;
}

static void detach(struct pvf_queue *q, bool keep)
{
	if (!keep)
		drop_target(q);
	if (q->attached)
		pvf_cons_detach(&((struct consq *)q->own)->ring);
}

/* Service */

/* The socket's other end takes what came. True: some of it. */
static bool deliver(struct consq *c)
{
	const unsigned char *data;
	struct iovec iov = {.iov_len = pvf_cons_came(&c->ring, &data)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (!iov.iov_len)
		return false;
	iov.iov_base = (void *)(uintptr_t)data;
	ssize_t sent = sendmsg(c->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (sent < 0) {
		c->blocked += errno == EAGAIN;
		c->ended = c->ended || (errno != EAGAIN && errno != EINTR);
		return false;
	}
	pvf_cons_passed(&c->ring, (uint32_t)sent);
	c->in_bytes += (uint64_t)sent;
	return true;
}

/* The ring takes what the socket has. True: some of it. */
static bool take(struct consq *c)
{
	unsigned char data[PVF_CONS_OUT];
	struct iovec iov = {data, pvf_cons_room(&c->ring)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (!iov.iov_len) {
		c->full++;
		return false;
	}
	ssize_t got = recvmsg(c->fd, &msg, MSG_DONTWAIT);

	if (got <= 0) {
		c->ended = c->ended || !got || (errno != EAGAIN && errno != EINTR);
		return false;
	}
	pvf_cons_put(&c->ring, data, (uint32_t)got);
	c->out_bytes += (uint64_t)got;
	return true;
}

static void serve(struct pvf_queue *q)
{
	struct consq *c = q->own;
	bool news = false, more = true;

	/* Before START nothing is taken: there is no one to give it to. */
	if (!q->attached || q->stopped || c->fd < 0 || q->delayed)
		return;
	/* The watchdog waits whether an event comes for what it has seen. */
	if (q->unseen && !q->masked)
		return;
	q->blk.now = pvf_coarse_ns();
	for (uint32_t i = 0; i < TURN && more; i++) {
		uint32_t was = c->ring.in_cons, moved = pvf_cons_look(&c->ring);

		if (!pvf_queue_check(q, &c->ring.fault))
			return;
		if (moved)
			pvf_queue_progress(q, moved);
		more = deliver(c);
		if (q->serving && !q->no_new)
			more |= take(c);
		if (c->ended) {
			drop_target(q);
			c->ended = more = false;
		}
		news |= more || was != c->ring.in_cons;
	}
	q->again = more;
	/* Also for bytes that were taken: it may have waited for the room. */
	if (news)
		pvf_queue_notify(q, &q->port);
	pvf_queue_watch(q, pvf_cons_unsent(&c->ring));
	if (!q->stopped && q->masked && !q->again)
		pvf_queue_finish_event(q);
}

static uint32_t waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	return pvf_cons_waiting(&((struct consq *)q->own)->ring, fault);
}

static uint32_t taken(const struct pvf_queue *q)
{
	const struct consq *c = q->own;

	return c->ring.in_cons + c->ring.out_cons;
}

static void publish(struct pvf_queue *q)
{
	const struct consq *c = q->own;
	const struct pvf_blk_stats *shared = &q->blk.stats;
	const unsigned char *data;
	struct pvf_cons_stats s = {
		.state = q->state,
		.generation = q->generation,
		.unsent = pvf_cons_unsent(&c->ring),
		.undelivered = pvf_cons_came(&c->ring, &data),
		.queue = q->index,
		.queues = q->queues,
		.in_bytes = c->in_bytes,
		.out_bytes = c->out_bytes,
		.notifies = shared->notifies,
		.events = shared->events,
		.events_spurious = shared->events_spurious,
		.watchdog_hits = shared->watchdog_hits,
		.wakeups = shared->wakeups,
		.ring_full = c->full,
		.target_blocked = c->blocked,
	};

	pvf_stats_publish(q->page, &s, sizeof(s));
}

const struct pvf_queue_ops pvf_consq_ops = {
	.attach = attach,
	.detach = detach,
	.in_flight = in_flight,
	.take_target = take_target,
	.drop_target = drop_target,
	.has_target = has_target,
	.serve = serve,
	.drained = drained,
	.waiting = waiting,
	.taken = taken,
	.publish = publish,
};
