/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The operations on a grant table of the embedded host: pvf_host.h has their rules.
 *
 * Theory of operation
 *
 *   An entry's `word` holds its flags and its number of maps, and changes by compare-and-swap only.
 *   While the number is not 0 the entry cannot end, so whoever has counted itself in ("pinned" the
 *   entry) may read the rest of it: who may map, which page of which arena.
 *
 *   A mapper first notes the map in its maptrack, then counts it in the table; the other way round
 *   on unmap. So a mapper that dies anywhere has noted at least what it counted, and pvf_grant_reclaim()
 *   finds it. Between the two steps it has noted one map too many: reclaim takes no more than there
 *   is, and where several processes map one reference at once it may take one of theirs.
 *
 *   A mapping of several references is one contiguous range: address space is reserved, and runs of
 *   neighbouring pages of one arena are mapped over it.
 */
#ifndef PVF_HOST_GRANTS_H
#define PVF_HOST_GRANTS_H

#include <stdbool.h>
#include <stddef.h>

#include "pvf_host.h"

/* For the hub. */

/* Makes a free entry (word 0) valid: domain `domid` may map page `page` of arena `arena`. */
void pvf_grant_begin(struct pvf_grant *grant, uint16_t domid, uint16_t arena, uint32_t page,
		     bool writable);

/* 0: nobody can map it any more, the entry is free; -EBUSY: it is mapped, and stays valid. */
int pvf_grant_end(struct pvf_grant *grant);

/* How many maps it has. */
uint32_t pvf_grant_maps(const struct pvf_grant *grant);

/* Undoes every map that a dead mapper's maptrack has noted, and clears it. Returns how many. */
uint32_t pvf_grant_reclaim(struct pvf_grant *table, uint32_t *maptrack);

/* For mappers. `table` and `maptrack` have PVF_GRANTS entries; references from outside are checked. */

/* Maps a grant for domain `domid`: from here on the entry stays as it is. 0, or
 *   -EINVAL  out of range, or not granted (GNTST_bad_gntref)
 *   -EPERM   granted to another domain, or read-only and `writable` (GNTST_permission_denied)
 *   -EBUSY   mapped 65535 times already (GNTST_no_space) */
int pvf_grant_map(struct pvf_grant *table, uint32_t *maptrack, uint16_t domid, uint32_t ref,
		  bool writable);

/* Undoes one pvf_grant_map(). 0, or -EINVAL: we have no map of it. */
int pvf_grant_unmap(struct pvf_grant *table, uint32_t *maptrack, uint32_t ref);

/* Memory. */

struct pvf_arena {
	int fd;         /* -1: we do not have it */
	uint64_t bytes; /* the size when last looked at; an arena only grows */
};

/* What one process maps of one granting domain. The descriptors are the caller's. */
struct pvf_mapper {
	struct pvf_grant *table;
	uint32_t *maptrack;
	uint16_t domid; /* who maps */
	uint32_t arenas;
	struct pvf_arena *arena; /* by number */
};

/* Maps the table's memfd and the maptrack's. 0 or -errno (-EINVAL: no sealed memfd of that size). */
int pvf_mapper_open(struct pvf_mapper *mapper, int table_fd, int maptrack_fd, uint16_t domid,
		    struct pvf_arena *arena, uint32_t arenas);
void pvf_mapper_close(struct pvf_mapper *mapper);

/* Takes an arena's memfd. 0, or -EINVAL: it can be shrunk, or has no such number. */
int pvf_mapper_arena(struct pvf_mapper *mapper, uint32_t number, int fd);

/* Maps `count` references one after the other into one range: `*where`, count pages, read-only
 * unless `writable`. On failure nothing is mapped and `*failed` is the index of the reference that
 * is to blame:
 *   as pvf_grant_map(), and
 *   -ENXIO   its arena (table[ref].arena at that moment, in `*arena`) is not there: get it, try again
 *   -EFAULT  its page lies beyond its arena
 *   or -errno of mmap */
int pvf_mapper_map(struct pvf_mapper *mapper, const uint32_t *refs, uint32_t count, bool writable,
		   void **where, uint32_t *failed, uint32_t *arena);

/* The same over `count` pages of address space that the caller has. On failure nothing is counted,
 * and some of them may be mapped: the caller gives the space up. */
int pvf_mapper_map_over(struct pvf_mapper *mapper, const uint32_t *refs, uint32_t count,
			bool writable, void *over, uint32_t *failed, uint32_t *arena);

/* Undoes it: the memory first, then the maps. */
void pvf_mapper_unmap(struct pvf_mapper *mapper, const uint32_t *refs, uint32_t count, void *where);

#endif
