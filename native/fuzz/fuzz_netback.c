/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The network backend's end of its rings, the control ring among them, before a frontend that writes anything into
 * rings, lists, grant table and pages between any two requests, and a TAP that has any packet. No thread is
 * started: their turns are taken here.
 *
 * What must hold: no memory but the arena's is touched; what is said of kept grants, hash and multicast addresses
 * stays within its limits; nothing is mapped that is not kept; a turn ends.
 */
#include "fuzz.h"

#include <sys/socket.h>

/* The control ring's consumer itself: its parts are static. */
#include "../host/netback_ctrl.c"

#define QUEUES 2u
#define PAGES 40u
#define RINGS (2 * QUEUES + 1) /* pages of rings, the control ring's last */
#define REFS 160u /* references that are ever granted */
#include "fuzz_frontend.h"

#define KEEP 6u

static struct pvf_nb *nb;
static int network[QUEUES]; /* the other ends of the TAPs */

/* Everything that is expensive, once. */
static void connect_once(void)
{
	int table_fd, track_fd, arena_fd, channel_fd, pair[2];
	char why[PVF_NB_TEXT];

	frontend_once(&table_fd, &track_fd, &arena_fd, &channel_fd);
	CHECK((nb = pvf_nb_new()));
	CHECK(!pvf_nb_connect(nb, table_fd, track_fd, BACK, FRONT, -1, PVF_NB_SG | PVF_NB_GSO4 | PVF_NB_GSO6,
			      KEEP));
	CHECK(!pvf_nb_arena(nb, ARENA, arena_fd));
	struct pvf_nb_channel its = {channel_fd, eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK), 1};

	for (uint32_t i = 0; i < QUEUES; i++) {
		CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair));
		network[i] = pair[1];
		CHECK(!pvf_nb_queue(nb, REF(2 * i), REF(2 * i + 1), &its, 1, pair[0], why));
	}
	CHECK(!pvf_nb_control(nb, REF(RINGS - 1), &its, why));
}

static void reset(struct input *in)
{
	memset(arena, 0, PAGES * PAGE);
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct nb_queue *q = nb->queue[i];

		SHARED_RING_INIT(q->tx.sring);
		SHARED_RING_INIT(q->rx.sring);
		BACK_RING_INIT(&q->tx, q->tx.sring, PAGE);
		BACK_RING_INIT(&q->rx, q->rx.sring, PAGE);
		q->tx_published = 0;
		memset(&q->stats, 0, sizeof(q->stats));
	}
	SHARED_RING_INIT(nb->ctrl.ring.sring);
	BACK_RING_INIT(&nb->ctrl.ring, nb->ctrl.ring.sring, PAGE);
	nb->ctrl.holds = 0;
	nb->ctrl.release = false;
	nb->hash = (struct nb_hash){0};
	nb->groups = (struct nb_groups){0};
	nb->broken = 0;
	nb->fatal[0] = 0;
	grants();
	pvf_nb_set_headroom(nb, upto(in, 4) ? 0 : (uint32_t)number(in, 2));
	pvf_nb_set_filter(nb, upto(in, 2));
}

static void rules(struct input *in)
{
	struct pvf_nb_rule rule[3];
	uint32_t n = upto(in, 4);

	memset(rule, 0, sizeof(rule));
	for (uint32_t i = 0; i < n; i++)
		rule[i] = (struct pvf_nb_rule){
			.kind = 1 + upto(in, PVF_NB_KINDS - 1),
			.only = upto(in, 2) ? upto(in, 12) : 0,
			.skip = upto(in, 3),
			.count = upto(in, 3),
			.value = upto(in, 2) ? upto(in, 8) : number(in, 8),
		};
	CHECK(!pvf_nb_set_rules(nb, rule, n));
}

/* The frontend */

static void ask(struct input *in)
{
	struct xen_netif_ctrl_sring *s = nb->ctrl.ring.sring;
	struct xen_netif_ctrl_request *r = RING_GET_REQUEST(&nb->ctrl.ring, s->req_prod);
	uint32_t how = upto(in, 256);

	*r = (struct xen_netif_ctrl_request){
		.id = (uint16_t)s->req_prod,
		.type = how & 128 ? (uint16_t)number(in, 2) : (uint16_t)(how % 12),
	};
	for (uint32_t i = 0; i < 3; i++) {
		uint32_t n = upto(in, 256);

		r->data[i] = how & 64 ? (uint32_t)number(in, 4) : n < 200 ? n : a_ref(in);
	}
	/* Which of them is a reference the header says. */
	if (!(how & 32) && (r->type == XEN_NETIF_CTRL_TYPE_SET_HASH_KEY ||
			    r->type == XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING))
		r->data[0] = a_ref(in);
	if (!(how & 32) && (r->type == XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING ||
			    r->type == XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING)) {
		r->data[0] %= QUEUES;
		r->data[1] = a_ref(in);
		r->data[2] %= KEEP + 2;
	}
	s->req_prod++;
}

