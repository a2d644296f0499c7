/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Tests in TAP, one behaviour each, named as a sentence. Include once per program.
 */
#ifndef PVF_CHECK_H
#define PVF_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef CHECK_FAILED
#define CHECK_FAILED() _exit(1)
#endif

#define CHECK(cond)                                                                       \
	do {                                                                              \
		if (!(cond)) {                                                            \
			printf("Bail out! %s:%d: not true: %s\n", __FILE__, __LINE__, #cond); \
			fflush(stdout);                                                   \
			CHECK_FAILED();                                                   \
		}                                                                         \
	} while (0)

#define CHECK_EQ(a, b)                                                                    \
	do {                                                                              \
		long long a_ = (long long)(a), b_ = (long long)(b);                       \
		if (a_ != b_) {                                                           \
			printf("Bail out! %s:%d: %s is %lld, not %s = %lld\n", __FILE__,  \
			       __LINE__, #a, a_, #b, b_);                                 \
			fflush(stdout);                                                   \
			CHECK_FAILED();                                                   \
		}                                                                         \
	} while (0)

struct test {
	const char *sentence;
	void (*run)(void);
};

static inline int run_tests(const struct test *tests, int count)
{
	printf("1..%d\n", count);
	for (int i = 0; i < count; i++) {
		tests[i].run();
		printf("ok %d - %s\n", i + 1, tests[i].sentence);
		fflush(stdout);
	}
	return 0;
}

#define RUN_TESTS(tests) run_tests(tests, (int)(sizeof(tests) / sizeof((tests)[0])))

/* A small generator (xorshift64*), so that a failure repeats with its seed. */
static inline uint64_t draw(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dull;
}

static inline uint32_t below(uint64_t *state, uint32_t limit)
{
	return (uint32_t)((draw(state) >> 32) % limit);
}

#endif
