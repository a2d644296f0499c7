/* SPDX-License-Identifier: BSD-2-Clause
 *
 * One worker takes over from another, between two turns of every queue: docs/upgrade.md.
 *
 * Theory of operation
 *
 *   The old worker takes the locks of all its queues: each is between two turns then, and stays so. It
 *   writes everything that is private to it into the table, sends a packet for each queue with the
 *   descriptors that go with it, and waits for one packet back.
 *
 *   The new worker holds the locks of its own queues as well until it has everything and has found it
 *   possible. Then it says SERVING. *That packet decides*: if it was sent, the new one serves, and if
 *   it was not, the old one. The old one looks whether it came, and nothing else: not at the time, nor
 *   whether the new one lives. So there is no moment at which both serve, and none at which neither
 *   will, but for a process that dies after it was decided in its favour, which is what a worker's
 *   death always was.
 *
 *   When the old one has waited for long enough, or has heard anything else, it shuts its end for
 *   reading, after which SERVING cannot be sent any more, and looks for one that came before.
 *
 *   A refusal says why, for people.
 */
#include "worker_int.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "image.h"
#include "memfd.h"
#include "queue_int.h"
#include "scm.h"

#define MAGIC 0x58465650u /* "PVFX" */

enum kind {
	QUEUE = 1,   /* old to new: the descriptors of one queue, in order */
	SERVING = 2, /* new to old: it is yours no more */
	REFUSED = 3, /* new to old: go on */
};

struct packet {
	uint32_t magic;
	uint32_t kind;
	uint32_t queue;
	uint32_t queues; /* attached */
	char text[PVF_TEXT_MAX];
};

static const char no_peer[] = "the first descriptor is no end of a socket pair for packets";

static void say(char why[PVF_TEXT_MAX], const char *text)
{
	snprintf(why, PVF_TEXT_MAX, "%s", text);
}

static void lock_all(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->queues; i++)
		pvf_queue_lock(&w->queue[i]);
}

static void unlock_all(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->queues; i++)
		pvf_queue_unlock(&w->queue[i]);
}

static void leave_all(struct pvf_worker *w)
{
	for (uint32_t i = 0; i < w->queues; i++) {
		struct pvf_queue *q = &w->queue[i];

		pvf_queue_detach(q, false);
		q->notes = q->notes_told = 0;
		q->queues = 0;
	}
	w->attached = w->attaching = 0;
}

/* The next packet, with its descriptors. 1, 0: the other end is closed, -EAGAIN: none in time, -errno. */
static int receive(int peer, struct packet *p, int *fds, uint32_t *count, uint64_t until)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * PVF_SCM_MAX)];
	} control;
	struct iovec iov = {.iov_base = p, .iov_len = sizeof(*p)};
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n;

	for (;;) {
		n = recvmsg(peer, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		/* An end that was closed with packets unread says that before what it had sent, once. */
		if (n < 0 && (errno == ECONNRESET || errno == EINTR))
			continue;
		if (n >= 0 || errno != EAGAIN)
			break;
		uint64_t now = pvf_now_ns();
		struct pollfd polled = {.fd = peer, .events = POLLIN};

		if (now >= until)
			return -EAGAIN;
		poll(&polled, 1, (int)((until - now) / PVF_MS) + 1);
	}
	if (n < 0)
		return -errno;
	uint32_t came = pvf_scm_take(&msg, fds, PVF_SCM_MAX);

	*count = pvf_min32(came, PVF_SCM_MAX);
	if (!n) {
		pvf_scm_close(fds, *count);
		return 0;
	}
	p->text[sizeof(p->text) - 1] = 0;
	if (n == sizeof(*p) && p->magic == MAGIC && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
	    came <= PVF_SCM_MAX)
		return 1;
	pvf_scm_close(fds, *count);
	return -EPROTO;
}

/* The old one */

static const char *stays(const struct pvf_worker *w)
{
	if (w->parked)
		return "this worker is parked for ever";
	if (w->state != PVF_RUNNING && w->state != PVF_DRAINED)
		return "this worker does not serve now";
	for (uint32_t i = 0; i < w->attached; i++) {
		const char *why = pvf_queue_stays(&w->queue[i]);

		if (why)
			return why;
	}
	return __atomic_load_n(&w->fence.closed, __ATOMIC_SEQ_CST) ? "its NBD sockets have just ended"
								    : NULL;
}

