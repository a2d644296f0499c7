/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A disk, and the connection of its frontend: what is called from outside, and the grants.
 */
#include "blkback_int.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int explain(char *why, int error, const char *what)
{
	snprintf(why, PVF_BB_TEXT, "%s: %s", what, strerror(-error));
	return error;
}

static void free_conn(struct pvf_bb_conn *conn)
{
	for (uint32_t i = 0; i < conn->rings; i++)
		bb_ring_free(conn->ring[i]);
	pvf_peer_close(&conn->peer);
	pthread_cond_destroy(&conn->changed);
	pthread_mutex_destroy(&conn->lock);
	free(conn);
}

/* The disk */

struct pvf_bb *pvf_bb_new(const char *path, uint64_t bytes,
			  const struct pvf_bb_features *features, int *error)
{
	struct pvf_bb *bb = calloc(1, sizeof(*bb));

	*error = -ENOMEM;
	if (!bb)
		return NULL;
	*error = bb_disk_open(&bb->disk, path, bytes, features->flags);
	if (*error) {
		free(bb);
		return NULL;
	}
	pthread_mutex_init(&bb->rules.lock, NULL);
	bb->rules.random = 1;
	pvf_bb_set_features(bb, features);
	return bb;
}

void pvf_bb_free(struct pvf_bb *bb)
{
	if (bb->conn) {
		STORE(bb->conn->abandon, true);
		pvf_bb_disconnect(bb);
	}
	pthread_mutex_destroy(&bb->rules.lock);
	bb_disk_close(&bb->disk);
	free(bb);
}

uint64_t pvf_bb_bytes(const struct pvf_bb *bb)
{
	return bb_disk_bytes(&bb->disk);
}

int pvf_bb_resize(struct pvf_bb *bb, uint64_t bytes)
{
	return bb_disk_resize(&bb->disk, bytes);
}

void pvf_bb_set_features(struct pvf_bb *bb, const struct pvf_bb_features *f)
{
	struct pvf_bb_features *to = &bb->features;

	STORE(to->flags, f->flags);
	STORE(to->max_indirect,
	      f->max_indirect < PVF_BB_SEGMENTS ? f->max_indirect : PVF_BB_SEGMENTS);
	STORE(to->sector_size, f->sector_size < BB_SECTOR ? BB_SECTOR : f->sector_size);
	STORE(to->discard_granularity,
	      f->discard_granularity ? f->discard_granularity : LOAD(to->sector_size));
	STORE(to->discard_alignment, f->discard_alignment);
	STORE(to->max_persistent, f->max_persistent < PVF_GRANTS ? f->max_persistent : PVF_GRANTS);
	STORE(to->batch, f->batch ? f->batch : 1);
}

void pvf_bb_release(struct pvf_bb *bb)
{
	__atomic_fetch_add(&bb->released, 1, __ATOMIC_RELEASE);
	for (uint32_t i = 0; bb->conn && i < bb->conn->rings; i++)
		bb_ring_kick(bb->conn->ring[i]);
}

/* All members are u64. */
#define COUNTERS (sizeof(struct pvf_bb_stats) / sizeof(uint64_t))

static void add_stats(struct pvf_bb_stats *sum, struct pvf_bb_stats *more)
{
	uint64_t *to = (uint64_t *)(void *)sum, *from = (uint64_t *)(void *)more;

	for (size_t i = 0; i < COUNTERS; i++)
		to[i] += LOAD(from[i]);
}

void pvf_bb_get_stats(struct pvf_bb *bb, struct pvf_bb_stats *stats)
{
	*stats = bb->ended;
	for (uint32_t i = 0; bb->conn && i < bb->conn->rings; i++)
		add_stats(stats, &bb->conn->ring[i]->stats);
	pthread_mutex_lock(&bb->rules.lock);
	memcpy(stats->fired, bb->rules.fired, sizeof(stats->fired));
	pthread_mutex_unlock(&bb->rules.lock);
}

/* A connection */

int pvf_bb_connect(struct pvf_bb *bb, int table_fd, int maptrack_fd, uint16_t own_domid,
		   uint16_t domid, int hub_fd, bool persistent)
{
	if (bb->conn)
		return -EBUSY;
	struct pvf_bb_conn *conn = calloc(1, sizeof(*conn));
	int rc;

	if (!conn)
		return -ENOMEM;
	rc = pvf_peer_open(&conn->peer, table_fd, maptrack_fd, own_domid, domid, hub_fd);
	if (rc) {
		free(conn);
		return rc;
	}
	conn->bb = bb;
	conn->persistent = persistent && LOAD(bb->features.flags) & PVF_BB_PERSISTENT;
	pthread_mutex_init(&conn->lock, NULL);
	pthread_cond_init(&conn->changed, NULL);
	bb->conn = conn;
	return 0;
}

int pvf_bb_arena(struct pvf_bb *bb, uint16_t number, int fd)
{
	return bb->conn ? pvf_peer_arena(&bb->conn->peer, number, fd) : -ENOTCONN;
}

uint32_t pvf_bb_left(const struct pvf_bb *bb, struct pvf_bb_left *left)
{
	memcpy(left, bb->left, bb->lefts * sizeof(*left));
	return bb->lefts;
}

