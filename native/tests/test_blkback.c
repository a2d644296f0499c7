/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The block backend of the embedded host, honest: every feature, and everything that it refuses.
 */
#include "blkpeer.h"

#define OKAY BLKIF_RSP_OKAY
#define ERROR BLKIF_RSP_ERROR
#define UNSUPPORTED BLKIF_RSP_EOPNOTSUPP

static void moves_data(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	paint(&p, 0, 11, 1);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 8, 0, 11), OKAY);
	wipe(&p, 0, 11, 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 8, 0, 11), OKAY);
	CHECK(painted(&p, 0, 11, 1));
	/* one sector of it, to the page's end, from the middle of the disk's page */
	wipe(&p, 20, 1, 0xee);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 8 + 3, gref(20), 7, 7), BLKIF_OP_READ), OKAY);
	CHECK(!memcmp(data(&p, 20) + 7 * 512, data(&p, 0) + 3 * 512, 512));
	for (size_t i = 0; i < 7 * 512; i++)
		CHECK_EQ(data(&p, 20)[i], 0xee);
	struct pvf_bb_stats s = stats(&p);

	CHECK_EQ(s.reads, 2);
	CHECK_EQ(s.writes, 1);
	CHECK_EQ(s.sectors_written, 88);
	CHECK_EQ(s.sectors_read, 89);
	peer_end(&p);
}

static void every_order(void)
{
	for (uint32_t order = 0; order <= 4; order++) {
		struct peer p = {.order = order};

		peer_begin(&p, NULL, DISK);
		uint32_t slots = RING_SIZE(&p.queue[0].ring);

		CHECK_EQ(slots, order == 0 ? 32 : 32u << order);
		for (uint32_t round = 0; round < 5; round++) {
			uint64_t first = p.next_id + 1;

			for (uint32_t i = 0; i < slots; i++)
				put(&p, BLKIF_OP_WRITE, i * 8, i, 1);
			push(&p);
			for (uint32_t i = 0; i < slots; i++) {
				struct blkif_response rsp = response(&p);

				CHECK_EQ(rsp.id, first + i);
				CHECK_EQ(rsp.status, OKAY);
			}
		}
		CHECK_EQ(stats(&p).responses, slots * 5);
		peer_end(&p);
	}
}

static void indirect(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	paint(&p, 0, 256, 2);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_WRITE, 64, 0, 256, 300), BLKIF_OP_WRITE), OKAY);
	wipe(&p, 0, 256, 0);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 64, 0, 256, 300), BLKIF_OP_READ), OKAY);
	CHECK(painted(&p, 0, 256, 2));
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 64, 0, 257, 300), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 64, 0, 0, 300), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_FLUSH_DISKCACHE, 64, 0, 1, 300),
			   BLKIF_OP_FLUSH_DISKCACHE), ERROR);
	CHECK_EQ(stats(&p).indirect, 4);
	peer_end(&p);
}

static void limited_indirect(void)
{
	struct peer p = {.features = honest};

	p.features.max_indirect = 32;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 0, 0, 32, 300), BLKIF_OP_READ), OKAY);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 0, 0, 33, 300), BLKIF_OP_READ), ERROR);
	p.features.max_indirect = 0;
	pvf_bb_set_features(p.bb, &p.features);
	CHECK_EQ(answer_of(&p, put_indirect(&p, BLKIF_OP_READ, 0, 0, 1, 300), BLKIF_OP_INDIRECT),
		 UNSUPPORTED);
	peer_end(&p);
}