static int send_all(const struct pvf_worker *w, int peer, struct pvf_image *image)
{
	struct packet p = {.magic = MAGIC, .kind = QUEUE, .queues = w->attached};
	int rc = 0;

	*image = (struct pvf_image){
		.layout = PVF_IMAGE_LAYOUT,
		.shape = pvf_image_shape(),
		.frozen_at = pvf_now_ns(),
		.state = w->state,
		.generation = w->generation,
		.device_class = w->device_class,
		.features_told = w->features_told,
		.queues = w->attached,
	};
	memcpy(image->name, w->name, sizeof(image->name));
	if (w->device_class == PVF_CLASS_NET)
		image->groups = w->groups.set; /* every queue is locked */
	image->magic = PVF_IMAGE_MAGIC;
	for (p.queue = 0; !rc && p.queue < w->attached; p.queue++) {
		int fds[PVF_QUEUE_FDS];
		uint32_t n = pvf_queue_save(&w->queue[p.queue], &image->queue[p.queue], fds);

		rc = pvf_scm_send(peer, &p, sizeof(p), fds, n);
	}
	return rc;
}

/* 0: the new one serves. Whatever else is heard, or not, SERVING may still be on its way: it is made
 * impossible first, and then looked for among all that came. */
static int decision(int peer, char why[PVF_TEXT_MAX])
{
	uint64_t until = pvf_now_ns() + PVF_HAND_OVER_SECONDS * PVF_SECOND;
	int result = 0;

	say(why, "the next worker has ended, or is none");
	for (;;) {
		struct packet p = {0};
		int fds[PVF_SCM_MAX];
		uint32_t n = 0;
		int rc = receive(peer, &p, fds, &n, until);

		if (rc > 0)
			pvf_scm_close(fds, n);
		if (rc > 0 && p.kind == SERVING)
			return 0;
		if (result && rc <= 0 && rc != -EPROTO)
			return result; /* nothing more came */
		if (result)
			continue;
		result = rc < 0 ? rc : rc ? -EPROTO : -EPIPE;
		if (rc == -EAGAIN) {
			result = -ETIMEDOUT;
			say(why, "the next worker did not answer in time");
		} else if (rc > 0 && p.kind == REFUSED) {
			result = -ECANCELED;
			say(why, p.text);
		}
		shutdown(peer, SHUT_RD);
		until = 0;
	}
}

/* To another worker at the other end of `peer`, through the memfd `table`. Returns only when it is decided.
 * 0: the other serves now, and nothing is held here any more; or -errno with `why` filled in, and this one
 * goes on as if nothing had happened. */
static int hand_over(struct pvf_worker *w, int peer, int table, char why[PVF_TEXT_MAX])
{
	size_t size = pvf_image_size(w->attached);
	struct pvf_image *image;
	void *where;

	if (!pvf_scm_packets(peer)) {
		say(why, no_peer);
		return -ENOTSOCK;
	}
	/* Before anything stands still: its pages are there when this returns (mlockall). */
	int rc = pvf_memfd_map(table, size, true, &where);

	if (rc) {
		say(why, "the memfd is none, too small, or can be shrunk");
		return rc;
	}
	image = where;
	lock_all(w);
	const char *no = stays(w);

	if (no) {
		say(why, no);
		rc = -EBUSY;
	} else {
		rc = send_all(w, peer, image);
		if (rc)
			say(why, "the next worker does not take the descriptors");
		else
			rc = decision(peer, why);
	}
	if (!rc) {
		leave_all(w);
		w->state = PVF_IDLE;
	}
	unlock_all(w);
	munmap(image, size);
	return rc;
}

/* The new one */

static const char *check_head(const struct pvf_image *image, const struct pvf_worker *w,
			      uint32_t queues)
{
	if (image->magic != PVF_IMAGE_MAGIC)
		return "the table is none";
	if (image->layout != PVF_IMAGE_LAYOUT || image->shape != pvf_image_shape())
		return "the table is of another version of the worker";
	if (image->queues != queues)
		return "the table is of another number of queues";
	if (queues > w->queues)
		return "more queues than this worker was started with";
	if (image->state != PVF_RUNNING && image->state != PVF_DRAINED)
		return "the table is of a worker that does not serve";
	if (!image->generation || image->device_class != w->device_class)
		return "the table is of no device of this worker's class that is served";
	if (image->device_class == PVF_CLASS_NET && !pvf_groups_possible(&image->groups))
		return "the table's multicast groups are impossible";
	if (!memchr(image->name, 0, sizeof(image->name)))
		return "the table has no name";
	return NULL;
}

/* One queue's packet came: it is taken, but not served yet. */
static int take_queue(struct pvf_worker *w, const struct pvf_image *image, uint64_t frozen_at,
		      uint32_t index, int *fds, uint32_t count, uint32_t queues, const char **why)
{
	struct pvf_queue *q = &w->queue[index];
	int rc = pvf_queue_take_over(q, &image->queue[index], queues, fds, count, why);

	if (rc)
		return rc;
	/* What came while nobody served may be as old as that. */
	if (queues > 1 && !q->unread.since)
		q->unread.since = frozen_at;
	uint64_t since = q->oldest;

	if (q->unread.since && (!since || q->unread.since < since))
		since = q->unread.since;
	if (queues > 1)
		pvf_fence_show(&w->fence, index, since);
	w->attached = index + 1;
	return 0;
}

