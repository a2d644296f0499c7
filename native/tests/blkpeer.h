/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A small frontend for the tests of the block backend, written with io/ring.h's types and nothing
 * of ours, and the pieces of a hub that it needs: a grant table, an arena, event channels.
 */
#ifndef PVF_TEST_BLKPEER_H
#define PVF_TEST_BLKPEER_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define xen_mb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#include <xen/xen.h>
#include <xen/io/blkif.h>

#include "blkback.h"
#include "channel.h"
#include "check.h"
#include "grants.h"

#define PAGE 4096u
#define FRONT_DOMID 7
#define BACK_DOMID 0
#define ARENA 3
#define PAGES 640u /* ring pages first, then data */
#define GREF(page) (40u + 3u * (page)) /* of an arena's page */
#define DATA(page) (16u * QUEUES_MAX + (page))
#define QUEUES_MAX 2u
#define DISK (8u << 20)
#define DEADLINE 60000 /* ms */

/* Waits for a state; says which one never came. */
#define UNTIL(cond)                                                                       \
	do {                                                                              \
		for (int ms_ = 0; !(cond); ms_++) {                                       \
			if (ms_ == DEADLINE) {                                            \
				printf("Bail out! %s:%d: never came: %s\n", __FILE__,     \
				       __LINE__, #cond);                                  \
				fflush(stdout);                                           \
				CHECK_FAILED();                                           \
			}                                                                 \
			usleep(1000);                                                     \
		}                                                                         \
	} while (0)

struct queue {
	blkif_front_ring_t ring;
	struct pvf_channel *channel;
	int channel_fd, fd[2]; /* eventfds: ours, the backend's */
	uint64_t events;
};

struct peer {
	struct pvf_bb *bb;
	struct pvf_bb_features features;
	int table_fd, track_fd, arena_fd;
	struct pvf_grant *table;
	unsigned char *arena;
	struct queue queue[QUEUES_MAX];
	uint32_t queues, order;
	bool persistent;
	uint64_t next_id;
};

static const struct pvf_bb_features honest = {
	.flags = PVF_BB_FLUSH | PVF_BB_BARRIER | PVF_BB_DISCARD | PVF_BB_PERSISTENT,
	.max_indirect = 256,
	.sector_size = 512,
	.discard_granularity = 4096,
	.max_persistent = 1056,
	.batch = 16,
};

static inline void *shared_memory(size_t bytes, int *fd)
{
	*fd = memfd_create("test", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	CHECK(*fd >= 0);
	CHECK(!ftruncate(*fd, (off_t)bytes));
	CHECK(!fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK));
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static inline unsigned char *data(struct peer *p, uint32_t page)
{
	return p->arena + (size_t)DATA(page) * PAGE;
}

static inline uint32_t gref(uint32_t page)
{
	return GREF(DATA(page));
}

static inline void peer_ring(struct peer *p, uint32_t n)
{
	struct queue *q = &p->queue[n];
	uint32_t pages = 1u << p->order, refs[16];
	blkif_sring_t *shared = (blkif_sring_t *)(void *)(p->arena + (size_t)n * 16 * PAGE);
	char why[PVF_BB_TEXT] = "";

	memset(shared, 0, pages * PAGE);
	XEN_FRONT_RING_INIT(&q->ring, shared, pages * PAGE);
	for (uint32_t i = 0; i < pages; i++)
		refs[i] = GREF(n * 16 + i);
	q->channel = shared_memory(4096, &q->channel_fd);
	pvf_channel_init(q->channel);
	for (int i = 0; i < 2; i++)
		CHECK((q->fd[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
	q->events = 0;
	CHECK_EQ(pvf_bb_ring(p->bb, refs, pages, q->channel_fd, 1, q->fd[1], q->fd[0], why), 0);
}

static inline int peer_connect(struct peer *p)
{
	int rc = pvf_bb_connect(p->bb, p->table_fd, p->track_fd, BACK_DOMID, FRONT_DOMID, -1,
				p->persistent);

	if (rc)
		return rc;
	CHECK_EQ(pvf_bb_arena(p->bb, ARENA, p->arena_fd), 0);
	for (uint32_t i = 0; i < p->queues; i++)
		peer_ring(p, i);
	return pvf_bb_start(p->bb);
}

/* `path` NULL: a disk in memory. Queues, order and features are taken from `p`. */
static inline void peer_begin(struct peer *p, const char *path, uint64_t bytes)
{
	int error;

	if (!p->queues)
		p->queues = 1;
	if (!p->features.batch)
		p->features = honest;
	p->table = shared_memory(PVF_GRANTS * sizeof(struct pvf_grant), &p->table_fd);
	munmap(shared_memory(PVF_GRANTS * sizeof(uint32_t), &p->track_fd),
	       PVF_GRANTS * sizeof(uint32_t));
	p->arena = shared_memory(PAGES * PAGE, &p->arena_fd);
	for (uint32_t i = 0; i < PAGES; i++)
		pvf_grant_begin(&p->table[GREF(i)], BACK_DOMID, ARENA, i, true);
	p->bb = pvf_bb_new(path, bytes, &p->features, &error);
	CHECK_EQ(error, 0);
	CHECK_EQ(peer_connect(p), 0);
}

static inline void peer_let_go(struct peer *p)
{
	for (uint32_t i = 0; i < p->queues; i++) {
		struct queue *q = &p->queue[i];

		munmap(q->channel, 4096);
		close(q->channel_fd);
		close(q->fd[0]);
		close(q->fd[1]);
	}
}

/* Everything ended, nothing left mapped. */
static inline void peer_end(struct peer *p)
{
	pvf_bb_free(p->bb);
	for (uint32_t i = 0; i < PAGES; i++)
		CHECK_EQ(pvf_grant_maps(&p->table[GREF(i)]), 0);
	peer_let_go(p);
	munmap(p->table, PVF_GRANTS * sizeof(struct pvf_grant));
	munmap(p->arena, PAGES * PAGE);
	close(p->table_fd);
	close(p->track_fd);
	close(p->arena_fd);
}

/* Requests */

static inline struct blkif_request *new_request(struct peer *p, uint32_t n)
{
	struct queue *q = &p->queue[n];

	CHECK(!RING_FULL(&q->ring));
	struct blkif_request *req = RING_GET_REQUEST(&q->ring, q->ring.req_prod_pvt);

	q->ring.req_prod_pvt++;
	memset(req, 0, sizeof(*req));
	req->id = ++p->next_id;
	return req;
}

static inline uint64_t put(struct peer *p, uint8_t op, uint64_t sector, uint32_t page,
			   uint32_t pages)
{
	struct blkif_request *req = new_request(p, 0);

	req->operation = op;
	req->sector_number = sector;
	req->nr_segments = (uint8_t)pages;
	for (uint32_t i = 0; i < pages && i < 11; i++)
		req->seg[i] = (struct blkif_request_segment){gref(page + i), 0, 7};
	return req->id;
}

static inline uint64_t put_part(struct peer *p, uint8_t op, uint64_t sector, uint32_t ref,
				uint8_t first, uint8_t last)
{
	struct blkif_request *req = new_request(p, 0);

	req->operation = op;
	req->sector_number = sector;
	req->nr_segments = 1;
	req->seg[0] = (struct blkif_request_segment){ref, first, last};
	return req->id;
}

static inline uint64_t put_discard(struct peer *p, uint64_t sector, uint64_t sectors)
{
	struct blkif_request_discard *req = (void *)new_request(p, 0);

	req->operation = BLKIF_OP_DISCARD;
	req->sector_number = sector;
	req->nr_sectors = sectors;
	return req->id;
}

/* The descriptors go into data page `table`. */
static inline uint64_t put_indirect(struct peer *p, uint8_t op, uint64_t sector, uint32_t page,
				    uint32_t pages, uint32_t table)
{
	struct blkif_request_indirect *req = (void *)new_request(p, 0);
	struct blkif_request_segment *segment = (void *)data(p, table);

	req->operation = BLKIF_OP_INDIRECT;
	req->indirect_op = op;
	req->nr_segments = (uint16_t)pages;
	req->sector_number = sector;
	req->indirect_grefs[0] = gref(table);
	for (uint32_t i = 0; i < pages; i++)
		segment[i] = (struct blkif_request_segment){gref(page + i), 0, 7};
	return req->id;
}

/* Publishes; true: the backend wanted an event, and got it. */
static inline bool push_queue(struct peer *p, uint32_t n)
{
	struct queue *q = &p->queue[n];
	blkif_sring_t *s = q->ring.sring;
	RING_IDX old = __atomic_load_n(&s->req_prod, __ATOMIC_RELAXED), new = q->ring.req_prod_pvt;

	__atomic_store_n(&s->req_prod, new, __ATOMIC_SEQ_CST);
	if ((RING_IDX)(new - __atomic_load_n(&s->req_event, __ATOMIC_SEQ_CST)) >= new - old)
		return false;
	CHECK_EQ(pvf_channel_notify(q->channel, 0, q->fd[1]), 0);
	return true;
}

static inline bool push(struct peer *p)
{
	return push_queue(p, 0);
}

static inline uint64_t clock_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Waits up to `ms` for an event; true: it came (and is taken). */
static inline bool event(struct peer *p, uint32_t n, int ms)
{
	struct queue *q = &p->queue[n];
	struct pollfd fd = {.fd = q->fd[0], .events = POLLIN};
	uint64_t end = clock_ms() + (uint64_t)ms;

	do {
		uint64_t now = clock_ms();

		if (poll(&fd, 1, now < end ? (int)(end - now) : 0) <= 0)
			return false;
		if (pvf_channel_take(q->channel, 0, q->fd[0])) {
			q->events++;
			CHECK_EQ(pvf_channel_unmask(q->channel, 0, q->fd[0]), 0);
			return true;
		}
	} while (clock_ms() < end);
	return false;
}

/* The next response; false: none within `ms`. Sleeps as a frontend does: rsp_event, look, wait. */
static inline bool try_response(struct peer *p, uint32_t n, struct blkif_response *rsp, int ms)
{
	struct queue *q = &p->queue[n];
	blkif_sring_t *s = q->ring.sring;
	uint64_t end = clock_ms() + (uint64_t)ms;

	while (__atomic_load_n(&s->rsp_prod, __ATOMIC_SEQ_CST) == q->ring.rsp_cons) {
		__atomic_store_n(&s->rsp_event, q->ring.rsp_cons + 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&s->rsp_prod, __ATOMIC_SEQ_CST) != q->ring.rsp_cons)
			break;
		uint64_t now = clock_ms();

		if (now >= end || !event(p, n, (int)(end - now)))
			return false;
	}
	*rsp = *RING_GET_RESPONSE(&q->ring, q->ring.rsp_cons);
	q->ring.rsp_cons++;
	return true;
}

static inline struct blkif_response response_of(struct peer *p, uint32_t n)
{
	struct blkif_response rsp;

	CHECK(try_response(p, n, &rsp, DEADLINE));
	return rsp;
}

static inline struct blkif_response response(struct peer *p)
{
	return response_of(p, 0);
}

static inline bool silent(struct peer *p, int ms)
{
	struct blkif_response rsp;

	return !try_response(p, 0, &rsp, ms);
}

/* Pushes what was put last and waits for its answer, which must be for it. */
static inline int16_t answer_of(struct peer *p, uint64_t id, uint8_t op)
{
	push(p);
	struct blkif_response rsp = response(p);

	CHECK_EQ(rsp.id, id);
	CHECK_EQ(rsp.operation, op);
	return rsp.status;
}

static inline int16_t do_io(struct peer *p, uint8_t op, uint64_t sector, uint32_t page,
			    uint32_t pages)
{
	return answer_of(p, put(p, op, sector, page, pages), op);
}

static inline struct pvf_bb_stats stats(struct peer *p)
{
	struct pvf_bb_stats s;

	pvf_bb_get_stats(p->bb, &s);
	return s;
}

/* Pages of a known content: each word says which it is. */
static inline void paint(struct peer *p, uint32_t page, uint32_t pages, uint64_t seed)
{
	uint64_t *w = (uint64_t *)(void *)data(p, page);

	for (size_t i = 0; i < pages * (PAGE / 8); i++)
		w[i] = seed * 1000003 + i;
}

static inline bool painted(struct peer *p, uint32_t page, uint32_t pages, uint64_t seed)
{
	uint64_t *w = (uint64_t *)(void *)data(p, page);

	for (size_t i = 0; i < pages * (PAGE / 8); i++)
		if (__atomic_load_n(&w[i], __ATOMIC_RELAXED) != seed * 1000003 + i)
			return false;
	return true;
}

static inline void wipe(struct peer *p, uint32_t page, uint32_t pages, int byte)
{
	memset(data(p, page), byte, (size_t)pages * PAGE);
}

static inline bool wiped(struct peer *p, uint32_t page, uint32_t pages, int byte)
{
	for (size_t i = 0; i < (size_t)pages * PAGE; i++)
		if (data(p, page)[i] != (unsigned char)byte)
			return false;
	return true;
}

#endif
