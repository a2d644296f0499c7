/* SPDX-License-Identifier: BSD-2-Clause */
#include "ublk_control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <liburing.h>

#include "pvf_ublk.h"

#define SECTOR 512u
#define MAX_DISCARD (1u << 30) /* bytes of one request */

/* What a command points to. Not on the stack: the kernel may still use it after a timeout. */
union argument {
	struct ublksrv_ctrl_dev_info info;
	struct ublk_params params;
	uint64_t features;
};

static int run(struct io_uring *ring, int control, uint32_t op, const struct ublksrv_ctrl_cmd *cmd,
	       uint32_t timeout_ms)
{
	struct __kernel_timespec limit = {.tv_sec = timeout_ms / 1000,
					  .tv_nsec = timeout_ms % 1000 * 1000000ll};
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct io_uring_cqe *cqe;

	/* An SQE of 128 bytes: liburing clears the first 64. */
	memset(sqe, 0, 2 * sizeof(*sqe));
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, control, NULL, 0, 0);
	sqe->cmd_op = op;
	memcpy(sqe->cmd, cmd, sizeof(*cmd));
	int rc = io_uring_submit(ring);

	if (rc < 0)
		return rc;
	do
		rc = io_uring_wait_cqe_timeout(ring, &cqe, &limit);
	while (rc == -EINTR);
	return rc ? rc : cqe->res;
}

static int command(int control, uint32_t op, struct ublksrv_ctrl_cmd *cmd, union argument **argument,
		   size_t bytes, uint32_t timeout_ms)
{
	struct io_uring ring;
	struct io_uring_params params = {.flags = IORING_SETUP_SQE128};
	int rc = io_uring_queue_init_params(1, &ring, &params);

	if (rc)
		return rc;
	cmd->queue_id = (uint16_t)-1;
	if (argument) {
		cmd->addr = (uint64_t)(uintptr_t)*argument;
		cmd->len = (uint16_t)bytes;
	}
	rc = run(&ring, control, op, cmd, timeout_ms);
	if (rc == -ETIME && argument)
		*argument = NULL; /* left to the kernel */
	io_uring_queue_exit(&ring);
	return rc < 0 ? rc : 0;
}

static int plain(int control, uint32_t op, uint32_t id, uint32_t data, uint32_t timeout_ms)
{
	struct ublksrv_ctrl_cmd cmd = {.dev_id = id};

	cmd.data[0] = data;
	return command(control, op, &cmd, NULL, 0, timeout_ms);
}

int pvf_ublk_features(int control, uint64_t *features, uint32_t timeout_ms)
{
	union argument *a = calloc(1, sizeof(*a));
	struct ublksrv_ctrl_cmd cmd = {.dev_id = (uint32_t)-1};

	if (!a)
		return -ENOMEM;
	int rc = command(control, UBLK_U_CMD_GET_FEATURES, &cmd, &a, UBLK_FEATURES_LEN, timeout_ms);

	if (!rc)
		*features = a->features;
	free(a);
	return rc;
}

uint64_t pvf_ublk_wanted(void)
{
	return UBLK_F_USER_COPY | UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE |
	       UBLK_F_CMD_IOCTL_ENCODE;
}

static void take_info(struct pvf_ublk_info *info, const struct ublksrv_ctrl_dev_info *from)
{
	*info = (struct pvf_ublk_info){
		.id = from->dev_id,
		.state = from->state,
		.queues = from->nr_hw_queues,
		.depth = from->queue_depth,
		.flags = from->flags,
		.owner = from->ublksrv_flags,
	};
}

