/* SPDX-License-Identifier: BSD-2-Clause */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <xen/xen.h>
#include <xen/grant_table.h>

#include "check.h"
#include "grants.h"

#define PAGE 4096u
#define ARENAS 3u
#define PAGES 8u
#define BACKEND 7u /* the domain that may map */

static int table_fd, track_fd, arena_fd[ARENAS];
static struct pvf_arena arena[ARENAS];
static struct pvf_mapper mapper;
static struct pvf_grant *table;
static uint32_t *track;

static int memfd(size_t bytes)
{
	int fd = memfd_create("grants", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	return fd;
}

static unsigned char stamp(uint32_t number, uint32_t page)
{
	return (unsigned char)(16 * number + page + 1);
}

/* Arena 2 is not given to the mapper. Page p of arena a is filled with stamp(a, p). */
static void fresh(void)
{
	table_fd = memfd(PVF_GRANTS * sizeof(struct pvf_grant));
	track_fd = memfd(PVF_GRANTS * sizeof(uint32_t));
	CHECK_EQ(pvf_mapper_open(&mapper, table_fd, track_fd, BACKEND, arena, ARENAS), 0);
	table = mapper.table;
	track = mapper.maptrack;
	for (uint32_t a = 0; a < ARENAS; a++) {
		unsigned char page[PAGE];

		arena_fd[a] = memfd(PAGES * PAGE);
		for (uint32_t p = 0; p < PAGES; p++) {
			memset(page, stamp(a, p), PAGE);
			CHECK_EQ(pwrite(arena_fd[a], page, PAGE, (off_t)p * PAGE), PAGE);
		}
		if (a != 2)
			CHECK_EQ(pvf_mapper_arena(&mapper, a, arena_fd[a]), 0);
	}
}

static void done(void)
{
	pvf_mapper_close(&mapper);
	close(table_fd);
	close(track_fd);
	for (uint32_t a = 0; a < ARENAS; a++)
		close(arena_fd[a]);
}

static int map(uint32_t ref, bool writable)
{
	return pvf_grant_map(table, track, BACKEND, ref, writable);
}

static int unmap(uint32_t ref)
{
	return pvf_grant_unmap(table, track, ref);
}

static void life(void)
{
	fresh();
	pvf_grant_begin(&table[9], BACKEND, 1, 3, true);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(map(9, false), 0);
	CHECK_EQ(table[9].word, GTF_permit_access | GTF_reading | 1 << PVF_GRANT_COUNT_SHIFT);
	CHECK_EQ(map(9, true), 0);
	CHECK_EQ(table[9].word, GTF_permit_access | GTF_reading | GTF_writing |
					2 << PVF_GRANT_COUNT_SHIFT);
	CHECK_EQ(pvf_grant_maps(&table[9]), 2);
	CHECK_EQ(track[9], 2);
	CHECK_EQ(unmap(9), 0);
	CHECK_EQ(unmap(9), 0);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(unmap(9), -EINVAL);
	CHECK_EQ(track[9], 0);
	CHECK_EQ(pvf_grant_end(&table[9]), 0);
	CHECK_EQ(table[9].word, GTF_invalid);
	CHECK_EQ(map(9, false), -EINVAL);
	done();
}

static void refused(void)
{
	fresh();
	pvf_grant_begin(&table[8], BACKEND, 0, 0, false);
	pvf_grant_begin(&table[9], BACKEND + 1, 0, 0, true);
	pvf_grant_begin(&table[10], BACKEND, 0, 0, true);
	table[10].word |= UINT32_MAX << PVF_GRANT_COUNT_SHIFT;
	table[11].word = GTF_accept_transfer;
	CHECK_EQ(map(8, true), -EPERM);
	CHECK_EQ(map(9, false), -EPERM);
	CHECK_EQ(map(10, false), -EBUSY);
	CHECK_EQ(map(11, false), -EINVAL);
	CHECK_EQ(map(12, false), -EINVAL);
	CHECK_EQ(map(PVF_GRANTS, false), -EINVAL);
	CHECK_EQ(map(UINT32_MAX, false), -EINVAL);
	CHECK_EQ(unmap(PVF_GRANTS), -EINVAL);
	for (uint32_t ref = 8; ref < 13; ref++)
		CHECK_EQ(track[ref], 0);
	CHECK_EQ(table[8].word, GTF_permit_access | GTF_readonly);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(map(8, false), 0);
	CHECK_EQ(unmap(8), 0);
	done();
}

static void deferred(void)
{
	fresh();
	pvf_grant_begin(&table[9], BACKEND, 0, 0, true);
	CHECK_EQ(map(9, true), 0);
	CHECK_EQ(pvf_grant_end(&table[9]), -EBUSY);
	CHECK_EQ(map(9, true), 0); /* still valid, as in Xen */
	CHECK_EQ(unmap(9), 0);
	CHECK_EQ(pvf_grant_end(&table[9]), -EBUSY);
	CHECK_EQ(unmap(9), 0);
	CHECK_EQ(pvf_grant_end(&table[9]), 0);
	CHECK_EQ(pvf_grant_end(&table[9]), 0);
	done();
}

/* A mapper that is killed leaves its maps behind. */
static void dead(void)
{
	static const uint32_t refs[] = {9, 10, 9};
	void *where;
	uint32_t failed, missing;

	fresh();
	pvf_grant_begin(&table[9], BACKEND, 0, 0, true);
	pvf_grant_begin(&table[10], BACKEND, 0, 1, true);
	fflush(stdout);
	pid_t child = fork();

	CHECK(child >= 0);
	if (!child) {
		struct pvf_mapper own;
		struct pvf_arena arenas[1];

		if (pvf_mapper_open(&own, table_fd, track_fd, BACKEND, arenas, 1) ||
		    pvf_mapper_arena(&own, 0, arena_fd[0]) ||
		    pvf_mapper_map(&own, refs, 3, true, &where, &failed, &missing))
			_exit(1);
		_exit(0);
	}
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	CHECK_EQ(pvf_grant_maps(&table[9]), 2);
	CHECK_EQ(pvf_grant_end(&table[10]), -EBUSY);
	CHECK_EQ(pvf_grant_reclaim(table, track), 3);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(pvf_grant_end(&table[9]), 0);
	CHECK_EQ(pvf_grant_end(&table[10]), 0);
	CHECK_EQ(pvf_grant_reclaim(table, track), 0);
	done();
}

static void half_mapped(void)
{
	fresh();
	pvf_grant_begin(&table[9], BACKEND, 0, 0, true);
	track[9] = 1; /* noted, and dead before it was counted */
	pvf_grant_reclaim(table, track);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(map(9, false), 0);
	track[9]++;
	pvf_grant_reclaim(table, track);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(track[9], 0);
	done();
}

static void contiguous(void)
{
	/* Neighbours, a gap, the same page again, another arena, backwards. */
	static const struct {
		uint32_t arena, page;
	} pages[] = {{0, 2}, {0, 3}, {0, 4}, {0, 6}, {0, 6}, {1, 7}, {1, 6}, {0, 0}};
	enum { N = sizeof(pages) / sizeof(*pages) };
	uint32_t refs[N], failed, missing;
	void *where;

	fresh();
	for (uint32_t i = 0; i < N; i++) {
		refs[i] = 100 + 7 * (i ^ 1);
		pvf_grant_begin(&table[refs[i]], BACKEND, (uint16_t)pages[i].arena, pages[i].page,
				true);
	}
	CHECK_EQ(pvf_mapper_map(&mapper, refs, N, true, &where, &failed, &missing), 0);
	unsigned char *at = where;

	for (uint32_t i = 0; i < N; i++) {
		CHECK_EQ(at[i * PAGE], stamp(pages[i].arena, pages[i].page));
		CHECK_EQ(at[i * PAGE + PAGE - 1], stamp(pages[i].arena, pages[i].page));
		CHECK_EQ(track[refs[i]], 1);
		CHECK_EQ(pvf_grant_end(&table[refs[i]]), -EBUSY);
	}
	at[PAGE] = 0xee;
	unsigned char byte;

	CHECK_EQ(pread(arena_fd[0], &byte, 1, 3 * PAGE), 1);
	CHECK_EQ(byte, 0xee);
	pvf_mapper_unmap(&mapper, refs, N, where);
	for (uint32_t i = 0; i < N; i++)
		CHECK_EQ(pvf_grant_end(&table[refs[i]]), 0);
	done();
}

static void protection(void)
{
	static const uint32_t refs[] = {20, 21};
	uint32_t failed, missing;
	void *where;

	fresh();
	pvf_grant_begin(&table[20], BACKEND, 0, 0, true);
	pvf_grant_begin(&table[21], BACKEND, 0, 1, false);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 2, true, &where, &failed, &missing), -EPERM);
	CHECK_EQ(failed, 1);
	CHECK_EQ(track[20], 0);
	CHECK_EQ(table[20].word, GTF_permit_access);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 2, false, &where, &failed, &missing), 0);
	/* A write to it would be a fault; the kernel says so without one. */
	int fd = memfd(PAGE);

	CHECK_EQ(pread(fd, where, 1, 0), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(pwrite(fd, where, 1, 0), 1);
	close(fd);
	pvf_mapper_unmap(&mapper, refs, 2, where);
	done();
}

