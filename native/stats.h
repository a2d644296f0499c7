/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The statistics: a memfd that this worker writes and anyone it is given to may only read, one page
 * for each queue.
 */
#ifndef PVF_STATS_H
#define PVF_STATS_H

#include "pvf.h"

struct pvf_stats {
	int fd; /* read-only: to be handed out */
	uint32_t queues;
	unsigned char *shared; /* that many pages */
};

/* Makes the pages, seals their size and any new writable mapping. 0 or -errno. */
int pvf_stats_open(struct pvf_stats *stats, uint32_t queues);
void pvf_stats_close(struct pvf_stats *stats);

void *pvf_stats_page(const struct pvf_stats *stats, uint32_t queue);

/* Shows `now` (all but magic, version and sequence), a struct pvf_blk_stats or pvf_net_stats of `size` bytes,
 * under the page's sequence lock. A page has one writer at a time. */
void pvf_stats_publish(void *page, const void *now, size_t size);

#endif
