/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Rules for the block backend's faults, and how to wait until they have fired.
 */
#ifndef PVF_TEST_BLKFAULTS_H
#define PVF_TEST_BLKFAULTS_H

#include "blkpeer.h"

#define OKAY BLKIF_RSP_OKAY
#define ERROR BLKIF_RSP_ERROR
#define UNSUPPORTED BLKIF_RSP_EOPNOTSUPP
#define SHORT_WAIT 30 /* ms in which nothing may come */

static inline struct pvf_bb_rule rule(uint32_t kind)
{
	return (struct pvf_bb_rule){.kind = kind, .last = UINT64_MAX, .chance = PVF_BB_ALWAYS};
}

static inline void use(struct peer *p, const struct pvf_bb_rule *rules, uint32_t count, uint64_t seed)
{
	uint32_t bad;

	CHECK_EQ(pvf_bb_set_rules(p->bb, rules, count, seed, &bad), 0);
}

static inline void one(struct peer *p, struct pvf_bb_rule r)
{
	use(p, &r, 1, 1);
}

/* Polls a counter: another thread counts. */
static inline void wait_fired(struct peer *p, uint32_t kind, uint64_t times)
{
	UNTIL(stats(p).fired[kind] >= times);
}

static inline uint64_t wait_in_flight(struct peer *p, uint64_t n)
{
	UNTIL(stats(p).in_flight == n);
	return n;
}

#endif
