/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Tags between a kernel and a backend, both in this file and moved by a seeded generator. A memfd
 * stands for /dev/ublkcN: requests' data lies in it where the kernel would have it.
 */
#include <errno.h>
#include <sys/mman.h>

#include "backend.h"
#include "ublk.h"

#define DISK (4u << 20)
#define LANES 16u /* parts of the disk with at most one request on each */
#define LANE (DISK / LANES)
#define QUEUE 3

static _Alignas(4096) unsigned char ring_pages[4096];
static _Alignas(4096) unsigned char pool_pages[512 * 4096];
static unsigned char disk[DISK], model[DISK], data[PVF_UBLK_MAX_IO], got[PVF_UBLK_MAX_IO];
static struct ublksrv_io_desc desc[PVF_UBLK_DEPTH];
static struct pvf_blk blk;
static struct pvf_ublk ublk;
static struct backend backend;
static uint64_t seed;
static int device = -1;
static int32_t result[PVF_UBLK_DEPTH];
static bool finished[PVF_UBLK_DEPTH];

static off_t place(uint32_t tag)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)QUEUE << 41) + ((uint64_t)tag << 25));
}

static void connect_backend(uint32_t pages, uint32_t segments)
{
	uint32_t grefs[PVF_MAX_POOL_PAGES];
	struct pvf_geometry geo = {
		.sectors = DISK / 512,
		.sector_size = 512,
		.features = PVF_BLK_FLUSH | PVF_BLK_DISCARD,
		.max_segments = segments,
	};

	memset(pool_pages, 0, sizeof(pool_pages));
	backend_grefs(grefs, pages);
	pvf_blk_attach(&blk, ring_pages, sizeof(ring_pages), pool_pages, pages, grefs, false);
	pvf_blk_start(&blk, &geo);
	backend_init(&backend, ring_pages, sizeof(ring_pages), pool_pages, pages, disk, DISK);
}

static void setup(uint32_t pages, uint32_t segments, uint64_t new_seed)
{
	seed = new_seed;
	if (device >= 0)
		close(device);
	device = memfd_create("ublkc", MFD_CLOEXEC);
	CHECK(device >= 0);
	pvf_blk_init(&blk);
	pvf_ublk_init(&ublk, device, QUEUE, desc);
	connect_backend(pages, segments);
	for (uint32_t i = 0; i < DISK; i++)
		disk[i] = model[i] = (unsigned char)draw(&seed);
	memset(finished, 0, sizeof(finished));
}

static void hand_over(uint32_t tag, uint8_t op, uint64_t sector, uint32_t sectors)
{
	desc[tag] = (struct ublksrv_io_desc){
		.op_flags = op, .nr_sectors = sectors, .start_sector = sector};
	finished[tag] = false;
	CHECK(pvf_ublk_fetched(&ublk, tag));
}

static void write_at(uint32_t tag, uint64_t sector, uint32_t sectors)
{
	for (uint32_t i = 0; i < sectors * 512; i++)
		data[i] = (unsigned char)draw(&seed);
	CHECK_EQ(pwrite(device, data, sectors * 512, place(tag)), sectors * 512);
	memcpy(model + sector * 512, data, sectors * 512);
	hand_over(tag, UBLK_IO_OP_WRITE, sector, sectors);
}

static uint32_t ours(void)
{
	uint32_t n = 0;

	for (uint32_t tag = 0; tag < PVF_UBLK_DEPTH; tag++)
		n += ublk.ours[tag];
	return n;
}

static void take_commits(void)
{
	for (uint32_t i = 0; i < ublk.commits; i++) {
		uint16_t tag = ublk.commit[i].tag;

		CHECK(!finished[tag]);
		finished[tag] = true;
		result[tag] = ublk.commit[i].result;
	}
	ublk.commits = 0;
}

/* One turn of everybody. */
static void turn(bool answer)
{
	pvf_parts_deliver(&ublk.parts, &blk);
	take_commits();
	pvf_parts_intake(&ublk.parts, &blk, false);
	pvf_ring_push(&blk.ring);
	backend_take(&backend);
	while (answer && backend.held)
		backend_answer(&backend, below(&seed, backend.held), BLKIF_RSP_OKAY);
	struct pvf_fault fault = {0};

	pvf_blk_drain(&blk, pvf_ring_poll(&blk.ring, &fault));
	CHECK(!fault.rule && !blk.fault.rule);
	pvf_ring_final_check(&blk.ring, &fault);
}

