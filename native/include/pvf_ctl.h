/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The control protocol between a supervisor and a worker: the only definition of it.
 *
 * Transport: AF_UNIX SOCK_SEQPACKET, one message per packet, native endianness; both ends run on
 * the same kernel from the same build, and `version` refuses anything else. Descriptors travel
 * as SCM_RIGHTS beside the message named here. Every structure is naturally aligned, without
 * implicit padding, so that its bytes can be compared and fuzzed.
 *
 * The worker trusts a supervisor's numbers no more than a ring's: every length, count and offset
 * is checked before use, and a bad one is answered with ERROR.
 */
#ifndef PVF_CTL_H
#define PVF_CTL_H

#include <stdint.h>

#define PVF_CTL_MAGIC 0x43465650u /* "PVFC" */
#define PVF_CTL_VERSION 3u
#define PVF_CTL_MAX 8192u     /* bytes of the largest message */
#define PVF_CTL_MAX_FDS 16u
#define PVF_MAX_QUEUES 16u   /* of one device, and so of one worker */
#define PVF_NAME_MAX 64u      /* device name, NUL-terminated */
#define PVF_BUILD_MAX 32u     /* which build of the worker, NUL-terminated */
#define PVF_TEXT_MAX 192u     /* human-readable text, NUL-terminated */
#define PVF_MAX_RING_PAGES 16u
#define PVF_MAX_POOL_PAGES 1056u
#define PVF_NBD_PATIENCE_SECONDS 10 /* several sockets: how old a request may get (fence.h) */
#define PVF_NBD_MAX_PAYLOAD 33554432u /* bytes of the largest NBD read or write: 32 MiB */
#define PVF_PAGE_SIZE 4096u
#define PVF_HAND_OVER_BYTES 8388608u /* of the memfd between two workers: room for any table */
#define PVF_HAND_OVER_SECONDS 5 /* that the old one waits for the new one, while nobody serves */
#define PVF_LAST_SECONDS 2 /* that a worker goes on after SIGTERM, once it obeys that */
#define PVF_TAKE_OVER_SECONDS 30 /* that the new one waits for the old one, while that serves */

enum pvf_class {
	PVF_CLASS_BLK = 1,
	PVF_CLASS_NET = 2,
	PVF_CLASS_CONS = 3,
};

enum pvf_ctl_type {
	/* supervisor to worker */
	PVF_CTL_ATTACH = 1,  /* one for each queue; fds: event channel, gntalloc, with `rx_port` another
			      * event channel */
	PVF_CTL_START = 2,   /* fds: NBD sockets of neighbouring queues, or none: PVF_START_CLIENTS */
	PVF_CTL_QUIESCE = 3,
	PVF_CTL_DETACH = 4,
	PVF_CTL_EXIT = 5,
	PVF_CTL_HAND_OVER = 6, /* fds: one end of a SEQPACKET pair, a memfd: docs/upgrade.md */
	PVF_CTL_TAKE_OVER = 7, /* to the next worker; fds: the pair's other end, the same memfd */
	PVF_CTL_START_NET = 8, /* fds: queues of the TAP, or none: those that are there stay */
	PVF_CTL_TRACE = 9, /* net; fds: a memfd for struct pvf_trace, or none: not any more */
	PVF_CTL_START_CONS = 11, /* fds: a stream socket, or none: the one that is there stays */
	PVF_CTL_LAST = 10, /* the machine stops, no supervisor will come: from now on SIGTERM is obeyed */
	/* worker to supervisor: answers */
	PVF_CTL_ATTACHED = 64,
	PVF_CTL_STARTED = 65,
	PVF_CTL_DRAINED = 66,
	PVF_CTL_DETACHED = 67,
	PVF_CTL_ERROR = 68,
	PVF_CTL_HANDED_OVER = 70, /* nothing is held any more; the worker ends */
	PVF_CTL_TAKEN_OVER = 71,  /* behind a second HELLO */
	PVF_CTL_TRACING = 72,
	PVF_CTL_NOTED = 73,       /* of LAST */
	/* worker to supervisor: unasked */
	PVF_CTL_HELLO = 96,  /* fds: statistics memfd, read-only */
	PVF_CTL_BROKEN = 97,
	PVF_CTL_TARGET_GONE = 98,
	PVF_CTL_FEATURE_OFF = 99,
	PVF_CTL_STALLED = 100,
	PVF_CTL_LOG = 101,
};

