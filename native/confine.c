/* SPDX-License-Identifier: BSD-2-Clause */
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <seccomp.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/capability.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <xen/xen.h>
#include <xen/sys/evtchn.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

static void note(struct pvf_confine *c, const char *what)
{
	size_t used = strlen(c->notes);

	snprintf(c->notes + used, sizeof(c->notes) - used, "%s%s: %s", used ? "; " : "refused ",
		 what, strerror(errno));
}

void pvf_confine_start(struct pvf_confine *c)
{
	struct rlimit none = {0, 0}, unlimited = {RLIM_INFINITY, RLIM_INFINITY};

	c->notes[0] = 0;
	signal(SIGTERM, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	setrlimit(RLIMIT_CORE, &none);
	umask(077);
	/* Under a limit, locking what is there now would make it refuse the pool's pages later. */
	if (setrlimit(RLIMIT_MEMLOCK, &unlimited))
		note(c, "RLIMIT_MEMLOCK, and so mlockall");
	else if (mlockall(MCL_CURRENT | MCL_FUTURE))
		note(c, "mlockall");
	if (c->realtime && setrlimit(RLIMIT_RTPRIO, &(struct rlimit){1, 1}))
		note(c, "RLIMIT_RTPRIO");
	if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))
		note(c, "PR_SET_IO_FLUSHER");
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "-1000", 5) != 5)
		note(c, "oom_score_adj");
	if (fd >= 0)
		close(fd);
	if (unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS))
		note(c, "namespaces");
}

static void end_soon(int number)
{
	(void)number;
	alarm(PVF_LAST_SECONDS);
}

void pvf_confine_obey(void)
{
	signal(SIGTERM, end_soon);
}

int pvf_confine_user(struct pvf_confine *c, const char **why)
{
	*why = "chroot";
	if (c->root && (chroot(c->root) || chdir("/")))
		return -errno;
	if (c->change_user) {
		for (int cap = 0; cap < 64; cap++)
			if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno == EINVAL)
				break; /* past the last that this kernel knows */
		*why = "setgroups";
		if (setgroups(0, NULL))
			return -errno;
		*why = "setresgid";
		if (setresgid(c->gid, c->gid, c->gid))
			return -errno;
		*why = "setresuid";
		if (setresuid(c->uid, c->uid, c->uid))
			return -errno;
		/* Leaving uid 0 has emptied the permitted and ambient sets; make sure. */
		*why = "the kernel let us become root again";
		if (c->uid && !setresuid(0, 0, 0))
			return -EPERM;
	}
	*why = "PR_SET_NO_NEW_PRIVS";
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	*why = "PR_SET_DUMPABLE";
	return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) ? -errno : 0;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
	__has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif

#ifdef SANITIZED
int pvf_confine_calls(struct pvf_confine *c, const char **why)
{
	errno = ENOTSUP; /* a sanitizer's runtime makes calls of its own */
	note(c, "system call filter in a sanitizer build");
	*why = NULL;
	return 0;
}
#else
/* The calls of the event loops, and who makes them. */
static const int plain_calls[] = {
	SCMP_SYS(epoll_wait), SCMP_SYS(epoll_pwait), SCMP_SYS(epoll_ctl), /* worker, queue */
	SCMP_SYS(readv), SCMP_SYS(writev),                /* TAP */
	SCMP_SYS(read), SCMP_SYS(write),                  /* ports, timers, PVF_ASSERT */
	SCMP_SYS(recvmsg), SCMP_SYS(sendmsg),             /* target, ctl, port_embedded */
	SCMP_SYS(accept4), SCMP_SYS(close), SCMP_SYS(munmap), SCMP_SYS(madvise),
	SCMP_SYS(fstat), SCMP_SYS(newfstatat), SCMP_SYS(getsockopt), /* port_open, worker */
	SCMP_SYS(sched_yield),                                       /* queue, polling */
	SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(shutdown),         /* hand_over */
	SCMP_SYS(timerfd_settime), SCMP_SYS(clock_gettime), SCMP_SYS(restart_syscall),
	SCMP_SYS(alarm), SCMP_SYS(setitimer),                        /* confine */
	SCMP_SYS(rt_sigreturn), SCMP_SYS(exit), SCMP_SYS(exit_group),
};

/* A lock that is held, and its end. */
static const uint64_t futex_operations[] = {FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE};

/* port_xen; fence. */
static const uint64_t ioctls[] = {IOCTL_EVTCHN_NOTIFY, FIONREAD};

/* port_xen and port_embedded, when they open. */
static const uint64_t fcntl_commands[] = {F_GETFL, F_SETFL, F_GET_SEALS};

/* What a ublk target needs besides: data by preadv and pwritev, descriptors mapped to be read, and
 * the io_uring made before. It takes IORING_OP_URING_CMD only (ublk_ring.c): none can be made here. */
static int allow_uring(scmp_filter_ctx filter)
{
	static const int calls[] = {SCMP_SYS(io_uring_enter), SCMP_SYS(preadv), SCMP_SYS(pwritev)};
	int rc = 0;

	for (size_t i = 0; !rc && i < sizeof(calls) / sizeof(*calls); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, calls[i], 0);
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(io_uring_register), 1,
				      SCMP_A1(SCMP_CMP_EQ, IORING_REGISTER_ENABLE_RINGS, 0));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 2,
				      SCMP_A2(SCMP_CMP_EQ, PROT_READ, 0),
				      SCMP_A3(SCMP_CMP_EQ, MAP_SHARED, 0));
	return rc;
}

int pvf_confine_calls(struct pvf_confine *c, const char **why)
{
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_KILL_PROCESS);
	int rc = 0;

	*why = "seccomp";
	if (!filter)
		return -ENOMEM;
	for (size_t i = 0; !rc && i < sizeof(plain_calls) / sizeof(*plain_calls); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, plain_calls[i], 0);
	/* Shared data only: nothing is ever executable, nothing is mapped over something else. */
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 2,
				      SCMP_A2(SCMP_CMP_EQ, PROT_READ | PROT_WRITE, 0),
				      SCMP_A3(SCMP_CMP_EQ, MAP_SHARED, 0));
	for (size_t i = 0; !rc && i < sizeof(ioctls) / sizeof(*ioctls); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
				      SCMP_A1(SCMP_CMP_MASKED_EQ, UINT32_MAX, ioctls[i]));
	for (size_t i = 0; !rc && i < sizeof(futex_operations) / sizeof(*futex_operations); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(futex), 1,
				      SCMP_A1(SCMP_CMP_MASKED_EQ, UINT32_MAX,
					      futex_operations[i]));
	for (size_t i = 0; !rc && i < sizeof(fcntl_commands) / sizeof(*fcntl_commands); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(fcntl), 1,
				      SCMP_A1(SCMP_CMP_EQ, fcntl_commands[i], 0));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(rt_sigaction), 1,
				      SCMP_A0(SCMP_CMP_EQ, SIGTERM, 0));
	if (!rc && c->realtime)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(sched_setscheduler), 1,
				      SCMP_A0(SCMP_CMP_EQ, 0, 0));
	if (!rc && c->uring)
		rc = allow_uring(filter);
	/* The queues' threads are there already. */
	if (!rc)
		rc = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
	if (!rc)
		rc = seccomp_load(filter);
	seccomp_release(filter);
	return rc;
}
#endif
