/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The disk engine: NBD requests in, blkif requests in a ring, NBD replies out. Pure: it knows
 * neither the socket nor the event channel, and never allocates.
 *
 * Theory of operation
 *
 *   An NBD *request* becomes one or more *pieces*; a piece is one blkif request: a direct one of up
 *   to eleven pages, or an indirect one of up to 256 and a page more for its descriptors. Intake is strictly in order: at most one request, the *current* one, is between its
 *   header and its last piece. Everything behind it waits in the socket. pvf_blk_step() takes the
 *   current request as far as slots and pages allow and says what it wants next.
 *
 *   A write's payload is received straight into the pages of its next pieces, the *filling* ones, of
 *   which each is issued when it is full: several at a time, so that one system call can bring
 *   payload for all of them. A read's pages are taken as its pieces are issued, and are
 *   held until their bytes have been sent.
 *
 *   Replies leave in a queue. A read that fits the pool joins it when all its pieces are done, so
 *   that it can still fail properly. A larger one *streams*: it joins when its first piece is
 *   good and is sent while the rest is being read. NBD's simple replies cannot take back a header
 *   that says success, so a failure after that ends the connection.
 *
 *   Why nothing waits for ever, whatever the order of completions:
 *   - A ring slot is held only by the backend. Each answer frees one.
 *   - A write's page is held only by the backend, but for the filling pieces, which wait for the
 *     client's payload alone; one of them is enough to go on. A piece makes do with `least` pages.
 *     Reads leave `reserve` pages to writes, enough for one such piece, so a write never waits
 *     for the client to take replies.
 *   - A request that has left intake holds all it needs; it finishes when the backend answers and
 *     the client reads.
 *   - A streaming read that has begun its reply may stand in front of finished reads that hold the
 *     rest of the pool. It is the current request, so nobody else takes pages, and it was granted
 *     at least one piece, whose pages come back as the client reads: it always goes on. Once its
 *     last piece is issued it is as any other.
 *   - An entry of the request table is freed by a reply. A client that does not read fills it, and
 *     thereby stops only its own intake.
 *
 *   The backend's answers are hostile: an answer names a piece by an id with a serial number in
 *   it, so that an old answer to a reused entry is found too (rule 5); what is done with it comes
 *   from the piece, never from the answer (rules 4, 6).
 */
#ifndef PVF_BLK_H
#define PVF_BLK_H

#include <sys/uio.h>

#include "nbd.h"
#include "pool.h"
#include "ring.h"

#define PVF_BLK_DIRECT 11u    /* segments of a direct request: BLKIF_MAX_SEGMENTS_PER_REQUEST */
#define PVF_BLK_SEGMENTS 256u /* of an indirect one, at most */
#define PVF_BLK_FILLING 6u    /* pieces that receive payload at a time */
#define PVF_BLK_PAYLOAD (PVF_BLK_FILLING * PVF_BLK_DIRECT) /* pages offered to it: 264 KiB */
#define PVF_REQUESTS 512u    /* NBD requests accepted and not answered */
/* A piece in the ring holds a slot, a read's piece waiting to be sent holds a page, and some may be
 * filling: this many entries never run out. */
#define PVF_PIECES (PVF_MAX_POOL_PAGES + 512u + PVF_BLK_FILLING)

enum pvf_step {
	PVF_STEP_HEADER,  /* between requests: pvf_blk_begin() the next */
	PVF_STEP_PAYLOAD, /* a write wants bytes: pvf_blk_payload() */
	PVF_STEP_SKIP,    /* a refused write's payload is to be thrown away: pvf_blk_skip() */
	PVF_STEP_SLOT,    /* waits for a ring slot */
	PVF_STEP_PAGE,    /* waits for pages */
	PVF_STEP_REQUEST, /* waits for an entry in the request table: for the client to read */
};

struct pvf_piece {
	uint64_t id;  /* as published in the ring: serial << 16 | index */
	uint32_t bytes;
	uint32_t sent; /* of a read's bytes: handed on, and the pages that they filled given back */
	uint16_t request;
	uint16_t next;  /* of the same read, in disk order */
	uint16_t first; /* of the pages that it holds, a chain in pool.next[] */
	uint16_t pages; /* how many they are */
	uint16_t descriptors; /* the page with an indirect request's segments, or PVF_NONE */
	uint8_t op; /* BLKIF_OP_*; of an indirect request the inner one, as in its answer */
	bool in_flight;
	bool done; /* a read's bytes have come */
};

struct pvf_request {
	uint8_t handle[8];
	uint8_t reply[PVF_NBD_REPLY];
	uint64_t sector; /* of 512 bytes */
	uint64_t began;  /* ns: `now` at its intake */
	uint32_t bytes;
	uint32_t issued;  /* bytes that became pieces */
	uint32_t to_send; /* a read's bytes not yet in the socket */
	uint32_t error;   /* enum pvf_nbd_error */
	uint16_t type;    /* NBD_CMD_* */
	uint16_t outstanding; /* pieces in the ring */
	uint16_t first, last; /* a read's pieces that are not yet sent */
	uint8_t reply_sent;   /* bytes */
	bool fua;             /* a flush is still to follow */
	bool stream;
	bool queued; /* in the reply queue, or already answered */
	bool orphan; /* nobody waits for it: free it when the backend has answered */
};

