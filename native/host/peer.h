/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a backend of the embedded host has of its frontend's domain: the grant table, and the memory that
 * was granted. Each arena is mapped once, as a whole, so that mapping a reference is a compare-and-swap
 * and no system call.
 */
#ifndef PVF_HOST_PEER_H
#define PVF_HOST_PEER_H

#include <pthread.h>

#include "grants.h"

struct pvf_peer_arena {
	unsigned char *base;
	uint64_t bytes;
	struct pvf_peer_arena *older; /* smaller mappings of the same arena, still pointed into */
};

struct pvf_peer {
	struct pvf_mapper mapper;
	struct pvf_arena *descriptor; /* the mapper's, by number */
	uint16_t domid;               /* who grants */
	int hub_fd;
	pthread_mutex_t lock;          /* arenas */
	struct pvf_peer_arena **arena; /* by number; read without the lock */
};

/* The granting domain's table and our maptrack; arenas are fetched from the hub over `hub_fd`, a gntdev
 * connection that nobody else uses any more (-1: only by pvf_peer_arena()). The descriptors stay the
 * caller's, and must stay open until pvf_peer_close(). 0, or -errno and nothing is held. */
int pvf_peer_open(struct pvf_peer *peer, int table_fd, int maptrack_fd, uint16_t own_domid,
		  uint16_t domid, int hub_fd);
void pvf_peer_close(struct pvf_peer *peer);

/* Gives an arena that the hub need not be asked for. 0 or -errno. */
int pvf_peer_arena(struct pvf_peer *peer, uint16_t number, int fd);

/* Maps one page: 0, or -errno as pvf_grant_map() has them. From any thread. */
int pvf_peer_map(struct pvf_peer *peer, uint32_t ref, bool writable, unsigned char **page);
void pvf_peer_unmap(struct pvf_peer *peer, uint32_t ref);

/* Maps `count` pages, writable, one behind the other: a ring. As pvf_mapper_map(). */
int pvf_peer_map_ring(struct pvf_peer *peer, const uint32_t *refs, uint32_t count, void **where,
		      uint32_t *failed);

#endif
