/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A Xen disk for one program, without the kernel's block layer and without another process on the
 * data path. docs/direct.md is the manual; `pvfront vbd lend NAME -- PROGRAM` starts a program
 * that finds a disk with pvf_disk_open().
 *
 *     struct pvf_disk *disk;
 *     struct pvf_disk_done done[32];
 *
 *     if ((error = pvf_disk_open(NULL, &disk)) < 0) ...
 *     pvf_disk_read(disk, buffer, 4096, 0, 1);
 *     n = pvf_disk_wait(disk, done, 32, -1);            // done[0].cookie == 1, .result == 4096
 *     pvf_disk_close(disk);
 *
 * Errors are negative errno values. Every function may be called by any thread at any time: a disk
 * has one lock. Completions go to whoever asks; one thread for each disk is fastest.
 *
 * A request that was accepted completes exactly once, with the number of its bytes or an error. Its
 * buffers belong to the library until then. Requests under way are done in any order: who needs an
 * order waits for completions. If the backend goes away, requests wait, and those under way are
 * sent again to the next connection; they fail, with -EIO or -ENODEV, only when the disk is gone
 * for good.
 */
#ifndef PVFRONT_DISK_H
#define PVFRONT_DISK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PVF_DISK_VARIABLE "PVFRONT_LENT" /* environment: the disks that are lent, "xvdb=5,xvdc=6" */
#define PVF_DISK_DEPTH 256            /* requests that are accepted and have not completed */
#define PVF_DISK_IOV 64               /* entries of a request's vector */
#define PVF_DISK_MAX_BYTES (32u << 20) /* of one read or write */

struct pvf_disk;

enum pvf_disk_flag {
	PVF_DISK_READ_ONLY = 1,
	PVF_DISK_FLUSH = 2,   /* there is a cache to flush, and a way to do it: flush, FUA */
	PVF_DISK_DISCARD = 4,
};

enum pvf_disk_state {
	PVF_DISK_WAITING = 0, /* for its backend, the first time or again: requests wait */
	PVF_DISK_READY = 1,
	PVF_DISK_GONE = 2,    /* for good: taken back, or its lender has ended */
};

struct pvf_disk_info {
	uint64_t size;        /* bytes; 0 before it was first ready. It may change: a resize */
	uint32_t sector_size; /* bytes: offsets and lengths are multiples of it */
	uint32_t flags;       /* enum pvf_disk_flag */
	uint32_t discard_granularity; /* bytes */
	uint32_t discard_alignment;
	uint32_t state;       /* enum pvf_disk_state */
	uint32_t generation;  /* connections to the backend so far; above 1: requests were sent again */
	uint32_t pending;     /* requests accepted and not completed */
	uint32_t unused;
	char name[64];        /* "vbd-51728" */
};

struct pvf_disk_done {
	uint64_t cookie;
	int32_t result; /* bytes (0: a flush), or negative errno */
	uint32_t unused;
};

/* Opens a disk that was lent to this process, `name` ("xvdb") or, NULL, the first, and waits until it is
 * ready. Once for each process. -ENODEV: it was not lent; -EBUSY: it was opened already; -ETIMEDOUT:
 * its backend did not connect within 60 s. */
int pvf_disk_open(const char *name, struct pvf_disk **disk);

/* The same with the descriptor of the control connection, which is the library's then, and without
 * waiting: see pvf_disk_ready(). */
int pvf_disk_open_fd(int fd, struct pvf_disk **disk);

/* Waits up to `timeout` ms (-1: without end) until the disk is ready. 0, -ETIMEDOUT, -ENODEV. */
int pvf_disk_ready(struct pvf_disk *disk, int timeout);

/* Gives the disk back. The backend gets two seconds to finish what it has begun; requests that have
 * not completed are forgotten: what they write may or may not reach the disk. No other call may be
 * under way, and memory that was lent is there no more. */
void pvf_disk_close(struct pvf_disk *disk);

void pvf_disk_get_info(struct pvf_disk *disk, struct pvf_disk_info *info);

/* Requests. 0: accepted. -EAGAIN: PVF_DISK_DEPTH are under way; -EINVAL: not whole sectors, beyond
 * the end, too many entries; -EROFS, -EOPNOTSUPP: the disk does not have that; -ENOTCONN: it was
 * never ready; -ENODEV: it is gone.
 * They go to the backend with the next pvf_disk_submit(), _poll() or _wait(), together. */
int pvf_disk_read(struct pvf_disk *disk, void *buffer, size_t bytes, uint64_t offset,
		  uint64_t cookie);
int pvf_disk_write(struct pvf_disk *disk, const void *buffer, size_t bytes, uint64_t offset,
		   uint64_t cookie);
int pvf_disk_readv(struct pvf_disk *disk, const struct iovec *iov, int count, uint64_t offset,
		   uint64_t cookie);
/* `flags`: PVF_DISK_FUA, on stable storage when it completes. */
#define PVF_DISK_FUA 1u
int pvf_disk_writev(struct pvf_disk *disk, const struct iovec *iov, int count, uint64_t offset,
		    uint32_t flags, uint64_t cookie);
/* Writes that completed before this was asked are on stable storage when it completes. */
int pvf_disk_flush(struct pvf_disk *disk, uint64_t cookie);
/* Advice: what is no whole granule of the backend's is left as it is. At most 1 GiB. */
int pvf_disk_discard(struct pvf_disk *disk, size_t bytes, uint64_t offset, uint64_t cookie);

/* Shows the backend what was asked; one notification for all of it, or none. 0 or -ENODEV. */
int pvf_disk_submit(struct pvf_disk *disk);

/* Submits, and returns what has completed, up to `max`; never sleeps. As long as this is called the
 * backend is not asked for events: one who calls it in a loop costs neither end an interrupt. */
int pvf_disk_poll(struct pvf_disk *disk, struct pvf_disk_done *done, int max);

/* The same, but sleeps up to `timeout` ms (-1: without end) while nothing has completed. 0: nothing
 * came in time, or nothing is under way. */
int pvf_disk_wait(struct pvf_disk *disk, struct pvf_disk_done *done, int max, int timeout);

/* For a program with an event loop of its own: a descriptor that becomes readable when there may be
 * completions, after pvf_disk_arm() has returned 0. 1: there are some now, do not sleep. Once it is
 * readable, pvf_disk_poll() until it returns less than `max`, and arm again. */
int pvf_disk_fd(const struct pvf_disk *disk);
int pvf_disk_arm(struct pvf_disk *disk);

#ifdef __cplusplus
}
#endif

#endif
