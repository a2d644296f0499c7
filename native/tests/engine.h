/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The disk engine with its socket, in one thread: a client, the engine and a backend, of which each
 * moves when a test says so, or a seeded generator, in pieces of any size. What can wait for ever
 * shows as a state in which nobody can move.
 */
#ifndef PVF_TEST_ENGINE_H
#define PVF_TEST_ENGINE_H

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <linux/nbd.h>

#include "backend.h"
#include "target.h"

#define DISK (1u << 20)
#define LANES 8u
#define LANE (DISK / LANES)
#define OUT (4u << 20)

struct lane { /* one part of the disk with at most one request on it */
	bool busy;
	uint16_t type;
	uint64_t from;
	uint32_t length;
};

static _Alignas(4096) unsigned char ring_pages[16 * 4096];
static size_t ring_bytes = 4096;
static _Alignas(4096) unsigned char pool_pages[352 * 4096];
static unsigned char disk[DISK], model[DISK];
static struct pvf_blk blk;
static struct pvf_target target;
static struct backend backend;
static struct lane lanes[LANES];
static int client = -1, epoll_fd = -1;
static uint64_t seed;
static unsigned char out[OUT];
static uint32_t out_at, out_end;
static unsigned char in_header[16];
static uint32_t in_at; /* bytes of the present reply: header, then data */
static uint64_t replies, refused;
static int error_chance; /* percent */

static inline void setup(uint32_t pages, uint32_t segments, uint64_t new_seed)
{
	uint32_t grefs[PVF_MAX_POOL_PAGES];
	int pair[2], small = 4096;
	struct pvf_geometry geo = {
		.sectors = DISK / 512,
		.sector_size = 512,
		.features = PVF_BLK_FLUSH | PVF_BLK_DISCARD,
		.max_segments = segments,
	};

	if (epoll_fd < 0)
		epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (client >= 0)
		close(client);
	pvf_target_close(&target);
	seed = new_seed;
	memset(pool_pages, 0, sizeof(pool_pages));
	backend_grefs(grefs, pages);
	pvf_blk_init(&blk);
	pvf_blk_attach(&blk, ring_pages, ring_bytes, pool_pages, pages, grefs, false);
	pvf_blk_start(&blk, &geo);
	backend_init(&backend, ring_pages, ring_bytes, pool_pages, pages, disk, DISK);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	client = pair[0];
	setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
	CHECK(!pvf_target_open(&target, pair[1], epoll_fd, 1));
	for (uint32_t i = 0; i < DISK; i++)
		disk[i] = model[i] = (unsigned char)draw(&seed);
	memset(lanes, 0, sizeof(lanes));
	out_at = out_end = in_at = 0;
	replies = refused = 0;
	error_chance = 0;
}

/* The client */

static inline void say(uint16_t type, uint64_t handle, uint64_t from, uint32_t length, uint16_t flags)
{
	struct nbd_request r = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32((uint32_t)flags << 16 | type),
		.from = htobe64(from),
		.len = htobe32(length),
	};

	memcpy(r.handle, &handle, 8);
	CHECK(out_end + sizeof(r) + length <= OUT || type != NBD_CMD_WRITE);
	memcpy(out + out_end, &r, sizeof(r));
	out_end += sizeof(r);
}

static inline bool client_begins(uint32_t largest)
{
	uint32_t k = below(&seed, LANES);
	struct lane *l = &lanes[k];

	if (l->busy)
		return false;
	if (out_at == out_end)
		out_at = out_end = 0;
	if (out_end + largest + 28 > OUT)
		return false;
	static const uint16_t types[] = {NBD_CMD_READ, NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_WRITE,
					 NBD_CMD_FLUSH, NBD_CMD_TRIM};

	l->busy = true;
	l->type = types[below(&seed, 6)];
	l->length = 512 * (1 + below(&seed, below(&seed, 3) ? 16 : largest / 512));
	l->from = (uint64_t)LANE * k + 512 * below(&seed, (LANE - l->length) / 512 + 1);
	if (l->type == NBD_CMD_FLUSH) {
		l->length = 0;
		l->from = 0;
	}
	say(l->type, k, l->from, l->length,
	    l->type == NBD_CMD_WRITE && !below(&seed, 4) ? PVF_NBD_FLAG_FUA : 0);
	if (l->type == NBD_CMD_WRITE)
		for (uint32_t i = 0; i < l->length; i++)
			out[out_end++] = model[l->from + i] = (unsigned char)draw(&seed);
	if (l->type == NBD_CMD_TRIM)
		memset(model + l->from, 0, l->length);
	return true;
}

static inline bool client_sends(void)
{
	uint32_t left = out_end - out_at;

	if (!left)
		return false;
	ssize_t n = send(client, out + out_at, 1 + below(&seed, left), MSG_DONTWAIT);

	if (n > 0)
		out_at += (uint32_t)n;
	return n > 0;
}

