/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The disk engine's consumer of the ring, without a socket: a backend that writes anything anywhere in
 * the shared pages between any two steps, under a client in memory.
 *
 * What must hold: the private tables stay consistent, every page has one owner, no more is in flight
 * than the ring has slots; a page never shows the backend what another request wrote (rule 17), nor a
 * client what it did not write itself and the disk did not give (rule 19); every request accepted is
 * answered exactly once. All that clients ever write is WRITTEN, and no backend writes that.
 */
#include "fuzz.h"

#include <endian.h>

#include <linux/nbd.h>
#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/blkif.h>

#include "blk.h"

#define PAGES_MAX 40u
#define RING_MAX (4u * PVF_PAGE_SIZE)
#define DISK 2048u /* sectors */
#define WRITTEN 0x57
#define GREF(page) (900u + 3u * (page))
#define VDEV 51728u
#define HELD 128u
#define REQUESTS 1024u

static _Alignas(4096) unsigned char ring_pages[RING_MAX], pool_pages[PAGES_MAX * PVF_PAGE_SIZE];
static unsigned char wire[1u << 16]; /* of a reply: what was taken from the engine */
static struct pvf_blk blk;
static size_t ring_bytes;
static uint32_t pages;

static struct { /* what the client knows, by handle */
	uint16_t type;
	uint32_t length;
	bool open;
} asked[REQUESTS];
static uint32_t asked_count, open_count;
static struct { /* the reply that is being taken */
	uint8_t header[PVF_NBD_REPLY];
	uint32_t have, data, handle;
} reply;

static struct { /* what the engine put into the ring, as it was then */
	uint64_t id;
	uint8_t op;
} held[HELD];
static uint32_t held_count, seen_prod, rsp_prod;

static void own(uint8_t *owner, uint16_t page)
{
	CHECK(page < pages && !owner[page]);
	CHECK(blk.pool.state[page] == PVF_PAGE_USED);
	owner[page] = 1;
}

/* What is true at any time. */
static void check_tables(void)
{
	static uint8_t owner[PVF_MAX_POOL_PAGES], free_piece[PVF_PIECES];
	uint32_t in_flight = 0, used = 0;

	memset(owner, 0, sizeof(owner));
	memset(free_piece, 0, sizeof(free_piece));
	CHECK(blk.free_pieces <= PVF_PIECES && blk.free_requests <= PVF_REQUESTS);
	for (uint32_t i = 0; i < blk.free_pieces; i++) {
		CHECK(!free_piece[blk.free_piece[i]]);
		free_piece[blk.free_piece[i]] = 1;
	}
	for (uint32_t i = 0; i < PVF_PIECES; i++) {
		const struct pvf_piece *p = &blk.piece[i];

		if (free_piece[i])
			continue;
		in_flight += p->in_flight;
		CHECK(p->pages <= PVF_BLK_SEGMENTS && p->request < PVF_REQUESTS);
		uint16_t page = p->first;

		for (uint32_t k = 0; k < p->pages; k++, used++, page = blk.pool.next[page])
			own(owner, page);
		if (p->descriptors != PVF_NONE)
			used++, own(owner, p->descriptors);
	}
	for (uint32_t i = 0; i < blk.pool.free; i++) {
		CHECK(blk.pool.stack[i] < pages && !owner[blk.pool.stack[i]]);
		CHECK(blk.pool.state[blk.pool.stack[i]] == PVF_PAGE_FREE);
		owner[blk.pool.stack[i]] = 1;
	}
	CHECK_EQ(used + blk.pool.free, blk.pool.pages);
	CHECK_EQ(in_flight, blk.in_flight);
}

static void check_counts(void)
{
	CHECK(blk.in_flight <= blk.ring.entries);
	CHECK_EQ(blk.pending, open_count);
}

