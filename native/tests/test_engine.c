/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The disk engine with its socket, in one thread: a client, the engine and a backend each move when
 * a seeded generator says so, in any order and in pieces of any size. What can wait for ever shows as
 * a state in which nobody can move.
 */
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

static void setup(uint32_t pages, uint32_t segments, uint64_t new_seed)
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

static void say(uint16_t type, uint64_t handle, uint64_t from, uint32_t length, uint16_t flags)
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

static bool client_begins(uint32_t largest)
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

static bool client_sends(void)
{
	uint32_t left = out_end - out_at;

	if (!left)
		return false;
	ssize_t n = send(client, out + out_at, 1 + below(&seed, left), MSG_DONTWAIT);

	if (n > 0)
		out_at += (uint32_t)n;
	return n > 0;
}

static bool client_reads(void)
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

static bool engine_moves(void)
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

static bool backend_moves(void)
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

static void nothing_is_held(void)
{
	CHECK_EQ(blk.in_flight, 0);
	CHECK_EQ(blk.pending, 0);
	CHECK_EQ(blk.pool.free, blk.pool.pages);
	CHECK_EQ(blk.free_requests, PVF_REQUESTS);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
	CHECK_EQ(pvf_ring_free(&blk.ring), blk.ring.entries);
	CHECK(pvf_blk_portable(&blk));
}

static bool anyone_moves(void)
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

static void finish(void)
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

static void run(uint32_t pages, uint32_t segments, uint32_t largest, int steps, uint64_t s,
		int errors)
{
	setup(pages, segments, s);
	error_chance = errors;
	for (int i = 0; i < steps; i++) {
		switch (below(&seed, 5)) {
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
		CHECK(!target.gone);
	}
	finish();
	CHECK(replies > (uint64_t)steps / 100);
}

static void roomy(void)
{
	for (uint64_t s = 1; s <= 8; s++)
		run(352, 11, LANE, 20000, s, 0);
}

static void tight(void)
{
	static const uint32_t pools[] = {2, 3, 4, 7, 12, 22, 23, 30};

	for (uint64_t s = 1; s <= 24; s++)
		run(pools[s % 8], 1 + (uint32_t)(s * 5 % 11), LANE, 8000, s * 77, 0);
}

static void indirect(void)
{
	static const uint32_t pools[] = {24, 26, 40, 64, 90, 352}, most[] = {12, 16, 30, 32, 256};

	for (uint64_t s = 1; s <= 30; s++) {
		/* In a small pool reads stream, and one of those that fails ends the connection. */
		run(pools[s % 6], most[s % 5], LANE, 6000, s * 13, s % 6 < 5 ? 0 : 10);
		CHECK(blk.stats.indirect);
	}
}

static void deep_ring(void)
{
	for (ring_bytes = 8192; ring_bytes <= sizeof(ring_pages); ring_bytes *= 2) {
		run(352, 11, LANE, 8000, ring_bytes, 0);
		CHECK_EQ(blk.ring.entries, ring_bytes / 128); /* 112 bytes each, a power of two */
	}
	ring_bytes = 4096;
}

static void failing(void)
{
	for (uint64_t s = 1; s <= 8; s++) {
		run(352, 11, LANE, 10000, s * 1001, 10);
		CHECK(refused);
	}
}

/* Directed cases */

static void until_idle(void)
{
	while (engine_moves())
		;
}

static void send_all(void)
{
	while (out_at < out_end) {
		ssize_t n = send(client, out + out_at, out_end - out_at, MSG_DONTWAIT);

		CHECK(n > 0);
		out_at += (uint32_t)n;
	}
}

static uint32_t reply_error(void)
{
	unsigned char r[16];

	CHECK_EQ(recv(client, r, 16, MSG_DONTWAIT), 16);
	return r[7];
}

static void no_data(void)
{
	unsigned char canary[4096], got[65536];

	setup(2, 1, 5);
	memset(canary, 0xc7, sizeof(canary));
	say(NBD_CMD_WRITE, 1, 0, 4096, 0);
	memcpy(out + out_end, canary, 4096);
	out_end += 4096;
	send_all();
	until_idle();
	backend_take(&backend);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), 0);

	say(NBD_CMD_READ, 2, 8192, 4096, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	backend_answer(&backend, 0, BLKIF_RSP_ERROR);
	until_idle();
	CHECK_EQ(reply_error(), PVF_NBD_EIO);
	CHECK_EQ(recv(client, got, sizeof(got), MSG_DONTWAIT), -1); /* no payload at all */

	/* One that claims success without writing: zeroes, not the canary. */
	say(NBD_CMD_READ, 3, 8192, 4096, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	backend.held = 0;
	memset(backend.in_use, 0, sizeof(backend.in_use));
	backend_respond(&backend, backend.request[0].id, BLKIF_OP_READ, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), 0);
	CHECK_EQ(recv(client, got, sizeof(got), MSG_DONTWAIT), 4096);
	for (int i = 0; i < 4096; i++)
		CHECK_EQ(got[i], 0);
}

