/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The disk engine between a client and a backend that both do what the input says: any bytes in the
 * socket, any bytes in the shared ring page, answers in any order. Nothing may crash, and in the end
 * nothing may be held. Build with -Dfuzz=true and clang; run: fuzz_engine CORPUS-DIRECTORY.
 */
#include <sys/epoll.h>
#include <sys/socket.h>

#include <linux/nbd.h>

#include "backend.h"
#include "ctl.h"
#include "target.h"

#define DISK (1u << 20)
#define POOL 30u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static _Alignas(4096) unsigned char ring_page[4096];
static _Alignas(4096) unsigned char pool_pages[POOL * 4096];
static unsigned char disk[DISK];
static struct pvf_blk blk;
static struct pvf_target target;
static struct backend backend;

struct input {
	const uint8_t *at, *end;
};

static uint32_t number(struct input *in, size_t bytes)
{
	uint32_t value = 0;

	for (size_t i = 0; i < bytes && in->at < in->end; i++)
		value = value << 8 | *in->at++;
	return value;
}

static bool usable(void)
{
	return !blk.fault.rule && !target.gone;
}

static void engine(int epoll_fd)
{
	struct epoll_event events[4];

	for (int n = epoll_wait(epoll_fd, events, 4, 0), i = 0; i < n; i++)
		pvf_target_event(&target, events[i].events);
	uint32_t n = pvf_ring_poll(&blk.ring, &blk.fault);

	pvf_blk_drain(&blk, n);
	if (!usable())
		return;
	pvf_target_send(&target, &blk);
	pvf_target_receive(&target, &blk, false);
	pvf_target_send(&target, &blk);
	pvf_ring_push(&blk.ring);
	if (!blk.fault.rule)
		pvf_ring_final_check(&blk.ring, &blk.fault);
}

/* The backend's private view: the page may hold anything, so it takes only what makes sense. */
static void take(void)
{
	uint32_t prod = ((struct blkif_sring *)ring_page)->req_prod;

	if (prod - backend.ring.rsp_prod_pvt > 32 || prod - backend.ring.req_cons > 32)
		return;
	while (backend.ring.req_cons != prod && backend.held < 32)
		memcpy(&backend.request[backend.held++],
		       RING_GET_REQUEST(&backend.ring, backend.ring.req_cons++),
		       sizeof(struct blkif_request));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	struct pvf_geometry geo = {.sectors = DISK / 512, .sector_size = 512,
				   .features = PVF_BLK_FLUSH | PVF_BLK_DISCARD};
	static union pvf_ctl_down message;
	uint32_t grefs[POOL];
	uint32_t pages = 2 + number(&in, 1) % (POOL - 1);
	int epoll_fd = epoll_create1(0), pair[2];
	static unsigned char sink[65536];

	memcpy(&message, data, size < sizeof(message) ? size : sizeof(message));
	pvf_ctl_check(&message, size < sizeof(message) ? size : sizeof(message), 2);

	geo.max_segments = 1 + number(&in, 1) % 11;
	backend_grefs(grefs, pages);
	pvf_blk_init(&blk);
	pvf_blk_attach(&blk, ring_page, sizeof(ring_page), pool_pages, pages, grefs, false);
	pvf_blk_start(&blk, &geo);
	backend_init(&backend, ring_page, sizeof(ring_page), pool_pages, pages, disk, DISK);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(!pvf_target_open(&target, pair[1], epoll_fd, 1));

	while (in.at < in.end && usable()) {
		uint32_t op = number(&in, 1), n;
		struct nbd_request r;

		switch (op % 7) {
		case 0: /* a request that is well framed */
			n = number(&in, 2);
			r = (struct nbd_request){
				.magic = htobe32(NBD_REQUEST_MAGIC),
				.type = htobe32(number(&in, 1) % 6 | (op & 128 ? 1u << 16 : 0)),
				.from = htobe64((uint64_t)number(&in, 2) * 512),
				.len = htobe32(n * 512 % (DISK / 2)),
			};
			send(pair[0], &r, sizeof(r), MSG_DONTWAIT | MSG_NOSIGNAL);
			break;
		case 1: /* payload, or nonsense */
			n = number(&in, 2);
			send(pair[0], sink, n % sizeof(sink), MSG_DONTWAIT | MSG_NOSIGNAL);
			break;
		case 2:
			recv(pair[0], sink, 1 + number(&in, 2) % sizeof(sink), MSG_DONTWAIT);
			memset(sink, 0, sizeof(sink));
			break;
		case 3: /* the backend writes anywhere in the page */
			n = number(&in, 2) % 4096;
			ring_page[n] = (unsigned char)number(&in, 1);
			break;
		case 4: /* an answer to something held, possibly bent */
			take();
			if (!backend.held)
				break;
			n = number(&in, 1) % backend.held;
			backend_respond(&backend, backend.request[n].id ^ (op & 128 ? 1 : 0),
					backend.request[n].operation, (int16_t)(op & 64 ? -2 : 0));
			backend.request[n] = backend.request[--backend.held];
			break;
		default:
			engine(epoll_fd);
		}
	}
	if (usable())
		engine(epoll_fd);
	close(pair[0]);
	pvf_target_close(&target);
	pvf_blk_drop_target(&blk);
	CHECK(blk.pool.free + 11 * blk.in_flight >= blk.pool.pages);
	if (!blk.in_flight)
		CHECK(pvf_blk_portable(&blk) && blk.free_requests == PVF_REQUESTS);
	pvf_blk_detach(&blk);
	CHECK(blk.free_requests == PVF_REQUESTS && blk.free_pieces == PVF_PIECES);
	close(epoll_fd);
	return 0;
}
