/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A hostile supervisor: any message with any descriptors at any time to a whole worker of some queues,
 * whose backend and clients may be hostile too. The worker's threads are taken in turns here.
 *
 * What must hold: each message, also one that is none, has exactly one answer, of its kind (QUIESCE's may
 * come later, and a later command may take its place); what the worker says is well formed, and HELLO
 * true; generations only grow; and in the end no descriptor has been lost.
 *
 * Some inputs are of a network's worker: packets instead of requests, an event channel for each ring, a trace.
 *
 * A worker is also handed over in the midst of all this, to itself begun anew, or its successor fails; and
 * a table that somebody has bent is refused, or taken and everything of it let go of again.
 */
#include "ctl_worker.h"
#include "queue_net.h"

/* Another worker takes over. hand_over.c's packets: */
struct packet {
	uint32_t magic, kind, queue, queues;
	char text[PVF_TEXT_MAX];
};

enum { MAGIC = 0x58465650, QUEUE = 1, SERVING = 2, REFUSED = 3 };

/* One packet from `from`; returns its kind, 0: none. */
static uint32_t next_packet(int from, struct packet *p, int *fds, uint32_t *count)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(PVF_SCM_MAX * sizeof(int))];
	} c;
	struct iovec iov = {p, sizeof(*p)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &c,
			     .msg_controllen = sizeof(c)};

	ssize_t got = recvmsg(from, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (got < 0 && errno == ECONNRESET) /* once, before what was sent */
		got = recvmsg(from, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got != sizeof(*p))
		return 0;
	*count = pvf_scm_take(&msg, fds, PVF_SCM_MAX);
	CHECK(p->magic == MAGIC && *count <= PVF_SCM_MAX);
	return p->kind;
}

static uint32_t tell(uint16_t type, uint32_t of, int peer, int table)
{
	struct pvf_ctl_simple m = {
		{PVF_CTL_MAGIC, PVF_CTL_VERSION, type, of, sizeof(m)}};

	send_packet(control, &m, sizeof(m), (int[2]){peer, table}, 2);
	close(peer);
	turn();
	return hear(type);
}

/* What the successor gets of `queues` queues' packets, as they are or bent. */
static void pass_on(struct input *in, uint32_t bend, int from, int to, uint32_t queues)
{
	struct packet p;
	int fds[PVF_SCM_MAX];
	uint32_t n;

	for (uint32_t i = 0; i < queues; i++) {
		CHECK_EQ(next_packet(from, &p, fds, &n), QUEUE);
		CHECK(p.queue == i && p.queues == queues && n);
		if (bend & 4 && !upto(in, 3))
			((unsigned char *)&p)[upto(in, 16)] ^= (unsigned char)number(in, 1);
		uint32_t sent = bend & 8 ? upto(in, n + 1) : n;

		if (!(bend & 16 && !upto(in, 3)))
			send_packet(to, &p, sizeof(p), fds, sent);
		pvf_scm_close(fds, n);
	}
	shutdown(to, SHUT_WR);
}

static void take_over(struct input *in, uint32_t bend, int from, int table, unsigned char *image,
		      uint32_t queues)
{
	struct packet p;
	int pair[2], fds[PVF_SCM_MAX];
	uint32_t n;

	for (uint32_t i = bend & 2 ? 1 + upto(in, 4) : 0; i; i--) /* wherever it is */
		image[net && upto(in, 8) ? offsetof(struct pvf_image, queue) +
						 upto(in, queues) * sizeof(struct pvf_image_queue) +
						 number(in, 3) % (offsetof(struct pvf_image_queue, net) +
								  sizeof(struct pvf_image_net))
					 : number(in, 3) % (queues * 300000)] ^=
			(unsigned char)(1u << upto(in, 8));
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	pass_on(in, bend, from, pair[0], queues);
	CHECK_EQ(tell(PVF_CTL_TAKE_OVER, 0, pair[1], table), 1);
	bool taken = generation;

	CHECK(taken || bend & 30 || scribbled);
	CHECK_EQ(next_packet(pair[0], &p, fds, &n), taken ? SERVING : REFUSED);
	CHECK(taken || worker.state == PVF_IDLE);
	close(pair[0]);
	/* Who sent nonsense has not been promised that it makes sense. */
	over = bend & 30;
}

