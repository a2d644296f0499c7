/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The block backend's end of a ring, before a frontend that writes anything into ring, grant table and
 * pages between any two requests. The ring's thread is not started: its turns are taken here.
 *
 * What must hold: no memory but the arena's is touched; each request taken is answered once, unless a
 * rule drops or repeats it; nothing stays mapped that no request uses; a turn ends.
 */
#include "fuzz.h"

#include <sys/eventfd.h>

/* The ring's consumer itself: its parts are static. */
#include "../host/blkback_ring.c"

#define PAGES 40u
#define RINGS 2u  /* pages of the ring */
#define REFS 256u /* references that are ever granted */
#include "fuzz_frontend.h"

#define DISK (256u << 10)

static struct pvf_bb *bb;
static struct bb_ring *r;

/* Everything that is expensive, once. */
static void connect_once(void)
{
	struct pvf_bb_features features = {.sector_size = 512, .batch = 4};
	uint32_t refs[RINGS];
	int table_fd, track_fd, arena_fd, channel_fd, error;
	char why[PVF_BB_TEXT];

	frontend_once(&table_fd, &track_fd, &arena_fd, &channel_fd);
	for (uint32_t i = 0; i < RINGS; i++)
		refs[i] = REF(i);
	features.flags = PVF_BB_PERSISTENT;
	bb = pvf_bb_new(NULL, DISK, &features, &error);
	CHECK_EQ(error, 0);
	CHECK(!pvf_bb_connect(bb, table_fd, track_fd, BACK, FRONT, -1, true));
	CHECK(!pvf_bb_arena(bb, ARENA, arena_fd));
	int own = eventfd(0, EFD_NONBLOCK), other = eventfd(0, EFD_NONBLOCK);

	CHECK(!pvf_bb_ring(bb, refs, RINGS, channel_fd, 1, own, other, why));
	r = bb->conn->ring[0];
	for (uint32_t i = 0; i < BB_SLOTS; i++)
		r->request[i].segment = &r->segments[(size_t)i * PVF_BB_SEGMENTS];
}

static void reset(struct input *in)
{
	struct pvf_bb_features features = {
		.flags = upto(in, 32),
		.max_indirect = upto(in, 2) ? upto(in, 256) : 0,
		.sector_size = 512u << upto(in, 4),
		.discard_granularity = upto(in, 3) * 4096,
		.discard_alignment = upto(in, 3) * 512,
		.max_persistent = upto(in, 16),
		.batch = upto(in, 8),
	};

	memset(arena, 0, PAGES * PAGE);
	SHARED_RING_INIT(r->ring.sring);
	BACK_RING_INIT(&r->ring, r->ring.sring, RINGS * PAGE);
	r->published = r->pushed = r->unasked = 0;
	r->halted = r->more = r->barrier = r->answered = false;
	r->held_count = r->kept_count = r->recent_count = r->idle_count = 0;
	r->storm_due = r->pages_due = r->slots_due = 0;
	for (uint32_t i = RING_SIZE(&r->ring); i; i--)
		r->idle[r->idle_count++] = (uint16_t)(i - 1);
	memset(&r->stats, 0, sizeof(r->stats));
	grants();
	pvf_bb_set_features(bb, &features);
	bb->conn->persistent = upto(in, 2);
}

static void rules(struct input *in)
{
	struct pvf_bb_rule rule[3];
	uint32_t n = upto(in, 4), bad;

	memset(rule, 0, sizeof(rule));
	for (uint32_t i = 0; i < n; i++) {
		/* What kills the process is no finding. */
		rule[i].kind = upto(in, PVF_BB_DIE);
		rule[i].mode = upto(in, 4);
		rule[i].field = upto(in, 3);
		rule[i].last = UINT64_MAX;
		rule[i].chance = upto(in, 4) ? PVF_BB_ALWAYS : PVF_BB_ALWAYS / 2;
		rule[i].skip = upto(in, 3);
		rule[i].count = upto(in, 3);
		rule[i].value = upto(in, 2) ? upto(in, 8) : number(in, 8);
		if (rule[i].kind == PVF_BB_DELAY)
			rule[i].value = rule[i].extra = 0;
		if (rule[i].kind == PVF_BB_REORDER)
			rule[i].extra = 1;
	}
	pvf_bb_set_rules(bb, rule, n, upto(in, 256), &bad);
}

