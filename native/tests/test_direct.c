/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A program's requests and the engine, in one thread: a program, the engine and a backend each move
 * when a seeded generator says so. What can wait for ever shows as a state in which nobody can move.
 */
#include <errno.h>

#include <linux/nbd.h>

#include "backend.h"
#include "direct.h"

#define DISK (4u << 20)
#define LANES 16u
#define LANE (DISK / LANES)

struct lane { /* one part of the disk with at most one request on it */
	bool busy;
	uint16_t type;
	uint64_t from;
	uint32_t length;
	unsigned char data[LANE];
};

static _Alignas(4096) unsigned char ring_pages[16 * 4096];
static _Alignas(4096) unsigned char pool_pages[PVF_MAX_POOL_PAGES * 4096];
static unsigned char disk[DISK], model[DISK];
static struct pvf_blk blk;
static struct pvf_direct direct;
static struct backend backend;
static struct lane lanes[LANES];
static uint64_t seed, completed, failed;

static void connect(size_t ring_bytes, uint32_t pages, uint32_t segments, uint32_t features)
{
	uint32_t grefs[PVF_MAX_POOL_PAGES];
	struct pvf_geometry geo = {
		.sectors = DISK / 512,
		.sector_size = 512,
		.features = features,
		.max_segments = segments,
	};

	memset(pool_pages, 0, sizeof(pool_pages));
	backend_grefs(grefs, pages);
	pvf_blk_attach(&blk, ring_pages, ring_bytes, pool_pages, pages, grefs, false);
	pvf_blk_start(&blk, &geo);
	backend_init(&backend, ring_pages, ring_bytes, pool_pages, pages, disk, DISK);
}

static void setup(size_t ring_bytes, uint32_t pages, uint32_t segments, uint64_t new_seed)
{
	seed = new_seed;
	pvf_blk_init(&blk);
	pvf_direct_init(&direct);
	connect(ring_bytes, pages, segments, PVF_BLK_FLUSH | PVF_BLK_DISCARD);
	for (uint32_t i = 0; i < DISK; i++)
		disk[i] = model[i] = (unsigned char)draw(&seed);
	memset(lanes, 0, sizeof(lanes));
	completed = failed = 0;
}

/* Cuts a lane's data into a vector of pieces of any size. */
static uint16_t cut(struct lane *lane, struct iovec *iov)
{
	uint32_t at = 0;
	uint16_t n = 0;

	while (at < lane->length) {
		uint32_t part = 1 + below(&seed, 20000);

		if (part > lane->length - at || n == PVF_DISK_IOV - 1)
			part = lane->length - at;
		iov[n++] = (struct iovec){lane->data + at, part};
		at += part;
	}
	return n;
}

/* One request on a lane that has none. */
static void ask(uint32_t number)
{
	struct lane *lane = &lanes[number];
	struct iovec iov[PVF_DISK_IOV];
	uint32_t kind = below(&seed, 20);
	uint16_t iovs = 0;

	lane->busy = true;
	lane->type = kind < 9 ? NBD_CMD_READ : kind < 18 ? NBD_CMD_WRITE : kind < 19 ? NBD_CMD_TRIM
										      : NBD_CMD_FLUSH;
	lane->length = 512 * (1 + below(&seed, LANE / 512));
	lane->from = (uint64_t)number * LANE + 512 * below(&seed, (LANE - lane->length) / 512 + 1);
	if (lane->type == NBD_CMD_FLUSH)
		lane->from = lane->length = 0;
	if (lane->type == NBD_CMD_WRITE)
		for (uint32_t i = 0; i < lane->length; i++)
			lane->data[i] = (unsigned char)draw(&seed);
	if (lane->type == NBD_CMD_READ)
		memset(lane->data, 0xee, lane->length);
	if (lane->type == NBD_CMD_READ || lane->type == NBD_CMD_WRITE)
		iovs = cut(lane, iov);
	bool fua = lane->type == NBD_CMD_WRITE && !below(&seed, 4);

	CHECK(pvf_direct_ask(&direct, lane->type, fua ? PVF_NBD_FLAG_FUA : 0, lane->from,
			     lane->length, iov, iovs, number));
}

static void take(void)
{
	struct pvf_disk_done done[4];
	int n = pvf_direct_take(&direct, done, 4);

	for (int i = 0; i < n; i++) {
		struct lane *lane = &lanes[done[i].cookie];

		CHECK(lane->busy);
		lane->busy = false;
		completed++;
		if (done[i].result < 0) {
			failed++;
			CHECK_EQ(done[i].result, -PVF_NBD_EIO);
			/* How much of a failed write was done, nobody knows. */
			memcpy(model + lane->from, disk + lane->from, lane->length);
			continue;
		}
		CHECK_EQ(done[i].result, lane->length);
		if (lane->type == NBD_CMD_WRITE)
			memcpy(model + lane->from, lane->data, lane->length);
		if (lane->type == NBD_CMD_TRIM)
			memset(model + lane->from, 0, lane->length);
		if (lane->type == NBD_CMD_READ)
			CHECK(!memcmp(model + lane->from, lane->data, lane->length));
	}
}

static bool idle(void)
{
	return !blk.in_flight && !direct.parts.waiting_count && !blk.reply_count && !blk.flush_count &&
	       blk.current == PVF_NONE;
}

static void serve(void)
{
	pvf_parts_intake(&direct.parts, &blk, false);
	if (pvf_ring_push(&blk.ring))
		backend.notified++;
	pvf_parts_deliver(&direct.parts, &blk);
}

