/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The empty NBD server: the roof that a server behind a socket can reach. It answers every request
 * at once, reads from memory that is one page of zeroes, writes into the void, on one thread with blocking
 * calls: as many requests a recv() as have come, as many replies a sendmsg() as that makes. What is
 * faster than this does not use a socket.
 *
 *     null_server SOCKET BYTES        one client at a time, until it is killed
 */
#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/nbd.h>

#define OPTION_MAX 8192u
#define PAYLOAD_MAX (32u << 20)
#define BATCH 256
#define IOV 512

#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u
#define OPT_EXPORT_NAME 1u
#define OPT_ABORT 2u
#define OPT_INFO 6u
#define OPT_GO 7u
#define REP_ACK 1u
#define REP_INFO 3u
#define REP_ERR_UNSUP (1u << 31 | 1u)
#define FLAGS (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_FUA)

struct wire_init {
	char magic[16];
	uint16_t flags;
} __attribute__((packed));

struct wire_option {
	char magic[8];
	uint32_t option, length;
} __attribute__((packed));

struct wire_reply {
	uint64_t magic;
	uint32_t option, type, length;
} __attribute__((packed));

struct wire_export {
	uint16_t type;
	uint64_t size;
	uint16_t flags;
} __attribute__((packed));

static unsigned char in[256 << 10], zeroes[PAYLOAD_MAX];

static bool get(int fd, void *to, size_t n)
{
	return !n || recv(fd, to, n, MSG_WAITALL) == (ssize_t)n;
}

static bool put(int fd, const void *from, size_t n)
{
	return send(fd, from, n, MSG_NOSIGNAL) == (ssize_t)n;
}

static bool reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t n)
{
	struct wire_reply r = {htobe64(0x3e889045565a9), htobe32(option), htobe32(type), htobe32(n)};

	return put(fd, &r, sizeof(r)) && (!n || put(fd, data, n));
}

static bool shake_hands(int fd, uint64_t size)
{
	struct wire_init init = {"NBDMAGICIHAVEOPT", htobe16(FIXED_NEWSTYLE | NO_ZEROES)};
	struct wire_export export = {0, htobe64(size), htobe16(FLAGS)};
	char data[OPTION_MAX];
	uint32_t flags;

	if (!put(fd, &init, sizeof(init)) || !get(fd, &flags, sizeof(flags)))
		return false;
	for (;;) {
		struct wire_option o;

		if (!get(fd, &o, sizeof(o)) || memcmp(o.magic, "IHAVEOPT", 8))
			return false;
		uint32_t option = be32toh(o.option), length = be32toh(o.length);

		if (length > sizeof(data) || !get(fd, data, length))
			return false;
		switch (option) {
		case OPT_EXPORT_NAME:
			return put(fd, &export.size, sizeof(export) - sizeof(export.type)) &&
			       (be32toh(flags) & NO_ZEROES || put(fd, zeroes, 124));
		case OPT_ABORT:
			reply(fd, option, REP_ACK, NULL, 0);
			return false;
		case OPT_INFO:
		case OPT_GO:
			if (!reply(fd, option, REP_INFO, &export, sizeof(export)) ||
			    !reply(fd, option, REP_ACK, NULL, 0))
				return false;
			if (option == OPT_GO)
				return true;
			break;
		default:
			if (!reply(fd, option, REP_ERR_UNSUP, NULL, 0))
				return false;
		}
	}
}

static bool send_all(int fd, struct iovec *iov, size_t n)
{
	while (n) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};
		ssize_t sent = sendmsg(fd, &msg, MSG_NOSIGNAL);

		if (sent <= 0)
			return false;
		for (; n && (size_t)sent >= iov->iov_len; iov++, n--)
			sent -= (ssize_t)iov->iov_len;
		if (n) {
			iov->iov_base = (char *)iov->iov_base + sent;
			iov->iov_len -= (size_t)sent;
		}
	}
	return true;
}

static void serve(int fd)
{
	static struct nbd_reply replies[BATCH];
	static struct iovec iov[IOV];
	size_t have = 0, skip = 0;

	for (;;) {
		ssize_t got = recv(fd, in + have, sizeof(in) - have, 0);
		size_t at = 0, n = 0, count = 0;

		if (got <= 0)
			return;
		have += (size_t)got;
		for (;;) {
			struct nbd_request q;
			size_t part = skip < have - at ? skip : have - at;

			at += part;
			skip -= part;
			if (skip || have - at < sizeof(q))
				break;
			if (count == BATCH) {
				if (!send_all(fd, iov, n))
					return;
				n = count = 0;
			}
			memcpy(&q, in + at, sizeof(q));
			at += sizeof(q);
			uint32_t type = be32toh(q.type) & 0xffff, length = be32toh(q.len);

			if (be32toh(q.magic) != NBD_REQUEST_MAGIC || length > PAYLOAD_MAX ||
			    type == NBD_CMD_DISC)
				return;
			struct nbd_reply *r = &replies[count++];

			*r = (struct nbd_reply){.magic = htobe32(NBD_REPLY_MAGIC)};
			memcpy(r->handle, q.handle, sizeof(r->handle));
			iov[n++] = (struct iovec){r, sizeof(*r)};
			if (type == NBD_CMD_READ)
				iov[n++] = (struct iovec){zeroes, length};
			else if (type == NBD_CMD_WRITE)
				skip = length;
		}
		/* An answer to a write is due when all of it has come. */
		if (skip && n) {
			struct iovec last = iov[--n];

			if (n && !send_all(fd, iov, n))
				return;
			while (skip) {
				got = recv(fd, in, skip < sizeof(in) ? skip : sizeof(in), 0);
				if (got <= 0)
					return;
				skip -= (size_t)got;
			}
			iov[0] = last;
			n = 1;
			at = have;
		}
		if (n && !send_all(fd, iov, n))
			return;
		memmove(in, in + at, have - at);
		have -= at;
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uint64_t size = argc == 3 ? strtoull(argv[2], NULL, 0) : 0;
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	if (!size || strlen(argv[1]) >= sizeof(address.sun_path)) {
		fprintf(stderr, "usage: null_server SOCKET BYTES\n");
		return 2;
	}
	strcpy(address.sun_path, argv[1]);
	unlink(argv[1]);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) ||
	    listen(listener, 8)) {
		perror(argv[1]);
		return 1;
	}
	for (;;) {
		int fd = accept(listener, NULL, NULL), buffer = 1 << 20;

		if (fd < 0)
			return 1;
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
		if (shake_hands(fd, size))
			serve(fd);
		close(fd);
	}
}
