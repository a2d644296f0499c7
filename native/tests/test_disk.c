/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole library: its control thread, a backend in a thread, the program in another, and the
 * supervisor in the main one. What the thread sanitizer needs in order to see them meet.
 */
#include <errno.h>
#include <stdatomic.h>

#include "hub.h"
#include "pvfront/disk.h"

#define DISK (4u << 20)
#define POOL 64u

static unsigned char disk_bytes[DISK], expected[DISK];
static struct connection link_;
static atomic_bool hold;       /* requests are taken and not answered */
static atomic_int taken, events; /* by the backend; that it sent */
static int control;
static struct pvf_disk *disk;

/* The backend */

static void answer_all(struct connection *c)
{
	uint64_t seed = 3;
	bool event = false;

	backend_take(&c->backend);
	atomic_store(&taken, (int)c->backend.taken);
	while (c->backend.held && !atomic_load(&hold))
		event |= backend_answer(&c->backend, below(&seed, c->backend.held), BLKIF_RSP_OKAY);
	if (event) {
		atomic_fetch_add(&events, 1);
		CHECK_EQ(pvf_channel_notify(c->channel, 1, c->wakeup[0]), 0);
	}
}

/* The backend's end of the channel, until the library lets the hub's connection go. */
static void *run_backend(void *arg)
{
	struct connection *c = arg;
	struct pollfd polled[2] = {{.fd = c->wakeup[1], .events = POLLIN}, {.fd = c->hub_event}};

	for (;;) {
		CHECK(poll(polled, 2, -1) > 0);
		if (pvf_channel_take(c->channel, 1, c->wakeup[1])) {
			answer_all(c);
			CHECK_EQ(pvf_channel_unmask(c->channel, 1, c->wakeup[1]), 0);
		} else if (polled[1].revents & POLLHUP) {
			return NULL;
		} else if (polled[0].revents & POLLIN) {
			answer_all(c); /* `hold` has changed */
		}
	}
}

static void nudge(void)
{
	uint64_t one = 1;

	CHECK(write(link_.wakeup[1], &one, sizeof(one)) == sizeof(one));
}

/* The supervisor */

static void tell(void *message, uint16_t type, uint32_t generation, size_t size)
{
	tell_of(control, message, type, generation, size, NULL, 0);
}

static void hear(uint16_t type)
{
	hear_from(control, type);
}

static void simply(uint16_t type, uint32_t generation, uint16_t answer)
{
	struct pvf_ctl_simple simple;

	tell(&simple, type, generation, sizeof(simple));
	if (answer)
		hear(answer);
}

static void start(uint32_t generation, uint32_t flags)
{
	struct pvf_ctl_start m = {.sectors = DISK / 512, .sector_size = 512, .flags = flags,
				  .max_segments = 11, .stall_seconds = 5};

	tell(&m, PVF_CTL_START, generation, sizeof(m));
	hear(PVF_CTL_STARTED);
}

static void attach(uint32_t generation)
{
	atomic_store(&taken, 0);
	atomic_store(&events, 0);
	attach_queue(&link_, control, generation, 0, 1, POOL, disk_bytes, DISK, run_backend,
		     &link_);
}

/* The library has let go of everything that ATTACH brought. */
static void let_go(void)
{
	let_go_of(&link_);
}

static void detach(uint32_t generation)
{
	struct pvf_ctl_detach m = {0};

	tell(&m, PVF_CTL_DETACH, generation, sizeof(m));
	hear(PVF_CTL_DETACHED);
	let_go();
}

static void open_disk(uint32_t flags)
{
	uint64_t seed = 99;
	int pair[2];

	for (uint32_t i = 0; i < DISK; i++)
		disk_bytes[i] = expected[i] = (unsigned char)draw(&seed);
	atomic_store(&hold, false);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	control = pair[0];
	CHECK_EQ(pvf_disk_open_fd(pair[1], &disk), 0);
	CHECK_EQ(pvf_disk_read(disk, expected, 512, 0, 0), -ENOTCONN);
	CHECK_EQ(pvf_disk_ready(disk, 0), -ETIMEDOUT);
	attach(1);
	start(1, flags);
	CHECK_EQ(pvf_disk_ready(disk, PATIENCE), 0);
}

static void close_disk(void)
{
	pvf_disk_close(disk);
	let_go();
	CHECK(!memcmp(disk_bytes, expected, DISK));
	close(control);
}

