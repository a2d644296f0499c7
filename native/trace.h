/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The packets' trace: struct pvf_trace in pvf_ctl.h, of one queue, written by that queue alone.
 */
#ifndef PVF_TRACE_H
#define PVF_TRACE_H

#include <sys/uio.h>

#include <linux/virtio_net.h>

#include "pvf.h"

/* Empties it. */
void pvf_trace_init(struct pvf_trace *trace, uint32_t queue);

/* One packet: `what` has all but number, time, captured, queue and bytes; these lie in `iov`, `iovs` of them.
 */
void pvf_trace_add(struct pvf_trace *trace, const struct pvf_trace_packet *what, const struct iovec *iov,
		   uint32_t iovs);

#endif