enum pvf_worker_state {
	PVF_IDLE = 0,
	PVF_ATTACHED = 1,
	PVF_RUNNING = 2,
	PVF_DRAINING = 3,
	PVF_DRAINED = 4,
	PVF_BROKEN = 5,
	PVF_TARGET_LOST = 6, /* a queue's NBD socket is gone, the rings are not yet empty */
};

struct pvf_ctl_hdr {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
	uint32_t generation;
	uint32_t length; /* of the whole message, this header included */
};

struct pvf_ctl_attach {
	struct pvf_ctl_hdr hdr;
	uint32_t device_class; /* enum pvf_class */
	uint32_t port;         /* event channel, bound on the descriptor passed along */
	uint32_t ring_pages;   /* 1, 2, 4, 8 or 16 */
	uint32_t pool_pages;   /* a console: none */
	uint64_t ring_offset;  /* mmap offsets within the gntalloc descriptor, bytes */
	uint64_t pool_offset;
	char name[PVF_NAME_MAX]; /* "vbd-51728" */
	uint32_t flags;
	uint16_t queue;  /* this one: 0, 1 .. queues - 1, in this order */
	uint16_t queues; /* of the connection; the same in each of its ATTACHes */
	uint32_t tx_pages; /* net: of the pool, the first so many are TX's, read-only to the backend */
	uint32_t rx_port;  /* net: RX's event channel, on the third descriptor; `port` is TX's then. 0:
			    * one for both */
	uint32_t pool_grefs[]; /* pool_pages of them */
};

#define PVF_ATTACH_SCRUB 1u /* trusted=0: clear whole pages before each reuse */

struct pvf_ctl_start {
	struct pvf_ctl_hdr hdr;
	uint64_t sectors;       /* of 512 bytes, whatever sector_size is (blkif.h) */
	uint32_t sector_size;   /* bytes: 512, 1024, 2048 or 4096 */
	uint32_t flags;         /* PVF_BLK_* */
	uint32_t max_segments;  /* per request, 1..256; above 11: indirect requests are understood */
	uint32_t discard_granularity; /* bytes */
	uint32_t discard_alignment;   /* bytes */
	uint32_t stall_seconds; /* report STALLED after this long without a response; 0: never */
	uint32_t vdev;          /* handle: the vbd's number, goes into blkif_request.handle */
	uint32_t options;       /* PVF_START_* */
	uint32_t first_queue;   /* the one that the first descriptor is for */
	uint32_t poll_us;       /* look for a response for so long before sleeping; 0: never */
};

#define PVF_NET_GROUPS 64u /* multicast addresses of a vif: netback's limit (XEN_NETBK_MCAST_MAX) */

struct pvf_ctl_start_net {
	struct pvf_ctl_hdr hdr;
	uint32_t features;      /* PVF_NET_* */
	uint32_t stall_seconds; /* as in START */
	uint32_t first_queue;   /* the one that the first descriptor is for */
	uint32_t groups;        /* how many of `group` are given */
	uint8_t group[PVF_NET_GROUPS][6]; /* multicast addresses that the interface listens to already */
};

#define PVF_NET_RING_PAGES 2u /* TX's, RX's */

struct pvf_ctl_start_cons {
	struct pvf_ctl_hdr hdr;
	uint32_t stall_seconds; /* as in START; of bytes that the backend does not take */
	uint32_t reserved;
};