static inline bool client_reads(void)
{
	static unsigned char data[LANE];
	uint64_t handle;
	ssize_t n;

	if (in_at < 16) {
		n = recv(client, in_header + in_at, 16 - in_at, MSG_DONTWAIT);
		if (n <= 0)
			return false;
		in_at += (uint32_t)n;
		if (in_at < 16)
			return true;
	}
	memcpy(&handle, in_header + 8, 8);
	CHECK(handle < LANES);
	struct lane *l = &lanes[handle];
	bool failed = in_header[7] != 0;

	CHECK(l->busy);
	CHECK(in_header[0] == 0x67 && in_header[1] == 0x44);
	if (l->type == NBD_CMD_READ && !failed) {
		uint32_t have = in_at - 16;

		n = recv(client, data, 1 + below(&seed, l->length - have), MSG_DONTWAIT);
		if (n <= 0)
			return false;
		CHECK(!memcmp(data, model + l->from + have, (size_t)n));
		in_at += (uint32_t)n;
		if (in_at - 16 < l->length)
			return true;
	}
	if (failed) {
		CHECK(error_chance);
		refused++;
		/* A failed write may have done any part of itself. */
		memcpy(model + l->from, disk + l->from, l->length);
	}
	l->busy = false;
	in_at = 0;
	replies++;
	return true;
}

/* The engine */

static inline bool engine_moves(void)
{
	struct epoll_event events[4];
	int n = epoll_wait(epoll_fd, events, 4, 0);
	uint64_t before = blk.serial + blk.pending;
	uint32_t sent = blk.reply_count, cons = blk.ring.rsp_cons, filled = blk.filled;

	for (int i = 0; i < n; i++)
		pvf_target_event(&target, events[i].events);
	uint32_t available = pvf_ring_poll(&blk.ring, &blk.fault);

	CHECK_EQ(pvf_blk_drain(&blk, available), available);
	bool more = pvf_target_send(&target, &blk);

	more |= pvf_target_receive(&target, &blk, false);
	more |= pvf_target_send(&target, &blk);
	pvf_ring_push(&blk.ring);
	CHECK_EQ(blk.fault.rule, 0);
	return more || n || available || before != blk.serial + blk.pending ||
	       sent != blk.reply_count || cons != blk.ring.rsp_cons || filled != blk.filled;
}

static inline bool backend_moves(void)
{
	backend_take(&backend);
	if (!backend.held)
		return false;
	for (uint32_t n = 1 + below(&seed, backend.held); n; n--) {
		bool fail = error_chance && below(&seed, 100) < (uint32_t)error_chance;

		backend_answer(&backend, below(&seed, backend.held),
			       fail ? BLKIF_RSP_ERROR : BLKIF_RSP_OKAY);
	}
	return true;
}

static inline void nothing_is_held(void)
{
	CHECK_EQ(blk.in_flight, 0);
	CHECK_EQ(blk.pending, 0);
	CHECK_EQ(blk.pool.free, blk.pool.pages);
	CHECK_EQ(blk.free_requests, PVF_REQUESTS);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
	CHECK_EQ(pvf_ring_free(&blk.ring), blk.ring.entries);
	CHECK(pvf_blk_portable(&blk));
}

static inline bool anyone_moves(void)
{
	bool moved = false;

	for (int i = 0; i < 3; i++) {
		moved |= client_sends();
		moved |= engine_moves();
		moved |= backend_moves();
		moved |= client_reads();
	}
	return moved;
}

static inline void finish(void)
{
	uint32_t busy = 1;

	while (busy) {
		bool moved = anyone_moves();

		busy = out_end - out_at;
		for (uint32_t i = 0; i < LANES; i++)
			busy += lanes[i].busy;
		CHECK(moved || !busy); /* else everyone waits for everyone */
	}
	engine_moves();
	CHECK(!target.gone);
	nothing_is_held();
	CHECK(!memcmp(disk, model, DISK));
}

static inline void somebody_moves(uint32_t who, uint32_t largest)
{
	switch (who) {
	case 0:
		client_begins(largest);
		break;
	case 1:
		client_sends();
		break;
	case 2:
		engine_moves();
		break;
	case 3:
		backend_moves();
		break;
	default:
		client_reads();
	}
}

/* All that is in the ring is answered, of a client that has left. */
static inline void ring_empties(void)
{
	backend_take(&backend);
	while (backend.held)
		backend_moves();
	uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

	CHECK_EQ(pvf_blk_drain(&blk, n), n);
	nothing_is_held();
}

static inline void run(uint32_t pages, uint32_t segments, uint32_t largest, int steps, uint64_t s,
		int errors)
{
	setup(pages, segments, s);
	error_chance = errors;
	for (int i = 0; i < steps; i++) {
		somebody_moves(below(&seed, 5), largest);
		CHECK(!target.gone);
	}
	finish();
	CHECK(replies > (uint64_t)steps / 100);
}

static inline void until_idle(void)
{
	while (engine_moves())
		;
}

static inline void send_all(void)
{
	while (out_at < out_end) {
		ssize_t n = send(client, out + out_at, out_end - out_at, MSG_DONTWAIT);

		CHECK(n > 0);
		out_at += (uint32_t)n;
	}
}

static inline uint32_t reply_error(void)
{
	unsigned char r[16];

	CHECK_EQ(recv(client, r, 16, MSG_DONTWAIT), 16);
	return r[7];
}

#endif