static void two_queues(void)
{
	struct peer p = {.queues = 2};

	peer_begin(&p, NULL, DISK);
	for (uint32_t round = 0; round < 200; round++) {
		for (uint32_t n = 0; n < 2; n++) {
			struct blkif_request *req = new_request(&p, n);

			req->operation = round & 1 ? BLKIF_OP_READ : BLKIF_OP_WRITE;
			req->nr_segments = 1;
			req->sector_number = 1024 * n + round / 2 * 8;
			req->seg[0] = (struct blkif_request_segment){gref(100 * n + (round & 1)), 0, 7};
			paint(&p, 100 * n, 1, (round / 2) * 2 + n);
			push_queue(&p, n);
		}
		for (uint32_t n = 0; n < 2; n++) {
			CHECK_EQ(response_of(&p, n).status, OKAY);
			if (round & 1)
				CHECK(painted(&p, 100 * n + 1, 1, (round / 2) * 2 + n));
		}
	}
	CHECK_EQ(stats(&p).requests, 400);
	peer_end(&p);
}

static void keeps_grants(void)
{
	struct peer p = {.persistent = true};

	peer_begin(&p, NULL, DISK);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(do_io(&p, i & 1 ? BLKIF_OP_READ : BLKIF_OP_WRITE, 0, 0, 11), OKAY);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 1);
	CHECK_EQ(pvf_grant_end(&p.table[gref(0)]), -EBUSY);
	CHECK_EQ(stats(&p).persistent, 11);
	CHECK_EQ(stats(&p).persistent_hits, 22);
	/* One reference twice in a request: the second is mapped for the request only. */
	struct blkif_request *req = new_request(&p, 0);

	req->operation = BLKIF_OP_READ;
	req->nr_segments = 2;
	req->seg[0] = req->seg[1] = (struct blkif_request_segment){gref(0), 0, 7};
	CHECK_EQ(answer_of(&p, req->id, BLKIF_OP_READ), OKAY);
	CHECK_EQ(stats(&p).persistent_twice, 1);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 1);
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 0);
	peer_end(&p);
}

static void limits_kept_grants(void)
{
	struct peer p = {.persistent = true, .features = honest};

	p.features.max_persistent = 4;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 11), OKAY);
	CHECK_EQ(stats(&p).persistent, 4);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(3)]), 1);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(4)]), 0);
	peer_end(&p);
}

static void gives_grants_back(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 11), OKAY);
		for (uint32_t k = 0; k < 11; k++) {
			CHECK_EQ(pvf_grant_end(&p.table[gref(k)]), 0);
			pvf_grant_begin(&p.table[gref(k)], BACK_DOMID, ARENA, DATA(k), true);
		}
	}
	CHECK_EQ(stats(&p).persistent, 0);
	peer_end(&p);
}

static void refuses_grants(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	pvf_grant_begin(&p.table[gref(50)], BACK_DOMID, ARENA, DATA(50), false);
	pvf_grant_begin(&p.table[gref(51)], 5, ARENA, DATA(51), true);
	pvf_grant_begin(&p.table[gref(52)], BACK_DOMID, ARENA, PAGES, true);
	pvf_grant_begin(&p.table[gref(53)], BACK_DOMID, ARENA + 1, 0, true);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 50, 1), OKAY); /* needs to be read only */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 50, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 51, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 52, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 53, 1), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, 41, 0, 7), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, PVF_GRANTS, 0, 7), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, UINT32_MAX, 0, 7), BLKIF_OP_READ), ERROR);
	CHECK_EQ(stats(&p).map_errors, 7);
	/* A request is done whole or not at all: nothing of this one stays mapped. */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 46, 6), ERROR);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(46)]), 0);
	peer_end(&p);
}

static void checks_segments(void)
{
	struct peer p = {0};
	uint64_t end = DISK / 512;

	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 0), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 12), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, gref(0), 0, 8), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, gref(0), 5, 4), BLKIF_OP_READ), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, end - 8, 0, 1), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, end - 7, 0, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, end, 0, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, UINT64_MAX - 3, 0, 1), ERROR);
	CHECK_EQ(answer_of(&p, put_discard(&p, 8, UINT64_MAX), BLKIF_OP_DISCARD), ERROR);
	CHECK_EQ(answer_of(&p, put_discard(&p, end, 1), BLKIF_OP_DISCARD), ERROR);
	CHECK_EQ(do_io(&p, 77, 0, 0, 1), UNSUPPORTED);
	CHECK_EQ(stats(&p).rejected, 9);
	peer_end(&p);
}

