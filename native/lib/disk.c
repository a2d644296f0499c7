/* SPDX-License-Identifier: BSD-2-Clause
 *
 * pvfront/disk.h: the worker's state machine in a thread of the program, its queue in the program's own.
 *
 * Theory of operation
 *
 *   One lock for everything. The *control thread* sleeps at the control connection and the queue's
 *   timers; it does what the supervisor says whatever the program is busy with. While it drains
 *   (a suspend, an unplug) it serves the queue itself, and otherwise at every tick of the
 *   watchdog: as long as requests are under way, a program that does not ask is served four times a
 *   second, so that a stall is the backend's and never the program's.
 *
 *   Whoever calls pvf_disk_poll() serves the queue, without events: `polling`. pvf_disk_wait() ends
 *   that, and sleeps at `user_epoll`, where the event channel is and `kick`, by which the control
 *   thread says that there is something to find that no event will tell of.
 *
 *   What a service of the program has to tell the supervisor goes by `alarm` to the control thread.
 *
 *   A generation that ends hands what is unfinished back to parts.c, which begins it again with the
 *   next one. A supervisor starts that only after its backend's Connected: the fence. The end of
 *   the control connection is the end of the disk: nobody could reconnect it, nor put it away before
 *   a suspend.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "disk_int.h"

#define TAG_ALARM 32 /* above the worker's and the queue's */
#define TAG_KICK 33
#define TAG_QUEUE 34
#define EVENTS 8
#define SERVICES 8     /* of one call: `again` may say that there is always more */
#define DRAIN_TICK 2   /* ms */
#define OPEN_PATIENCE 60000
#define CLOSE_PATIENCE 2000

static void set_event(int fd, bool *is_set)
{
	uint64_t one = 1;

	if (!*is_set && write(fd, &one, sizeof(one)) == sizeof(one))
		*is_set = true;
}

