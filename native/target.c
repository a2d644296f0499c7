/* SPDX-License-Identifier: BSD-2-Clause */
#include "target.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/nbd.h>

#define STEPS 256 /* a turn */
#define SEND_IOV 256
#define JUNK 16384
#define SMALL 16384u /* bytes of a write that may be copied once more */
#define HEADERS (16u * PVF_NBD_HEADER)

static int watch(struct pvf_target *t, int op, bool out)
{
	struct epoll_event event = {
		.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (out ? EPOLLOUT : 0),
		.data.u64 = t->tag,
	};

	return epoll_ctl(t->epoll_fd, op, t->fd, &event) ? -errno : 0;
}

int pvf_target_open(struct pvf_target *t, int fd, int epoll_fd, uint64_t tag)
{
	memset(t, 0, offsetof(struct pvf_target, ahead)); /* what was never used stays unallocated */
	t->fd = fd;
	t->epoll_fd = epoll_fd;
	t->tag = tag;
	t->rx_ready = t->tx_ready = true;
	int rc = watch(t, EPOLL_CTL_ADD, false);

	if (rc)
		t->fd = -1;
	return rc;
}

void pvf_target_close(struct pvf_target *t)
{
	if (t->fd < 0)
		return;
	/* A descriptor that was passed on by somebody else too would stay in the set. */
	epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, t->fd, NULL);
	close(t->fd);
	t->fd = -1;
	t->rx_ready = t->tx_ready = false;
}

static void end(struct pvf_target *t, int error, const char *why)
{
	if (t->gone)
		return;
	t->gone = true;
	t->error = error;
	t->why = why;
}

void pvf_target_event(struct pvf_target *t, uint32_t events)
{
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		t->rx_ready = true;
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		t->ended = true;
	if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR) && !t->tx_ready) {
		t->tx_ready = true;
		watch(t, EPOLL_CTL_MOD, false);
	}
}

