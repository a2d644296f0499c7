/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The worker's state machine: control messages on one side, a device's queues on the other.
 * docs/architecture.md, "Control protocol", is its specification.
 *
 * It runs in one thread, the queues in one of their own each (queue.h). The state is the device's
 * and this thread's alone. What a message asks for is done to each queue under its lock; what
 * the queues note is looked at in every turn, and before every message.
 */
#ifndef PVF_WORKER_H
#define PVF_WORKER_H

#include <sys/epoll.h>

#include "ctl.h"
#include "queue.h"
#include "stats.h"

struct pvf_worker {
	char name[PVF_NAME_MAX];
	char build[PVF_BUILD_MAX];
	uint32_t pid;
	uint32_t generation; /* of the last ATTACH; 0: none yet */
	uint32_t state;      /* enum pvf_worker_state */
	uint32_t device_class;
	uint32_t queues;    /* that there are */
	uint32_t attached;  /* of the connection, so far; all of `attaching` once it is complete */
	uint32_t attaching;
	uint32_t features_told;
	bool quiesce_asked; /* a DRAINED is owed */
	bool parked;        /* event channels must stay open for ever */
	bool exiting;
	void (*obey)(void); /* makes SIGTERM end this process; NULL: that is not ours to say */
	char start_notes[PVF_TEXT_MAX]; /* what the kernel refused at start; logged once */
	int epoll_fd, listen_fd;
	int notes_fd;           /* an eventfd: a queue has noted something */
	struct pvf_fault fault; /* of BROKEN, to be told again */
	uint32_t fault_queue;
	struct pvf_ctl ctl;
	struct pvf_queue *queue; /* [queues] */
	struct pvf_fence fence;
	struct pvf_groups groups; /* a network's */
	struct pvf_trace *trace;  /* [queues], mapped; NULL: nobody wants it */
	struct pvf_stats stats;
};

/* Opens everything the worker needs of its own and listens (-1: nowhere, see pvf_worker_connect()). 0, or
 * -errno with `*why` and nothing is held. */
int pvf_worker_init(struct pvf_worker *worker, int listen_fd, const char *name, uint32_t queues,
		    const char **why);

/* Before that, and before rights are given up: what ublk targets need. 0 or -errno with `*why`. */
int pvf_worker_uring(struct pvf_worker *worker, const char **why);

/* Before that too: its queues are a network's. 0 or -ENOMEM. */
int pvf_worker_net(struct pvf_worker *worker, const char **why);

/* Or a console's. 0 or -ENOMEM. */
int pvf_worker_cons(struct pvf_worker *worker, const char **why);

/* Starts a thread for each queue; or else somebody calls pvf_queue_turn() for each. 0 or -errno. */
int pvf_worker_start(struct pvf_worker *worker, const char **why);

/* Speaks to the supervisor at the other end of `fd`, a SOCK_SEQPACKET socket that is the worker's from
 * here on. */
void pvf_worker_connect(struct pvf_worker *worker, int fd);

/* The second half of a turn: does what `n` events of the worker's epoll say, and looks at what the
 * queues have noted. */
void pvf_worker_events(struct pvf_worker *worker, const struct epoll_event *events, int n);

/* One turn of the loop: waits up to `timeout` ms (-1: without end) for something to do, and does it. 0 or
 * -errno. */
int pvf_worker_turn(struct pvf_worker *worker, int timeout);

/* Serves until EXIT. Returns the exit status. */
int pvf_worker_run(struct pvf_worker *worker);

/* Ends the threads and closes everything but the listening socket. Idempotent; a process that ends
 * anyway does without. */
void pvf_worker_end(struct pvf_worker *worker);

/* Tells the supervisor's log, now or never. level: syslog's. */
void pvf_worker_log(struct pvf_worker *worker, uint32_t level, const char *text);

#endif
