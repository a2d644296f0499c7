/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A virtual interface, its connection, and a queue's thread.
 */
#include "netback_int.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

static int explain(char *why, int error, const char *what)
{
	snprintf(why, PVF_NB_TEXT, "%s: %s", what, strerror(-error));
	return error;
}

/* Rules */

bool nb_fires(struct pvf_nb *nb, enum pvf_nb_kind kind, uint64_t *value)
{
	return nb_fires_of(nb, kind, 0, value);
}

bool nb_fires_of(struct pvf_nb *nb, enum pvf_nb_kind kind, uint32_t type, uint64_t *value)
{
	bool fires = false;

	if (!LOAD(nb->rules))
		return false;
	pthread_mutex_lock(&nb->lock);
	for (uint32_t i = 0; i < nb->rules && !fires; i++) {
		struct pvf_nb_rule *r = &nb->rule[i];

		if (r->kind != kind || (r->only && r->only != type))
			continue;
		if (r->skip) {
			r->skip--;
			continue;
		}
		fires = true;
		*value = r->value;
		nb->fired[kind]++;
		if (r->count && !--r->count)
			r->kind = PVF_NB_NONE;
	}
	pthread_mutex_unlock(&nb->lock);
	return fires;
}

int pvf_nb_set_rules(struct pvf_nb *nb, const struct pvf_nb_rule *rules, uint32_t count)
{
	if (count > PVF_NB_RULES)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++)
		if (!rules[i].kind || rules[i].kind >= PVF_NB_KINDS)
			return -EINVAL;
	pthread_mutex_lock(&nb->lock);
	memcpy(nb->rule, rules, count * sizeof(*rules));
	STORE(nb->rules, count);
	pthread_mutex_unlock(&nb->lock);
	nb_ctrl_release(nb);
	return 0;
}

void nb_fatal(struct nb_queue *q, const char *what, uint32_t value)
{
	struct pvf_nb *nb = q->nb;

	pthread_mutex_lock(&nb->lock);
	if (!nb->fatal[0])
		snprintf(nb->fatal, sizeof(nb->fatal), "%s (%u)", what, value);
	pthread_mutex_unlock(&nb->lock);
	ADD(q->stats.fatal, 1);
	STORE(nb->broken, 1);
}

void pvf_nb_fatal(struct pvf_nb *nb, char *why)
{
	pthread_mutex_lock(&nb->lock);
	memcpy(why, nb->fatal, PVF_NB_TEXT);
	pthread_mutex_unlock(&nb->lock);
}

/* A queue's thread */

void nb_notify(struct nb_queue *q, bool rx)
{
	struct nb_end *end = &q->end[rx && q->ends > 1];
	uint64_t value;

	if (nb_fires(q->nb, PVF_NB_SILENT, &value))
		return;
	ADD(q->stats.notifies, 1);
	pvf_channel_notify(end->channel, end->side, end->other_fd);
}

