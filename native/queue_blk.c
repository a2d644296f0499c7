/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A disk's queue: requests of an NBD socket, or of another source, on one side, the ring on the other. queue.h has
 * the theory of what all classes share.
 */
#include "queue_int.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>

#include "image.h"
#include "stats.h"

/* The connection */

static void attach(struct pvf_queue *q, const struct pvf_ctl_attach *a)
{
	pvf_blk_attach(&q->blk, q->port.ring, q->port.ring_bytes, q->port.pool, a->pool_pages,
		       a->pool_grefs, a->flags & PVF_ATTACH_SCRUB);
}

static void quarantine(struct pvf_queue *q)
{
	q->blk.pool.quarantined = true;
}

void pvf_queue_start(struct pvf_queue *q, const struct pvf_geometry *geo)
{
	q->blk.now = pvf_now_ns();
	pvf_blk_start(&q->blk, geo);
	/* A kept socket that was hung up meanwhile: no queue may receive before this one has looked. */
	if (q->queues > 1 && q->target.fd >= 0 && q->target.ended)
		pvf_fence_close(q->fence);
}

static uint32_t in_flight(const struct pvf_queue *q)
{
	return q->blk.in_flight;
}

/* The target */

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

static void drop_target(struct pvf_queue *q)
{
	close_target(q);
	forget_target(q);
	q->notes &= ~(uint32_t)PVF_NOTE_TARGET_GONE;
}

