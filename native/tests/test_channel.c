/* SPDX-License-Identifier: BSD-2-Clause */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "channel.h"
#include "check.h"
#include "memfd.h"

#define DEADLINE_MS 20000
#define EVENTS 200000

static struct pvf_channel *channel;
static int fds[2];

static int memfd(off_t bytes, bool sealed)
{
	int fd = memfd_create("channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, bytes));
	if (sealed)
		CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	return fd;
}

static int new_channel(void)
{
	int fd = memfd(4096, true);
	struct pvf_channel *c = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(c != MAP_FAILED);
	pvf_channel_init(c);
	munmap(c, 4096);
	return fd;
}

static void fresh(void)
{
	int fd = new_channel();

	CHECK_EQ(pvf_channel_map(fd, &channel), 0);
	close(fd);
	for (int side = 0; side < 2; side++)
		CHECK((fds[side] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
}

static void done(void)
{
	pvf_channel_unmap(channel);
	close(fds[0]);
	close(fds[1]);
}

static bool readable(uint32_t side, int timeout)
{
	struct pollfd p = {.fd = fds[side], .events = POLLIN};

	return poll(&p, 1, timeout) == 1;
}

static int notify(uint32_t from)
{
	return pvf_channel_notify(channel, from, fds[!from]);
}

static int take(uint32_t side)
{
	return pvf_channel_take(channel, side, fds[side]);
}

static int unmask(uint32_t side)
{
	return pvf_channel_unmask(channel, side, fds[side]);
}

static void once(void)
{
	fresh();
	CHECK(!readable(1, 0));
	CHECK_EQ(take(1), 0);
	CHECK_EQ(notify(0), 0);
	CHECK_EQ(notify(0), 0);
	CHECK(readable(1, 0) && !readable(0, 0));
	CHECK_EQ(take(0), 0);
	CHECK_EQ(take(1), 1);
	CHECK_EQ(take(1), 0);
	CHECK(!readable(1, 0));
	CHECK_EQ(unmask(1), 0);
	CHECK(!readable(1, 0));
	CHECK_EQ(take(1), 0);
	done();
}

static void while_masked(void)
{
	fresh();
	CHECK_EQ(notify(1), 0);
	CHECK_EQ(take(0), 1);
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(notify(1), 0);
		CHECK(!readable(0, 0));
		CHECK_EQ(take(0), 0);
	}
	CHECK_EQ(unmask(0), 0);
	CHECK(readable(0, 0));
	CHECK_EQ(take(0), 1);
	CHECK_EQ(unmask(0), 0);
	CHECK_EQ(take(0), 0);
	done();
}

static void needless(void)
{
	fresh();
	CHECK_EQ(unmask(0), 0);
	CHECK_EQ(take(0), 0);
	CHECK_EQ(notify(1), 0);
	CHECK_EQ(unmask(0), 0);
	CHECK_EQ(take(0), 1);
	done();
}

static void storm(void)
{
	const uint64_t full = UINT64_MAX - 1;

	fresh();
	CHECK_EQ(write(fds[0], &full, sizeof(full)), sizeof(full));
	CHECK_EQ(take(0), 0);
	CHECK(!readable(0, 0));
	CHECK_EQ(write(fds[0], &full, sizeof(full)), sizeof(full));
	CHECK_EQ(notify(1), 0); /* the counter takes no more, and need not */
	CHECK(readable(0, 0));
	CHECK_EQ(take(0), 1);
	channel->end[0].flags = UINT32_MAX; /* the other end writes what it likes */
	CHECK_EQ(take(0), 0);
	CHECK_EQ(unmask(0), 0);
	CHECK_EQ(take(0), 0);
	done();
}

static void bad_files(void)
{
	struct pvf_channel *c;
	int fd = memfd(4096, false), pair[2];

	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL); /* it could be truncated under us */
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL); /* no magic */
	close(fd);
	fd = memfd(4095, true);
	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL);
	close(fd);
	fd = memfd(0, true);
	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL);
	close(fd);
	CHECK(!pipe(pair));
	CHECK_EQ(pvf_channel_map(pair[0], &c), -EINVAL);
	close(pair[0]);
	close(pair[1]);
	CHECK_EQ(pvf_channel_map(pair[0], &c), -EBADF);
	fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	CHECK_EQ(pvf_memfd_check(fd, 1), -EINVAL);
	close(fd);
}

/* One thread produces, the other takes what was produced by the time of each event. */

static uint32_t produced;

static void *producer(void *arg)
{
	uint64_t seed = 3;

	(void)arg;
	for (uint32_t i = 1; i <= EVENTS; i++) {
		__atomic_store_n(&produced, i, __ATOMIC_RELEASE);
		CHECK_EQ(notify(0), 0);
		if (!below(&seed, 64))
			usleep(1); /* let the consumer fall asleep now and then */
	}
	return NULL;
}

static void hammer(void)
{
	pthread_t thread;
	uint32_t seen = 0, events = 0;

	fresh();
	produced = 0;
	CHECK(!pthread_create(&thread, NULL, producer, NULL));
	while (seen < EVENTS) {
		/* A lost event would leave us here for ever: the last one has no successor. */
		CHECK(readable(1, DEADLINE_MS));
		if (!take(1))
			continue; /* a wake-up whose event was taken with the one before */
		CHECK_EQ(take(1), 0); /* masked: no other, whatever the producer does */
		uint32_t now = __atomic_load_n(&produced, __ATOMIC_ACQUIRE);

		CHECK(now >= seen);
		seen = now;
		events++;
		CHECK_EQ(take(1), 0);
		CHECK_EQ(unmask(1), 0);
	}
	pthread_join(thread, NULL);
	CHECK(events && events <= EVENTS);
	CHECK(take(1) + take(1) <= 1); /* the last may have come twice: before and after its look */
	CHECK_EQ(unmask(1), 0);
	CHECK_EQ(take(1), 0);
	done();
}

/* Ping-pong: each end acts on the other's event only, so one lost event stops both. */

#define ROUNDS 20000

static void *player(void *arg)
{
	uint32_t side = *(const uint32_t *)arg;

	for (int i = 0; i < ROUNDS;) {
		CHECK(readable(side, DEADLINE_MS));
		if (!take(side))
			continue;
		i++;
		/* Either order must do. */
		if (i % 2) {
			CHECK_EQ(unmask(side), 0);
			CHECK_EQ(notify(side), 0);
		} else {
			CHECK_EQ(notify(side), 0);
			CHECK_EQ(unmask(side), 0);
		}
	}
	return NULL;
}

static void ping_pong(void)
{
	static const uint32_t sides[2] = {0, 1};
	pthread_t threads[2];

	fresh();
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&threads[i], NULL, player, (void *)(uintptr_t)&sides[i]));
	CHECK_EQ(notify(1), 0); /* the serve */
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	done();
}

int main(void)
{
	static const struct test tests[] = {
		{"an event that comes twice is delivered once, and only to its end", once},
		{"an event that comes while masked wakes nobody and is delivered after the unmask",
		 while_masked},
		{"an unmask without a mask changes nothing", needless},
		{"wake-ups and flags that the other end makes up deliver no event and block nobody",
		 storm},
		{"a file that can shrink, is too short or is no channel is refused", bad_files},
		{"under a hammering producer no event is lost and none comes while masked", hammer},
		{"two ends that wait for each other never stop", ping_pong},
	};

	return RUN_TESTS(tests);
}