static int watch(const struct nb_queue *q, int fd, uint32_t how)
{
	struct epoll_event event = {.events = EPOLLIN | how, .data.fd = fd};

	return epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

/* The TAP is watched while there are pages for what it has; it would be readable all the time else. */
static void watch_tap(struct nb_queue *q, bool wanted)
{
	struct epoll_event event = {.events = wanted ? EPOLLIN : 0, .data.fd = q->tap_fd};

	if (q->tap_watched == wanted)
		return;
	q->tap_watched = wanted;
	epoll_ctl(q->epoll_fd, EPOLL_CTL_MOD, q->tap_fd, &event);
}

static void *queue_main(void *arg)
{
	struct nb_queue *q = arg;
	struct epoll_event events[4];
	uint64_t count;

	while (!__atomic_load_n(&q->nb->stop, __ATOMIC_ACQUIRE)) {
		pthread_mutex_lock(&q->lock);
		bool any = nb_tx(q), woken = false;

		pthread_mutex_unlock(&q->lock);
		bool received = nb_rx(q);

		for (uint32_t i = 0; i < q->ends; i++) {
			if (!q->end[i].delivered)
				continue;
			woken = true;
			q->end[i].delivered = false;
			pvf_channel_unmask(q->end[i].channel, q->end[i].side, q->end[i].own_fd);
		}
		ADD(q->stats.spurious, woken && !any && !received);
		pthread_mutex_lock(&q->lock);
		if (nb_fires(q->nb, PVF_NB_STORM, &count))
			nb_notify(q, false);
		watch_tap(q, !LOAD(q->nb->broken) && nb_rx_room(q));
		pthread_mutex_unlock(&q->lock);
		int n = epoll_wait(q->epoll_fd, events, 4, received ? 0 : -1);

		for (int i = 0; i < n; i++)
			if (events[i].data.fd == q->ctl_fd &&
			    read(q->ctl_fd, &count, sizeof(count)) < 0)
				count = 0; /* somebody else's read: nothing depends on it */
		for (uint32_t i = 0; i < q->ends && !LOAD(q->nb->broken); i++) {
			q->end[i].delivered = pvf_channel_take(q->end[i].channel, q->end[i].side, -1);
			ADD(q->stats.wakeups, q->end[i].delivered);
		}
	}
	return NULL;
}

static void free_queue(struct nb_queue *q)
{
	struct pvf_mapper *m = &q->nb->peer.mapper;

	nb_kept_free(q);
	pthread_mutex_destroy(&q->lock);
	if (q->tx_shared)
		pvf_mapper_unmap(m, &q->tx_ref, 1, q->tx_shared);
	if (q->rx_shared)
		pvf_mapper_unmap(m, &q->rx_ref, 1, q->rx_shared);
	for (uint32_t i = 0; i < 2; i++) {
		if (q->end[i].channel)
			pvf_channel_unmap(q->end[i].channel);
		if (q->end[i].own_fd >= 0)
			close(q->end[i].own_fd);
		if (q->end[i].other_fd >= 0)
			close(q->end[i].other_fd);
	}
	if (q->ctl_fd >= 0)
		close(q->ctl_fd);
	if (q->epoll_fd >= 0)
		close(q->epoll_fd);
	free(q);
}

/* The interface */

struct pvf_nb *pvf_nb_new(void)
{
	struct pvf_nb *nb = calloc(1, sizeof(*nb));

	if (nb)
		pthread_mutex_init(&nb->lock, NULL);
	return nb;
}

void pvf_nb_free(struct pvf_nb *nb)
{
	pvf_nb_disconnect(nb);
	pthread_mutex_destroy(&nb->lock);
	free(nb);
}

/* All members are u64. */
static void add_stats(struct pvf_nb_stats *sum, struct pvf_nb_stats *more)
{
	uint64_t *to = (uint64_t *)(void *)sum, *from = (uint64_t *)(void *)more;

	for (size_t i = 0; i < sizeof(*sum) / sizeof(uint64_t); i++)
		to[i] += LOAD(from[i]);
}

void pvf_nb_get_stats(struct pvf_nb *nb, struct pvf_nb_stats *stats)
{
	*stats = nb->ended;
	for (uint32_t i = 0; i < nb->queues; i++)
		add_stats(stats, &nb->queue[i]->stats);
	stats->ctrl_requests += LOAD(nb->ctrl.requests);
	stats->ctrl_refused += LOAD(nb->ctrl.refused);
	pthread_mutex_lock(&nb->lock);
	memcpy(stats->fired, nb->fired, sizeof(stats->fired));
	pthread_mutex_unlock(&nb->lock);
}

int pvf_nb_connect(struct pvf_nb *nb, int table_fd, int maptrack_fd, uint16_t own_domid,
		   uint16_t domid, int hub_fd, uint32_t flags, uint32_t keep)
{
	if (nb->connected)
		return -EBUSY;
	int rc = pvf_peer_open(&nb->peer, table_fd, maptrack_fd, own_domid, domid, hub_fd);

	if (rc)
		return rc;
	nb->connected = true;
	nb->stop = false;
	nb->broken = 0;
	nb->fatal[0] = 0;
	nb->flags = flags;
	nb->keep = keep;
	nb->headroom = 0;
	nb->hash = (struct nb_hash){0};
	nb->groups = (struct nb_groups){0};
	return 0;
}

int pvf_nb_arena(struct pvf_nb *nb, uint16_t number, int fd)
{
	return nb->connected ? pvf_peer_arena(&nb->peer, number, fd) : -ENOTCONN;
}

static int map_rings(struct nb_queue *q, char *why)
{
	struct { uint32_t *ref; void **where; } ring[] = {
		{&q->tx_ref, &q->tx_shared}, {&q->rx_ref, &q->rx_shared}};

	for (uint32_t i = 0, failed; i < 2; i++) {
		int rc = pvf_peer_map_ring(&q->nb->peer, ring[i].ref, 1, ring[i].where, &failed);

		if (rc) {
			snprintf(why, PVF_NB_TEXT, "mapping %s-ring-ref %u: %s", i ? "rx" : "tx",
				 *ring[i].ref, strerror(-rc));
			return rc;
		}
	}
	/* As Linux's netback: where the rings stand, whoever served them before. */
	struct netif_tx_sring *tx = q->tx_shared;
	struct netif_rx_sring *rx = q->rx_shared;
	RING_IDX tx_at = __atomic_load_n(&tx->rsp_prod, __ATOMIC_ACQUIRE);
	RING_IDX rx_at = __atomic_load_n(&rx->rsp_prod, __ATOMIC_ACQUIRE);

	BACK_RING_ATTACH(&q->tx, tx, tx_at, NB_PAGE);
	BACK_RING_ATTACH(&q->rx, rx, rx_at, NB_PAGE);
	q->tx_published = tx_at;
	if (__atomic_load_n(&tx->req_prod, __ATOMIC_ACQUIRE) - tx_at > RING_SIZE(&q->tx) ||
	    __atomic_load_n(&rx->req_prod, __ATOMIC_ACQUIRE) - rx_at > RING_SIZE(&q->rx))
		return explain(why, -EIO, "the rings' indices");
	return 0;
}

static int take_channels(struct nb_queue *q, const struct pvf_nb_channel *channels, uint32_t count,
			 char *why)
{
	q->ends = count;
	for (uint32_t i = 0; i < count; i++) {
		struct nb_end *end = &q->end[i];
		int rc = pvf_channel_map(channels[i].channel_fd, &end->channel);

		if (rc)
			return explain(why, rc, "mapping the event channel");
		end->side = channels[i].side;
		end->own_fd = dup(channels[i].own_fd);
		end->other_fd = dup(channels[i].other_fd);
		if (end->own_fd < 0 || end->other_fd < 0)
			return explain(why, -EBADF, "the event channel's descriptors");
		rc = watch(q, end->own_fd, EPOLLET);
		if (rc)
			return explain(why, rc, "watching the event channel");
	}
	return 0;
}

int pvf_nb_queue(struct pvf_nb *nb, uint32_t tx_ref, uint32_t rx_ref,
		 const struct pvf_nb_channel *channels, uint32_t count, int tap_fd, char *why)
{
	if (!nb->connected || nb->queues == PVF_NB_QUEUES || !count || count > 2)
		return explain(why, -EINVAL, "no such queue");
	struct nb_queue *q = calloc(1, sizeof(*q));
	int rc;

	if (!q)
		return explain(why, -ENOMEM, "memory of a queue");
	q->nb = nb;
	q->tx_ref = tx_ref;
	q->rx_ref = rx_ref;
	q->tap_fd = tap_fd;
	q->tap_watched = true;
	pthread_mutex_init(&q->lock, NULL);
	for (uint32_t i = 0; i < 2; i++)
		q->end[i].own_fd = q->end[i].other_fd = -1;
	q->ctl_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	rc = q->ctl_fd < 0 || q->epoll_fd < 0 ? explain(why, -errno, "a queue's descriptors") : 0;
	if (!rc && nb_kept_new(q))
		rc = explain(why, -ENOMEM, "memory of the grants that stay mapped");
	if (!rc)
		rc = map_rings(q, why);
	if (!rc)
		rc = take_channels(q, channels, count, why);
	if (!rc && (watch(q, q->ctl_fd, 0) || watch(q, tap_fd, 0)))
		rc = explain(why, -errno, "watching the TAP");
	if (rc) {
		free_queue(q);
		return rc;
	}
	nb->queue[nb->queues++] = q;
	return 0;
}

void pvf_nb_set_headroom(struct pvf_nb *nb, uint32_t bytes)
{
	STORE(nb->headroom, bytes < NB_PAGE / 2 ? bytes : NB_PAGE / 2);
}

int pvf_nb_start(struct pvf_nb *nb)
{
	int rc = nb->queues ? 0 : -ENOTCONN;

	for (uint32_t i = 0; !rc && i < nb->queues; i++) {
		rc = -pthread_create(&nb->queue[i]->thread, NULL, queue_main, nb->queue[i]);
		nb->queue[i]->started = !rc;
	}
	return rc ? rc : nb_ctrl_start(nb);
}

void pvf_nb_disconnect(struct pvf_nb *nb)
{
	const uint64_t one = 1;

	if (!nb->connected)
		return;
	__atomic_store_n(&nb->stop, true, __ATOMIC_RELEASE);
	nb_ctrl_stop(nb);
	/* All have ended before one is freed: they give packets to each other. */
	for (uint32_t i = 0; i < nb->queues; i++) {
		struct nb_queue *q = nb->queue[i];

		if (q->started && write(q->ctl_fd, &one, sizeof(one)) == sizeof(one))
			pthread_join(q->thread, NULL);
	}
	for (uint32_t i = 0; i < nb->queues; i++) {
		struct nb_queue *q = nb->queue[i];

		q->stats.kept = 0;
		add_stats(&nb->ended, &q->stats);
		free_queue(q);
	}
	nb->queues = 0;
	pvf_peer_close(&nb->peer);
	nb->connected = false;
}
