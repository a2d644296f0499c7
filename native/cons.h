/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A console's ring (xen/io/console.h): two byte streams in one page. Pure: no descriptors, no system calls.
 *
 * "in" comes from the backend, "out" goes to it: the frontend's view, as in the header.
 *
 * Theory of operation
 *
 *   Nothing is lost with a connection. What the backend has published is copied privately before the ring is left.
 *   What it has not taken stays in a private copy until it says that it has, and is the first in the next ring. A ring
 *   that begins while something is still to be passed on begins as a full one, so that there is room for all that it
 *   may leave behind.
 *
 *   Both indices of the backend's are read once, checked against private ones, and never believed further: between
 *   its producer and our consumer lie 1,024 bytes at most (rule 1), and neither index moves backwards (rule 2).
 *   The page is only ever written to, but for those two indices and bytes of `in` (rule 4).
 */
#ifndef PVF_CONS_H
#define PVF_CONS_H

#include "pvf.h"

#define PVF_CONS_IN 1024u  /* bytes; powers of two: xencons_interface */
#define PVF_CONS_OUT 2048u

struct pvf_cons {
	struct xencons_interface *shared; /* NULL: there is no connection */
	uint32_t in_cons, in_seen;   /* taken; the backend's producer when last looked at */
	uint32_t out_cons, out_prod; /* taken by the backend, as it last said; published */
	uint32_t begin, end;         /* of `in`: what came and was not passed on */
	bool held;                   /* the ring looks full until all of that was passed on */
	struct pvf_fault fault;
	unsigned char in[2 * PVF_CONS_IN]; /* what was taken, and behind it the rest that a ring had at its end */
	unsigned char out[PVF_CONS_OUT];   /* byte i of the stream at i % PVF_CONS_OUT */
};

/* A new ring in `page`, which is the backend's only now. What the one before had not got rid of is published in it;
 * nobody need be told, since a backend looks when it connects. */
void pvf_cons_attach(struct pvf_cons *cons, void *page);

/* Takes what the backend has left in the ring, as far as it can be believed, and forgets the page. */
void pvf_cons_detach(struct pvf_cons *cons);

/* Looks at both indices of the backend's, and takes what came if all before was passed on. Returns by how many bytes
 * they have moved; sets `fault`, then nothing was taken. */
uint32_t pvf_cons_look(struct pvf_cons *cons);

/* What came, to be passed on: bytes at `*data`. */
uint32_t pvf_cons_came(const struct pvf_cons *cons, const unsigned char **data);
void pvf_cons_passed(struct pvf_cons *cons, uint32_t bytes);

/* Whether the backend has published something that no look has taken. Changes nothing but `*fault`. */
bool pvf_cons_waiting(const struct pvf_cons *cons, struct pvf_fault *fault);

/* Bytes that can be put now. */
uint32_t pvf_cons_room(const struct pvf_cons *cons);

/* Publishes `bytes` (pvf_cons_room() at most) of `data`. */
void pvf_cons_put(struct pvf_cons *cons, const void *data, uint32_t bytes);

/* Bytes that were put and the backend has not taken. */
uint32_t pvf_cons_unsent(const struct pvf_cons *cons);

#endif
