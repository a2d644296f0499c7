/* SPDX-License-Identifier: BSD-2-Clause */
#include "ublk_ring.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define TAG_BITS 16
#define DESC_BYTES \
	((PVF_UBLK_DEPTH * sizeof(struct ublksrv_io_desc) + PVF_PAGE_SIZE - 1) / PVF_PAGE_SIZE * \
	 PVF_PAGE_SIZE)
/* Between two queues' descriptors in the device's mapping (ublk_max_cmd_buf_size). */
#define DESC_STRIDE \
	((UBLK_MAX_QUEUE_DEPTH * sizeof(struct ublksrv_io_desc) + PVF_PAGE_SIZE - 1) / \
	 PVF_PAGE_SIZE * PVF_PAGE_SIZE)

int pvf_uring_make(struct pvf_uring *r, int epoll_fd, uint64_t tag, const char **why)
{
	struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED |
						  IORING_SETUP_SINGLE_ISSUER |
						  IORING_SETUP_DEFER_TASKRUN |
						  IORING_SETUP_TASKRUN_FLAG};
	struct io_uring_restriction only = {.opcode = IORING_RESTRICTION_SQE_OP,
					    .sqe_op = IORING_OP_URING_CMD};
	/* Never read: each write is a new edge. */
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = tag};

	*r = (struct pvf_uring){0};
	*why = "io_uring";
	int rc = io_uring_queue_init_params(PVF_UBLK_DEPTH, &r->ring, &params);

	if (rc)
		return rc;
	*why = "io_uring's restrictions";
	rc = io_uring_register_restrictions(&r->ring, &only, 1);
	if (!rc) {
		*why = "io_uring's eventfd";
		r->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		rc = r->event_fd < 0 ? -errno : io_uring_register_eventfd(&r->ring, r->event_fd);
		if (!rc && epoll_ctl(epoll_fd, EPOLL_CTL_ADD, r->event_fd, &event))
			rc = -errno;
		if (rc && r->event_fd >= 0)
			close(r->event_fd);
	}
	if (rc)
		io_uring_queue_exit(&r->ring);
	r->made = !rc;
	return rc;
}

void pvf_uring_free(struct pvf_uring *r)
{
	if (r->made) {
		io_uring_queue_exit(&r->ring);
		close(r->event_fd);
	}
	r->made = false;
}

int pvf_uring_open(struct pvf_uring *r, struct pvf_ublk *u, int fd, uint16_t queue,
		   const char **why)
{
	*why = "this worker was started without io_uring";
	if (!r->made)
		return -ENOTSUP;
	*why = "the ublk device's descriptors cannot be mapped";
	void *desc = mmap(NULL, DESC_BYTES, PROT_READ, MAP_SHARED, fd,
			  (off_t)(UBLKSRV_CMD_BUF_OFFSET + queue * DESC_STRIDE));

	if (desc == MAP_FAILED)
		return -errno;
	pvf_ublk_init(u, fd, queue, desc);
	r->epoch++;
	r->fetch = true;
	return 0;
}

void pvf_uring_close(struct pvf_uring *r, struct pvf_ublk *u)
{
	if (u->fd < 0)
		return;
	munmap((void *)u->desc, DESC_BYTES);
	close(u->fd);
	u->fd = -1;
	u->desc = NULL;
	u->commits = 0;
	r->fetch = false;
	r->epoch++; /* what the kernel still holds is nobody's */
}

static void command(struct pvf_uring *r, const struct pvf_ublk *u, uint32_t op, uint16_t tag,
		    int32_t result)
{
	/* There is a place: a tag has one command at a time, and every turn submits all. */
	struct io_uring_sqe *sqe = io_uring_get_sqe(&r->ring);

	PVF_ASSERT(sqe);
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, u->fd, NULL, 0, 0);
	sqe->cmd_op = op;
	sqe->user_data = r->epoch << TAG_BITS | tag;
	*(struct ublksrv_io_cmd *)sqe->cmd = (struct ublksrv_io_cmd){
		.q_id = u->queue, .tag = tag, .result = result};
}