static void features_off(void)
{
	struct peer p = {.features = honest};

	p.features.flags = 0;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0), UNSUPPORTED);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE_BARRIER, 0, 0, 1), UNSUPPORTED);
	CHECK_EQ(answer_of(&p, put_discard(&p, 0, 8), BLKIF_OP_DISCARD), UNSUPPORTED);
	CHECK_EQ(stats(&p).unsupported, 3);
	p.features.flags = PVF_BB_FLUSH | PVF_BB_BARRIER | PVF_BB_DISCARD;
	pvf_bb_set_features(p.bb, &p.features);
	CHECK_EQ(do_io(&p, BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE_BARRIER, 0, 0, 1), OKAY);
	CHECK_EQ(answer_of(&p, put_discard(&p, 0, 8), BLKIF_OP_DISCARD), OKAY);
	CHECK_EQ(stats(&p).flushes, 1);
	peer_end(&p);
}

static void read_only(void)
{
	struct peer p = {.features = honest};

	p.features.flags |= PVF_BB_READ_ONLY;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 1), ERROR);
	CHECK_EQ(answer_of(&p, put_discard(&p, 0, 8), BLKIF_OP_DISCARD), ERROR);
	peer_end(&p);
}

static void discards(void)
{
	struct peer p = {.features = honest};

	p.features.discard_granularity = 8192;
	p.features.discard_alignment = 4096;
	peer_begin(&p, NULL, DISK);
	wipe(&p, 0, 6, 0x55);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 6), OKAY);
	/* granules are pages 1-2, 3-4, ...: of 1.5 .. 5.5 only 3-4 lies within */
	CHECK_EQ(answer_of(&p, put_discard(&p, 12, 32), BLKIF_OP_DISCARD), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 6), OKAY);
	CHECK(wiped(&p, 0, 3, 0x55));
	CHECK(wiped(&p, 3, 2, 0));
	CHECK(wiped(&p, 5, 1, 0x55));
	CHECK_EQ(answer_of(&p, put_discard(&p, 0, 0), BLKIF_OP_DISCARD), OKAY);
	peer_end(&p);
}

static void large_sectors(void)
{
	struct peer p = {.features = honest};

	p.features.sector_size = 4096;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 8, 0, 2), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 4, 0, 1), ERROR);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 8, gref(0), 0, 3), BLKIF_OP_READ), ERROR);
	CHECK_EQ(answer_of(&p, put_discard(&p, 8, 7), BLKIF_OP_DISCARD), ERROR);
	peer_end(&p);
}

static void resizes(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, 1 << 20);
	paint(&p, 0, 1, 9);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 2040, 0, 1), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 2048, 0, 1), ERROR);
	CHECK_EQ(pvf_bb_resize(p.bb, 2 << 20), 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 4088, 0, 1), OKAY);
	wipe(&p, 0, 1, 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 2040, 0, 1), OKAY);
	CHECK(painted(&p, 0, 1, 9));
	CHECK_EQ(pvf_bb_resize(p.bb, 1 << 20), 0);
	CHECK_EQ(pvf_bb_bytes(p.bb), 1 << 20);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 2048, 0, 1), ERROR);
	peer_end(&p);
}

