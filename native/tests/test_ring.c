/* SPDX-License-Identifier: BSD-2-Clause */
#include "backend.h"
#include "ring.h"

#define ENTRY ((uint32_t)sizeof(union blkif_sring_entry))

static _Alignas(4096) unsigned char page[16 * 4096];

static struct pvf_ring ring;

static struct blkif_sring *shared(void)
{
	return (struct blkif_sring *)page;
}

static void fresh(uint32_t first)
{
	memset(page, 0xa5, sizeof(page));
	pvf_ring_init(&ring, page, 4096, ENTRY, first);
}

static void put(uint32_t n)
{
	struct blkif_request r = {.operation = BLKIF_OP_READ};

	for (uint32_t i = 0; i < n; i++) {
		r.id = i;
		CHECK(pvf_ring_put(&ring, &r, sizeof(r)));
	}
}

static void sizes(void)
{
	CHECK_EQ(pvf_ring_entries(4096, ENTRY), __CONST_RING_SIZE(blkif, 4096));
	CHECK_EQ(pvf_ring_entries(4096, ENTRY), 32);
	CHECK_EQ(pvf_ring_entries(16 * 4096, ENTRY), __CONST_RING_SIZE(blkif, 16 * 4096));
	CHECK_EQ(pvf_ring_entries(4096, 12), 256);
	CHECK_EQ(pvf_ring_entries(64, 12), 0);
	CHECK_EQ(pvf_ring_entries(4096, 0), 0);
}

static void init(void)
{
	fresh(0);
	CHECK_EQ(shared()->req_prod, 0);
	CHECK_EQ(shared()->rsp_prod, 0);
	CHECK_EQ(shared()->req_event, 1);
	CHECK_EQ(shared()->rsp_event, 1);
	for (size_t i = 16; i < 4096; i++)
		CHECK_EQ(page[i], 0);
}

static void full(void)
{
	struct blkif_request r = {0};

	fresh(0);
	put(32);
	CHECK_EQ(pvf_ring_free(&ring), 0);
	CHECK(!pvf_ring_put(&ring, &r, sizeof(r)));
}

static void unpublished(void)
{
	fresh(0);
	put(3);
	CHECK_EQ(shared()->req_prod, 0);
	pvf_ring_push(&ring);
	CHECK_EQ(shared()->req_prod, 3);
}

static void notify(void)
{
	fresh(0);
	CHECK(!pvf_ring_push(&ring)); /* nothing new */
	put(1);
	CHECK(pvf_ring_push(&ring)); /* req_event 1 is reached */
	put(1);
	CHECK(!pvf_ring_push(&ring)); /* and passed: the backend is awake */
	shared()->req_event = 4;
	put(1);
	CHECK(!pvf_ring_push(&ring));
	put(2);
	CHECK(pvf_ring_push(&ring)); /* 4 lies in 4..5 */
}

static void rule1(void)
{
	struct pvf_fault fault = {0};

	fresh(0);
	put(4);
	pvf_ring_push(&ring);
	shared()->rsp_prod = 5;
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 1);
	CHECK_EQ(fault.value, 5);
	fresh(0);
	put(32);
	pvf_ring_push(&ring);
	shared()->rsp_prod = 33;
	fault.rule = 0;
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 1);
}

static void unpublished_answer(void)
{
	struct pvf_fault fault = {0};

	fresh(0);
	put(2); /* filled, but the backend cannot know */
	shared()->rsp_prod = 1;
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 1);
}

static void rule2(void)
{
	struct pvf_fault fault = {0};
	struct blkif_response rsp;

	fresh(0);
	put(8);
	pvf_ring_push(&ring);
	shared()->rsp_prod = 6;
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 6);
	pvf_ring_get(&ring, &rsp, sizeof(rsp));
	shared()->rsp_prod = 5; /* ahead of what was read, behind what was seen */
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 2);
	fresh(100);
	put(1);
	pvf_ring_push(&ring);
	shared()->rsp_prod = 99;
	fault.rule = 0;
	CHECK_EQ(pvf_ring_final_check(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 2);
}

static void private_indices(void)
{
	struct pvf_fault fault = {0};

	fresh(0);
	put(4);
	pvf_ring_push(&ring);
	shared()->req_prod = 0xdeadbeef; /* ours, but the backend can write it */
	CHECK_EQ(pvf_ring_free(&ring), 28);
	put(1);
	pvf_ring_push(&ring);
	CHECK_EQ(shared()->req_prod, 5);
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 0);
	CHECK_EQ(fault.rule, 0);
}

