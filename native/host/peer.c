/* SPDX-License-Identifier: BSD-2-Clause */
#include "peer.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARENAS 65536u
#define PAGE 4096u
#define HUB_DEADLINE 5000 /* ms */

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)

/* One question to the hub (docs/host.md). A descriptor, or -errno. */
static int ask_hub(const struct pvf_peer *peer, uint16_t number)
{
	char text[512];
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {text, sizeof(text) - 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	struct pollfd ready = {.fd = peer->hub_fd, .events = POLLIN};
	int fd = -1;

	if (peer->hub_fd < 0)
		return -ENXIO;
	int n = snprintf(text, sizeof(text), "{\"do\": \"arena\", \"domid\": %u, \"arena\": %u}",
			 peer->domid, number);

	if (send(peer->hub_fd, text, (size_t)n, MSG_NOSIGNAL) != n)
		return -EPIPE;
	if (poll(&ready, 1, HUB_DEADLINE) != 1)
		return -ETIMEDOUT;
	if (recvmsg(peer->hub_fd, &msg, MSG_CMSG_CLOEXEC) <= 0)
		return -EPIPE;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
			memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	return fd < 0 ? -ENXIO : fd;
}

/* Maps as much of an arena as there is; under the lock. */
static int map_arena(struct pvf_peer *peer, uint16_t number)
{
	int fd = peer->descriptor[number].fd;
	struct pvf_peer_arena *arena;
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if (peer->arena[number] && (uint64_t)st.st_size <= peer->arena[number]->bytes)
		return 0;
	arena = calloc(1, sizeof(*arena));
	if (!arena)
		return -ENOMEM;
	arena->bytes = (uint64_t)st.st_size;
	arena->base = mmap(NULL, arena->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (arena->base == MAP_FAILED) {
		int error = errno;

		free(arena);
		return -error;
	}
	madvise(arena->base, arena->bytes, MADV_DONTFORK);
	arena->older = peer->arena[number];
	__atomic_store_n(&peer->arena[number], arena, __ATOMIC_RELEASE);
	return 0;
}

/* Makes sure that an arena is there as far as page `page`. */
static int want_arena(struct pvf_peer *peer, uint16_t number, uint32_t page)
{
	int rc = 0;

	pthread_mutex_lock(&peer->lock);
	if (peer->descriptor[number].fd < 0) {
		int fd = ask_hub(peer, number);

		rc = fd < 0 ? fd : pvf_mapper_arena(&peer->mapper, number, fd);
		if (rc && fd >= 0)
			close(fd);
	}
	if (!rc)
		rc = map_arena(peer, number);
	if (!rc && ((uint64_t)page + 1) * PAGE > peer->arena[number]->bytes)
		rc = -EFAULT;
	pthread_mutex_unlock(&peer->lock);
	return rc;
}

int pvf_peer_map(struct pvf_peer *peer, uint32_t ref, bool writable, unsigned char **page)
{
	struct pvf_mapper *m = &peer->mapper;
	int rc = pvf_grant_map(m->table, m->maptrack, m->domid, ref, writable);

	if (rc)
		return rc;
	/* Mapped, the entry stands still; it is shared all the same, so what was read once counts. */
	uint16_t number = LOAD(m->table[ref].arena);
	uint32_t n = LOAD(m->table[ref].page);
	uint64_t at = (uint64_t)n * PAGE;
	struct pvf_peer_arena *arena = __atomic_load_n(&peer->arena[number], __ATOMIC_ACQUIRE);

	if (!arena || at + PAGE > arena->bytes) {
		rc = want_arena(peer, number, n);
		if (rc) {
			pvf_grant_unmap(m->table, m->maptrack, ref);
			return rc;
		}
		arena = __atomic_load_n(&peer->arena[number], __ATOMIC_ACQUIRE);
	}
	*page = arena->base + at;
	return 0;
}

void pvf_peer_unmap(struct pvf_peer *peer, uint32_t ref)
{
	pvf_grant_unmap(peer->mapper.table, peer->mapper.maptrack, ref);
}

int pvf_peer_map_ring(struct pvf_peer *peer, const uint32_t *refs, uint32_t count, void **where,
		      uint32_t *failed)
{
	uint32_t arena = 0;
	int rc;

	while ((rc = pvf_mapper_map(&peer->mapper, refs, count, true, where, failed, &arena)) ==
		       -ENXIO &&
	       peer->descriptor[arena].fd < 0)
		if (want_arena(peer, (uint16_t)arena, 0))
			break;
	return rc;
}

int pvf_peer_arena(struct pvf_peer *peer, uint16_t number, int fd)
{
	int own = dup(fd), rc;

	if (own < 0)
		return -errno;
	rc = pvf_mapper_arena(&peer->mapper, number, own);
	if (rc)
		close(own);
	return rc;
}

void pvf_peer_close(struct pvf_peer *peer)
{
	for (uint32_t i = 0; i < ARENAS; i++) {
		while (peer->arena && peer->arena[i]) {
			struct pvf_peer_arena *arena = peer->arena[i];

			peer->arena[i] = arena->older;
			munmap(arena->base, arena->bytes);
			free(arena);
		}
		if (peer->descriptor && peer->descriptor[i].fd >= 0)
			close(peer->descriptor[i].fd);
	}
	if (peer->mapper.table)
		pvf_mapper_close(&peer->mapper);
	pthread_mutex_destroy(&peer->lock);
	free(peer->arena);
	free(peer->descriptor);
}

int pvf_peer_open(struct pvf_peer *peer, int table_fd, int maptrack_fd, uint16_t own_domid,
		  uint16_t domid, int hub_fd)
{
	int rc;

	*peer = (struct pvf_peer){.domid = domid, .hub_fd = hub_fd};
	pthread_mutex_init(&peer->lock, NULL);
	peer->arena = calloc(ARENAS, sizeof(struct pvf_peer_arena *));
	peer->descriptor = calloc(ARENAS, sizeof(*peer->descriptor));
	rc = peer->arena && peer->descriptor ? 0 : -ENOMEM;
	for (uint32_t i = 0; peer->descriptor && i < ARENAS; i++)
		peer->descriptor[i].fd = -1;
	if (!rc)
		rc = pvf_mapper_open(&peer->mapper, table_fd, maptrack_fd, own_domid,
				     peer->descriptor, ARENAS);
	if (rc) {
		peer->mapper.table = NULL;
		pvf_peer_close(peer);
	}
	return rc;
}
