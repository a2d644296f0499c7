/* SPDX-License-Identifier: BSD-2-Clause */
#include "csum.h"

#include <endian.h>
#include <string.h>

/* 2^64 is 1 in arithmetic modulo 2^16 - 1: what is carried out at the top comes in at the bottom. */
static uint64_t add(uint64_t sum, uint64_t word)
{
	sum += word;
	return sum + (sum < word);
}

uint16_t pvf_csum_fold(uint64_t sum)
{
	sum = (sum >> 32) + (sum & 0xffffffff);
	sum = (sum >> 32) + (sum & 0xffffffff);
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return (uint16_t)((sum >> 16) + (sum & 0xffff));
}

uint64_t pvf_csum_add(uint64_t sum, const void *bytes, size_t size, bool odd)
{
	const unsigned char *at = bytes;
	uint64_t words = 0, word;

	for (; size >= 8; at += 8, size -= 8) {
		memcpy(&word, at, 8);
		words = add(words, word);
	}
	word = 0;
	if (size) {
		memcpy(&word, at, size);
		words = add(words, word);
	}
	if (!odd)
		return add(sum, words);
	uint16_t folded = pvf_csum_fold(words);

	return add(sum, (uint16_t)(folded << 8 | folded >> 8));
}

uint64_t pvf_csum_add16(uint64_t sum, uint16_t value)
{
	return add(sum, htobe16(value));
}
