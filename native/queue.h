/* SPDX-License-Identifier: BSD-2-Clause
 *
 * One queue: a ring, its pool, its event channel, what it serves (an NBD socket) and its two timers,
 * with an epoll of its own. Whoever calls pvf_queue_turn() serves it: its thread, as a rule.
 *
 * Theory of operation
 *
 *   A delivered event leaves the port masked: masked means that the ring has our attention. One
 *   turn does a bounded amount of each (rule 8): drain the ring, receive and issue, publish with
 *   at most one notify, send replies. Then the final check: more responses, and the port stays
 *   masked for another round; none, and it is unmasked, because from there on every response
 *   brings an event.
 *
 *   An event with no response behind it is spurious (rule 23). A few can be honest races; from the
 *   fifth in a row the unmask is put off, 1 ms at first, doubled each time up to 1 s. A response, or
 *   two quiet seconds, forgive.
 *
 *   Events can be lost (rule 24): while requests are outstanding, and only then, a timer looks at
 *   the ring. A response that lay there for a whole tick without an event counts as a hit. A network's
 *   RX ring has requests always: while it is quiet it is looked at every two seconds.
 *
 *   A network's queue may have a port for each ring. They are served together: either's event means that
 *   both rings have our attention, and what was delivered is unmasked at the end.
 *
 *   Polling: a backend that answers within `poll_us` is not slept for. The queue's thread looks at the
 *   ring, leaving the processor to whoever wants it between two looks, and sees to its socket; it
 *   asks for an event only when that time is over, or if the last response took longer. With an
 *   empty ring it sleeps without asking: nothing can come. An event and both its system calls
 *   are saved, and the sleep.
 *
 *   A broken rule stops the ring for good: it is not read, written, notified or unmasked any more,
 *   and the pool hands out nothing (rule 21), until the connection is detached.
 *
 *   Threads: everything in a queue is touched only under its lock, which a turn holds whole, but
 *   not while it sleeps in epoll_wait(). The worker takes the lock to act, and then wakes the
 *   queue. What happens on the queue's side is noted in `notes`, for which the worker is woken; it
 *   looks, and clears them, under the lock. No queue ever takes another's lock.
 */
#ifndef PVF_QUEUE_H
#define PVF_QUEUE_H

#include <pthread.h>

#include "batch.h"
#include "blk.h"
#include "fence.h"
#include "groups.h"
#include "port.h"
#include "source.h"
#include "target.h"
#include "trace.h"
#include "ublk_ring.h"

enum pvf_queue_tag { /* low half of the epoll data */
	PVF_TAG_EVENT = 1,
	PVF_TAG_TARGET = 2,
	PVF_TAG_UNMASK = 3,
	PVF_TAG_WATCHDOG = 4,
	PVF_TAG_WAKE = 5,
	PVF_TAG_URING = 6,
	PVF_TAG_SECOND = 7, /* the second port's event */
};

/* What has happened since the worker last looked. */
enum pvf_queue_note {
	PVF_NOTE_BROKEN = 1,
	PVF_NOTE_TARGET_GONE = 2, /* its socket is not used any more, but still open */
	PVF_NOTE_FEATURE_OFF = 4,
	PVF_NOTE_STALL = 8, /* begun or ended: see `stalled` */
	PVF_NOTE_DRAINED = 16,
};

