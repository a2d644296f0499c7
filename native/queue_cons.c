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

#include "stats.h"

#define TURN 8u /* full rings either way in a turn: a bounded amount (rule 8) */

int pvf_queue_cons(struct pvf_queue *q)
{
	q->cons = calloc(1, sizeof(*q->cons));
	if (!q->cons)
		return -ENOMEM;
	q->cons->fd = -1;
	return 0;
}

void pvf_consq_attach(struct pvf_queue *q)
{
	pvf_cons_attach(&q->cons->ring, q->port.ring);
	q->blk.fault = (struct pvf_fault){0};
}

int pvf_consq_target(struct pvf_queue *q, int fd, const char **why)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET,
				    .data.u64 = (uint64_t)++q->sockets << 32 | PVF_TAG_TARGET};

	pvf_consq_drop_target(q);
	*why = "the stream cannot be watched";
	if (epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return -errno;
	q->target.tag = event.data.u64;
	q->cons->fd = fd;
	return 0;
}

void pvf_consq_drop_target(struct pvf_queue *q)
{
	if (q->cons->fd >= 0) {
		/* Another process may have the same open file. */
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->cons->fd, NULL);
		close(q->cons->fd);
	}
	q->cons->fd = -1;
}

/* Service */

static bool check(struct pvf_queue *q)
{
	if (!q->cons->ring.fault.rule)
		return true;
	q->blk.fault = q->cons->ring.fault;
	pvf_queue_broken(q);
	return false;
}

/* The socket's other end takes what came. True: some of it. */
static bool deliver(struct pvf_consq *c)
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
static bool take(struct pvf_consq *c)
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

void pvf_consq_serve(struct pvf_queue *q)
{
	struct pvf_consq *c = q->cons;
	bool news = false, more = true;

	q->again = false;
	/* Before START nothing is taken: there is no one to give it to. */
	if (!q->attached || q->stopped || c->fd < 0 || q->delayed)
		return;
	/* The watchdog waits whether an event comes for what it has seen. */
	if (q->unseen && !q->masked)
		return;
	q->blk.now = pvf_coarse_ns();
	for (uint32_t i = 0; i < TURN && more; i++) {
		uint32_t was = c->ring.in_cons, moved = pvf_cons_look(&c->ring);

		if (!check(q))
			return;
		if (moved)
			pvf_queue_progress(q, moved);
		more = deliver(c);
		if (q->serving && !q->no_new)
			more |= take(c);
		if (c->ended) {
			pvf_consq_drop_target(q);
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

bool pvf_consq_drained(const struct pvf_queue *q)
{
	return !pvf_cons_unsent(&q->cons->ring);
}

uint32_t pvf_consq_waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	return pvf_cons_waiting(&q->cons->ring, fault);
}

void pvf_queue_start_cons(struct pvf_queue *q, uint32_t stall_seconds)
{
	q->blk.geo.stall_seconds = stall_seconds;
	/* The backend may have sent something before we were told that it is connected. */
	q->masked = true;
	q->watching = true;
	pvf_arm(q->watchdog_timer, PVF_WATCHDOG_TICK);
}

void pvf_consq_publish(struct pvf_queue *q)
{
	const struct pvf_consq *c = q->cons;
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
