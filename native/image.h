/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The in-flight table: all of a worker's private state that the next one needs to go on in the
 * middle of everything (docs/upgrade.md), as it lies in a memfd.
 *
 * It is the engine's own structures, copied whole: they hold indices and two pointers, which mean
 * nothing to anybody else and are made anew. So it can be read only by a program whose structures
 * are the same. `layout` is raised by whoever changes what a field means, `shape` follows from
 * sizes and offsets by itself. A worker that finds another one refuses, and the old one goes on.
 */
#ifndef PVF_IMAGE_H
#define PVF_IMAGE_H

#include "fence.h"
#include "net.h"
#include "port.h"
#include "target.h"

#define PVF_IMAGE_MAGIC 0x55465650u /* "PVFU" */
#define PVF_IMAGE_LAYOUT 2u

struct pvf_image_net { /* what a network's queue has instead of a disk's */
	struct pvf_net_tx tx;
	struct pvf_net_rx rx;
	struct pvf_net_stats ended;
	struct pvf_port_image rx_port; /* with `split` */
	uint64_t full, tap_errors, groups_told;
	uint64_t notifies, events, events_spurious, watchdog_hits, wakeups;
	uint32_t stall_seconds;
	uint8_t split, reserved[3];
};

struct pvf_image_queue {
	struct pvf_port_image port;
	struct pvf_unread unread;
	uint64_t spurious_at;
	uint64_t progress_at;
	uint64_t oldest;
	uint32_t spurious_run;
	uint32_t stall_for;
	uint32_t features_noted;
	uint32_t notes; /* enum pvf_queue_note, that its worker has not looked at */
	uint32_t ahead; /* bytes */
	uint8_t serving, no_new, drained, idle, stalled; /* 0 or not: a bool of noise is none */
	uint8_t target; /* it has an NBD socket, of which all up to `ended`, or a TAP */
	uint8_t disc, starved, bulky, ended;
	union {
		struct {
			struct pvf_blk blk;
			uint8_t ahead_bytes[PVF_TARGET_AHEAD];
		};
		struct pvf_image_net net;
	};
};

struct pvf_image {
	uint32_t magic; /* written last */
	uint32_t layout;
	uint64_t shape;
	uint64_t frozen_at; /* ns, CLOCK_MONOTONIC: since when no queue is served */
	uint32_t state;     /* enum pvf_worker_state: RUNNING or DRAINED */
	uint32_t generation;
	uint32_t device_class;
	uint32_t features_told;
	uint32_t queues; /* attached */
	uint32_t reserved;
	char name[PVF_NAME_MAX];
	struct pvf_group_set groups; /* of a network */
	struct pvf_image_queue queue[];
};

/* Of how many bytes the memfd must be at least. */
static inline size_t pvf_image_size(uint32_t queues)
{
	return sizeof(struct pvf_image) + queues * sizeof(struct pvf_image_queue);
}

_Static_assert(sizeof(struct pvf_image) + PVF_MAX_QUEUES * sizeof(struct pvf_image_queue) <=
		       PVF_HAND_OVER_BYTES,
	       "a supervisor makes the memfd without knowing its layout");

/* Changes with the size or place of anything in the image. */
uint64_t pvf_image_shape(void);

/* net_image.c. The same as the next, of a network's queue; on a refusal both are all zero. */
const char *pvf_net_take_over(struct pvf_net_tx *tx, struct pvf_net_rx *rx, const struct pvf_image_net *image,
			      void *rings, size_t ring_bytes, void *pool, uint32_t pool_pages);

/* blk_image.c. Takes over an engine from `image`, which may change meanwhile: what is used is checked
 * after it was copied. Its ring and pool lie here now. NULL, or what is wrong with it: then `blk` is
 * as after pvf_blk_init(). */
const char *pvf_blk_take_over(struct pvf_blk *blk, const struct pvf_blk *image, void *ring,
			      size_t ring_bytes, void *pool, uint32_t pool_pages);

#endif