static void finish(uint32_t tag)
{
	for (int i = 0; i < 100 && !finished[tag]; i++)
		turn(true);
	CHECK(finished[tag]);
}

static void check_read(uint32_t tag, uint64_t sector, uint32_t sectors)
{
	CHECK_EQ(result[tag], sectors * 512);
	CHECK_EQ(pread(device, got, sectors * 512, place(tag)), sectors * 512);
	CHECK(!memcmp(got, model + sector * 512, sectors * 512));
}

static void copies_both_ways(void)
{
	setup(352, 11, 1);
	write_at(0, 8, 256);
	finish(0);
	CHECK_EQ(result[0], 256 * 512);
	CHECK(!memcmp(disk, model, DISK));
	hand_over(1, UBLK_IO_OP_READ, 0, 300);
	finish(1);
	check_read(1, 0, 300);
	CHECK_EQ(ours(), 0);
}

static void splits_what_the_pool_cannot_hold(void)
{
	setup(24, 11, 2);
	hand_over(0, UBLK_IO_OP_READ, 0, PVF_UBLK_MAX_IO / 512);
	write_at(1, 4096, PVF_UBLK_MAX_IO / 512);
	finish(0);
	finish(1);
	check_read(0, 0, PVF_UBLK_MAX_IO / 512);
	CHECK(!memcmp(disk, model, DISK));
}

static void other_operations(void)
{
	setup(352, 11, 3);
	hand_over(0, UBLK_IO_OP_FLUSH, 0, 0);
	hand_over(1, UBLK_IO_OP_DISCARD, 16, 8);
	hand_over(2, UBLK_IO_OP_WRITE_ZEROES, 16, 8);
	hand_over(3, UBLK_IO_OP_READ, DISK / 512, 8);
	memset(model + 16 * 512, 0, 8 * 512);
	for (uint32_t tag = 0; tag < 4; tag++)
		finish(tag);
	CHECK_EQ(result[0], 0);
	CHECK_EQ(result[1], 8 * 512);
	CHECK_EQ(result[2], -EOPNOTSUPP);
	CHECK(result[3] < 0);
	CHECK(!memcmp(disk, model, DISK));
	CHECK_EQ(blk.stats.flush.ring_requests, 1);
}

static void an_error_is_the_requests(void)
{
	setup(24, 11, 4);
	hand_over(0, UBLK_IO_OP_READ, 0, PVF_UBLK_MAX_IO / 512);
	hand_over(1, UBLK_IO_OP_READ, 0, 8);
	turn(false);
	CHECK(backend.held);
	backend_answer(&backend, 0, BLKIF_RSP_ERROR);
	finish(0);
	CHECK_EQ(result[0], -EIO);
	CHECK(blk.stats.read.ring_requests < 20); /* the rest of it was not begun */
	finish(1);
	check_read(1, 0, 8);
}

static void begins_again_with_the_next_connection(void)
{
	setup(24, 11, 5);
	hand_over(7, UBLK_IO_OP_READ, 0, PVF_UBLK_MAX_IO / 512);
	write_at(3, 4096, 64);
	hand_over(5, UBLK_IO_OP_READ, 5000, 8);
	turn(false);
	CHECK(backend.held);
	backend_answer(&backend, 0, BLKIF_RSP_OKAY);
	turn(false);
	pvf_blk_drop_target(&blk);
	pvf_blk_detach(&blk);
	pvf_parts_restart(&ublk.parts);
	CHECK_EQ(ours(), 3);
	CHECK_EQ(ublk.parts.waiting_count, 3);
	CHECK_EQ(ublk.parts.waiting[0], 7); /* in the order in which they came */
	CHECK_EQ(ublk.parts.waiting[1], 3);
	connect_backend(352, 11);
	finish(7);
	finish(3);
	finish(5);
	check_read(7, 0, PVF_UBLK_MAX_IO / 512);
	check_read(5, 5000, 8);
	CHECK(!memcmp(disk, model, DISK));
	CHECK_EQ(ours(), 0);
}

