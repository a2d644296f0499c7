/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A hostile client on the NBD socket, before a backend that is honest, slow, out of order and has bad
 * sectors.
 *
 * A reference reading of the stream stands beside the engine's. It numbers the handles and fills
 * payloads in as they pass, each byte of the disk having one value that follows from its address. So:
 * each complete request is answered exactly once, with success if and only if it is good, and with the
 * right bytes; every byte that reaches the disk is the right one; and the connection ends only for a
 * reason.
 */
#include "fuzz.h"

#include <endian.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <linux/nbd.h>
#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/blkif.h>

#include "target.h"

#define DISK (512u << 10)
#define BAD_FROM (DISK / 2)       /* sectors that fail */
#define BAD_TO (BAD_FROM + 8192u)
#define POOL_MAX 48u
#define OUT_MAX (1u << 20)
#define REQUESTS 2048u
#define GREF(page) (70u + 5u * (page))

static _Alignas(4096) unsigned char ring_page[4096], pool_pages[POOL_MAX * 4096];
static struct pvf_blk blk;
static struct pvf_target target;
static struct pvf_geometry geo;
static blkif_back_ring_t back;
static blkif_request_t held[64];
static uint32_t held_count, pool_count;
static int ends[2], epoll_fd;

static struct request {
	struct pvf_nbd_request r;
	bool whole, answered;
} asked[REQUESTS];

/* What was sent, as we read it. */
static struct {
	uint8_t header[PVF_NBD_HEADER];
	uint32_t have;
	uint64_t payload, at; /* bytes still to come; where on the disk the next one goes */
	uint32_t count;       /* of `asked` */
	bool junk, disconnect, closed;
} sent;

static unsigned char out[OUT_MAX];
static size_t out_at, out_end;

static struct {
	uint8_t header[PVF_NBD_REPLY];
	uint32_t have, data;
	uint64_t at;
	struct request *of;
} came;

static unsigned char content(uint64_t at)
{
	return (unsigned char)(((at * 2654435761u) >> 11 & 0xff) | 1);
}

/* What must come of a request. */
static bool good(const struct pvf_nbd_request *r)
{
	bool fua = r->flags == PVF_NBD_FLAG_FUA;
	bool io = r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE || r->type == NBD_CMD_TRIM;
	bool writes = r->type == NBD_CMD_WRITE || r->type == NBD_CMD_TRIM;

	bool flush = geo.features & (PVF_BLK_FLUSH | PVF_BLK_BARRIER);

	if ((r->flags && !fua) || (fua && writes && !flush))
		return false;
	if (r->type == NBD_CMD_FLUSH)
		return !r->from && !r->length && flush;
	if (!io || (writes && geo.features & PVF_BLK_READ_ONLY) ||
	    (r->type == NBD_CMD_TRIM && !(geo.features & PVF_BLK_DISCARD)))
		return false;
	return r->length && !((r->from | r->length) % geo.sector_size) && r->from <= DISK &&
	       r->length <= DISK - r->from;
}

static bool on_bad_sectors(const struct pvf_nbd_request *r)
{
	return (r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE) &&
	       r->from < BAD_TO && r->from + r->length > BAD_FROM;
}

static bool streams(const struct pvf_nbd_request *r)
{
	return r->type == NBD_CMD_READ && !pvf_blk_whole(&blk, r->length);
}

static void whole(struct request *q)
{
	q->whole = true;
}

static void header_sent(void)
{
	struct nbd_request wire;

	memcpy(&wire, sent.header, sizeof(wire));
	if (be32toh(wire.magic) != NBD_REQUEST_MAGIC || sent.count == REQUESTS) {
		sent.junk = true;
		return;
	}
	uint32_t type = be32toh(wire.type);

	if ((uint16_t)type == NBD_CMD_DISC) {
		sent.disconnect = true;
		return;
	}
	struct request *q = &asked[sent.count++];

	*q = (struct request){.r = {.flags = (uint16_t)(type >> 16), .type = (uint16_t)type,
				    .from = be64toh(wire.from), .length = be32toh(wire.len)}};
	if (q->r.type == NBD_CMD_WRITE && q->r.length) {
		sent.payload = q->r.length;
		sent.at = q->r.from;
	} else {
		whole(q);
	}
}

