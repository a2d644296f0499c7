/* SPDX-License-Identifier: BSD-2-Clause */
#include "trace.h"

#include <string.h>
#include <time.h>

#define FIRST offsetof(struct pvf_trace_packet, time)
#define HEAD offsetof(struct pvf_trace_packet, bytes)

_Static_assert(sizeof(struct pvf_trace) % 8 == 0 && offsetof(struct pvf_trace, packet) == 64, "a queue's trace");
_Static_assert(offsetof(struct pvf_trace_packet, bytes) + PVF_TRACE_BYTES == sizeof(struct pvf_trace_packet),
	       "no padding");

void pvf_trace_init(struct pvf_trace *trace, uint32_t queue)
{
	memset(trace, 0, sizeof(*trace));
	trace->version = PVF_TRACE_VERSION;
	trace->packets = PVF_TRACE_PACKETS;
	trace->queue = queue;
	__atomic_store_n(&trace->magic, PVF_TRACE_MAGIC, __ATOMIC_RELEASE);
}

void pvf_trace_add(struct pvf_trace *trace, const struct pvf_trace_packet *what, const struct iovec *iov,
		   uint32_t iovs)
{
	uint64_t number = trace->written + 1;
	struct pvf_trace_packet *to = &trace->packet[(number - 1) % PVF_TRACE_PACKETS];
	struct timespec ts;
	uint32_t have = 0;

	clock_gettime(CLOCK_REALTIME, &ts);
	/* Acquire on the read-modify-write: a reader that saw the old number sees this before anything below. */
	__atomic_exchange_n(&to->number, 0, __ATOMIC_ACQ_REL);
	memcpy((unsigned char *)to + FIRST, (const unsigned char *)what + FIRST, HEAD - FIRST);
	to->time = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	to->queue = (uint8_t)trace->queue;
	for (uint32_t i = 0; i < iovs && have < PVF_TRACE_BYTES; i++) {
		uint32_t n = pvf_min32((uint32_t)iov[i].iov_len, PVF_TRACE_BYTES - have);

		memcpy(to->bytes + have, iov[i].iov_base, n);
		have += n;
	}
	to->captured = (uint16_t)have;
	__atomic_store_n(&to->number, number, __ATOMIC_RELEASE);
	__atomic_store_n(&trace->written, number, __ATOMIC_RELEASE);
}
