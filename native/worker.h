/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The worker's state machine: control messages on one side, the queue on the other.
 * docs/architecture.md, "Control protocol", is its specification.
 */
#ifndef PVF_WORKER_H
#define PVF_WORKER_H

#include <sys/epoll.h>

#include "ctl.h"
#include "queue.h"
#include "stats.h"

struct pvf_worker {
	char name[PVF_NAME_MAX];
	uint32_t pid;
	uint32_t generation; /* of the last ATTACH; 0: none yet */
	uint32_t state;      /* enum pvf_worker_state */
	uint32_t device_class;
	bool quiesce_asked; /* a DRAINED is owed */
	bool parked;        /* an event channel must stay open for ever */
	bool exiting;
	char start_notes[PVF_TEXT_MAX]; /* what the kernel refused at start; logged once */
	int epoll_fd, listen_fd;
	struct pvf_fault fault;                   /* of BROKEN, to be told again */
	struct pvf_ctl ctl;
	struct pvf_queue queue;
	struct pvf_stats_page stats;
};

/* Opens everything the worker needs of its own and listens (-1: nowhere, see pvf_worker_connect()). 0 or
 * -errno with `*why`. */
int pvf_worker_init(struct pvf_worker *worker, int listen_fd, const char *name, const char **why);

/* Speaks to the supervisor at the other end of `fd`, a SOCK_SEQPACKET socket that is the worker's from
 * here on. */
void pvf_worker_connect(struct pvf_worker *worker, int fd);

/* The second half of a turn: does what `n` events of the worker's epoll say, and serves the queue. */
void pvf_worker_events(struct pvf_worker *worker, const struct epoll_event *events, int n);

/* One turn of the loop: waits up to `timeout` ms (-1: without end) for something to do, and does it. 0 or
 * -errno. */
int pvf_worker_turn(struct pvf_worker *worker, int timeout);

/* Serves until EXIT. Returns the exit status. */
int pvf_worker_run(struct pvf_worker *worker);

/* Tells the supervisor's log, now or never. level: syslog's. */
void pvf_worker_log(struct pvf_worker *worker, uint32_t level, const char *text);

#endif
