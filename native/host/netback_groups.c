/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Which multicast packets a frontend listens to, as Linux's netback has it (xenvif_mcast_*): the list is kept
 * whether or not it is asked for, an address that was added twice is there twice, and broadcasts always pass.
 */
#include <string.h>

#include "netback_int.h"

static uint32_t find(const struct nb_groups *g, const uint8_t *address)
{
	uint32_t at = 0;

	while (at < g->count && memcmp(g->address[at], address, 6))
		at++;
	return at;
}

bool nb_group_add(struct pvf_nb *nb, const uint8_t address[6])
{
	struct nb_groups *g = &nb->groups;

	pthread_mutex_lock(&nb->lock);
	bool room = g->count < NB_GROUPS;

	if (room)
		memcpy(g->address[g->count++], address, 6);
	pthread_mutex_unlock(&nb->lock);
	return room;
}

void nb_group_delete(struct pvf_nb *nb, const uint8_t address[6])
{
	struct nb_groups *g = &nb->groups;

	pthread_mutex_lock(&nb->lock);
	uint32_t at = find(g, address);

	if (at < g->count)
		memmove(g->address[at], g->address[--g->count], 6);
	pthread_mutex_unlock(&nb->lock);
}

bool nb_group_passes(struct pvf_nb *nb, const uint8_t *frame, uint32_t size)
{
	static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

	if (!LOAD(nb->groups.filter) || size < 6 || !(frame[0] & 1) || !memcmp(frame, broadcast, 6))
		return true;
	pthread_mutex_lock(&nb->lock);
	bool passes = find(&nb->groups, frame) < nb->groups.count;

	pthread_mutex_unlock(&nb->lock);
	return passes;
}

void pvf_nb_set_filter(struct pvf_nb *nb, bool on)
{
	STORE(nb->groups.filter, on);
}
