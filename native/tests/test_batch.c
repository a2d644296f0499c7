/* SPDX-License-Identifier: BSD-2-Clause */
#include <unistd.h>

#include "batch.h"
#include "check.h"

/* So many wake-ups, each of which finds `requests` if we gave way. Returns how often we did. */
static uint32_t wakeups(struct pvf_batch *b, uint32_t count, uint32_t requests, uint64_t ms)
{
	uint32_t gave_way = 0;

	for (uint32_t i = 0; i < count; i++) {
		if (!pvf_batch_wait(b))
			continue;
		gave_way++;
		pvf_batch_found(b, requests, ms);
	}
	return gave_way;
}

static void one_at_a_time(void)
{
	struct pvf_batch b = {0};

	CHECK_EQ(wakeups(&b, 10 * PVF_BATCH_PROBE, 1, 0), 10);
}

static void bursts(void)
{
	struct pvf_batch b = {0};

	CHECK_EQ(wakeups(&b, PVF_BATCH_PROBE, 32, 0), 1);
	CHECK_EQ(wakeups(&b, 1000, 32, 0), 1000);
	CHECK_EQ(wakeups(&b, 1000, 2, 0), 1000);
}

static void bursts_end(void)
{
	struct pvf_batch b = {0};

	wakeups(&b, PVF_BATCH_PROBE, 32, 0);
	CHECK_EQ(wakeups(&b, PVF_BATCH_PROBE - 1, 1, 0), PVF_BATCH_LAST);
}

static void busy_processor(void)
{
	struct pvf_batch b = {0};

	wakeups(&b, PVF_BATCH_PROBE, 32, 0);
	CHECK_EQ(wakeups(&b, 1000, 4 * PVF_BATCH_MS, 4), 1000); /* enough for what it costs */
	CHECK_EQ(wakeups(&b, PVF_BATCH_PROBE - 1, 4 * PVF_BATCH_MS - 1, 4), 1);
}

int main(void)
{
	static const struct test tests[] = {
		{"one request at a time is seldom waited for more", one_at_a_time},
		{"bursts are waited for each time", bursts},
		{"when bursts end, so does the waiting", bursts_end},
		{"a processor that others keep busy is not given away for little", busy_processor},
	};

	return RUN_TESTS(tests);
}
