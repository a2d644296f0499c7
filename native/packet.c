/* SPDX-License-Identifier: BSD-2-Clause */
#include "packet.h"

#include <linux/if_ether.h>
#include <netinet/in.h>

#include "csum.h"

#define IPV4_HEADER 20u
#define IPV6_HEADER 40u
#define TCP_HEADER 20u
#define UDP_HEADER 8u
#define MAX_TAGS 2u

struct head {
	const uint8_t *bytes;
	uint32_t have, total;
};

static bool has(const struct head *h, uint32_t at, uint32_t bytes)
{
	return at + bytes <= h->have;
}

static uint16_t be16(const struct head *h, uint32_t at)
{
	return (uint16_t)(h->bytes[at] << 8 | h->bytes[at + 1]);
}

static void transport(struct pvf_packet *p, const struct head *h)
{
	if (p->protocol == IPPROTO_TCP && has(h, p->l4, TCP_HEADER)) {
		uint32_t bytes = (h->bytes[p->l4 + 12] >> 4) * 4u;

		if (bytes < TCP_HEADER || bytes > p->l4_bytes)
			return;
		p->payload = (uint16_t)(p->l4 + bytes);
		p->csum = 16;
	} else if (p->protocol == IPPROTO_UDP && has(h, p->l4, UDP_HEADER)) {
		uint32_t bytes = be16(h, p->l4 + 4);

		/* The pseudo-header has the length of UDP's header: it must be the one that is summed. */
		if (bytes != p->l4_bytes || bytes < UDP_HEADER)
			return;
		p->payload = (uint16_t)(p->l4 + UDP_HEADER);
		p->csum = 6;
	}
}

static void ipv4(struct pvf_packet *p, const struct head *h)
{
	if (!has(h, p->l3, IPV4_HEADER) || h->bytes[p->l3] >> 4 != 4)
		return;
	uint32_t header = (h->bytes[p->l3] & 15) * 4u, bytes = be16(h, p->l3 + 2);

	if (header < IPV4_HEADER || bytes < header || p->l3 + bytes > h->total)
		return;
	p->family = 4;
	if (be16(h, p->l3 + 6) & 0x3fff) /* a fragment: more follow, or an offset */
		return;
	p->protocol = h->bytes[p->l3 + 9];
	p->l4 = (uint16_t)(p->l3 + header);
	p->l4_bytes = (uint16_t)(bytes - header);
	transport(p, h);
}

/* Bytes of an extension header that is walked over; 0: it is none of those. */
static uint32_t extension(uint8_t type, uint8_t length)
{
	switch (type) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		return (length + 1u) * 8;
	case IPPROTO_AH:
		return (length + 2u) * 4;
	default:
		return 0;
	}
}

static void ipv6(struct pvf_packet *p, const struct head *h)
{
	if (!has(h, p->l3, IPV6_HEADER) || h->bytes[p->l3] >> 4 != 6)
		return;
	uint32_t at = p->l3 + IPV6_HEADER, end = at + be16(h, p->l3 + 4), more;
	uint8_t type = h->bytes[p->l3 + 6];

	if (end > h->total)
		return;
	p->family = 6;
	while (has(h, at, 2) && (more = extension(type, h->bytes[at + 1]))) {
		p->extensions = true;
		type = h->bytes[at];
		at += more;
	}
	if (at > end || !has(h, at, 1) || type == IPPROTO_FRAGMENT || extension(type, 0))
		return;
	p->protocol = type;
	p->l4 = (uint16_t)at;
	p->l4_bytes = (uint16_t)(end - at);
	transport(p, h);
}

void pvf_packet_parse(struct pvf_packet *p, const uint8_t *head, uint32_t have, uint32_t total)
{
	struct head h = {head, pvf_min32(have, total), total};
	uint32_t at = PVF_ETH_HEADER - 2;
	uint16_t type;

	*p = (struct pvf_packet){0};
	if (!has(&h, at, 2))
		return;
	type = be16(&h, at);
	while ((type == ETH_P_8021Q || type == ETH_P_8021AD) && p->tags < MAX_TAGS && has(&h, at + 4, 2)) {
		at += 4;
		p->tags++;
		type = be16(&h, at);
	}
	p->l3 = (uint16_t)(at + 2);
	if (type == ETH_P_IP)
		ipv4(p, &h);
	else if (type == ETH_P_IPV6)
		ipv6(p, &h);
}

bool pvf_packet_plain(const struct pvf_packet *p)
{
	return p->payload && !p->tags && !p->extensions;
}

uint16_t pvf_packet_pseudo(const struct pvf_packet *p, const uint8_t *head)
{
	uint32_t at = p->l3 + (p->family == 4 ? 12u : 8u), bytes = p->family == 4 ? 8 : 32;
	uint64_t sum = pvf_csum_add(0, head + at, bytes, false);

	PVF_ASSERT(p->payload);
	sum = pvf_csum_add16(sum, p->protocol);
	return pvf_csum_fold(pvf_csum_add16(sum, p->l4_bytes));
}