static void turn(int error_chance)
{
	switch (below(&seed, 4)) {
	case 0:
		serve();
		break;
	case 1:
		backend_take(&backend);
		if (backend.held)
			backend_answer(&backend, below(&seed, backend.held),
				       below(&seed, 100) < (uint32_t)error_chance ? BLKIF_RSP_ERROR
										  : BLKIF_RSP_OKAY);
		break;
	case 2: {
		uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

		CHECK_EQ(blk.fault.rule, 0);
		pvf_blk_drain(&blk, n);
		CHECK_EQ(blk.fault.rule, 0);
		break;
	}
	default:
		take();
	}
}

static void finish(void)
{
	for (uint32_t turns = 0; direct.used; turns++) {
		CHECK(turns < 1000000); /* nobody can move */
		turn(0);
	}
	CHECK(idle());
	CHECK_EQ(blk.pool.free, blk.pool.pages);
	CHECK_EQ(direct.frees, PVF_DISK_DEPTH);
	CHECK(!memcmp(disk, model, DISK));
}

static void mix(uint32_t requests, int error_chance)
{
	for (uint32_t asked = 0; asked < requests;) {
		uint32_t number = below(&seed, LANES);

		if (!lanes[number].busy && !below(&seed, 3)) {
			ask(number);
			asked++;
		}
		turn(error_chance);
	}
	finish();
}

static void any_order(void)
{
	static const struct {
		size_t ring;
		uint32_t pages, segments;
	} shapes[] = {{4096, 22, 11}, {4096, 352, 11}, {16384, 704, 64}, {65536, 1056, 256}, {4096, 2, 1},
		      {4096, 40, 20}};

	for (uint32_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		setup(shapes[i].ring, shapes[i].pages, shapes[i].segments, 77 + i);
		mix(400, 0);
		CHECK_EQ(completed, 400);
	}
}

static void errors(void)
{
	setup(4096, 352, 11, 5);
	mix(600, 5);
	CHECK_EQ(completed, 600);
	CHECK(failed > 10 && failed < 500);
}

static void connection_lost(void)
{
	setup(4096, 128, 11, 9);
	for (int times = 0; times < 40; times++) {
		for (int i = 0; i < 200; i++) {
			uint32_t number = below(&seed, LANES);

			if (!lanes[number].busy && !below(&seed, 3))
				ask(number);
			turn(0);
		}
		/* What the backend had taken may or may not have been done. */
		backend_take(&backend);
		while (backend.held && below(&seed, 2))
			backend_answer(&backend, below(&seed, backend.held), BLKIF_RSP_OKAY);
		pvf_parts_deliver(&direct.parts, &blk);
		pvf_blk_drop_target(&blk);
		pvf_parts_restart(&direct.parts);
		pvf_blk_detach(&blk);
		connect(times % 2 ? 4096 : 16384, times % 3 ? 64 : 256, times % 2 ? 11 : 32,
			PVF_BLK_FLUSH | PVF_BLK_DISCARD);
	}
	finish();
}

static void disk_gone(void)
{
	struct pvf_disk_done done[PVF_DISK_DEPTH];

	setup(4096, 64, 11, 3);
	for (uint32_t i = 0; i < LANES; i++)
		ask(i);
	serve();
	pvf_blk_drop_target(&blk);
	pvf_parts_fail(&direct.parts, ENODEV);
	CHECK_EQ(pvf_direct_take(&direct, done, PVF_DISK_DEPTH), LANES);
	for (uint32_t i = 0; i < LANES; i++)
		CHECK_EQ(done[i].result, -ENODEV);
	CHECK_EQ(direct.used, 0);
}

static void full(void)
{
	struct pvf_disk_done done;
	unsigned char sector[512];
	struct iovec iov = {sector, 512};

	setup(4096, 352, 11, 1);
	for (uint32_t i = 0; i < PVF_DISK_DEPTH; i++)
		CHECK(pvf_direct_ask(&direct, NBD_CMD_READ, 0, 0, 512, &iov, 1, 0));
	CHECK(!pvf_direct_ask(&direct, NBD_CMD_READ, 0, 0, 512, &iov, 1, 0));
	while (!direct.done_count) {
		serve();
		backend_take(&backend);
		if (backend.held)
			backend_answer(&backend, 0, BLKIF_RSP_OKAY);
		pvf_blk_drain(&blk, pvf_ring_poll(&blk.ring, &blk.fault));
	}
	CHECK(!pvf_direct_ask(&direct, NBD_CMD_READ, 0, 0, 512, &iov, 1, 0)); /* its result is not taken */
	CHECK_EQ(pvf_direct_take(&direct, &done, 1), 1);
	CHECK(pvf_direct_ask(&direct, NBD_CMD_READ, 0, 0, 512, &iov, 1, 0));
}

static void shrunk(void)
{
	struct pvf_disk_done done;
	unsigned char sector[512];
	struct iovec iov = {sector, 512};

	setup(4096, 64, 11, 1);
	blk.geo.sectors = 8; /* a resize after the request was asked for */
	CHECK(pvf_direct_ask(&direct, NBD_CMD_WRITE, 0, 8 * 512, 512, &iov, 1, 0));
	serve();
	CHECK_EQ(pvf_direct_take(&direct, &done, 1), 1);
	CHECK_EQ(done.result, -PVF_NBD_ENOSPC);
}

int main(void)
{
	static const struct test tests[] = {
		{"requests of all kinds and sizes are done, whatever moves first", any_order},
		{"a failed request says so once, and the others are done", errors},
		{"what a lost connection left unfinished is done by the next", connection_lost},
		{"a disk that is gone fails what it has not done", disk_gone},
		{"an entry is free again when its result was taken", full},
		{"a request beyond the end of a disk that shrank fails", shrunk},
	};

	return RUN_TESTS(tests);
}
