/* SPDX-License-Identifier: BSD-2-Clause */
#include "scm.h"

#include <string.h>
#include <unistd.h>

uint32_t pvf_scm_take(struct msghdr *msg, int *fds, uint32_t max)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < max; i++)
		fds[i] = -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		for (size_t i = 0; i < n; i++, count++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (count < max)
				fds[count] = fd;
			else
				close(fd);
		}
	}
	return count;
}

void pvf_scm_close(int *fds, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		if (fds[i] >= 0)
			close(fds[i]);
		fds[i] = -1;
	}
}
