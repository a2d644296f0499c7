/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the files of the block backend share: blkback_disk.c (storage), blkback_rules.c (which faults fire),
 * blkback_hostile.c (what they do), blkback_request.c, blkback_ring.c (a ring and its thread), blkback.c
 * (a disk, its connection and their grants).
 */
#ifndef PVF_BLKBACK_INT_H
#define PVF_BLKBACK_INT_H

#include <pthread.h>

#include "blkback.h"
#include "channel.h"
#include "peer.h"

/* The barriers of io/ring.h are not used: indices are accessed by atomic operations. */
#define xen_mb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#include <xen/xen.h>
#include <xen/io/blkif.h>

#define BB_PAGE 4096u
#define BB_SECTOR 512u
#define BB_SLOTS 512u /* of a ring of PVF_BB_RING_PAGES */
#define BB_RECENT 64u
#define BB_NEVER UINT64_MAX

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
/* Counters have one writer; pvf_bb_get_stats() reads them from another thread. */
#define ADD(x, n) STORE(x, (x) + (uint64_t)(n))

/* Storage */

struct bb_disk {
	int fd;
	bool memory;
	unsigned char *base; /* NULL: a file, or too large to be mapped */
	uint64_t bytes;      /* read before `base`, which always holds that many */
	uint64_t held;       /* size of the storage itself */
	uint8_t *written;    /* of memory, for each 2 MiB: whether anything ever was */
	struct bb_extent *extent; /* every mapping ever made, unmapped at the end */
};

int bb_disk_open(struct bb_disk *disk, const char *path, uint64_t bytes, uint32_t flags);
void bb_disk_close(struct bb_disk *disk);
int bb_disk_resize(struct bb_disk *disk, uint64_t bytes);
uint64_t bb_disk_bytes(const struct bb_disk *disk);
/* All return 0 or -errno; ranges were checked against bb_disk_bytes(). */
int bb_disk_io(struct bb_disk *disk, bool write, uint64_t at, unsigned char *memory, size_t n);
int bb_disk_flush(struct bb_disk *disk);
/* Whole granules within the range are zeroes afterwards, the rest is as it was. */
int bb_disk_discard(struct bb_disk *disk, uint64_t at, uint64_t n, uint32_t granularity,
		    uint32_t alignment);

/* Rules */

struct bb_rules {
	pthread_mutex_t lock;
	uint32_t count; /* read without the lock: 0 costs nothing */
	struct pvf_bb_rule rule[PVF_BB_RULES];
	uint64_t random;
	uint64_t fired[PVF_BB_KINDS];
};

/* The faults that fire for a request; at most PVF_BB_ACTIONS, one of a kind. */
uint32_t bb_rules_match(struct bb_rules *rules, uint8_t op, uint64_t sector, uint64_t sectors,
			struct pvf_bb_rule *action);
/* Whether there is a rule of this kind that needs no request; `*rule` is a copy. */
bool bb_rules_idle(struct bb_rules *rules, uint32_t kind, struct pvf_bb_rule *rule);
/* Whether it fires now; if so, `bb_rules_fired` counts it once it is done. */
bool bb_rules_fire(struct bb_rules *rules, uint32_t kind);
void bb_rules_fired(struct bb_rules *rules, uint32_t kind);
uint64_t bb_rules_draw(struct bb_rules *rules);

/* A disk and its connection */

struct pvf_bb_conn {
	struct pvf_bb *bb;
	struct pvf_peer peer;
	bool persistent;
	bool stop;    /* take no more requests */
	bool abandon; /* forget what is in flight */
	pthread_mutex_t lock; /* which rings have ended */
	pthread_cond_t changed;
	uint32_t asked; /* counts pvf_bb_disconnect() */
	struct bb_ring *ring[PVF_BB_QUEUES];
	uint32_t rings;
};

struct pvf_bb {
	struct bb_disk disk;
	struct pvf_bb_features features; /* read field by field, without a lock */
	struct bb_rules rules;
	uint32_t released; /* counts pvf_bb_release() */
	struct pvf_bb_conn *conn;
	struct pvf_bb_stats ended; /* of connections that are over */
	struct pvf_bb_left left[PVF_BB_QUEUES]; /* in order, by the last connection */
	uint32_t lefts;
};

/* A ring */

enum bb_held { BB_FREE = 0, BB_DELAYED, BB_STALLED, BB_WINDOW };

