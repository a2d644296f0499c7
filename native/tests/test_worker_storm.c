/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The whole worker of a network with two queues (networker.h), the first of which is flooded: its backend is the
 * test itself, on a processor of its own, and answers each slot at once with a small packet. So it has more for a
 * turn than a turn may take, always, and the worker is a real-time task while it passes that on. Everybody else is on
 * the worker's processor.
 */
#include "net.h"
#include "networker.h"

#include <dirent.h>
#include <sched.h>
#include <time.h>

#define mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define rmb() mb()
#define wmb() mb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#define TURN 64u /* queue_net.c */
#define SIZE 60
#define MS 1000000ull

static uint32_t ending; /* atomic */
static pthread_t storm;

/* The nth processor of those that we may use; false: there are not so many. */
static bool on_processor(pthread_t thread, int nth)
{
	cpu_set_t all, one;

	CHECK(!sched_getaffinity(0, sizeof(all), &all));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all) || nth--)
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		CHECK(!pthread_setaffinity_np(thread, sizeof(one), &one));
		return true;
	}
	return false;
}

static void *flood(void *arg)
{
	struct side *s = arg;
	struct netif_rx_sring *ring = (struct netif_rx_sring *)(void *)(s->arena + 4096);
	struct end *e = &s->event[ends - 1];
	uint32_t at = 0;

	while (!__atomic_load_n(&ending, __ATOMIC_ACQUIRE)) {
		uint32_t all = __atomic_load_n(&ring->req_prod, __ATOMIC_ACQUIRE), old = at;

		for (; at != all; at++)
			ring->ring[at % PVF_NET_RING].rsp = (struct netif_rx_response){
				.id = (uint16_t)(at % PVF_NET_RING), .status = SIZE};
		if (at == old) {
			sched_yield();
			continue;
		}
		__atomic_store_n(&ring->rsp_prod, at, __ATOMIC_SEQ_CST);
		__atomic_store_n(&ring->req_event, at + 1, __ATOMIC_SEQ_CST);
		if (at - __atomic_load_n(&ring->rsp_event, __ATOMIC_SEQ_CST) < at - old)
			CHECK(!pvf_channel_notify(e->channel, 1, e->wakeup[0]));
	}
	return NULL;
}

static void *compute(void *arg)
{
	(void)arg;
	while (!__atomic_load_n(&ending, __ATOMIC_ACQUIRE))
		;
	return NULL;
}

static uint64_t used(pthread_t thread)
{
	struct timespec ts;
	clockid_t clock;

	CHECK(!pthread_getcpuclockid(thread, &clock) && !clock_gettime(clock, &ts));
	return (uint64_t)ts.tv_sec * 1000 * MS + (uint64_t)ts.tv_nsec;
}

/* False, and nothing is begun: there is one processor only, and who makes a storm there waits for its turn. */
static bool begin_storm(void)
{
	if (!on_processor(pthread_self(), 1)) /* and of all that begins here */
		return false;
	ours = 1;
	begin(2, 2, ALL);
	pthread_t threads[] = {worker_thread, worker.queue[0].thread, worker.queue[1].thread};

	for (size_t i = 0; i < sizeof(threads) / sizeof(*threads); i++)
		on_processor(threads[i], 0);
	ending = 0;
	CHECK(!pthread_create(&storm, NULL, flood, &sides[0]));
	return true;
}

static void end_storm(void)
{
	__atomic_store_n(&ending, 1, __ATOMIC_RELEASE);
	pthread_join(storm, NULL);
}

static void end_all(void)
{
	end(&worker);
	ours = 0;
}

static uint64_t passed(void)
{
	struct pvf_net_stats s = shown(&worker, 0);

	return s.rx.packets + s.rx.dropped[PVF_DROP_TARGET];
}