/* A request that has just been put into its slot: what the backend is shown. */
static void look_at(const blkif_request_t *r)
{
	blkif_request_indirect_t indirect;
	const struct blkif_request_segment *seg = r->seg;
	uint64_t id = r->id, sector = r->sector_number;
	uint32_t op = r->operation, segments = r->nr_segments, handle = r->handle;

	if (op == BLKIF_OP_INDIRECT) {
		memcpy(&indirect, r, sizeof(indirect));
		uint32_t page = (indirect.indirect_grefs[0] - GREF(0)) / 3;

		CHECK(indirect.indirect_grefs[0] == GREF(page) && page < pages);
		CHECK(indirect.nr_segments > 11 && indirect.nr_segments <= PVF_BLK_SEGMENTS);
		op = indirect.indirect_op;
		segments = indirect.nr_segments;
		id = indirect.id;
		sector = indirect.sector_number;
		handle = indirect.handle;
		seg = (const struct blkif_request_segment *)(const void *)(
			pool_pages + page * PVF_PAGE_SIZE);
		CHECK(!memchr(seg + segments, WRITTEN, PVF_PAGE_SIZE - segments * sizeof(*seg)));
	} else {
		CHECK(segments <= 11);
	}
	if (held_count < HELD) {
		held[held_count].id = id;
		held[held_count++].op = (uint8_t)op;
	}
	if (op == BLKIF_OP_FLUSH_DISKCACHE || op == BLKIF_OP_WRITE_BARRIER) {
		CHECK(!segments);
		return;
	}
	if (op == BLKIF_OP_DISCARD) {
		struct blkif_request_discard d;

		memcpy(&d, r, sizeof(d));
		CHECK(d.nr_sectors && d.sector_number + d.nr_sectors <= DISK);
		return;
	}
	CHECK(op == BLKIF_OP_READ || op == BLKIF_OP_WRITE);
	CHECK(handle == (blkif_vdev_t)VDEV && segments);
	uint64_t sectors = 0;

	for (uint32_t i = 0; i < segments; i++) {
		uint32_t gref = seg[i].gref, page = (gref - GREF(0)) / 3;
		uint32_t first = seg[i].first_sect, last = seg[i].last_sect;

		CHECK(gref == GREF(page) && page < pages && first <= last && last < 8);
		const unsigned char *p = pool_pages + page * PVF_PAGE_SIZE;

		sectors += last - first + 1;
		if (op == BLKIF_OP_READ) {
			CHECK(!memchr(p, WRITTEN, PVF_PAGE_SIZE));
		} else {
			CHECK(!memchr(p, WRITTEN, first * 512));
			CHECK(!memchr(p + (last + 1) * 512, WRITTEN, PVF_PAGE_SIZE - (last + 1) * 512));
		}
	}
	CHECK(sector + sectors <= DISK);
}

/* Before anybody can write over them. */
static void look_at_new(void)
{
	const blkif_sring_t *sring = (const blkif_sring_t *)(const void *)ring_pages;

	for (; seen_prod != blk.ring.req_prod_pvt; seen_prod++) {
		blkif_request_t r;

		memcpy(&r, &sring->ring[seen_prod & (blk.ring.entries - 1)].req, sizeof(r));
		look_at(&r);
	}
}

/* The client */

static void begin(struct input *in)
{
	static const uint16_t types[] = {NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_WRITE,
					 NBD_CMD_FLUSH, NBD_CMD_TRIM, 6, 0x7fff};
	uint8_t how = (uint8_t)number(in, 1);
	struct pvf_nbd_request r = {
		.type = types[how & 7],
		.flags = how & 8 ? PVF_NBD_FLAG_FUA : how & 16 ? (uint16_t)number(in, 1) : 0,
		.from = how & 32 ? number(in, 8) : number(in, 1) * 2048,
		.length = how & 64 ? (uint32_t)number(in, 4) : (uint32_t)number(in, 1) * 512,
	};

	if (asked_count == REQUESTS)
		return;
	if (r.type == NBD_CMD_FLUSH && !(how & 96))
		r.from = r.length = 0;
	memcpy(r.handle, &asked_count, sizeof(asked_count));
	asked[asked_count].type = r.type;
	asked[asked_count].length = r.length;
	asked[asked_count++].open = true;
	open_count++;
	pvf_blk_begin(&blk, &r);
}

/* As far as the engine goes with up to `bytes` bytes of payload. */
static enum pvf_step intake(struct input *in, size_t bytes)
{
	enum pvf_step step = pvf_blk_step(&blk);

	look_at_new();
	if (step == PVF_STEP_HEADER && in) {
		begin(in);
	} else if (step == PVF_STEP_PAYLOAD) {
		struct iovec iov[PVF_BLK_PAYLOAD];
		bool last;
		int n = pvf_blk_payload(&blk, iov, &last);
		size_t done = 0;

		for (int i = 0; i < n && bytes; i++) {
			size_t part = iov[i].iov_len < bytes ? iov[i].iov_len : bytes;

			memset(iov[i].iov_base, WRITTEN, part);
			bytes -= part;
			done += part;
		}
		pvf_blk_payload_add(&blk, done);
	} else if (step == PVF_STEP_SKIP) {
		pvf_blk_skip(&blk, bytes < blk.skip ? bytes : blk.skip);
	}
	return step;
}

