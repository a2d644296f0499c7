/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The io_uring through which a queue fetches its tags and commits them.
 *
 * Made before the worker gives up its rights, disabled, and restricted to IORING_OP_URING_CMD: the
 * system call filter forbids io_uring_setup afterwards, so that io_uring is no way around the
 * filter (an unrestricted ring opens files and makes sockets). The thread that serves the queue
 * enables it, with its first turn: the kernel takes fetches and commits of a queue from one thread.
 *
 * Requests arrive as task work of the serving thread, which runs inside pvf_uring_turn()'s
 * io_uring_enter() and nowhere else (IORING_SETUP_DEFER_TASKRUN). A flag in the ring says that there
 * is some (IORING_SETUP_TASKRUN_FLAG), and an eventfd in the queue's epoll wakes who sleeps. Not the
 * ring's own descriptor: of that Linux 6.12 tells only after an RCU grace period, some 10 ms later
 * (io_local_work_wake_poll).
 */
#ifndef PVF_UBLK_RING_H
#define PVF_UBLK_RING_H

#include <liburing.h>

#include "source.h"
#include "ublk.h"

struct pvf_uring {
	struct io_uring ring;
	int event_fd;
	bool made;
	bool enabled;
	bool fetch;     /* every tag is still to be fetched */
	uint64_t epoch; /* of the target, so that a former one's completions are told apart */
};

/* Makes the ring and watches it. 0, or -errno with `*why`. */
int pvf_uring_make(struct pvf_uring *uring, int epoll_fd, uint64_t tag, const char **why);

void pvf_uring_free(struct pvf_uring *uring);

/* Maps the descriptors of /dev/ublkcN's queue `queue`; its tags are fetched with the next turn. 0,
 * or -errno with `*why` (the descriptor is the caller's then). */
int pvf_uring_open(struct pvf_uring *uring, struct pvf_ublk *ublk, int fd, uint16_t queue,
		   const char **why);
void pvf_uring_close(struct pvf_uring *uring, struct pvf_ublk *ublk);

/* As a source of a queue. */
struct pvf_ublk_source {
	struct pvf_ublk ublk;
	struct pvf_uring uring;
};

extern const struct pvf_source_ops pvf_ublk_ops;

/* If there is anything to do, one system call, seldom two: `ublk->commit` goes out, what has come is
 * taken. Only by the serving thread, whenever epoll says that something is there. */
void pvf_uring_turn(struct pvf_uring *uring, struct pvf_ublk *ublk);

#endif
