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
	if (!port->ring_bytes)
		return 0;
	*why = "the ring cannot be mapped at its offset";
	int rc = map(fd, port->ring_offset, port->ring_bytes, &port->ring);

	if (rc)
		return rc;
	if (!port->pool_bytes)
		return 0;
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
	if (!port->ring_bytes)
		return;
	if (port->pool_bytes)
		munmap(port->pool, port->pool_bytes);
	munmap(port->ring, port->ring_bytes);
	port->ring = port->pool = NULL;
}

static int recognise(struct pvf_port *port, const char **why)
{
	struct stat events, grants;
	bool pages = port->grant_source >= 0;

	*why = "a descriptor of ATTACH is unusable";
	if (fstat(port->event_source, &events) || (pages && fstat(port->grant_source, &grants)))
		return -errno;
	if (S_ISCHR(events.st_mode)) {
		*why = "the event channel is a device, so the pages must be /dev/xen/gntalloc's";
		if (pages && !S_ISCHR(grants.st_mode))
			return -EINVAL;
		port->ops = &pvf_port_xen;
		return 0;
	}
	*why = "the event channel is neither /dev/xen/evtchn nor a connection to an embedded host";
	if (!pvf_scm_packets(port->event_source))
		return -EINVAL;
	*why = "the event channel is an embedded host's, so the pages must be too";
	if (pages && !pvf_scm_packets(port->grant_source))
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

int pvf_port_open_event(struct pvf_port *port, int event_fd, uint32_t number, const char **why)
{
	return pvf_port_open(port, event_fd, -1, &(struct pvf_ctl_attach){.port = number}, why);
}

static uint32_t descriptors(const struct pvf_port *port)
{
	uint32_t event = 1 + port->ops->extra;

	return port->grant_source < 0 ? event : event + 1 + port->ops->arena;
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
		.fds = descriptors(port),
		.bare = port->grant_source < 0,
	};
	*fds++ = port->event_source;
	if (port->grant_source >= 0)
		*fds++ = port->grant_source;
	port->ops->share(port, fds);
	return image->fds;
}

int pvf_port_take_over(struct pvf_port *port, const struct pvf_port_image *image, int *fds,
		       uint32_t count, const char **why)
{
	bool bare = image->bare;
	uint32_t first = bare ? 1 : 2;

	*why = "the pages of the ring or the pool are impossible";
	if (bare ? image->ring_pages || image->pool_pages :
		   !image->ring_pages || image->ring_pages > PVF_MAX_RING_PAGES ||
			   image->pool_pages < 2 || image->pool_pages > PVF_MAX_POOL_PAGES)
		return -EINVAL;
	if ((image->ring_offset | image->pool_offset) % PVF_PAGE_SIZE ||
	    image->ring_offset > INT64_MAX / 2 || image->pool_offset > INT64_MAX / 2 ||
	    image->side > 1)
		return -EINVAL;
	*why = "descriptors of the port are missing";
	if (count < first)
		return -EINVAL;
	*port = (struct pvf_port){
		.event_fd = -1,
		.event_source = fds[0],
		.grant_source = bare ? -1 : fds[1],
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

	if (!rc && count != descriptors(port)) {
		*why = "there are not as many descriptors as a port of this kind has";
		rc = -EINVAL;
	}
	if (!rc)
		rc = port->ops->take_over(port, fds + first, why);
	if (rc) {
		port->event_fd = -1;
		return rc;
	}
	fds[0] = fds[first - 1] = -1;
	return 0;
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
	if (port->grant_source >= 0)
		close(port->grant_source);
}