static void status_maps(int16_t status, uint8_t type, uint32_t expected, uint32_t off)
{
	setup(22, 11, 9);
	say(type, 1, 0, type == NBD_CMD_FLUSH ? 0 : 512, 0);
	if (type == NBD_CMD_WRITE)
		out_end += 512;
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	backend_answer(&backend, 0, status);
	until_idle();
	CHECK_EQ(reply_error(), expected);
	CHECK_EQ(blk.features_off, off);
	nothing_is_held();
}

static void rule7(void)
{
	status_maps(BLKIF_RSP_ERROR, NBD_CMD_WRITE, PVF_NBD_EIO, 0);
	status_maps(1, NBD_CMD_WRITE, PVF_NBD_EIO, 0);
	status_maps(-77, NBD_CMD_READ, PVF_NBD_EIO, 0);
	status_maps(INT16_MIN, NBD_CMD_FLUSH, PVF_NBD_EIO, 0);
	status_maps(BLKIF_RSP_EOPNOTSUPP, NBD_CMD_READ, PVF_NBD_EIO, 0);
	status_maps(BLKIF_RSP_EOPNOTSUPP, NBD_CMD_FLUSH, PVF_NBD_ENOTSUP, PVF_BLK_FLUSH);
	status_maps(BLKIF_RSP_EOPNOTSUPP, NBD_CMD_TRIM, PVF_NBD_ENOTSUP, PVF_BLK_DISCARD);
}

static void hostile(uint64_t id_change, uint8_t op, uint32_t rule)
{
	setup(22, 11, 9);
	say(NBD_CMD_READ, 1, 0, 512, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	backend_respond(&backend, backend.request[0].id ^ id_change, op, BLKIF_RSP_OKAY);
	CHECK_EQ(pvf_ring_poll(&blk.ring, &blk.fault), 1);
	CHECK_EQ(pvf_blk_drain(&blk, 1), 0);
	CHECK_EQ(blk.fault.rule, rule);
}

static void rule5(void)
{
	hostile(1, BLKIF_OP_READ, 5);             /* another entry */
	hostile(0xffff, BLKIF_OP_READ, 5);        /* out of range */
	hostile(1ull << 16, BLKIF_OP_READ, 5);    /* the entry's earlier life */
	hostile(1ull << 63, BLKIF_OP_READ, 5);
}

static void duplicate(void)
{
	setup(22, 11, 9);
	for (int i = 0; i < 2; i++)
		say(NBD_CMD_READ, 1, 0, 512, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 2);
	backend_respond(&backend, backend.request[0].id, BLKIF_OP_READ, BLKIF_RSP_OKAY);
	backend_respond(&backend, backend.request[0].id, BLKIF_OP_READ, BLKIF_RSP_OKAY);
	CHECK_EQ(pvf_ring_poll(&blk.ring, &blk.fault), 2);
	CHECK_EQ(pvf_blk_drain(&blk, 2), 1);
	CHECK_EQ(blk.fault.rule, 5);
}

static void rule6(void)
{
	hostile(0, BLKIF_OP_WRITE, 6);
	hostile(0, 255, 6);
}

static void fua(void)
{
	setup(22, 11, 9);
	say(NBD_CMD_WRITE, 1, 0, 1024, PVF_NBD_FLAG_FUA);
	out_end += 1024;
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	CHECK_EQ(backend.request[0].operation, BLKIF_OP_WRITE);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(blk.reply_count, 0);
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	CHECK_EQ(backend.request[0].operation, BLKIF_OP_FLUSH_DISKCACHE);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), 0);
	nothing_is_held();
}

