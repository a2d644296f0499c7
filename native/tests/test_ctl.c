/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "ctl.h"

static union pvf_ctl_down m;
#define a (*(struct pvf_ctl_attach *)(void *)m.bytes)

static size_t attach(uint32_t pages)
{
	memset(&m, 0, sizeof(m));
	a.device_class = PVF_CLASS_BLK;
	a.ring_pages = 1;
	a.pool_pages = pages;
	a.ring_offset = 4096;
	a.pool_offset = 8192;
	a.queues = 1;
	strcpy(a.name, "vbd-1");
	for (uint32_t i = 0; i < pages && i < PVF_MAX_POOL_PAGES; i++)
		a.pool_grefs[i] = 10 + i;
	size_t size = sizeof(a) + (size_t)pages * 4;

	m.hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, PVF_CTL_ATTACH, 1,
				     (uint32_t)size};
	return size;
}

static size_t start(void)
{
	memset(&m, 0, sizeof(m));
	m.start.sectors = 2048;
	m.start.sector_size = 512;
	m.start.max_segments = 11;
	m.hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, PVF_CTL_START, 1,
				     sizeof(m.start)};
	return sizeof(m.start);
}

static void frame(void)
{
	size_t size = start();

	CHECK(!pvf_ctl_check(&m, size, 1));
	for (size_t n = 0; n < size; n++)
		CHECK(pvf_ctl_check(&m, n, 1));
	m.hdr.magic++;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.hdr.version++;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.hdr.type = PVF_CTL_HELLO;
	CHECK(pvf_ctl_check(&m, size, 1));
}

static void consoles(void)
{
	size_t size = attach(0);

	CHECK(pvf_ctl_check(&m, size, 2)); /* a disk without pages */
	a.device_class = PVF_CLASS_CONS;
	CHECK(!pvf_ctl_check(&m, size, 2));
	a.ring_pages = 2;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.ring_pages = 1;
	a.queues = 2;
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(2);
	a.device_class = PVF_CLASS_CONS;
	CHECK(pvf_ctl_check(&m, size, 2)); /* a console with a pool */
	memset(&m, 0, sizeof(m));
	m.hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, PVF_CTL_START_CONS, 1, sizeof(m.start_cons)};
	for (uint32_t fds = 0; fds < 4; fds++)
		CHECK_EQ(!pvf_ctl_check(&m, sizeof(m.start_cons), fds), fds < 2);
	m.start_cons.reserved = 1;
	CHECK(pvf_ctl_check(&m, sizeof(m.start_cons), 1));
}

static void attaches(void)
{
	size_t size = attach(352);

	CHECK(!pvf_ctl_check(&m, size, 2));
	CHECK(pvf_ctl_check(&m, size, 1));
	CHECK(pvf_ctl_check(&m, size, 3));
	a.pool_pages = 353;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.pool_pages = 0xffffffff;
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(1);
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(PVF_MAX_POOL_PAGES);
	CHECK(!pvf_ctl_check(&m, size, 2));
	a.pool_grefs[1055] = a.pool_grefs[3];
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(4);
	a.ring_pages = 3;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.ring_pages = 32;
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(4);
	a.ring_offset = 4097;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.ring_offset = UINT64_MAX - 4095;
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(4);
	memset(a.name, 'x', sizeof(a.name));
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(4);
	a.device_class = PVF_CLASS_NET;
	CHECK(pvf_ctl_check(&m, size, 2));
	size = attach(4);
	a.queues = PVF_MAX_QUEUES;
	a.queue = PVF_MAX_QUEUES - 1;
	CHECK(!pvf_ctl_check(&m, size, 2));
	a.queue++;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.queues++;
	CHECK(pvf_ctl_check(&m, size, 2));
	a.queue = a.queues = 0;
	CHECK(pvf_ctl_check(&m, size, 2));
}

