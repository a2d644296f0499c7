/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the worker's files share with each other only: worker.c (the device's state machine),
 * worker_net.c and worker_cons.c (a network's messages, a console's), worker_tell.c (what it says),
 * hand_over.c (another takes over).
 */
#ifndef PVF_WORKER_INT_H
#define PVF_WORKER_INT_H

#include "worker.h"

/* Copies what fits; the rest of `to` is zero. */
void pvf_copy_text(char *to, size_t size, const char *from);

void pvf_tell_simple(struct pvf_worker *w, uint16_t type);
void pvf_tell_error(struct pvf_worker *w, uint32_t type, int error, const char *text);
void pvf_tell_broken(struct pvf_worker *w);
void pvf_tell_target_gone(struct pvf_worker *w, const struct pvf_queue *q);
void pvf_tell_features_off(struct pvf_worker *w, const struct pvf_queue *q);
void pvf_tell_stalled(struct pvf_worker *w, const struct pvf_queue *q);
void pvf_tell_hello(struct pvf_worker *w);

/* Who gets an answer finds the statistics that go with it. */
void pvf_worker_publish(struct pvf_worker *w);

bool pvf_character_device(int fd);
bool pvf_stream_socket(int fd);

/* Gives the message's descriptors to the queues from `first` on. 0 or errno with `*why`: then none was taken. */
int pvf_worker_targets(struct pvf_worker *w, uint32_t first, const char **why);

/* All queues are set up: they begin. */
void pvf_worker_serve(struct pvf_worker *w);

/* The messages of worker_net.c, worker_cons.c, and of hand_over.c. */
void pvf_handle_start_net(struct pvf_worker *w);
void pvf_handle_start_cons(struct pvf_worker *w);
void pvf_handle_trace(struct pvf_worker *w);
void pvf_handle_hand_over(struct pvf_worker *w);
void pvf_handle_take_over(struct pvf_worker *w);

#endif
