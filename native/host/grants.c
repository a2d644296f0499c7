/* SPDX-License-Identifier: BSD-2-Clause */
#include "grants.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <xen/xen.h>
#include <xen/grant_table.h>

#include "memfd.h"

#define PAGE 4096u
#define ONE_MAP (1u << PVF_GRANT_COUNT_SHIFT)
#define MAX_MAPS (UINT32_MAX >> PVF_GRANT_COUNT_SHIFT)
#define TABLE_BYTES (PVF_GRANTS * sizeof(struct pvf_grant))
#define TRACK_BYTES (PVF_GRANTS * sizeof(uint32_t))

static uint32_t load(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

/* On failure `*old` is what was there. */
static bool swap(uint32_t *word, uint32_t *old, uint32_t new)
{
	return __atomic_compare_exchange_n(word, old, new, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

static uint32_t maps_of(uint32_t word)
{
	return word >> PVF_GRANT_COUNT_SHIFT;
}

/* Takes up to `n` maps away. */
static void uncount(struct pvf_grant *grant, uint32_t n)
{
	uint32_t old = load(&grant->word), new;

	do {
		uint32_t maps = maps_of(old);

		new = old - (n < maps ? n : maps) * ONE_MAP;
		if (!maps_of(new))
			new &= ~(uint32_t)(GTF_reading | GTF_writing);
	} while (!swap(&grant->word, &old, new));
}

/* The hub */

void pvf_grant_begin(struct pvf_grant *grant, uint16_t domid, uint16_t arena, uint32_t page,
		     bool writable)
{
	grant->domid = domid;
	grant->arena = arena;
	grant->page = page;
	__atomic_store_n(&grant->word, GTF_permit_access | (writable ? 0 : GTF_readonly),
			 __ATOMIC_SEQ_CST);
}

int pvf_grant_end(struct pvf_grant *grant)
{
	uint32_t old = load(&grant->word);

	do {
		if (maps_of(old))
			return -EBUSY;
	} while (!swap(&grant->word, &old, GTF_invalid));
	return 0;
}

uint32_t pvf_grant_maps(const struct pvf_grant *grant)
{
	return maps_of(load(&grant->word));
}

uint32_t pvf_grant_reclaim(struct pvf_grant *table, uint32_t *maptrack)
{
	uint32_t total = 0;

	for (uint32_t ref = 0; ref < PVF_GRANTS; ref++) {
		uint32_t noted = __atomic_exchange_n(&maptrack[ref], 0, __ATOMIC_SEQ_CST);

		if (noted)
			uncount(&table[ref], noted);
		total += noted;
	}
	return total;
}

/* Mappers */

int pvf_grant_map(struct pvf_grant *table, uint32_t *maptrack, uint16_t domid, uint32_t ref,
		  bool writable)
{
	int rc = 0;

	if (ref >= PVF_GRANTS)
		return -EINVAL;
	struct pvf_grant *grant = &table[ref];
	uint32_t used = writable ? GTF_reading | GTF_writing : GTF_reading;
	uint32_t old = load(&grant->word);

	__atomic_fetch_add(&maptrack[ref], 1, __ATOMIC_SEQ_CST);
	do {
		if ((old & GTF_type_mask) != GTF_permit_access)
			rc = -EINVAL;
		else if (writable && old & GTF_readonly)
			rc = -EPERM;
		else if (maps_of(old) == MAX_MAPS)
			rc = -EBUSY;
	} while (!rc && !swap(&grant->word, &old, (old | used) + ONE_MAP));
	if (rc) {
		__atomic_fetch_sub(&maptrack[ref], 1, __ATOMIC_SEQ_CST);
		return rc;
	}
	/* Only now does the entry stand still. */
	if (grant->domid != domid) {
		pvf_grant_unmap(table, maptrack, ref);
		return -EPERM;
	}
	return 0;
}

int pvf_grant_unmap(struct pvf_grant *table, uint32_t *maptrack, uint32_t ref)
{
	if (ref >= PVF_GRANTS || !load(&maptrack[ref]))
		return -EINVAL;
	uncount(&table[ref], 1);
	__atomic_fetch_sub(&maptrack[ref], 1, __ATOMIC_SEQ_CST);
	return 0;
}

/* Memory */

int pvf_mapper_open(struct pvf_mapper *mapper, int table_fd, int maptrack_fd, uint16_t domid,
		    struct pvf_arena *arena, uint32_t arenas)
{
	void *table, *track;
	int rc = pvf_memfd_map(table_fd, TABLE_BYTES, true, &table);

	if (rc)
		return rc;
	rc = pvf_memfd_map(maptrack_fd, TRACK_BYTES, true, &track);
	if (rc) {
		munmap(table, TABLE_BYTES);
		return rc;
	}
	*mapper = (struct pvf_mapper){table, track, domid, arenas, arena};
	for (uint32_t i = 0; i < arenas; i++)
		arena[i] = (struct pvf_arena){.fd = -1};
	return 0;
}

void pvf_mapper_close(struct pvf_mapper *mapper)
{
	munmap(mapper->table, TABLE_BYTES);
	munmap(mapper->maptrack, TRACK_BYTES);
	mapper->table = NULL;
	mapper->maptrack = NULL;
}

int pvf_mapper_arena(struct pvf_mapper *mapper, uint32_t number, int fd)
{
	if (number >= mapper->arenas)
		return -EINVAL;
	int rc = pvf_memfd_check(fd, 0);

	if (!rc)
		mapper->arena[number] = (struct pvf_arena){.fd = fd};
	return rc;
}

/* Past its end a mapping faults, so look before. */
static bool covers(struct pvf_arena *arena, uint64_t end)
{
	struct stat st;

	if (end > arena->bytes && !fstat(arena->fd, &st))
		arena->bytes = (uint64_t)st.st_size;
	return end <= arena->bytes;
}

/* The table is shared with other mappers: what was read once counts, never the entry again. */
static uint32_t page_of(const struct pvf_grant *grant)
{
	return __atomic_load_n(&grant->page, __ATOMIC_RELAXED);
}

static uint16_t arena_of(const struct pvf_grant *grant)
{
	return __atomic_load_n(&grant->arena, __ATOMIC_RELAXED);
}

/* Maps the run of neighbours that begins with refs[0], all pinned, at `at`. Returns its length, or
 * -errno. */
static int map_run(struct pvf_mapper *m, const uint32_t *refs, uint32_t count, int protection,
		   unsigned char *at, uint32_t *arena)
{
	uint64_t page = page_of(&m->table[refs[0]]);
	uint32_t number = arena_of(&m->table[refs[0]]), n = 1;

	if (number >= m->arenas || m->arena[number].fd < 0) {
		*arena = number;
		return -ENXIO;
	}
	while (n < count && arena_of(&m->table[refs[n]]) == number &&
	       page_of(&m->table[refs[n]]) == page + n)
		n++;
	while (!covers(&m->arena[number], (page + n) * PAGE))
		if (!--n)
			return -EFAULT;
	if (mmap(at, (size_t)n * PAGE, protection, MAP_SHARED | MAP_FIXED, m->arena[number].fd,
		 (off_t)(page * PAGE)) == MAP_FAILED)
		return -errno;
	return (int)n;
}

static int map_pages(struct pvf_mapper *m, const uint32_t *refs, uint32_t count, bool writable,
		     void *over, uint32_t *failed, uint32_t *arena)
{
	int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ, run;

	for (uint32_t i = 0; i < count; i += (uint32_t)run) {
		*failed = i;
		run = map_run(m, refs + i, count - i, protection,
			      (unsigned char *)over + (size_t)i * PAGE, arena);
		if (run < 0)
			return run;
	}
	/* A child would keep the pages, and nobody would know. */
	return madvise(over, (size_t)count * PAGE, MADV_DONTFORK) ? -errno : 0;
}

int pvf_mapper_map_over(struct pvf_mapper *m, const uint32_t *refs, uint32_t count, bool writable,
			void *over, uint32_t *failed, uint32_t *arena)
{
	uint32_t pinned;
	int rc = count ? 0 : -EINVAL;

	*failed = *arena = 0;
	for (pinned = 0; !rc && pinned < count; pinned++) {
		rc = pvf_grant_map(m->table, m->maptrack, m->domid, refs[pinned], writable);
		if (rc) {
			*failed = pinned;
			break;
		}
	}
	if (!rc)
		rc = map_pages(m, refs, count, writable, over, failed, arena);
	if (rc)
		while (pinned)
			pvf_grant_unmap(m->table, m->maptrack, refs[--pinned]);
	return rc;
}

int pvf_mapper_map(struct pvf_mapper *m, const uint32_t *refs, uint32_t count, bool writable,
		   void **where, uint32_t *failed, uint32_t *arena)
{
	size_t bytes = (size_t)count * PAGE;
	void *base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
			  0);

	*failed = *arena = 0;
	if (base == MAP_FAILED)
		return -errno;
	int rc = pvf_mapper_map_over(m, refs, count, writable, base, failed, arena);

	if (rc)
		munmap(base, bytes);
	else
		*where = base;
	return rc;
}

void pvf_mapper_unmap(struct pvf_mapper *m, const uint32_t *refs, uint32_t count, void *where)
{
	munmap(where, (size_t)count * PAGE);
	for (uint32_t i = 0; i < count; i++)
		pvf_grant_unmap(m->table, m->maptrack, refs[i]);
}