/* Whether a child has something at `where`, too. */
static bool inherited(void *where)
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child)
		_exit(msync(where, PAGE, MS_ASYNC) ? errno : 0); /* ENOMEM: nothing is mapped there */
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && (!WEXITSTATUS(status) || WEXITSTATUS(status) == ENOMEM));
	return !WEXITSTATUS(status);
}

static void forks(void)
{
	static const uint32_t refs[] = {30};
	uint32_t failed, missing;
	void *where;

	fresh();
	pvf_grant_begin(&table[30], BACKEND, 0, 0, false);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 1, false, &where, &failed, &missing), 0);
	CHECK(!inherited(where));
	CHECK(!inherited(table));
	CHECK(!inherited(track));
	pvf_mapper_unmap(&mapper, refs, 1, where);
	done();
}

static void arenas(void)
{
	static const uint32_t refs[] = {20, 21};
	uint32_t failed, missing;
	void *where = NULL;

	fresh();
	pvf_grant_begin(&table[20], BACKEND, 0, 0, true);
	pvf_grant_begin(&table[21], BACKEND, 2, 0, true);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 2, true, &where, &failed, &missing), -ENXIO);
	CHECK_EQ(failed, 1);
	CHECK_EQ(missing, 2);
	CHECK_EQ(pvf_mapper_arena(&mapper, 2, arena_fd[2]), 0);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 2, true, &where, &failed, &missing), 0);
	CHECK_EQ(((unsigned char *)where)[PAGE], stamp(2, 0));
	pvf_mapper_unmap(&mapper, refs, 2, where);
	pvf_grant_end(&table[21]);
	pvf_grant_begin(&table[21], BACKEND, 9, 0, true); /* a number that cannot be */
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 2, true, &where, &failed, &missing), -ENXIO);
	CHECK_EQ(missing, 9);
	CHECK_EQ(pvf_mapper_arena(&mapper, 9, arena_fd[2]), -EINVAL);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 0, true, &where, &failed, &missing), -EINVAL);
	CHECK_EQ(track[20] + track[21], 0);
	done();
}

