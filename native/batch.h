/* SPDX-License-Identifier: BSD-2-Clause
 *
 * When to give way before looking at what a client has sent. Pure.
 *
 * Theory of operation
 *
 *   A client that submits several requests wakes us with the first. On a processor that it shares with
 *   us, our waking stops it there, and each request costs a wake-up, a receive and a notify of its
 *   own, and two switches between us. One sched_yield() before we look lets it go on, and all that it
 *   had to send is there when we do.
 *
 *   Where nobody else wants the processor that call returns at once, and with one request at a time it
 *   brings nothing: then it is tried once in PVF_BATCH_PROBE wake-ups only. Where somebody else has
 *   so much to do that we wait for it, that has to bring PVF_BATCH_MS requests for each
 *   millisecond, or we stop.
 */
#ifndef PVF_BATCH_H
#define PVF_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#define PVF_BATCH_PROBE 256u /* wake-ups without giving way, before it is tried again */
#define PVF_BATCH_LAST 8u    /* wake-ups for which one that brought something counts */
#define PVF_BATCH_MS 2u      /* requests that are worth a millisecond of waiting */

struct pvf_batch {
	uint32_t left;  /* wake-ups in which to give way */
	uint32_t since; /* wake-ups since it was last tried */
};

/* A client's sending has woken us. True: give way, then look. */
static inline bool pvf_batch_wait(struct pvf_batch *b)
{
	if (!b->left && ++b->since < PVF_BATCH_PROBE)
		return false;
	b->since = 0;
	return true;
}

/* After giving way for `ms` milliseconds: so many `requests` were found. */
static inline void pvf_batch_found(struct pvf_batch *b, uint32_t requests, uint64_t ms)
{
	if (requests < ms * PVF_BATCH_MS)
		b->left = 0;
	else if (requests > 1)
		b->left = PVF_BATCH_LAST;
	else if (b->left)
		b->left--;
}

#endif