/* Whether the client has gone, whatever it has left to be read. */
static bool hung_up(const struct pvf_target *t)
{
	struct msghdr nothing = {0};

	return sendmsg(t->fd, &nothing, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == EPIPE;
}

/* Receives into `iov`, of which the first `wanted` bytes are payload and the rest is `ahead`.
 * Returns the payload bytes that came; `t->turn` counts all. */
static size_t receive(struct pvf_target *t, struct iovec *iov, int n, size_t wanted, bool boundary)
{
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
	size_t asked = 0;

	for (int i = 0; i < n; i++)
		asked += iov[i].iov_len;
	ssize_t got = recvmsg(t->fd, &msg, MSG_DONTWAIT);

	if (got < 0) {
		if (errno == EAGAIN)
			t->rx_ready = false;
		else if (errno != EINTR)
			end(t, errno, "the NBD socket failed while receiving");
		return 0;
	}
	if (!got) {
		end(t, boundary ? 0 : ECONNRESET,
		    boundary ? "the client closed the NBD socket"
			     : "the client closed the NBD socket within a request");
		return 0;
	}
	/* What a client of several sockets left in one that it hung up it has sent on another since: a look
	 * at the socket before the bytes were taken would be too early. */
	if (t->several && hung_up(t)) {
		end(t, 0, "the client closed the NBD socket");
		return 0;
	}
	/* Less than asked for empties a stream socket; what comes later is a new edge. An end whose
	 * edge came together with the last bytes' has none of its own. */
	if ((size_t)got < asked && !t->ended)
		t->rx_ready = false;
	size_t payload = (size_t)got < wanted ? (size_t)got : wanted;

	t->turn += (uint32_t)got;
	t->ahead_end += (uint32_t)((size_t)got - payload);
	return payload;
}

/* Adds the free end of `ahead`, which is empty or holds part of a header, to `iov`. */
static int offer_ahead(struct pvf_target *t, struct iovec *iov, int n)
{
	uint32_t have = t->ahead_end - t->ahead_at;

	memmove(t->ahead, t->ahead + t->ahead_at, have);
	t->ahead_at = 0;
	t->ahead_end = have;
	iov[n] = (struct iovec){.iov_base = t->ahead + have,
				.iov_len = (t->bulky ? HEADERS : PVF_TARGET_AHEAD) - have};
	return n + 1;
}

static void next_header(struct pvf_target *t, struct pvf_blk *blk)
{
	struct pvf_nbd_request request;

	if (!pvf_nbd_parse(t->ahead + t->ahead_at, &request)) {
		end(t, EPROTO, "the client sent something that is no NBD request (bad magic)");
		return;
	}
	t->ahead_at += PVF_NBD_HEADER;
	if (request.type == NBD_CMD_WRITE)
		t->bulky = request.length > SMALL;
	if (request.type == NBD_CMD_DISC)
		t->disc = true;
	else
		pvf_blk_begin(blk, &request);
}

static void receive_payload(struct pvf_target *t, struct pvf_blk *blk)
{
	struct iovec iov[PVF_BLK_PAYLOAD + 1];
	bool last;
	int n = pvf_blk_payload(blk, iov, &last);
	size_t wanted = 0, have = t->ahead_end - t->ahead_at, copied = 0;

	for (int i = 0; have && i < n; i++) {
		size_t part = iov[i].iov_len < have ? iov[i].iov_len : have;

		memcpy(iov[i].iov_base, t->ahead + t->ahead_at, part);
		t->ahead_at += (uint32_t)part;
		have -= part;
		copied += part;
	}
	if (copied) {
		pvf_blk_payload_add(blk, copied);
		return;
	}
	for (int i = 0; i < n; i++)
		wanted += iov[i].iov_len;
	if (last)
		n = offer_ahead(t, iov, n);
	pvf_blk_payload_add(blk, receive(t, iov, n, wanted, false));
}

static void receive_junk(struct pvf_target *t, struct pvf_blk *blk)
{
	uint8_t junk[JUNK]; /* of this thread */
	struct iovec iov[2] = {{.iov_base = junk, .iov_len = pvf_min32(blk->skip, JUNK)}};
	uint32_t have = pvf_min32(t->ahead_end - t->ahead_at, blk->skip);
	int n = 1;

	if (have) {
		t->ahead_at += have;
		pvf_blk_skip(blk, have);
		return;
	}
	if (iov[0].iov_len == blk->skip)
		n = offer_ahead(t, iov, n);
	pvf_blk_skip(blk, receive(t, iov, n, iov[0].iov_len, false));
}

/* True: the step went on without the socket's help or with it; false: nothing to do for now. */
static bool receive_step(struct pvf_target *t, struct pvf_blk *blk, bool no_new)
{
	bool ahead = t->ahead_at < t->ahead_end;

	switch (pvf_blk_step(blk)) {
	case PVF_STEP_HEADER:
		if (t->disc && !blk->pending)
			end(t, 0, "the client disconnected");
		if (no_new || t->disc)
			return false;
		if (t->ahead_end - t->ahead_at >= PVF_NBD_HEADER) {
			next_header(t, blk);
			return true;
		}
		if (t->rx_ready) {
			struct iovec iov[1];
			bool boundary = !ahead;

			receive(t, iov, offer_ahead(t, iov, 0), 0, boundary);
			return true;
		}
		return false;
	case PVF_STEP_PAYLOAD:
		if (ahead || t->rx_ready) {
			receive_payload(t, blk);
			return true;
		}
		return false;
	case PVF_STEP_SKIP:
		if (ahead || t->rx_ready) {
			receive_junk(t, blk);
			return true;
		}
		return false;
	case PVF_STEP_SLOT:
		blk->stats.ring_full++;
		return false;
	case PVF_STEP_PAGE:
		blk->stats.pool_empty++;
		t->starved = true;
		return false;
	case PVF_STEP_REQUEST:
		t->starved = true;
		return false;
	}
	return false;
}

bool pvf_target_receive(struct pvf_target *t, struct pvf_blk *blk, bool no_new)
{
	t->starved = false;
	t->turn = 0;
	for (int i = 0; i < STEPS && t->turn < PVF_TARGET_BYTES; i++)
		if (t->gone || !receive_step(t, blk, no_new))
			return false;
	return true;
}

/* Cuts `iov` down to `bytes` bytes; returns the number of entries. `*all`: how many they are. */
static size_t cut(struct iovec *iov, size_t n, size_t bytes, size_t *all)
{
	*all = 0;
	for (size_t i = 0; i < n; i++) {
		if (iov[i].iov_len >= bytes - *all) {
			iov[i].iov_len = bytes - *all;
			*all = bytes;
			return i + 1;
		}
		*all += iov[i].iov_len;
	}
	return n;
}

bool pvf_target_send(struct pvf_target *t, struct pvf_blk *blk)
{
	struct iovec iov[SEND_IOV];
	struct msghdr msg = {.msg_iov = iov};
	size_t all;
	ssize_t sent;

	if (blk->stream_error)
		end(t, (int)blk->stream_error,
		    "a read larger than the pool failed after its reply had begun");
	if (t->gone || !t->tx_ready)
		return false;
	int n = pvf_blk_reply(blk, iov, SEND_IOV);

	if (!n)
		return false;
	msg.msg_iovlen = cut(iov, (size_t)n, PVF_TARGET_BYTES, &all);
	do
		sent = sendmsg(t->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	if (sent < 0 && errno != EAGAIN) {
		end(t, errno, "the NBD socket failed while sending");
		return false;
	}
	if (sent > 0)
		pvf_blk_reply_sent(blk, (size_t)sent);
	if (sent < (ssize_t)all) {
		blk->stats.target_blocked++;
		t->tx_ready = false;
		watch(t, EPOLL_CTL_MOD, true);
		return sent > 0 && t->starved;
	}
	return t->starved || all == PVF_TARGET_BYTES || n == SEND_IOV;
}
