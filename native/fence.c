/* SPDX-License-Identifier: BSD-2-Clause */
#include "fence.h"

#include <sys/ioctl.h>

#define SECOND 1000000000ull

enum pvf_fence_state pvf_fence_look(struct pvf_fence *f, uint32_t queues, uint64_t now)
{
	if (queues < 2)
		return PVF_FENCE_OPEN;
	if (__atomic_load_n(&f->closed, __ATOMIC_SEQ_CST))
		return PVF_FENCE_CLOSED;
	for (uint32_t i = 0; i < queues; i++) {
		uint64_t since = __atomic_load_n(&f->queue[i].since, __ATOMIC_SEQ_CST);

		if (since && now > since && now - since >= PVF_NBD_PATIENCE_SECONDS * SECOND) {
			pvf_fence_close(f);
			return PVF_FENCE_OVERDUE;
		}
	}
	return PVF_FENCE_OPEN;
}

void pvf_fence_close(struct pvf_fence *f)
{
	__atomic_store_n(&f->closed, 1, __ATOMIC_SEQ_CST);
}

void pvf_fence_open(struct pvf_fence *f)
{
	__atomic_store_n(&f->closed, 0, __ATOMIC_SEQ_CST);
}

void pvf_fence_show(struct pvf_fence *f, uint32_t queue, uint64_t since)
{
	if (__atomic_load_n(&f->queue[queue].since, __ATOMIC_RELAXED) != since)
		__atomic_store_n(&f->queue[queue].since, since, __ATOMIC_SEQ_CST);
}

void pvf_unread_update(struct pvf_unread *u, int fd, uint64_t now, bool dry, uint32_t left)
{
	if (dry && !left) {
		u->since = u->mark_at = 0;
		return;
	}
	if (!u->since)
		u->since = now;
	/* A stream that is never read dry is not old: a mark says when all that stood before it has
	 * been parsed. One a second, so that it costs nothing. */
	if (u->mark_at && u->received - left >= u->mark) {
		u->since = u->mark_at;
		u->mark_at = 0;
	}
	if (!u->mark_at && now - u->since >= SECOND) {
		int waiting = 0;

		ioctl(fd, FIONREAD, &waiting);
		u->mark = u->received + (uint32_t)waiting;
		u->mark_at = now;
	}
}
