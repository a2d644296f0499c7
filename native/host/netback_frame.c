/* SPDX-License-Identifier: BSD-2-Clause */
#include "netback_int.h"

#include <netinet/in.h>

static uint32_t get16(const uint8_t *at)
{
	return (uint32_t)at[0] << 8 | at[1];
}

static bool field_of(uint8_t protocol, uint16_t *offset)
{
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)
		return false;
	*offset = protocol == IPPROTO_TCP ? 16 : 6;
	return true;
}

bool nb_find_checksum(const uint8_t *frame, uint32_t size, uint16_t *start, uint16_t *offset)
{
	uint32_t at = 14;
	uint8_t protocol;

	if (size < 14 + 20)
		return false;
	switch (get16(frame + 12)) {
	case 0x0800:
		if (get16(frame + at + 6) & 0x3fff)
			return false;
		protocol = frame[at + 9];
		at += (frame[at] & 15u) * 4;
		break;
	case 0x86dd:
		if (size < 14 + 40)
			return false;
		protocol = frame[at + 6];
		at += 40;
		while (protocol == IPPROTO_HOPOPTS || protocol == IPPROTO_ROUTING ||
		       protocol == IPPROTO_DSTOPTS) {
			if (at + 8 > size)
				return false;
			protocol = frame[at];
			at += (frame[at + 1] + 1u) * 8;
		}
		break;
	default:
		return false;
	}
	if (!field_of(protocol, offset) || at + *offset + 2u > size)
		return false;
	*start = (uint16_t)at;
	return true;
}
