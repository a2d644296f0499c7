/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Shared memory that another process made. A peer that shrinks a memfd after we mapped it makes our
 * next access a SIGBUS, so nothing is mapped whose size is not sealed.
 */
#ifndef PVF_HOST_MEMFD_H
#define PVF_HOST_MEMFD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* -EINVAL unless `fd` is a memfd of at least `bytes` bytes that nobody can shrink (F_SEAL_SHRINK).
 * 0, or another -errno of fstat or fcntl. */
int pvf_memfd_check(int fd, uint64_t bytes);

/* Checks and maps its first `bytes` bytes, shared, not inherited by a child. 0 or -errno. */
int pvf_memfd_map(int fd, size_t bytes, bool writable, void **where);

#endif
