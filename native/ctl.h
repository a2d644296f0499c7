/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The control connection: packets in, checked; packets out, never waited for.
 *
 * Outgoing packets that the socket does not take are kept in a short queue. When it is full, log
 * lines are dropped first; when that is not enough, the connection is: a supervisor that comes back
 * reads the state from HELLO, which is better than one that missed a message without knowing.
 */
#ifndef PVF_CTL_IO_H
#define PVF_CTL_IO_H

#include "pvf.h"

#define PVF_CTL_QUEUE 32u
#define PVF_CTL_UP_MAX 384u /* bytes of the largest message upwards */

union pvf_ctl_down { /* any message from a supervisor */
	struct pvf_ctl_hdr hdr;
	struct pvf_ctl_start start;
	struct pvf_ctl_start_net start_net;
	struct pvf_ctl_start_cons start_cons;
	struct pvf_ctl_detach detach;
	struct pvf_ctl_simple simple;
	uint8_t bytes[PVF_CTL_MAX];
};

/* ATTACH ends in a flexible array, so it cannot be a member. */
static inline const struct pvf_ctl_attach *pvf_ctl_attach(const union pvf_ctl_down *message)
{
	return (const struct pvf_ctl_attach *)(const void *)message->bytes;
}

struct pvf_ctl_packet {
	uint32_t length;
	int fd; /* to pass along; -1: none. It stays the worker's. */
	union {
		struct pvf_ctl_hdr hdr;
		uint8_t bytes[PVF_CTL_UP_MAX];
	};
};

struct pvf_ctl {
	int fd; /* -1: no connection */
	int epoll_fd;
	uint64_t tag;
	bool blocked; /* EPOLLOUT is asked for */
	uint32_t head, count;
	struct pvf_ctl_packet queue[PVF_CTL_QUEUE];
	union pvf_ctl_down in;
	int fds[PVF_CTL_MAX_FDS]; /* that came with `in`; -1: none, or taken by its handler */
	uint32_t nfds;
};

/* Serves a new connection instead of the present one. */
void pvf_ctl_accept(struct pvf_ctl *ctl, int fd);
void pvf_ctl_drop(struct pvf_ctl *ctl);

/* Receives one packet into ctl->in, ctl->fds. 1: a message, checked by pvf_ctl_check(); 0: none
 * waits; -1: the peer is gone (dropped). -2: a packet that is none of the protocol's: its
 * descriptors are closed, `*why` says what is wrong. */
int pvf_ctl_receive(struct pvf_ctl *ctl, const char **why);

/* Closes the descriptors that the handler has not taken. */
void pvf_ctl_release(struct pvf_ctl *ctl);

/* NULL, or what is wrong with a packet of `bytes` bytes and `nfds` descriptors. Pure: the frame and
 * the numbers of every message, but nothing that depends on the worker's state. */
const char *pvf_ctl_check(const union pvf_ctl_down *message, size_t bytes, uint32_t nfds);

/* Queues a message for pvf_ctl_flush(); without a connection the message is dropped. Fills in magic and version. */
void pvf_ctl_send(struct pvf_ctl *ctl, void *message, uint16_t type, uint32_t generation,
		  uint32_t length, int fd);

/* Sends what is queued, as far as the socket takes it. */
void pvf_ctl_flush(struct pvf_ctl *ctl);

#endif
