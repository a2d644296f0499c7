/* SPDX-License-Identifier: BSD-2-Clause
 *
 * One queue: a ring, its pool, its event channel, its NBD socket and its two timers, served by one
 * thread. Several queues will be several of these, each with its own thread and epoll.
 *
 * Theory of operation
 *
 *   A delivered event leaves the port masked: masked means that the ring has our attention. One
 *   pvf_queue_service() does a bounded amount of each (rule 8): drain the ring, receive and issue,
 *   publish with at most one notify, send replies. Then the final check: more responses, and
 *   the port stays masked for another round; none, and it is unmasked, because from there on every
 *   response brings an event.
 *
 *   An event with no response behind it is spurious (rule 23). A few can be honest races; from the
 *   fifth in a row the unmask is put off, 1 ms at first, doubled each time up to 1 s. A response, or
 *   two quiet seconds, forgive.
 *
 *   Events can be lost (rule 24): while requests are outstanding, and only then, a timer looks at
 *   the ring. A response that lay there for a whole tick without an event counts as a hit.
 *
 *   A broken rule stops the ring for good: it is not read, written, notified or unmasked any more,
 *   and the pool hands out nothing (rule 21), until the connection is detached.
 */
#ifndef PVF_QUEUE_H
#define PVF_QUEUE_H

#include "blk.h"
#include "port.h"
#include "target.h"

enum pvf_queue_tag { /* low bits of the epoll data, below the worker's own */
	PVF_TAG_EVENT = 1,
	PVF_TAG_TARGET = 2,
	PVF_TAG_UNMASK = 3,
	PVF_TAG_WATCHDOG = 4,
};

/* What has happened since the worker last looked; it clears what it has told. */
enum pvf_queue_note {
	PVF_NOTE_BROKEN = 1,
	PVF_NOTE_TARGET_GONE = 2,
	PVF_NOTE_FEATURE_OFF = 4,
	PVF_NOTE_STALL = 8, /* begun or ended: see `stalled` */
};

/* Where requests come from instead of an NBD socket. It has all of a request's bytes at hand, so
 * none is ever half received, and it never ends by itself. */
struct pvf_source_ops {
	/* Begins what waits while there is room in ring and pool, a bounded amount. `no_new`: only
	 * finishes what has begun. True: stopped by the bound. */
	bool (*intake)(void *source, struct pvf_blk *blk, bool no_new);
	/* Takes the engine's answers (pvf_blk_answer), all there are. True: intake may go on now. */
	bool (*deliver)(void *source, struct pvf_blk *blk);
	/* The engine has dropped its requests with their connection. */
	void (*restart)(void *source);
};

struct pvf_queue {
	int epoll_fd;
	int unmask_timer, watchdog_timer;
	struct pvf_blk blk;
	struct pvf_port port;
	struct pvf_target target;
	const struct pvf_source_ops *source_ops; /* NULL: requests come from `target` */
	void *source;
	bool attached;      /* ring and port are there */
	bool serving;       /* intake is wanted */
	bool no_new;        /* draining: no new request */
	bool again;         /* more to do: do not sleep */
	bool masked;        /* the port was delivered and not given back */
	bool delayed;       /* the unmask waits for its timer */
	bool polling;       /* somebody looks at the ring all the time: no events are asked for */
	bool owed;          /* a response was taken before its event: one may come for nothing */
	bool watching;      /* the watchdog is armed */
	bool idle;          /* the ring was empty when last seen */
	bool stalled;
	uint32_t spurious_run;
	uint32_t responses_since_event;
	uint64_t spurious_at;  /* ns, CLOCK_MONOTONIC */
	uint64_t progress_at;  /* last response, or the ring's last leaving emptiness */
	uint32_t stall_for;    /* seconds, while stalled */
	uint32_t unseen_at;    /* rsp_cons when the watchdog first saw an unannounced response */
	bool unseen;
	uint64_t patience;     /* draining: until when a request cut in the middle is waited for */
	uint32_t features_told;
	uint32_t notes;        /* enum pvf_queue_note */
};

/* Once: makes the timers and watches them. 0 or -errno. */
int pvf_queue_init(struct pvf_queue *queue, int epoll_fd);

/* Opens the port and lays out the ring. As pvf_port_open() on failure. */
int pvf_queue_attach(struct pvf_queue *queue, int event_fd, int grant_fd,
		     const struct pvf_ctl_attach *attach, const char **why);

/* Leaves the connection; the target is closed too unless `keep` and nothing of it is lost. */
void pvf_queue_detach(struct pvf_queue *queue, bool keep);

/* Before a detach: the event channel's descriptor is forgotten instead of closed. It stays open,
 * and its port bound, as long as the process lives. */
void pvf_queue_park(struct pvf_queue *queue);

/* Takes a new NBD socket. 0 or -errno (the descriptor is the caller's then). */
int pvf_queue_target(struct pvf_queue *queue, int fd);
void pvf_queue_drop_target(struct pvf_queue *queue);

/* Begins to drain: the request at intake is finished as far as its client delivers it (a client that
 * stops in the middle of one is given a second), no other is begun. */
void pvf_queue_quiesce(struct pvf_queue *queue);

void pvf_queue_event(struct pvf_queue *queue, uint32_t tag, uint32_t events);
void pvf_queue_service(struct pvf_queue *queue);

/* While `polling` is set, a service takes what has come and asks for no event. This ends that: the next
 * response brings an event. True: one has come already, and `polling` stays set. */
bool pvf_queue_arm(struct pvf_queue *queue);

/* True: no request is in the ring, and none can come there without the client doing something. */
bool pvf_queue_drained(const struct pvf_queue *queue);

#endif