/* What the backend can. */
#define PVF_NET_SG 1u    /* packets of several slots */
#define PVF_NET_CSUM4 2u /* finishes checksums of TCP and UDP over IPv4 */
#define PVF_NET_CSUM6 4u /* and over IPv6 */
#define PVF_NET_GSO4 8u  /* cuts large TCP packets */
#define PVF_NET_GSO6 16u
#define PVF_NET_MULTICAST 32u /* passes only those multicast packets on that it is asked for */

#define PVF_POLL_MAX_US 100000u
#define PVF_START_CLIENTS 1u /* clients come and go: a queue runs without a socket until one is given */

#define PVF_BLK_READ_ONLY 1u
#define PVF_BLK_FLUSH 2u
#define PVF_BLK_DISCARD 4u
#define PVF_BLK_BARRIER 8u /* flushes are empty barriers; where FLUSH is set too, it is used */

struct pvf_ctl_simple { /* QUIESCE, EXIT, HAND_OVER, TAKE_OVER, TRACE, LAST; ATTACHED, STARTED, DRAINED,
			 * DETACHED, HANDED_OVER, TRACING, NOTED */
	struct pvf_ctl_hdr hdr;
};

struct pvf_ctl_detach {
	struct pvf_ctl_hdr hdr;
	uint32_t flags;
	uint32_t reserved;
};

#define PVF_DETACH_KEEP_TARGET 1u /* the NBD sockets stay open for the next START */
#define PVF_DETACH_PARK 2u /* the event channels' descriptors stay open for ever, untouched: a port
                            * that was bound while the domain slept crashes the kernel when it
                            * is unbound. The worker then only waits and takes no ATTACH. */

struct pvf_ctl_hello {
	struct pvf_ctl_hdr hdr;
	uint32_t state; /* enum pvf_worker_state */
	uint32_t device_class;
	uint32_t pid;
	uint32_t in_flight;   /* requests in all rings */
	uint32_t targets;     /* bit i: queue i has an NBD socket */
	uint32_t stats_size;  /* bytes of the statistics memfd: a page for each of `queues` */
	uint32_t queues;      /* that this worker was started with: the most a connection can have */
	uint32_t attached;    /* queues that are attached now */
	char name[PVF_NAME_MAX]; /* empty before the first ATTACH */
	char build[PVF_BUILD_MAX]; /* as it was started with: which program it is; "": not told */
};

struct pvf_ctl_taken_over {
	struct pvf_ctl_hdr hdr;
	uint32_t pause_us;  /* for so long no queue was served by either worker */
	uint32_t in_flight; /* requests in all rings, at that time */
};

struct pvf_ctl_error {
	struct pvf_ctl_hdr hdr;
	uint32_t in_reply_to; /* enum pvf_ctl_type */
	int32_t error;        /* errno, positive */
	char text[PVF_TEXT_MAX];
};

struct pvf_ctl_broken {
	struct pvf_ctl_hdr hdr;
	uint32_t rule; /* number of the rule in docs/security.md */
	uint32_t queue;
	uint64_t value;
	char field[PVF_NAME_MAX];
	char text[PVF_TEXT_MAX];
};

struct pvf_ctl_target_gone {
	struct pvf_ctl_hdr hdr;
	int32_t error; /* 0: orderly end of the socket; else errno (EPROTO: it broke NBD) */
	uint32_t queue;
	uint32_t in_flight; /* in this queue's ring */
	char text[PVF_TEXT_MAX];
};

struct pvf_ctl_feature_off {
	struct pvf_ctl_hdr hdr;
	uint32_t feature; /* PVF_BLK_FLUSH, PVF_BLK_BARRIER or PVF_BLK_DISCARD */
	uint32_t queue;   /* where it turned out; told once for the device */
};

struct pvf_ctl_stalled {
	struct pvf_ctl_hdr hdr;
	uint32_t seconds;   /* since the last response; 0: the stall has ended */
	uint32_t queue;
	uint32_t in_flight; /* in this queue's ring */
};

struct pvf_ctl_log {
	struct pvf_ctl_hdr hdr;
	uint32_t level; /* syslog: 3 error, 4 warning, 6 info */
	uint32_t reserved;
	char text[PVF_TEXT_MAX];
};

