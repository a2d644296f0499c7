/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The frontend that the fuzzers of the embedded host's backends play: its grant table, its pages (one
 * arena, the rings' first), its event channel, and what it may do to them at any time. A fuzzer defines
 * PAGES, RINGS and REFS before it includes this.
 */
#ifndef PVF_FUZZ_FRONTEND_H
#define PVF_FUZZ_FRONTEND_H

#include "fuzz.h"

#include <sys/mman.h>

#define FRONT 7
#define BACK 0
#define ARENA 3
#define PAGE 4096u
#define REF(page) (20u + 3u * (page))

static struct pvf_grant *table;
static unsigned char *arena;
static struct pvf_channel *channel;

static void *memory(size_t bytes, int *fd)
{
	*fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(*fd >= 0 && !ftruncate(*fd, (off_t)bytes) && !fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK));
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

/* Grant the pages that are no ring's, every fourth of them to be read only. */
static void grants(void)
{
	for (uint32_t i = RINGS; i < PAGES; i++)
		if (!pvf_grant_maps(&table[REF(i)]))
			pvf_grant_begin(&table[REF(i)], BACK, ARENA, i, i % 4 != 3);
}

/* A reference: of a page (most), beside one (some), or any. */
static uint32_t a_ref(struct input *in)
{
	uint32_t n = upto(in, 256);

	return n < PAGES ? REF(n) : n < 250 ? REF(n % PAGES) + n / 128 : (uint32_t)number(in, 4);
}

static void mutate(struct input *in)
{
	uint32_t n;

	switch (upto(in, 5)) {
	case 0:
		arena[upto(in, RINGS * PAGE)] = (unsigned char)number(in, 1);
		break;
	case 1: /* an index */
		((uint32_t *)(void *)(arena + upto(in, RINGS) * PAGE))[upto(in, 4)] +=
			(uint32_t)(int8_t)number(in, 1);
		break;
	case 2: /* not the word, with which the maps are counted, nor what has a map: the hub's rules */
		n = a_ref(in) % REFS;
		if (pvf_grant_maps(&table[n]))
			break;
		table[n].domid = (uint16_t)upto(in, 2);
		table[n].arena = upto(in, 4) ? ARENA : (uint16_t)number(in, 2);
		table[n].page = upto(in, 4) ? upto(in, PAGES) : (uint32_t)number(in, 4);
		break;
	case 3:
		n = REF(RINGS + upto(in, PAGES - RINGS));
		if (upto(in, 2))
			pvf_grant_end(&table[n]);
		else if (!pvf_grant_maps(&table[n]))
			pvf_grant_begin(&table[n], BACK, ARENA, upto(in, PAGES), upto(in, 2));
		break;
	default:
		((unsigned char *)channel)[upto(in, 256)] = (unsigned char)number(in, 1);
	}
}

/* What is mapped at the end of an input: nothing but the rings. */
static void only_the_rings_are_mapped(void)
{
	uint32_t maps = 0;

	for (uint32_t i = 0; i < REFS; i++)
		maps += pvf_grant_maps(&table[i]);
	CHECK_EQ(maps, RINGS);
	for (uint32_t i = 0; i < REFS; i++)
		if (table[i].word && !pvf_grant_maps(&table[i]))
			memset(&table[i], 0, sizeof(table[i]));
}

/* Table, pages, channel, made once; the descriptors of each. The rings' pages are granted. */
static void frontend_once(int *table_fd, int *track_fd, int *arena_fd, int *channel_fd)
{
	table = memory(PVF_GRANTS * sizeof(*table), table_fd);
	memory(PVF_GRANTS * sizeof(uint32_t), track_fd);
	arena = memory(PAGES * PAGE, arena_fd);
	channel = memory(PAGE, channel_fd);
	pvf_channel_init(channel);
	for (uint32_t i = 0; i < RINGS; i++)
		pvf_grant_begin(&table[REF(i)], BACK, ARENA, i, true);
}

#endif