/* `*head`: the table's, as it was checked. */
static int take_all(struct pvf_worker *w, int peer, int table, struct pvf_image *head,
		    struct pvf_image **image, size_t *size, const char **why)
{
	uint64_t until = pvf_now_ns() + PVF_TAKE_OVER_SECONDS * PVF_SECOND;
	uint32_t queues = 1;

	for (uint32_t i = 0; i < queues; i++) {
		struct packet p;
		int fds[PVF_SCM_MAX];
		uint32_t n;
		void *where;
		int rc = receive(peer, &p, fds, &n, until);

		*why = "the worker before has not sent everything";
		if (rc <= 0)
			return rc ? rc : -EPIPE;
		rc = -EPROTO;
		if (p.kind == QUEUE && p.queue == i && p.queues && p.queues <= PVF_MAX_QUEUES &&
		    (!i || p.queues == queues))
			rc = 0;
		if (!rc && !i) {
			queues = p.queues;
			*size = pvf_image_size(queues);
			*why = "the memfd is none, too small, or can be shrunk";
			rc = pvf_memfd_map(table, *size, true, &where);
			if (!rc) {
				*image = where;
				memcpy(head, where, sizeof(*head));
				*why = check_head(head, w, queues);
				rc = *why ? -EINVAL : 0;
			}
		}
		if (!rc)
			rc = take_queue(w, *image, head->frozen_at, i, fds, n, queues, why);
		pvf_scm_close(fds, n);
		if (rc)
			return rc;
	}
	return 0;
}

/* The other's side. 0: this one serves, `*pause` ns after the other's last turn; or -errno with `why`, and
 * nothing is held. */
static int take_over(struct pvf_worker *w, int peer, int table, uint64_t *pause,
		     char why[PVF_TEXT_MAX])
{
	struct packet answer = {.magic = MAGIC, .kind = SERVING};
	struct pvf_image head, *image = NULL;
	const char *text = NULL;
	size_t size = 0;
	int rc;

	if (w->state != PVF_IDLE || w->attached || w->generation || w->parked) {
		say(why, "this worker has served already");
		return -EBUSY;
	}
	if (!pvf_scm_packets(peer)) {
		say(why, no_peer);
		return -ENOTSOCK;
	}
	lock_all(w);
	rc = take_all(w, peer, table, &head, &image, &size, &text);
	if (!rc) {
		rc = pvf_scm_send(peer, &answer, sizeof(answer), NULL, 0);
		text = "the worker before does not wait for an answer any more";
	}
	if (rc) {
		say(why, text);
		leave_all(w);
		answer.kind = REFUSED;
		say(answer.text, text);
		pvf_scm_send(peer, &answer, sizeof(answer), NULL, 0);
	} else {
		w->state = head.state;
		w->generation = head.generation;
		w->device_class = head.device_class;
		w->features_told = head.features_told;
		w->attaching = w->attached;
		memcpy(w->name, head.name, sizeof(w->name));
		if (w->device_class == PVF_CLASS_NET)
			pvf_groups_take_over(&w->groups, &head.groups);
	}
	unlock_all(w);
	if (!rc) {
		for (uint32_t i = 0; i < w->attached; i++)
			pvf_queue_wake(&w->queue[i]);
		*pause = pvf_now_ns() - head.frozen_at;
	}
	if (image)
		munmap(image, size);
	return rc;
}

/* Messages */

void pvf_handle_hand_over(struct pvf_worker *w)
{
	char why[PVF_TEXT_MAX];
	int rc = hand_over(w, w->ctl.fds[0], w->ctl.fds[1], why);

	if (rc)
		return pvf_tell_error(w, PVF_CTL_HAND_OVER, -rc, why);
	pvf_tell_simple(w, PVF_CTL_HANDED_OVER);
	w->exiting = true;
}

void pvf_handle_take_over(struct pvf_worker *w)
{
	struct pvf_ctl_taken_over m = {0};
	char why[PVF_TEXT_MAX];
	uint64_t pause;
	int rc = take_over(w, w->ctl.fds[0], w->ctl.fds[1], &pause, why);

	if (rc)
		return pvf_tell_error(w, PVF_CTL_TAKE_OVER, -rc, why);
	m.pause_us = (uint32_t)(pause / 1000);
	for (uint32_t i = 0; i < w->attached; i++) {
		pvf_queue_lock(&w->queue[i]);
		m.in_flight += pvf_queue_in_flight(&w->queue[i]);
		pvf_queue_unlock(&w->queue[i]);
	}
	pvf_worker_publish(w);
	pvf_tell_hello(w);
	pvf_ctl_send(&w->ctl, &m, PVF_CTL_TAKEN_OVER, w->generation, sizeof(m), -1);
}