static void beyond(void)
{
	static const uint32_t refs[] = {20, 21, 22};
	uint32_t failed, missing;
	void *where;

	fresh();
	for (uint32_t i = 0; i < 3; i++)
		pvf_grant_begin(&table[refs[i]], BACKEND, 0, PAGES - 2 + i, true);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 3, true, &where, &failed, &missing), -EFAULT);
	CHECK_EQ(failed, 2);
	CHECK(!ftruncate(arena_fd[0], (PAGES + 1) * PAGE)); /* arenas grow */
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 3, true, &where, &failed, &missing), 0);
	CHECK_EQ(((unsigned char *)where)[2 * PAGE], 0);
	pvf_mapper_unmap(&mapper, refs, 3, where);
	pvf_grant_end(&table[22]);
	pvf_grant_begin(&table[22], BACKEND, 0, UINT32_MAX, true);
	CHECK_EQ(pvf_mapper_map(&mapper, refs, 3, true, &where, &failed, &missing), -EFAULT);
	CHECK_EQ(failed, 2);
	CHECK_EQ(track[20] + track[21] + track[22], 0);
	done();
}

static void over(void)
{
	static const uint32_t refs[] = {20, 21};
	uint32_t failed, missing;
	unsigned char *space = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	fresh();
	CHECK(space != MAP_FAILED);
	pvf_grant_begin(&table[20], BACKEND, 1, 5, true);
	pvf_grant_begin(&table[21], BACKEND, 0, 2, true);
	memset(space, 0xcc, 4 * PAGE);
	CHECK_EQ(pvf_mapper_map_over(&mapper, refs, 2, true, space + PAGE, &failed, &missing), 0);
	CHECK_EQ(space[0], 0xcc);
	CHECK_EQ(space[PAGE], stamp(1, 5));
	CHECK_EQ(space[2 * PAGE], stamp(0, 2));
	CHECK_EQ(space[3 * PAGE], 0xcc);
	munmap(space, 4 * PAGE);
	CHECK_EQ(pvf_grant_end(&table[20]), -EBUSY);
	CHECK_EQ(unmap(20) + unmap(21), 0);
	CHECK_EQ(pvf_grant_end(&table[20]), 0);
	done();
}

