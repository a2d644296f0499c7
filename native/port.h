/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The provider: where events come from and granted pages lie. Two exist, chosen by looking at the
 * descriptors that ATTACH brings:
 *
 *   Xen            event channel: /dev/xen/evtchn with the port bound (a character device);
 *                  pages: /dev/xen/gntalloc, mapped at the offsets of its gref allocation.
 *   embedded host  event channel: an AF_UNIX SOCK_SEQPACKET socket of `struct pvf_port_packet`;
 *                  pages: a memfd, mapped at the same offsets.
 *
 * Both have the semantics of /dev/xen/evtchn: a delivered port stays masked until it is unmasked,
 * an event that comes meanwhile is remembered (once) and delivered then; notify never blocks.
 */
#ifndef PVF_PORT_H
#define PVF_PORT_H

#include "pvf.h"

/* The embedded host's packets. */
struct pvf_port_packet {
	uint32_t port;
	uint32_t op; /* enum pvf_port_op */
};

enum pvf_port_op {
	PVF_PORT_EVENT = 0,  /* host to worker: the port has an event, and is masked now */
	PVF_PORT_UNMASK = 1, /* worker to host */
	PVF_PORT_NOTIFY = 2, /* worker to host: an event for the other end */
};

struct pvf_port;

struct pvf_port_ops {
	const char *name;
	/* 1: our port was delivered, 0: nothing there, -errno: the event channel is unusable. */
	int (*read)(struct pvf_port *port);
	/* 0 or -errno; -EAGAIN: try again later. */
	int (*unmask)(struct pvf_port *port);
	int (*notify)(struct pvf_port *port);
};

struct pvf_port {
	const struct pvf_port_ops *ops;
	int event_fd; /* to be polled for reading; -1: closed */
	int grant_fd;
	uint32_t port;
	bool parked; /* closing leaves event_fd open */
	void *ring, *pool;
	size_t ring_bytes, pool_bytes;
};

extern const struct pvf_port_ops pvf_port_xen, pvf_port_embedded;

/* Recognises the descriptors and maps ring and pool. On success they belong to `port`; on failure
 * (-errno, `*why` names it) they still belong to the caller. */
int pvf_port_open(struct pvf_port *port, int event_fd, int grant_fd,
		  const struct pvf_ctl_attach *attach, const char **why);

/* Unmaps and closes: the port is unbound and the grants freed when this returns. */
void pvf_port_close(struct pvf_port *port);

#endif
