/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The block backend of the embedded host, hostile: what it does to pages and slots, and how the rules
 * of its table are chosen, spent and combined.
 */
#include "blkfaults.h"

static bool filled(struct peer *p, uint32_t page, size_t from, size_t to, uint64_t word)
{
	const uint64_t *w = (const uint64_t *)(const void *)data(p, page);

	for (size_t i = from / 8; i < to / 8; i++)
		if (__atomic_load_n(&w[i], __ATOMIC_RELAXED) != word)
			return false;
	return true;
}

static void rewrites_pages(void)
{
	for (uint32_t persistent = 0; persistent < 2; persistent++) {
		struct peer p = {.persistent = persistent};
		struct pvf_bb_rule r = rule(PVF_BB_PAGES);

		peer_begin(&p, NULL, DISK);
		r.value = 0x1122334455667788;
		r.mode = PVF_BB_BEFORE;
		one(&p, r);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 2), OKAY);
		CHECK(filled(&p, 0, 0, PAGE, r.value) && filled(&p, 1, 0, PAGE, r.value));
		CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_WRITE, 64, gref(2), 2, 3),
				   BLKIF_OP_WRITE), OKAY);
		CHECK(filled(&p, 2, 1024, 2048, r.value) && filled(&p, 2, 2048, PAGE, 0));
		CHECK(filled(&p, 2, 0, 1024, 0));
		r.mode = PVF_BB_AFTER;
		one(&p, r);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 3, 1), OKAY);
		UNTIL(filled(&p, 3, 0, PAGE, r.value));
		use(&p, NULL, 0, 1);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 64, 4, 1), OKAY);
		CHECK(filled(&p, 4, 0, 1024, 0)); /* the write took the page as it was */
		peer_end(&p);
	}
}

static void rewrites_idle_pages(void)
{
	for (uint32_t persistent = 0; persistent < 2; persistent++) {
		struct peer p = {.persistent = persistent};
		struct pvf_bb_rule r = rule(PVF_BB_PAGES);
		struct blkif_response rsp;

		peer_begin(&p, NULL, DISK);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 2), OKAY);
		r.mode = PVF_BB_IDLE;
		r.value = 0x99;
		r.count = 3;
		one(&p, r);
		CHECK(!try_response(&p, 0, &rsp, 0)); /* sets rsp_event: all is seen */
		wait_fired(&p, PVF_BB_PAGES, 3);
		UNTIL(filled(&p, 1, 0, PAGE, r.value));
		CHECK(filled(&p, 0, 0, PAGE, r.value));
		CHECK(filled(&p, 2, 0, PAGE, 0)); /* never granted for anything */
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
		CHECK(filled(&p, 0, 0, PAGE, 0)); /* spent */
		peer_end(&p);
	}
}

static void rewrites_slots(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_SLOTS);
	struct blkif_response rsp;

	peer_begin(&p, NULL, DISK);
	r.value = 0x4141414141414141;
	r.count = 1;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	CHECK_EQ(response(&p).id, r.value);
	r.mode = PVF_BB_AFTER;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	wait_fired(&p, PVF_BB_SLOTS, 2);
	UNTIL(__atomic_load_n(&RING_GET_RESPONSE(&p.queue[0].ring, 1)->id, __ATOMIC_RELAXED) ==
	      r.value);
	p.queue[0].ring.rsp_cons++;
	r.mode = PVF_BB_IDLE;
	one(&p, r);
	CHECK(!try_response(&p, 0, &rsp, 0));
	wait_fired(&p, PVF_BB_SLOTS, 3);
	UNTIL(__atomic_load_n(&RING_GET_RESPONSE(&p.queue[0].ring, 31)->id, __ATOMIC_RELAXED) ==
	      r.value);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	peer_end(&p);
}

static void cheats(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_SHORT);

	peer_begin(&p, NULL, DISK);
	paint(&p, 0, 2, 1);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 2), OKAY);
	r.value = 9;
	one(&p, r);
	wipe(&p, 2, 2, 0xcd);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 2, 2), OKAY);
	CHECK(!memcmp(data(&p, 0), data(&p, 2), 9 * 512));
	for (size_t i = 9 * 512; i < 16 * 512; i++)
		CHECK_EQ(data(&p, 2)[i], 0xcd);
	r = rule(PVF_BB_FAIL);
	r.value = (uint64_t)UNSUPPORTED;
	one(&p, r);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 2, 2), UNSUPPORTED);
	r.value = (uint64_t)OKAY;
	one(&p, r);
	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 2, 2), OKAY);
	use(&p, NULL, 0, 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 2, 2), OKAY);
	CHECK(painted(&p, 2, 1, 1)); /* neither was done */
	peer_end(&p);
}

static void writes_outside(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_OUTSIDE);

	peer_begin(&p, NULL, DISK);
	r.value = 0xbad;
	one(&p, r);
	pvf_grant_begin(&p.table[gref(9)], BACK_DOMID, ARENA, DATA(9), false);
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_READ, 0, gref(0), 2, 5), BLKIF_OP_READ), OKAY);
	CHECK(filled(&p, 0, 0, 1024, r.value) && filled(&p, 0, 1024, 3072, 0));
	CHECK(filled(&p, 0, 3072, PAGE, r.value));
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_WRITE, 0, gref(9), 2, 5), BLKIF_OP_WRITE), OKAY);
	CHECK(filled(&p, 9, 0, PAGE, 0)); /* what is read-only stays so */
	peer_end(&p);
}

