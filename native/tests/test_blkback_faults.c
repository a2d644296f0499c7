/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The block backend of the embedded host, hostile: answers that are late, missing, wrong or too many,
 * events, and an end in the middle. Each fault does what it says, when it says so.
 */
#include <sys/wait.h>

#include "blkfaults.h"

static void delays(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_DELAY);

	peer_begin(&p, NULL, DISK);
	r.value = r.extra = 60000;
	r.ops = 1 << BLKIF_OP_WRITE;
	one(&p, r);
	uint64_t began = clock_ms(), slow = put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	uint64_t fast = put(&p, BLKIF_OP_READ, 8, 1, 1);

	push(&p);
	CHECK_EQ(response(&p).id, fast);
	CHECK_EQ(response(&p).id, slow);
	CHECK(clock_ms() - began >= 60);
	CHECK_EQ(stats(&p).fired[PVF_BB_DELAY], 1);
	peer_end(&p);
}

static void stalls(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STALL);

	peer_begin(&p, NULL, DISK);
	r.count = 2;
	one(&p, r);
	paint(&p, 0, 1, 3);
	put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	put(&p, BLKIF_OP_WRITE, 8, 1, 1);
	push(&p);
	CHECK(silent(&p, SHORT_WAIT));
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 2, 1), OKAY); /* the third, and nothing was written */
	CHECK(wiped(&p, 2, 1, 0));
	CHECK_EQ(stats(&p).in_flight, 2);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 1);
	pvf_bb_release(p.bb);
	CHECK_EQ(response(&p).id, 1);
	CHECK_EQ(response(&p).id, 2);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 2, 1), OKAY);
	CHECK(painted(&p, 2, 1, 3));
	peer_end(&p);
}

static void full_of_stalls(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STALL);

	peer_begin(&p, NULL, DISK);
	r.count = 32;
	one(&p, r);
	for (int round = 0; round < 2; round++) {
		for (uint32_t i = 0; i < 32; i++)
			put(&p, BLKIF_OP_READ, i * 8, i, 1);
		push(&p);
		if (!round) {
			wait_in_flight(&p, 32);
			CHECK(silent(&p, SHORT_WAIT));
			pvf_bb_release(p.bb);
		}
		for (uint32_t i = 0; i < 32; i++)
			CHECK_EQ(response(&p).id, (uint64_t)round * 32 + i + 1);
	}
	peer_end(&p);
}

static void drops(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_DROP);

	peer_begin(&p, NULL, DISK);
	for (uint32_t done = 0; done < 2; done++) {
		r.mode = done;
		r.ops = 1 << BLKIF_OP_WRITE;
		one(&p, r);
		paint(&p, 0, 1, 8);
		put(&p, BLKIF_OP_WRITE, 0, 0, 1);
		push(&p);
		CHECK(silent(&p, SHORT_WAIT));
		CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 0);
		CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 1, 1), OKAY);
		CHECK_EQ(painted(&p, 1, 1, 8), done);
	}
	CHECK_EQ(stats(&p).in_flight, 0);
	peer_end(&p);
}

static void duplicates(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_DUPLICATE);

	peer_begin(&p, NULL, DISK);
	r.value = 2;
	r.count = 1;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(response(&p).id, 1);
	CHECK(silent(&p, SHORT_WAIT));
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY); /* it goes on */
	peer_end(&p);
}

static void reorders(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_REORDER);
	uint64_t order[2][16];
	bool moved = false;

	for (int run = 0; run < 2; run++) {
		uint32_t seen = 0;

		memset(&p, 0, sizeof(p));
		peer_begin(&p, NULL, DISK);
		r.value = 16;
		r.extra = DEADLINE * 1000u;
		one(&p, r);
		for (uint32_t i = 0; i < 15; i++)
			put(&p, BLKIF_OP_READ, i * 8, i, 1);
		push(&p);
		CHECK(silent(&p, SHORT_WAIT));
		put(&p, BLKIF_OP_READ, 0, 15, 1);
		push(&p);
		for (uint32_t i = 0; i < 16; i++) {
			order[run][i] = response(&p).id;
			moved |= order[run][i] != i + 1;
			seen |= 1u << (order[run][i] - 1);
		}
		CHECK_EQ(seen, 0xffff);
		peer_end(&p);
	}
	CHECK(moved);
	CHECK(!memcmp(order[0], order[1], sizeof(order[0]))); /* the same seed */
}

static void reorders_in_time(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_REORDER);

	peer_begin(&p, NULL, DISK);
	r.value = 16;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	CHECK_EQ(response(&p).id, 1);
	peer_end(&p);
}

static struct blkif_response corrupted(struct peer *p, uint32_t field, uint32_t mode, uint64_t value)
{
	struct pvf_bb_rule r = rule(PVF_BB_CORRUPT);

	r.field = field;
	r.mode = mode;
	r.value = value;
	r.count = 1;
	one(p, r);
	put(p, BLKIF_OP_READ, 0, 0, 1);
	push(p);
	return response(p);
}

