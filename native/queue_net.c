/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A network's queue: a TAP on one side, a pair of rings on the other. queue.h has the theory of what both
 * classes share; net.h that of packets.
 *
 *   The TAP is watched edge-triggered: `tap_ready` stays set until a read finds nothing. Nothing is read while
 *   the ring has no room for any packet; answers make room, and while packets are unanswered an event comes with
 *   a quarter of the ring at the latest (pvf_net_tx_patience()). Answers that are fewer are taken in the next turn,
 *   whatever it is for, and by the watchdog if there is none.
 *
 *   While packets keep coming, what they are answered with waits: a notify for each would stop us more often than
 *   it brings.
 *
 *   QUIESCE stops the reading; what the backend still sends is received. The queue is drained when every slot
 *   that was sent is answered.
 */
#include "queue_net.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "image.h"
#include "stats.h"

/* Packets of either way in a turn: a bounded amount (rule 8). Less would cost more notifies, each of which is an exit
 * to the hypervisor. */
#define TURN 64u

/* After a turn that passed on several packets: for so long the next ones are waited for by giving way. */
#define PATIENT (20 * PVF_MS)

int pvf_queue_net(struct pvf_queue *q, struct pvf_groups *groups)
{
	struct pvf_netq *n = q->own = calloc(1, sizeof(*n));

	if (!n)
		return -ENOMEM;
	q->ops = &pvf_netq_ops;
	n->tap_fd = -1;
	n->groups = groups;
	if (!q->index)
		groups->wake_fd = q->wake_fd;
	return 0;
}

/* What a queue's ring begins with: a set of the device's that no backend knows, and whose TX pages are these. */
static void attach(struct pvf_queue *q, const struct pvf_ctl_attach *a)
{
	struct pvf_netq *n = q->own;
	unsigned char *ring = q->port.ring, *pool = q->port.pool;
	uint32_t tx = a->tx_pages;

	if (!q->index)
		pvf_groups_untold(n->groups);
	pvf_net_tx_init(&n->tx, ring, pool, tx, a->pool_grefs, a->flags & PVF_ATTACH_SCRUB, 0);
	pvf_net_rx_init(&n->rx, ring + PVF_PAGE_SIZE, pool + (size_t)tx * PVF_PAGE_SIZE, a->pool_pages - tx,
			a->pool_grefs + tx);
	/* The backend looks into the ring when it connects: no event is owed. */
	pvf_net_rx_fill(&n->rx);
	pvf_ring_push(&n->rx.ring);
	n->tx.groups = n->groups;
	pvf_ring_ask(&n->tx.ring, pvf_net_tx_patience(&n->tx), &n->tx.fault);
	pvf_queue_trace(q, n->trace);
}

static void quarantine(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;

	n->tx.pool.quarantined = n->rx.pool.quarantined = true;
}

void pvf_queue_trace(struct pvf_queue *q, struct pvf_trace *trace)
{
	struct pvf_netq *n = q->own;

	n->trace = n->tx.trace = n->rx.trace = trace;
}

void pvf_queue_start_net(struct pvf_queue *q, uint32_t features, uint32_t stall_seconds)
{
	((struct pvf_netq *)q->own)->tx.features = features;
	pvf_queue_expect(q, stall_seconds);
}

static uint32_t in_flight(const struct pvf_queue *q)
{
	return ((const struct pvf_netq *)q->own)->tx.in_flight;
}

/* The counters of a connection go with it, those of the queue stay. */
static void add_way(struct pvf_net_way *sum, const struct pvf_net_way *more)
{
	sum->packets += more->packets;
	sum->bytes += more->bytes;
	sum->slots += more->slots;
	sum->gso += more->gso;
	sum->gso_bytes += more->gso_bytes;
	sum->large += more->large;
	sum->large_bytes += more->large_bytes;
	sum->extras += more->extras;
	sum->cut += more->cut;
	sum->pieces += more->pieces;
	sum->csum_left += more->csum_left;
	sum->csum_done += more->csum_done;
	for (uint32_t i = 0; i < PVF_NET_DROPS; i++)
		sum->dropped[i] += more->dropped[i];
}