static void others_compute(void)
{
	pthread_t beside;

	if (!begin_storm())
		return;
	while (passed() < 100 * TURN)
		usleep(1000);
	uint64_t began = used(worker.queue[0].thread);

	CHECK(!pthread_create(&beside, NULL, compute, NULL));
	on_processor(beside, 0);
	for (int i = 0; i < PATIENCE && used(beside) < 200 * MS; i++)
		usleep(1000);
	/* A real-time task that does not stop leaves the kernel's twentieth (sched_rt_runtime_us). */
	uint64_t ours_used = used(worker.queue[0].thread) - began, others = used(beside);

	printf("# %u ms, and %u ms beside it\n", (unsigned)(ours_used / MS), (unsigned)(others / MS));
	CHECK(others >= 200 * MS && others * 8 >= ours_used);
	struct pvf_net_stats s = shown(&worker, 0);

	CHECK(s.rx.packets + s.rx.dropped[PVF_DROP_TARGET] <= s.wakeups * TURN);
	end_storm();
	pthread_join(beside, NULL);
	end_all();
}

static void others_are_served(void)
{
	struct pvf_ctl_start_net m = {.features = ALL, .stall_seconds = 5};
	struct pvf_ctl_simple simple;

	if (!begin_storm())
		return;
	start_traffic(300);
	for (int round = 0; round < 20; round++) {
		uint64_t before = passed();

		tell_of(control, &simple, PVF_CTL_QUIESCE, generation, sizeof(simple), NULL, 0);
		hear_from(control, PVF_CTL_DRAINED);
		tell_of(control, &m, PVF_CTL_START_NET, generation, sizeof(m), NULL, 0);
		hear_from(control, PVF_CTL_STARTED);
		for (int i = 0; i < PATIENCE && passed() == before; i++)
			usleep(1000);
		CHECK(passed() > before); /* the storm goes on as well */
	}
	end_traffic();
	struct pvf_net_stats s = shown(&worker, 1);

	CHECK_EQ(s.rx.packets, 300);
	CHECK_EQ(s.tx.packets, 300);
	end_storm();
	end_all();
}

/* Threads of this process that are scheduled so. */
static int scheduled(int policy)
{
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;
	int found = 0;

	CHECK(tasks);
	while ((task = readdir(tasks)))
		found += task->d_name[0] != '.' && sched_getscheduler(atoi(task->d_name)) == policy;
	closedir(tasks);
	return found;
}

static bool becomes(int policy, int count)
{
	for (int i = 0; i < PATIENCE; i++, usleep(1000))
		if (scheduled(policy) == count)
			return true;
	return false;
}

static void patient_for_a_while(void)
{
	struct netif_rx_sring *ring;
	pthread_t beside;

	/* Who may be no real-time task is never anything else, either. */
	if (sched_setscheduler(0, SCHED_RR, &(struct sched_param){1}))
		return;
	sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){0});
	if (!begin_storm())
		return;
	CHECK(!pthread_create(&beside, NULL, compute, NULL));
	on_processor(beside, 0);
	CHECK(becomes(SCHED_BATCH, 1));
	end_storm();
	pthread_join(beside, NULL);
	ring = (struct netif_rx_sring *)(void *)(sides[0].arena + 4096);
	/* What the storm left in the ring is taken when the worker gets to it. */
	for (int i = 0; i < PATIENCE && (uint32_t)passed() != ring->rsp_prod; i++)
		usleep(1000);
	uint64_t before = passed();

	CHECK_EQ((uint32_t)before, ring->rsp_prod);

	usleep(100000); /* what is seldom has nothing to gather */
	ring->ring[ring->rsp_prod % PVF_NET_RING].rsp = (struct netif_rx_response){
		.id = (uint16_t)(ring->rsp_prod % PVF_NET_RING), .status = SIZE};
	__atomic_store_n(&ring->rsp_prod, ring->rsp_prod + 1, __ATOMIC_SEQ_CST);
	pvf_channel_notify(sides[0].event[1].channel, 1, sides[0].event[1].wakeup[0]);
	CHECK(becomes(SCHED_BATCH, 0));
	for (int i = 0; i < PATIENCE && passed() == before; i++)
		usleep(1000);
	CHECK_EQ(passed(), before + 1);
	CHECK(becomes(SCHED_RR, 0));
	end_all();
}

int main(void)
{
	static const struct test tests[] = {
		{"in a storm of packets a turn is bounded, and whoever shares the processor computes on", others_compute},
		{"in a storm of packets the other queue's go on, and the supervisor is answered", others_are_served},
		{"whoever reads many packets is not stopped by the next, and one packet alone finds that over", patient_for_a_while},
	};

	return RUN_TESTS(tests);
}