struct pvf_blk {
	struct pvf_ring ring;
	struct pvf_pool pool;
	struct pvf_geometry geo;
	struct pvf_fault fault;  /* rule broken: the ring is not touched any more */
	uint32_t features_off;   /* PVF_BLK_*: answered with EOPNOTSUPP */
	uint32_t stream_error;   /* a reply under way cannot be finished: end the connection */
	uint32_t in_flight;      /* pieces in the ring */
	uint32_t pending;        /* requests accepted and not answered */
	uint32_t begun;          /* requests accepted, ever: wraps */
	uint32_t segments_max;   /* pages of one piece */
	uint32_t least;          /* of which it takes fewer only when it wants fewer */
	uint32_t reserve;        /* pages that reads leave to writes */
	uint64_t now;            /* ns, CLOCK_MONOTONIC: set by the caller, once a turn */
	uint64_t serial;
	uint16_t current;        /* request at intake */
	uint16_t filling[PVF_BLK_FILLING]; /* its pieces that are receiving payload, in order */
	uint32_t fillings;
	uint32_t prepared;       /* bytes that these can take */
	uint32_t filled;         /* bytes that have come */
	uint32_t skip;           /* payload bytes to throw away */
	uint16_t flush[PVF_REQUESTS]; /* requests that wait for a slot for their FUA flush */
	uint32_t flush_head, flush_count;
	uint16_t reply[PVF_REQUESTS]; /* the reply queue */
	uint32_t reply_head, reply_count;
	uint16_t free_request[PVF_REQUESTS];
	uint32_t free_requests;
	uint16_t free_piece[PVF_PIECES];
	uint32_t free_pieces;
	struct pvf_request request[PVF_REQUESTS];
	struct pvf_piece piece[PVF_PIECES];
	struct pvf_blk_stats stats; /* private; pvf_stats_publish() shows them */
};

/* Once, before anything else. */
void pvf_blk_init(struct pvf_blk *blk);

/* A new connection to a backend: an empty ring and a whole pool. Requests of an earlier connection
 * that hold nothing (see pvf_blk_portable) go on with this one. */
void pvf_blk_attach(struct pvf_blk *blk, void *ring, size_t ring_bytes, void *pool,
		    uint32_t pool_pages, const uint32_t *grefs, bool scrub);

/* Takes the disk's numbers; a current request that no longer fits them fails. */
void pvf_blk_start(struct pvf_blk *blk, const struct pvf_geometry *geo);

/* True: no page and no slot is held, the connection can be left and the target kept. Gives back
 * pages that wait for payload of which nothing has come. */
bool pvf_blk_portable(struct pvf_blk *blk);

/* Forgets every request: the target is gone. Those in the ring are waited for, without replies. */
void pvf_blk_drop_target(struct pvf_blk *blk);

/* Forgets every piece: the connection is gone, with whatever was in its ring. */
void pvf_blk_detach(struct pvf_blk *blk);

enum pvf_step pvf_blk_step(struct pvf_blk *blk);

/* PVF_STEP_HEADER: accepts or refuses a request (never NBD_CMD_DISC). */
void pvf_blk_begin(struct pvf_blk *blk, const struct pvf_nbd_request *request);

/* PVF_STEP_PAYLOAD: where the next bytes go; returns the number of entries (at most
 * PVF_BLK_PAYLOAD), `*last` says that they end the request's payload. Then, how many came. */
int pvf_blk_payload(const struct pvf_blk *blk, struct iovec *iov, bool *last);
void pvf_blk_payload_add(struct pvf_blk *blk, size_t bytes);

/* PVF_STEP_SKIP: so many bytes of `blk->skip` were thrown away. */
void pvf_blk_skip(struct pvf_blk *blk, size_t bytes);

/* Reads up to `available` responses, one ring at most (rule 8). Returns how many; blk->fault is set
 * when one broke rule 5 or 6. */
uint32_t pvf_blk_drain(struct pvf_blk *blk, uint32_t available);

/* True: a read of `bytes` bytes fits the pool, so that it is answered whole. */
bool pvf_blk_whole(const struct pvf_blk *blk, uint32_t bytes);

/* The most of `bytes` bytes that is: what a larger request is cut into. */
uint32_t pvf_blk_part(const struct pvf_blk *blk, uint32_t bytes);

/* What can be sent now, at most `max` entries and several replies; 0: nothing. Then, how much of it
 * was taken. */
int pvf_blk_reply(struct pvf_blk *blk, struct iovec *iov, int max);
void pvf_blk_reply_sent(struct pvf_blk *blk, size_t bytes);

/* Instead of the stream, for who needs no bytes of NBD: the first finished request, in the order of
 * their completion; false: none. Then the pages of a good read from its byte `from` on, in at most
 * `max` entries, as often as wanted; then that it was delivered. No read may be larger than
 * pvf_blk_whole() allows. */
struct pvf_answer {
	uint8_t handle[8];
	uint16_t type;  /* NBD_CMD_* */
	uint32_t error; /* enum pvf_nbd_error */
	uint32_t bytes;
};

bool pvf_blk_answer(const struct pvf_blk *blk, struct pvf_answer *answer);
int pvf_blk_answer_data(const struct pvf_blk *blk, uint32_t from, struct iovec *iov, int max);
void pvf_blk_answered(struct pvf_blk *blk);

#endif
