/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Multicast addresses that somebody behind a vif listens to, and what its backend was told of them.
 *
 * Theory of operation
 *
 *   A backend that was asked for multicast control passes on only what it is asked for (netif.h, "multicast
 *   control"). Who listens to what is learnt from the reports that the programs' kernel sends: IGMP (RFC 1112,
 *   2236, 3376) and MLD (RFC 2710, 3810). A report that only names sources counts as a join: netif knows
 *   addresses, not sources. Whoever joins is kept with the VLAN and the station it comes from: what one
 *   leaves, others may still listen to. Queries are not answered here, and nothing is forgotten with time.
 *
 *   Of two groups no report is ever sent: all systems (224.0.0.1, ff02::1). They are always listened to.
 *
 *   The set is the device's: any queue may see a report. The first queue tells the backend, one extra info in
 *   the TX ring for each address; what of that finds no room is told in a later turn. A new connection's
 *   backend is told everything.
 *
 * Limits: PVF_NET_GROUPS addresses, as netback has; what is more is counted (`lost`) and does not arrive.
 */
#ifndef PVF_GROUPS_H
#define PVF_GROUPS_H

#include <pthread.h>

#include "packet.h"
#include "pvf.h"

struct pvf_group { /* who listens to what */
	uint8_t station[6]; /* that reported it */
	uint8_t family;     /* 4, 6; 0: not by a report, only `mac` is known */
	uint8_t reserved;
	uint8_t tag[4];     /* the VLAN tag it came with, or 0 */
	uint8_t address[16];
	uint8_t mac[6];
};

struct pvf_group_set { /* plain data */
	uint32_t count, told;
	struct pvf_group group[PVF_NET_GROUPS];
	uint8_t mac_told[PVF_NET_GROUPS][6]; /* what the backend has been asked for */
	uint64_t lost;
};

struct pvf_groups {
	pthread_mutex_t lock;
	int wake_fd;    /* an eventfd of who tells the backend: news; -1: nobody is woken */
	uint32_t news;  /* atomic: there may be something to tell */
	uint32_t count; /* atomic, for statistics: as `set` has them */
	uint64_t lost;
	struct pvf_group_set set;
};

void pvf_groups_init(struct pvf_groups *groups);
void pvf_groups_free(struct pvf_groups *groups);

/* Looks at a packet that is sent: `have` bytes of `total`, nobody else's to change. */
void pvf_groups_snoop(struct pvf_groups *groups, const uint8_t *head, uint32_t have, uint32_t total);

/* The interface listens to exactly these: what else was learnt is forgotten. */
void pvf_groups_replace(struct pvf_groups *groups, const uint8_t (*mac)[6], uint32_t count);

/* Another backend, which knows of none. */
void pvf_groups_untold(struct pvf_groups *groups);

/* Tells what is to be told: `tell` says whether it could. True: all is told. */
bool pvf_groups_tell(struct pvf_groups *groups, bool (*tell)(void *arg, const uint8_t *mac, bool add),
		     void *arg);

/* Goes on with the set of a worker before. */
void pvf_groups_take_over(struct pvf_groups *groups, const struct pvf_group_set *set);

/* Whether a set that came from elsewhere can be. */
bool pvf_groups_possible(const struct pvf_group_set *set);

#endif
