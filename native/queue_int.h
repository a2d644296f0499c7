/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the queue's files share with each other only: queue.c (its life, what the worker does with
 * it), queue_turn.c (how it is served), queue_image.c (it is handed over), and a file for each class,
 * queue_blk.c, queue_net.c and queue_cons.c: no other knows which there are.
 */
#ifndef PVF_QUEUE_INT_H
#define PVF_QUEUE_INT_H

#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>

#include "queue.h"

#define PVF_US 1000ull /* in ns */
#define PVF_MS 1000000ull
#define PVF_SECOND (1000 * PVF_MS)
#define PVF_WATCHDOG_TICK (250 * PVF_MS)

static inline uint64_t pvf_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * PVF_SECOND + (uint64_t)ts.tv_nsec;
}

/* The same some milliseconds ago at the most, and never a system call. */
static inline uint64_t pvf_coarse_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
	return (uint64_t)ts.tv_sec * PVF_SECOND + (uint64_t)ts.tv_nsec;
}

/* Once, in `ns`; 0: not any more. */
static inline void pvf_arm(int timer, uint64_t ns)
{
	struct itimerspec spec = {.it_value = {.tv_sec = (time_t)(ns / PVF_SECOND),
					       .tv_nsec = (long)(ns % PVF_SECOND)}};

	timerfd_settime(timer, 0, &spec, NULL);
}

static inline void pvf_signal(int fd)
{
	/* It fails only when the counter is full, and then it is an event already. */
	eventfd_write(fd, 1);
}

/* What a class does in a way of its own. The lock is held. */
struct pvf_queue_ops {
	/* The backend says nothing that was not asked for: with an empty ring nothing can come, and a client who
	 * wakes us may have more requests. */
	bool requests;
	/* The ring is new, and `port` open, as is `second` if ATTACH brought it. */
	void (*attach)(struct pvf_queue *q, const struct pvf_ctl_attach *attach);
	/* Leaves the ring, if one is attached, and the target: unless `keep`, and nothing of it is lost. */
	void (*detach)(struct pvf_queue *q, bool keep);
	/* A rule was broken: the pool hands out nothing. NULL: there is no pool. */
	void (*quarantine)(struct pvf_queue *q);
	uint32_t (*in_flight)(const struct pvf_queue *q);
	/* As pvf_queue_target() and those beside it; and the target's epoll events (NULL: each turn looks at it). */
	int (*take_target)(struct pvf_queue *q, int fd, const char **why);
	void (*drop_target)(struct pvf_queue *q);
	bool (*has_target)(const struct pvf_queue *q);
	void (*target_event)(struct pvf_queue *q, uint32_t events);
	/* A turn: a bounded amount of everything; `again` is set if there is more. */
	void (*serve)(struct pvf_queue *q);
	/* No request is in the ring, and none can come there without the client doing something. */
	bool (*drained)(const struct pvf_queue *q);
	/* The watchdog's: takes what no event is waited for (NULL: nothing is); responses that nobody has taken; how
	 * far they were taken. */
	void (*tick)(struct pvf_queue *q);
	uint32_t (*waiting)(struct pvf_queue *q, struct pvf_fault *fault);
	uint32_t (*taken)(const struct pvf_queue *q);
	void (*publish)(struct pvf_queue *q);
	/* Handing over, beside what is every queue's and `port`: as pvf_queue_stays() (NULL: nothing more is against
	 * it) and those beside it; `fds` are what save() gave. On failure nothing is held but ports. Without the last
	 * two, a class is not handed over. */
	const char *(*stays)(const struct pvf_queue *q);
	uint32_t (*save)(const struct pvf_queue *q, struct pvf_image_queue *to, int *fds);
	int (*take_over)(struct pvf_queue *q, const struct pvf_image_queue *from, int *fds, uint32_t count,
			 const char **why);
};

extern const struct pvf_queue_ops pvf_blkq_ops, pvf_netq_ops, pvf_consq_ops;

static inline bool pvf_queue_has_second(const struct pvf_queue *q)
{
	return q->second.event_fd >= 0;
}

/* Of queue.c, for the classes. */
int pvf_queue_watch_port(struct pvf_queue *q, const struct pvf_port *port, const char **why);
void pvf_queue_close_ports(struct pvf_queue *q);
/* The epoll data of the next target: an event of one before is known by it. */
uint64_t pvf_queue_next_tag(struct pvf_queue *q);
/* Watches a target edge-triggered, and closes it (-1: there is none). */
int pvf_queue_watch_target(struct pvf_queue *q, int fd, uint32_t events);
void pvf_queue_close_target(struct pvf_queue *q, int *fd);
/* Begins with a backend that may have sent something before we were told that it is connected. */
void pvf_queue_expect(struct pvf_queue *q, uint32_t stall_seconds);

/* Of queue_turn.c. */
void pvf_queue_broken(struct pvf_queue *q); /* `blk.fault` says how */
bool pvf_queue_check(struct pvf_queue *q, const struct pvf_fault *fault); /* false: it broke a rule, and is broken */
void pvf_queue_notify(struct pvf_queue *q, struct pvf_port *port);
/* `responses` were taken. With a recent `blk.now`. */
void pvf_queue_progress(struct pvf_queue *q, uint32_t responses);
void pvf_queue_watch(struct pvf_queue *q, uint32_t in_flight);
/* Ends the attention to one event: unmask now, or later if events keep coming for nothing. */
void pvf_queue_finish_event(struct pvf_queue *q);
/* Wakes the worker for what is newly noted. */
void pvf_queue_tell(struct pvf_queue *q);

#endif
