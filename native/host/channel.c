/* SPDX-License-Identifier: BSD-2-Clause */
#include "channel.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memfd.h"

#define CHANNEL_BYTES 4096

_Static_assert(sizeof(struct pvf_channel) <= CHANNEL_BYTES, "a channel fits into its page");

int pvf_channel_map(int fd, struct pvf_channel **channel)
{
	void *p;
	int rc = pvf_memfd_map(fd, CHANNEL_BYTES, true, &p);

	if (rc)
		return rc;
	if (((struct pvf_channel *)p)->magic != PVF_HOST_MAGIC) {
		munmap(p, CHANNEL_BYTES);
		return -EINVAL;
	}
	*channel = p;
	return 0;
}

void pvf_channel_unmap(struct pvf_channel *channel)
{
	munmap(channel, CHANNEL_BYTES);
}

void pvf_channel_init(struct pvf_channel *channel)
{
	memset(channel, 0, sizeof(*channel));
	channel->magic = PVF_HOST_MAGIC;
}

static int wake(int fd)
{
	const uint64_t one = 1;

	/* EAGAIN: the counter is full, so it is readable already. */
	return write(fd, &one, sizeof(one)) < 0 && errno != EAGAIN ? -errno : 0;
}

int pvf_channel_notify(struct pvf_channel *channel, uint32_t side, int other_fd)
{
	uint32_t old = __atomic_fetch_or(&channel->end[!side].flags, PVF_CHANNEL_PENDING,
					 __ATOMIC_SEQ_CST);

	return old & (PVF_CHANNEL_PENDING | PVF_CHANNEL_MASKED) ? 0 : wake(other_fd);
}

int pvf_channel_take(struct pvf_channel *channel, uint32_t side, int own_fd)
{
	uint32_t expected = PVF_CHANNEL_PENDING;
	uint64_t count;

	/* Empty (EAGAIN) or unreadable, the flags are what counts. */
	if (own_fd >= 0 && read(own_fd, &count, sizeof(count)) < 0)
		count = 0;
	return __atomic_compare_exchange_n(&channel->end[side].flags, &expected,
					   PVF_CHANNEL_MASKED, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

int pvf_channel_unmask(struct pvf_channel *channel, uint32_t side, int own_fd)
{
	uint32_t old = __atomic_fetch_and(&channel->end[side].flags, ~PVF_CHANNEL_MASKED,
					  __ATOMIC_SEQ_CST);

	return old & PVF_CHANNEL_PENDING ? wake(own_fd) : 0;
}