static void barrier(void)
{
	setup(22, 11, 9);
	blk.geo.features = PVF_BLK_BARRIER;
	say(NBD_CMD_FLUSH, 1, 0, 0, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	CHECK_EQ(backend.request[0].operation, BLKIF_OP_WRITE_BARRIER);
	backend_answer(&backend, 0, BLKIF_RSP_EOPNOTSUPP);
	until_idle();
	CHECK_EQ(reply_error(), PVF_NBD_ENOTSUP);
	CHECK_EQ(blk.features_off, PVF_BLK_FLUSH);
	say(NBD_CMD_WRITE, 2, 0, 512, PVF_NBD_FLAG_FUA);
	out_end += 512;
	send_all();
	until_idle();
	CHECK_EQ(reply_error(), PVF_NBD_EINVAL);
	nothing_is_held();
}

/* What an indirect request's descriptors leave in their page is no later request's data. */
static void descriptors(void)
{
	unsigned char got[4096];

	setup(40, 16, 9);
	for (int i = 0; i < 2; i++) {
		say(NBD_CMD_READ, 1, 0, 65536, 0);
		send_all();
		until_idle();
		backend_take(&backend);
		CHECK_EQ(backend.held, 1);
		CHECK(backend.request[0].indirect);
		CHECK_EQ(backend.request[0].nr_segments, 16);
		/* It claims success and writes nothing. */
		backend.held = 0;
		memset(backend.in_use, 0, sizeof(backend.in_use));
		backend_respond(&backend, backend.request[0].id, BLKIF_OP_READ, BLKIF_RSP_OKAY);
		until_idle();
		CHECK_EQ(reply_error(), 0);
		for (size_t left = 65536; left;) {
			ssize_t n = recv(client, got, sizeof(got), MSG_DONTWAIT);

			CHECK(n > 0);
			left -= (size_t)n;
			while (n--)
				CHECK_EQ(got[n], 0);
			until_idle();
		}
		nothing_is_held();
	}
}

/* Without a stream: what a target does that brings and takes its data itself. */
static void one_by_one(void)
{
	struct pvf_nbd_request n = {.type = NBD_CMD_READ, .handle = "reading", .length = 65536};
	struct pvf_answer answer;
	struct iovec iov[16];
	uint32_t from = 5000, at = from;
	int count;

	setup(40, 7, 9);
	CHECK(pvf_blk_whole(&blk, n.length));
	CHECK(!pvf_blk_whole(&blk, 40 * 4096));
	blk.now = 1000000;
	pvf_blk_begin(&blk, &n);
	CHECK_EQ(pvf_blk_step(&blk), PVF_STEP_HEADER);
	CHECK(!pvf_blk_answer(&blk, &answer));
	pvf_ring_push(&blk.ring);
	backend_take(&backend);
	CHECK_EQ(backend.held, 3);
	while (backend.held)
		backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	CHECK_EQ(pvf_blk_drain(&blk, pvf_ring_poll(&blk.ring, &blk.fault)), 3);
	CHECK(pvf_blk_answer(&blk, &answer));
	CHECK_EQ(answer.error, 0);
	CHECK_EQ(answer.bytes, n.length);
	CHECK(!memcmp(answer.handle, n.handle, 8));
	while (at < n.length) {
		count = pvf_blk_answer_data(&blk, at, iov, 2);
		CHECK(count >= 1 && count <= 2);
		for (int i = 0; i < count; i++) {
			CHECK(!memcmp(iov[i].iov_base, disk + at, iov[i].iov_len));
			at += (uint32_t)iov[i].iov_len;
		}
	}
	CHECK_EQ(at, n.length);
	blk.now += 9000000;
	pvf_blk_answered(&blk);
	CHECK_EQ(blk.stats.read.latency[13], 1); /* 9 ms: 8192 to 16384 us */
	CHECK(!pvf_blk_answer(&blk, &answer));
	nothing_is_held();
}

static void trims(uint64_t from, uint32_t length, uint64_t sector, uint64_t sectors)
{
	setup(22, 11, 9);
	blk.geo.discard_granularity = 65536;
	blk.geo.discard_alignment = 4096;
	say(NBD_CMD_TRIM, 1, from, length, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, sectors ? 1 : 0);
	if (sectors) {
		CHECK_EQ(backend.request[0].sector_number, sector);
		CHECK_EQ(backend.request[0].nr_sectors, sectors);
		backend_answer(&backend, 0, BLKIF_RSP_OKAY);
		until_idle();
	}
	CHECK_EQ(reply_error(), 0);
}

static void granularity(void)
{
	trims(4096, 65536, 8, 128);
	trims(4096 + 512, 65536, 0, 0);
	trims(0, 1 << 20, 8, 15 * 128);
	trims(4096 + 65536 - 512, 65536 + 1024, 8 + 128, 128);
	trims(0, 512, 0, 0);
}

static void refused_write(void)
{
	setup(22, 11, 9);
	say(NBD_CMD_WRITE, 1, DISK, 100000 / 512 * 512, 0);
	out_end += 100000 / 512 * 512;
	say(NBD_CMD_READ, 2, 0, 512, 0);
	while (out_at < out_end || backend.taken == 0) {
		CHECK(client_sends() || out_at == out_end);
		until_idle();
		backend_take(&backend);
	}
	CHECK_EQ(reply_error(), PVF_NBD_ENOSPC);
	CHECK_EQ(backend.request[0].operation, BLKIF_OP_READ);
	CHECK_EQ(backend.taken, 1);
}

/* Neither slots nor pages nor bytes end this intake: only the bound does. */
static void bounded(void)
{
	const uint32_t many = PVF_REQUESTS - 12;

	setup(22, 11, 9);
	for (uint32_t i = 0; i < many; i++)
		say(NBD_CMD_READ, i, 1, 512, 0);
	send_all();
	CHECK(pvf_target_receive(&target, &blk, false));
	CHECK(blk.pending && blk.pending <= many * 3 / 4);
	until_idle();
	for (uint32_t i = 0; i < many; i++)
		CHECK_EQ(reply_error(), PVF_NBD_EINVAL);
}

static void magic(void)
{
	setup(22, 11, 9);
	memset(out, 'x', 28);
	out_end = 28;
	send_all();
	until_idle();
	CHECK(target.gone);
	CHECK_EQ(target.error, EPROTO);
}

static void disconnect(void)
{
	setup(22, 11, 9);
	say(NBD_CMD_READ, 1, 0, 512, 0);
	say(NBD_CMD_DISC, 2, 0, 0, 0);
	say(NBD_CMD_READ, 3, 0, 512, 0); /* after the end: not served */
	send_all();
	until_idle();
	CHECK(!target.gone);
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	engine_moves();
	CHECK_EQ(reply_error(), 0);
	CHECK(target.gone);
	CHECK_EQ(target.error, 0);
}

/* What it sent and its end come in one edge: the last bytes do not hide the end. */
static void leaving(void)
{
	for (int half = 0; half < 2; half++) {
		setup(22, 11, 9);
		send(client, "xyz", 3, 0);
		if (half) {
			shutdown(client, SHUT_WR);
		} else {
			close(client);
			client = -1;
		}
		until_idle();
		CHECK(target.gone);
		CHECK_EQ(target.error, ECONNRESET);
	}
}

static void stream_fails(void)
{
	setup(8, 2, 9); /* 2 reserved: reads of more than 24 KiB stream */
	say(NBD_CMD_READ, 1, 0, 40960, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 3);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), 0); /* it has begun */
	backend_take(&backend);
	while (backend.held)
		backend_answer(&backend, 0, BLKIF_RSP_ERROR);
	until_idle();
	CHECK(target.gone);
	CHECK_EQ(target.error, EIO);
	pvf_blk_drop_target(&blk);
	nothing_is_held();
}

