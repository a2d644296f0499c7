/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What a worker gives up, and when. Three stages, in this order:
 *
 *   1. pvf_confine_start, as whoever starts us (root in production), before anything is opened:
 *      signals of a terminal or a service manager ignored; no core; no limit on locked memory;
 *      memory locked; real-time priority 1 allowed, if that is wanted; marked as an I/O flusher, so
 *      that the kernel never waits for this disk's own writeback to give us memory; exempt from the
 *      OOM killer; network, IPC and host name namespaces of our own.
 *   2. pvf_confine_user: chroot, user and groups, no capability, not even one to be gained again.
 *   3. pvf_confine_calls: no new privileges, not dumpable, and only the system calls of the event
 *      loops, in all threads. Any other kills the process, which frees the ring and the port and tells the
 *      supervisor.
 *
 * SIGTERM, SIGINT and SIGHUP are ignored because a worker that ends under a mounted disk is a
 * failure: only its supervisor (EXIT) or SIGKILL ends it. When the machine stops nobody would: once the
 * supervisor has said so (LAST), SIGTERM, which is what a service manager ends the last processes with,
 * ends the worker too. Not at once: others have got it as well, and write their last.
 */
#ifndef PVF_CONFINE_H
#define PVF_CONFINE_H

#include "pvf.h"

struct pvf_confine {
	const char *root; /* chroot there; NULL: no */
	uint32_t uid, gid;
	bool change_user;
	bool uring;    /* a ublk target's calls are allowed too */
	bool realtime; /* it may be a real-time task, of the lowest priority */
	/* What was refused, for the log; the worker runs without it. */
	char notes[PVF_TEXT_MAX];
};

void pvf_confine_start(struct pvf_confine *confine);

/* From now on SIGTERM ends the process, PVF_LAST_SECONDS later. */
void pvf_confine_obey(void);

/* 0, or -errno with `*why`: going on with privileges is not an option. */
int pvf_confine_user(struct pvf_confine *confine, const char **why);
int pvf_confine_calls(struct pvf_confine *confine, const char **why);

#endif
