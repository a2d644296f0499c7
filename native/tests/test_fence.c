/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The replay fence's arithmetic, with a clock of its own.
 */
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "fence.h"

#define SECOND 1000000000ull
#define START (1000 * SECOND)
#define PATIENCE (PVF_NBD_PATIENCE_SECONDS * SECOND)

static struct pvf_fence fence;

static void overdue(void)
{
	fence = (struct pvf_fence){0};
	CHECK_EQ(pvf_fence_look(&fence, 3, START), PVF_FENCE_OPEN);
	pvf_fence_show(&fence, 2, START);
	CHECK_EQ(pvf_fence_look(&fence, 3, START + PATIENCE - 1), PVF_FENCE_OPEN);
	CHECK_EQ(pvf_fence_look(&fence, 3, START + PATIENCE), PVF_FENCE_OVERDUE);
	CHECK_EQ(pvf_fence_look(&fence, 3, START + PATIENCE), PVF_FENCE_CLOSED);
	pvf_fence_show(&fence, 2, 0); /* it was answered after all: too late */
	CHECK_EQ(pvf_fence_look(&fence, 3, START + PATIENCE), PVF_FENCE_CLOSED);
	pvf_fence_open(&fence);
	CHECK_EQ(pvf_fence_look(&fence, 3, START + PATIENCE), PVF_FENCE_OPEN);
}

static void single(void)
{
	fence = (struct pvf_fence){0};
	pvf_fence_show(&fence, 0, START);
	CHECK_EQ(pvf_fence_look(&fence, 1, START + 100 * PATIENCE), PVF_FENCE_OPEN);
	pvf_fence_close(&fence);
	CHECK_EQ(pvf_fence_look(&fence, 1, START), PVF_FENCE_OPEN);
	CHECK_EQ(pvf_fence_look(&fence, 2, START), PVF_FENCE_CLOSED);
}

static void others(void)
{
	fence = (struct pvf_fence){0};
	pvf_fence_show(&fence, 3, START); /* of a connection with more queues, long gone */
	CHECK_EQ(pvf_fence_look(&fence, 3, START + 2 * PATIENCE), PVF_FENCE_OPEN);
	pvf_fence_show(&fence, 1, START + 3 * PATIENCE); /* taken by another processor's clock */
	CHECK_EQ(pvf_fence_look(&fence, 3, START), PVF_FENCE_OPEN);
}

static int pair[2];

/* The socket has so many bytes unread, and `left` are received and not parsed. */
static void turn(struct pvf_unread *u, uint64_t now, size_t unread, uint32_t left)
{
	static char bytes[8192];

	CHECK_EQ(write(pair[0], bytes, unread), (ssize_t)unread);
	pvf_unread_update(u, pair[1], now, !unread, left);
}

/* The same, and then these are received by the next turn. */
static void turn_and_read(struct pvf_unread *u, uint64_t now, size_t unread, uint32_t left)
{
	static char bytes[8192];

	turn(u, now, unread, left);
	CHECK_EQ(read(pair[1], bytes, unread), (ssize_t)unread);
	u->received += unread;
}

static void saturated(void)
{
	struct pvf_unread u = {0};
	uint64_t now = START;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	/* Never read dry for two minutes, but nothing in it stays for a second. */
	for (int i = 0; i < 240; i++, now += SECOND / 2) {
		turn_and_read(&u, now, 4096, 100);
		CHECK(u.since);
		CHECK(now - u.since <= 3 * SECOND);
	}
	turn(&u, now, 0, 0);
	CHECK_EQ(u.since, 0);
	close(pair[0]);
	close(pair[1]);
}

static void stuck(void)
{
	struct pvf_unread u = {0};

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	turn(&u, START, 4096, 0);
	/* More and more comes, and nothing is taken. */
	for (uint64_t i = 1; i < 12; i++)
		turn(&u, START + i * SECOND, 512, 0);
	CHECK_EQ(u.since, START);
	close(pair[0]);
	close(pair[1]);
	/* Received, but not parsed: the same. */
	u = (struct pvf_unread){.received = 4096};
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	for (uint64_t i = 0; i < 12; i++)
		turn(&u, START + i * SECOND, 0, 4096);
	CHECK_EQ(u.since, START);
	turn(&u, START + 12 * SECOND, 0, 0);
	CHECK_EQ(u.since, 0);
	close(pair[0]);
	close(pair[1]);
}

int main(void)
{
	static const struct test tests[] = {
		{"a request that is overdue closes the fence for all, until all is over", overdue},
		{"a single socket has no fence", single},
		{"only the queues of the connection count, and no time that is yet to come", others},
		{"a socket that is never read dry is not old for that", saturated},
		{"bytes that nobody takes grow old, whatever comes after them", stuck},
	};

	return RUN_TESTS(tests);
}
