/* SPDX-License-Identifier: BSD-2-Clause */
#include "port.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

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

static int recognise(struct pvf_port *port, int event_fd, const struct stat *grants,
		     const struct pvf_ctl_attach *a, const char **why)
{
	struct stat st;
	int type, domain;
	socklen_t len = sizeof(type);

	*why = "the event channel is neither /dev/xen/evtchn nor an AF_UNIX SEQPACKET socket";
	if (fstat(event_fd, &st))
		return -errno;
	if (S_ISCHR(st.st_mode)) {
		*why = "the event channel is a device, so the pages must be /dev/xen/gntalloc's";
		if (!S_ISCHR(grants->st_mode))
			return -EINVAL;
		*why = "the event channel cannot be made non-blocking";
		int flags = fcntl(event_fd, F_GETFL);

		if (flags < 0 || fcntl(event_fd, F_SETFL, flags | O_NONBLOCK))
			return -errno;
		port->ops = &pvf_port_xen;
		return 0;
	}
	if (!S_ISSOCK(st.st_mode) ||
	    getsockopt(event_fd, SOL_SOCKET, SO_TYPE, &type, &len) || type != SOCK_SEQPACKET)
		return -EINVAL;
	len = sizeof(domain);
	if (getsockopt(event_fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) || domain != AF_UNIX)
		return -EINVAL;
	*why = "the embedded host's pages must be a memfd that covers ring and pool";
	uint64_t size = (uint64_t)grants->st_size;

	/* Past its end a mapping faults, so look before. Every offset fits: it was checked. */
	if (!S_ISREG(grants->st_mode) ||
	    size < a->ring_offset + (uint64_t)a->ring_pages * PVF_PAGE_SIZE ||
	    size < a->pool_offset + (uint64_t)a->pool_pages * PVF_PAGE_SIZE)
		return -EINVAL;
	port->ops = &pvf_port_embedded;
	return 0;
}

int pvf_port_open(struct pvf_port *port, int event_fd, int grant_fd,
		  const struct pvf_ctl_attach *attach, const char **why)
{
	struct stat grants;
	int rc;

	*port = (struct pvf_port){
		.event_fd = -1,
		.grant_fd = -1,
		.port = attach->port,
		.ring_bytes = (size_t)attach->ring_pages * PVF_PAGE_SIZE,
		.pool_bytes = (size_t)attach->pool_pages * PVF_PAGE_SIZE,
	};
	*why = "the descriptor of the pages is unusable";
	if (fstat(grant_fd, &grants))
		return -errno;
	rc = recognise(port, event_fd, &grants, attach, why);
	if (rc)
		return rc;
	*why = "the ring cannot be mapped at its offset";
	rc = map(grant_fd, attach->ring_offset, port->ring_bytes, &port->ring);
	if (rc)
		return rc;
	*why = "the pool cannot be mapped at its offset";
	rc = map(grant_fd, attach->pool_offset, port->pool_bytes, &port->pool);
	if (rc) {
		munmap(port->ring, port->ring_bytes);
		return rc;
	}
	port->event_fd = event_fd;
	port->grant_fd = grant_fd;
	return 0;
}

void pvf_port_close(struct pvf_port *port)
{
	if (port->event_fd < 0)
		return;
	/* The event channel first: closing it unbinds the port, and nothing of ours may be bound
	 * when the domain suspends. Then the mappings, without which gntalloc frees no page. */
	if (!port->parked)
		close(port->event_fd);
	munmap(port->pool, port->pool_bytes);
	munmap(port->ring, port->ring_bytes);
	close(port->grant_fd);
	port->event_fd = port->grant_fd = -1;
	port->ring = port->pool = NULL;
}