/* Reads one byte of the stream and makes it what it should be. */
static unsigned char reference(unsigned char byte)
{
	if (sent.junk || sent.disconnect)
		return byte;
	if (sent.payload) {
		byte = content(sent.at++);
		if (!--sent.payload)
			whole(&asked[sent.count - 1]);
		return byte;
	}
	if (sent.have >= 8 && sent.have < 16)
		byte = sent.have < 12 ? (unsigned char)(sent.count >> (sent.have - 8) * 8) : 0;
	sent.header[sent.have++] = byte;
	if (sent.have == PVF_NBD_HEADER) {
		header_sent();
		sent.have = 0;
	}
	return byte;
}

static void flush_out(void)
{
	while (out_at < out_end) {
		ssize_t n = send(ends[0], out + out_at, out_end - out_at, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n <= 0)
			break;
		out_at += (size_t)n;
	}
	if (out_at == out_end)
		out_at = out_end = 0;
}

static void say(const void *bytes, size_t n)
{
	const unsigned char *from = bytes;

	for (size_t i = 0; i < n && out_end < OUT_MAX && !sent.closed; i++)
		out[out_end++] = reference(from ? from[i] : 0);
	flush_out();
}

static void ask(struct input *in, uint8_t how)
{
	static const uint16_t types[] = {NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM};
	uint64_t at = number(in, 2) * 512 % DISK;
	uint32_t length = 512 * (1 + (how & 4 ? upto(in, 1000) : upto(in, 48)));
	uint16_t type = types[how & 3], flags = how & 8 ? PVF_NBD_FLAG_FUA : 0;

	if (how & 16) { /* within the disk and in whole sectors */
		at -= at % 4096;
		length = (length + 4095) & ~4095u;
		length = length < DISK - at ? length : DISK - (uint32_t)at;
	}
	if (type == NBD_CMD_FLUSH && how & 16)
		at = length = 0;
	if (how & 32)
		type ^= (uint16_t)number(in, 2);
	if (how & 64)
		flags ^= (uint16_t)number(in, 2);
	if (how & 128)
		at ^= number(in, 8);
	struct nbd_request wire = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32((uint32_t)flags << 16 | type),
		.from = htobe64(at),
		.len = htobe32(length),
	};

	say(&wire, sizeof(wire));
}

static void reply_came(void)
{
	uint32_t error = be32toh(*(const uint32_t *)(const void *)(came.header + 4)), handle;

	CHECK_EQ(be32toh(*(const uint32_t *)(const void *)came.header), NBD_REPLY_MAGIC);
	memcpy(&handle, came.header + 8, 4);
	CHECK(handle < sent.count && !*(const uint32_t *)(const void *)(came.header + 12));
	struct request *q = &asked[handle];

	CHECK(!q->answered);
	q->answered = true;
	if (!good(&q->r))
		CHECK(error && error != PVF_NBD_EIO);
	else if (on_bad_sectors(&q->r))
		CHECK(error == PVF_NBD_EIO || (!error && streams(&q->r)));
	else
		CHECK(!error && q->whole);
	came.of = q;
	came.at = q->r.from;
	came.data = q->r.type == NBD_CMD_READ && !error ? q->r.length : 0;
}

/* The client reads; how much came. */
static size_t hear(size_t max)
{
	static unsigned char in[65536];
	ssize_t n = recv(ends[0], in, max < sizeof(in) ? max : sizeof(in), MSG_DONTWAIT);

	for (ssize_t i = 0; i < n; i++) {
		if (came.have < PVF_NBD_REPLY) {
			came.header[came.have++] = in[i];
			if (came.have == PVF_NBD_REPLY)
				reply_came();
		} else {
			CHECK(in[i] == content(came.at));
			came.at++;
			came.data--;
		}
		if (came.have == PVF_NBD_REPLY && !came.data)
			came.have = 0;
	}
	return n > 0 ? (size_t)n : 0;
}

/* The backend */

static void take(void)
{
	while (held_count < 64 && RING_HAS_UNCONSUMED_REQUESTS(&back)) {
		memcpy(&held[held_count++], RING_GET_REQUEST(&back, back.req_cons), sizeof(held[0]));
		back.req_cons++;
	}
	back.sring->req_event = back.req_cons + 1;
}

