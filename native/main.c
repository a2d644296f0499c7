/* SPDX-License-Identifier: BSD-2-Clause
 *
 * pvfront-worker --name NAME [--queues N] [--uid U --gid G] [--chroot DIR]
 *   [--ublk | --net | --console] [--build ID]
 *
 * One device's data path, a thread for each of up to N queues (1). Descriptor 3 is a listening AF_UNIX SOCK_SEQPACKET socket; everything
 * else comes through it (pvf_ctl.h). Status 0: told to exit; 1: could not start; 2: wrong usage.
 * Losing its parent or its supervisor does not end a worker.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "confine.h"
#include "worker.h"

#define LISTEN_FD 3

static struct pvf_worker worker;

static int usage(const char *what)
{
	fprintf(stderr,
		"pvfront-worker: %s\n"
		"usage: pvfront-worker --name NAME [--queues N] [--uid U --gid G] [--chroot DIR] "
		"[--ublk | --net | --console] [--build ID]\n"
		"descriptor 3 must be a listening AF_UNIX SOCK_SEQPACKET socket; "
		"pvfront starts workers, not people\n",
		what);
	return 2;
}

static bool parse_id(const char *text, uint32_t *id)
{
	char *end;

	errno = 0;
	unsigned long value = strtoul(text, &end, 10);

	if (errno || end == text || *end || *text == '-' || value >= UINT32_MAX)
		return false;
	*id = (uint32_t)value;
	return true;
}

static bool is_listener(int fd)
{
	int type = 0, domain = 0, listening = 0;
	socklen_t len = sizeof(int);

	return !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) && domain == AF_UNIX &&
	       !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_SEQPACKET &&
	       !getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) && listening;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"name", required_argument, NULL, 'n'},
		{"queues", required_argument, NULL, 'q'},
		{"uid", required_argument, NULL, 'u'},
		{"gid", required_argument, NULL, 'g'},
		{"chroot", required_argument, NULL, 'c'},
		{"ublk", no_argument, NULL, 'b'},
		{"net", no_argument, NULL, 't'},
		{"console", no_argument, NULL, 'o'},
		{"build", required_argument, NULL, 'v'},
		{0},
	};
	struct pvf_confine confine = {0};
	const char *name = NULL, *build = "", *why = NULL;
	bool uid = false, gid = false, net = false, console = false;
	uint32_t queues = 1;
	int opt, rc;

	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 'n':
			name = optarg;
			break;
		case 'q':
			if (!parse_id(optarg, &queues) || !queues || queues > PVF_MAX_QUEUES)
				return usage("--queues wants a number from 1 to 16");
			break;
		case 'u':
			uid = parse_id(optarg, &confine.uid);
			if (!uid)
				return usage("--uid wants a number");
			break;
		case 'g':
			gid = parse_id(optarg, &confine.gid);
			if (!gid)
				return usage("--gid wants a number");
			break;
		case 'c':
			confine.root = optarg;
			break;
		case 'b':
			confine.uring = true;
			break;
		case 't':
			net = confine.realtime = true;
			break;
		case 'o':
			console = true;
			break;
		case 'v':
			build = optarg;
			break;
		default:
			return usage("unknown option");
		}
	}
	if (optind != argc || !name || !*name || strlen(name) >= PVF_NAME_MAX)
		return usage("--name wants 1 to 63 characters, and nothing follows the options");
	if (uid != gid)
		return usage("--uid and --gid belong together");
	if (!is_listener(LISTEN_FD))
		return usage("descriptor 3 is no listening SEQPACKET socket");
	confine.change_user = uid;
	/* What a supervisor inherited and did not mark close-on-exec is not for a confined process. */
	close_range(LISTEN_FD + 1, ~0U, 0);
	fcntl(LISTEN_FD, F_SETFD, FD_CLOEXEC);
	fcntl(LISTEN_FD, F_SETFL, fcntl(LISTEN_FD, F_GETFL) | O_NONBLOCK);

	pvf_confine_start(&confine);
	rc = pvf_worker_init(&worker, LISTEN_FD, name, queues, &why);
	worker.obey = pvf_confine_obey;
	snprintf(worker.build, sizeof(worker.build), "%s", build);
	if (!rc && net)
		rc = pvf_worker_net(&worker, &why);
	if (!rc && console)
		rc = pvf_worker_cons(&worker, &why);
	if (!rc && confine.uring)
		rc = pvf_worker_uring(&worker, &why);
	if (!rc)
		rc = pvf_confine_user(&confine, &why);
	/* A new thread is what its maker is: after the privileges are gone, and before the filter, since
	 * it begins with calls that nobody makes later. */
	if (!rc)
		rc = pvf_worker_start(&worker, &why);
	if (!rc)
		rc = pvf_confine_calls(&confine, &why);
	if (rc) {
		fprintf(stderr, "pvfront-worker %s: cannot start: %s: %s\n", name, why,
			strerror(-rc));
		return 1;
	}
	if (confine.notes[0])
		snprintf(worker.start_notes, sizeof(worker.start_notes), "%s", confine.notes);
	return pvf_worker_run(&worker);
}
