/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Random requests through the disk engine: client, engine and backend move in any order.
 */
#include "engine.h"

static void roomy(void)
{
	for (uint64_t s = 1; s <= 8; s++)
		run(352, 11, LANE, 20000, s, 0);
}

static void tight(void)
{
	static const uint32_t pools[] = {2, 3, 4, 7, 12, 22, 23, 30};

	for (uint64_t s = 1; s <= 24; s++)
		run(pools[s % 8], 1 + (uint32_t)(s * 5 % 11), LANE, 8000, s * 77, 0);
}

static void indirect(void)
{
	static const uint32_t pools[] = {24, 26, 40, 64, 90, 352}, most[] = {12, 16, 30, 32, 256};

	for (uint64_t s = 1; s <= 30; s++) {
		/* In a small pool reads stream, and one of those that fails ends the connection. */
		run(pools[s % 6], most[s % 5], LANE, 6000, s * 13, s % 6 < 5 ? 0 : 10);
		CHECK(blk.stats.indirect);
	}
}

static void deep_ring(void)
{
	for (ring_bytes = 8192; ring_bytes <= sizeof(ring_pages); ring_bytes *= 2) {
		run(352, 11, LANE, 8000, ring_bytes, 0);
		CHECK_EQ(blk.ring.entries, ring_bytes / 128); /* 112 bytes each, a power of two */
	}
	ring_bytes = 4096;
}

static void failing(void)
{
	for (uint64_t s = 1; s <= 8; s++) {
		run(352, 11, LANE, 10000, s * 1001, 10);
		CHECK(refused);
	}
}

static void lost_target(void)
{
	for (uint64_t s = 1; s <= 30; s++) {
		setup(22, 1 + (uint32_t)(s % 11), s);
		for (int i = 0; i < 3000; i++) {
			if (below(&seed, 2))
				client_begins(LANE);
			client_sends();
			engine_moves();
			if (below(&seed, 3))
				backend_moves();
			if (below(&seed, 2))
				client_reads();
		}
		pvf_target_close(&target);
		pvf_blk_drop_target(&blk);
		ring_empties();
	}
}

int main(void)
{
	static const struct test tests[] = {
		{"random requests through a roomy pool keep their data", roomy},
		{"random requests through pools of 2 to 30 pages keep their data and never stick",
		 tight},
		{"random requests as indirect ones keep their data and never stick", indirect},
		{"random requests through rings of 2 to 16 pages keep their data", deep_ring},
		{"failing requests are answered with errors and hold nothing afterwards", failing},
		{"a lost target leaves nothing behind once the ring is empty", lost_target},
	};

	return RUN_TESTS(tests);
}