static int16_t execute(const blkif_request_t *r)
{
	uint64_t at = r->sector_number * 512;
	bool bad = false;

	if (r->operation == BLKIF_OP_DISCARD) {
		struct blkif_request_discard d;

		memcpy(&d, r, sizeof(d));
		CHECK(d.nr_sectors && (d.sector_number + d.nr_sectors) * 512 <= DISK);
		CHECK(!(d.sector_number % (geo.discard_granularity / 512 ? geo.discard_granularity / 512 : 1)));
		return BLKIF_RSP_OKAY;
	}
	if (r->operation == BLKIF_OP_FLUSH_DISKCACHE || r->operation == BLKIF_OP_WRITE_BARRIER)
		return BLKIF_RSP_OKAY;
	const struct blkif_request_segment *seg = r->seg;
	uint32_t op = r->operation, segments = r->nr_segments;

	if (op == BLKIF_OP_INDIRECT) {
		const blkif_request_indirect_t *i = (const void *)r;
		uint32_t page = (i->indirect_grefs[0] - GREF(0)) / 5;

		CHECK(page < pool_count && i->indirect_grefs[0] == GREF(page));
		CHECK(i->nr_segments > 11);
		op = i->indirect_op;
		segments = i->nr_segments;
		at = i->sector_number * 512;
		seg = (const void *)(pool_pages + page * 4096);
	}
	CHECK(op == BLKIF_OP_READ || op == BLKIF_OP_WRITE);
	CHECK(segments && segments <= geo.max_segments);
	for (uint32_t i = 0; i < segments; i++) {
		uint32_t page = (seg[i].gref - GREF(0)) / 5;
		size_t n = (size_t)(seg[i].last_sect - seg[i].first_sect + 1) * 512;

		CHECK(page < pool_count && seg[i].gref == GREF(page) && at + n <= DISK);
		unsigned char *p = pool_pages + page * 4096 + seg[i].first_sect * 512;

		for (size_t k = 0; k < n; k++, at++) {
			bad |= at >= BAD_FROM && at < BAD_TO;
			if (op == BLKIF_OP_WRITE)
				CHECK(p[k] == content(at));
			else
				p[k] = content(at);
		}
	}
	return bad ? BLKIF_RSP_ERROR : BLKIF_RSP_OKAY;
}

static void answer(uint32_t k)
{
	blkif_response_t *rsp = RING_GET_RESPONSE(&back, back.rsp_prod_pvt);
	blkif_request_t r = held[k];

	held[k] = held[--held_count];
	uint8_t op = r.operation;

	if (op == BLKIF_OP_INDIRECT)
		op = ((const blkif_request_indirect_t *)(const void *)&r)->indirect_op;
	*rsp = (blkif_response_t){.id = r.id, .operation = op, .status = execute(&r)};
	back.rsp_prod_pvt++;
	back.sring->rsp_prod = back.rsp_prod_pvt;
}

/* One turn of queue.c, without timers and event channel. True: there is more to do. */
static bool engine(bool no_new)
{
	struct epoll_event events[4];
	bool again;

	if (target.gone)
		return false;
	for (int n = epoll_wait(epoll_fd, events, 4, 0), i = 0; i < n; i++)
		pvf_target_event(&target, events[i].events);
	uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

	CHECK_EQ(pvf_blk_drain(&blk, n), n);
	CHECK(!blk.fault.rule);
	again = pvf_target_send(&target, &blk);
	again |= pvf_target_receive(&target, &blk, no_new);
	again |= pvf_target_send(&target, &blk);
	pvf_ring_push(&blk.ring);
	CHECK_EQ(pvf_ring_final_check(&blk.ring, &blk.fault), 0);
	CHECK(blk.in_flight <= blk.ring.entries && blk.pool.free <= blk.pool.pages);
	if (blk.fault.rule)
		abort();
	return again;
}

static void check_end(void)
{
	bool broke = false;

	for (uint32_t i = 0; i < sent.count; i++)
		broke |= streams(&asked[i].r) && on_bad_sectors(&asked[i].r);
	CHECK(sent.junk || sent.disconnect || sent.closed || broke);
	if (!sent.junk && !sent.closed && !broke)
		CHECK_EQ(target.error, 0);
}

