/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The pool of granted pages: granted once for a connection's whole life, recycled by request.
 *
 * Pages are taken last in, first out: the hottest in the cache, and the ones a backend with
 * persistent grants has mapped already. A page is scrubbed when it is taken, so that it holds only
 * the bytes of its new request (rules 17, 18) and a backend that answers a read without writing
 * returns zeroes, never another request's data (rule 19).
 */
#ifndef PVF_POOL_H
#define PVF_POOL_H

#include "pvf.h"

enum pvf_page_state { PVF_PAGE_FREE = 0, PVF_PAGE_USED = 1 };

struct pvf_pool {
	unsigned char *base;
	uint32_t pages;
	uint32_t free;      /* pages on the stack */
	uint32_t free_low;  /* fewest ever free */
	bool scrub;         /* clear whole pages: the backend is not trusted (trusted=0) */
	bool quarantined;   /* rule 21: nothing is handed out any more */
	uint32_t gref[PVF_MAX_POOL_PAGES];
	uint16_t stack[PVF_MAX_POOL_PAGES];
	uint16_t next[PVF_MAX_POOL_PAGES]; /* the holder's: its pages as a chain */
	uint16_t dirty[PVF_MAX_POOL_PAGES]; /* bytes from the page's start that may not be zero */
	uint8_t state[PVF_MAX_POOL_PAGES];
};

/* `base` is `pages` consecutive pages, all zero (gntalloc gives them so), gref[i] naming page i. */
void pvf_pool_init(struct pvf_pool *pool, void *base, uint32_t pages, const uint32_t *grefs,
		   bool scrub);

/* Takes a page of which the first `bytes` bytes will be used. What an earlier request left is
 * cleared: all of it, or (overwritten: our own payload is about to cover [0, bytes)) only what lies
 * past `bytes`. Returns the page's index; the caller has checked `free`. */
uint16_t pvf_pool_take(struct pvf_pool *pool, uint32_t bytes, bool overwritten);

/* Takes a page for bytes whose number is not known yet; not cleared (with `scrub`: all of it is).
 * pvf_pool_settle() must follow before anybody is shown the page, or pvf_pool_return(). */
uint16_t pvf_pool_borrow(struct pvf_pool *pool);

/* `bytes` bytes of a borrowed page are ours now: what an earlier use left past them is cleared. */
void pvf_pool_settle(struct pvf_pool *pool, uint16_t page, uint32_t bytes);

/* Gives a borrowed page back, of which at most `bytes` bytes were written. */
void pvf_pool_return(struct pvf_pool *pool, uint16_t page, uint32_t bytes);

/* Gives a page back. Only after the backend has answered the request that used it (rule 20). */
void pvf_pool_give(struct pvf_pool *pool, uint16_t page);

/* Gives back the first `count` pages of a chain, so that they are taken again in its order: what were
 * neighbours stay neighbours. Returns the page behind them, as `next` has it. */
uint16_t pvf_pool_give_chain(struct pvf_pool *pool, uint16_t first, uint32_t count);

/* Pages that can be taken: none once quarantined. */
uint32_t pvf_pool_available(const struct pvf_pool *pool);

unsigned char *pvf_pool_page(const struct pvf_pool *pool, uint16_t page);

#endif
