/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Where requests come from instead of an NBD socket: a ublk device, a program of our own process.
 */
#ifndef PVF_SOURCE_H
#define PVF_SOURCE_H

#include "blk.h"

/* It has all of a request's bytes at hand, so none is ever half received. */
struct pvf_source_ops {
	/* Begins what waits while there is room in ring and pool, a bounded amount. `no_new`: only
	 * finishes what has begun. True: stopped by the bound. */
	bool (*intake)(void *source, struct pvf_blk *blk, bool no_new);
	/* Takes the engine's answers (pvf_blk_answer), all there are. True: intake may go on now. */
	bool (*deliver)(void *source, struct pvf_blk *blk);
	/* The engine has dropped its requests with their connection. */
	void (*restart)(void *source);
	/* It ended, `*error` 0: in order. NULL: it never does. */
	bool (*ended)(const void *source, int *error, const char **why);
	/* Closes it: its requests are dropped. NULL: it stays for the queue's life. */
	void (*close)(void *source);
};

#endif
