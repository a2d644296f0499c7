/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker in a thread, a backend in another, supervisor and client in the main one: what
 * the thread sanitizer needs in order to see the two ends of a ring meet.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <linux/nbd.h>

#include "backend.h"
#include "worker.h"

#define DISK (4u << 20)
#define POOL 48u
#define PORT 9u

static struct pvf_worker worker;
static struct backend backend;
static unsigned char disk[DISK], expected[DISK];
static int control, client, events;

static void *run_worker(void *status)
{
	*(int *)status = pvf_worker_run(&worker);
	return NULL;
}

/* The host's half of the event channel, and the backend behind it. */
static void *run_backend(void *arg)
{
	bool masked = false, pending = false;
	struct pvf_port_packet p;
	uint64_t seed = 11;

	(void)arg;
	while (recv(events, &p, sizeof(p), 0) == sizeof(p)) {
		bool event = false;

		CHECK_EQ(p.port, PORT);
		if (p.op == PVF_PORT_UNMASK) {
			masked = false;
			event = pending;
			pending = false;
		} else {
			CHECK_EQ(p.op, PVF_PORT_NOTIFY);
			backend_take(&backend);
			while (backend.held)
				event |= backend_answer(&backend, below(&seed, backend.held),
							BLKIF_RSP_OKAY);
		}
		if (!event)
			continue;
		if (masked) {
			pending = true;
			continue;
		}
		masked = true;
		p = (struct pvf_port_packet){.port = PORT, .op = PVF_PORT_EVENT};
		CHECK(send(events, &p, sizeof(p), MSG_NOSIGNAL) == sizeof(p));
	}
	return NULL;
}

static void tell(void *message, uint16_t type, size_t size, int fd1, int fd2)
{
	struct pvf_ctl_hdr *hdr = message;
	int fds[2] = {fd1, fd2};
	int n = (fd1 >= 0) + (fd2 >= 0);
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(fds))];
	} c = {0};
	struct iovec iov = {message, size};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	*hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type, 1, (uint32_t)size};
	if (n) {
		msg.msg_control = &c;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)n);
		struct cmsghdr *h = CMSG_FIRSTHDR(&msg);

		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)n);
		memcpy(CMSG_DATA(h), fds, sizeof(int) * (size_t)n);
	}
	CHECK(sendmsg(control, &msg, 0) == (ssize_t)size);
}

static void hear(uint16_t type)
{
	union {
		struct pvf_ctl_hdr hdr;
		char bytes[PVF_CTL_MAX];
	} m;

	do
		CHECK(recv(control, &m, sizeof(m), 0) >= (ssize_t)sizeof(m.hdr));
	while (m.hdr.type == PVF_CTL_LOG || m.hdr.type == PVF_CTL_HELLO);
	CHECK_EQ(m.hdr.type, type);
}

static void all(bool out, void *data, size_t size)
{
	char *at = data;

	while (size) {
		ssize_t n = out ? send(client, at, size, MSG_NOSIGNAL) : recv(client, at, size, 0);

		CHECK(n > 0);
		at += n;
		size -= (size_t)n;
	}
}

static void ask(uint32_t type, uint64_t from, uint32_t length) /* its handle: `from` */
{
	struct nbd_request r = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32(type),
		.from = htobe64(from),
		.len = htobe32(length),
	};

	memcpy(r.handle, &from, sizeof(from));
	all(true, &r, sizeof(r));
}

/* Replies come in the order of completion. */
static uint64_t answer(void)
{
	struct nbd_reply r;
	uint64_t from;

	all(false, &r, sizeof(r));
	CHECK_EQ(be32toh(r.magic), NBD_REPLY_MAGIC);
	CHECK_EQ(r.error, 0);
	memcpy(&from, r.handle, sizeof(from));
	return from;
}

static void *send_writes(void *arg)
{
	uint64_t seed = 5;

	(void)arg;
	for (uint32_t at = 0; at < DISK;) {
		uint32_t n = 512 * (1 + below(&seed, 300));

		if (n > DISK - at)
			n = DISK - at;
		ask(NBD_CMD_WRITE, at, n);
		all(true, expected + at, n);
		at += n;
	}
	return NULL;
}