/* The program */

enum way { POLL, WAIT, DESCRIPTOR };

static int get(enum way way, struct pvf_disk_done *done, int max)
{
	struct pollfd polled = {.fd = pvf_disk_fd(disk), .events = POLLIN};
	int n;

	if (way == WAIT)
		return pvf_disk_wait(disk, done, max, PATIENCE);
	while (!(n = pvf_disk_poll(disk, done, max)))
		if (way == DESCRIPTOR && !pvf_disk_arm(disk))
			CHECK(poll(&polled, 1, PATIENCE) == 1);
	return n;
}

static void one(int rc, int result)
{
	struct pvf_disk_done done;

	CHECK_EQ(rc, 0);
	CHECK_EQ(pvf_disk_wait(disk, &done, 1, PATIENCE), 1);
	CHECK_EQ(done.result, result);
}

/* Writes the whole disk anew and reads it back, up to 24 requests at a time. */
static void write_and_read(enum way way, uint64_t seed)
{
	static unsigned char back[DISK];
	struct pvf_disk_done done[8];

	for (uint32_t i = 0; i < DISK; i++)
		expected[i] = (unsigned char)draw(&seed);
	for (int reads = 0; reads < 2; reads++) {
		uint32_t at = 0, under_way = 0;

		while (at < DISK || under_way) {
			while (at < DISK && under_way < 24) {
				uint32_t n = 512 * (1 + below(&seed, 300));

				if (n > DISK - at)
					n = DISK - at;
				CHECK_EQ(reads ? pvf_disk_read(disk, back + at, n, at, n)
					       : pvf_disk_write(disk, expected + at, n, at, n), 0);
				at += n;
				under_way++;
			}
			int n = get(way, done, 8);

			CHECK(n > 0);
			for (int i = 0; i < n; i++)
				CHECK_EQ(done[i].result, done[i].cookie);
			under_way -= (uint32_t)n;
		}
		if (!reads)
			one(pvf_disk_flush(disk, 7), 0);
	}
	CHECK(!memcmp(back, expected, DISK));
}

static void three_ways(void)
{
	struct pvf_disk_info info;

	open_disk(PVF_BLK_FLUSH);
	write_and_read(POLL, 11);
	write_and_read(WAIT, 12);
	write_and_read(DESCRIPTOR, 13);
	pvf_disk_get_info(disk, &info);
	CHECK_EQ(info.size, DISK);
	CHECK_EQ(info.sector_size, 512);
	CHECK_EQ(info.flags, PVF_DISK_FLUSH);
	CHECK_EQ(info.state, PVF_DISK_READY);
	CHECK_EQ(info.generation, 1);
	CHECK_EQ(info.pending, 0);
	CHECK(!strcmp(info.name, "vbd-1"));
	close_disk();
}

static void *half(void *arg)
{
	const unsigned char *begin = arg;
	struct pvf_disk_done done;

	for (uint32_t at = 0; at < DISK / 2; at += 4096) {
		CHECK_EQ(pvf_disk_write(disk, begin + at, 4096, (uint64_t)(begin - expected) + at, 1), 0);
		CHECK_EQ(pvf_disk_wait(disk, &done, 1, PATIENCE), 1); /* anybody's */
		CHECK_EQ(done.result, 4096);
	}
	return NULL;
}

static void two_threads(void)
{
	pthread_t other;
	uint64_t seed = 4;

	open_disk(0);
	for (uint32_t i = 0; i < DISK; i++)
		expected[i] = (unsigned char)draw(&seed);
	CHECK(!pthread_create(&other, NULL, half, expected));
	half(expected + DISK / 2);
	pthread_join(other, NULL);
	close_disk();
}

static void no_events(void)
{
	struct pvf_disk_done done[32];
	static unsigned char data[32][4096];
	int under_way = 0, finished = 0;

	open_disk(0);
	while (finished < 20000) {
		while (under_way < 32) {
			CHECK_EQ(pvf_disk_read(disk, data[under_way], 4096, 4096 * (uint64_t)under_way, 0), 0);
			under_way++;
		}
		int n = pvf_disk_poll(disk, done, 32);

		under_way -= n;
		finished += n;
	}
	/* The first was armed before anybody polled. */
	CHECK(atomic_load(&events) <= 1);
	close_disk();
}

