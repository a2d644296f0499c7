/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the files of the network backend share: netback.c (a vif and its connection), netback_tx.c and
 * netback_rx.c (a ring each), netback_ctrl.c (the control ring), netback_groups.c (multicast addresses),
 * netback_frame.c (what is in a packet).
 */
#ifndef PVF_NETBACK_INT_H
#define PVF_NETBACK_INT_H

#include <linux/virtio_net.h>

#include "channel.h"
#include "netback.h"
#include "peer.h"

/* The barriers of io/ring.h are not used: indices are accessed by atomic operations. */
#define xen_mb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#include <xen/xen.h>
#include <xen/io/netif.h>

#define NB_PAGE 4096u
#define NB_FRAME 65536u
#define NB_KEY 40u       /* bytes of a hash's key: XEN_NETBK_MAX_HASH_KEY_SIZE */
#define NB_MAPPING 128u  /* hash to queue: XEN_NETBK_MAX_HASH_MAPPING_SIZE */
#define NB_GROUPS 64u    /* multicast addresses: XEN_NETBK_MCAST_MAX */
#define NB_SLOTS_FATAL 20u /* FATAL_SKB_SLOTS_DEFAULT of Linux's netback */

/* Headers before Linux's of 5.9 do not know it: u.xdp, whose first half word is the room before the packet. */
#define NB_EXTRA_XDP 5u

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
/* Counters have one writer; pvf_nb_get_stats() reads them from another thread. */
#define ADD(x, n) STORE(x, (x) + (uint64_t)(n))

struct nb_end { /* of an event channel */
	struct pvf_channel *channel;
	uint32_t side;
	int own_fd, other_fd;
	bool delivered;
};

struct nb_kept { /* a grant that stays mapped */
	unsigned char *page; /* NULL: it does not */
	bool writable;
};

struct nb_frame { /* a packet from either side */
	struct virtio_net_hdr vnet;
	uint8_t bytes[NB_FRAME + 64];
};

struct nb_queue {
	struct pvf_nb *nb;
	/* Whoever puts packets into its rings, or changes which of its grants stay mapped, holds it: never two. */
	pthread_mutex_t lock;
	struct nb_kept *kept; /* by reference; NULL: none may be */
	uint32_t kept_count;
	struct netif_tx_back_ring tx;
	struct netif_rx_back_ring rx;
	uint32_t tx_ref, rx_ref;
	void *tx_shared, *rx_shared;
	struct nb_end end[2]; /* TX, RX; one for both: the first */
	uint32_t ends;
	int tap_fd, ctl_fd, epoll_fd;
	bool tap_watched;
	pthread_t thread;
	bool started;
	RING_IDX tx_published;
	struct nb_frame frame;
	struct pvf_nb_stats stats;
};

struct nb_hash { /* under the interface's lock */
	uint32_t algorithm; /* 0: none; read without it, too */
	uint32_t types;
	uint8_t key[NB_KEY];
	uint32_t entries; /* of the mapping; 0: the hash modulo the queues */
	uint32_t mapping[NB_MAPPING];
};

struct nb_ctrl { /* the control ring */
	bool there, started;
	uint32_t ref;
	void *shared;
	struct xen_netif_ctrl_back_ring ring;
	struct nb_end end;
	int ctl_fd, epoll_fd;
	pthread_t thread;
	uint64_t requests, refused;
	struct xen_netif_ctrl_response held[8];
	uint32_t holds;
	bool release; /* what is held is to go */
};

struct nb_groups { /* under the interface's lock */
	uint32_t filter; /* read without it, too */
	uint32_t count;
	uint8_t address[NB_GROUPS][6];
};

struct pvf_nb {
	pthread_mutex_t lock; /* rules, fatal, hash; taken with a queue's lock held, never before it */
	struct pvf_nb_rule rule[PVF_NB_RULES];
	uint32_t rules; /* read without the lock: 0 costs nothing */
	uint64_t fired[PVF_NB_KINDS];
	char fatal[PVF_NB_TEXT];
	uint32_t broken; /* nothing is taken or given any more */
	bool connected, stop;
	uint32_t flags;
	uint32_t keep; /* grants that a queue may keep mapped */
	uint32_t headroom;
	struct nb_hash hash;
	struct nb_groups groups;
	struct nb_ctrl ctrl;
	struct pvf_peer peer;
	struct nb_queue *queue[PVF_NB_QUEUES];
	uint32_t queues;
	struct pvf_nb_stats ended; /* of connections that are over */
};

/* Whether a rule of this kind fires now, and its value. */
bool nb_fires(struct pvf_nb *nb, enum pvf_nb_kind kind, uint64_t *value);
/* The same of an event that has a type: rules that are of another one only do not fire. */
bool nb_fires_of(struct pvf_nb *nb, enum pvf_nb_kind kind, uint32_t type, uint64_t *value);

/* The frontend has broken the protocol. */
void nb_fatal(struct nb_queue *q, const char *what, uint32_t value);

void nb_notify(struct nb_queue *q, bool rx);

/* Takes and answers what the frontend has sent. True: there was something. */
bool nb_tx(struct nb_queue *q);
/* Gives the frontend what the TAP has, as long as there are pages for any packet. True: it had something. */
bool nb_rx(struct nb_queue *q);
/* Whether there are pages for any packet; if not, the frontend is asked to tell of more. */
bool nb_rx_room(struct nb_queue *q);

/* The queue that a received frame is for, which is `q` unless the frontend wants a hash, and what is said of that
 * (no type: nothing). */
struct nb_queue *nb_steer(struct nb_queue *q, const uint8_t *frame, uint32_t size,
			  struct netif_extra_info *extra);

/* Multicast addresses: added (false: there are too many), deleted; whether a received frame is passed on. */
bool nb_group_add(struct pvf_nb *nb, const uint8_t address[6]);
void nb_group_delete(struct pvf_nb *nb, const uint8_t address[6]);
bool nb_group_passes(struct pvf_nb *nb, const uint8_t *frame, uint32_t size);

int nb_ctrl_start(struct pvf_nb *nb);
/* The rules were replaced: what they held back goes. */
void nb_ctrl_release(struct pvf_nb *nb);
void nb_ctrl_stop(struct pvf_nb *nb);
int nb_kept_new(struct nb_queue *q);
void nb_kept_free(struct nb_queue *q);

struct nb_access {
	unsigned char *page;
	bool kept;
};

/* A granted page, for as long as the queue's lock is held: 0, or -errno as pvf_peer_map(). */
int nb_page(struct nb_queue *q, uint32_t ref, bool writable, struct nb_access *access);
void nb_page_done(struct nb_queue *q, uint32_t ref, const struct nb_access *access);

/* Where the transport checksum of a frame begins, and its field from there; as skb_checksum_setup() finds
 * them. False: it is none of TCP's or UDP's over IPv4 or IPv6. */
bool nb_find_checksum(const uint8_t *frame, uint32_t size, uint16_t *start, uint16_t *offset);

#endif