static void files(void)
{
	char path[] = "/tmp/pvf-disk-XXXXXX";
	int fd = mkstemp(path), error;
	struct peer p = {0};
	struct pvf_bb_features features = honest;

	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, 1 << 20));
	peer_begin(&p, path, 0);
	CHECK_EQ(pvf_bb_bytes(p.bb), 1 << 20);
	paint(&p, 0, 11, 4);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 11), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0), OKAY);
	CHECK_EQ(answer_of(&p, put_discard(&p, 8, 8), BLKIF_OP_DISCARD), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 20, 2), OKAY);
	CHECK(!memcmp(data(&p, 20), data(&p, 0), PAGE));
	CHECK(wiped(&p, 21, 1, 0));
	wipe(&p, 1, 1, 0);
	CHECK_EQ(pread(fd, data(&p, 40), 11 * PAGE, 0), 11 * (ssize_t)PAGE);
	CHECK(!memcmp(data(&p, 40), data(&p, 0), 11 * PAGE));
	/* Somebody cuts it: an error, not a signal. */
	CHECK(!ftruncate(fd, 4096));
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 8, 0, 1), ERROR);
	CHECK_EQ(stats(&p).io_errors, 1);
	peer_end(&p);
	CHECK(!pvf_bb_new(path, 1 << 20, &features, &error));
	CHECK_EQ(error, -EFBIG);
	close(fd);
	unlink(path);
	CHECK(!pvf_bb_new(path, 0, &features, &error));
	CHECK_EQ(error, -ENOENT);
}

static void enormous(void)
{
	struct peer p = {0};
	uint64_t sectors = (uint64_t)INT64_MAX / 4096 * 8 - 8;

	peer_begin(&p, NULL, sectors * 512);
	paint(&p, 0, 1, 5);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, sectors - 8, 0, 1), OKAY);
	wipe(&p, 0, 1, 1);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, sectors - 8, 0, 1), OKAY);
	CHECK(painted(&p, 0, 1, 5));
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, sectors / 2, 0, 1), OKAY);
	CHECK(wiped(&p, 0, 1, 0));
	peer_end(&p);
}

static void populated(void)
{
	struct peer p = {.features = honest};
	struct pvf_bb_features features = honest;
	int error;

	p.features.flags |= PVF_BB_POPULATE;
	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 8, 0, 1), OKAY);
	CHECK(wiped(&p, 0, 1, 0));
	peer_end(&p);
	features.flags |= PVF_BB_POPULATE;
	CHECK(!pvf_bb_new(NULL, UINT64_C(1) << 50, &features, &error));
	CHECK_EQ(error, -EINVAL);
}

/* Chunks of 2 MiB: a request across two of them of which one was written. */
static void holes(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	paint(&p, 0, 2, 3);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 4096, 0, 2), OKAY);
	wipe(&p, 10, 4, 0xff);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 4080, 10, 4), OKAY);
	CHECK(wiped(&p, 10, 2, 0));
	CHECK(!memcmp(data(&p, 12), data(&p, 0), 2 * PAGE));
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 4088, 0, 2), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 4088, 10, 2), OKAY);
	CHECK(!memcmp(data(&p, 10), data(&p, 0), 2 * PAGE));
	peer_end(&p);
}

static void halts(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	p.queue[0].ring.req_prod_pvt += 33;
	push(&p);
	UNTIL(stats(&p).bogus);
	p.queue[0].ring.req_prod_pvt -= 33;
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	CHECK(silent(&p, 50));
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	peer_end(&p);
}

/* As many events as rsp_event asks for, and none besides. */
static void counts_events(void)
{
	struct peer p = {0};
	struct blkif_response rsp;

	peer_begin(&p, NULL, DISK);
	p.queue[0].ring.sring->rsp_event = 5;
	for (int i = 0; i < 5; i++) {
		put(&p, BLKIF_OP_READ, 0, 0, 1);
		push(&p);
		UNTIL(stats(&p).pushes > (uint64_t)i);
		CHECK_EQ(stats(&p).notifies, i == 4);
	}
	for (int i = 0; i < 5; i++)
		CHECK(try_response(&p, 0, &rsp, 0));
	CHECK(event(&p, 0, DEADLINE));
	CHECK(!event(&p, 0, 10));
	peer_end(&p);
}