static void corrupts(void)
{
	struct peer p = {0};
	struct blkif_response rsp;

	peer_begin(&p, NULL, DISK);
	rsp = corrupted(&p, PVF_BB_ID, PVF_BB_SET, 0xffffffffffff);
	CHECK_EQ(rsp.id, 0xffffffffffff);
	CHECK_EQ(rsp.status, OKAY);
	CHECK_EQ(corrupted(&p, PVF_BB_ID, PVF_BB_XOR, 0x100).id, 0x102);
	CHECK_EQ(corrupted(&p, PVF_BB_ID, PVF_BB_STALE, 0).id, 2);
	CHECK_EQ(corrupted(&p, PVF_BB_OPERATION, PVF_BB_SET, 3).operation, 3);
	CHECK_EQ(corrupted(&p, PVF_BB_OPERATION, PVF_BB_XOR, 0xff).operation, 0xff);
	CHECK_EQ(corrupted(&p, PVF_BB_STATUS, PVF_BB_SET, (uint64_t)-7).status, -7);
	CHECK_EQ(corrupted(&p, PVF_BB_STATUS, PVF_BB_XOR, 1).status, 1);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	CHECK_EQ(stats(&p).fired[PVF_BB_CORRUPT], 7);
	peer_end(&p);
}

static void answers_for_another(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r[2] = {rule(PVF_BB_STALL), rule(PVF_BB_CORRUPT)};

	peer_begin(&p, NULL, DISK);
	r[0].ops = 1 << BLKIF_OP_WRITE;
	r[1].ops = 1 << BLKIF_OP_READ;
	r[1].mode = PVF_BB_OTHER;
	use(&p, r, 2, 1);
	put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	put(&p, BLKIF_OP_READ, 0, 1, 1);
	push(&p);
	CHECK_EQ(response(&p).id, 1);
	peer_end(&p); /* with a request still in flight */
}

static void jumps(void)
{
	static const int32_t offsets[] = {100, 2, -1, -50};

	for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++) {
		struct peer p = {0};
		struct pvf_bb_rule r = rule(PVF_BB_PRODUCER);

		peer_begin(&p, NULL, DISK);
		r.value = (uint64_t)(int64_t)offsets[i];
		r.count = 1;
		one(&p, r);
		put(&p, BLKIF_OP_READ, 0, 0, 1);
		push(&p);
		CHECK(event(&p, 0, DEADLINE));
		wait_fired(&p, PVF_BB_PRODUCER, 1);
		UNTIL(stats(&p).pushes == 1);
		CHECK_EQ((int32_t)__atomic_load_n(&p.queue[0].ring.sring->rsp_prod, __ATOMIC_SEQ_CST),
			 1 + offsets[i]);
		/* the next response is where it belongs */
		put(&p, BLKIF_OP_READ, 0, 0, 1);
		push(&p);
		UNTIL(__atomic_load_n(&p.queue[0].ring.sring->rsp_prod, __ATOMIC_SEQ_CST) == 2);
		peer_end(&p);
	}
}

static void loses_events(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_LOST_EVENT);

	peer_begin(&p, NULL, DISK);
	r.count = 1;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	push(&p);
	UNTIL(stats(&p).pushes == 1); /* else the next wait would be for the lost one */
	CHECK(!event(&p, 0, SHORT_WAIT));
	CHECK_EQ(response(&p).status, OKAY); /* for who looks without one */
	CHECK_EQ(stats(&p).notifies, 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	peer_end(&p);
}

static void storms(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STORM);

	peer_begin(&p, NULL, DISK);
	r.count = 200;
	one(&p, r); /* without pause */
	wait_fired(&p, PVF_BB_STORM, 200);
	CHECK(event(&p, 0, DEADLINE));
	/* A bit is a bit; the last may be sent after the one before was taken. */
	CHECK(!event(&p, 0, SHORT_WAIT) || !event(&p, 0, SHORT_WAIT));
	r.count = 0;
	r.value = 500;
	one(&p, r);
	uint64_t began = clock_ms();

	for (int i = 0; i < 20; i++)
		CHECK(event(&p, 0, DEADLINE));
	CHECK(clock_ms() - began >= 30);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 0, 1), OKAY);
	/* wake-ups that no event channel would give: the port has nothing */
	r.mode = PVF_BB_WAKES;
	one(&p, r);
	while (event(&p, 0, 0))
		continue;
	struct pollfd fd = {.fd = p.queue[0].fd[0], .events = POLLIN};

	CHECK_EQ(poll(&fd, 1, DEADLINE), 1);
	CHECK_EQ(pvf_channel_take(p.queue[0].channel, 0, p.queue[0].fd[0]), 0);
	peer_end(&p);
}

