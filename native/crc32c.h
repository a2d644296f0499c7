/* SPDX-License-Identifier: BSD-2-Clause
 *
 * SCTP's checksum: CRC32c (RFC 9260, appendix A; the polynomial of Castagnoli, reflected).
 */
#ifndef PVF_CRC32C_H
#define PVF_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Goes on over `size` bytes. It begins with ~0, and its result is inverted, and stored little-endian. */
uint32_t pvf_crc32c(uint32_t crc, const void *bytes, size_t size);

#endif