static void header_came(void)
{
	uint32_t error = be32toh(*(const uint32_t *)(const void *)(reply.header + 4));

	CHECK_EQ(be32toh(*(const uint32_t *)(const void *)reply.header), NBD_REPLY_MAGIC);
	memcpy(&reply.handle, reply.header + 8, 4);
	CHECK(reply.handle < asked_count && asked[reply.handle].open);
	CHECK(error == 0 || error == 1 || error == 5 || error == 22 || error == 28 || error == 95);
	reply.data = asked[reply.handle].type == NBD_CMD_READ && !error
			     ? asked[reply.handle].length : 0;
}

static void client_takes(const unsigned char *at, size_t bytes)
{
	while (bytes) {
		size_t part;

		if (reply.have < PVF_NBD_REPLY) {
			part = PVF_NBD_REPLY - reply.have;
			part = part < bytes ? part : bytes;
			memcpy(reply.header + reply.have, at, part);
			reply.have += (uint32_t)part;
			if (reply.have == PVF_NBD_REPLY)
				header_came();
		} else {
			part = reply.data < bytes ? reply.data : bytes;
			CHECK(!memchr(at, WRITTEN, part));
			reply.data -= (uint32_t)part;
		}
		at += part;
		bytes -= part;
		if (reply.have == PVF_NBD_REPLY && !reply.data) {
			asked[reply.handle].open = false;
			open_count--;
			reply.have = 0;
		}
	}
}

/* Takes up to `bytes` bytes of replies. */
static size_t take_replies(size_t bytes, int max)
{
	struct iovec iov[64];
	int n = blk.stream_error ? 0 : pvf_blk_reply(&blk, iov, max);
	size_t done = 0;

	CHECK(n <= max);
	for (int i = 0; i < n && done < bytes; i++) {
		size_t part = iov[i].iov_len < bytes - done ? iov[i].iov_len : bytes - done;

		part = part < sizeof(wire) - done ? part : sizeof(wire) - done;
		memcpy(wire + done, iov[i].iov_base, part);
		done += part;
	}
	if (done) {
		pvf_blk_reply_sent(&blk, done);
		client_takes(wire, done);
	}
	return done;
}

static void client_leaves(void)
{
	pvf_blk_drop_target(&blk);
	for (uint32_t i = 0; i < asked_count; i++)
		asked[i].open = false;
	open_count = 0;
	reply.have = reply.data = 0;
}

/* The backend */

static void mutate(struct input *in, uint32_t how)
{
	blkif_sring_t *sring = (blkif_sring_t *)(void *)ring_pages;
	uint32_t n;

	switch (how % 8) {
	case 0: /* any byte */
		n = upto(in, (uint32_t)ring_bytes);
		ring_pages[n] = (unsigned char)number(in, 1);
		break;
	case 1: /* an index, by a little or to anything */
		n = upto(in, 4);
		((uint32_t *)(void *)ring_pages)[n] += (uint32_t)(int8_t)number(in, 1);
		break;
	case 2:
		n = upto(in, 4);
		((uint32_t *)(void *)ring_pages)[n] = (uint32_t)number(in, 4);
		break;
	case 3: /* a whole slot */
		n = upto(in, blk.ring.entries);
		raw(in, &sring->ring[n], sizeof(sring->ring[n]));
		break;
	case 4: /* granted pages, whosever they are now */
		n = upto(in, pages);
		memset(pool_pages + n * PVF_PAGE_SIZE, (int)(number(in, 1) % WRITTEN), PVF_PAGE_SIZE);
		break;
	default: { /* an answer, good or bent */
		blkif_response_t *rsp =
			&sring->ring[rsp_prod & (blk.ring.entries - 1)].rsp;

		if (!held_count)
			break;
		n = upto(in, held_count);
		*rsp = (blkif_response_t){.id = held[n].id, .operation = held[n].op};
		if (how & 8)
			rsp->status = (int16_t)(how & 16 ? -2 : (int)number(in, 1) - 3);
		if (how & 32)
			rsp->operation ^= (uint8_t)number(in, 1);
		if (how & 64)
			rsp->id ^= (uint64_t)1 << upto(in, 64);
		if (!(how & 128))
			held[n] = held[--held_count];
		sring->rsp_prod = ++rsp_prod;
	}
	}
}

static void drain(struct input *in)
{
	uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

	CHECK(n <= blk.ring.entries);
	while (n-- && !blk.fault.rule) {
		if (in && more(in) && !upto(in, 4))
			mutate(in, upto(in, 256)); /* between the index and the response */
		pvf_blk_drain(&blk, 1);
		look_at_new();
	}
	if (blk.fault.rule)
		blk.pool.quarantined = true; /* as queue.c does */
}

/* Connections */

