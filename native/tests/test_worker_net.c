/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker of a network with its threads, the embedded host's netback at its rings, programs and a network
 * at both TAPs, the supervisor in the main thread (networker.h).
 */
#include "networker.h"

static struct pvf_worker next; /* which takes over */
static pthread_t next_thread;

static void both_ways(uint32_t n, uint32_t ports)
{
	struct pvf_ctl_simple simple;

	begin(n, ports, ALL);
	start_traffic(600);
	end_traffic();
	tell_of(control, &simple, PVF_CTL_QUIESCE, generation, sizeof(simple), NULL, 0);
	hear_from(control, PVF_CTL_DRAINED);
	for (uint32_t i = 0; i < n; i++) {
		struct pvf_net_stats s = shown(&worker, i);

		CHECK_EQ(s.tx.packets, 600);
		CHECK_EQ(s.rx.packets, 600);
		CHECK(s.tx.large > 50 && s.rx.large > 50 && s.tx.gso > 50);
		for (uint32_t k = 0; k < PVF_DROPS; k++)
			CHECK_EQ(s.tx.dropped[k] + s.rx.dropped[k], 0);
	}
	end(&worker);
}

static void one_queue(void)
{
	both_ways(1, 1);
}

static void four_queues(void)
{
	both_ways(4, 1);
}

static void two_ports(void)
{
	both_ways(1, 2);
	both_ways(3, 2);
}

static void asked(void)
{
	struct pvf_ctl_simple simple;
	struct pvf_ctl_start_net m = {.features = ALL, .stall_seconds = 5};

	begin(2, 2, ALL);
	start_traffic(600);
	for (int round = 0; round < 40; round++) {
		tell_of(control, &simple, PVF_CTL_QUIESCE, generation, sizeof(simple), NULL, 0);
		hear_from(control, PVF_CTL_DRAINED);
		tell_of(control, &m, PVF_CTL_START_NET, generation, sizeof(m), NULL, 0);
		hear_from(control, PVF_CTL_STARTED);
	}
	end_traffic();
	end(&worker);
}

/* Another worker takes over; returns it. `from`: the one that serves. */
static void move(struct pvf_worker *from, struct pvf_worker *to, pthread_t *thread)
{
	int pair[2], peers[2], image = memfd(PVF_HAND_OVER_BYTES);
	struct pvf_ctl_simple m;
	const char *why;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, peers));
	CHECK(!pvf_worker_init(to, -1, "vif-1", MOST, &why) && !pvf_worker_net(to, &why));
	CHECK(!pvf_worker_start(to, &why));
	pvf_worker_connect(to, pair[1]);
	CHECK(!pthread_create(thread, NULL, run, to));
	tell_of(pair[0], &m, PVF_CTL_TAKE_OVER, 0, sizeof(m), (int[2]){peers[0], image}, 2);
	tell_of(control, &m, PVF_CTL_HAND_OVER, generation, sizeof(m), (int[2]){peers[1], image}, 2);
	hear_from(control, PVF_CTL_HANDED_OVER);
	pthread_join(worker_thread, NULL);
	CHECK_EQ(status, 0);
	status = -1;
	close(control);
	control = pair[0];
	hear_from(control, PVF_CTL_TAKEN_OVER);
	worker_thread = *thread;
	if (from != &worker)
		pvf_worker_end(from);
	close(peers[0]);
	close(peers[1]);
	close(image);
}

/* One of our own hosts: a join, as a kernel sends it. */
static void report_group(uint32_t queue, uint8_t type, uint8_t last)
{
	struct frame f = ip(4, 0, 2, 8);
	struct packet p = {0};

	f.bytes[0] = 1;
	f.bytes[f.l4] = type;
	memcpy(f.bytes + f.l4 + 4, (const uint8_t[]){239, 1, 1, last}, 4);
	memcpy(p.bytes, f.bytes, f.size);
	CHECK_EQ(write(sides[queue].guest[1], &p, sizeof(p.vnet) + f.size), sizeof(p.vnet) + f.size);
	CHECK(read(sides[queue].network[1], &p, sizeof(p)) > 0); /* it goes out as well */
}