static void copy(void)
{
	struct pvf_fault fault = {0};
	struct blkif_response rsp;

	fresh(0);
	put(1);
	pvf_ring_push(&ring);
	shared()->ring[0].rsp = (struct blkif_response){.id = 77, .operation = 1, .status = -1};
	shared()->rsp_prod = 1;
	CHECK_EQ(pvf_ring_poll(&ring, &fault), 1);
	pvf_ring_get(&ring, &rsp, sizeof(rsp));
	shared()->ring[0].rsp.id = 78;
	CHECK_EQ(rsp.id, 77);
	CHECK_EQ(rsp.status, -1);
	CHECK_EQ(pvf_ring_free(&ring), 32);
}

static void ask(void)
{
	struct pvf_fault fault = {0};

	fresh(5);
	put(20);
	pvf_ring_push(&ring);
	CHECK_EQ(pvf_ring_ask(&ring, 8, &fault), 0);
	CHECK_EQ(shared()->rsp_event, 5 + 8);
	shared()->rsp_prod = 5 + 7; /* fewer are no reason to look */
	CHECK_EQ(pvf_ring_ask(&ring, 8, &fault), 0);
	CHECK_EQ(shared()->rsp_event, 5 + 8);
	shared()->rsp_prod = 5 + 8;
	CHECK_EQ(pvf_ring_ask(&ring, 8, &fault), 8);
	shared()->rsp_prod = 5 + 21;
	CHECK_EQ(pvf_ring_ask(&ring, 8, &fault), 0);
	CHECK_EQ(fault.rule, 1);
}

static void final_check(void)
{
	struct pvf_fault fault = {0};

	fresh(0);
	put(2);
	pvf_ring_push(&ring);
	CHECK_EQ(pvf_ring_final_check(&ring, &fault), 0);
	CHECK_EQ(shared()->rsp_event, 1);
	shared()->rsp_prod = 2;
	CHECK_EQ(pvf_ring_final_check(&ring, &fault), 2);
	CHECK_EQ(shared()->rsp_event, 1); /* not asked for while there is work */
	struct blkif_response rsp;

	pvf_ring_get(&ring, &rsp, sizeof(rsp));
	pvf_ring_get(&ring, &rsp, sizeof(rsp));
	CHECK_EQ(pvf_ring_final_check(&ring, &fault), 0);
	CHECK_EQ(shared()->rsp_event, 3);
}

/* The headers' own backend on the other side of the page, over the wrap of the index. */
static void wrap(void)
{
	static unsigned char pool[4096], disk[512];
	struct backend b;
	uint64_t seed = 42;
	uint32_t next = 0, expected = 0;
	struct pvf_fault fault = {0};

	fresh(UINT32_MAX - 100);
	backend_init(&b, page, 4096, pool, 1, disk, sizeof(disk));
	b.ring.req_cons = b.ring.rsp_prod_pvt = UINT32_MAX - 100;
	for (int i = 0; i < 4000; i++) {
		uint32_t n = below(&seed, pvf_ring_free(&ring) + 1);

		for (uint32_t k = 0; k < n; k++) {
			struct blkif_request r = {.operation = BLKIF_OP_FLUSH_DISKCACHE,
						  .id = next++};

			CHECK(pvf_ring_put(&ring, &r, sizeof(r)));
		}
		pvf_ring_push(&ring);
		backend_take(&b);
		for (uint32_t k = below(&seed, b.held + 1); k; k--) {
			struct backend_request first = b.request[0];

			memmove(b.request, b.request + 1, --b.held * sizeof(first));
			backend_respond(&b, first.id, first.operation, 0);
		}
		for (uint32_t k = pvf_ring_final_check(&ring, &fault); k; k--) {
			struct blkif_response rsp;

			pvf_ring_get(&ring, &rsp, sizeof(rsp));
			CHECK_EQ(rsp.id, expected++);
		}
		CHECK_EQ(fault.rule, 0);
	}
	CHECK(next > 1000);
}

int main(void)
{
	static const struct test tests[] = {
		{"a ring has as many slots as ring.h computes", sizes},
		{"a fresh ring is what SHARED_RING_INIT makes, the whole page cleared", init},
		{"a full ring takes no request", full},
		{"a request is not visible before it is published", unpublished},
		{"the backend is notified only when req_event lies in what was published", notify},
		{"rule 1: more responses than requests outstanding break the ring", rule1},
		{"rule 1: a response to a request never published breaks the ring",
		 unpublished_answer},
		{"rule 2: rsp_prod moving backwards breaks the ring", rule2},
		{"rule 3: a response is copied once and not read again", copy},
		{"rule 4: what the backend writes over req_prod changes nothing", private_indices},
		{"an event is asked for with the last of several responses", ask},
		{"the final check asks for an event with the next response", final_check},
		{"the ring agrees with the headers' backend over the wrap at 2^32", wrap},
	};

	return RUN_TESTS(tests);
}