struct pvf_queue {
	pthread_mutex_t gate, lock; /* see pvf_queue_lock() */
	pthread_t thread;
	pthread_barrier_t begun; /* of the thread and its maker */
	bool threaded;
	uint32_t ending; /* atomic: the thread is to end */
	uint32_t index;
	int epoll_fd;
	int unmask_timer, watchdog_timer, wake_fd;
	int notes_fd;            /* an eventfd of the worker's */
	struct pvf_fence *fence; /* shared by the device's queues */
	void *page; /* struct pvf_blk_stats, pvf_net_stats or pvf_cons_stats */
	const struct pvf_queue_ops *ops; /* the class's: a disk's until another is said (queue_int.h) */
	void *own; /* what the class has instead of a disk's, allocated; or NULL */
	uint32_t state, generation; /* the worker's, for the statistics */
	uint32_t queues;         /* attached: above 1, the fence holds */
	struct pvf_blk blk;
	struct pvf_port port, second; /* `second`: RX's event channel, of a network that has one for each ring */
	bool delivered[2]; /* of two ports: which of them is masked */
	struct pvf_target target; /* the NBD socket; `gone`, `error` and `why` are of any target */
	const struct pvf_source_ops *source_ops; /* NULL: the NBD socket is served */
	void *source;
	struct pvf_ublk_source ublk; /* one such, once it was opened */
	struct pvf_unread unread;
	struct pvf_batch batch;
	uint32_t sockets;   /* taken so far: part of an NBD socket's epoll data */
	bool attached;      /* ring and port are there */
	bool serving;       /* intake is wanted */
	bool no_new;        /* draining: no new request */
	bool drained;       /* while no_new: as pvf_queue_drained(), and it stays so */
	bool stopped;       /* a rule was broken, here or in another queue of the device */
	bool lost;          /* the target has ended: noted */
	bool again;         /* more to do: do not sleep */
	bool owes;          /* the processor was kept for a whole turn, and there is more: others are next */
	bool masked;        /* the port was delivered and not given back */
	bool delayed;       /* the unmask waits for its timer */
	bool polling;       /* somebody looks at the ring all the time: no events are asked for */
	bool soon;          /* the last response came so fast that the next is worth looking for */
	bool owed;          /* a response was taken before its event: one may come for nothing */
	bool watching;      /* the watchdog is armed */
	bool idle;          /* the ring was empty when last seen */
	bool stalled;
	uint32_t spurious_run;
	uint32_t responses_since_event;
	uint64_t spurious_at;  /* ns, CLOCK_MONOTONIC */
	uint64_t poll_until;   /* while a response is looked for; 0: it is not */
	uint64_t progress_at;  /* last response, or the ring's last leaving emptiness */
	uint64_t oldest;       /* no request in the ring is older; 0: none is there */
	uint32_t stall_for;    /* seconds, while stalled */
	uint32_t unseen_at;    /* rsp_cons when the watchdog first saw an unannounced response */
	bool unseen;
	uint64_t patience;     /* draining: until when a request cut in the middle is waited for */
	uint32_t features_noted;
	uint32_t notes;        /* enum pvf_queue_note */
	uint32_t notes_told;   /* of which the worker was woken for */
};

/* Once: makes epoll, timers and wake-up. 0, or -errno and nothing is held. */
int pvf_queue_init(struct pvf_queue *queue, uint32_t index, struct pvf_fence *fence, int notes_fd,
		   void *page);

/* Makes it a network's, for good; the multicast groups are the device's. 0 or -ENOMEM. */
int pvf_queue_net(struct pvf_queue *queue, struct pvf_groups *groups);

/* The same for a console's. */
int pvf_queue_cons(struct pvf_queue *queue);

/* Starts the queue's own thread, which is past everything that only a beginning thread does when
 * this returns: a system call filter may follow. 0 or -errno. */
int pvf_queue_spawn(struct pvf_queue *queue);

/* The end: of the thread, if there is one (no other may be in a turn), of the connection as
 * pvf_queue_detach() does it, and of what pvf_queue_init() made. */
void pvf_queue_free(struct pvf_queue *queue);

/* First come, first served: a queue that has work without end takes its own lock again and again,
 * and would otherwise never leave it to who waits. */
void pvf_queue_lock(struct pvf_queue *queue);
void pvf_queue_unlock(struct pvf_queue *queue);

/* Waits up to `timeout` ms (-1: without end) for something to do, and does a bounded amount of it.
 * True: there is more, do not wait. Takes the lock itself; from any thread. */
bool pvf_queue_turn(struct pvf_queue *queue, int timeout);

/* Instead of sleeping, after a turn that had nothing more to do: looks for a response if that is worth
 * it. True: do not wait in the next turn. For the queue's own thread. */
bool pvf_queue_linger(struct pvf_queue *queue);

