/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The NBD socket: bytes between the client and the engine's pages.
 *
 * Payload is received straight into granted pages and sent straight from them: one copy each way.
 * Every recvmsg() that can end a payload also offers a private buffer, `ahead`, for what follows, so
 * that a burst of requests costs one system call. Payload that lands there is copied once more.
 * For small writes that is cheaper than a call for each; after a large one only as much is
 * offered as a few headers take.
 *
 * Both directions move at most PVF_TARGET_BYTES a turn: what has been received is shown to the
 * backend, and pages that were sent are used again, while the rest is still on its way.
 *
 * Neither direction waits: both use MSG_DONTWAIT, the socket is watched edge-triggered, and
 * EPOLLOUT is asked for only while a send is blocked.
 */
#ifndef PVF_TARGET_H
#define PVF_TARGET_H

#include "blk.h"

#define PVF_TARGET_AHEAD 65536u
#define PVF_TARGET_BYTES (256u << 10)

struct pvf_target {
	int fd;       /* -1: none */
	int epoll_fd;
	uint64_t tag; /* the epoll data of `fd` */
	bool rx_ready;  /* a recv may bring something */
	bool tx_ready;  /* a send may be accepted */
	bool ended;     /* the client has closed its side: an end follows the last bytes */
	bool disc;      /* the client said NBD_CMD_DISC: answer what is left, then end */
	bool starved;   /* intake waits for pages or for an entry, which sending frees */
	bool bulky;     /* the last write was a large one */
	bool several;   /* the client has other sockets too */
	bool gone;      /* `error` and `why` say how it ended */
	int error;      /* 0: in order */
	const char *why;
	uint32_t turn; /* bytes received in this one */
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

/* Sends what is ready, a bounded amount. True: stopped by the bound, or intake may go on now. */
bool pvf_target_send(struct pvf_target *target, struct pvf_blk *blk);

#endif
