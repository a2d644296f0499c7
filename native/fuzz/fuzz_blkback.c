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
#include <sys/mman.h>

/* The ring's consumer itself: its parts are static. */
#include "../host/blkback_ring.c"

#define PAGES 40u /* of the arena: ring first */
#define RING_PAGES 2u
#define DISK (256u << 10)
#define FRONT 7
#define BACK 0
#define ARENA 3
#define REFS 256u /* references that are ever granted */
#define REF(page) (20u + 3u * (page))

static struct pvf_bb *bb;
static struct bb_ring *r;
static struct pvf_grant *table;
static unsigned char *arena;
static struct pvf_channel *channel;

static void *memory(size_t bytes, int *fd)
{
	*fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(*fd >= 0 && !ftruncate(*fd, (off_t)bytes) && !fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK));
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void grants(void)
{
	for (uint32_t i = RING_PAGES; i < PAGES; i++)
		pvf_grant_begin(&table[REF(i)], BACK, ARENA, i, i % 4 != 3);
}

/* Everything that is expensive, once. */
static void connect_once(void)
{
	struct pvf_bb_features features = {.sector_size = 512, .batch = 4};
	uint32_t refs[RING_PAGES];
	int table_fd, track_fd, arena_fd, channel_fd, error;
	char why[PVF_BB_TEXT];

	table = memory(PVF_GRANTS * sizeof(*table), &table_fd);
	memory(PVF_GRANTS * sizeof(uint32_t), &track_fd);
	arena = memory(PAGES * BB_PAGE, &arena_fd);
	channel = memory(4096, &channel_fd);
	pvf_channel_init(channel);
	for (uint32_t i = 0; i < RING_PAGES; i++) {
		refs[i] = REF(i);
		pvf_grant_begin(&table[refs[i]], BACK, ARENA, i, true);
	}
	features.flags = PVF_BB_PERSISTENT;
	bb = pvf_bb_new(NULL, DISK, &features, &error);
	CHECK_EQ(error, 0);
	CHECK(!pvf_bb_connect(bb, table_fd, track_fd, BACK, FRONT, -1, true));
	CHECK(!pvf_bb_arena(bb, ARENA, arena_fd));
	int own = eventfd(0, EFD_NONBLOCK), other = eventfd(0, EFD_NONBLOCK);

	CHECK(!pvf_bb_ring(bb, refs, RING_PAGES, channel_fd, 1, own, other, why));
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

	memset(arena, 0, PAGES * BB_PAGE);
	SHARED_RING_INIT(r->ring.sring);
	BACK_RING_INIT(&r->ring, r->ring.sring, RING_PAGES * BB_PAGE);
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

static uint32_t a_ref(struct input *in)
{
	uint32_t n = upto(in, 256);

	return n < PAGES ? REF(n) : n < 250 ? REF(n % PAGES) + 1 : (uint32_t)number(in, 4);
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
		uint32_t page = RING_PAGES + upto(in, PAGES - RING_PAGES);
		struct blkif_request_segment *s = (void *)(arena + page * BB_PAGE);

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

static void mutate(struct input *in)
{
	uint32_t n;

	switch (upto(in, 5)) {
	case 0:
		arena[upto(in, RING_PAGES * BB_PAGE)] = (unsigned char)number(in, 1);
		break;
	case 1:
		((uint32_t *)(void *)arena)[upto(in, 4)] += (uint32_t)(int8_t)number(in, 1);
		break;
	case 2: /* not the word, with which the maps are counted, nor what has a map: the hub's rules */
		n = a_ref(in) % REFS;
		if (pvf_grant_maps(&table[n]))
			break;
		table[n].domid = (uint16_t)upto(in, 2);
		table[n].arena = upto(in, 4) ? ARENA : (uint16_t)number(in, 2);
		table[n].page = upto(in, 4) ? upto(in, PAGES) : (uint32_t)number(in, 4);
		break;
	case 3:
		n = REF(RING_PAGES + upto(in, PAGES - RING_PAGES));
		if (upto(in, 2))
			pvf_grant_end(&table[n]);
		else if (!pvf_grant_maps(&table[n]))
			pvf_grant_begin(&table[n], BACK, ARENA, upto(in, PAGES), upto(in, 2));
		break;
	default:
		((unsigned char *)channel)[upto(in, 256)] = (unsigned char)number(in, 1);
	}
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
	uint32_t bad, maps = 0;

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
	for (uint32_t i = 0; i < REFS; i++)
		maps += pvf_grant_maps(&table[i]);
	CHECK_EQ(maps, RING_PAGES);
	for (uint32_t i = 0; i < REFS; i++)
		if (table[i].word && !pvf_grant_maps(&table[i]))
			memset(&table[i], 0, sizeof(table[i]));
	return 0;
}
