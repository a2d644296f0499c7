/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The vocabulary that every file of the engine shares.
 */
#ifndef PVF_H
#define PVF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "pvf_ctl.h"

#define PVF_SECTOR 512u  /* the unit of every sector number in blkif.h, whatever sector-size says */
#define PVF_NONE 0xffffu /* no entry: the end of a list of 16-bit indices */

/* A rule that the backend broke. Every text is a string literal: a fault is plain data. */
struct pvf_fault {
	uint32_t rule;     /* number in docs/security.md; 0: none */
	uint64_t value;    /* what was found in `field` */
	const char *field; /* "rsp_prod", "id", "operation" */
	const char *text;
};

/* An impossible state of our own. Dying frees the ring, the grants and the port at once and lets
 * the supervisor start afresh: better than writing to a disk with a state nobody understands. */
#define PVF_ASSERT(cond)                                                              \
	do {                                                                          \
		if (__builtin_expect(!(cond), 0)) {                                   \
			static const char m_[] = __FILE__ ": broken: " #cond "\n";    \
			fwrite(m_, 1, sizeof(m_) - 1, stderr);                        \
			abort();                                                      \
		}                                                                     \
	} while (0)

static inline uint32_t pvf_min32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

#endif