static bool drained(const struct pvf_queue *q)
{
	const struct pvf_netq *n = q->own;

	return !n->tx.in_flight && !n->tx.extras && !n->tx.cut.total;
}

static void drop_target(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;

	pvf_queue_close_target(q, &n->tap_fd);
	n->tap_ready = false;
}

static bool has_target(const struct pvf_queue *q)
{
	return ((const struct pvf_netq *)q->own)->tap_fd >= 0;
}

static int take_target(struct pvf_queue *q, int fd, const char **why)
{
	struct pvf_netq *n = q->own;

	drop_target(q);
	*why = "the TAP cannot be made non-blocking";
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK)))
		return -errno;
	*why = "the TAP cannot be watched";
	int rc = pvf_queue_watch_target(q, fd, EPOLLIN);

	if (rc)
		return rc;
	n->tap_fd = fd;
	n->tap_ready = true;
	return 0;
}

static void target_event(struct pvf_queue *q, uint32_t events)
{
	(void)events;
	((struct pvf_netq *)q->own)->tap_ready = true;
}

static void detach(struct pvf_queue *q, bool keep)
{
	struct pvf_netq *n = q->own;

	if (!keep)
		drop_target(q);
	if (!q->attached)
		return;
	add_way(&n->ended.tx, &n->tx.stats);
	add_way(&n->ended.rx, &n->rx.stats);
	n->tx = (struct pvf_net_tx){0};
	n->rx = (struct pvf_net_rx){0};
}

/* Service */

/* Takes those of packets that were sent. */
static void take_answers(struct pvf_queue *q)
{
	struct pvf_net_tx *tx = &((struct pvf_netq *)q->own)->tx;
	uint32_t n = pvf_ring_poll(&tx->ring, &tx->fault);

	if (n)
		pvf_net_tx_drain(tx, n);
	if (!pvf_queue_check(q, &tx->fault) || !n)
		return;
	pvf_queue_progress(q, n);
}

static bool tell_group(void *arg, const uint8_t *mac, bool add)
{
	struct pvf_netq *n = arg;
	bool told = pvf_net_tx_multicast(&n->tx, mac, add);

	n->groups_told += told;
	return told;
}

/* What the backend does not know yet of the device's multicast groups. All of it goes through one ring, in order. */
static void tell_groups(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;

	if (q->index || !(n->tx.features & PVF_NET_MULTICAST) ||
	    !__atomic_load_n(&n->groups->news, __ATOMIC_ACQUIRE))
		return;
	pvf_groups_tell(n->groups, tell_group, n); /* what finds no room: when answers make it */
}

/* Gives the backend new pages, as soon as they are many. */
static void show_room(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;

	if (pvf_net_rx_show(&n->rx))
		pvf_queue_notify(q, pvf_queue_has_second(q) ? &q->second : &q->port);
}

/* Who gets a packet wants to run at once, and is let by the scheduler: two switches for each packet, and its sender
 * waits. A real-time task is not stopped by that, so the packets of a turn wake him once. In between we are as
 * everybody; after a turn that was stopped by its bound others are let go first, or a storm would have it all.
 *
 * Nor do we stop him then (SCHED_BATCH), for as long as packets come by the turn: else the first event of those that
 * come next would, while he still has to read. He goes on until he has, or his time is over; meanwhile more come. */
static bool keep_processor(struct pvf_netq *n)
{
	n->refused = n->refused || sched_setscheduler(0, SCHED_RR, &(struct sched_param){1});
	return !n->refused;
}

static void share_processor(struct pvf_netq *n, bool patient)
{
	sched_setscheduler(0, patient ? SCHED_BATCH : SCHED_OTHER, &(struct sched_param){0});
	n->patient = patient;
}