static void attach(struct input *in)
{
	uint32_t grefs[PAGES_MAX];

	pages = 2 + upto(in, PAGES_MAX - 1);
	ring_bytes = PVF_PAGE_SIZE << upto(in, 3);
	memset(pool_pages, 0, pages * PVF_PAGE_SIZE); /* as gntalloc gives them */
	for (uint32_t i = 0; i < pages; i++)
		grefs[i] = GREF(i);
	pvf_blk_attach(&blk, ring_pages, ring_bytes, pool_pages, pages, grefs, upto(in, 2));
	held_count = seen_prod = rsp_prod = 0;
	CHECK_EQ(blk.ring.entries * sizeof(union blkif_sring_entry) + 64 <= ring_bytes, true);
}

static void start(struct input *in)
{
	struct pvf_geometry geo = {
		.sectors = DISK >> upto(in, 3),
		.sector_size = 512u << upto(in, 4),
		.features = upto(in, 16) ^ (PVF_BLK_FLUSH | PVF_BLK_DISCARD),
		.max_segments = 1 + upto(in, 24),
		.discard_granularity = upto(in, 5) * 1024,
		.discard_alignment = upto(in, 3) * 512,
		.vdev = VDEV,
	};

	pvf_blk_start(&blk, &geo);
}

static void leave(struct input *in)
{
	bool kept = pvf_blk_portable(&blk);

	if (!kept)
		client_leaves();
	pvf_blk_detach(&blk);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
	attach(in);
	start(in);
}

/* An honest backend and a client that reads: everything must come to its end. */
static void finish(void)
{
	blkif_sring_t *sring = (blkif_sring_t *)(void *)ring_pages;

	for (uint32_t round = 0; round < 20000; round++) {
		uint32_t before = blk.pending + blk.in_flight;

		if (blk.stream_error)
			client_leaves();
		drain(NULL);
		if (blk.fault.rule)
			return;
		rsp_prod = blk.ring.rsp_seen;
		for (uint32_t i = 0; i < PVF_PIECES && blk.in_flight; i++) {
			blkif_response_t *rsp = &sring->ring[rsp_prod & (blk.ring.entries - 1)].rsp;

			if (!blk.piece[i].in_flight)
				continue;
			*rsp = (blkif_response_t){.id = blk.piece[i].id, .operation = blk.piece[i].op};
			pvf_ring_push(&blk.ring);
			sring->rsp_prod = ++rsp_prod;
			drain(NULL);
			CHECK(!blk.fault.rule);
		}
		for (int i = 0; i < 64; i++)
			intake(NULL, SIZE_MAX);
		while (take_replies(SIZE_MAX, 64))
			;
		if (!before && !blk.pending && !blk.in_flight && !blk.skip)
			break;
	}
	CHECK_EQ(blk.in_flight, 0);
	CHECK_EQ(blk.pending, 0);
	CHECK_EQ(open_count, 0);
	CHECK_EQ(blk.pool.free, blk.pool.pages);
	CHECK_EQ(blk.free_requests, PVF_REQUESTS);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	uint32_t ops = 0;

	asked_count = open_count = 0;
	memset(&reply, 0, sizeof(reply));
	pvf_blk_init(&blk);
	attach(&in);
	start(&in);
	while (more(&in)) {
		uint32_t op = upto(&in, 256);

		if (blk.stream_error)
			client_leaves();
		if (blk.fault.rule || op == 255) {
			leave(&in);
			check_tables();
			continue;
		}
		switch (op % 8) {
		case 0:
			intake(&in, 0);
			break;
		case 1:
			intake(&in, number(&in, 2));
			break;
		case 2:
			take_replies(op & 8 ? number(&in, 2) : SIZE_MAX, 1 + (int)upto(&in, 64));
			break;
		case 3:
			pvf_ring_push(&blk.ring);
			if (op & 8)
				pvf_ring_final_check(&blk.ring, &blk.fault);
			break;
		case 4:
			drain(&in);
			break;
		case 5:
		case 6:
			mutate(&in, upto(&in, 256));
			break;
		default:
			if (op & 8)
				start(&in);
			else if (op & 16)
				client_leaves();
			else if (op & 32)
				pvf_blk_portable(&blk);
			break;
		}
		check_counts();
		if (!(ops++ & 7))
			check_tables();
	}
	check_tables();
	if (!blk.fault.rule)
		finish();
	pvf_blk_drop_target(&blk);
	pvf_blk_detach(&blk);
	CHECK_EQ(blk.free_requests, PVF_REQUESTS);
	CHECK_EQ(blk.free_pieces, PVF_PIECES);
	return 0;
}