/* Statistics: one page for each queue, written by the worker only, mapped read-only by anyone.
 * A reader copies a page while `sequence` is even and unchanged (seqlock). Counters only grow
 * for the worker's whole life, over all generations. */
#define PVF_STATS_MAGIC 0x53465650u /* "PVFS" */
#define PVF_STATS_VERSION 3u

#define PVF_LATENCY_BUCKETS 24u

struct pvf_blk_op_stats {
	uint64_t requests; /* NBD requests completed */
	uint64_t bytes;
	uint64_t errors;
	uint64_t ring_requests; /* blkif requests that they became */
	/* Of the requests: bucket i has those that took 2^i to 2^(i+1) microseconds, the first all that
	 * took less, the last all that took more. */
	uint64_t latency[PVF_LATENCY_BUCKETS];
};

struct pvf_blk_stats {
	uint32_t magic;
	uint32_t version;
	uint32_t sequence;
	uint32_t state; /* enum pvf_worker_state */
	uint32_t generation;
	uint32_t in_flight;      /* ring requests now */
	uint32_t in_flight_peak;
	uint32_t pool_pages;
	uint32_t pool_free;
	uint32_t pool_free_low;  /* fewest ever free */
	uint32_t ring_slots;
	uint32_t nbd_pending;    /* NBD requests accepted and not answered */
	uint32_t queue;          /* whose page this is */
	uint32_t queues;         /* attached now */
	struct pvf_blk_op_stats read, write, flush, discard;
	uint64_t segments;
	uint64_t indirect;       /* ring requests with indirect descriptors */
	uint64_t notifies;       /* sent to the backend */
	uint64_t events;         /* received */
	uint64_t events_spurious; /* received with no response behind them */
	uint64_t polled;         /* times that responses were found by looking, without an event */
	uint64_t watchdog_hits;  /* responses found by the watchdog: an event was lost */
	uint64_t wakeups;        /* epoll returns */
	uint64_t ring_full;      /* intake paused for want of a slot */
	uint64_t pool_empty;     /* intake paused for want of a page */
	uint64_t target_blocked; /* replies paused: the client does not read */
	uint64_t rejected;       /* NBD requests refused before the ring */
};

enum pvf_net_drop { /* why a packet was not passed on */
	PVF_DROP_TOO_SMALL = 0, /* shorter than an Ethernet header */
	PVF_DROP_TOO_LARGE = 1, /* longer than netif, or the backend without scatter/gather, can take */
	PVF_DROP_GSO = 2,       /* to be cut by who cannot, or not a packet that can be cut */
	PVF_DROP_CSUM = 3,      /* its checksum cannot be found */
	PVF_DROP_ERROR = 4,     /* the other end says that it failed, or dropped it */
	PVF_DROP_TRUNCATED = 5, /* RX: the rest of it is not there (rule 10) */
	PVF_DROP_EXTRA = 6,     /* RX: extra info that makes no sense (rule 11) */
	PVF_DROP_TARGET = 7,    /* RX: the TAP did not take it, or is not there */
	PVF_DROPS = 8,
};

#define PVF_NET_DROPS 8u

struct pvf_net_way { /* one direction; frontend's view */
	uint64_t packets;
	uint64_t bytes;
	uint64_t slots;
	uint64_t gso; /* packets larger than the wire takes */
	uint64_t gso_bytes;
	uint64_t large; /* packets of more than 16,384 bytes */
	uint64_t large_bytes;
	uint64_t extras;    /* slots of extra info; among `slots` */
	uint64_t csum_left; /* packets whose checksum the other end finishes (RX: or need not) */
	uint64_t csum_done; /* TX: packets whose checksum was finished here */
	uint64_t cut;       /* TX: large packets that were cut here, for who cannot */
	uint64_t pieces;    /* TX: what they were cut into; counted in `packets` too */
	uint64_t dropped[PVF_NET_DROPS];
};

