/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Descriptors that come in a packet (SCM_RIGHTS).
 */
#ifndef PVF_SCM_H
#define PVF_SCM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

/* Takes what recvmsg() put into `msg`: fds[0..max) get descriptors or -1, all that are more are
 * closed. Returns how many there were. Descriptors for which the control buffer had no room the
 * kernel has closed: MSG_CTRUNC. */
uint32_t pvf_scm_take(struct msghdr *msg, int *fds, uint32_t max);

#define PVF_SCM_MAX 16u /* descriptors of one pvf_scm_send() */

/* Sends one packet with `count` descriptors; never waits. 0 or -errno. */
int pvf_scm_send(int sock, const void *data, size_t size, const int *fds, uint32_t count);

/* A descriptor over which packets pass whole, with others: AF_UNIX, SOCK_SEQPACKET. */
bool pvf_scm_packets(int fd);

/* Closes what is not -1 and makes it -1. */
void pvf_scm_close(int *fds, uint32_t count);

#endif