static void bad_files(void)
{
	struct pvf_mapper m;
	struct pvf_arena none[1];
	int open_ended = memfd_create("grants", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int small = memfd(PAGE);

	fresh();
	CHECK(!ftruncate(open_ended, PVF_GRANTS * sizeof(struct pvf_grant)));
	CHECK_EQ(pvf_mapper_open(&m, open_ended, track_fd, BACKEND, none, 1), -EINVAL);
	CHECK_EQ(pvf_mapper_open(&m, table_fd, open_ended, BACKEND, none, 1), -EINVAL);
	CHECK_EQ(pvf_mapper_open(&m, small, track_fd, BACKEND, none, 1), -EINVAL);
	CHECK_EQ(pvf_mapper_open(&m, table_fd, small, BACKEND, none, 1), -EINVAL);
	CHECK_EQ(pvf_mapper_arena(&mapper, 2, open_ended), -EINVAL);
	close(open_ended);
	close(small);
	done();
}

/* Mappers in two threads against a hub that ends and begins again: whoever has mapped finds the
 * entry unchanged until it unmaps. */

#define ROUNDS 50000

static uint32_t ended;

static void *map_and_look(void *arg)
{
	uint32_t *own = arg;
	uint32_t failures = 0;

	for (int i = 0; i < ROUNDS; i++) {
		if (pvf_grant_map(table, own, BACKEND, 9, i % 2)) {
			failures++;
			continue;
		}
		uint32_t page = table[9].page, number = table[9].arena;

		CHECK_EQ(page, number + 1);
		CHECK(pvf_grant_maps(&table[9]));
		CHECK_EQ(table[9].page, page);
		CHECK_EQ(pvf_grant_unmap(table, own, 9), 0);
	}
	own[10] = failures;
	return NULL;
}

static void contended(void)
{
	static uint32_t own[2][PVF_GRANTS];
	pthread_t threads[2];
	bool stop = false;

	fresh();
	ended = 0;
	pvf_grant_begin(&table[9], BACKEND, 0, 1, true);
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&threads[i], NULL, map_and_look, own[i]));
	for (uint16_t k = 1; !stop; k++) {
		if (!pvf_grant_end(&table[9])) {
			pvf_grant_begin(&table[9], BACKEND, k, k + 1u, true);
			ended++;
		}
		if (k == UINT16_MAX - 1)
			k = 0;
		stop = ended > ROUNDS / 10;
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQ(own[0][9] + own[1][9], 0);
	CHECK_EQ(table[9].word, GTF_permit_access);
	CHECK_EQ(pvf_grant_end(&table[9]), 0);
	done();
}

int main(void)
{
	static const struct test tests[] = {
		{"a grant is granted, mapped, unmapped and ended, with Xen's flags at each step", life},
		{"what was not granted, or not so, or not to this domain, cannot be mapped", refused},
		{"a grant that is mapped does not end and stays valid", deferred},
		{"the maps of a dead mapper are taken back", dead},
		{"a map that was noted and not counted takes nothing from an idle grant", half_mapped},
		{"grants of several arenas lie one after the other in one range", contiguous},
		{"a read-only mapping cannot be written, and a read-only grant not mapped otherwise",
		 protection},
		{"what is mapped is no child's", forks},
		{"an arena that is missing is named, and nothing stays mapped", arenas},
		{"a page beyond its arena is refused, and found once the arena has grown", beyond},
		{"grants can be mapped over address space that is there", over},
		{"files that can shrink or are too short are refused", bad_files},
		{"an entry stands still while it is mapped, whoever ends it meanwhile", contended},
	};

	return RUN_TESTS(tests);
}
