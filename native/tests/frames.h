/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Frames for the tests of the network, and a checksum as RFC 1071 tells it: slow, and not ours.
 */
#ifndef PVF_FRAMES_H
#define PVF_FRAMES_H

#include <endian.h>
#include <string.h>

#include "csum.h"
#include "packet.h"

struct frame {
	uint32_t size;
	uint32_t l3, l4; /* where its headers are */
	int family;
	uint8_t bytes[65600];
};

static inline void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static inline uint16_t slow_sum(uint32_t sum, const uint8_t *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++) {
		sum += i & 1 ? bytes[i] : (uint32_t)bytes[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)sum;
}

static inline struct frame ip(int family, uint32_t tags, uint8_t protocol, uint32_t bytes)
{
	struct frame f = {.family = family};
	uint8_t *at = f.bytes;

	memset(at, 0x02, 12); /* two addresses */
	at += 12;
	for (uint32_t i = 0; i < tags; i++, at += 4) {
		put16(at, 0x8100);
		put16(at + 2, 7 + i);
	}
	put16(at, family == 4 ? 0x0800 : 0x86dd);
	at += 2;
	f.l3 = (uint32_t)(at - f.bytes);
	if (family == 4) {
		at[0] = 0x45;
		put16(at + 2, 20 + bytes);
		at[8] = 64;
		at[9] = protocol;
		for (uint32_t i = 12; i < 20; i++)
			at[i] = (uint8_t)(10 + i);
		put16(at + 10, (uint16_t)~slow_sum(0, at, 20));
		at += 20;
	} else {
		at[0] = 0x60;
		put16(at + 4, bytes);
		at[6] = protocol;
		at[7] = 64;
		for (uint32_t i = 8; i < 40; i++)
			at[i] = (uint8_t)(0x20 + i);
		at += 40;
	}
	f.l4 = (uint32_t)(at - f.bytes);
	f.size = f.l4 + bytes;
	for (uint32_t i = 0; i < bytes; i++)
		at[i] = (uint8_t)(i * 7 + 1);
	return f;
}

static inline struct frame tcp(int family, uint32_t tags, uint32_t payload)
{
	struct frame f = ip(family, tags, 6, 20 + payload);

	f.bytes[f.l4 + 12] = 0x50;
	return f;
}

static inline struct frame udp(int family, uint32_t tags, uint32_t payload)
{
	struct frame f = ip(family, tags, 17, 8 + payload);

	put16(f.bytes + f.l4 + 4, 8 + payload);
	return f;
}

/* Puts an extension header of (length + 1) * 8 bytes first behind the IPv6 header. */
static inline void extend(struct frame *f, uint8_t type, uint8_t length)
{
	uint8_t *first = f->bytes + f->l3 + 40;
	uint32_t bytes = (length + 1u) * 8;

	memmove(first + bytes, first, f->size - f->l3 - 40);
	memset(first, 0, bytes);
	first[0] = f->bytes[f->l3 + 6];
	first[1] = length;
	f->bytes[f->l3 + 6] = type;
	f->size += bytes;
	f->l4 += bytes;
	put16(f->bytes + f->l3 + 4, f->size - f->l3 - 40);
}

/* What TCP's or UDP's checksum of the frame must be. */
static inline uint16_t right_sum(const struct frame *f)
{
	bool four = f->family == 4;
	uint8_t protocol = f->bytes[f->l4 + 12] == 0x50 && !four ? 6 : 17, pseudo[40] = {0};
	uint32_t bytes = f->size - f->l4, field;
	static uint8_t copy[65600];

	if (four)
		protocol = f->bytes[f->l3 + 9];
	else if (f->l4 == f->l3 + 40)
		protocol = f->bytes[f->l3 + 6];
	field = protocol == 6 ? 16 : 6;
	memcpy(copy, f->bytes + f->l4, bytes);
	memset(copy + field, 0, 2);
	memcpy(pseudo, f->bytes + f->l3 + (four ? 12 : 8), four ? 8 : 32);
	uint32_t end = four ? 8 : 32;

	pseudo[end + 1] = protocol;
	put16(pseudo + end + 2, bytes);
	return (uint16_t)~slow_sum(slow_sum(0, pseudo, end + 4), copy, bytes);
}

#endif