static void clear_event(int fd, bool *is_set)
{
	uint64_t count;

	if (read(fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
		return;
	*is_set = false;
}

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* What is left until `end`, for epoll_wait(); a negative end never comes. */
static int left_ms(int64_t end)
{
	int64_t left;

	if (end < 0)
		return -1;
	left = end - now_ms();
	return left > 0 ? (int)left : 0;
}

/* The control thread */

static void kick(struct pvf_disk *d)
{
	set_event(d->kick, &d->kicked);
}

static void enter(struct pvf_disk *d, uint32_t state)
{
	if (d->state == state)
		return;
	d->state = state;
	pthread_cond_broadcast(&d->changed);
	kick(d);
}

static bool intake(void *source, struct pvf_blk *blk, bool no_new)
{
	return pvf_parts_intake(source, blk, no_new);
}

static bool deliver(void *source, struct pvf_blk *blk)
{
	return pvf_parts_deliver(source, blk);
}

static void restart(void *source)
{
	pvf_parts_restart(source);
}

static const struct pvf_source_ops source_ops = {
	.intake = intake,
	.deliver = deliver,
	.restart = restart,
};

static void gone(struct pvf_disk *d)
{
	pvf_queue_detach(d->worker.queue, false);
	/* Others may have the descriptor too: the shell that started the program. */
	if (d->worker.ctl.fd >= 0)
		shutdown(d->worker.ctl.fd, SHUT_RDWR);
	pvf_ctl_drop(&d->worker.ctl);
	pvf_parts_fail(&d->direct.parts, ENODEV);
	enter(d, PVF_DISK_GONE);
	kick(d);
}

/* After each turn of the worker's. */
static void look(struct pvf_disk *d)
{
	struct pvf_worker *w = &d->worker;

	if (w->state == PVF_RUNNING) {
		if (d->generation != w->generation) {
			d->generation = w->generation;
			d->starts++;
		}
		enter(d, PVF_DISK_READY);
	} else {
		enter(d, PVF_DISK_WAITING);
	}
	if (d->direct.done_count)
		kick(d);
}

/* What the queue's own descriptors say, and a service in any case. */
static void serve_timers(struct pvf_disk *d)
{
	struct epoll_event events[EVENTS];
	int n = epoll_wait(d->queue_epoll, events, EVENTS, 0);

	for (int i = 0; i < n; i++)
		pvf_queue_event(d->worker.queue, events[i].data.u64, events[i].events);
	pvf_queue_service(d->worker.queue);
}

static void *control(void *arg)
{
	struct pvf_disk *d = arg;
	struct pvf_worker *w = &d->worker;
	struct epoll_event events[EVENTS];
	int timeout = -1;

	while (1) {
		int n = epoll_wait(w->epoll_fd, events, EVENTS, timeout);

		pthread_mutex_lock(&d->lock);
		clear_event(d->alarm, &d->alarmed);
		if (d->closing)
			break;
		if (w->state == PVF_DRAINING && !w->queue->polling) {
			w->queue->polling = true;
			kick(d); /* who has armed events that will not come now arms them again */
		}
		serve_timers(d);
		pvf_worker_events(w, events, n > 0 ? n : 0);
		if (w->exiting || w->ctl.fd < 0) {
			gone(d);
			break;
		}
		look(d);
		timeout = w->queue->again ? 0 : w->state == PVF_DRAINING ? DRAIN_TICK : -1;
		pthread_mutex_unlock(&d->lock);
	}
	pthread_mutex_unlock(&d->lock);
	return NULL;
}

/* Opening and closing */

static int watch(int epoll_fd, int fd, uint64_t tag)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

static void release(struct pvf_disk *d)
{
	struct pvf_worker *w = &d->worker;

	if (w->queue)
		w->queue->epoll_fd = d->queue_epoll;
	pvf_worker_end(w);
	close_fd(d->user_epoll);
	close_fd(d->kick);
	close_fd(d->alarm);
	pthread_cond_destroy(&d->changed);
	pthread_mutex_destroy(&d->lock);
	free(d);
}

static int prepare(struct pvf_disk *d)
{
	struct pvf_worker *w = &d->worker;
	const char *why;
	int rc = pvf_worker_init(w, -1, "disk", 1, &why);

	if (rc)
		return rc;
	d->queue_epoll = w->queue->epoll_fd;
	d->user_epoll = epoll_create1(EPOLL_CLOEXEC);
	d->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	d->alarm = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (d->user_epoll < 0 || d->kick < 0 || d->alarm < 0)
		return -errno;
	rc = watch(d->user_epoll, d->kick, TAG_KICK);
	if (!rc)
		rc = watch(w->epoll_fd, d->alarm, TAG_ALARM);
	if (!rc)
		rc = watch(w->epoll_fd, d->queue_epoll, TAG_QUEUE);
	/* The timers stay the control thread's; the event channel will be the program's. */
	w->queue->epoll_fd = d->user_epoll;
	w->queue->source_ops = &source_ops;
	w->queue->source = &d->direct.parts;
	return rc;
}

static int start_thread(struct pvf_disk *d)
{
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int rc = pthread_create(&d->thread, NULL, control, d);

	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!rc)
		pthread_setname_np(d->thread, "pvf-disk");
	return -rc;
}

EXPORT int pvf_disk_open_fd(int fd, struct pvf_disk **disk)
{
	struct pvf_disk *d;
	int flags = fcntl(fd, F_GETFL);
	pthread_condattr_t attr;

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
		return -errno;
	d = calloc(1, sizeof(*d));
	if (!d)
		return -ENOMEM;
	d->user_epoll = d->kick = d->alarm = -1;
	d->worker.epoll_fd = d->worker.notes_fd = d->worker.ctl.fd = d->worker.stats.fd = -1;
	pthread_mutex_init(&d->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&d->changed, &attr);
	pthread_condattr_destroy(&attr);
	pvf_direct_init(&d->direct);
	int rc = prepare(d);

	if (!rc) {
		pvf_worker_connect(&d->worker, fd);
		pvf_ctl_flush(&d->worker.ctl);
		rc = start_thread(d);
	}
	if (rc) {
		release(d);
		return rc;
	}
	*disk = d;
	return 0;
}

/* The descriptor that stands behind `name` in the environment; -1: it is not there. */
static int lent_fd(const char *name)
{
	const char *at = getenv(PVF_DISK_VARIABLE);

	while (at && *at) {
		size_t length = strcspn(at, "=,");

		if (at[length] == '=' &&
		    (!name || (strlen(name) == length && !strncmp(name, at, length)))) {
			char *end;
			long fd = strtol(at + length + 1, &end, 10);

			if (end != at + length + 1 && (!*end || *end == ',') && fd >= 0 && fd < INT32_MAX)
				return (int)fd;
		}
		at += strcspn(at, ",");
		at += *at == ',';
	}
	return -1;
}

EXPORT int pvf_disk_open(const char *name, struct pvf_disk **disk)
{
	int fd = lent_fd(name), type = 0, rc;
	socklen_t size = sizeof(type);

	if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_SEQPACKET)
		return -ENODEV;
	/* It was inherited, so it was not close-on-exec; pvf_disk_open_fd() makes it so. */
	if (fcntl(fd, F_GETFD) & FD_CLOEXEC)
		return -EBUSY;
	rc = pvf_disk_open_fd(fd, disk);
	if (rc)
		return rc;
	rc = pvf_disk_ready(*disk, OPEN_PATIENCE);
	if (rc)
		pvf_disk_close(*disk);
	return rc;
}

