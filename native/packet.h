/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a packet's first bytes say: where its transport header is, and whether netif can carry its checksum
 * unfinished. netif.h has one bit for that and no offset: both ends must find the field by themselves, and
 * only that of TCP or UDP right behind an IPv4 or IPv6 header is found by everybody.
 *
 * The bytes are a private copy: nobody changes them between the look and the use (rule 15).
 */
#ifndef PVF_PACKET_H
#define PVF_PACKET_H

#include "pvf.h"

#define PVF_PACKET_HEAD 256u /* bytes that are looked at */
#define PVF_ETH_HEADER 14u

struct pvf_packet {
	uint8_t family;    /* 4, 6, or 0: neither, or its header does not hold together */
	uint8_t protocol;  /* of the transport header; only where `l4` is set */
	uint8_t tags;      /* VLAN tags before the network header */
	bool extensions;   /* IPv6 extension headers stand before the transport header */
	uint16_t l3;       /* where the network header is, from the packet's start */
	uint16_t l4;       /* where the transport header is; 0: there is none in this packet, or none was found */
	uint16_t l4_bytes; /* from there to the end that the network header tells */
	uint16_t payload;  /* where TCP's or UDP's payload begins; 0: neither, or it does not hold together */
	uint16_t csum;     /* where TCP's or UDP's checksum is, from `l4`; only where `payload` is set */
};

/* `have` bytes at `head`, of a packet of `total`. What the headers claim beyond that is not believed. */
void pvf_packet_parse(struct pvf_packet *packet, const uint8_t *head, uint32_t have, uint32_t total);

/* True: an unfinished checksum of this packet can be left to the other end. */
bool pvf_packet_plain(const struct pvf_packet *packet);

/* The folded sum of the pseudo-header: what the checksum's field holds in an unfinished packet. Only where
 * `payload` is set. */
uint16_t pvf_packet_pseudo(const struct pvf_packet *packet, const uint8_t *head);

#endif
