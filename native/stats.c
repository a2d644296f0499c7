/* SPDX-License-Identifier: BSD-2-Clause */
#include "stats.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define FIRST offsetof(struct pvf_blk_stats, state)

_Static_assert(sizeof(struct pvf_blk_stats) <= PVF_PAGE_SIZE, "one page");
_Static_assert(sizeof(struct pvf_net_stats) <= PVF_PAGE_SIZE, "one page");
_Static_assert(offsetof(struct pvf_net_stats, state) == FIRST &&
	       offsetof(struct pvf_net_stats, queues) == offsetof(struct pvf_blk_stats, queues) &&
	       sizeof(struct pvf_net_stats) % 4 == 0, "one head for both");
_Static_assert(FIRST % 4 == 0 && sizeof(struct pvf_blk_stats) % 4 == 0, "copied in words");

int pvf_stats_open(struct pvf_stats *s, uint32_t queues)
{
	size_t size = (size_t)queues * PVF_PAGE_SIZE;
	char path[32];
	int fd = memfd_create("pvfront-stats", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return -errno;
	s->queues = queues;
	if (ftruncate(fd, (off_t)size))
		goto fail;
	s->shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (s->shared == MAP_FAILED)
		goto fail;
	if (fcntl(fd, F_ADD_SEALS,
		  F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL))
		goto fail;
	/* The seals are what counts; a descriptor open for reading only says so on top. */
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	s->fd = open(path, O_RDONLY | O_CLOEXEC);
	if (s->fd < 0)
		s->fd = fd;
	else
		close(fd);
	for (uint32_t i = 0; i < queues; i++) {
		struct pvf_blk_stats *page = pvf_stats_page(s, i);

		page->magic = PVF_STATS_MAGIC;
		page->version = PVF_STATS_VERSION;
	}
	return 0;
fail:;
	int error = errno;

	close(fd);
	return -error;
}

void pvf_stats_close(struct pvf_stats *s)
{
	if (s->fd < 0)
		return;
	munmap(s->shared, (size_t)s->queues * PVF_PAGE_SIZE);
	close(s->fd);
	s->fd = -1;
}

void *pvf_stats_page(const struct pvf_stats *s, uint32_t queue)
{
	return (void *)(s->shared + (size_t)queue * PVF_PAGE_SIZE);
}

void pvf_stats_publish(void *to_page, const void *now, size_t size)
{
	struct pvf_blk_stats *page = to_page;
	const uint32_t *from = (const uint32_t *)((const char *)now + FIRST);
	uint32_t *to = (uint32_t *)((char *)page + FIRST);
	uint32_t odd = page->sequence + 1;

	/* Acquire on the read-modify-write: no store below may be seen before it. */
	__atomic_exchange_n(&page->sequence, odd, __ATOMIC_ACQ_REL);
	for (size_t i = 0; i < (size - FIRST) / 4; i++)
		__atomic_store_n(&to[i], from[i], __ATOMIC_RELAXED);
	__atomic_store_n(&page->sequence, odd + 1, __ATOMIC_RELEASE);
}
