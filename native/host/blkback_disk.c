/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The storage of a disk. Memory is a memfd, mapped whole as long as that is reasonable; beyond, and
 * for files and block devices, pread and pwrite go straight to the granted pages (a file whose file
 * system is full then gives an error, where a mapping would give a signal). Everything is sparse, and
 * reading keeps it so: what was never written is not looked at, since a look would allocate it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blkback_int.h"

#define MAPPED_MAX (UINT64_C(1) << 40)
#define BYTES_MAX ((uint64_t)INT64_MAX)
#define CHUNK_SHIFT 21
#define CHUNK (UINT64_C(1) << CHUNK_SHIFT)

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

struct bb_extent {
	void *base;
	size_t bytes;
	struct bb_extent *next;
};

/* A mapping is never taken away while a ring may use it: a larger one is made beside it. */
static int map(struct bb_disk *disk, uint64_t bytes)
{
	unsigned char *base = NULL;

	if (disk->memory && bytes && bytes <= MAPPED_MAX) {
		struct bb_extent *extent = calloc(1, sizeof(*extent));

		if (!extent)
			return -ENOMEM;
		base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			    disk->fd, 0);
		if (base == MAP_FAILED) {
			free(extent);
			return -errno;
		}
		madvise(base, bytes, MADV_DONTFORK);
		*extent = (struct bb_extent){base, bytes, disk->extent};
		disk->extent = extent;
	}
	__atomic_store_n(&disk->base, base, __ATOMIC_RELEASE);
	return 0;
}

static int size_of(int fd, uint64_t *bytes)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if (S_ISBLK(st.st_mode))
		return ioctl(fd, BLKGETSIZE64, bytes) ? -errno : 0;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	*bytes = (uint64_t)st.st_size;
	return 0;
}

static int populate(struct bb_disk *disk)
{
	if (!disk->base)
		return -EINVAL;
	memset(disk->written, 1, (disk->held >> CHUNK_SHIFT) + 1);
	return madvise(disk->base, disk->held, MADV_POPULATE_WRITE) ? -errno : 0;
}

int bb_disk_open(struct bb_disk *disk, const char *path, uint64_t bytes, uint32_t flags)
{
	bool read_only = flags & PVF_BB_READ_ONLY;
	uint64_t size = bytes;
	int rc = 0;

	if (bytes > BYTES_MAX)
		return -EFBIG;
	*disk = (struct bb_disk){.memory = !path};
	disk->fd = path ? open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC)
			: memfd_create("disk", MFD_CLOEXEC);
	if (disk->fd < 0)
		return -errno;
	if (path)
		rc = size_of(disk->fd, &size);
	else if (ftruncate(disk->fd, (off_t)bytes))
		rc = -errno;
	if (!rc && bytes > size)
		rc = -EFBIG;
	disk->held = size;
	disk->bytes = bytes ? bytes : size;
	if (!rc && disk->memory) {
		disk->written = calloc(MAPPED_MAX >> CHUNK_SHIFT, 1);
		rc = disk->written ? 0 : -ENOMEM;
	}
	if (!rc)
		rc = map(disk, disk->bytes);
	if (!rc && flags & PVF_BB_POPULATE)
		rc = populate(disk);
	if (rc)
		bb_disk_close(disk);
	return rc;
}

void bb_disk_close(struct bb_disk *disk)
{
	while (disk->extent) {
		struct bb_extent *extent = disk->extent;

		disk->extent = extent->next;
		munmap(extent->base, extent->bytes);
		free(extent);
	}
	free(disk->written);
	disk->written = NULL;
	if (disk->fd >= 0)
		close(disk->fd);
	disk->fd = -1;
}

int bb_disk_resize(struct bb_disk *disk, uint64_t bytes)
{
	if (bytes > BYTES_MAX)
		return -EFBIG;
	if (bytes > disk->held) {
		int rc;

		if (ftruncate(disk->fd, (off_t)bytes))
			return -errno;
		rc = map(disk, bytes);
		if (rc)
			return rc;
		disk->held = bytes;
	}
	__atomic_store_n(&disk->bytes, bytes, __ATOMIC_RELEASE);
	return 0;
}

uint64_t bb_disk_bytes(const struct bb_disk *disk)
{
	return __atomic_load_n(&disk->bytes, __ATOMIC_ACQUIRE);
}

static int copy(struct bb_disk *disk, unsigned char *base, bool write, uint64_t at,
		unsigned char *memory, size_t n)
{
	while (n) {
		uint8_t *written = &disk->written[at >> CHUNK_SHIFT];
		uint64_t left = CHUNK - (at & (CHUNK - 1));
		size_t now = n < left ? n : (size_t)left;

		if (write) {
			if (!LOAD(*written))
				STORE(*written, 1);
			memcpy(base + at, memory, now);
		} else if (LOAD(*written)) {
			memcpy(memory, base + at, now);
		} else {
			memset(memory, 0, now);
		}
		memory += now;
		at += now;
		n -= now;
	}
	return 0;
}

int bb_disk_io(struct bb_disk *disk, bool write, uint64_t at, unsigned char *memory, size_t n)
{
	unsigned char *base = __atomic_load_n(&disk->base, __ATOMIC_ACQUIRE);

	if (base)
		return copy(disk, base, write, at, memory, n);
	while (n) {
		ssize_t done = write ? pwrite(disk->fd, memory, n, (off_t)at)
				     : pread(disk->fd, memory, n, (off_t)at);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		memory += done;
		at += (uint64_t)done;
		n -= (size_t)done;
	}
	return 0;
}

int bb_disk_flush(struct bb_disk *disk)
{
	return disk->memory || !fdatasync(disk->fd) ? 0 : -errno;
}

int bb_disk_discard(struct bb_disk *disk, uint64_t at, uint64_t n, uint32_t granularity,
		    uint32_t alignment)
{
	uint64_t offset = alignment % granularity;
	/* Of the granules that begin at offset + k * granularity, those within at .. at + n. */
	uint64_t first = at <= offset ? 0 : (at - offset + granularity - 1) / granularity;
	uint64_t last = at + n < offset ? 0 : (at + n - offset) / granularity;

	if (first >= last)
		return 0;
	if (fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      (off_t)(offset + first * granularity),
		      (off_t)((last - first) * granularity)))
		return -errno;
	return 0;
}
