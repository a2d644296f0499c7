/* SPDX-License-Identifier: BSD-2-Clause
 *
 * One queue of a network interface: packets of a TAP in, netif requests out, and back. It knows no
 * descriptor: whoever has the TAP reads and writes the iovecs that it is given here.
 *
 * Theory of operation
 *
 *   TX. A packet is read straight into granted pages, which the backend may only read, behind a private
 *   virtio_net_hdr. What that header wants is left to the backend where netif can say it and the backend
 *   offers it, else done here: a checksum is finished, a large packet cut (net_cut.c). netif cannot say it of
 *   packets with VLAN tags, in tunnels, behind IPv6 extension headers, and of SCTP. A packet that can be sent in
 *   no way is dropped and counted by reason. Pages are the packet's until the backend has answered each of its
 *   slots. Reports of multicast groups are looked at as they pass (groups.h).
 *
 *   A packet that is cut keeps the pages that it was read into until its last piece is in the ring; no other is
 *   read before. Its pieces are copies: they go as fast as the backend makes room.
 *
 *   RX. The ring is kept full of empty pages. A packet's first bytes are copied to private memory and
 *   looked at there; it goes out as [virtio_net_hdr][private head][rest, in its pages], so that
 *   nothing that was checked can change (rule 16). Its pages go back into the ring at once. Of extra info GSO is
 *   used; a hash, the room before a packet (XDP) and multicast addresses are passed over.
 *
 *   Rules: what no honest backend can do breaks the queue (`fault`: 1, 2, 5, 9, 13, 14 in docs/security.md);
 *   what a clumsy one might is dropped and counted (9, 10, 11).
 *
 * Limits: a packet has 14 to 65,535 bytes (XEN_NETIF_MAX_TX_SIZE), at most XEN_NETIF_NR_SLOTS_MIN slots each
 * way.
 */
#ifndef PVF_NET_H
#define PVF_NET_H

#include <sys/types.h>
#include <sys/uio.h>

#include <linux/virtio_net.h>

#include "groups.h"
#include "packet.h"
#include "pool.h"
#include "ring.h"
#include "trace.h"

#define PVF_NET_RING 256u  /* slots of either ring: one page of 12, or of 8 bytes */
#define PVF_NET_SLOTS 18u  /* of a packet: XEN_NETIF_NR_SLOTS_MIN */
#define PVF_NET_PAGES 16u  /* that the largest packet fills */
#define PVF_NET_LARGEST 65535u
#define PVF_NET_BULK 16384u /* a packet of more counts as large */

struct pvf_net_cut { /* the packet that is cut; its bytes are in the borrowed pages */
	uint32_t total;  /* 0: none is */
	uint32_t at;     /* where the next piece's payload begins */
	uint32_t size;   /* of a piece's payload */
	uint32_t pieces; /* sent so far */
	bool leave;      /* checksums are left to the backend */
	struct pvf_packet what;
};

struct pvf_net_tx {
	struct pvf_ring ring;
	struct pvf_pool pool;
	uint32_t features; /* PVF_NET_*: what the backend can */
	uint32_t in_flight; /* slots with a page, not answered */
	uint32_t extras;    /* slots without one, not answered */
	uint16_t ids;       /* on the stack */
	uint16_t id[PVF_NET_RING];
	uint16_t page_of[PVF_NET_RING]; /* by id; PVF_NONE: not in flight */
	struct virtio_net_hdr vnet;     /* of the packet that is read now */
	uint16_t borrowed[PVF_NET_PAGES];
	uint32_t borrowed_count;
	struct pvf_net_cut cut;
	struct pvf_groups *groups; /* of reports that are sent; or NULL */
	struct pvf_trace *trace;   /* or NULL */
	struct pvf_net_way stats;
	struct pvf_fault fault;
};

struct pvf_net_rx {
	struct pvf_ring ring;
	struct pvf_pool pool;
	uint16_t page_of[PVF_NET_RING]; /* by slot; PVF_NONE: nothing of ours is there */
	struct pvf_trace *trace;        /* or NULL */
	struct pvf_net_way stats;
	struct pvf_fault fault;
};

struct pvf_net_packet { /* received */
	struct virtio_net_hdr vnet;
	uint8_t head[PVF_PACKET_HEAD];
	uint32_t total;
	uint32_t iovs, pages, slots;
	struct iovec iov[2 + PVF_NET_SLOTS]; /* for one writev(): vnet, head, the rest */
	uint16_t page[PVF_NET_SLOTS];
};

/* Rings and pools as pvf_ring_init() and pvf_pool_init(); TX pages granted read-only. */
void pvf_net_tx_init(struct pvf_net_tx *tx, void *ring, void *pool, uint32_t pages,
		     const uint32_t *grefs, bool scrub, uint32_t features);
void pvf_net_rx_init(struct pvf_net_rx *rx, void *ring, void *pool, uint32_t pages,
		     const uint32_t *grefs);

/* Borrows the pages that the next packet may want. Returns how many of `iov` (1 + PVF_NET_PAGES) are for one
 * readv(); 0: not now, ring or pool are too full. */
int pvf_net_tx_begin(struct pvf_net_tx *tx, struct iovec *iov);

/* What that readv() returned (<= 0: nothing was read). True: the packet, or its first pieces, are in the ring, not
 * yet shown. */
bool pvf_net_tx_end(struct pvf_net_tx *tx, ssize_t got);

/* More pieces of the packet that is cut, as many as there is room for. True: none is left. */
bool pvf_net_tx_cut(struct pvf_net_tx *tx);

/* Asks the backend to pass a multicast address on (`add`), or not any more. False: the ring is full. */
bool pvf_net_tx_multicast(struct pvf_net_tx *tx, const uint8_t address[6], bool add);

/* Takes `count` responses, counted by pvf_ring_poll(). A broken rule sets `fault`. */
void pvf_net_tx_drain(struct pvf_net_tx *tx, uint32_t count);

/* Counts a packet that was passed on. */
static inline void pvf_net_count(struct pvf_net_way *way, uint32_t total)
{
	way->packets++;
	way->bytes += total;
	if (total <= PVF_NET_BULK)
		return;
	way->large++;
	way->large_bytes += total;
}

/* For the next event: responses that are worth waiting for together. Nobody waits for an answer but the next packet
 * that finds no room; so, with a ring and a pool of usual size, an event is asked for with a quarter of them, and
 * answers that are fewer are taken when there is something else to do. When the queue is to be drained, 1 is the
 * number to ask for instead. */
uint32_t pvf_net_tx_patience(const struct pvf_net_tx *tx);

/* Puts an empty page into each free slot; not yet shown. */
void pvf_net_rx_fill(struct pvf_net_rx *rx);

/* Puts empty pages into the ring, and shows them as soon as they are many: half of all, but what stays
 * with the backend is enough for a packet of the largest size. True: it must be notified.
 *
 * Linux's netback asks for an event with the next page when it has too few for its next packet. One that brings too
 * few still is spurious to it, and it masks the channel for longer and longer (xenvif_have_rx_work(),
 * XEN_EOI_FLAG_SPURIOUS). */
bool pvf_net_rx_show(struct pvf_net_rx *rx);

/* The next packet of `*count` responses, which goes down by its slots. False: there is none (`*count` is 0), it
 * was dropped (look again), or a rule was broken (`fault`). */
bool pvf_net_rx_next(struct pvf_net_rx *rx, uint32_t *count, struct pvf_net_packet *packet);

/* The packet was written, or (`error`) not taken: its pages are free again. */
void pvf_net_rx_done(struct pvf_net_rx *rx, const struct pvf_net_packet *packet, bool error);

#endif