static void hand_over(struct input *in, uint32_t bend)
{
	struct packet said = {.magic = MAGIC, .kind = bend & 1 ? REFUSED : SERVING, .text = "no"};
	uint32_t before = worker.attached, answers;
	int pair[2], table;
	void *image;

	hear(0);
	if (control < 0)
		return;
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	table = memory(PVF_HAND_OVER_BYTES, &image);
	/* Its successor has spoken before it asks, or is gone: nobody waits here. */
	if (bend & 64)
		raw(in, &said, sizeof(said));
	send_packet(pair[1], &said, sizeof(said), &table, bend >> 5 & 1);
	if (bend & 128)
		close(pair[1]);
	else
		shutdown(pair[1], SHUT_WR);
	answers = tell(PVF_CTL_HAND_OVER, generation, pair[0], table);
	if (control >= 0)
		CHECK_EQ(answers, 1);
	if (worker.exiting) {
		forget_worker();
		generation = 0;
		begin_worker();
		take_over(in, bend, pair[1], table, image, before);
	}
	if (!(bend & 128))
		close(pair[1]);
	close(table);
	munmap(image, PVF_HAND_OVER_BYTES);
}

/* What the supervisor says */

static void command(struct input *in)
{
	static union {
		struct pvf_ctl_hdr hdr;
		struct pvf_ctl_start start;
		struct pvf_ctl_start_net start_net;
		struct pvf_ctl_detach detach;
		unsigned char bytes[PVF_CTL_MAX + 64];
	} m;
	struct pvf_ctl_attach *a = (struct pvf_ctl_attach *)(void *)m.bytes;
	uint32_t how = upto(in, 256), bend = upto(in, 256), queue = 0, count = 0;
	static const uint16_t types[] = {PVF_CTL_ATTACH, PVF_CTL_START, PVF_CTL_QUIESCE,
					 PVF_CTL_DETACH, PVF_CTL_ATTACH, PVF_CTL_START,
					 PVF_CTL_HAND_OVER, PVF_CTL_LAST, 99};
	static const uint16_t net_types[] = {PVF_CTL_ATTACH, PVF_CTL_START_NET, PVF_CTL_QUIESCE,
					     PVF_CTL_DETACH, PVF_CTL_ATTACH, PVF_CTL_START_NET,
					     PVF_CTL_HAND_OVER, PVF_CTL_LAST, PVF_CTL_TRACE};
	uint16_t type = net ? net_types[how % 9] : types[how % 9];
	size_t size = sizeof(m.hdr);
	int fds[MANY];

	if (type == PVF_CTL_HAND_OVER) {
		hand_over(in, bend);
		return;
	}
	memset(&m, 0, sizeof(m.start_net) + sizeof(*a));
	switch (type) {
	case PVF_CTL_ATTACH:
		/* The next, as a rule: a connection has one queue, two or three. */
		if (worker.attached < worker.attaching) {
			queue = worker.attached;
			a->queues = (uint16_t)worker.attaching;
		} else {
			a->queues = (uint16_t)(1 + upto(in, QUEUES));
		}
		if (bend & 128)
			queue = upto(in, QUEUES);
		a->queue = (uint16_t)queue;
		a->device_class = PVF_CLASS_BLK;
		a->port = PORT + queue;
		a->ring_pages = 1u << upto(in, 3);
		a->pool_pages = 2 + upto(in, 60);
		a->pool_offset = a->ring_pages * PVF_PAGE_SIZE;
		memcpy(a->name, "vbd-51728", 10);
		a->flags = upto(in, 2);
		if (net) {
			a->device_class = PVF_CLASS_NET;
			a->ring_pages = 2;
			a->pool_offset = 2 * PVF_PAGE_SIZE;
			a->tx_pages = 1 + upto(in, a->pool_pages - 1);
			a->rx_port = upto(in, 2) ? RX_PORT + queue : 0;
		}
		for (uint32_t i = 0; i < a->pool_pages; i++)
			a->pool_grefs[i] = 100 + i;
		size = sizeof(*a) + a->pool_pages * 4;
		fds[count++] = bend & 16 ? any(upto(in, 6), queue) : handed_over(PVF_HOST_EVENT, queue);
		fds[count++] = bend & 16 ? any(upto(in, 6), queue) : handed_over(PVF_HOST_PAGES, queue);
		if (a->rx_port)
			fds[count++] = handed_over_port(PVF_HOST_EVENT, queue, RX_PORT + queue);
		break;
	case PVF_CTL_START_NET:
		m.start_net.features = upto(in, 64);
		m.start_net.groups = upto(in, 4);
		for (uint32_t i = 0; i < m.start_net.groups; i++)
			m.start_net.group[i][0] = 1, m.start_net.group[i][5] = (uint8_t)upto(in, 256);
		size = sizeof(m.start_net);
		if (!(how & 8))
			break;
		if (bend & 128)
			queue = m.start_net.first_queue = upto(in, QUEUES);
		for (uint32_t i = queue; i < QUEUES && (i == queue || i < worker.attached); i++)
			fds[count++] = bend & 16 ? any(upto(in, 6), i) : target(i);
		break;
	case PVF_CTL_TRACE:
		if (how & 8) {
			void *where;
			size_t bytes = QUEUES * sizeof(struct pvf_trace);

			fds[count++] = bend & 16 ? any(upto(in, 6), queue) : memory(bytes, &where);
			if (!(bend & 16))
				munmap(where, bytes);
		}
		break;
	case PVF_CTL_START:
		m.start.sectors = 2048;
		m.start.sector_size = 512u << upto(in, 4);
		m.start.flags = upto(in, 16) ^ 6;
		m.start.max_segments = 1 + upto(in, 256);
		m.start.discard_granularity = upto(in, 3) * 512;
		m.start.options = upto(in, 2);
		size = sizeof(m.start);
		if (!(how & 8))
			break;
		if (bend & 128)
			queue = m.start.first_queue = upto(in, QUEUES);
		for (uint32_t i = queue; i < QUEUES && (i == queue || i < worker.attached); i++)
			fds[count++] = bend & 16 ? any(upto(in, 6), i) : target(i);
		break;
	case PVF_CTL_DETACH:
		m.detach.flags = how & 8 ? upto(in, 4) : how >> 4 & 1;
		size = sizeof(m.detach);
		break;
	}
	m.hdr = (struct pvf_ctl_hdr){PVF_CTL_MAGIC, PVF_CTL_VERSION, type,
				     generation + (type == PVF_CTL_ATTACH && !queue), (uint32_t)size};
	if (bend & 32)
		m.hdr.generation = (uint32_t)number(in, 1);
	while (bend & 64 && count < MANY && upto(in, 8))
		fds[count++] = any(upto(in, 6), queue);
	if ((bend & 15) == 1)
		m.bytes[upto(in, (uint32_t)size)] ^= (unsigned char)number(in, 1);
	if ((bend & 15) == 2) {
		size = upto(in, sizeof(m.bytes)) + 1;
		if (bend & 128)
			m.hdr.length = (uint32_t)size;
	}
	if ((bend & 15) == 3)
		raw(in, m.bytes, size);
	bool exits = m.hdr.type == PVF_CTL_EXIT;

	/* An empty queue of answers first, so that none is dropped for want of room. */
	hear(0);
	if (control >= 0) {
		bool quiesce, before = quiesce_owed;
		uint32_t answers;

		send_packet(control, m.bytes, size, fds, count);
		pvf_scm_close(fds, count);
		turn();
		if (size < sizeof(m.hdr))
			m.hdr.type = 0; /* what it is called in the answer */
		/* Too few descriptors or too many, a wrong length: ERROR names the type all the same. */
		quiesce = m.hdr.type == PVF_CTL_QUIESCE;
		if (quiesce)
			quiesce_owed = true;
		answers = hear(m.hdr.type);
		if (control < 0 || (exits && worker.exiting))
			return;
		if (quiesce) /* an earlier one may have been answered first */
			CHECK(answers ? answers <= 1u + before
				      : quiesce_owed && (worker.state == PVF_DRAINING ||
							 worker.state == PVF_TARGET_LOST));
		else
			CHECK_EQ(answers, 1);
	} else {
		pvf_scm_close(fds, count);
	}
}

