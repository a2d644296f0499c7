/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The network backend of the embedded host: what Linux's netback does with a vif's rings, and, where a
 * rule says so, what a backend must never do. Written against Xen's headers, sharing no code with the
 * frontend: a rule misread here and there would cancel out.
 *
 * Theory of operation
 *
 *   A `pvf_nb` is one virtual interface: its counters and rules. It outlives connections. Each queue of a
 *   connection has a pair of rings, one event channel or two, a queue of a TAP, and a thread. The xenbus
 *   walk and the TAP's making are Python's.
 *
 *   What a frontend sends is taken into private memory, checked as netback checks it, and written to the
 *   TAP; what the TAP has is put into the frontend's pages once they suffice for any packet. A frontend
 *   that breaks the protocol ends its vif, as netback does ("fatal"): nothing is taken or given any more.
 *
 *   A rule matches the responses of its ring, lets `skip` of them pass and fires `count` times (0: for
 *   ever).
 */
#ifndef PVF_NETBACK_H
#define PVF_NETBACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PVF_NB_QUEUES 16
#define PVF_NB_RULES 16
#define PVF_NB_TEXT 160

enum pvf_nb_flag { /* what the frontend can receive */
	PVF_NB_SG = 1,
	PVF_NB_GSO4 = 2,
	PVF_NB_GSO6 = 4,
};

enum pvf_nb_kind {
	PVF_NB_NONE = 0,
	/* received packets, as the frontend sees it */
	PVF_NB_RX_ID,      /* the response's id becomes `value` */
	PVF_NB_RX_OFFSET,  /* its offset */
	PVF_NB_RX_STATUS,  /* its status */
	PVF_NB_RX_FLAGS,   /* its flags are xored with `value` */
	/* the packet has this extra info, whatever it had: its type is in the lowest byte of `value`; what it says of
	 * GSO in the next byte (type) and the next two (size); the fifth is how many times it is put (0: once) */
	PVF_NB_RX_EXTRA,
	PVF_NB_RX_REWRITE, /* the pages of the packet are overwritten after it was given */
	PVF_NB_RX_PRODUCER, /* rsp_prod is published `value` (signed) off */
	PVF_NB_RX_HEADROOM, /* the packet has `value` bytes of room before it, asked for or not */
	/* sent ones */
	PVF_NB_TX_ID,
	PVF_NB_TX_STATUS,
	PVF_NB_TX_DROP,      /* no response */
	PVF_NB_TX_DUPLICATE, /* two */
	PVF_NB_TX_LOOK,      /* counts the 8 bytes `value` where they should not stand: `canaries` */
	/* either */
	PVF_NB_PRODUCER, /* TX: rsp_prod is published `value` (signed) off */
	PVF_NB_SILENT,   /* no event for what is published */
	PVF_NB_STORM,    /* an event for nothing after each turn */
	/* the control ring; `only`: of requests of this type (0: of all) */
	PVF_NB_CTRL_ID,       /* the response's id becomes `value` */
	PVF_NB_CTRL_TYPE,     /* its type */
	PVF_NB_CTRL_STATUS,   /* its status */
	PVF_NB_CTRL_DATA,     /* its data */
	PVF_NB_CTRL_DROP,     /* no response */
	PVF_NB_CTRL_DUPLICATE, /* two */
	PVF_NB_CTRL_HOLD,     /* the response waits until the rules are replaced */
	PVF_NB_CTRL_SCRIBBLE, /* the page of a list or a key is overwritten before the response */
	PVF_NB_CTRL_PRODUCER, /* rsp_prod is published `value` (signed) off */
	PVF_NB_CTRL_SILENT,   /* no event for what is published */
	PVF_NB_CTRL_STORM,    /* an event for nothing each millisecond */
	PVF_NB_KINDS,
};

struct pvf_nb_rule {
	uint32_t kind; /* enum pvf_nb_kind */
	uint32_t only;
	uint64_t skip, count, value;
};

struct pvf_nb_stats {
	uint64_t tx_packets, tx_bytes, tx_slots, tx_gso, tx_blank, tx_rejected;
	uint64_t rx_packets, rx_bytes, rx_slots, rx_gso, rx_blank, rx_dropped;
	uint64_t multicast_added, multicast_deleted;
	uint64_t multicast_refused; /* the list was full */
	uint64_t multicast_filtered; /* packets that the frontend does not listen to */
	uint64_t rx_roomy; /* packets with room before them */
	uint64_t rx_steered; /* packets that went to another queue than the TAP's, for their hash */
	uint64_t kept, kept_hits; /* grants that stay mapped; how often one was used */
	uint64_t ctrl_requests, ctrl_refused;
	uint64_t tap_errors, map_errors, notifies, wakeups, spurious;
	uint64_t canaries;
	uint64_t fatal; /* queues that a frontend's mistake has ended */
	uint64_t fired[PVF_NB_KINDS];
};

struct pvf_nb;

struct pvf_nb *pvf_nb_new(void);
/* Disconnects, frees. */
void pvf_nb_free(struct pvf_nb *nb);

/* Replaces all rules. 0 or -EINVAL. */
int pvf_nb_set_rules(struct pvf_nb *nb, const struct pvf_nb_rule *rules, uint32_t count);

void pvf_nb_get_stats(struct pvf_nb *nb, struct pvf_nb_stats *stats);

/* The first mistake of a frontend, as text of PVF_NB_TEXT bytes; empty: there was none. */
void pvf_nb_fatal(struct pvf_nb *nb, char *why);

/* A connection, as pvf_peer_open(); `flags`: enum pvf_nb_flag; `keep`: grants that each queue may have mapped for
 * as long as the frontend likes (ADD_GREF_MAPPING; 0: there is no such request). 0 or -errno (-EBUSY: there is
 * one). */
int pvf_nb_connect(struct pvf_nb *nb, int table_fd, int maptrack_fd, uint16_t own_domid,
		   uint16_t domid, int hub_fd, uint32_t flags, uint32_t keep);

/* Gives an arena that the hub need not be asked for. 0 or -errno. */
int pvf_nb_arena(struct pvf_nb *nb, uint16_t number, int fd);

struct pvf_nb_channel {
	int channel_fd, own_fd, other_fd;
	uint32_t side;
};

/* One more queue, before pvf_nb_start(). `channels`: one for both rings, or TX's and RX's. The descriptors stay the
 * caller's, but `tap_fd`, with IFF_VNET_HDR, which the queue uses until the end. 0, or -errno with the reason in
 * `why` (PVF_NB_TEXT bytes). */
int pvf_nb_queue(struct pvf_nb *nb, uint32_t tx_ref, uint32_t rx_ref,
		 const struct pvf_nb_channel *channels, uint32_t count, int tap_fd, char *why);

/* The control ring, before pvf_nb_start(). As pvf_nb_queue(). */
int pvf_nb_control(struct pvf_nb *nb, uint32_t ref, const struct pvf_nb_channel *channel, char *why);

/* Whether only multicast packets of addresses that the frontend has added are passed on. At any time. */
void pvf_nb_set_filter(struct pvf_nb *nb, bool on);

/* Bytes of room that each received packet has before it in each of its pages; at most half a page. At any time. */
void pvf_nb_set_headroom(struct pvf_nb *nb, uint32_t bytes);

/* Starts the threads. 0 or -errno. */
int pvf_nb_start(struct pvf_nb *nb);

/* Nothing is connected or mapped any more when it returns. */
void pvf_nb_disconnect(struct pvf_nb *nb);

#endif