static void starts(void)
{
	static const uint32_t wrong[] = {0, 1, 256, 513, 1536, 8192, 0x80000000};
	size_t size = start();

	CHECK(!pvf_ctl_check(&m, size, 0));
	CHECK(!pvf_ctl_check(&m, size, PVF_MAX_QUEUES));
	m.start.first_queue = 1;
	CHECK(!pvf_ctl_check(&m, size, PVF_MAX_QUEUES - 1));
	CHECK(pvf_ctl_check(&m, size, PVF_MAX_QUEUES));
	m.start.first_queue = PVF_MAX_QUEUES;
	CHECK(pvf_ctl_check(&m, size, 0));
	m.start.first_queue = UINT32_MAX;
	CHECK(pvf_ctl_check(&m, size, 2));
	start();
	m.start.poll_us = PVF_POLL_MAX_US;
	CHECK(!pvf_ctl_check(&m, size, 1));
	m.start.poll_us++;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		m.start.sector_size = wrong[i];
		CHECK(pvf_ctl_check(&m, size, 1));
	}
	start();
	m.start.sectors = UINT64_MAX;
	CHECK(pvf_ctl_check(&m, size, 1));
	m.start.sectors = INT64_MAX / 512 + 1;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.start.sector_size = 4096;
	m.start.sectors = 9;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.start.max_segments = 256;
	CHECK(!pvf_ctl_check(&m, size, 1));
	m.start.max_segments = 257;
	CHECK(pvf_ctl_check(&m, size, 1));
	m.start.max_segments = 0;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.start.flags = 15;
	CHECK(!pvf_ctl_check(&m, size, 1));
	m.start.flags = 16;
	CHECK(pvf_ctl_check(&m, size, 1));
	start();
	m.start.options = PVF_START_CLIENTS;
	CHECK(!pvf_ctl_check(&m, size, 0));
	m.start.options = 2;
	CHECK(pvf_ctl_check(&m, size, 0));
}

/* Any bytes at all: the check may say yes or no, but not read beyond the packet. */
static void noise(void)
{
	uint64_t seed = 3;

	for (int i = 0; i < 200000; i++) {
		size_t size = i % 2 ? attach(below(&seed, 8)) : start();

		for (uint32_t k = below(&seed, 6); k; k--)
			m.bytes[below(&seed, (uint32_t)size)] = (uint8_t)draw(&seed);
		size_t bytes = below(&seed, (uint32_t)size + 8);
		union pvf_ctl_down *exact = malloc(sizeof(m));

		memcpy(exact, &m, sizeof(m));
		pvf_ctl_check(exact, below(&seed, 2) ? bytes : size, below(&seed, 4));
		free(exact);
	}
}

static struct pvf_ctl ctl;
static int peer;

static void connect_peer(void)
{
	int pair[2];

	if (!ctl.epoll_fd) {
		ctl.fd = -1;
		ctl.epoll_fd = epoll_create1(0);
	}
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	pvf_ctl_accept(&ctl, pair[0]);
	peer = pair[1];
}

static void never_blocks(void)
{
	struct pvf_ctl_log line = {.level = 6};
	struct pvf_ctl_simple drained;
	struct pvf_ctl_log got;
	int simple = 0;

	connect_peer();
	for (int i = 0; i < 5000; i++)
		pvf_ctl_send(&ctl, &line, PVF_CTL_LOG, 1, sizeof(line), -1);
	CHECK(ctl.fd >= 0);
	CHECK_EQ(ctl.count, PVF_CTL_QUEUE);
	for (int i = 0; i < 5; i++) /* these take the place of log lines */
		pvf_ctl_send(&ctl, &drained, PVF_CTL_DRAINED, 1, sizeof(drained), -1);
	pvf_ctl_flush(&ctl);
	CHECK(ctl.fd >= 0);
	CHECK_EQ(ctl.count, PVF_CTL_QUEUE);
	while (ctl.count) {
		CHECK(recv(peer, &got, sizeof(got), MSG_DONTWAIT) > 0);
		pvf_ctl_flush(&ctl);
	}
	while (recv(peer, &got, sizeof(got), MSG_DONTWAIT) > 0)
		simple += got.hdr.type == PVF_CTL_DRAINED;
	CHECK_EQ(simple, 5);
	close(peer);
}

static void overflow(void)
{
	struct pvf_ctl_simple drained;

	connect_peer();
	for (int i = 0; i < 5000; i++)
		pvf_ctl_send(&ctl, &drained, PVF_CTL_DRAINED, 1, sizeof(drained), -1);
	CHECK_EQ(ctl.fd, -1);
	close(peer);
}

int main(void)
{
	static const struct test tests[] = {
		{"a packet with a wrong frame is refused", frame},
		{"an ATTACH with nonsense in it is refused", attaches},
		{"a console is attached with one page and no pool, and started with one stream at most", consoles},
		{"a START with nonsense in it is refused", starts},
		{"packets of noise are never read beyond their end", noise},
		{"a supervisor that does not read loses log lines first", never_blocks},
		{"a supervisor that never reads is disconnected", overflow},
	};

	return RUN_TESTS(tests);
}
