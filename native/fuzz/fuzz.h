/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the fuzzers share: the input as a script of numbers, and checks that libFuzzer notices.
 *
 * Each fuzzer plays both ends of one boundary. The input says what the ends do, byte by byte; when it
 * is used up every number is 0, so that each prefix of an input is an input. What must hold whatever
 * happens is a CHECK. Nothing outlives one input: the same bytes do the same again.
 */
#ifndef PVF_FUZZ_H
#define PVF_FUZZ_H

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define CHECK_FAILED() abort()
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
	const uint8_t *at, *end;
};

static inline bool more(const struct input *in)
{
	return in->at < in->end;
}

/* The next `bytes` bytes, high byte first. */
static inline uint64_t number(struct input *in, size_t bytes)
{
	uint64_t value = 0;

	for (size_t i = 0; i < bytes; i++)
		value = value << 8 | (more(in) ? *in->at++ : 0);
	return value;
}

/* 0 .. limit - 1; small limits cost one byte of input. */
static inline uint32_t upto(struct input *in, uint32_t limit)
{
	return (uint32_t)(number(in, limit <= 256 ? 1 : 2) % limit);
}

/* At most `max` raw bytes, a number of them first. */
static inline size_t raw(struct input *in, void *to, size_t max)
{
	size_t n = upto(in, (uint32_t)max + 1), have = (size_t)(in->end - in->at);

	n = n < have ? n : have;
	if (n)
		memcpy(to, in->at, n);
	in->at += n;
	return n;
}

/* Which of the descriptors 0 .. 63 are open. */
static inline uint64_t open_fds(void)
{
	uint64_t set = 0;

	for (int fd = 0; fd < 64; fd++)
		set |= (uint64_t)(fcntl(fd, F_GETFD) >= 0) << fd;
	return set;
}

#endif
