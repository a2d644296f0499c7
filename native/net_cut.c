/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A large TCP packet is cut into pieces, as a card does: each has a copy of the headers, with its own lengths,
 * identification, sequence number, flags and checksum, and the next part of the payload.
 */
#include <endian.h>
#include <string.h>

#include "net_int.h"

#define xen_mb()
#define xen_rmb()
#define xen_wmb()
#include <xen/xen.h>
#include <xen/io/netif.h>

#include "csum.h"

#define FIN_PSH 0x09u /* of the last piece only */
#define CWR 0x80u     /* of the first only */

/* A header: what is parsed (PVF_PACKET_HEAD), and TCP's options behind it. */
#define HEADER (PVF_PACKET_HEAD + 64u)

static uint32_t get(const uint8_t *at, uint32_t bytes)
{
	uint32_t value = 0;

	for (uint32_t i = 0; i < bytes; i++)
		value = value << 8 | at[i];
	return value;
}

static void set(uint8_t *at, uint32_t bytes, uint32_t value)
{
	for (uint32_t i = bytes; i-- > 0; value >>= 8)
		at[i] = (uint8_t)value;
}

/* The sum of the pseudo-header, of the packet's length, becomes the piece's. Behind a routing header the last
 * destination is summed, which stands somewhere else: so it is corrected, and not made. */
static void correct_pseudo(const struct pvf_net_cut *cut, uint8_t *header, uint32_t l4_bytes)
{
	uint8_t *field = header + cut->what.l4 + TCP_CHECKSUM;
	uint64_t sum = pvf_csum_add(0, field, 2, false);

	sum = pvf_csum_add16(sum, (uint16_t)~cut->what.l4_bytes);
	sum = pvf_csum_add16(sum, (uint16_t)l4_bytes);
	uint16_t folded = pvf_csum_fold(sum);

	memcpy(field, &folded, sizeof(folded));
}

static void make_header(const struct pvf_net_cut *cut, uint8_t *header, uint32_t payload)
{
	const struct pvf_packet *p = &cut->what;
	uint32_t size = p->payload + payload;
	uint8_t *l3 = header + p->l3, *tcp = header + p->l4;

	if (p->family == 4) {
		uint32_t bytes = p->l4 - p->l3;

		set(l3 + 2, 2, size - p->l3);
		set(l3 + 4, 2, get(l3 + 4, 2) + cut->pieces);
		set(l3 + 10, 2, 0);
		uint16_t sum = (uint16_t)~pvf_csum_fold(pvf_csum_add(0, l3, bytes, false));

		memcpy(l3 + 10, &sum, sizeof(sum));
	} else {
		set(l3 + 4, 2, size - p->l3 - 40);
	}
	set(tcp + 4, 4, get(tcp + 4, 4) + cut->at - p->payload);
	if (cut->at + payload < cut->total)
		tcp[13] &= (uint8_t)~FIN_PSH;
	if (cut->pieces)
		tcp[13] &= (uint8_t)~CWR;
	correct_pseudo(cut, header, size - p->l4);
}

/* Copies the packet's next bytes behind `done` bytes of the piece. */
static void copy(const struct pvf_net_tx *tx, const uint16_t *page, uint32_t done, uint32_t payload)
{
	uint32_t at = tx->cut.at, n;

	for (; payload; payload -= n, at += n, done += n) {
		n = pvf_min32(payload, PVF_PAGE_SIZE - at % PVF_PAGE_SIZE);
		n = pvf_min32(n, PVF_PAGE_SIZE - done % PVF_PAGE_SIZE);
		memcpy(pvf_pool_page(&tx->pool, page[done / PVF_PAGE_SIZE]) + done % PVF_PAGE_SIZE,
		       pvf_net_tx_byte(tx, at), n);
	}
}

/* The header is in the first page; its checksum begins there too. */
static void finish(const struct pvf_net_tx *tx, const uint16_t *page, uint32_t size)
{
	uint32_t start = tx->cut.what.l4, n;
	uint64_t sum = 0;

	for (uint32_t at = start; at < size; at += n) {
		n = pvf_min32(size - at, PVF_PAGE_SIZE - at % PVF_PAGE_SIZE);
		sum = pvf_csum_add(sum, pvf_pool_page(&tx->pool, page[at / PVF_PAGE_SIZE]) + at % PVF_PAGE_SIZE,
				   n, (at - start) & 1);
	}
	uint16_t value = (uint16_t)~pvf_csum_fold(sum);

	memcpy(pvf_pool_page(&tx->pool, page[0]) + start + TCP_CHECKSUM, &value, sizeof(value));
}

/* The next piece. False: there is no room for it now. */
static bool put_piece(struct pvf_net_tx *tx)
{
	struct pvf_net_cut *cut = &tx->cut;
	uint32_t payload = pvf_min32(cut->size, cut->total - cut->at), size = cut->what.payload + payload;
	uint32_t pages = (size + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE;
	uint16_t page[PVF_NET_PAGES];
	uint8_t header[HEADER];

	PVF_ASSERT(cut->what.payload <= HEADER && pages <= PVF_NET_PAGES);
	if (pvf_ring_free(&tx->ring) < pages || pvf_pool_available(&tx->pool) < pages)
		return false;
	for (uint32_t i = 0; i < pages; i++)
		page[i] = pvf_pool_borrow(&tx->pool);
	memcpy(header, pvf_net_tx_byte(tx, 0), cut->what.payload);
	make_header(cut, header, payload);
	memcpy(pvf_pool_page(&tx->pool, page[0]), header, cut->what.payload);
	copy(tx, page, cut->what.payload, payload);
	if (!cut->leave)
		finish(tx, page, size);
	tx->stats.csum_done += !cut->leave;
	tx->stats.pieces++;
	pvf_net_tx_put(tx, page, size, cut->leave ? NETTXF_csum_blank | NETTXF_data_validated : 0, NULL);
	cut->at += payload;
	cut->pieces++;
	return true;
}

bool pvf_net_tx_cut(struct pvf_net_tx *tx)
{
	struct pvf_net_cut *cut = &tx->cut;

	while (cut->total && cut->at < cut->total && !tx->fault.rule) {
		if (put_piece(tx))
			continue;
		if (tx->in_flight)
			return false;
		/* Nothing will ever make room: a pool that is smaller than one piece. */
		tx->stats.dropped[PVF_DROP_TOO_LARGE]++;
		break;
	}
	if (tx->fault.rule || !cut->total)
		return !cut->total;
	pvf_net_tx_return(tx, 0, cut->total);
	*cut = (struct pvf_net_cut){0};
	return true;
}
