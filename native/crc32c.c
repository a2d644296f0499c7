/* SPDX-License-Identifier: BSD-2-Clause */
#include "crc32c.h"

#define POLYNOMIAL 0x82f63b78u /* reflected */

/* Four bits at a time, with a table small enough to be written down: packets that want this are rare. */
static uint32_t nibble(uint32_t value)
{
	for (int i = 0; i < 4; i++)
		value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
	return value;
}

uint32_t pvf_crc32c(uint32_t crc, const void *bytes, size_t size)
{
	const unsigned char *at = bytes;
	uint32_t table[16];

	for (uint32_t i = 0; i < 16; i++)
		table[i] = nibble(i);
	for (; size; at++, size--) {
		crc ^= *at;
		crc = crc >> 4 ^ table[crc & 15];
		crc = crc >> 4 ^ table[crc & 15];
	}
	return crc;
}