static void ring_refusals(void)
{
	struct peer p = {0};
	uint32_t refs[3] = {GREF(1), GREF(2), 9};
	char why[PVF_BB_TEXT];

	peer_begin(&p, NULL, DISK);
	CHECK_EQ(pvf_bb_connect(p.bb, p.table_fd, p.track_fd, 0, FRONT_DOMID, -1, false), -EBUSY);
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	CHECK_EQ(pvf_bb_start(p.bb), -ENOTCONN);
	CHECK_EQ(pvf_bb_connect(p.bb, p.arena_fd, p.table_fd, 0, FRONT_DOMID, p.arena_fd, false), 0);
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	CHECK_EQ(pvf_bb_connect(p.bb, p.queue[0].fd[0], p.track_fd, 0, FRONT_DOMID, -1, false), -EINVAL);
	CHECK_EQ(pvf_bb_connect(p.bb, p.table_fd, p.track_fd, 0, FRONT_DOMID, -1, false), 0);
	CHECK_EQ(pvf_bb_ring(p.bb, refs, 3, p.queue[0].channel_fd, 1, 0, 0, why), -EINVAL);
	/* its arena is not there and nobody to ask */
	CHECK_EQ(pvf_bb_ring(p.bb, refs, 2, p.queue[0].channel_fd, 1, 0, 0, why), -ENXIO);
	CHECK(strstr(why, "mapping ring-ref"));
	CHECK_EQ(pvf_bb_arena(p.bb, ARENA, p.arena_fd), 0);
	CHECK_EQ(pvf_bb_ring(p.bb, refs + 2, 1, p.queue[0].channel_fd, 1, 0, 0, why), -EINVAL);
	CHECK(strstr(why, "mapping ring-ref 9"));
	CHECK_EQ(pvf_bb_ring(p.bb, refs, 1, p.track_fd, 1, 0, 0, why), -EINVAL);
	CHECK(strstr(why, "event channel"));
	CHECK_EQ(pvf_grant_maps(&p.table[GREF(1)]), 0);
	peer_end(&p);
}

static void reconnects(void)
{
	struct peer p = {0};

	peer_begin(&p, NULL, DISK);
	paint(&p, 0, 1, 6);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 1), OKAY);
	for (int i = 0; i < 10; i++) {
		CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
		peer_let_go(&p);
		p.order = (uint32_t)i % 5;
		p.persistent = i & 1;
		CHECK_EQ(peer_connect(&p), 0);
		wipe(&p, 0, 1, 0);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
		CHECK(painted(&p, 0, 1, 6));
	}
	CHECK_EQ(stats(&p).requests, 11);
	peer_end(&p);
}

/*
 * Binds the backend's side of a channel once more. The hub renews a port that is bound: a ring that
 * was let go between taking an event and unmasking has left the mark of that behind.
 */
static int bind_again(struct peer *p, struct queue *q, const uint32_t *refs, char *why)
{
	__atomic_store_n(&q->channel->end[1].flags, 0, __ATOMIC_SEQ_CST);
	return pvf_bb_ring(p->bb, refs, 1, q->channel_fd, 1, q->fd[1], q->fd[0], why);
}

/* The frontend notices nothing, and what was put there meanwhile is done. */
static void attaches_again(void)
{
	struct peer p = {0};
	uint32_t refs[1] = {GREF(0)};
	struct queue *q = &p.queue[0];
	char why[PVF_BB_TEXT];

	peer_begin(&p, NULL, DISK);
	for (int i = 0; i < 40; i++)
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	paint(&p, 0, 1, 12);
	put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	push(&p);
	for (int good = 0; good < 2; good++) {
		q->ring.sring->req_prod += good ? -33u : 33;
		CHECK_EQ(pvf_bb_connect(p.bb, p.table_fd, p.track_fd, 0, FRONT_DOMID, -1, false), 0);
		CHECK_EQ(pvf_bb_arena(p.bb, ARENA, p.arena_fd), 0);
		CHECK_EQ(bind_again(&p, q, refs, why), good ? 0 : -EIO);
		if (!good)
			CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
	}
	CHECK_EQ(pvf_bb_start(p.bb), 0);
	CHECK_EQ(response(&p).id, 41);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 1, 1), OKAY);
	CHECK(painted(&p, 1, 1, 12));
	peer_end(&p);
}