static void stream_fails_first(void)
{
	setup(8, 2, 9);
	say(NBD_CMD_READ, 1, 0, 40960, 0);
	send_all();
	until_idle();
	backend_take(&backend);
	uint64_t first = backend.request[0].id;

	backend_answer(&backend, 2, BLKIF_RSP_OKAY); /* out of order: it must not begin yet */
	until_idle();
	CHECK_EQ(blk.reply_count, 0);
	CHECK_EQ(backend.request[0].id, first);
	backend_answer(&backend, 0, BLKIF_RSP_ERROR);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), PVF_NBD_EIO);
	CHECK(!target.gone);
	nothing_is_held();
}

static void lost_target(void)
{
	for (uint64_t s = 1; s <= 30; s++) {
		setup(22, 1 + (uint32_t)(s % 11), s);
		for (int i = 0; i < 3000; i++) {
			if (below(&seed, 2))
				client_begins(LANE);
			client_sends();
			engine_moves();
			if (below(&seed, 3))
				backend_moves();
			if (below(&seed, 2))
				client_reads();
		}
		pvf_target_close(&target);
		pvf_blk_drop_target(&blk);
		backend_take(&backend);
		while (backend.held)
			backend_moves();
		uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

		CHECK_EQ(pvf_blk_drain(&blk, n), n);
		nothing_is_held();
	}
}