static void *send_reads(void *arg)
{
	(void)arg;
	for (uint32_t at = 0; at < DISK; at += 32768)
		ask(NBD_CMD_READ, at, 32768);
	return NULL;
}

static void serve(void)
{
	static _Alignas(8) unsigned char message[sizeof(struct pvf_ctl_attach) + POOL * 4];
	struct pvf_ctl_attach *attach = (struct pvf_ctl_attach *)(void *)message;
	struct pvf_ctl_start start = {.sectors = DISK / 512, .sector_size = 512,
				      .flags = PVF_BLK_FLUSH, .max_segments = 11,
				      .stall_seconds = 5};
	struct pvf_ctl_simple simple;
	struct pvf_ctl_detach detach = {0};
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	pthread_t threads[3];
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0), status = -1;
	int channel[2], nbd[2];
	socklen_t length = sizeof(name);
	const char *why;
	uint64_t seed = 99;

	for (uint32_t i = 0; i < DISK; i++)
		expected[i] = (unsigned char)draw(&seed);
	CHECK(!bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t))); /* any name */
	CHECK(!listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&name, &length));
	CHECK(!pvf_worker_init(&worker, listener, "vbd-1", &why));
	CHECK(!pthread_create(&threads[0], NULL, run_worker, &status));
	control = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	CHECK(!connect(control, (struct sockaddr *)&name, length));

	int grants = memfd_create("grants", 0);

	CHECK(!ftruncate(grants, 4096 * (1 + POOL)));
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, channel));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, nbd));
	events = channel[0];
	client = nbd[0];
	*attach = (struct pvf_ctl_attach){.device_class = PVF_CLASS_BLK, .port = PORT,
					  .ring_pages = 1, .pool_pages = POOL, .ring_offset = 0,
					  .pool_offset = 4096, .name = "vbd-1"};
	backend_grefs(attach->pool_grefs, POOL);
	tell(attach, PVF_CTL_ATTACH, sizeof(message), channel[1], grants);
	hear(PVF_CTL_ATTACHED);
	unsigned char *shared = mmap(NULL, 4096 * (1 + POOL), PROT_READ | PROT_WRITE, MAP_SHARED,
				     grants, 0);

	CHECK(shared != MAP_FAILED);
	backend_init(&backend, shared, 4096, shared + 4096, POOL, disk, DISK);
	CHECK(!pthread_create(&threads[1], NULL, run_backend, NULL));
	tell(&start, PVF_CTL_START, sizeof(start), nbd[1], -1);
	hear(PVF_CTL_STARTED);
	close(channel[1]);
	close(nbd[1]);

	CHECK(!pthread_create(&threads[2], NULL, send_writes, NULL));
	for (uint32_t at = 0; at < DISK;) {
		static uint64_t sizes = 5;

		at += 512 * (1 + below(&sizes, 300));
		answer();
	}
	pthread_join(threads[2], NULL);
	CHECK(!pthread_create(&threads[2], NULL, send_reads, NULL));
	for (uint32_t at = 0; at < DISK; at += 32768) {
		static unsigned char data[32768];

		uint64_t from = answer();

		CHECK(from < DISK);
		all(false, data, sizeof(data));
		CHECK(!memcmp(data, expected + from, sizeof(data)));
	}
	pthread_join(threads[2], NULL);

	tell(&simple, PVF_CTL_QUIESCE, sizeof(simple), -1, -1);
	hear(PVF_CTL_DRAINED);
	tell(&detach, PVF_CTL_DETACH, sizeof(detach), -1, -1);
	hear(PVF_CTL_DETACHED);
	tell(&simple, PVF_CTL_EXIT, sizeof(simple), -1, -1);
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL); /* its socket ended: DETACH has closed the event channel */
	CHECK_EQ(status, 0);
	CHECK(!memcmp(disk, expected, DISK));
	CHECK_EQ(worker.stats.shared->write.bytes, DISK);
	CHECK_EQ(worker.stats.shared->read.bytes, DISK);
	CHECK_EQ(worker.stats.shared->sequence % 2, 0);
}

int main(void)
{
	static const struct test tests[] = {
		{"a worker writes and reads a disk through a backend in another thread", serve},
	};

	return RUN_TESTS(tests);
}