static void looks(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_LOOK);

	peer_begin(&p, NULL, DISK);
	r.value = 0xc0ffee;
	one(&p, r);
	uint64_t *w = (uint64_t *)(void *)data(&p, 0);

	w[0] = w[64] = w[511] = r.value; /* sectors 0, 1 and 7 */
	CHECK_EQ(answer_of(&p, put_part(&p, BLKIF_OP_WRITE, 0, gref(0), 1, 6), BLKIF_OP_WRITE), OKAY);
	CHECK_EQ(stats(&p).canaries, 2);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY); /* before it is filled */
	CHECK_EQ(stats(&p).canaries, 5);
	peer_end(&p);
}

static void chooses(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_FAIL);

	peer_begin(&p, NULL, DISK);
	r.value = (uint64_t)ERROR;
	r.first = 16;
	r.last = 23;
	r.skip = 1;
	r.count = 2;
	one(&p, r);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 2), OKAY);  /* 0..15 */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 24, 0, 2), OKAY); /* 24..39 */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 8, 0, 2), OKAY);  /* skipped */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 8, 0, 2), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0), OKAY);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 23, 0, 1), ERROR);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 16, 0, 1), OKAY); /* spent */
	peer_end(&p);
}

static void draws(void)
{
	uint64_t outcome[3] = {0};

	for (int run = 0; run < 3; run++) {
		struct peer p = {0};
		struct pvf_bb_rule r = rule(PVF_BB_FAIL);

		peer_begin(&p, NULL, DISK);
		r.value = (uint64_t)ERROR;
		r.chance = PVF_BB_ALWAYS / 2;
		use(&p, &r, 1, run == 2 ? 8 : 7);
		for (int i = 0; i < 64; i++)
			outcome[run] |= (uint64_t)(do_io(&p, BLKIF_OP_READ, 0, 0, 1) == ERROR) << i;
		CHECK_EQ(stats(&p).fired[PVF_BB_FAIL], __builtin_popcountll(outcome[run]));
		peer_end(&p);
	}
	CHECK(outcome[0] == outcome[1]);
	CHECK(outcome[0] != outcome[2]);
	CHECK(__builtin_popcountll(outcome[0]) > 16 && __builtin_popcountll(outcome[0]) < 48);
}

static void combines(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r[3] = {rule(PVF_BB_DELAY), rule(PVF_BB_CORRUPT), rule(PVF_BB_CORRUPT)};

	peer_begin(&p, NULL, DISK);
	r[0].value = r[0].extra = 20000;
	r[1].field = PVF_BB_STATUS;
	r[1].value = 5;
	r[2].field = PVF_BB_OPERATION;
	use(&p, r, 3, 1);
	uint64_t began = clock_ms();

	CHECK_EQ(do_io(&p, BLKIF_OP_WRITE, 0, 0, 1), 5); /* of two of a kind the first fires */
	CHECK(clock_ms() - began >= 20);
	peer_end(&p);
}

static void refuses_rules(void)
{
	struct peer p = {0};
	struct pvf_bb_rule many[PVF_BB_RULES + 1], r;
	uint32_t bad;

	peer_begin(&p, NULL, DISK);
	for (uint32_t i = 0; i < PVF_BB_RULES + 1; i++)
		many[i] = rule(PVF_BB_DROP);
	CHECK_EQ(pvf_bb_set_rules(p.bb, many, PVF_BB_RULES + 1, 0, &bad), -EINVAL);
	CHECK_EQ(pvf_bb_set_rules(p.bb, many, PVF_BB_RULES, 0, &bad), 0);
	many[5].kind = PVF_BB_NONE;
	CHECK_EQ(pvf_bb_set_rules(p.bb, many, PVF_BB_RULES, 0, &bad), -EINVAL);
	CHECK_EQ(bad, 5);
	r = rule(PVF_BB_DIE + 1);
	CHECK_EQ(pvf_bb_set_rules(p.bb, &r, 1, 0, &bad), -EINVAL);
	r = rule(PVF_BB_REORDER);
	CHECK_EQ(pvf_bb_set_rules(p.bb, &r, 1, 0, &bad), -EINVAL);
	r = rule(PVF_BB_DELAY);
	r.value = 2;
	CHECK_EQ(pvf_bb_set_rules(p.bb, &r, 1, 0, &bad), -EINVAL);
	r = rule(PVF_BB_CORRUPT);
	r.field = PVF_BB_STATUS;
	r.mode = PVF_BB_STALE;
	CHECK_EQ(pvf_bb_set_rules(p.bb, &r, 1, 0, &bad), -EINVAL);
	r = rule(PVF_BB_FAIL);
	r.first = 1;
	r.last = 0;
	CHECK_EQ(pvf_bb_set_rules(p.bb, &r, 1, 0, &bad), -EINVAL);
	use(&p, NULL, 0, 0); /* the refused ones changed nothing: all was dropped until now */
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	peer_end(&p);
}

int main(void)
{
	static const struct test tests[] = {
		{"pages are rewritten before and after the response", rewrites_pages},
		{"pages are rewritten while nothing happens", rewrites_idle_pages},
		{"slots are rewritten before, after and while nothing happens", rewrites_slots},
		{"a request is answered without being done", cheats},
		{"bytes beside the request's are written", writes_outside},
		{"canaries where they should not stand are counted", looks},
		{"a rule chooses by sectors, skips, and is spent", chooses},
		{"chance is the seed's", draws},
		{"several faults hit one request, one of a kind", combines},
		{"rules without sense are refused and change nothing", refuses_rules},
	};

	return RUN_TESTS(tests);
}
