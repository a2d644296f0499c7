/* SPDX-License-Identifier: BSD-2-Clause
 *
 * /dev/ublk-control: making, starting, recovering and ending ublk devices. The supervisor's side, as
 * Python sees it (pvfront.blkfront._ublk); needs CAP_SYS_ADMIN.
 * Linux 6.12 drivers/block/ublk_drv.c, ublk_ctrl_*().
 *
 * Every command is one io_uring command on a ring of its own. Each waits up to `timeout_ms`, of
 * which the caller's thread spends no more; -ETIME leaves the command to the kernel, which
 * interrupts its wait.
 */
#ifndef PVF_UBLK_CONTROL_H
#define PVF_UBLK_CONTROL_H

#include <stdint.h>

struct pvf_ublk_info {
	uint32_t id;     /* N of /dev/ublkcN and /dev/ublkbN */
	uint32_t state;  /* 0 dead: made or stopped; 1 live; 2 quiesced: its server has died */
	uint32_t queues;
	uint32_t depth;
	uint64_t flags;  /* UBLK_F_* */
	uint64_t owner;  /* the server's own: kept by the kernel, not looked at */
};

struct pvf_ublk_disk {
	uint64_t sectors; /* of 512 bytes */
	uint32_t sector_size; /* bytes, logical */
	uint32_t physical_sector_size;
	uint32_t discard_granularity; /* bytes; 0: no discard */
	uint32_t discard_alignment;
	uint32_t read_only;
	uint32_t flush;   /* 1: it has a cache, flushes are wanted */
};

/* Each returns 0 or -errno. */

/* UBLK_F_* that the kernel knows. */
int pvf_ublk_features(int control, uint64_t *features, uint32_t timeout_ms);

/* Flags that the target cannot do without. */
uint64_t pvf_ublk_wanted(void);

/* Makes a device with `queues` and `owner`; id, and what became of queues and flags, come back. */
int pvf_ublk_add(int control, struct pvf_ublk_info *info, uint32_t timeout_ms);
int pvf_ublk_get(int control, uint32_t id, struct pvf_ublk_info *info, uint32_t timeout_ms);

/* Before the start: what the disk is. EINVAL: the kernel finds a number impossible. */
int pvf_ublk_params(int control, uint32_t id, const struct pvf_ublk_disk *disk,
		    uint32_t timeout_ms);

/* The disk appears. Waits until process `pid` has fetched every tag. */
int pvf_ublk_start(int control, uint32_t id, uint32_t pid, uint32_t timeout_ms);

/* Its server has died: a new one may open /dev/ublkcN. EBUSY: the kernel has not noticed yet. EINVAL:
 * it is in no state for that, or was prepared already. */
int pvf_ublk_recover(int control, uint32_t id, uint32_t timeout_ms);

/* Waits until the new server, `pid`, has fetched every tag; requests go on then. */
int pvf_ublk_recovered(int control, uint32_t id, uint32_t pid, uint32_t timeout_ms);

/* The disk disappears. Waits for requests that its server has. */
int pvf_ublk_stop(int control, uint32_t id, uint32_t timeout_ms);

/* The device goes once nobody has /dev/ublkcN open. */
int pvf_ublk_delete(int control, uint32_t id, uint32_t timeout_ms);

#endif
