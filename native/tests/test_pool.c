/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "pool.h"

#define PAGES 8u

static _Alignas(4096) unsigned char memory[PAGES * 4096];
static struct pvf_pool pool;

static void fresh(bool scrub)
{
	uint32_t grefs[PAGES];

	for (uint32_t i = 0; i < PAGES; i++)
		grefs[i] = 100 + i;
	memset(memory, 0, sizeof(memory));
	pvf_pool_init(&pool, memory, PAGES, grefs, scrub);
}

static bool zero(const unsigned char *from, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (from[i])
			return false;
	return true;
}

static void lifo(void)
{
	fresh(false);
	uint16_t a = pvf_pool_take(&pool, 4096, true), b = pvf_pool_take(&pool, 4096, true);

	CHECK_EQ(a, 0);
	CHECK_EQ(b, 1);
	pvf_pool_give(&pool, b);
	pvf_pool_give(&pool, a);
	CHECK_EQ(pvf_pool_take(&pool, 4096, true), a);
	CHECK_EQ(pool.free_low, PAGES - 2);
}

static void distinct(void)
{
	bool seen[PAGES] = {false};

	fresh(false);
	for (uint32_t i = 0; i < PAGES; i++) {
		uint16_t page = pvf_pool_take(&pool, 1, false);

		CHECK(!seen[page]);
		seen[page] = true;
	}
	CHECK_EQ(pvf_pool_available(&pool), 0);
}

static void tail(void)
{
	fresh(false);
	uint16_t page = pvf_pool_take(&pool, 4096, true);

	memset(pvf_pool_page(&pool, page), 0xee, 4096);
	pvf_pool_give(&pool, page);
	CHECK_EQ(pvf_pool_take(&pool, 512, true), page);
	CHECK(zero(pvf_pool_page(&pool, page) + 512, 4096 - 512));
}

static void read_page(void)
{
	fresh(false);
	uint16_t page = pvf_pool_take(&pool, 1024, true);

	memset(pvf_pool_page(&pool, page), 0xee, 1024);
	pvf_pool_give(&pool, page);
	CHECK_EQ(pvf_pool_take(&pool, 4096, false), page);
	CHECK(zero(pvf_pool_page(&pool, page), 4096));
}

static void untrusted(void)
{
	fresh(true);
	uint16_t page = pvf_pool_take(&pool, 512, true);

	pvf_pool_give(&pool, page);
	memset(pvf_pool_page(&pool, page), 0xbb, 4096); /* the backend scribbled on a free page */
	CHECK_EQ(pvf_pool_take(&pool, 512, true), page);
	CHECK(zero(pvf_pool_page(&pool, page), 4096));
}

static void quarantine(void)
{
	fresh(false);
	pvf_pool_take(&pool, 1, false);
	pool.quarantined = true;
	CHECK_EQ(pvf_pool_available(&pool), 0);
}

int main(void)
{
	static const struct test tests[] = {
		{"pages are taken last in, first out, neighbours first", lifo},
		{"no page is handed out twice", distinct},
		{"rule 17: the rest of a partly written page is zero, whatever was there", tail},
		{"rule 17: a page taken for a read holds nothing of an earlier request", read_page},
		{"rule 18: with trusted=0 a whole page is cleared, scribbles included", untrusted},
		{"rule 21: a quarantined pool hands out nothing", quarantine},
	};

	return RUN_TESTS(tests);
}