/* Answered out of order: from rsp_prod on, the write would be done again. */
static void leaves_what_was_not_in_order(void)
{
	struct peer p = {0};
	struct pvf_bb_rule stall = {.kind = PVF_BB_STALL, .ops = 1 << BLKIF_OP_READ,
				    .last = UINT64_MAX, .count = 1, .chance = PVF_BB_ALWAYS};
	struct pvf_bb_left left[PVF_BB_QUEUES];
	uint32_t refs[1] = {GREF(0)}, bad;
	struct queue *q = &p.queue[0];
	char why[PVF_BB_TEXT];

	peer_begin(&p, NULL, DISK);
	CHECK_EQ(pvf_bb_set_rules(p.bb, &stall, 1, 1, &bad), 0);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	uint64_t write = put(&p, BLKIF_OP_WRITE, 8, 1, 1);

	push(&p);
	CHECK_EQ(response(&p).id, write);
	CHECK_EQ(pvf_bb_disconnect(p.bb), -EBUSY);
	pvf_bb_free(p.bb); /* forgets the read */
	p.bb = pvf_bb_new(NULL, DISK, &honest, &(int){0});
	CHECK(p.bb);
	for (int known = 0; known < 3; known++) {
		CHECK_EQ(pvf_bb_connect(p.bb, p.table_fd, p.track_fd, 0, FRONT_DOMID, -1, false), 0);
		CHECK_EQ(pvf_bb_arena(p.bb, ARENA, p.arena_fd), 0);
		CHECK_EQ(pvf_bb_left(p.bb, left), (uint32_t)!!known);
		CHECK_EQ(bind_again(&p, q, refs, why), known == 2 ? 0 : -EBUSY);
		CHECK_EQ(pvf_bb_disconnect(p.bb), 0);
		left[0] = (struct pvf_bb_left){GREF(0), (uint32_t)known}; /* 1 is right */
		CHECK_EQ(pvf_bb_take_up(p.bb, left, 1), 0);
	}
	CHECK_EQ(pvf_bb_take_up(p.bb, left, PVF_BB_QUEUES + 1), -EINVAL);
	peer_end(&p);
}

int main(void)
{
	static const struct test tests[] = {
		{"what is written is read, sector by sector", moves_data},
		{"a ring of every order is used round and round", every_order},
		{"256 indirect segments move in one request, 257 do not", indirect},
		{"fewer indirect segments, or none, can be offered", limited_indirect},
		{"two queues work side by side", two_queues},
		{"persistent grants stay mapped until the connection ends", keeps_grants},
		{"no more grants are kept than the limit says", limits_kept_grants},
		{"other grants are given back before the response", gives_grants_back},
		{"grants that do not permit it are not mapped", refuses_grants},
		{"requests are checked as Linux's blkback checks them", checks_segments},
		{"what is switched off is answered with EOPNOTSUPP", features_off},
		{"a read-only disk refuses to be changed", read_only},
		{"a discard empties whole granules and nothing else", discards},
		{"sectors of 4096 bytes are not split", large_sectors},
		{"a disk grows and shrinks while it is used", resizes},
		{"a file is a disk", files},
		{"a disk of almost 2^63 bytes is sparse", enormous},
		{"a disk in memory can have all of it at once", populated},
		{"what was never written is zeroes, and stays a hole", holes},
		{"an impossible req_prod halts the ring", halts},
		{"events are sent when rsp_event asks for them", counts_events},
		{"a ring that cannot be mapped is refused with its reason", ring_refusals},
		{"a frontend comes and goes, the disk stays", reconnects},
		{"a ring that was left in order is taken up", attaches_again},
		{"a ring that was not left in order is left alone", leaves_what_was_not_in_order},
	};
	return RUN_TESTS(tests);
}
