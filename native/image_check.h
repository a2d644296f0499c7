/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the checks of both classes' tables share (blk_image.c, net_image.c).
 */
#ifndef PVF_IMAGE_CHECK_H
#define PVF_IMAGE_CHECK_H

#include <string.h>

#include "pool.h"
#include "ring.h"

/* Marks as used what is not free. False: the free ones are not as many, or not different ones. */
static inline bool pvf_image_mark(bool *used, uint32_t size, const uint16_t *free, uint32_t count)
{
	if (count > size)
		return false;
	memset(used, true, size * sizeof(*used));
	for (uint32_t i = 0; i < count; i++) {
		if (free[i] >= size || !used[free[i]])
			return false;
		used[free[i]] = false;
	}
	return true;
}

/* Anything but 0 and 1 in a bool is no value that C knows. */
static inline bool pvf_image_bool(const bool *what)
{
	unsigned char byte;

	memcpy(&byte, what, 1);
	return byte <= 1;
}

static inline const char *pvf_image_ring(const struct pvf_ring *r, size_t bytes, size_t entry_size)
{
	if (r->entry_size != entry_size || r->entries != pvf_ring_entries(bytes, r->entry_size))
		return "the ring has another size";
	if (r->req_prod_pvt - r->rsp_cons > r->entries ||
	    r->req_published - r->rsp_seen > r->req_prod_pvt - r->rsp_cons ||
	    r->req_prod_pvt - r->req_published > r->entries ||
	    r->rsp_seen - r->rsp_cons > r->entries)
		return "the ring's indices contradict each other";
	return NULL;
}

/* A pool of at most PVF_MAX_POOL_PAGES; `used` gets which of its pages are. */
static inline const char *pvf_image_pool(const struct pvf_pool *pool, bool *used)
{
	if (!pvf_image_mark(used, pool->pages, pool->stack, pool->free) || pool->free_low > pool->free)
		return "the pool's free pages are impossible";
	for (uint32_t i = 0; i < pool->pages; i++) {
		if (pool->state[i] != (used[i] ? PVF_PAGE_USED : PVF_PAGE_FREE))
			return "a page is free and in use";
		if (pool->dirty[i] > PVF_PAGE_SIZE)
			return "a page has more bytes than it has";
	}
	return NULL;
}

/* Takes a page that the table says to be in use from `used`: each has one holder. */
static inline bool pvf_image_hold(const struct pvf_pool *pool, bool *used, uint16_t page)
{
	if (page >= pool->pages || !used[page])
		return false;
	used[page] = false;
	return true;
}

#endif