/* True: stopped by the bound. */
static bool receive(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;
	struct pvf_net_rx *rx = &n->rx;
	uint32_t first = rx->ring.rsp_cons, count = pvf_ring_poll(&rx->ring, &rx->fault);
	bool kept = count > PVF_NET_SLOTS && keep_processor(n); /* more than one packet */

	for (uint32_t i = 0; i < TURN && count && !rx->fault.rule && !q->stopped; i++) {
		if (pvf_net_rx_next(rx, &count, &n->packet)) {
			bool taken = n->tap_fd >= 0 &&
				     writev(n->tap_fd, n->packet.iov, (int)n->packet.iovs) >= 0;

			pvf_net_rx_done(rx, &n->packet, !taken);
		}
		if (rx->fault.rule)
			break;
		show_room(q);
		if (!count && !q->stopped)
			count = pvf_ring_poll(&rx->ring, &rx->fault);
	}
	if (kept) {
		share_processor(n, true);
		n->gathered_at = q->blk.now;
	}
	q->owes = kept && count;
	if (!pvf_queue_check(q, &rx->fault) || q->stopped)
		return false;
	if (rx->ring.rsp_cons != first)
		pvf_queue_progress(q, rx->ring.rsp_cons - first);
	return count;
}

/* True: stopped by the bound. */
static bool transmit(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;
	struct iovec iov[1 + PVF_NET_PAGES];

	for (uint32_t i = 0; i < TURN; i++) {
		int iovs = pvf_net_tx_begin(&n->tx, iov);

		if (!iovs) {
			take_answers(q);
			if (q->stopped)
				return false;
			iovs = pvf_net_tx_begin(&n->tx, iov);
		}
		if (!iovs) {
			n->full++;
			return false;
		}
		ssize_t got = readv(n->tap_fd, iov, iovs);
		bool nothing = got <= 0;

		n->tap_errors += got < 0 && errno != EAGAIN;
		pvf_net_tx_end(&n->tx, got);
		if (nothing) {
			n->tap_ready = false;
			return false;
		}
	}
	return true;
}

static void serve(struct pvf_queue *q)
{
	struct pvf_netq *n = q->own;

	/* Before START nothing is taken: there is no one to give it to. */
	if (!q->attached || q->stopped || n->tap_fd < 0)
		return;
	q->blk.now = pvf_coarse_ns();
	if (n->patient && q->blk.now - n->gathered_at > PATIENT)
		share_processor(n, false);
	if (!q->delayed)
		take_answers(q);
	if (!q->stopped && q->masked && !q->delayed)
		q->again |= receive(q);
	if (!q->stopped && n->tx.cut.total)
		pvf_net_tx_cut(&n->tx);
	if (!q->stopped && q->serving && n->tap_ready)
		q->again |= transmit(q);
	if (!q->stopped && q->serving)
		tell_groups(q);
	if (q->stopped)
		return;
	if (pvf_ring_push(&n->tx.ring))
		pvf_queue_notify(q, &q->port);
	pvf_queue_watch(q, n->tx.in_flight + n->tx.extras);
	if (q->stopped || q->delayed || q->again)
		return;
	/* Also if no event has come: while turns take the answers, none has to. */
	if (pvf_ring_ask(&n->tx.ring, q->no_new ? 1 : pvf_net_tx_patience(&n->tx), &n->tx.fault))
		q->again = true;
	if (!pvf_queue_check(q, &n->tx.fault) || !q->masked)
		return;
	if (pvf_ring_final_check(&n->rx.ring, &n->rx.fault))
		q->again = true;
	if (pvf_queue_check(q, &n->rx.fault) && !q->again)
		pvf_queue_finish_event(q);
}

/* The watchdog */

static void tick(struct pvf_queue *q)
{
	if (!q->delayed)
		take_answers(q);
}

/* Of packets that came: answers bring no event as long as they are few. */
static uint32_t waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	return pvf_ring_poll(&((struct pvf_netq *)q->own)->rx.ring, fault);
}

static uint32_t taken(const struct pvf_queue *q)
{
	return ((const struct pvf_netq *)q->own)->rx.ring.rsp_cons;
}