/* Makes a turn that waits, or the next one, look at everything. */
void pvf_queue_wake(struct pvf_queue *queue);

/* All that follow: with the lock held. */

/* The parts of a turn, for who waits in a way of his own: what an event of the queue's epoll says,
 * and the service. */
void pvf_queue_event(struct pvf_queue *queue, uint64_t data, uint32_t events);
void pvf_queue_service(struct pvf_queue *queue);

/* While `polling` is set, a service takes what has come and asks for no event. This ends that: the next
 * response brings an event. True: one has come already, and `polling` stays set. */
bool pvf_queue_arm(struct pvf_queue *queue);

/* Opens the port, or both, and lays out the ring; `fds` are ATTACH's. As pvf_port_open() on failure. */
int pvf_queue_attach(struct pvf_queue *queue, const int *fds, const struct pvf_ctl_attach *attach,
		     const char **why);

/* Leaves the connection; the NBD socket or source is closed too unless `keep` and nothing of it is lost:
 * PVF_NOTE_TARGET_GONE says so. */
void pvf_queue_detach(struct pvf_queue *queue, bool keep);

/* Before a detach: each event channel's descriptor is forgotten instead of closed. It stays open,
 * and its port bound, as long as the process lives. */
void pvf_queue_park(struct pvf_queue *queue);

/* Makes the io_uring that a ublk target wants; once, while that is still allowed. 0, or -errno with
 * `*why`. */
int pvf_queue_uring(struct pvf_queue *queue, const char **why);

/* Takes a new target: an NBD socket, or a ublk device (a character device). 0, or -errno with `*why`
 * (the descriptor is the caller's then). */
int pvf_queue_target(struct pvf_queue *queue, int fd, const char **why);
void pvf_queue_drop_target(struct pvf_queue *queue);
bool pvf_queue_has_target(const struct pvf_queue *queue);

/* Takes the disk's numbers. */
void pvf_queue_start(struct pvf_queue *queue, const struct pvf_geometry *geo);

/* The same of a network: what its backend can, PVF_NET_*. */
void pvf_queue_start_net(struct pvf_queue *queue, uint32_t features, uint32_t stall_seconds);

/* The same of a console. */
void pvf_queue_start_cons(struct pvf_queue *queue, uint32_t stall_seconds);

/* Requests, or sent slots, that are not answered; a console's bytes that the backend has not taken. */
uint32_t pvf_queue_in_flight(const struct pvf_queue *queue);

/* The packets' trace of a network's queue goes there; NULL: nowhere. */
void pvf_queue_trace(struct pvf_queue *queue, struct pvf_trace *trace);

/* Intake is wanted from now on. After pvf_queue_start() of all queues. */
void pvf_queue_run(struct pvf_queue *queue);

/* Begins to drain: the request at intake is finished as far as its client delivers it (a client that
 * stops in the middle of one is given a second), no other is begun. */
void pvf_queue_quiesce(struct pvf_queue *queue);

/* Another queue's ring was broken: this one is left alone as that one is. */
void pvf_queue_stop(struct pvf_queue *queue);

/* Shows the statistics. */
void pvf_queue_publish(struct pvf_queue *queue);

/* To another worker (queue_image.c). */
struct pvf_image_queue;

/* NULL, or why it cannot be handed over now. */
const char *pvf_queue_stays(const struct pvf_queue *queue);

/* Writes everything down; `fds` get the descriptors that go with it, PVF_QUEUE_FDS at most. Returns how
 * many. Nothing changes here: the queue can go on, or be left by pvf_queue_detach(). */
#define PVF_QUEUE_FDS (PVF_PORT_FDS + PVF_EVENT_FDS + 1)
uint32_t pvf_queue_save(const struct pvf_queue *queue, struct pvf_image_queue *image, int *fds);

/* For a queue that is not attached, on the other side, one of `queues`: its next turn goes on. Descriptors
 * that it took are -1 then. 0, or -errno with `*why` and the queue as before. */
int pvf_queue_take_over(struct pvf_queue *queue, const struct pvf_image_queue *image,
			uint32_t queues, int *fds, uint32_t count, const char **why);

#endif