/* Both ends do their best until nothing moves any more. */
static void finish(void)
{
	uint32_t idle = 0;

	if (sent.payload && sent.payload < OUT_MAX / 2)
		say(NULL, sent.payload);
	while (idle < 4 && !target.gone) {
		size_t left = out_end - out_at;
		bool moved = false;

		flush_out();
		moved |= left != out_end - out_at;
		moved |= engine(false);
		moved |= hear(SIZE_MAX) > 0;
		take();
		while (held_count) {
			answer(0);
			moved = true;
		}
		idle = moved ? 0 : idle + 1;
	}
	while (hear(SIZE_MAX))
		;
	if (target.gone)
		check_end();
	for (uint32_t i = 0; i < sent.count && (!target.gone || !target.error); i++)
		CHECK(asked[i].answered || !asked[i].whole || sent.closed);
	if (target.gone)
		return;
	CHECK(!sent.closed && !sent.disconnect && !sent.junk);
	CHECK_EQ(came.have, 0);
	CHECK_EQ(blk.in_flight, 0);
	/* A write whose payload never comes may be the only one left. */
	CHECK_EQ(blk.pending, sent.payload && blk.current != PVF_NONE);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	uint32_t grefs[POOL_MAX];
	int buffer = 4608 << upto(&in, 5);

	memset(&sent, 0, sizeof(sent));
	memset(&came, 0, sizeof(came));
	out_at = out_end = held_count = 0;
	pool_count = 2 + upto(&in, POOL_MAX - 1);
	geo = (struct pvf_geometry){
		.sectors = DISK / 512,
		.sector_size = 512u << upto(&in, 4),
		.features = upto(&in, 16) ^ (PVF_BLK_FLUSH | PVF_BLK_DISCARD),
		.max_segments = 1 + upto(&in, 24),
		.discard_granularity = upto(&in, 3) * 4096,
	};
	for (uint32_t i = 0; i < pool_count; i++)
		grefs[i] = GREF(i);
	memset(pool_pages, 0, sizeof(pool_pages));
	pvf_blk_init(&blk);
	pvf_blk_attach(&blk, ring_page, sizeof(ring_page), pool_pages, pool_count, grefs, upto(&in, 2));
	pvf_blk_start(&blk, &geo);
	BACK_RING_INIT(&back, (blkif_sring_t *)(void *)ring_page, sizeof(ring_page));
	epoll_fd = epoll_create1(0);
	CHECK(epoll_fd >= 0 && !socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	for (int i = 0; i < 2; i++)
		setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
	CHECK(!pvf_target_open(&target, ends[1], epoll_fd, 1));

	while (more(&in) && !target.gone) {
		uint32_t op = upto(&in, 256);
		uint8_t bytes[64];
		size_t n;

		switch (op % 8) {
		case 0:
		case 1: /* a request, and what follows it */
			ask(&in, (uint8_t)number(&in, 1));
			if (op & 8 && sent.payload < OUT_MAX / 4)
				say(NULL, sent.payload);
			break;
		case 2: /* some of a payload */
			n = number(&in, 2);
			say(NULL, n < sent.payload ? n : sent.payload);
			break;
		case 3: /* anything */
			n = raw(&in, bytes, sizeof(bytes));
			if (op & 8)
				say(bytes, n);
			break;
		case 4:
			hear(op & 8 ? SIZE_MAX : number(&in, 2));
			break;
		case 5: /* the backend answers some */
			take();
			for (n = 1 + (op >> 3); n && held_count; n--)
				answer(upto(&in, held_count));
			break;
		case 6:
			if (op == 6 && !sent.closed) {
				sent.closed = true;
				shutdown(ends[0], SHUT_WR);
			} else if (op == 14) {
				struct nbd_request wire = {.magic = htobe32(NBD_REQUEST_MAGIC),
							   .type = htobe32(NBD_CMD_DISC)};
				say(&wire, sizeof(wire));
			}
			break;
		default:
			engine(op & 8 && op & 16);
		}
	}
	finish();
	close(ends[0]);
	pvf_target_close(&target);
	pvf_blk_drop_target(&blk);
	CHECK_EQ(blk.pool.free + 11 * blk.in_flight >= blk.pool.pages, true);
	if (!blk.in_flight)
		CHECK(pvf_blk_portable(&blk) && blk.free_requests == PVF_REQUESTS);
	pvf_blk_detach(&blk);
	CHECK_EQ(blk.free_requests, PVF_REQUESTS);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
	close(epoll_fd);
	return 0;
}
