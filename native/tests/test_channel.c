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

#define DEADLINE_MS 60000
#define EVENTS 1000000

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
	struct pvf_channel *c, good;
	int fd = memfd(4096, false), pair[2];

	pvf_channel_init(&good);
	CHECK_EQ(pwrite(fd, &good, sizeof(good), 0), sizeof(good));
	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL); /* it could be truncated under us */
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	CHECK_EQ(pvf_channel_map(fd, &c), 0);
	pvf_channel_unmap(c);
	good.magic++;
	CHECK_EQ(pwrite(fd, &good, sizeof(good), 0), sizeof(good));
	CHECK_EQ(pvf_channel_map(fd, &c), -EINVAL);
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

/* What the other end does while one is in a system call of its operation is drawn (linked with
 * --wrap=read,--wrap=write). Afterwards nothing may be pending that would never be seen. */

ssize_t __real_read(int fd, void *data, size_t size);
ssize_t __real_write(int fd, const void *data, size_t size);
ssize_t __wrap_read(int fd, void *data, size_t size);
ssize_t __wrap_write(int fd, const void *data, size_t size);

static enum { NOBODY, OWNER, NOTIFIER } active;
static bool holding;
static uint64_t dice;

static void owner(void)
{
	if (!holding) {
		holding = take(1);
		return;
	}
	CHECK_EQ(take(1), 0);
	CHECK_EQ(unmask(1), 0);
	holding = false;
}

static void meanwhile(void)
{
	int interrupted = active;

	if (interrupted == NOBODY)
		return;
	active = NOBODY; /* one level is enough */
	for (uint32_t i = below(&dice, 4); i; i--) {
		if (interrupted == NOTIFIER)
			owner();
		else
			CHECK_EQ(notify(0), 0);
	}
	active = interrupted;
}

ssize_t __wrap_read(int fd, void *data, size_t size)
{
	meanwhile();
	ssize_t n = __real_read(fd, data, size);
	int error = errno;

	meanwhile();
	errno = error;
	return n;
}

ssize_t __wrap_write(int fd, const void *data, size_t size)
{
	meanwhile();
	ssize_t n = __real_write(fd, data, size);
	int error = errno;

	meanwhile();
	errno = error;
	return n;
}

static void interleaved(void)
{
	uint32_t deliveries = 0;

	fresh();
	dice = 2;
	holding = false;
	for (int i = 0; i < 100000; i++) {
		bool before = holding;

		if (below(&dice, 3)) {
			active = OWNER;
			owner();
		} else {
			active = NOTIFIER;
			CHECK_EQ(notify(0), 0);
		}
		active = NOBODY;
		uint32_t flags = channel->end[1].flags;

		deliveries += holding && !before;
		CHECK_EQ(holding, !!(flags & PVF_CHANNEL_MASKED));
		if (flags == PVF_CHANNEL_PENDING)
			CHECK(readable(1, 0));
	}
	CHECK(deliveries > 10000);
	done();
}

/* One thread produces, the other takes what was produced by the time of each event. A wake-up that
 * is lost is lost for good, since a pending end is not woken again: then poll() ends the test. */

static uint32_t produced;

static void *producer(void *arg)
{
	uint64_t seed = 3;

	(void)arg;
	for (uint32_t i = 1; i <= EVENTS; i++) {
		__atomic_store_n(&produced, i, __ATOMIC_RELEASE);
		CHECK_EQ(notify(0), 0);
		if (!below(&seed, 1024))
			usleep(1); /* let the consumer fall asleep now and then */
	}
	return NULL;
}

static void hammer(void)
{
	pthread_t thread;
	uint32_t seen = 0, events = 0;
	uint64_t seed = 4;

	fresh();
	produced = 0;
	CHECK(!pthread_create(&thread, NULL, producer, NULL));
	while (seen < EVENTS) {
		/* Some takes without a wake-up, as a watchdog does. */
		uint32_t tries = below(&seed, 4);
		bool delivered = false;

		while (!delivered && tries--)
			delivered = take(1);
		if (!delivered) {
			CHECK(readable(1, DEADLINE_MS));
			if (!take(1))
				continue; /* a wake-up whose event was taken before it came */
		}
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
	if (take(1)) /* set again after the last look */
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
		{"whatever the ends do at each other's system calls, a pending event wakes its end",
		 interleaved},
		{"under a hammering producer no event is lost and none comes while masked", hammer},
		{"two ends that wait for each other never stop", ping_pong},
	};

	return RUN_TESTS(tests);
}
