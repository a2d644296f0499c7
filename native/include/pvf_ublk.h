/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the ublk target's two sides agree on, and the parts of Linux 6.12's <linux/ublk_cmd.h> that
 * Debian 12's, which is of 6.1, does not have. Numbers and names are the kernel's.
 */
#ifndef PVF_UBLK_H
#define PVF_UBLK_H

#include <linux/ioctl.h>
#include <linux/ublk_cmd.h>

#define PVF_UBLK_DEPTH 128        /* requests of one queue that the kernel keeps open */
#define PVF_UBLK_MAX_IO (1 << 20) /* bytes of the largest request */

#ifndef UBLK_F_CMD_IOCTL_ENCODE
#define UBLK_F_CMD_IOCTL_ENCODE (1UL << 6)
#endif
#ifndef UBLK_F_USER_COPY
#define UBLK_F_USER_COPY (1UL << 7)
#endif

#ifndef UBLK_U_CMD_ADD_DEV
#define UBLK_U_CMD_GET_DEV_INFO _IOR('u', UBLK_CMD_GET_DEV_INFO, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_ADD_DEV _IOWR('u', UBLK_CMD_ADD_DEV, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_START_DEV _IOWR('u', UBLK_CMD_START_DEV, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_STOP_DEV _IOWR('u', UBLK_CMD_STOP_DEV, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_SET_PARAMS _IOWR('u', UBLK_CMD_SET_PARAMS, struct ublksrv_ctrl_cmd)
#endif
#ifndef UBLK_U_CMD_START_USER_RECOVERY
#define UBLK_U_CMD_START_USER_RECOVERY \
	_IOWR('u', UBLK_CMD_START_USER_RECOVERY, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_END_USER_RECOVERY \
	_IOWR('u', UBLK_CMD_END_USER_RECOVERY, struct ublksrv_ctrl_cmd)
#endif
#ifndef UBLK_U_CMD_GET_FEATURES
#define UBLK_U_CMD_GET_FEATURES _IOR('u', 0x13, struct ublksrv_ctrl_cmd)
#define UBLK_FEATURES_LEN 8
#endif
#ifndef UBLK_U_CMD_DEL_DEV_ASYNC
#define UBLK_U_CMD_DEL_DEV_ASYNC _IOR('u', 0x14, struct ublksrv_ctrl_cmd)
#endif

#ifndef UBLK_U_IO_FETCH_REQ
#define UBLK_U_IO_FETCH_REQ _IOWR('u', UBLK_IO_FETCH_REQ, struct ublksrv_io_cmd)
#define UBLK_U_IO_COMMIT_AND_FETCH_REQ \
	_IOWR('u', UBLK_IO_COMMIT_AND_FETCH_REQ, struct ublksrv_io_cmd)
#endif

/* Where in /dev/ublkcN the data of a request lies: 25 bits of offset, 16 of tag, 12 of queue. */
#ifndef UBLK_TAG_OFF
#define UBLK_TAG_OFF 25
#define UBLK_QID_OFF (UBLK_TAG_OFF + 16)
#endif

_Static_assert(sizeof(struct ublksrv_ctrl_cmd) == 32, "ublk control command");
_Static_assert(sizeof(struct ublksrv_ctrl_dev_info) == 64, "ublk device info");
_Static_assert(sizeof(struct ublksrv_io_desc) == 24, "ublk io descriptor");
_Static_assert(sizeof(struct ublksrv_io_cmd) == 16, "ublk io command");

#endif