/* The two others */

static void client_says(struct input *in)
{
	struct nbd_request r = {
		.magic = htobe32(NBD_REQUEST_MAGIC),
		.type = htobe32(upto(in, 5)),
		.from = htobe64((uint64_t)upto(in, 256) * 4096),
		.len = htobe32(upto(in, 64) * 4096),
	};
	static unsigned char bytes[4096];
	uint32_t queue = upto(in, QUEUES);

	if (client[queue] < 0)
		return;
	if (net) {
		struct virtio_net_hdr *v = (struct virtio_net_hdr *)(void *)bytes;

		memset(bytes, 0, sizeof(bytes));
		raw(in, bytes + sizeof(*v), 80);
		v->flags = upto(in, 2);
		v->csum_start = (uint16_t)upto(in, 80);
		v->csum_offset = (uint16_t)upto(in, 20);
		v->gso_type = upto(in, 2);
		v->gso_size = (uint16_t)upto(in, 2000);
		send(client[queue], bytes, 2 + upto(in, 4000), MSG_DONTWAIT | MSG_NOSIGNAL);
		return;
	}
	switch (upto(in, 5)) {
	case 0:
		close(client[queue]);
		client[queue] = -1;
		return;
	case 1:
		send(client[queue], bytes, upto(in, 4096), MSG_DONTWAIT | MSG_NOSIGNAL);
		return;
	case 2:
		while (recv(client[queue], bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
			;
		return;
	default:
		send(client[queue], &r, sizeof(r), MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

static void backend_does(struct input *in)
{
	uint32_t queue = upto(in, QUEUES);
	blkif_sring_t *sring = (blkif_sring_t *)(void *)arena[queue];
	const struct pvf_blk *blk = &worker.queue[queue].blk;
	uint32_t op = upto(in, 8), n = upto(in, 64);

	if (net && op > 1) { /* TX is answered as it was sent, or nearly so; RX has what there is */
		struct pvf_netq *q = worker.queue[queue].own;
		struct netif_tx_sring *tx = (struct netif_tx_sring *)(void *)arena[queue];
		struct netif_rx_sring *rx = (struct netif_rx_sring *)(void *)(arena[queue] + 4096);

		for (uint32_t i = 0; i < PVF_NET_RING && n && op < 5; i++) {
			if (!q->tx.ring.entries || q->tx.page_of[i] == PVF_NONE)
				continue;
			tx->ring[tx->rsp_prod++ % PVF_NET_RING].rsp =
				(struct netif_tx_response){.id = (uint16_t)i, .status = op == 2 ? -1 : 0};
			n--;
		}
		for (; q->rx.ring.entries && n && op >= 5; n--) {
			uint32_t at = rx->rsp_prod++ % PVF_NET_RING;

			rx->ring[at].rsp = (struct netif_rx_response){
				.id = (uint16_t)at, .status = (int16_t)(14 + upto(in, 1000)),
				.flags = (uint16_t)(op == 6 ? upto(in, 16) : 0)};
		}
	} else if (op == 0) {
		arena[queue][upto(in, net ? 8192 : 4096)] = (unsigned char)number(in, 1);
	} else if (op == 1) {
		((unsigned char *)channel[queue])[upto(in, 256)] = (unsigned char)number(in, 1);
		scribbled = true;
	} else if (!net && blk->ring.entries) { /* answers, of which most are good */
		for (uint32_t i = 0; i < PVF_PIECES && n; i++) {
			blkif_response_t *rsp =
				&sring->ring[sring->rsp_prod & (blk->ring.entries - 1)].rsp;

			if (!blk->piece[i].in_flight)
				continue;
			*rsp = (blkif_response_t){.id = blk->piece[i].id,
						  .operation = blk->piece[i].op,
						  .status = op == 2 ? -2 : op == 3 ? -1 : 0};
			sring->rsp_prod++;
			n--;
		}
	}
	pvf_channel_notify(channel[queue], 1, wakeup[queue][0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	uint64_t before = open_fds();

	signal(SIGPIPE, SIG_IGN); /* as confine.c does */
	control = -1;
	hubs = generation = 0;
	quiesce_owed = scribbled = over = false;
	net = size && data[0] >= 224; /* of which nothing else depends: the first choice is data[0] % 8 */
	address = (struct sockaddr_un){.sun_family = AF_UNIX};
	address_size = sizeof(address);
	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	/* An abstract name of the kernel's choice. */
	CHECK(!bind(listener, (struct sockaddr *)&address, sizeof(sa_family_t)));
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &address_size));
	CHECK(!listen(listener, 4));
	for (uint32_t i = 0; i < QUEUES; i++) {
		client[i] = -1;
		arena_fd[i] = memory(ARENA_PAGES * PVF_PAGE_SIZE, (void **)&arena[i]);
		channel_fd[i] = memory(4096, (void **)&channel[i]);
		pvf_channel_init(channel[i]);
		for (int side = 0; side < 2; side++)
			wakeup[i][side] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	}
	begin_worker();
	while (more(&in) && !worker.exiting && !over) {
		uint32_t op = upto(&in, 8);

		switch (op) {
		case 0:
		case 1:
		case 2:
			command(&in);
			break;
		case 3:
			client_says(&in);
			break;
		case 4:
			backend_does(&in);
			break;
		case 5:
			if (control < 0 || upto(&in, 8) == 7)
				supervisor();
			break;
		case 6:
			hear(0);
			break;
		default:
			turn();
		}
	}
	forget_worker();
	for (uint32_t i = 0; i < QUEUES; i++) {
		int own[] = {arena_fd[i], channel_fd[i], wakeup[i][0], wakeup[i][1], client[i]};

		munmap(arena[i], ARENA_PAGES * PVF_PAGE_SIZE);
		munmap(channel[i], 4096);
		pvf_scm_close(own, sizeof(own) / sizeof(own[0]));
	}
	int own[] = {listener, control};

	pvf_scm_close(own, 2);
	pvf_scm_close(hub, hubs);
	CHECK(open_fds() == before);
	return 0;
}