static void refused(void)
{
	static unsigned char data[4096];
	struct iovec iov[2] = {{data, 256}, {data, 256}};

	open_disk(PVF_BLK_READ_ONLY);
	CHECK_EQ(pvf_disk_write(disk, data, 512, 0, 0), -EROFS);
	CHECK_EQ(pvf_disk_discard(disk, 512, 0, 0), -EROFS);
	CHECK_EQ(pvf_disk_flush(disk, 0), -EOPNOTSUPP);
	CHECK_EQ(pvf_disk_read(disk, data, 0, 0, 0), -EINVAL);
	CHECK_EQ(pvf_disk_read(disk, data, 511, 0, 0), -EINVAL);
	CHECK_EQ(pvf_disk_read(disk, data, 512, 100, 0), -EINVAL);
	CHECK_EQ(pvf_disk_read(disk, data, 1024, DISK - 512, 0), -EINVAL);
	CHECK_EQ(pvf_disk_read(disk, data, 512, UINT64_MAX - 511, 0), -EINVAL);
	CHECK_EQ(pvf_disk_readv(disk, iov, 0, 0, 0), -EINVAL);
	CHECK_EQ(pvf_disk_readv(disk, iov, PVF_DISK_IOV + 1, 0, 0), -EINVAL);
	one(pvf_disk_readv(disk, iov, 2, 0, 0), 512);
	for (int i = 0; i < PVF_DISK_DEPTH; i++)
		CHECK_EQ(pvf_disk_read(disk, data, 512, 0, 0), 0);
	CHECK_EQ(pvf_disk_read(disk, data, 512, 0, 0), -EAGAIN);
	close_disk();
}

static void busy_program(void)
{
	struct pvf_disk_done done;
	static unsigned char data[65536];

	open_disk(PVF_BLK_FLUSH);
	atomic_store(&hold, true);
	memset(expected, 0x5a, sizeof(data));
	memset(data, 0x5a, sizeof(data));
	CHECK_EQ(pvf_disk_write(disk, data, sizeof(data), 0, 5), 0);
	CHECK_EQ(pvf_disk_submit(disk), 0);
	while (!atomic_load(&taken))
		;
	/* From here on the program does something else, and the domain is put to sleep. */
	simply(PVF_CTL_QUIESCE, 1, 0);
	atomic_store(&hold, false);
	nudge();
	hear(PVF_CTL_DRAINED);
	detach(1);
	attach(2);
	start(2, PVF_BLK_FLUSH);
	CHECK_EQ(pvf_disk_poll(disk, &done, 1), 1);
	CHECK_EQ(done.cookie, 5);
	CHECK_EQ(done.result, (int)sizeof(data));
	write_and_read(WAIT, 8);
	close_disk();
}

static void *slow_lender(void *arg)
{
	(void)arg;
	detach(1); /* with requests in the ring: a backend that was lost */
	atomic_store(&hold, false);
	attach(2);
	start(2, 0);
	return NULL;
}

static void replay(void)
{
	static unsigned char data[40][8192];
	struct pvf_disk_done done;
	struct pvf_disk_info info;
	pthread_t lender;
	uint64_t seed = 21;

	open_disk(0);
	atomic_store(&hold, true);
	for (uint32_t i = 0; i < 40; i++) {
		for (uint32_t k = 0; k < 8192; k++)
			data[i][k] = (unsigned char)draw(&seed);
		memcpy(expected + i * 8192, data[i], 8192);
		CHECK_EQ(pvf_disk_write(disk, data[i], 8192, i * 8192, i), 0);
	}
	CHECK_EQ(pvf_disk_submit(disk), 0);
	CHECK(!pthread_create(&lender, NULL, slow_lender, NULL));
	for (int i = 0; i < 40; i++) {
		CHECK_EQ(pvf_disk_wait(disk, &done, 1, PATIENCE), 1);
		CHECK_EQ(done.result, 8192);
	}
	pthread_join(lender, NULL);
	pvf_disk_get_info(disk, &info);
	CHECK_EQ(info.generation, 2);
	close_disk();
}

