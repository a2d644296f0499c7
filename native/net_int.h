/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What net_tx.c and net_cut.c share only.
 */
#ifndef PVF_NET_INT_H
#define PVF_NET_INT_H

#include "net.h"

#define TCP_CHECKSUM 16u /* where it is in the header */
#define SCTP_CHECKSUM 8u

struct netif_extra_info;

/* Bytes of a packet's `page`th page. */
static inline uint32_t pvf_net_bytes_in(uint32_t total, uint32_t page)
{
	uint32_t before = page * PVF_PAGE_SIZE;

	return total <= before ? 0 : pvf_min32(total - before, PVF_PAGE_SIZE);
}

/* A byte of the packet that was read. */
static inline unsigned char *pvf_net_tx_byte(const struct pvf_net_tx *tx, uint32_t at)
{
	return pvf_pool_page(&tx->pool, tx->borrowed[at / PVF_PAGE_SIZE]) + at % PVF_PAGE_SIZE;
}

/* The largest packet that the backend takes in one. */
static inline uint32_t pvf_net_tx_largest(const struct pvf_net_tx *tx)
{
	return tx->features & PVF_NET_SG ? PVF_NET_LARGEST : PVF_PAGE_SIZE;
}

/* Gives the borrowed pages from the `from`th on back, of a packet of `written` bytes. In reverse, so that they
 * are taken in this order again. */
void pvf_net_tx_return(struct pvf_net_tx *tx, uint32_t from, uint32_t written);

/* Puts a packet into the ring that lies in these pages, borrowed ones, which are the ring's then. There is room. */
void pvf_net_tx_put(struct pvf_net_tx *tx, const uint16_t *pages, uint32_t total, uint16_t flags,
		    const struct netif_extra_info *gso);

#endif
