/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The operations on an event channel of the embedded host: pvf_host.h has their rules.
 *
 * Theory of operation
 *
 *   An end's `flags` decide everything, by one atomic step for each operation. The eventfd is only
 *   what makes poll() return. So a wake-up may come for nothing (a notify that was taken before its
 *   write came), and an event is never lost: whoever sets PENDING on an end that is not masked
 *   writes, and whoever unmasks an end that is PENDING writes. A take drains *before* it looks at
 *   the flags: a notify after the look writes after the drain.
 *
 *   Nothing here blocks: the eventfds are O_NONBLOCK. The other end shares the open file and could
 *   change that; it cannot do more with shared memory, whatever it writes there.
 */
#ifndef PVF_HOST_CHANNEL_H
#define PVF_HOST_CHANNEL_H

#include <stdbool.h>

#include "pvf_host.h"

/* Maps a channel's memfd (sealed, with the magic, a page). 0 or -errno; -EINVAL: it is none. */
int pvf_channel_map(int fd, struct pvf_channel **channel);
void pvf_channel_unmap(struct pvf_channel *channel);

/* `side` is always the caller's own: 0 or 1. */

/* Sets the other end's event. 0, or -errno of the write. */
int pvf_channel_notify(struct pvf_channel *channel, uint32_t side, int other_fd);

/* 1: our port was delivered and is masked now; 0: nothing there. `own_fd` is not readable then,
 * unless something came meanwhile. Who watches it edge-triggered, and so need not empty it, says -1. */
int pvf_channel_take(struct pvf_channel *channel, uint32_t side, int own_fd);

/* Gives a delivered port back. An event that came meanwhile makes `own_fd` readable. 0 or -errno. */
int pvf_channel_unmask(struct pvf_channel *channel, uint32_t side, int own_fd);

/* For the host, before anybody else has it. */
void pvf_channel_init(struct pvf_channel *channel);

#endif
