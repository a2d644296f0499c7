/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The Internet checksum (RFC 1071) over bytes that lie in pieces.
 *
 * A sum is kept in the machine's byte order, unfolded; a piece that begins at an odd byte of the whole is
 * told so. What is stored is big-endian by itself: a sum of 16-bit words does not care for their order.
 */
#ifndef PVF_CSUM_H
#define PVF_CSUM_H

#include "pvf.h"

/* Adds `size` bytes; `odd`: an odd number of bytes came before them. */
uint64_t pvf_csum_add(uint64_t sum, const void *bytes, size_t size, bool odd);

/* Adds a number as two bytes on the wire, of an even offset. */
uint64_t pvf_csum_add16(uint64_t sum, uint16_t value);

/* The 16 bits of a sum, not inverted: what a field holds before its packet's bytes are added. */
uint16_t pvf_csum_fold(uint64_t sum);

#endif
