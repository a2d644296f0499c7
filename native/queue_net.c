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
#include "queue_int.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "stats.h"

/* Packets of either way in a turn: a bounded amount (rule 8). Less would cost more notifies, each of which is an exit
 * to the hypervisor. */
#define TURN 64u

/* After a turn that passed on several packets: for so long the next ones are waited for by giving way. */
#define PATIENT (20 * PVF_MS)

int pvf_queue_net(struct pvf_queue *q, struct pvf_groups *groups)
{
	q->net = calloc(1, sizeof(*q->net));
	if (!q->net)
		return -ENOMEM;
	q->net->tap_fd = q->net->rx_port.event_fd = -1;
	q->net->groups = groups;
	if (!q->index)
		groups->wake_fd = q->wake_fd;
	return 0;
}

static int open_rx_port(struct pvf_queue *q, int fd, uint32_t number, const char **why)
{
	struct pvf_port *port = &q->net->rx_port;
	int rc = pvf_port_open_event(port, fd, number, why);

	if (rc)
		return rc;
	*why = "RX's event channel cannot be watched";
	rc = pvf_queue_watch_port(q, port, PVF_TAG_EVENT_RX);
	if (rc)
		pvf_port_release(port);
	return rc;
}

/* What a queue's ring begins with: a set of the device's that no backend knows, and whose TX pages are these. */
int pvf_netq_attach(struct pvf_queue *q, int rx_event_fd, const struct pvf_ctl_attach *a, const char **why)
{
	struct pvf_netq *n = q->net;
	unsigned char *ring = q->port.ring, *pool = q->port.pool;
	uint32_t tx = a->tx_pages;
	int rc = a->rx_port ? open_rx_port(q, rx_event_fd, a->rx_port, why) : 0;

	if (rc)
		return rc;
	n->split = a->rx_port;
	n->delivered[0] = n->delivered[1] = false;
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
	q->blk.fault = (struct pvf_fault){0};
	return 0;
}

void pvf_queue_trace(struct pvf_queue *q, struct pvf_trace *trace)
{
	q->net->trace = q->net->tx.trace = q->net->rx.trace = trace;
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

void pvf_netq_detach(struct pvf_queue *q)
{
	struct pvf_netq *n = q->net;

	add_way(&n->ended.tx, &n->tx.stats);
	add_way(&n->ended.rx, &n->rx.stats);
	n->tx = (struct pvf_net_tx){0};
	n->rx = (struct pvf_net_rx){0};
	if (!n->split)
		return;
	n->split = false;
	epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, n->rx_port.event_fd, NULL);
	pvf_port_close(&n->rx_port);
}

/* Of two ports only what was delivered is masked. */
int pvf_netq_unmask(struct pvf_queue *q)
{
	struct pvf_netq *n = q->net;
	int rc = 0;

	if (!n->split || n->delivered[0])
		rc = q->port.ops->unmask(&q->port);
	if (!rc && n->split && n->delivered[1])
		rc = n->rx_port.ops->unmask(&n->rx_port);
	n->delivered[0] = n->delivered[1] = false;
	return rc;
}

bool pvf_netq_drained(const struct pvf_queue *q)
{
	return !q->net->tx.in_flight && !q->net->tx.extras && !q->net->tx.cut.total;
}

int pvf_netq_target(struct pvf_queue *q, int fd, const char **why)
{
	struct pvf_netq *n = q->net;
	struct epoll_event event = {.events = EPOLLIN | EPOLLET,
				    .data.u64 = (uint64_t)++q->sockets << 32 | PVF_TAG_TARGET};

	pvf_netq_drop_target(q);
	*why = "the TAP cannot be made non-blocking";
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK)))
		return -errno;
	*why = "the TAP cannot be watched";
	if (epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return -errno;
	q->target.tag = event.data.u64;
	n->tap_fd = fd;
	n->tap_ready = true;
	return 0;
}

void pvf_netq_drop_target(struct pvf_queue *q)
{
	if (q->net->tap_fd >= 0) {
		/* Another process may have the same open file. */
		epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->net->tap_fd, NULL);
		close(q->net->tap_fd);
	}
	q->net->tap_fd = -1;
	q->net->tap_ready = false;
}

/* Service */

static bool check(struct pvf_queue *q, const struct pvf_fault *fault)
{
	if (!fault->rule)
		return true;
	q->blk.fault = *fault;
	pvf_queue_broken(q);
	return false;
}

void pvf_netq_answers(struct pvf_queue *q)
{
	struct pvf_net_tx *tx = &q->net->tx;
	uint32_t n = pvf_ring_poll(&tx->ring, &tx->fault);

	if (n)
		pvf_net_tx_drain(tx, n);
	if (!check(q, &tx->fault) || !n)
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
	struct pvf_netq *n = q->net;

	if (q->index || !(n->tx.features & PVF_NET_MULTICAST) ||
	    !__atomic_load_n(&n->groups->news, __ATOMIC_ACQUIRE))
		return;
	pvf_groups_tell(n->groups, tell_group, n); /* what finds no room: when answers make it */
}

/* Gives the backend new pages, as soon as they are many. */
static void show_room(struct pvf_queue *q)
{
	struct pvf_netq *n = q->net;

	if (pvf_net_rx_show(&n->rx))
		pvf_queue_notify(q, n->split ? &n->rx_port : &q->port);
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
	struct pvf_netq *n = q->net;
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
	n->owes = kept && count;
	if (!check(q, &rx->fault) || q->stopped)
		return false;
	if (rx->ring.rsp_cons != first)
		pvf_queue_progress(q, rx->ring.rsp_cons - first);
	return count;
}

/* True: stopped by the bound. */
static bool transmit(struct pvf_queue *q)
{
	struct pvf_netq *n = q->net;
	struct iovec iov[1 + PVF_NET_PAGES];

	for (uint32_t i = 0; i < TURN; i++) {
		int iovs = pvf_net_tx_begin(&n->tx, iov);

		if (!iovs) {
			pvf_netq_answers(q);
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

void pvf_netq_serve(struct pvf_queue *q)
{
	struct pvf_netq *n = q->net;

	q->again = false;
	/* Before START nothing is taken: there is no one to give it to. */
	if (!q->attached || q->stopped || n->tap_fd < 0)
		return;
	q->blk.now = pvf_coarse_ns();
	if (n->patient && q->blk.now - n->gathered_at > PATIENT)
		share_processor(n, false);
	if (!q->delayed)
		pvf_netq_answers(q);
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
	if (!check(q, &n->tx.fault) || !q->masked)
		return;
	if (pvf_ring_final_check(&n->rx.ring, &n->rx.fault))
		q->again = true;
	if (check(q, &n->rx.fault) && !q->again)
		pvf_queue_finish_event(q);
}

/* For the watchdog, of packets that came: answers bring no event as long as they are few. */
uint32_t pvf_netq_taken(const struct pvf_queue *q)
{
	return q->net->rx.ring.rsp_cons;
}

uint32_t pvf_netq_waiting(struct pvf_queue *q, struct pvf_fault *fault)
{
	return pvf_ring_poll(&q->net->rx.ring, fault);
}

void pvf_netq_publish(struct pvf_queue *q)
{
	const struct pvf_netq *n = q->net;
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