/* As struct pvf_blk_stats up to `queues`, for a network's queue. */
struct pvf_net_stats {
	uint32_t magic;
	uint32_t version;
	uint32_t sequence;
	uint32_t state;
	uint32_t generation;
	uint32_t tx_in_flight; /* slots not answered */
	uint32_t tx_pool_pages;
	uint32_t tx_pool_free;
	uint32_t tx_pool_free_low;
	uint32_t rx_pool_pages;
	uint32_t rx_pool_free;
	uint32_t reserved;
	uint32_t queue;
	uint32_t queues;
	struct pvf_net_way tx, rx;
	uint64_t notifies;
	uint64_t events;
	uint64_t events_spurious;
	uint64_t watchdog_hits;
	uint64_t wakeups;
	uint64_t tx_full; /* intake paused for want of a slot or a page */
	uint64_t tap_errors; /* reads of the TAP that failed */
	uint64_t groups;     /* multicast addresses of the whole device that are listened to now */
	uint64_t groups_told; /* joins and leaves that the backend was told of; by the first queue */
	uint64_t groups_lost; /* of the whole device: more than it can be asked for */
};

/* As struct pvf_blk_stats up to `queues`, of a console. */
struct pvf_cons_stats {
	uint32_t magic;
	uint32_t version;
	uint32_t sequence;
	uint32_t state;
	uint32_t generation;
	uint32_t unsent;      /* bytes that the backend has not taken; with the socket's, what is under way out */
	uint32_t undelivered; /* bytes that came and the socket has not taken */
	uint32_t reserved[5];
	uint32_t queue;
	uint32_t queues;
	uint64_t in_bytes;  /* passed on to the guest's side */
	uint64_t out_bytes; /* put into the ring */
	uint64_t notifies;
	uint64_t events;
	uint64_t events_spurious;
	uint64_t watchdog_hits;
	uint64_t wakeups;
	uint64_t ring_full;      /* intake paused: the backend does not read */
	uint64_t target_blocked; /* delivery paused: the guest's side does not read */
};

/* The packets' trace: a ring for each queue, in a memfd of the supervisor's. A worker writes, and waits for
 * nobody: who reads too slowly has lost the oldest, and sees it by their numbers. */
#define PVF_TRACE_PACKETS 1024u /* of one queue */
#define PVF_TRACE_BYTES 256u    /* of one packet: its first */
#define PVF_TRACE_MAGIC 0x54465650u /* "PVFT" */
#define PVF_TRACE_VERSION 1u

struct pvf_trace_packet {
	uint64_t number;   /* from 1; packet n lies at (n - 1) % PVF_TRACE_PACKETS. 0: it is being written. Read it
			    * before and after the rest: only if it stood still, the rest is whole */
	uint64_t time;     /* ns, CLOCK_REALTIME */
	uint32_t length;   /* of the packet */
	uint16_t captured; /* of its first bytes that are in `bytes` */
	uint8_t way;       /* 0: sent (TX), 1: received */
	uint8_t dropped;   /* enum pvf_net_drop; PVF_DROPS: it was not */
	uint16_t slots;    /* extra info among them; 0: it came to none */
	uint16_t gso_size; /* 0: none */
	uint16_t csum_start, csum_offset; /* where `flags` has VIRTIO_NET_HDR_F_NEEDS_CSUM */
	uint8_t flags;     /* virtio_net_hdr's, as the TAP has it */
	uint8_t gso_type;  /* virtio_net_hdr's */
	uint8_t offered;   /* 1: its checksum is left to the other end; 2: so is its cutting */
	uint8_t queue;
	uint32_t reserved;
	uint8_t bytes[PVF_TRACE_BYTES];
};

struct pvf_trace { /* of one queue; they lie one behind another, for each of HELLO's `queues` */
	uint32_t magic, version;
	uint32_t packets; /* PVF_TRACE_PACKETS */
	uint32_t queue;
	uint64_t written; /* the number of the last packet */
	uint8_t reserved[40];
	struct pvf_trace_packet packet[PVF_TRACE_PACKETS];
};

#endif
