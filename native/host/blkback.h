/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The block backend of the embedded host: what Linux's blkback does with a ring, and, where a rule
 * says so, what a backend must never do. Written against Xen's headers, sharing no code with the
 * frontend: a rule misread here and there would cancel out.
 *
 * Theory of operation
 *
 *   A `pvf_bb` is one virtual disk: its storage, features, rules, counters. It outlives
 *   connections. A `pvf_bb_conn` is one connection of a frontend: the grant table, the rings, one
 *   thread for each ring. The xenbus walk is Python's (pvfront/host/vbd.py); no call here waits for
 *   a request.
 *
 *   A ring's thread sleeps in epoll_wait() on its event channel and its control eventfd. Awake, it takes
 *   each request into private memory, checks it as blkback does, maps its grants, does it, and
 *   answers. Nothing of the ring is read twice. A mapping is a compare-and-swap in the grant table:
 *   the memory itself, each arena as a whole, is mapped once. Disks in memory are mapped too, so a
 *   request costs copies and no system call; responses are published in batches.
 *
 *   Disconnecting stops the taking of requests. Those that are in flight, because a rule delays
 *   them, are still executed and answered later, as blkback's are; until then pvf_bb_disconnect()
 *   says -EBUSY, and nothing new can connect.
 *
 *   A ring that was used before is taken up at its rsp_prod only if its last server left it in order:
 *   everything that it had taken is answered, and nothing is written into a slot that rsp_prod does
 *   not count. Otherwise requests would be done again that were answered out of order, with pages
 *   that are others' by now, or read from slots that hold a response. The kernel's blkback drains
 *   before it lets go of a ring and cannot be killed; a process can be. pvf_bb_disconnect() knows
 *   which rings it left in order (pvf_bb_left()); whoever serves them next, in another process, is
 *   told (pvf_bb_take_up()).
 *
 *   A rule matches requests by operation and sectors when they are taken (storms and idle
 *   rewriting: whenever their time comes), lets `skip` of them pass, then fires with probability
 *   `chance` until it has fired `count` times. Up to PVF_BB_ACTIONS different faults fire for one
 *   request. Chance is drawn from one generator, so one ring, one seed and one order of requests give
 *   one outcome.
 */
#ifndef PVF_BLKBACK_H
#define PVF_BLKBACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PVF_BB_SEGMENTS 256
#define PVF_BB_RING_PAGES 16
#define PVF_BB_QUEUES 16
#define PVF_BB_RULES 64
#define PVF_BB_ACTIONS 4
#define PVF_BB_KINDS 20
#define PVF_BB_ALWAYS 0xffffffff
#define PVF_BB_TEXT 160

enum pvf_bb_flag {
	PVF_BB_FLUSH = 1,
	PVF_BB_BARRIER = 2,
	PVF_BB_DISCARD = 4,
	PVF_BB_PERSISTENT = 8, /* offered; used if the frontend has it too */
	PVF_BB_READ_ONLY = 16,
	PVF_BB_POPULATE = 32, /* for pvf_bb_new(): all memory of a disk in memory at once */
};

/* What is off is answered with EOPNOTSUPP (read-only: with an error, as blkback does). */
struct pvf_bb_features {
	uint32_t flags;
	uint32_t max_indirect; /* segments; 0: BLKIF_OP_INDIRECT is an unknown operation */
	uint32_t sector_size;
	uint32_t discard_granularity, discard_alignment; /* bytes */
	uint32_t max_persistent; /* grants kept mapped, for each ring */
	uint32_t batch;          /* responses published at once, at most */
};

enum pvf_bb_kind {
	PVF_BB_NONE = 0,
	PVF_BB_DELAY,       /* done and answered after value..extra microseconds */
	PVF_BB_STALL,       /* done and answered when released */
	PVF_BB_REORDER,     /* held until `value` are, or for `extra` microseconds; shuffled */
	PVF_BB_FAIL,        /* not done, answered with status `value` */
	PVF_BB_SHORT,       /* only the first `value` sectors are done; the answer is OKAY */
	PVF_BB_DROP,        /* never answered; mode 1: done nevertheless */
	PVF_BB_DUPLICATE,   /* answered `value` times more */
	PVF_BB_CORRUPT,     /* field, mode, value */
	PVF_BB_PRODUCER,    /* rsp_prod is published `value` (signed) off */
	PVF_BB_LOST_EVENT,  /* answered without an event */
	PVF_BB_STORM,       /* `value` events a second, 0: without pause; mode: enum pvf_bb_storm */
	PVF_BB_PAGES,       /* granted pages are rewritten; mode: enum pvf_bb_when, extra: us (idle) */
	PVF_BB_SLOTS,       /* ring slots are rewritten; the same */
	PVF_BB_OUTSIDE,     /* bytes of the request's pages outside its segments are written */
	PVF_BB_LOOK,        /* counts the 8 bytes `value` where they should not stand: `canaries` */
	PVF_BB_DIE,         /* the process ends at once with status `value` */
};

enum pvf_bb_field {
	PVF_BB_ID = 0,
	PVF_BB_OPERATION,
	PVF_BB_STATUS,
};

