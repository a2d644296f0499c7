/* SPDX-License-Identifier: BSD-2-Clause */
#include "direct.h"

#include <string.h>

#define COPY_IOV 64

_Static_assert(PVF_DISK_DEPTH <= PVF_PARTS_MOST, "every request can be in parts");

bool pvf_direct_ask(struct pvf_direct *d, uint16_t type, uint16_t flags, uint64_t offset,
		    uint32_t bytes, const struct iovec *iov, uint16_t iovs, uint64_t cookie)
{
	if (!d->frees)
		return false;
	uint16_t index = d->free[--d->frees];
	struct pvf_io *io = &d->io[index];

	io->cookie = cookie;
	io->iovs = iovs;
	for (uint16_t i = 0; i < iovs; i++)
		io->iov[i] = iov[i];
	d->used++;
	pvf_parts_ask(&d->parts, index, type, flags, offset, bytes);
	return true;
}

int pvf_direct_take(struct pvf_direct *d, struct pvf_disk_done *done, int max)
{
	int n;

	for (n = 0; n < max && d->done_count; n++) {
		uint16_t index = d->done[d->done_head];
		const struct pvf_whole *w = &d->parts.whole[index];

		d->done_head = (d->done_head + 1) % PVF_DISK_DEPTH;
		d->done_count--;
		done[n] = (struct pvf_disk_done){
			.cookie = d->io[index].cookie,
			.result = w->error ? -w->error : (int32_t)w->bytes,
		};
		d->free[d->frees++] = index;
		d->used--;
	}
	return n;
}

/* As requests in parts. */

/* Copies between a request's memory, from byte `at` on, and all of `pages`. */
static void copy(const struct pvf_io *io, size_t at, const struct iovec *pages, int n, bool to_pages)
{
	size_t done = 0; /* of the present entry of `pages` */
	int page = 0;

	for (uint32_t i = 0; i < io->iovs && page < n; i++) {
		const struct iovec *v = &io->iov[i];

		if (at >= v->iov_len) {
			at -= v->iov_len;
			continue;
		}
		while (at < v->iov_len && page < n) {
			unsigned char *theirs = (unsigned char *)v->iov_base + at;
			unsigned char *ours = (unsigned char *)pages[page].iov_base + done;
			size_t part = v->iov_len - at;

			if (part > pages[page].iov_len - done)
				part = pages[page].iov_len - done;
			if (to_pages)
				memcpy(ours, theirs, part);
			else
				memcpy(theirs, ours, part);
			at += part;
			done += part;
			if (done == pages[page].iov_len) {
				done = 0;
				page++;
			}
		}
		at = 0;
	}
}

static size_t fill(void *source, uint16_t index, uint32_t at, const struct iovec *pages, int n)
{
	const struct pvf_direct *d = source;
	size_t bytes = 0;

	for (int i = 0; i < n; i++)
		bytes += pages[i].iov_len;
	copy(&d->io[index], at, pages, n, true);
	return bytes;
}

static int take(void *source, const struct pvf_blk *blk, uint16_t index, uint32_t at,
		uint32_t bytes)
{
	const struct pvf_direct *d = source;
	struct iovec iov[COPY_IOV];
	uint32_t done = 0;

	while (done < bytes) {
		int n = pvf_blk_answer_data(blk, done, iov, COPY_IOV);

		PVF_ASSERT(n > 0);
		copy(&d->io[index], (size_t)at + done, iov, n, false);
		for (int i = 0; i < n; i++)
			done += (uint32_t)iov[i].iov_len;
	}
	return 0;
}

static void finish(void *source, uint16_t index)
{
	struct pvf_direct *d = source;

	PVF_ASSERT(d->done_count < PVF_DISK_DEPTH);
	d->done[(d->done_head + d->done_count++) % PVF_DISK_DEPTH] = index;
}

static const struct pvf_parts_ops ops = {.fill = fill, .take = take, .finish = finish};

void pvf_direct_init(struct pvf_direct *d)
{
	memset(d, 0, sizeof(*d));
	pvf_parts_init(&d->parts, &ops, d);
	d->frees = PVF_DISK_DEPTH;
	for (uint32_t i = 0; i < PVF_DISK_DEPTH; i++)
		d->free[i] = (uint16_t)(PVF_DISK_DEPTH - 1 - i);
}
