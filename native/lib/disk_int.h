/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A disk of pvfront/disk.h, for the files that make it up.
 */
#ifndef PVF_DISK_INT_H
#define PVF_DISK_INT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "direct.h"
#include "worker.h"

#define EXPORT __attribute__((visibility("default")))

struct pvf_disk {
	pthread_mutex_t lock;
	pthread_cond_t changed; /* `state` */
	pthread_t thread;
	struct pvf_worker worker;
	struct pvf_direct direct;
	uint32_t state;      /* enum pvf_disk_state */
	uint32_t generation; /* of the worker's, when it last ran */
	uint32_t starts;     /* generations that ran */
	bool closing;
	bool kicked, alarmed; /* the eventfds are set */
	int user_epoll, kick, alarm;
	int queue_epoll; /* the queue's timers */
};

#endif