/* References in a page, as for static grants, or small numbers, as for a mapping. */
static void list(struct input *in)
{
	unsigned char *page = arena + (RINGS + upto(in, PAGES - RINGS)) * PAGE;
	struct xen_netif_gref *g = (void *)page;
	uint32_t n = upto(in, 16);
	bool numbers = upto(in, 2);

	for (uint32_t i = 0; i < n; i++) {
		if (numbers)
			((uint32_t *)(void *)page)[i] = upto(in, QUEUES + 1);
		else
			g[i] = (struct xen_netif_gref){.ref = a_ref(in), .flags = (uint16_t)upto(in, 2)};
	}
}

static void transmit(struct input *in)
{
	struct netif_tx_sring *s = nb->queue[upto(in, QUEUES)]->tx.sring;
	uint32_t slots = 1 + upto(in, 4), how = upto(in, 256);

	for (uint32_t i = 0; i < slots; i++) {
		struct netif_tx_request *r = &s->ring[s->req_prod++ % 256].req;

		*r = (struct netif_tx_request){
			.gref = a_ref(in),
			.offset = how & 128 ? (uint16_t)number(in, 2) : 0,
			.flags = how & 64 ? (uint16_t)upto(in, 16)
					  : (uint16_t)((i + 1 < slots ? NETTXF_more_data : 0) |
						       (how & 1 ? NETTXF_csum_blank : 0)),
			.id = (uint16_t)s->req_prod,
			.size = (uint16_t)number(in, 2),
		};
		if (how & 2 && !i) { /* extra info, of any type */
			struct netif_extra_info *e = (void *)&s->ring[s->req_prod++ % 256].req;

			r->flags |= NETTXF_extra_info;
			memset(e, 0, sizeof(*e));
			e->type = (uint8_t)upto(in, 7);
			e->flags = how & 4 ? (uint8_t)upto(in, 2) : 0;
			for (uint32_t n = 0; n < 3; n++)
				e->u.pad[n] = (uint16_t)number(in, 1);
		}
	}
}

static void show(struct input *in)
{
	struct netif_rx_sring *s = nb->queue[upto(in, QUEUES)]->rx.sring;

	for (uint32_t n = upto(in, 64); n; n--) {
		struct netif_rx_request *r = &s->ring[s->req_prod++ % 256].req;

		*r = (struct netif_rx_request){
			.id = (uint16_t)s->req_prod, .gref = n % 8 ? REF(RINGS + n % (PAGES - RINGS)) : a_ref(in)};
	}
}

/* The network */

static void come(struct input *in)
{
	static struct nb_frame f;
	uint32_t how = upto(in, 256), size = how & 128 ? (uint32_t)number(in, 2) : 60 + upto(in, 100);

	memset(&f, 0, sizeof(f));
	f.vnet.flags = how & 1;
	f.vnet.gso_type = how & 2 ? (uint8_t)upto(in, 6) : 0;
	f.vnet.gso_size = (uint16_t)(how & 2 ? 1400 : 0);
	f.bytes[0] = (uint8_t)upto(in, 4);
	f.bytes[12] = how & 4 ? 0x08 : 0x86;
	f.bytes[13] = how & 4 ? 0x00 : 0xdd;
	f.bytes[14] = how & 8 ? (uint8_t)number(in, 1) : 0x45;
	f.bytes[how & 4 ? 23 : 20] = how & 16 ? 6 : (uint8_t)number(in, 1);
	raw(in, f.bytes + 26, 40);
	/* It may be shorter than a frame can be, but for its header. */
	if (write(network[upto(in, QUEUES)], &f, sizeof(f.vnet) + size) < 0)
		return; /* as a TAP whose queue is full */
}

static void turn(void)
{
	static unsigned char taken[NB_FRAME + 64];

	serve(nb);
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct nb_queue *q = nb->queue[i];
		uint32_t kept = 0;

		nb_tx(q);
		nb_rx(q);
		while (read(network[i], taken, sizeof(taken)) >= 0)
			;
		for (uint32_t ref = 0; ref < REFS; ref++)
			kept += q->kept[ref].page != NULL;
		CHECK_EQ(kept, q->kept_count);
		CHECK(kept <= KEEP);
	}
	CHECK(nb->groups.count <= NB_GROUPS && nb->hash.entries <= NB_MAPPING);
	CHECK(nb->hash.algorithm <= XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ);
	for (uint32_t i = 0; i < NB_MAPPING; i++)
		CHECK(nb->hash.mapping[i] < QUEUES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};

	if (!nb)
		connect_once();
	reset(&in);
	rules(&in);
	while (more(&in)) {
		switch (upto(&in, 12)) {
		case 0:
		case 1:
			turn();
			break;
		case 2:
			mutate(&in);
			break;
		case 3:
			if (upto(&in, 4) == 3)
				rules(&in);
			break;
		case 4:
			list(&in);
			break;
		case 5:
			show(&in);
			break;
		case 6:
		case 7:
			transmit(&in);
			break;
		case 8:
			come(&in);
			break;
		default:
			ask(&in);
		}
	}
	turn();
	struct pvf_nb_rule none = {0};

	CHECK(!pvf_nb_set_rules(nb, &none, 0));
	turn();
	for (uint32_t i = 0; i < QUEUES; i++)
		for (uint32_t ref = 0; ref < REFS; ref++)
			if (nb->queue[i]->kept[ref].page)
				forget_ref(nb->queue[i], ref);
	only_the_rings_are_mapped();
	return 0;
}