static void completed(struct pvf_uring *r, struct pvf_ublk *u, const struct io_uring_cqe *cqe)
{
	if (u->fd < 0 || cqe->user_data >> TAG_BITS != r->epoch)
		return;
	if (cqe->res == UBLK_IO_RES_OK)
		pvf_ublk_fetched(u, (uint32_t)(cqe->user_data & ((1u << TAG_BITS) - 1)));
	else if (cqe->res == UBLK_IO_RES_ABORT)
		pvf_ublk_end(u, 0, "the ublk device was stopped");
	else
		pvf_ublk_end(u, -cqe->res, "the kernel refused to hand over requests");
}

/* The kernel has something that only our io_uring_enter() makes completions of. */
static bool waiting(const struct pvf_uring *r)
{
	return __atomic_load_n(r->ring.sq.kflags, __ATOMIC_SEQ_CST) &
	       (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

/* Whether the kernel signals the eventfd. */
static void want_events(struct pvf_uring *r, bool wanted)
{
	__atomic_store_n(r->ring.cq.kflags, wanted ? 0 : IORING_CQ_EVENTFD_DISABLED,
			 __ATOMIC_SEQ_CST);
}

/* Submits what is ready, takes what has come. */
static void enter(struct pvf_uring *r, struct pvf_ublk *u)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;
	int rc = io_uring_submit_and_get_events(&r->ring);

	if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
		pvf_ublk_end(u, -rc, "io_uring failed");
	io_uring_for_each_cqe (&r->ring, head, cqe) {
		completed(r, u, cqe);
		seen++;
	}
	io_uring_cq_advance(&r->ring, seen);
}

void pvf_uring_turn(struct pvf_uring *r, struct pvf_ublk *u)
{
	if (!r->made || !(r->enabled || r->fetch))
		return;
	if (!r->enabled) {
		int rc = io_uring_enable_rings(&r->ring);

		if (rc) {
			pvf_ublk_end(u, -rc, "io_uring cannot be enabled");
			return;
		}
		r->enabled = true;
	}
	if (u->fd >= 0 && !u->gone) {
		for (uint16_t tag = 0; r->fetch && tag < PVF_UBLK_DEPTH; tag++)
			command(r, u, UBLK_U_IO_FETCH_REQ, tag, -1);
		r->fetch = false;
		for (uint32_t i = 0; i < u->commits; i++)
			command(r, u, UBLK_U_IO_COMMIT_AND_FETCH_REQ, u->commit[i].tag,
				u->commit[i].result);
		u->commits = 0;
	}
	if (!io_uring_sq_ready(&r->ring) && !waiting(r))
		return;
	/* Or the completions that it makes would wake us for what is taken here. */
	want_events(r, false);
	enter(r, u);
	want_events(r, true);
	/* What came meanwhile told nobody, and newer kernels stop at 20 pieces of task work. From now on
	 * the kernel tells. (Asked once: the flag may stay without there being anything.) */
	if (waiting(r))
		enter(r, u);
	if (io_uring_sq_ready(&r->ring) && !u->gone)
		eventfd_write(r->event_fd, 1);
}

/* As a source. Answers first: what they free, and the requests that they bring, are for this turn. */

static bool deliver(void *source, struct pvf_blk *blk)
{
	struct pvf_ublk_source *s = source;

	/* Also called by who detaches, which is not the serving thread: commits wait for its turn. */
	pvf_parts_deliver(&s->ublk.parts, blk);
	return s->ublk.commits;
}

static bool intake(void *source, struct pvf_blk *blk, bool no_new)
{
	struct pvf_ublk_source *s = source;

	pvf_parts_deliver(&s->ublk.parts, blk);
	pvf_uring_turn(&s->uring, &s->ublk);
	return !s->ublk.gone && pvf_parts_intake(&s->ublk.parts, blk, no_new);
}

static void restart(void *source)
{
	pvf_parts_restart(&((struct pvf_ublk_source *)source)->ublk.parts);
}

static bool ended(const void *source, int *error, const char **why)
{
	const struct pvf_ublk *u = &((const struct pvf_ublk_source *)source)->ublk;

	*error = u->error;
	*why = u->why;
	return u->gone;
}

static void close_source(void *source)
{
	struct pvf_ublk_source *s = source;

	pvf_uring_close(&s->uring, &s->ublk);
}

const struct pvf_source_ops pvf_ublk_ops = {
	.intake = intake,
	.deliver = deliver,
	.restart = restart,
	.ended = ended,
	.close = close_source,
};