int pvf_ublk_add(int control, struct pvf_ublk_info *info, uint32_t timeout_ms)
{
	union argument *a = calloc(1, sizeof(*a));
	struct ublksrv_ctrl_cmd cmd = {.dev_id = (uint32_t)-1};

	if (!a)
		return -ENOMEM;
	a->info = (struct ublksrv_ctrl_dev_info){
		.nr_hw_queues = (uint16_t)info->queues,
		.queue_depth = PVF_UBLK_DEPTH,
		.max_io_buf_bytes = PVF_UBLK_MAX_IO,
		.dev_id = (uint32_t)-1, /* any */
		.flags = pvf_ublk_wanted(),
		.ublksrv_flags = info->owner,
	};
	int rc = command(control, UBLK_U_CMD_ADD_DEV, &cmd, &a, sizeof(a->info), timeout_ms);

	if (!rc)
		take_info(info, &a->info);
	free(a);
	return rc;
}

int pvf_ublk_get(int control, uint32_t id, struct pvf_ublk_info *info, uint32_t timeout_ms)
{
	union argument *a = calloc(1, sizeof(*a));
	struct ublksrv_ctrl_cmd cmd = {.dev_id = id};

	if (!a)
		return -ENOMEM;
	int rc = command(control, UBLK_U_CMD_GET_DEV_INFO, &cmd, &a, sizeof(a->info), timeout_ms);

	if (!rc)
		take_info(info, &a->info);
	free(a);
	return rc;
}

static uint8_t shift(uint32_t bytes)
{
	return (uint8_t)(bytes ? 31 - __builtin_clz(bytes) : 0);
}

int pvf_ublk_params(int control, uint32_t id, const struct pvf_ublk_disk *disk,
		    uint32_t timeout_ms)
{
	union argument *a = calloc(1, sizeof(*a));
	struct ublksrv_ctrl_cmd cmd = {.dev_id = id};
	uint32_t physical = disk->physical_sector_size > disk->sector_size ?
				    disk->physical_sector_size : disk->sector_size;

	if (!a)
		return -ENOMEM;
	a->params = (struct ublk_params){
		.len = sizeof(a->params),
		.types = UBLK_PARAM_TYPE_BASIC,
		.basic = {
			.attrs = (disk->read_only ? UBLK_ATTR_READ_ONLY : 0) |
				 (disk->flush ? UBLK_ATTR_VOLATILE_CACHE : 0),
			.logical_bs_shift = shift(disk->sector_size),
			.physical_bs_shift = shift(physical),
			.io_min_shift = shift(physical),
			.io_opt_shift = shift(physical),
			.max_sectors = PVF_UBLK_MAX_IO / SECTOR,
			.dev_sectors = disk->sectors,
		},
	};
	if (disk->discard_granularity) {
		uint32_t most = MAX_DISCARD / disk->discard_granularity * disk->discard_granularity;

		a->params.types |= UBLK_PARAM_TYPE_DISCARD;
		a->params.discard = (struct ublk_param_discard){
			.discard_alignment = disk->discard_alignment,
			.discard_granularity = disk->discard_granularity,
			.max_discard_sectors = (most ? most : MAX_DISCARD) / SECTOR,
			.max_discard_segments = 1,
		};
	}
	int rc = command(control, UBLK_U_CMD_SET_PARAMS, &cmd, &a, sizeof(a->params), timeout_ms);

	free(a);
	return rc;
}

int pvf_ublk_start(int control, uint32_t id, uint32_t pid, uint32_t timeout_ms)
{
	return plain(control, UBLK_U_CMD_START_DEV, id, pid, timeout_ms);
}

int pvf_ublk_recover(int control, uint32_t id, uint32_t timeout_ms)
{
	return plain(control, UBLK_U_CMD_START_USER_RECOVERY, id, 0, timeout_ms);
}

int pvf_ublk_recovered(int control, uint32_t id, uint32_t pid, uint32_t timeout_ms)
{
	return plain(control, UBLK_U_CMD_END_USER_RECOVERY, id, pid, timeout_ms);
}

int pvf_ublk_stop(int control, uint32_t id, uint32_t timeout_ms)
{
	return plain(control, UBLK_U_CMD_STOP_DEV, id, 0, timeout_ms);
}

int pvf_ublk_delete(int control, uint32_t id, uint32_t timeout_ms)
{
	return plain(control, UBLK_U_CMD_DEL_DEV_ASYNC, id, 0, timeout_ms);
}