EXPORT int pvf_disk_ready(struct pvf_disk *d, int timeout)
{
	struct timespec end;
	int rc = 0;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += timeout / 1000;
	end.tv_nsec += timeout % 1000 * 1000000l;
	if (end.tv_nsec >= 1000000000) {
		end.tv_nsec -= 1000000000;
		end.tv_sec++;
	}
	pthread_mutex_lock(&d->lock);
	while (d->state == PVF_DISK_WAITING && !rc)
		rc = timeout < 0 ? pthread_cond_wait(&d->changed, &d->lock)
				 : pthread_cond_timedwait(&d->changed, &d->lock, &end);
	rc = d->state == PVF_DISK_GONE ? -ENODEV : d->state == PVF_DISK_READY ? 0 : -rc;
	pthread_mutex_unlock(&d->lock);
	return rc;
}

static void settle_ring(struct pvf_disk *d)
{
	struct pvf_queue *q = d->worker.queue;
	struct timespec pause = {.tv_nsec = 1000000};

	for (int i = 0; i < CLOSE_PATIENCE && q->blk.in_flight && !q->blk.fault.rule; i++) {
		q->polling = true;
		q->serving = false;
		pvf_queue_service(q);
		if (q->blk.in_flight)
			nanosleep(&pause, NULL);
	}
}

EXPORT void pvf_disk_close(struct pvf_disk *d)
{
	pthread_mutex_lock(&d->lock);
	d->closing = true;
	set_event(d->alarm, &d->alarmed);
	pthread_mutex_unlock(&d->lock);
	pthread_join(d->thread, NULL);
	settle_ring(d);
	pvf_queue_detach(d->worker.queue, false);
	release(d);
}

/* Service by the program */

static void serve(struct pvf_disk *d)
{
	struct pvf_queue *q = d->worker.queue;

	q->polling = true;
	for (int i = 0; i < SERVICES; i++) {
		pvf_queue_service(q);
		if (!q->again)
			break;
	}
	if (q->notes)
		set_event(d->alarm, &d->alarmed);
}

/* What the descriptors at `user_epoll` say. */
static void take_events(struct pvf_disk *d, const struct epoll_event *events, int n)
{
	for (int i = 0; i < n; i++)
		if (events[i].data.u64 == TAG_KICK)
			clear_event(d->kick, &d->kicked);
		else
			pvf_queue_event(d->worker.queue, events[i].data.u64, events[i].events);
}

/* True: there is something to take already. */
static bool arm(struct pvf_disk *d)
{
	struct pvf_queue *q = d->worker.queue;
	bool more = d->direct.done_count || pvf_queue_arm(q);

	if (q->notes)
		set_event(d->alarm, &d->alarmed);
	return more;
}

EXPORT int pvf_disk_submit(struct pvf_disk *d)
{
	pthread_mutex_lock(&d->lock);
	serve(d);
	int rc = d->state == PVF_DISK_GONE ? -ENODEV : 0;

	pthread_mutex_unlock(&d->lock);
	return rc;
}

EXPORT int pvf_disk_poll(struct pvf_disk *d, struct pvf_disk_done *done, int max)
{
	pthread_mutex_lock(&d->lock);
	serve(d);
	int n = pvf_direct_take(&d->direct, done, max);

	pthread_mutex_unlock(&d->lock);
	return n;
}

EXPORT int pvf_disk_wait(struct pvf_disk *d, struct pvf_disk_done *done, int max, int timeout)
{
	int64_t end = timeout < 0 ? -1 : timeout ? now_ms() + timeout : 0;
	struct epoll_event events[EVENTS];
	bool late = !timeout;
	int n;

	while (1) {
		pthread_mutex_lock(&d->lock);
		serve(d);
		n = pvf_direct_take(&d->direct, done, max);
		bool over = n || late || max <= 0 || !d->direct.used;
		bool sleep = !over && !arm(d);

		pthread_mutex_unlock(&d->lock);
		if (over)
			return n;
		if (!sleep)
			continue;
		n = epoll_wait(d->user_epoll, events, EVENTS, left_ms(end));
		pthread_mutex_lock(&d->lock);
		take_events(d, events, n);
		pthread_mutex_unlock(&d->lock);
		late = end >= 0 && !left_ms(end);
	}
}

EXPORT int pvf_disk_fd(const struct pvf_disk *d)
{
	return d->user_epoll;
}

EXPORT int pvf_disk_arm(struct pvf_disk *d)
{
	struct epoll_event events[EVENTS];

	pthread_mutex_lock(&d->lock);
	take_events(d, events, epoll_wait(d->user_epoll, events, EVENTS, 0));
	serve(d);
	int more = arm(d);

	pthread_mutex_unlock(&d->lock);
	return more;
}