static void until_backend_has(uint64_t added, uint64_t deleted)
{
	struct pvf_nb_stats s;

	for (int i = 0; i < PATIENCE; i++) {
		pvf_nb_get_stats(nb, &s);
		if (s.multicast_added == added && s.multicast_deleted == deleted)
			return;
		usleep(1000);
	}
	CHECK_EQ(s.multicast_added, added);
	CHECK_EQ(s.multicast_deleted, deleted);
}

static void handed_over(uint32_t n, uint32_t ports)
{
	static struct pvf_worker third;
	pthread_t thread;

	begin(n, ports, ALL | PVF_NET_MULTICAST);
	report_group(0, 0x16, 9);
	until_backend_has(3, 0);
	start_traffic(HANDED);
	move(&worker, &next, &next_thread);
	move(&next, &third, &thread);
	end_traffic();
	uint64_t sent = 0;

	for (uint32_t i = 0; i < n; i++) {
		struct pvf_net_stats s = shown(&third, i);

		sent += s.tx.packets;
		CHECK_EQ(s.rx.packets, HANDED);
		CHECK(s.events && s.notifies);
	}
	CHECK_EQ(sent, HANDED * n + 1);
	until_backend_has(3, 0); /* nothing is told twice */
	report_group(0, 0x17, 9);
	until_backend_has(3, 1);
	struct pvf_worker *first = &worker;

	end(&third);
	pvf_worker_end(first);
}

static void one_moves(void)
{
	handed_over(1, 1);
}

static void two_move(void)
{
	handed_over(2, 2);
}

static void refused(void)
{
	int pair[2], peers[2], image = memfd(PVF_HAND_OVER_BYTES);
	struct pvf_ctl_simple m;
	const char *why;

	begin(1, 1, ALL);
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, peers));
	CHECK(!pvf_worker_init(&next, -1, "vif-1", 1, &why)); /* a disk's */
	CHECK(!pvf_worker_start(&next, &why));
	pvf_worker_connect(&next, pair[1]);
	CHECK(!pthread_create(&next_thread, NULL, run, &next));
	start_traffic(500);
	tell_of(pair[0], &m, PVF_CTL_TAKE_OVER, 0, sizeof(m), (int[2]){peers[0], image}, 2);
	tell_of(control, &m, PVF_CTL_HAND_OVER, generation, sizeof(m), (int[2]){peers[1], image}, 2);
	hear_from(control, PVF_CTL_ERROR);
	hear_from(pair[0], PVF_CTL_ERROR);
	end_traffic(); /* by the one that served */
	tell_of(pair[0], &m, PVF_CTL_EXIT, 0, sizeof(m), NULL, 0);
	pthread_join(next_thread, NULL);
	pvf_worker_end(&next);
	close(pair[0]);
	close(peers[0]);
	close(peers[1]);
	close(image);
	end(&worker);
}

static void groups(void)
{
	begin(2, 1, ALL | PVF_NET_MULTICAST);
	until_backend_has(2, 0); /* all systems */
	report_group(1, 0x16, 1); /* seen by another queue than the one that tells */
	until_backend_has(3, 0);
	report_group(0, 0x16, 2);
	until_backend_has(4, 0);
	report_group(0, 0x17, 1);
	until_backend_has(4, 1);
	disconnect_all();
	make_taps(); /* the worker has closed its ends, and what was under way is lost */
	connect_all();
	until_backend_has(4 + 3, 1); /* all that is joined, again */
	CHECK_EQ(shown(&worker, 0).groups, 3);
	end(&worker);
}

/* As a round trip's, one at a time. */
static void few_answers(void)
{
	static struct packet p;
	struct pvf_net_stats s;
	uint64_t seed = 5;

	begin(1, 2, ALL);
	for (uint32_t i = 0, size; i < 20; i++) {
		struct pollfd polled = {.fd = sides[0].network[1], .events = POLLIN};

		draw_packet(&p, &size, &seed, i);
		CHECK_EQ(write(sides[0].guest[1], &p, sizeof(p.vnet) + size), sizeof(p.vnet) + size);
		CHECK_EQ(poll(&polled, 1, PATIENCE), 1);
		CHECK_EQ(read(sides[0].network[1], &p, sizeof(p)), sizeof(p.vnet) + size);
	}
	for (int ms = 0; ms < PATIENCE; ms++) {
		s = shown(&worker, 0);
		if (!s.tx_in_flight)
			break;
		usleep(1000);
	}
	CHECK_EQ(s.tx.packets, 20);
	CHECK_EQ(s.tx_in_flight, 0);
	CHECK_EQ(s.events + s.watchdog_hits, 0);
	end(&worker);
}

