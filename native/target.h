/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The NBD socket: bytes between the client and the engine's pages.
 *
 * Payload is received straight into granted pages and sent straight from them: one copy each way.
 * Every recvmsg() that can end a payload also offers a small private buffer for what follows, so
 * that a stream of writes costs one system call each and a burst of reads costs one for all; the
 * head of a payload that lands there (less than the buffer) is copied once more, which is cheaper
 * than another call.
 *
 * Neither direction waits: both use MSG_DONTWAIT, the socket is watched edge-triggered, and
 * EPOLLOUT is asked for only while a send is blocked.
 */
#ifndef PVF_TARGET_H
#define PVF_TARGET_H

#include "blk.h"

#define PVF_TARGET_AHEAD (16u * PVF_NBD_HEADER)

struct pvf_target {
	int fd;       /* -1: none */
	int epoll_fd;
	uint64_t tag; /* the epoll data of `fd` */
	bool rx_ready;  /* a recv may bring something */
	bool tx_ready;  /* a send may be accepted */
	bool ended;     /* the client has closed its side: an end follows the last bytes */
	bool disc;      /* the client said NBD_CMD_DISC: answer what is left, then end */
	bool gone;      /* `error` and `why` say how it ended */
	int error;      /* 0: in order */
	const char *why;
	uint32_t ahead_at, ahead_end;
	uint8_t ahead[PVF_TARGET_AHEAD]; /* received, not yet parsed */
};

/* Takes over a connected stream socket and watches it. 0 or -errno. */
int pvf_target_open(struct pvf_target *target, int fd, int epoll_fd, uint64_t tag);
void pvf_target_close(struct pvf_target *target);

/* The socket's epoll events. */
void pvf_target_event(struct pvf_target *target, uint32_t events);

/* Receives and issues while there is something to do, a bounded amount. `no_new`: finish the
 * current request, begin no other. True: stopped by the bound, more may be waiting. */
bool pvf_target_receive(struct pvf_target *target, struct pvf_blk *blk, bool no_new);

/* Sends what is ready, a bounded amount. True: stopped by the bound. */
bool pvf_target_send(struct pvf_target *target, struct pvf_blk *blk);

#endif