static void broken_ring(void)
{
	struct pvf_disk_done done;
	unsigned char data[512];
	blkif_sring_t *ring;

	open_disk(0);
	atomic_store(&hold, true);
	CHECK_EQ(pvf_disk_read(disk, data, 512, 0, 3), 0);
	CHECK_EQ(pvf_disk_submit(disk), 0);
	ring = (blkif_sring_t *)(void *)link_.shared;
	__atomic_store_n(&ring->rsp_prod, 77, __ATOMIC_SEQ_CST);
	CHECK_EQ(pvf_disk_poll(disk, &done, 1), 0);
	hear(PVF_CTL_BROKEN);
	detach(1);
	atomic_store(&hold, false);
	attach(2);
	start(2, 0);
	CHECK_EQ(pvf_disk_wait(disk, &done, 1, PATIENCE), 1);
	CHECK_EQ(done.result, 512);
	CHECK(!memcmp(data, expected, 512));
	close_disk();
}

static void taken_back(void)
{
	struct pvf_disk_done done;
	struct pvf_disk_info info;
	unsigned char data[512];

	for (int how = 0; how < 2; how++) {
		open_disk(0);
		atomic_store(&hold, true);
		CHECK_EQ(pvf_disk_read(disk, data, 512, 0, 3), 0);
		CHECK_EQ(pvf_disk_submit(disk), 0);
		if (how)
			simply(PVF_CTL_EXIT, 1, 0);
		else
			close(control);
		CHECK_EQ(pvf_disk_wait(disk, &done, 1, PATIENCE), 1);
		CHECK_EQ(done.result, -ENODEV);
		CHECK_EQ(pvf_disk_read(disk, data, 512, 0, 3), -ENODEV);
		CHECK_EQ(pvf_disk_submit(disk), -ENODEV);
		CHECK_EQ(pvf_disk_ready(disk, -1), -ENODEV);
		CHECK_EQ(pvf_disk_wait(disk, &done, 1, -1), 0);
		pvf_disk_get_info(disk, &info);
		CHECK_EQ(info.state, PVF_DISK_GONE);
		let_go();
		pvf_disk_close(disk);
		if (how)
			close(control);
	}
}

static void *lend(void *arg)
{
	(void)arg;
	hear(PVF_CTL_ERROR); /* to a command of the wrong generation: somebody listens */
	attach(1);
	start(1, 0);
	return NULL;
}

static void environment(void)
{
	int pair[2], other[2];
	char text[64];
	pthread_t lender;
	struct pvf_disk *again;

	memset(disk_bytes, 0, DISK);
	memset(expected, 0, DISK);
	unsetenv(PVF_DISK_VARIABLE);
	CHECK_EQ(pvf_disk_open(NULL, &disk), -ENODEV);
	CHECK(!pipe(other));
	snprintf(text, sizeof(text), "xvda=%d", other[0]);
	setenv(PVF_DISK_VARIABLE, text, 1);
	CHECK_EQ(pvf_disk_open(NULL, &disk), -ENODEV); /* that is no disk */
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	control = pair[0];
	snprintf(text, sizeof(text), "xvda=%d,xvdb=%d", other[0], pair[1]);
	setenv(PVF_DISK_VARIABLE, text, 1);
	CHECK_EQ(pvf_disk_open("xvd", &disk), -ENODEV);
	CHECK_EQ(pvf_disk_open("xvdbc", &disk), -ENODEV);
	simply(PVF_CTL_QUIESCE, 9, 0);
	CHECK(!pthread_create(&lender, NULL, lend, NULL));
	CHECK_EQ(pvf_disk_open("xvdb", &disk), 0);
	pthread_join(lender, NULL);
	CHECK_EQ(pvf_disk_open("xvdb", &again), -EBUSY);
	close_disk();
	CHECK_EQ(pvf_disk_open("xvdb", &again), -ENODEV);
	close(other[0]);
	close(other[1]);
}

int main(void)
{
	static const struct test tests[] = {
		{"a program writes and reads by polling, waiting and a descriptor", three_ways},
		{"two threads of a program use one disk", two_threads},
		{"who polls gets no events", no_events},
		{"what the disk cannot do is refused at once", refused},
		{"a program that is busy elsewhere does not hold up a suspend", busy_program},
		{"requests that a lost backend left are done by the next", replay},
		{"a broken ring is told, and its requests are done by the next connection", broken_ring},
		{"a disk that is taken back fails what is under way", taken_back},
		{"a program finds the disk that it was lent in its environment", environment},
	};

	return RUN_TESTS(tests);
}
