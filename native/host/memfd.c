/* SPDX-License-Identifier: BSD-2-Clause */
#include "memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

int pvf_memfd_check(int fd, uint64_t bytes)
{
	/* The seal before the size, which may still fall until the seal is there. */
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;

	if (seals < 0)
		return -errno; /* EINVAL: no file, or of a file system without seals */
	if (!(seals & F_SEAL_SHRINK))
		return -EINVAL;
	if (fstat(fd, &st))
		return -errno;
	return (uint64_t)st.st_size < bytes ? -EINVAL : 0;
}

int pvf_memfd_map(int fd, size_t bytes, bool writable, void **where)
{
	int rc = pvf_memfd_check(fd, bytes);

	if (rc)
		return rc;
	/* The protections are constants, as the worker's system call filter wants them. */
	void *p = mmap(NULL, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd,
		       0);

	if (p == MAP_FAILED)
		return -errno;
	if (madvise(p, bytes, MADV_DONTFORK)) {
		int error = errno;

		munmap(p, bytes);
		return -error;
	}
	*where = p;
	return 0;
}