/* An event is lost, and nothing is sent that would bring another. */
static void lost_event(uint32_t ports)
{
	const struct pvf_nb_rule silent = {.kind = PVF_NB_SILENT, .count = 1};
	static struct packet p;
	uint32_t size;
	uint64_t seed = 7;

	begin(1, ports, ALL);
	CHECK_EQ(pvf_nb_set_rules(nb, &silent, 1), 0);
	draw_packet(&p, &size, &seed, 0);
	CHECK_EQ(write(sides[0].network[1], &p, sizeof(p.vnet) + size), sizeof(p.vnet) + size);
	struct pollfd polled = {.fd = sides[0].guest[1], .events = POLLIN};

	CHECK_EQ(poll(&polled, 1, PATIENCE), 1);
	CHECK_EQ(read(sides[0].guest[1], &p, sizeof(p)), sizeof(p.vnet) + size);
	end(&worker);
}

static void lost_events(void)
{
	lost_event(1);
	lost_event(2);
}

static void broken(void)
{
	const struct pvf_nb_rule lie = {.kind = PVF_NB_TX_ID, .value = 77, .skip = 3};
	struct packet p = {0};
	struct frame f = udp(4, 0, 100);

	begin(2, 2, ALL);
	CHECK_EQ(pvf_nb_set_rules(nb, &lie, 1), 0);
	memcpy(p.bytes, f.bytes, f.size);
	for (int i = 0; i < 8; i++)
		CHECK(write(sides[1].guest[1], &p, sizeof(p.vnet) + f.size) > 0);
	CHECK_EQ(hear_from(control, PVF_CTL_BROKEN), 1);
	CHECK_EQ(worker.fault.rule, 5);
	end(&worker);
}

static void traced(void)
{
	struct pvf_ctl_simple m;
	int fd = memfd(2 * sizeof(struct pvf_trace));
	struct pvf_trace *trace = mmap(NULL, 2 * sizeof(*trace), PROT_READ, MAP_SHARED, fd, 0);

	CHECK(trace != MAP_FAILED);
	begin(2, 1, ALL);
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), &control, 1); /* no memfd */
	hear_from(control, PVF_CTL_ERROR);
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), &fd, 1);
	hear_from(control, PVF_CTL_TRACING);
	start_traffic(300);
	end_traffic();
	tell_of(control, &m, PVF_CTL_TRACE, generation, sizeof(m), NULL, 0);
	hear_from(control, PVF_CTL_TRACING);
	for (uint32_t i = 0; i < 2; i++) {
		uint32_t ways[2] = {0};

		CHECK_EQ(trace[i].magic, PVF_TRACE_MAGIC);
		CHECK_EQ(trace[i].queue, i);
		CHECK_EQ(__atomic_load_n(&trace[i].written, __ATOMIC_ACQUIRE), 600);
		for (uint32_t k = 0; k < 600; k++) {
			CHECK_EQ(trace[i].packet[k].dropped, PVF_DROPS);
			ways[trace[i].packet[k].way]++;
		}
		CHECK_EQ(ways[0], 300);
		CHECK_EQ(ways[1], 300);
	}
	start_traffic(50);
	end_traffic();
	CHECK_EQ(trace->written, 600); /* not any more */
	end(&worker);
	munmap(trace, 2 * sizeof(*trace));
	close(fd);
}

int main(void)
{
	static const struct test tests[] = {
		{"packets go both ways through one queue", one_queue},
		{"packets go both ways through four queues", four_queues},
		{"so they do with an event channel for each ring", two_ports},
		{"queues that are busy are quiesced and go on, and nothing is lost", asked},
		{"another worker takes over while packets are under way, and nothing is lost", one_moves},
		{"so does one of several queues with two ports each", two_move},
		{"a disk's worker takes over no network, which goes on", refused},
		{"joins are told to the backend whoever sees them, and again to the next", groups},
		{"answers to a few packets wake nobody, and are taken all the same", few_answers},
		{"rule 24: a received packet whose event was lost is found", lost_events},
		{"a rule broken in one queue stops both", broken},
		{"packets are traced as long as somebody wants it", traced},
	};

	return RUN_TESTS(tests);
}