static bool has_target(const struct pvf_queue *q)
{
	return q->source_ops ? !q->target.gone : q->target.fd >= 0;
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

static int take_target(struct pvf_queue *q, int fd, const char **why)
{
	struct stat st;

	drop_target(q);
	if (!fstat(fd, &st) && S_ISCHR(st.st_mode))
		return take_ublk(q, fd, why);
	*why = "the NBD socket cannot be watched";
	int rc = pvf_target_open(&q->target, fd, q->epoll_fd, pvf_queue_next_tag(q));

	q->target.several = q->queues > 1;
	return rc;
}

static void detach(struct pvf_queue *q, bool keep)
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
	pvf_blk_detach(&q->blk);
	pvf_fence_show(q->fence, q->index, q->unread.since);
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

static void target_event(struct pvf_queue *q, uint32_t events)
{
	struct pvf_target *t = &q->target;

	if (t->fd < 0)
		return;
	pvf_target_event(t, events);
	if (q->queues != 1 && t->rx_ready && !q->unread.since)
		q->unread.since = pvf_now_ns();
	check_end(q);
}

/* Service */

/* With a recent `blk->now`: in a guest, reading the clock may be a system call. */
static void drain(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	uint32_t n = pvf_ring_poll(&blk->ring, &blk->fault);

	if (n)
		n = pvf_blk_drain(blk, n);
	if (!pvf_queue_check(q, &blk->fault) || !n)
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

static void show_fence(struct pvf_queue *q)
{
	uint64_t since = q->oldest;

	if (q->queues < 2)
		return;
	if (q->unread.since && (!since || q->unread.since < since))
		since = q->unread.since;
	pvf_fence_show(q->fence, q->index, since);
}

static void serve_ring(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	if (!q->attached || q->stopped)
		return;
	blk->now = pvf_now_ns();
	if ((q->masked && !q->delayed) || q->polling)
		drain(q);
	if (q->stopped)
		return;
	if (has_target(q) && q->serving)
		q->again |= take_requests(q);
	/* The backend has its work before the client has its answers: they go on side by side. */
	if (pvf_ring_push(&blk->ring))
		pvf_queue_notify(q, &q->port);
	if (has_target(q))
		q->again |= give_answers(q);
	pvf_queue_watch(q, blk->in_flight);
	if (q->soon && q->threaded)
		q->polling = true;
	if (q->stopped || !q->masked || q->delayed || q->polling)
		return;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		q->again = true;
	else if (pvf_queue_check(q, &blk->fault))
		pvf_queue_finish_event(q);
}

static void serve(struct pvf_queue *q)
{
	serve_ring(q);
	if (!q->attached || !q->serving) { /* the kernel is heard all the same */
		pvf_uring_turn(&q->ublk.uring, &q->ublk.ublk);
		check_source(q);
	}
	if (q->target.gone && !q->lost && !q->stopped && (q->source_ops || q->target.fd >= 0))
		target_ended(q);
	show_fence(q);
}

static bool drained(const struct pvf_queue *q)
{
	const struct pvf_blk *blk = &q->blk;
	const struct pvf_target *t = &q->target;

	if (blk->in_flight)
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

bool pvf_queue_arm(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;

	if (!q->polling || !q->attached || q->stopped)
		return false;
	if (pvf_ring_final_check(&blk->ring, &blk->fault))
		return true;
	if (!pvf_queue_check(q, &blk->fault)) {
		pvf_queue_tell(q);
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

/* The watchdog */

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

static void tick(struct pvf_queue *q)
{
	if (q->delayed || q->polling)
		drain(q);
	q->oldest = oldest_request(&q->blk);
}

static uint32_t waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	return pvf_ring_poll(&q->blk.ring, fault);
}

static uint32_t taken(const struct pvf_queue *q)
{
	return q->blk.ring.rsp_cons;
}

static void publish(struct pvf_queue *q)
{
	struct pvf_blk *blk = &q->blk;
	struct pvf_blk_stats *s = &blk->stats;

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

/* To another worker */

static const char *stays(const struct pvf_queue *q)
{
	if (q->source_ops)
		return "its requests do not come from an NBD socket: it cannot be handed over";
	if (q->target.gone || q->lost || q->blk.stream_error ||
	    q->notes & (PVF_NOTE_BROKEN | PVF_NOTE_TARGET_GONE))
		return "its NBD socket has just ended";
	return NULL;
}

static uint32_t save(const struct pvf_queue *q, struct pvf_image_queue *to, int *fds)
{
	const struct pvf_target *t = &q->target;

	memcpy(&to->blk, &q->blk, sizeof(to->blk));
	to->target = t->fd >= 0;
	if (!to->target)
		return 0;
	to->disc = t->disc;
	to->starved = t->starved;
	to->bulky = t->bulky;
	to->ended = t->ended;
	to->ahead = t->ahead_end - t->ahead_at;
	memcpy(to->ahead_bytes, t->ahead + t->ahead_at, to->ahead);
	*fds = t->fd;
	return 1;
}

/* The client's socket, with what had been received and not yet parsed. */
static int take_socket(struct pvf_queue *q, const struct pvf_image_queue *from, int *fd,
		       const char **why)
{
	struct pvf_target *t = &q->target;
	uint32_t ahead = from->ahead;

	*why = "more bytes were received ahead than there is room for";
	if (ahead > PVF_TARGET_AHEAD)
		return -EINVAL;
	*why = "the NBD socket cannot be watched";
	int rc = pvf_target_open(t, *fd, q->epoll_fd, pvf_queue_next_tag(q));

	if (rc)
		return rc;
	*fd = -1;
	t->several = q->queues > 1;
	t->disc = from->disc != 0;
	t->starved = from->starved != 0;
	t->bulky = from->bulky != 0;
	t->ended = from->ended != 0;
	memcpy(t->ahead, from->ahead_bytes, ahead);
	t->ahead_end = ahead;
	return 0;
}

static int take_over(struct pvf_queue *q, const struct pvf_image_queue *from, int *fds, uint32_t count,
		     const char **why)
{
	*why = "descriptors of the queue are missing";
	if (count != (from->target != 0))
		return -EINVAL;
	*why = pvf_blk_take_over(&q->blk, &from->blk, q->port.ring, q->port.ring_bytes, q->port.pool,
				 (uint32_t)(q->port.pool_bytes / PVF_PAGE_SIZE));
	if (*why)
		return -EINVAL;
	int rc = count ? take_socket(q, from, fds, why) : 0;

	if (rc)
		pvf_blk_init(&q->blk);
	return rc;
}

const struct pvf_queue_ops pvf_blkq_ops = {
	.requests = true,
	.attach = attach,
	.detach = detach,
	.quarantine = quarantine,
	.in_flight = in_flight,
	.take_target = take_target,
	.drop_target = drop_target,
	.has_target = has_target,
	.target_event = target_event,
	.serve = serve,
	.drained = drained,
	.tick = tick,
	.waiting = waiting,
	.taken = taken,
	.publish = publish,
	.stays = stays,
	.save = save,
	.take_over = take_over,
};