static void barriers_wait(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STALL);

	peer_begin(&p, NULL, DISK);
	r.count = 1;
	one(&p, r);
	put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	put(&p, BLKIF_OP_WRITE_BARRIER, 0, 1, 1);
	put(&p, BLKIF_OP_READ, 0, 2, 1);
	push(&p);
	wait_fired(&p, PVF_BB_STALL, 1); /* else the release would come too early for it */
	CHECK(silent(&p, SHORT_WAIT));
	pvf_bb_release(p.bb);
	for (uint64_t i = 1; i <= 3; i++)
		CHECK_EQ(response(&p).id, i);
	/* nor does anything overtake a slow barrier */
	r.ops = 1 << BLKIF_OP_WRITE_BARRIER;
	one(&p, r);
	put(&p, BLKIF_OP_WRITE_BARRIER, 0, 1, 1);
	put(&p, BLKIF_OP_READ, 0, 2, 1);
	push(&p);
	wait_fired(&p, PVF_BB_STALL, 2);
	CHECK(silent(&p, SHORT_WAIT));
	pvf_bb_release(p.bb);
	CHECK_EQ(response(&p).id, 4);
	CHECK_EQ(response(&p).id, 5);
	peer_end(&p);
}

/* The indices alone would still allow it: those that were held have no response yet. */
static void goes_back(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STALL);

	peer_begin(&p, NULL, DISK);
	r.count = 2;
	one(&p, r);
	put(&p, BLKIF_OP_READ, 0, 0, 1);
	put(&p, BLKIF_OP_READ, 0, 1, 1);
	push(&p);
	wait_in_flight(&p, 2);
	CHECK(silent(&p, SHORT_WAIT));
	p.queue[0].ring.req_prod_pvt--;
	push(&p);
	CHECK_EQ(pvf_channel_notify(p.queue[0].channel, 0, p.queue[0].fd[1]), 0);
	UNTIL(stats(&p).bogus);
	CHECK_EQ(stats(&p).requests, 2);
	pvf_bb_release(p.bb);
	peer_end(&p);
}

static void ends_late(void)
{
	struct peer p = {0};
	struct pvf_bb_rule r = rule(PVF_BB_STALL);

	peer_begin(&p, NULL, DISK);
	r.count = 1;
	one(&p, r);
	paint(&p, 0, 1, 77);
	put(&p, BLKIF_OP_WRITE, 0, 0, 1);
	push(&p);
	wait_in_flight(&p, 1);
	CHECK_EQ(pvf_bb_disconnect(p.bb), -EBUSY);
	put(&p, BLKIF_OP_WRITE, 8, 1, 1);
	push(&p);
	CHECK(silent(&p, SHORT_WAIT)); /* nothing new is taken */
	CHECK_EQ(pvf_bb_disconnect(p.bb), -EBUSY);
	CHECK_EQ(pvf_bb_connect(p.bb, p.table_fd, p.track_fd, 0, FRONT_DOMID, -1, false), -EBUSY);
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 1);
	pvf_bb_release(p.bb);
	CHECK_EQ(response(&p).id, 1); /* the old write is done now, and answered */
	UNTIL(!pvf_bb_disconnect(p.bb));
	CHECK_EQ(pvf_grant_maps(&p.table[gref(0)]), 0);
	peer_let_go(&p);
	CHECK_EQ(peer_connect(&p), 0);
	CHECK_EQ(do_io(&p, BLKIF_OP_READ, 0, 1, 1), OKAY);
	CHECK(painted(&p, 1, 1, 77));
	peer_end(&p);
}

static void dies(void)
{
	fflush(stdout);
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child) {
		struct peer p = {0};
		struct pvf_bb_rule r = rule(PVF_BB_DIE);

		peer_begin(&p, NULL, DISK);
		r.value = 7;
		r.skip = 4;
		one(&p, r);
		for (int i = 0; i < 4; i++)
			if (do_io(&p, BLKIF_OP_READ, 0, 0, 1) != OKAY)
				_exit(1);
		put(&p, BLKIF_OP_READ, 0, 0, 1);
		push(&p);
		silent(&p, DEADLINE);
		_exit(2);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 7);
}

int main(void)
{
	static const struct test tests[] = {
		{"the backend dies at the request that the rule says", dies}, /* first: it forks */
		{"a delayed request is answered later, others meanwhile", delays},
		{"a stalled request is done and answered when it is released", stalls},
		{"a whole ring of stalled requests goes on after a release", full_of_stalls},
		{"a dropped request is never answered, done or not as the rule says", drops},
		{"a response comes as often as the rule says", duplicates},
		{"responses come in an order that the seed decides", reorders},
		{"a window that does not fill opens in time", reorders_in_time},
		{"each field of a response can be wrong", corrupts},
		{"a response can name another request in flight", answers_for_another},
		{"rsp_prod jumps forward and back", jumps},
		{"a response comes without its event", loses_events},
		{"events come in a storm", storms},
		{"a barrier waits, and is waited for", barriers_wait},
		{"a req_prod that moves back while requests are held halts the ring", goes_back},
		{"requests in flight outlive their connection", ends_late},
	};

	return RUN_TESTS(tests);
}
