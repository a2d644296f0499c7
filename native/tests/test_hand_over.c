/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The in-flight table: an engine that moves to another process in the middle of everything goes on,
 * and a table that cannot be is refused.
 */
#include "engine.h"
#include "image.h"

static struct pvf_blk table;

static void write_table(void)
{
	memcpy(&table, &blk, sizeof(blk));
	/* What means nothing in another process. */
	table.ring.shared = NULL;
	table.pool.base = NULL;
	table.fault.field = table.fault.text = (const char *)(uintptr_t)0xdead;
}

static const char *take(struct pvf_blk *into)
{
	return pvf_blk_take_over(into, &table, ring_pages, ring_bytes, pool_pages, table.pool.pages);
}

static void move(void)
{
	write_table();
	memset(&blk, 0xa5, sizeof(blk));
	const char *why = take(&blk);

	if (why)
		printf("# %s\n", why);
	CHECK(!why);
}

static void run_moving(uint32_t pages, uint32_t segments, int steps, uint64_t s, int errors)
{
	setup(pages, segments, s);
	error_chance = errors;
	for (int i = 0; i < steps; i++) {
		uint32_t who = below(&seed, 6);

		if (who != 4)
			somebody_moves(who, LANE);
		else if (!below(&seed, 4))
			move();
		CHECK(!target.gone);
	}
	move();
	finish();
	CHECK(replies > (uint64_t)steps / 200);
}

static void moving(void)
{
	static const uint32_t pools[] = {352, 2, 7, 12, 23, 30};

	for (uint64_t s = 1; s <= 12; s++)
		run_moving(pools[s % 6], 1 + (uint32_t)(s * 5 % 11), 6000, s * 7, 0);
	for (uint64_t s = 1; s <= 8; s++)
		run_moving(352, 256, 6000, s * 31, s % 2 ? 10 : 0);
	for (ring_bytes = 8192; ring_bytes <= sizeof(ring_pages); ring_bytes *= 2)
		run_moving(352, 11, 4000, ring_bytes, 0);
	ring_bytes = 4096;
}

static void orphans(void)
{
	for (uint64_t s = 1; s <= 20; s++) {
		setup(22, 1 + (uint32_t)(s % 11), s);
		for (int i = 0; i < 500; i++) {
			client_begins(LANE);
			client_sends();
			engine_moves();
			if (below(&seed, 3))
				backend_moves();
		}
		pvf_target_close(&target);
		pvf_blk_drop_target(&blk);
		move();
		ring_empties();
	}
}

/* What was refused waits for the client to take its reply, and a refused write's payload is to come. */
static void unwanted(void)
{
	setup(64, 11, 3);
	say(9, 0, 0, 4096, 0); /* a request of no type that there is */
	say(NBD_CMD_WRITE, 1, DISK, 8192, 0);
	out_end += 8192;
	uint32_t all = out_end;

	out_end -= 100;
	send_all();
	pvf_target_receive(&target, &blk, false);
	CHECK_EQ(blk.reply_count, 2);
	CHECK_EQ(blk.skip, 100);
	move();
	out_end = all;
	send_all();
	until_idle();
	CHECK_EQ(reply_error(), 22); /* EINVAL */
	CHECK_EQ(reply_error(), 28); /* ENOSPC */
	nothing_is_held();
}

/* An engine with something of everything: in the ring, received in part, queued, done, free. */
static void busy(uint64_t s)
{
	static struct pvf_blk good;

	setup(64, 11, s);
	do {
		CHECK(s++ < 1000000);
		client_begins(LANE);
		client_sends();
		engine_moves();
		if (!below(&seed, 3))
			backend_moves();
		client_reads();
	} while (blk.in_flight < 3 || !blk.fillings || !blk.pool.free);
	write_table();
	CHECK(!take(&good));
}

static uint16_t any_piece(bool in_flight)
{
	for (uint32_t i = 0; i < PVF_PIECES; i++)
		if (table.piece[i].in_flight == in_flight && (in_flight || i != table.filling[0]))
			return (uint16_t)i;
	CHECK(!"there is one");
	return 0;
}

static void impossible(void)
{
	static struct pvf_blk into;

	for (int how = 0; how < 22; how++) {
		busy(41);
		struct pvf_piece *p = &table.piece[any_piece(true)];

		switch (how) {
		case 0: table.ring.entries *= 2; break;
		case 1: table.ring.rsp_cons--; break;
		case 2: table.ring.req_prod_pvt += 100; break;
		case 3: table.ring.rsp_seen += 7; break;
		case 4: table.pool.pages--; break;
		case 5: table.pool.stack[0] = 9000; break;
		case 6: table.pool.free--; break;
		case 7: table.pool.quarantined = true; break;
		case 8: table.fault.rule = 5; break;
		case 9: table.in_flight++; break;
		case 10: p->in_flight = false; break;
		case 11: p->id ^= 1; break;
		case 12: p->first = 4000; break;
		case 13: p->pages++; break;
		case 14: p->request = 60000; break;
		case 15: table.free_piece[0] = table.free_piece[1]; break;
		case 16: table.free_requests++; break;
		case 17: table.pending++; break;
		case 18: table.filled = table.prepared + 1; break;
		case 19: table.filling[0] = any_piece(true); break;
		case 20: table.current = 511 - table.current; break;
		case 21: table.reply_count = 600; break;
		}
		if (!take(&into))
			printf("# %d\n", how);
		CHECK(take(&into));
		CHECK_EQ(into.free_pieces, PVF_PIECES); /* as after pvf_blk_init() */
	}
}

/* Whatever stands in a table: taking it over touches nothing beyond its tables. */
static void noise(void)
{
	static struct pvf_blk into;
	uint64_t s = 77;
	unsigned char *bytes = (unsigned char *)&table;
	uint32_t good = 0;

	busy(43);
	memcpy(&into, &table, sizeof(table));
	static struct pvf_blk original;

	memcpy(&original, &table, sizeof(table));
	for (int i = 0; i < 3000; i++) {
		memcpy(&table, &original, sizeof(table));
		for (uint32_t n = 1 + below(&s, 3); n; n--)
			bytes[below(&s, sizeof(table))] ^= (unsigned char)(1u << below(&s, 8));
		good += !take(&into);
	}
	CHECK(good < 3000);
}

int main(void)
{
	static const struct test tests[] = {
		{"an engine that moves at any moment keeps its data and never sticks", moving},
		{"so does one whose client has gone, with requests in the ring", orphans},
		{"so does one with refused requests that nobody was told of yet", unwanted},
		{"a table that contradicts itself is refused, whatever is wrong with it", impossible},
		{"a table of noise is refused or taken, and nothing else happens", noise},
	};

	return RUN_TESTS(tests);
}