/* The frontend */

static void put(struct input *in)
{
	RING_IDX prod = r->ring.sring->req_prod;
	blkif_request_t *q = RING_GET_REQUEST(&r->ring, prod);
	uint32_t how = upto(in, 256);
	static const uint8_t ops[] = {BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_READ, BLKIF_OP_WRITE,
				      BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER,
				      BLKIF_OP_DISCARD, BLKIF_OP_INDIRECT};

	memset(q, 0, sizeof(union blkif_sring_entry));
	q->operation = how & 128 ? (uint8_t)number(in, 1) : ops[how % 8];
	q->id = prod;
	q->sector_number = how & 64 ? number(in, 8) : (uint64_t)upto(in, 64) * 8;
	q->nr_segments = (uint8_t)(how & 32 ? number(in, 1) : 1 + upto(in, 11));
	if (q->operation == BLKIF_OP_INDIRECT) {
		struct blkif_request_indirect *i = (void *)q;
		uint32_t page = RINGS + upto(in, PAGES - RINGS);
		struct blkif_request_segment *s = (void *)(arena + page * PAGE);

		i->indirect_op = upto(in, 3);
		i->nr_segments = (uint16_t)(how & 32 ? number(in, 2) : 1 + upto(in, 40));
		i->sector_number = (uint64_t)upto(in, 64) * 8;
		i->indirect_grefs[0] = how & 16 ? a_ref(in) : REF(page);
		for (uint32_t n = 0; n < 40 && more(in); n++)
			s[n] = (struct blkif_request_segment){a_ref(in), 0, 7};
	} else if (q->operation == BLKIF_OP_DISCARD) {
		((struct blkif_request_discard *)(void *)q)->nr_sectors =
			how & 16 ? number(in, 8) : upto(in, 256);
	} else {
		for (uint32_t n = 0; n < q->nr_segments && n < 11; n++) {
			uint8_t first = 0, last = 7;

			if (how & 16) {
				first = (uint8_t)upto(in, 9);
				last = (uint8_t)upto(in, 9);
			}
			q->seg[n] = (struct blkif_request_segment){a_ref(in), first, last};
		}
	}
	r->ring.sring->req_prod = prod + 1;
}

static void turn(void)
{
	uint64_t next;

	if (!r->halted)
		work(r);
	timers(r, &next);
	bb_idle_faults(r);
	publish(r, 0, false);
	CHECK(r->held_count + r->idle_count == RING_SIZE(&r->ring));
	/* A drop has fired when the request was taken, and counts when it is done. */
	uint64_t dropped = bb->rules.fired[PVF_BB_DROP];

	for (uint32_t i = 0; i < r->held_count; i++)
		dropped -= bb_action(&r->request[r->held[i]], PVF_BB_DROP) != NULL;
	CHECK_EQ(r->stats.responses - r->unasked + dropped + r->held_count, r->stats.requests);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	uint32_t bad;

	if (!bb)
		connect_once();
	memset(bb->rules.fired, 0, sizeof(bb->rules.fired));
	reset(&in);
	rules(&in);
	while (more(&in)) {
		switch (upto(&in, 8)) {
		case 0:
			turn();
			break;
		case 1:
			mutate(&in);
			break;
		case 2:
			if (upto(&in, 4) == 3)
				rules(&in);
			break;
		case 3:
			pvf_bb_release(bb);
			break;
		default:
			put(&in);
		}
	}
	turn();
	pvf_bb_set_rules(bb, NULL, 0, 1, &bad);
	pvf_bb_release(bb);
	turn();
	CHECK_EQ(r->held_count, 0);
	for (uint32_t i = 0; i < r->kept_count; i++) {
		CHECK(!r->kept[r->kept_ref[i]].used);
		pvf_peer_unmap(&r->conn->peer, r->kept_ref[i]);
		r->kept[r->kept_ref[i]] = (struct bb_kept){0};
	}
	r->kept_count = 0;
	only_the_rings_are_mapped();
	return 0;
}
