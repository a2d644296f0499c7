/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The statistics page: a memfd that this worker writes and anyone it is given to may only read.
 */
#ifndef PVF_STATS_H
#define PVF_STATS_H

#include "pvf.h"

#define PVF_STATS_SIZE PVF_PAGE_SIZE

struct pvf_stats_page {
	int fd; /* read-only: to be handed out */
	struct pvf_blk_stats *shared;
};

/* Makes the page, seals its size and any new writable mapping. 0 or -errno. */
int pvf_stats_open(struct pvf_stats_page *page);

void pvf_stats_close(struct pvf_stats_page *page);

/* Shows `now` (all but magic, version and sequence) under the sequence lock. */
void pvf_stats_publish(struct pvf_stats_page *page, const struct pvf_blk_stats *now);

#endif
