/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the queue's files share with each other only: queue.c (its life, what the worker does with
 * it), queue_turn.c (how it is served).
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

/* Of queue_turn.c, for both classes. */
void pvf_queue_broken(struct pvf_queue *q); /* `blk.fault` says how */
void pvf_queue_notify(struct pvf_queue *q, struct pvf_port *port);
void pvf_queue_progress(struct pvf_queue *q, uint32_t responses);
void pvf_queue_watch(struct pvf_queue *q, uint32_t in_flight);
/* Ends the attention to one event: unmask now, or later if events keep coming for nothing. */
void pvf_queue_finish_event(struct pvf_queue *q);

/* Of queue_net.c: what a network's queue does where a disk's does something else. */
int pvf_netq_attach(struct pvf_queue *q, int rx_event_fd, const struct pvf_ctl_attach *attach, const char **why);
void pvf_netq_detach(struct pvf_queue *q);
int pvf_netq_unmask(struct pvf_queue *q);
bool pvf_netq_drained(const struct pvf_queue *q);
int pvf_queue_watch_port(struct pvf_queue *q, const struct pvf_port *port, uint32_t tag);
int pvf_netq_target(struct pvf_queue *q, int fd, const char **why);
void pvf_netq_drop_target(struct pvf_queue *q);
void pvf_netq_serve(struct pvf_queue *q);
void pvf_netq_answers(struct pvf_queue *q); /* takes those of packets that were sent */
uint32_t pvf_netq_taken(const struct pvf_queue *q);
uint32_t pvf_netq_waiting(struct pvf_queue *q, struct pvf_fault *fault);
void pvf_netq_publish(struct pvf_queue *q);

/* Of queue_cons.c: the same of a console's. */
void pvf_consq_attach(struct pvf_queue *q);
int pvf_consq_target(struct pvf_queue *q, int fd, const char **why);
void pvf_consq_drop_target(struct pvf_queue *q);
void pvf_consq_serve(struct pvf_queue *q);
bool pvf_consq_drained(const struct pvf_queue *q);
uint32_t pvf_consq_waiting(struct pvf_queue *q, struct pvf_fault *fault);
void pvf_consq_publish(struct pvf_queue *q);

#endif
