/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a network's queue has instead of a disk's: `own` of struct pvf_queue. For queue_net.c, and the fuzzer that is
 * its backend.
 */
#ifndef PVF_QUEUE_NET_H
#define PVF_QUEUE_NET_H

#include "net.h"
#include "queue_int.h"

struct pvf_netq {
	struct pvf_net_tx tx;
	struct pvf_net_rx rx;
	struct pvf_groups *groups; /* the device's */
	int tap_fd;
	bool tap_ready; /* a read of the TAP may find something */
	bool refused;   /* the kernel lets us not keep the processor */
	bool patient;   /* waking up, we stop nobody who runs */
	uint64_t gathered_at; /* ns, coarse: a turn passed several packets on */
	struct pvf_trace *trace; /* the packets', or NULL */
	uint64_t full, tap_errors, groups_told;
	struct pvf_net_stats ended; /* counters of connections that are over */
	struct pvf_net_packet packet; /* that is received now */
};

#endif