enum pvf_bb_mode {
	PVF_BB_SET = 0,
	PVF_BB_XOR,
	PVF_BB_STALE, /* id: of the request answered before this one */
	PVF_BB_OTHER, /* id: of another request in flight (none: left alone) */
};

enum pvf_bb_when {
	PVF_BB_BEFORE = 0, /* before the response is published */
	PVF_BB_AFTER,      /* right after */
	PVF_BB_IDLE,       /* again and again while nothing is in flight */
};

enum pvf_bb_storm {
	PVF_BB_EVENTS = 0, /* as Xen delivers them: pending bits */
	PVF_BB_WAKES,      /* what no event channel does: wake-ups of a masked or silent port */
};

struct pvf_bb_rule {
	uint32_t kind;  /* enum pvf_bb_kind */
	uint32_t ops;   /* 1 << BLKIF_OP_*: of indirect requests the inner one; 0: all */
	uint64_t first, last; /* sectors (of 512 bytes): any of them touched; flushes have none */
	uint64_t skip, count; /* count 0: for ever */
	uint32_t chance;      /* of PVF_BB_ALWAYS */
	uint32_t mode, field, unused;
	uint64_t value, extra;
};

struct pvf_bb_stats {
	uint64_t requests, responses, reads, writes, flushes, barriers, discards, indirect;
	uint64_t sectors_read, sectors_written, sectors_discarded;
	uint64_t rejected, unsupported, io_errors, map_errors;
	uint64_t pushes, notifies, wakeups, spurious;
	uint64_t maps, persistent, persistent_hits, persistent_twice;
	uint64_t bogus;     /* rings halted because req_prod was impossible */
	uint64_t in_flight; /* now: taken and not answered */
	uint64_t canaries;
	uint64_t fired[PVF_BB_KINDS]; /* by kind */
};

struct pvf_bb;
struct pvf_bb_conn;

/* A disk. `path` NULL: `bytes` of memory; else a file or block device, `bytes` 0: as large as it
 * is. NULL with `*error` (-errno) on failure. */
struct pvf_bb *pvf_bb_new(const char *path, uint64_t bytes,
			  const struct pvf_bb_features *features, int *error);

/* Disconnects, forgets what is in flight, frees. */
void pvf_bb_free(struct pvf_bb *bb);

uint64_t pvf_bb_bytes(const struct pvf_bb *bb);

/* 0 or -errno. Smaller: what lies beyond is kept, and refused. */
int pvf_bb_resize(struct pvf_bb *bb, uint64_t bytes);

/* At any time; a request is done with what is set when it is taken. */
void pvf_bb_set_features(struct pvf_bb *bb, const struct pvf_bb_features *features);

/* Replaces all rules; what the old ones hold stays held. 0, or -EINVAL: `*bad` is the index of a
 * rule that makes no sense. */
int pvf_bb_set_rules(struct pvf_bb *bb, const struct pvf_bb_rule *rules, uint32_t count,
		     uint64_t seed, uint32_t *bad);

/* Lets everything that rules hold back go on. */
void pvf_bb_release(struct pvf_bb *bb);

void pvf_bb_get_stats(struct pvf_bb *bb, struct pvf_bb_stats *stats);

/* A connection: the granting domain's table and our maptrack; arenas are fetched from the hub over
 * `hub_fd`, a gntdev connection that nobody else uses any more (-1: only by pvf_bb_arena()). The
 * descriptors stay the caller's, and must stay open until pvf_bb_disconnect() returned 0. 0 or
 * -errno (-EBUSY: there is one). */
int pvf_bb_connect(struct pvf_bb *bb, int table_fd, int maptrack_fd, uint16_t own_domid,
		   uint16_t domid, int hub_fd, bool persistent);

/* Gives an arena that the hub need not be asked for. 0 or -errno. */
int pvf_bb_arena(struct pvf_bb *bb, uint16_t number, int fd);

/* A ring that was left in order: the reference of its first page, and where its responses end. */
struct pvf_bb_left {
	uint32_t ref, rsp_prod;
};

/* The rings of the last connection that were left in order, PVF_BB_QUEUES at most: how many. None
 * once a new connection was started. */
uint32_t pvf_bb_left(const struct pvf_bb *bb, struct pvf_bb_left *left);

/* What another process left, before pvf_bb_ring(). 0 or -EINVAL. */
int pvf_bb_take_up(struct pvf_bb *bb, const struct pvf_bb_left *left, uint32_t count);

/* Maps one more ring of 1, 2, 4, 8 or 16 pages behind an event channel. 0, or -errno with the
 * reason in `why` (PVF_BB_TEXT bytes). -EBUSY: the ring was used and not left in order. */
int pvf_bb_ring(struct pvf_bb *bb, const uint32_t *refs, uint32_t pages, int channel_fd,
		uint32_t side, int own_fd, int other_fd, char *why);

/* Starts the threads. 0 or -errno. */
int pvf_bb_start(struct pvf_bb *bb);

/* Stops taking requests. 0: nothing is connected any more; -EBUSY: requests are in flight, the
 * rings stay mapped, call again. */
int pvf_bb_disconnect(struct pvf_bb *bb);

#endif
