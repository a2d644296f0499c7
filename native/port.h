/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The provider: where events come from and granted pages lie. Two exist, chosen by looking at the
 * descriptors that ATTACH brings:
 *
 *   Xen            event channel: /dev/xen/evtchn with the port bound (a character device);
 *                  pages: /dev/xen/gntalloc, mapped at the offsets of its gref allocation.
 *   embedded host  two AF_UNIX SOCK_SEQPACKET connections to the host's hub; in each waits a
 *                  `struct pvf_host_packet` with the descriptors of what is shared (pvf_host.h).
 *
 * Both have the semantics of /dev/xen/evtchn: a delivered port stays masked until it is unmasked,
 * an event that comes meanwhile is remembered (once) and delivered then; nothing blocks. In both,
 * closing the descriptors of ATTACH is what unbinds the port and frees the grants.
 */
#ifndef PVF_PORT_H
#define PVF_PORT_H

#include "channel.h"
#include "pvf.h"

struct pvf_port;

struct pvf_port_ops {
	const char *name;
	bool edges; /* event_fd is never emptied: each event is a new edge */
	/* Makes event_fd of the sources, and maps ring and pool. 0, or -errno with `*why`: then
	 * nothing is held. */
	int (*open)(struct pvf_port *port, const char **why);
	/* Gives back what open() took beside the sources, ring and pool. */
	void (*release)(struct pvf_port *port);
	/* 1: our port was delivered, 0: nothing there, -errno: the event channel is unusable. */
	int (*read)(struct pvf_port *port);
	/* 0 or -errno. */
	int (*unmask)(struct pvf_port *port);
	int (*notify)(struct pvf_port *port);
	/* The descriptors beside the sources that another process needs to have the port as well; and
	 * that process's open() of them, which takes what it keeps. */
	void (*share)(const struct pvf_port *port, int *fds);
	uint32_t extra; /* of the event channel; one more for the pages where `arena` is set */
	bool arena;
	int (*take_over)(struct pvf_port *port, int *fds, const char **why);
};

#define PVF_PORT_FDS 6u  /* the two sources, and the most that any provider shares beside them */
#define PVF_EVENT_FDS 4u /* without pages */

/* Where a port's pages lie in its descriptors: plain data for another process. */
struct pvf_port_image {
	uint64_t ring_offset, pool_offset; /* bytes */
	uint32_t ring_pages, pool_pages;
	uint32_t port;
	uint32_t side; /* embedded host: which end of the channel is ours */
	uint32_t fds;  /* how many descriptors go with it */
	uint32_t bare; /* 1: an event channel without pages */
};

struct pvf_port {
	const struct pvf_port_ops *ops;
	int event_fd;     /* to be polled for reading; -1: closed */
	int event_source; /* what ATTACH brought */
	int grant_source; /* -1: an event channel only, without pages */
	uint32_t port;
	bool parked; /* closing leaves event_source open */
	void *ring, *pool;
	size_t ring_bytes, pool_bytes;
	uint64_t ring_offset, pool_offset;
	struct pvf_channel *channel; /* of the embedded host, as are all that follow */
	uint32_t side;
	int other_fd;
	int channel_fd, arena_fd; /* kept for the worker that takes over */
};

extern const struct pvf_port_ops pvf_port_xen, pvf_port_embedded;

/* Recognises the descriptors and maps ring and pool. On success they belong to `port`; on failure
 * (-errno, `*why` names it) they still belong to the caller. A packet that waited in them has been
 * read then, and they cannot be used again. */
int pvf_port_open(struct pvf_port *port, int event_fd, int grant_fd,
		  const struct pvf_ctl_attach *attach, const char **why);

/* The same of an event channel without pages: the second of a network's queue. */
int pvf_port_open_event(struct pvf_port *port, int event_fd, uint32_t number, const char **why);

/* Unmaps and closes: the port is unbound and the grants freed when this returns. */
void pvf_port_close(struct pvf_port *port);

/* Undoes pvf_port_open(): the descriptors are the caller's again. */
void pvf_port_release(struct pvf_port *port);

/* Handing over a port that is open: `fds` get the port's own descriptors, `image` what is to be said of
 * them; returns how many they are, PVF_PORT_FDS at most, PVF_EVENT_FDS of one without pages. */
uint32_t pvf_port_share(const struct pvf_port *port, struct pvf_port_image *image, int *fds);

/* As pvf_port_open(), of the `count` descriptors of a pvf_port_share(). Those that it took are -1 in
 * `fds` then; on failure none is. */
int pvf_port_take_over(struct pvf_port *port, const struct pvf_port_image *image, int *fds,
		       uint32_t count, const char **why);

/* For the providers: maps ring and pool out of `fd`. 0, or -errno with `*why`. */
int pvf_port_map(struct pvf_port *port, int fd, const char **why);
void pvf_port_unmap(struct pvf_port *port);

#endif
