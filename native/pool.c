/* SPDX-License-Identifier: BSD-2-Clause */
#include "pool.h"

#include <string.h>

void pvf_pool_init(struct pvf_pool *pool, void *base, uint32_t pages, const uint32_t *grefs,
		   bool scrub)
{
	PVF_ASSERT(pages && pages <= PVF_MAX_POOL_PAGES);
	memset(pool, 0, sizeof(*pool));
	pool->base = base;
	pool->pages = pool->free = pool->free_low = pages;
	pool->scrub = scrub;
	memcpy(pool->gref, grefs, pages * sizeof(*grefs));
	for (uint32_t i = 0; i < pages; i++)
		pool->stack[i] = (uint16_t)(pages - 1 - i); /* page 0 first: neighbours merge */
}

unsigned char *pvf_pool_page(const struct pvf_pool *pool, uint16_t page)
{
	return pool->base + (size_t)page * PVF_PAGE_SIZE;
}

uint32_t pvf_pool_available(const struct pvf_pool *pool)
{
	return pool->quarantined ? 0 : pool->free;
}

static uint16_t pop(struct pvf_pool *pool)
{
	PVF_ASSERT(pvf_pool_available(pool));
	uint16_t page = pool->stack[--pool->free];

	PVF_ASSERT(pool->state[page] == PVF_PAGE_FREE);
	pool->state[page] = PVF_PAGE_USED;
	if (pool->free < pool->free_low)
		pool->free_low = pool->free;
	return page;
}

uint16_t pvf_pool_borrow(struct pvf_pool *pool)
{
	uint16_t page = pop(pool);

	if (pool->scrub && pool->dirty[page]) {
		memset(pvf_pool_page(pool, page), 0, PVF_PAGE_SIZE);
		pool->dirty[page] = 0;
	}
	return page;
}

void pvf_pool_settle(struct pvf_pool *pool, uint16_t page, uint32_t bytes)
{
	PVF_ASSERT(page < pool->pages && pool->state[page] == PVF_PAGE_USED && bytes <= PVF_PAGE_SIZE);
	if (pool->dirty[page] > bytes)
		memset(pvf_pool_page(pool, page) + bytes, 0, pool->dirty[page] - bytes);
	pool->dirty[page] = (uint16_t)bytes;
}

void pvf_pool_return(struct pvf_pool *pool, uint16_t page, uint32_t bytes)
{
	if (pool->dirty[page] < bytes)
		pool->dirty[page] = (uint16_t)bytes;
	pvf_pool_give(pool, page);
}

uint16_t pvf_pool_take(struct pvf_pool *pool, uint32_t bytes, bool overwritten)
{
	PVF_ASSERT(bytes && bytes <= PVF_PAGE_SIZE);
	uint16_t page = pop(pool);
	uint32_t keep = overwritten ? bytes : 0;

	if (pool->scrub)
		memset(pvf_pool_page(pool, page), 0, PVF_PAGE_SIZE);
	else if (pool->dirty[page] > keep)
		memset(pvf_pool_page(pool, page) + keep, 0, pool->dirty[page] - keep);
	pool->dirty[page] = (uint16_t)bytes;
	return page;
}

static void set_free(struct pvf_pool *pool, uint16_t page, uint32_t at)
{
	PVF_ASSERT(page < pool->pages && pool->state[page] == PVF_PAGE_USED);
	pool->state[page] = PVF_PAGE_FREE;
	pool->stack[at] = page;
}

void pvf_pool_give(struct pvf_pool *pool, uint16_t page)
{
	set_free(pool, page, pool->free++);
}

uint16_t pvf_pool_give_chain(struct pvf_pool *pool, uint16_t first, uint32_t count)
{
	uint16_t page = first;

	PVF_ASSERT(count <= pool->pages - pool->free);
	for (uint32_t left = count; left; left--) {
		uint16_t next = pool->next[page];

		set_free(pool, page, pool->free + left - 1);
		page = next;
	}
	pool->free += count;
	return page;
}
