/* SPDX-License-Identifier: BSD-2-Clause */
#include "port.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "scm.h"

static int map(int fd, uint64_t offset, size_t bytes, void **where)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);

	if (p == MAP_FAILED)
		return -errno;
	/* A child that inherited the mapping would keep the grants alive after us. */
	if (madvise(p, bytes, MADV_DONTFORK)) {
		int error = errno;

		munmap(p, bytes);
		return -error;
	}
	*where = p;
	return 0;
}

int pvf_port_map(struct pvf_port *port, int fd, const char **why)
{
	*why = "the ring cannot be mapped at its offset";
	int rc = map(fd, port->ring_offset, port->ring_bytes, &port->ring);

	if (rc)
		return rc;
	*why = "the pool cannot be mapped at its offset";
	rc = map(fd, port->pool_offset, port->pool_bytes, &port->pool);
	if (rc) {
		munmap(port->ring, port->ring_bytes);
		port->ring = NULL;
	}
	return rc;
}

void pvf_port_unmap(struct pvf_port *port)
{
	munmap(port->pool, port->pool_bytes);
	munmap(port->ring, port->ring_bytes);
	port->ring = port->pool = NULL;
}

static int recognise(struct pvf_port *port, const char **why)
{
	struct stat events, grants;

	*why = "a descriptor of ATTACH is unusable";
	if (fstat(port->event_source, &events) || fstat(port->grant_source, &grants))
		return -errno;
	if (S_ISCHR(events.st_mode)) {
		*why = "the event channel is a device, so the pages must be /dev/xen/gntalloc's";
		if (!S_ISCHR(grants.st_mode))
			return -EINVAL;
		port->ops = &pvf_port_xen;
		return 0;
	}
	*why = "the event channel is neither /dev/xen/evtchn nor a connection to an embedded host";
	if (!pvf_scm_packets(port->event_source))
		return -EINVAL;
	*why = "the event channel is an embedded host's, so the pages must be too";
	if (!pvf_scm_packets(port->grant_source))
		return -EINVAL;
	port->ops = &pvf_port_embedded;
	return 0;
}

int pvf_port_open(struct pvf_port *port, int event_fd, int grant_fd,
		  const struct pvf_ctl_attach *attach, const char **why)
{
	*port = (struct pvf_port){
		.event_fd = -1,
		.event_source = event_fd,
		.grant_source = grant_fd,
		.port = attach->port,
		.ring_bytes = (size_t)attach->ring_pages * PVF_PAGE_SIZE,
		.pool_bytes = (size_t)attach->pool_pages * PVF_PAGE_SIZE,
		.ring_offset = attach->ring_offset,
		.pool_offset = attach->pool_offset,
		.channel_fd = -1,
		.arena_fd = -1,
	};
	int rc = recognise(port, why);

	if (!rc)
		rc = port->ops->open(port, why);
	if (rc)
		port->event_fd = -1;
	return rc;
}

uint32_t pvf_port_share(const struct pvf_port *port, struct pvf_port_image *image, int *fds)
{
	*image = (struct pvf_port_image){
		.ring_offset = port->ring_offset,
		.pool_offset = port->pool_offset,
		.ring_pages = (uint32_t)(port->ring_bytes / PVF_PAGE_SIZE),
		.pool_pages = (uint32_t)(port->pool_bytes / PVF_PAGE_SIZE),
		.port = port->port,
		.side = port->side,
	};
	fds[0] = port->event_source;
	fds[1] = port->grant_source;
	return 2 + port->ops->share(port, fds + 2);
}

int pvf_port_take_over(struct pvf_port *port, const struct pvf_port_image *image, int *fds,
		       uint32_t count, const char **why)
{
	*why = "the pages of the ring or the pool are impossible";
	if (!image->ring_pages || image->ring_pages > PVF_MAX_RING_PAGES ||
	    image->pool_pages < 2 || image->pool_pages > PVF_MAX_POOL_PAGES ||
	    (image->ring_offset | image->pool_offset) % PVF_PAGE_SIZE ||
	    image->ring_offset > INT64_MAX / 2 || image->pool_offset > INT64_MAX / 2 ||
	    image->side > 1)
		return -EINVAL;
	*why = "descriptors of the port are missing";
	if (count < 2)
		return -EINVAL;
	*port = (struct pvf_port){
		.event_fd = -1,
		.event_source = fds[0],
		.grant_source = fds[1],
		.port = image->port,
		.ring_bytes = (size_t)image->ring_pages * PVF_PAGE_SIZE,
		.pool_bytes = (size_t)image->pool_pages * PVF_PAGE_SIZE,
		.ring_offset = image->ring_offset,
		.pool_offset = image->pool_offset,
		.side = image->side,
		.channel_fd = -1,
		.arena_fd = -1,
	};
	int rc = recognise(port, why);

	if (!rc && count != 2 + port->ops->extra) {
		*why = "there are not as many descriptors as a port of this kind has";
		rc = -EINVAL;
	}
	if (!rc)
		rc = port->ops->take_over(port, fds + 2, why);
	if (rc)
		port->event_fd = -1;
	else
		fds[0] = fds[1] = -1;
	return rc;
}

void pvf_port_release(struct pvf_port *port)
{
	pvf_port_unmap(port);
	port->ops->release(port);
	port->event_fd = -1;
}

void pvf_port_close(struct pvf_port *port)
{
	if (port->event_fd < 0)
		return;
	/* The event channel first: closing it unbinds the port, and nothing of ours may be bound
	 * when the domain suspends. Then the mappings, without which gntalloc frees no page. */
	if (!port->parked)
		close(port->event_source);
	pvf_port_release(port);
	close(port->grant_source);
}