static void publish(struct pvf_queue *q)
{
	const struct pvf_netq *n = q->own;
	const struct pvf_blk_stats *shared = &q->blk.stats;
	struct pvf_net_stats s = n->ended;

	add_way(&s.tx, &n->tx.stats);
	add_way(&s.rx, &n->rx.stats);
	s.state = q->state;
	s.generation = q->generation;
	s.queue = q->index;
	s.queues = q->queues;
	s.tx_in_flight = n->tx.in_flight;
	s.tx_pool_pages = n->tx.pool.pages;
	s.tx_pool_free = n->tx.pool.free;
	s.tx_pool_free_low = n->tx.pool.free_low;
	s.rx_pool_pages = n->rx.pool.pages;
	s.rx_pool_free = n->rx.pool.free;
	s.notifies = shared->notifies;
	s.events = shared->events;
	s.events_spurious = shared->events_spurious;
	s.watchdog_hits = shared->watchdog_hits;
	s.wakeups = shared->wakeups;
	s.tx_full = n->full;
	s.tap_errors = n->tap_errors;
	s.groups_told = n->groups_told;
	s.groups = __atomic_load_n(&n->groups->count, __ATOMIC_RELAXED);
	s.groups_lost = __atomic_load_n(&n->groups->lost, __ATOMIC_RELAXED);
	pvf_stats_publish(q->page, &s, sizeof(s));
}

/* To another worker: packets in the rings, and two descriptors more at most. */

static uint32_t save(const struct pvf_queue *q, struct pvf_image_queue *image, int *fds)
{
	const struct pvf_netq *n = q->own;
	const struct pvf_blk_stats *shared = &q->blk.stats;
	struct pvf_image_net *to = &image->net;
	uint32_t count = pvf_queue_has_second(q) ? pvf_port_share(&q->second, &to->rx_port, fds) : 0;

	to->split = count != 0;
	memcpy(&to->tx, &n->tx, sizeof(to->tx));
	memcpy(&to->rx, &n->rx, sizeof(to->rx));
	to->ended = n->ended;
	to->full = n->full;
	to->tap_errors = n->tap_errors;
	to->groups_told = n->groups_told;
	to->notifies = shared->notifies;
	to->events = shared->events;
	to->events_spurious = shared->events_spurious;
	to->watchdog_hits = shared->watchdog_hits;
	to->wakeups = shared->wakeups;
	to->stall_seconds = q->blk.geo.stall_seconds;
	image->target = n->tap_fd >= 0;
	if (image->target)
		fds[count++] = n->tap_fd;
	return count;
}

static int take_second(struct pvf_queue *q, const struct pvf_port_image *port, int *fds, const char **why)
{
	int rc = pvf_port_take_over(&q->second, port, fds, port->fds, why);

	return rc ? rc : pvf_queue_watch_port(q, &q->second, why);
}

static int take_over(struct pvf_queue *q, const struct pvf_image_queue *image, int *fds, uint32_t count,
		     const char **why)
{
	struct pvf_netq *n = q->own;
	struct pvf_blk_stats *shared = &q->blk.stats;
	const struct pvf_image_net *from = &image->net;
	struct pvf_port_image second = from->rx_port;
	uint32_t ports = from->split ? second.fds : 0;
	bool target = image->target;

	*why = "descriptors of the queue are missing";
	if (ports > PVF_EVENT_FDS || count != ports + target)
		return -EINVAL;
	*why = pvf_net_take_over(&n->tx, &n->rx, from, q->port.ring, q->port.ring_bytes, q->port.pool,
				 (uint32_t)(q->port.pool_bytes / PVF_PAGE_SIZE));
	if (*why)
		return -EINVAL;
	int rc = ports ? take_second(q, &second, fds, why) : 0;

	if (!rc && target)
		rc = take_target(q, fds[ports], why);
	if (rc) {
		n->tx = (struct pvf_net_tx){0};
		n->rx = (struct pvf_net_rx){0};
		return rc;
	}
	if (target)
		fds[ports] = -1;
	n->tx.groups = n->groups;
	pvf_queue_trace(q, n->trace);
	n->ended = from->ended;
	n->full = from->full;
	n->tap_errors = from->tap_errors;
	n->groups_told = from->groups_told;
	shared->notifies = from->notifies;
	shared->events = from->events;
	shared->events_spurious = from->events_spurious;
	shared->watchdog_hits = from->watchdog_hits;
	shared->wakeups = from->wakeups;
	pvf_queue_expect(q, from->stall_seconds);
	return 0;
}

const struct pvf_queue_ops pvf_netq_ops = {
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
	.save = save,
	.take_over = take_over,
};