static void no_reader(void)
{
	/* Reads until the pool is theirs; a write behind the last that fits must still finish. */
	setup(30, 4, 9);
	for (int i = 0; i < 26; i++) /* all that reads may take */
		say(NBD_CMD_READ, 1, 0, 4096, 0);
	say(NBD_CMD_WRITE, 2, 0, 65536, 0);
	out_end += 65536;
	uint64_t done = 0;

	for (int i = 0; i < 200; i++) {
		client_sends();
		until_idle();
		backend_take(&backend);
		while (backend.held) {
			done += backend.request[0].operation == BLKIF_OP_WRITE;
			backend_answer(&backend, 0, BLKIF_RSP_OKAY);
		}
		until_idle();
	}
	CHECK_EQ(done, 4);
	CHECK_EQ(blk.current, PVF_NONE);
}

static void resized(void)
{
	struct pvf_geometry geo;

	setup(22, 2, 9);
	say(NBD_CMD_WRITE, 1, DISK - 65536, 65536, 0);
	out_end += 65536;
	say(NBD_CMD_READ, 2, 0, 512, 0);
	uint32_t whole = out_end;

	out_end = 28 + 10000; /* the header and some of the payload */
	send_all();
	until_idle();
	backend_take(&backend);
	CHECK_EQ(backend.held, 1);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	geo = blk.geo;
	geo.sectors = (DISK - 65536) / 512;
	pvf_blk_start(&blk, &geo);
	out_end = whole;
	send_all();
	until_idle();
	CHECK_EQ(reply_error(), PVF_NBD_ENOSPC);
	backend_take(&backend);
	CHECK_EQ(backend.held, 1); /* the read: the stream is still understood */
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	until_idle();
	CHECK_EQ(reply_error(), 0);
	nothing_is_held();
}

int main(void)
{
	static const struct test tests[] = {
		{"random requests through a roomy pool keep their data", roomy},
		{"random requests through pools of 2 to 30 pages keep their data and never stick",
		 tight},
		{"random requests as indirect ones keep their data and never stick", indirect},
		{"random requests through rings of 2 to 16 pages keep their data", deep_ring},
		{"failing requests are answered with errors and hold nothing afterwards", failing},
		{"rule 19: a failed or empty read returns no stale pool contents", no_data},
		{"rule 5: a response with an unknown id breaks the ring", rule5},
		{"rule 5: a second response to a request breaks the ring", duplicate},
		{"rule 6: a response with another operation breaks the ring", rule6},
		{"rule 7: unknown status is EIO, EOPNOTSUPP turns the feature off", rule7},
		{"FUA is a write followed by a flush, answered after both", fua},
		{"without flush a barrier is the flush, and one that fails turns flushes off", barrier},
		{"an indirect request's descriptors are no later read's data", descriptors},
		{"requests can be answered one by one, with their time", one_by_one},
		{"a trim is cut to whole discard granules", granularity},
		{"the payload of a refused write is thrown away", refused_write},
		{"rule 8: a turn takes a bounded number of requests", bounded},
		{"a wrong magic ends the connection", magic},
		{"a disconnect ends the connection after the last reply", disconnect},
		{"a client that leaves right after it has sent something has left", leaving},
		{"a streamed read that fails after its header ends the connection", stream_fails},
		{"a streamed read that fails at its first piece gets an error", stream_fails_first},
		{"a lost target leaves nothing behind once the ring is empty", lost_target},
		{"a write never waits for a client that does not read", no_reader},
		{"a write that a resize has cut off fails and the stream goes on", resized},
	};

	return RUN_TESTS(tests);
}
