/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A disk, and the connection of its frontend: what is called from outside, and the grants.
 */
#include "blkback_int.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARENAS 65536u
#define HUB_DEADLINE 5000 /* ms */

static int explain(char *why, int error, const char *what)
{
	snprintf(why, PVF_BB_TEXT, "%s: %s", what, strerror(-error));
	return error;
}

/* Arenas */

/* One question to the hub (docs/host.md). A descriptor, or -errno. */
static int ask_hub(const struct pvf_bb_conn *conn, uint16_t number)
{
	char text[512];
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {text, sizeof(text) - 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	struct pollfd ready = {.fd = conn->hub_fd, .events = POLLIN};
	int fd = -1;

	if (conn->hub_fd < 0)
		return -ENXIO;
	int n = snprintf(text, sizeof(text), "{\"do\": \"arena\", \"domid\": %u, \"arena\": %u}",
			 conn->domid, number);

	if (send(conn->hub_fd, text, (size_t)n, MSG_NOSIGNAL) != n)
		return -EPIPE;
	if (poll(&ready, 1, HUB_DEADLINE) != 1)
		return -ETIMEDOUT;
	if (recvmsg(conn->hub_fd, &msg, MSG_CMSG_CLOEXEC) <= 0)
		return -EPIPE;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
			memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	return fd < 0 ? -ENXIO : fd;
}

/* Maps as much of an arena as there is; under the lock. */
static int map_arena(struct pvf_bb_conn *conn, uint16_t number)
{
	int fd = conn->descriptor[number].fd;
	struct bb_arena *arena;
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if (conn->arena[number] && (uint64_t)st.st_size <= conn->arena[number]->bytes)
		return 0;
	arena = calloc(1, sizeof(*arena));
	if (!arena)
		return -ENOMEM;
	arena->bytes = (uint64_t)st.st_size;
	arena->base = mmap(NULL, arena->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (arena->base == MAP_FAILED) {
		int error = errno;

		free(arena);
		return -error;
	}
	madvise(arena->base, arena->bytes, MADV_DONTFORK);
	arena->older = conn->arena[number];
	__atomic_store_n(&conn->arena[number], arena, __ATOMIC_RELEASE);
	return 0;
}

/* Makes sure that an arena is there as far as page `page`. */
static int want_arena(struct pvf_bb_conn *conn, uint16_t number, uint32_t page)
{
	int rc = 0;

	pthread_mutex_lock(&conn->lock);
	if (conn->descriptor[number].fd < 0) {
		int fd = ask_hub(conn, number);

		rc = fd < 0 ? fd : pvf_mapper_arena(&conn->mapper, number, fd);
		if (rc && fd >= 0)
			close(fd);
	}
	if (!rc)
		rc = map_arena(conn, number);
	if (!rc && ((uint64_t)page + 1) * BB_PAGE > conn->arena[number]->bytes)
		rc = -EFAULT;
	pthread_mutex_unlock(&conn->lock);
	return rc;
}

int bb_map(struct pvf_bb_conn *conn, uint32_t ref, bool writable, unsigned char **page)
{
	struct pvf_mapper *m = &conn->mapper;
	int rc = pvf_grant_map(m->table, m->maptrack, m->domid, ref, writable);

	if (rc)
		return rc;
	/* Mapped, the entry stands still; it is shared all the same, so what was read once counts. */
	uint16_t number = LOAD(m->table[ref].arena);
	uint32_t n = LOAD(m->table[ref].page);
	uint64_t at = (uint64_t)n * BB_PAGE;
	struct bb_arena *arena = __atomic_load_n(&conn->arena[number], __ATOMIC_ACQUIRE);

	if (!arena || at + BB_PAGE > arena->bytes) {
		rc = want_arena(conn, number, n);
		if (rc) {
			pvf_grant_unmap(m->table, m->maptrack, ref);
			return rc;
		}
		arena = __atomic_load_n(&conn->arena[number], __ATOMIC_ACQUIRE);
	}
	*page = arena->base + at;
	return 0;
}

void bb_unmap(struct pvf_bb_conn *conn, uint32_t ref)
{
	pvf_grant_unmap(conn->mapper.table, conn->mapper.maptrack, ref);
}

static void free_conn(struct pvf_bb_conn *conn)
{
	for (uint32_t i = 0; i < conn->rings; i++)
		bb_ring_free(conn->ring[i]);
	for (uint32_t i = 0; i < ARENAS; i++) {
		while (conn->arena && conn->arena[i]) {
			struct bb_arena *arena = conn->arena[i];

			conn->arena[i] = arena->older;
			munmap(arena->base, arena->bytes);
			free(arena);
		}
		if (conn->descriptor && conn->descriptor[i].fd >= 0)
			close(conn->descriptor[i].fd);
	}
	if (conn->mapper.table)
		pvf_mapper_close(&conn->mapper);
	pthread_cond_destroy(&conn->changed);
	pthread_mutex_destroy(&conn->lock);
	free(conn->arena);
	free(conn->descriptor);
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
	conn->bb = bb;
	conn->domid = domid;
	conn->hub_fd = hub_fd;
	conn->persistent = persistent && LOAD(bb->features.flags) & PVF_BB_PERSISTENT;
	pthread_mutex_init(&conn->lock, NULL);
	pthread_cond_init(&conn->changed, NULL);
	conn->arena = calloc(ARENAS, sizeof(struct bb_arena *));
	conn->descriptor = calloc(ARENAS, sizeof(*conn->descriptor));
	rc = conn->arena && conn->descriptor ? 0 : -ENOMEM;
	for (uint32_t i = 0; conn->descriptor && i < ARENAS; i++)
		conn->descriptor[i].fd = -1;
	if (!rc)
		rc = pvf_mapper_open(&conn->mapper, table_fd, maptrack_fd, own_domid,
				     conn->descriptor, ARENAS);
	if (rc) {
		conn->mapper.table = NULL;
		free_conn(conn);
		return rc;
	}
	bb->conn = conn;
	return 0;
}

int pvf_bb_arena(struct pvf_bb *bb, uint16_t number, int fd)
{
	int own = dup(fd), rc;

	if (own < 0)
		return -errno;
	rc = bb->conn ? pvf_mapper_arena(&bb->conn->mapper, number, own) : -ENOTCONN;
	if (rc)
		close(own);
	return rc;
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
	uint32_t failed = 0, arena = 0;
	struct bb_ring *ring;
	int rc;

	if (!conn || conn->rings == PVF_BB_QUEUES || !pages || pages > PVF_BB_RING_PAGES ||
	    (pages & (pages - 1)) || side > 1)
		return explain(why, -EINVAL, "no such ring");
	ring = bb_ring_new(conn);
	if (!ring)
		return explain(why, -ENOMEM, "memory of a ring");
	while ((rc = pvf_mapper_map(&conn->mapper, refs, pages, true, &ring->shared, &failed,
				    &arena)) == -ENXIO &&
	       conn->descriptor[arena].fd < 0)
		if (want_arena(conn, (uint16_t)arena, 0))
			break;
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