int pvf_bb_take_up(struct pvf_bb *bb, const struct pvf_bb_left *left, uint32_t count)
{
	if (count > PVF_BB_QUEUES)
		return -EINVAL;
	memcpy(bb->left, left, count * sizeof(*left));
	bb->lefts = count;
	return 0;
}

static bool was_left_at(const struct pvf_bb *bb, uint32_t ref, RING_IDX rsp_prod)
{
	for (uint32_t i = 0; i < bb->lefts; i++)
		if (bb->left[i].ref == ref)
			return bb->left[i].rsp_prod == rsp_prod;
	return false;
}

int pvf_bb_ring(struct pvf_bb *bb, const uint32_t *refs, uint32_t pages, int channel_fd,
		uint32_t side, int own_fd, int other_fd, char *why)
{
	struct pvf_bb_conn *conn = bb->conn;
	uint32_t failed = 0;
	struct bb_ring *ring;
	int rc;

	if (!conn || conn->rings == PVF_BB_QUEUES || !pages || pages > PVF_BB_RING_PAGES ||
	    (pages & (pages - 1)) || side > 1)
		return explain(why, -EINVAL, "no such ring");
	ring = bb_ring_new(conn);
	if (!ring)
		return explain(why, -ENOMEM, "memory of a ring");
	rc = pvf_peer_map_ring(&conn->peer, refs, pages, &ring->shared, &failed);
	if (rc) {
		bb_ring_free(ring);
		snprintf(why, PVF_BB_TEXT, "mapping ring-ref %u: %s",
			 refs[failed < pages ? failed : 0], strerror(-rc));
		return rc;
	}
	memcpy(ring->refs, refs, pages * sizeof(*refs));
	ring->pages = pages;
	/* As a blkback that was bound again: what was put there meanwhile is done. */
	const blkif_sring_t *shared = ring->shared;
	RING_IDX rsp_prod = __atomic_load_n(&shared->rsp_prod, __ATOMIC_ACQUIRE);
	RING_IDX req_prod = __atomic_load_n(&shared->req_prod, __ATOMIC_ACQUIRE);

	BACK_RING_ATTACH(&ring->ring, (blkif_sring_t *)ring->shared, rsp_prod,
			 (size_t)pages * BB_PAGE);
	ring->published = ring->pushed = rsp_prod;
	if (req_prod - rsp_prod > RING_SIZE(&ring->ring)) {
		bb_ring_free(ring);
		return explain(why, -EIO, "the ring's indices");
	}
	if ((req_prod || rsp_prod) && !was_left_at(bb, refs[0], rsp_prod)) {
		bb_ring_free(ring);
		return explain(why, -EBUSY, "the ring was not left in order by who served it");
	}
	ring->side = side;
	rc = pvf_channel_map(channel_fd, &ring->channel);
	if (rc) {
		bb_ring_free(ring);
		return explain(why, rc, "mapping the event channel");
	}
	ring->own_fd = dup(own_fd);
	ring->other_fd = dup(other_fd);
	if (ring->own_fd < 0 || ring->other_fd < 0) {
		bb_ring_free(ring);
		return explain(why, -EBADF, "the event channel's descriptors");
	}
	conn->ring[conn->rings++] = ring;
	return 0;
}

int pvf_bb_start(struct pvf_bb *bb)
{
	struct pvf_bb_conn *conn = bb->conn;
	int rc = conn && conn->rings ? 0 : -ENOTCONN;

	if (!rc)
		bb->lefts = 0;
	for (uint32_t i = 0; !rc && i < conn->rings; i++)
		rc = bb_ring_start(conn->ring[i]);
	return rc;
}

int pvf_bb_disconnect(struct pvf_bb *bb)
{
	struct pvf_bb_conn *conn = bb->conn;
	bool busy = false;

	if (!conn)
		return 0;
	pthread_mutex_lock(&conn->lock);
	conn->asked++;
	pthread_mutex_unlock(&conn->lock);
	__atomic_store_n(&conn->stop, true, __ATOMIC_RELEASE);
	for (uint32_t i = 0; i < conn->rings; i++)
		bb_ring_kick(conn->ring[i]);
	/* Until each thread has answered: at most as long as one batch of requests takes. */
	pthread_mutex_lock(&conn->lock);
	for (uint32_t i = 0; i < conn->rings; i++) {
		const struct bb_ring *ring = conn->ring[i];

		while (ring->started && !ring->ended &&
		       (ring->busy != conn->asked || LOAD(conn->abandon)))
			pthread_cond_wait(&conn->changed, &conn->lock);
		busy |= ring->started && !ring->ended;
	}
	pthread_mutex_unlock(&conn->lock);
	if (busy)
		return -EBUSY;
	for (uint32_t i = 0; i < conn->rings; i++) {
		struct bb_ring *ring = conn->ring[i];

		if (ring->started) {
			pthread_join(ring->thread, NULL);
			if (bb_ring_in_order(ring))
				bb->left[bb->lefts++] =
					(struct pvf_bb_left){ring->refs[0], ring->published};
		}
		ring->started = false;
		add_stats(&bb->ended, &ring->stats);
	}
	free_conn(conn);
	bb->conn = NULL;
	return 0;
}