/* A kept grant: mapped for as long as the connection, or for one request. */
enum bb_mapped { BB_UNMAPPED = 0, BB_MAPPED, BB_KEPT };

struct bb_segment {
	unsigned char *page;
	uint32_t ref;
	uint8_t first, last; /* sectors within the page */
	uint8_t mapped;      /* enum bb_mapped */
	bool writable;
};

struct bb_request {
	uint64_t id, sector, sectors;
	uint64_t due; /* us; BB_NEVER: when released */
	int16_t status;
	uint8_t op; /* of an indirect request the inner one */
	uint8_t held;
	uint32_t segments, actions;
	uint32_t table, entries; /* the last page of indirect descriptors; entries 0: none */
	struct pvf_bb_rule action[PVF_BB_ACTIONS];
	struct bb_segment *segment; /* PVF_BB_SEGMENTS */
};

struct bb_kept {
	unsigned char *page;
	bool used;
};

struct bb_ring {
	struct pvf_bb_conn *conn;
	struct pvf_bb *bb;
	blkif_back_ring_t ring;
	uint32_t refs[PVF_BB_RING_PAGES], pages;
	void *shared;
	struct pvf_channel *channel;
	uint32_t side;
	int own_fd, other_fd, ctl_fd, epoll_fd;
	pthread_t thread;
	bool started;
	/* Under conn->lock: */
	bool ended;
	uint32_t busy; /* which conn->asked was answered with: requests are in flight */

	/* The thread's own */
	RING_IDX published; /* what rsp_prod says */
	RING_IDX pushed;    /* rsp_prod_pvt at that time */
	uint32_t unasked;   /* responses put there by PVF_BB_DUPLICATE */
	bool halted;        /* req_prod was impossible */
	bool more;          /* requests were left in the ring on purpose */
	bool barrier;       /* one is in flight: nothing overtakes it */
	uint32_t released;
	uint64_t last_id;
	bool answered;
	struct bb_request *request;
	struct bb_segment *segments;
	uint16_t idle[BB_SLOTS], held[BB_SLOTS];
	uint32_t idle_count, held_count;
	struct bb_kept *kept; /* by reference */
	uint32_t *kept_ref;
	uint32_t kept_count;
	uint32_t recent[BB_RECENT], recent_count;
	uint64_t storm_due, pages_due, slots_due;
	struct pvf_bb_stats stats;
};

uint64_t bb_now(void); /* us */
void bb_notify(struct bb_ring *r);

/* A request, blkback_request.c */

const struct pvf_bb_rule *bb_action(const struct bb_request *q, uint32_t kind);
/* Fills in all but the actions; BLKIF_RSP_*: what an honest backend would answer so far. */
int16_t bb_parse(struct bb_ring *r, struct bb_request *q, const struct blkif_request *req);
int16_t bb_map_all(struct bb_ring *r, struct bb_request *q);
void bb_unmap_all(struct bb_ring *r, struct bb_request *q);
/* Does its first `limit` sectors. */
int16_t bb_execute(struct bb_ring *r, struct bb_request *q, uint64_t limit);

/* What is hostile, blkback_hostile.c */

void bb_rewrite_pages(struct bb_ring *r, struct bb_request *q, const struct pvf_bb_rule *rule);
void bb_rewrite_slots(struct bb_ring *r, RING_IDX from, RING_IDX to,
		      const struct pvf_bb_rule *rule);
void bb_write_outside(struct bb_ring *r, struct bb_request *q, const struct pvf_bb_rule *rule);
/* Counts `value` in every word of the granted pages that the frontend had no reason to fill. */
void bb_look(struct bb_ring *r, const struct bb_request *q, uint64_t value);
void bb_corrupt(struct bb_ring *r, const struct pvf_bb_rule *rule, uint64_t *id, uint8_t *op,
		int16_t *status);
/* Returns when to come again. */
uint64_t bb_idle_faults(struct bb_ring *r);

/* 0 or -errno. */
int bb_ring_start(struct bb_ring *ring);
void bb_ring_kick(struct bb_ring *ring);
/* After its thread has ended, or if it never started. */
/* Once its thread has ended: whether all that it took is answered, and every answer published. */
bool bb_ring_in_order(const struct bb_ring *r);
void bb_ring_free(struct bb_ring *ring);
struct bb_ring *bb_ring_new(struct pvf_bb_conn *conn);

#endif