static void begins_nothing_while_draining(void)
{
	setup(352, 11, 6);
	hand_over(0, UBLK_IO_OP_READ, 0, 8);
	CHECK(!pvf_parts_intake(&ublk.parts, &blk, true));
	CHECK_EQ(blk.pending, 0);
	finish(0);
	check_read(0, 0, 8);
}

static void refuses_a_tag_twice(void)
{
	setup(352, 11, 7);
	hand_over(0, UBLK_IO_OP_READ, 0, 8);
	CHECK(!pvf_ublk_fetched(&ublk, 0));
	CHECK(ublk.gone && ublk.error == EPROTO);
	setup(352, 11, 7);
	CHECK(!pvf_ublk_fetched(&ublk, PVF_UBLK_DEPTH));
	CHECK(ublk.gone);
}

static void a_device_without_data_ends_the_target(void)
{
	setup(352, 11, 8);
	hand_over(0, UBLK_IO_OP_WRITE, 0, 8); /* nothing was put into the memfd */
	pvf_parts_intake(&ublk.parts, &blk, false);
	CHECK(ublk.gone && ublk.error == EIO);
}

struct lane {
	bool busy;
	uint8_t op;
	uint64_t sector;
	uint32_t sectors;
};

/* Requests on lanes of their own, connections that end at any moment: nothing is lost or mixed up. */
static void any_order(void)
{
	for (uint64_t round = 1; round <= 12; round++) {
		struct lane lane[LANES] = {0};
		uint32_t pages = round % 3 ? 48 : 352, begun = 0;

		setup(pages, round % 2 ? 11 : 32, round);
		for (int step = 0; step < 3000; step++) {
			uint32_t tag = below(&seed, LANES);
			struct lane *l = &lane[tag];

			if (l->busy && finished[tag]) {
				if (l->op == UBLK_IO_OP_READ)
					check_read(tag, l->sector, l->sectors);
				CHECK_EQ(result[tag], l->sectors * 512);
				l->busy = false;
			}
			if (!l->busy && step < 2500) {
				l->sectors = 1 + below(&seed, below(&seed, 4) ? 16 : LANE / 512);
				l->sector = (uint64_t)LANE / 512 * tag +
					    below(&seed, LANE / 512 - l->sectors + 1);
				l->op = below(&seed, 2) ? UBLK_IO_OP_READ : UBLK_IO_OP_WRITE;
				if (l->op == UBLK_IO_OP_WRITE)
					write_at(tag, l->sector, l->sectors);
				else
					hand_over(tag, l->op, l->sector, l->sectors);
				l->busy = true;
				begun++;
			}
			if (below(&seed, 400) == 0) {
				pvf_blk_drop_target(&blk);
				pvf_blk_detach(&blk);
				pvf_parts_restart(&ublk.parts);
				connect_backend(pages, 11);
			}
			turn(step >= 2500 || below(&seed, 3));
		}
		for (uint32_t tag = 0; tag < LANES; tag++)
			CHECK(!lane[tag].busy || finished[tag]);
		CHECK(begun > 500);
		CHECK(!memcmp(disk, model, DISK));
		CHECK_EQ(ours(), 0);
	}
}

int main(void)
{
	static const struct test tests[] = {
		{"a request's data is copied between its own pages and the ring's", copies_both_ways},
		{"a request that the pool cannot hold goes in parts", splits_what_the_pool_cannot_hold},
		{"flush, discard, what is unknown, and what is out of range", other_operations},
		{"the backend's error is the request's, and nothing more of it begins",
		 an_error_is_the_requests},
		{"what a connection leaves unanswered begins again with the next, in its order",
		 begins_again_with_the_next_connection},
		{"while draining no request begins", begins_nothing_while_draining},
		{"a tag that is ours already, or none, ends the target", refuses_a_tag_twice},
		{"a write without data ends the target", a_device_without_data_ends_the_target},
		{"any order of requests, answers and lost connections", any_order},
	};

	return RUN_TESTS(tests);
}
