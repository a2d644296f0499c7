/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the disk engine does with single requests, answers and lies.
 */
#include "engine.h"

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

/* The largest part is answered whole, and a page more would not be. */
static void parts(void)
{
	for (uint32_t pages = 2; pages <= 352; pages += 7)
		for (uint32_t segments = 1; segments <= 256; segments += 5) {
			setup(pages, segments, 9);
			uint32_t most = pvf_blk_part(&blk, UINT32_MAX);

			CHECK(most && most % 4096 == 0);
			CHECK(pvf_blk_whole(&blk, most));
			CHECK(!pvf_blk_whole(&blk, most + 4096));
			CHECK_EQ(pvf_blk_part(&blk, 512), 512);
			CHECK_EQ(pvf_blk_part(&blk, most - 512), most - 512);
		}
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
		{"rule 19: a failed or empty read returns no stale pool contents", no_data},
		{"rule 5: a response with an unknown id breaks the ring", rule5},
		{"rule 5: a second response to a request breaks the ring", duplicate},
		{"rule 6: a response with another operation breaks the ring", rule6},
		{"rule 7: unknown status is EIO, EOPNOTSUPP turns the feature off", rule7},
		{"FUA is a write followed by a flush, answered after both", fua},
		{"without flush a barrier is the flush, and one that fails turns flushes off", barrier},
		{"an indirect request's descriptors are no later read's data", descriptors},
		{"requests can be answered one by one, with their time", one_by_one},
		{"a request's largest part is all that can be answered whole", parts},
		{"a trim is cut to whole discard granules", granularity},
		{"the payload of a refused write is thrown away", refused_write},
		{"rule 8: a turn takes a bounded number of requests", bounded},
		{"a wrong magic ends the connection", magic},
		{"a disconnect ends the connection after the last reply", disconnect},
		{"a client that leaves right after it has sent something has left", leaving},
		{"a streamed read that fails after its header ends the connection", stream_fails},
		{"a streamed read that fails at its first piece gets an error", stream_fails_first},
		{"a write never waits for a client that does not read", no_reader},
		{"a write that a resize has cut off fails and the stream goes on", resized},
	};

	return RUN_TESTS(tests);
}
