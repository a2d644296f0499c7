/* SPDX-License-Identifier: BSD-2-Clause */
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <xen/io/console.h>

#include "check.h"
#include "cons.h"

static _Alignas(4096) unsigned char page[2][4096];
static struct pvf_cons cons;
static struct xencons_interface *ring;
static uint64_t seed;

static void fresh(void)
{
	memset(page, 0xa5, sizeof(page));
	cons = (struct pvf_cons){0};
	pvf_cons_attach(&cons, page[0]);
	ring = (struct xencons_interface *)(void *)page[0];
}

static void again(void)
{
	pvf_cons_detach(&cons);
	CHECK(!cons.shared);
	memset(page[0], 0xa5, 4096);
	pvf_cons_attach(&cons, page[0]);
}

/* The backend's ends. Byte i of a stream is always the same. */
static unsigned char byte_at(uint64_t i)
{
	return (unsigned char)(i * 7 + (i >> 8));
}

static uint32_t backend_writes(uint64_t *at, uint32_t most)
{
	uint32_t n = 0;

	while (n < most && ring->in_prod + n - ring->in_cons < PVF_CONS_IN) {
		ring->in[MASK_XENCONS_IDX(ring->in_prod + n, ring->in)] = (char)byte_at(*at);
		(*at)++;
		n++;
	}
	ring->in_prod += n;
	return n;
}

static void backend_reads(uint64_t *at, uint32_t most)
{
	while (most-- && ring->out_cons != ring->out_prod) {
		CHECK_EQ((unsigned char)ring->out[MASK_XENCONS_IDX(ring->out_cons, ring->out)], byte_at(*at));
		(*at)++;
		ring->out_cons++;
	}
}

/* Ours. */
static void pass(uint64_t *at, uint32_t most)
{
	const unsigned char *data;
	uint32_t n = pvf_cons_came(&cons, &data);

	n = n < most ? n : most;
	for (uint32_t i = 0; i < n; i++)
		CHECK_EQ(data[i], byte_at((*at)++));
	pvf_cons_passed(&cons, n);
}

static void put(uint64_t *at, uint32_t most)
{
	unsigned char data[PVF_CONS_OUT];
	uint32_t n = pvf_cons_room(&cons);

	n = n < most ? n : most;
	for (uint32_t i = 0; i < n; i++)
		data[i] = byte_at((*at)++);
	pvf_cons_put(&cons, data, n);
}

static void begins_empty(void)
{
	fresh();
	CHECK_EQ(ring->in_cons | ring->in_prod | ring->out_cons | ring->out_prod, 0);
	for (uint32_t i = 0; i < 4096; i++)
		CHECK_EQ(page[0][i], 0);
	CHECK_EQ(pvf_cons_room(&cons), PVF_CONS_OUT);
	CHECK_EQ(pvf_cons_look(&cons), 0);
}

static void passes_both_ways(void)
{
	uint64_t written = 0, passed = 0, sent = 0, read = 0;

	fresh();
	seed = 5;
	for (int i = 0; i < 20000; i++) {
		backend_writes(&written, below(&seed, 1500));
		put(&sent, below(&seed, 3000));
		pvf_cons_look(&cons);
		CHECK_EQ(cons.fault.rule, 0);
		pass(&passed, below(&seed, 1500));
		backend_reads(&read, below(&seed, 3000));
	}
	CHECK(written > 1000000 && sent > 1000000);
	CHECK(written - passed <= 2 * PVF_CONS_IN && sent - read <= PVF_CONS_OUT);
}

static void index_wraps(void)
{
	uint64_t written = 0, passed = 0, sent = 0, read = 0;

	fresh();
	cons.in_cons = cons.in_seen = ring->in_cons = ring->in_prod = 0u - 300;
	cons.out_cons = cons.out_prod = ring->out_cons = ring->out_prod = 0u - 300;
	for (int i = 0; i < 8; i++) {
		backend_writes(&written, 200);
		put(&sent, 200);
		pvf_cons_look(&cons);
		CHECK_EQ(cons.fault.rule, 0);
		pass(&passed, 200);
		backend_reads(&read, 200);
	}
	CHECK_EQ(passed, 1600);
	CHECK_EQ(read, 1600);
}

static void breaks(uint32_t rule, const char *field)
{
	uint64_t passed = 0;

	CHECK_EQ(pvf_cons_look(&cons), 0);
	CHECK_EQ(cons.fault.rule, rule);
	CHECK(!strcmp(cons.fault.field, field));
	pass(&passed, 4096);
	CHECK_EQ(passed, 0); /* nothing was taken */
}

static void rule_1(void)
{
	fresh();
	ring->in_prod = PVF_CONS_IN;
	CHECK_EQ(pvf_cons_look(&cons), PVF_CONS_IN);
	fresh();
	ring->in_prod = PVF_CONS_IN + 1;
	breaks(1, "in_prod");
	fresh();
	ring->out_cons = 1; /* of nothing */
	breaks(1, "out_cons");
}

static void rule_2(void)
{
	uint64_t sent = 0;

	fresh();
	ring->in_prod = 0u - 1;
	breaks(2, "in_prod");
	fresh();
	put(&sent, 100);
	ring->out_cons = 60;
	CHECK_EQ(pvf_cons_look(&cons), 60);
	ring->out_cons = 59;
	breaks(2, "out_cons");
	fresh();
	ring->in_prod = 9;
	pvf_cons_look(&cons);
	ring->in_prod = 20; /* seen, but what came before is still to be passed on */
	CHECK_EQ(pvf_cons_look(&cons), 11);
	ring->in_prod = 19;
	CHECK_EQ(pvf_cons_look(&cons), 0);
	CHECK_EQ(cons.fault.rule, 2);
}

static void rule_4(void)
{
	uint64_t sent = 0, read = 0;

	fresh();
	put(&sent, 1000);
	memset(ring->out, 0x11, sizeof(ring->out)); /* scribbled over; what it has not taken is sent again */
	ring->in_cons = ring->out_prod = 0x77777777;
	pvf_cons_look(&cons);
	CHECK_EQ(cons.fault.rule, 0);
	again();
	backend_reads(&read, 4096);
	CHECK_EQ(read, 1000);
}

static void broken_is_left_alone(void)
{
	uint64_t written = 0;
	const unsigned char *data;

	fresh();
	backend_writes(&written, 10);
	ring->out_cons = 5;
	pvf_cons_look(&cons);
	CHECK_EQ(cons.fault.rule, 1);
	pvf_cons_detach(&cons);
	CHECK_EQ(pvf_cons_came(&cons, &data), 0);
	pvf_cons_attach(&cons, page[0]);
	CHECK_EQ(cons.fault.rule, 0);
}

static void survives(void)
{
	uint64_t written = 0, passed = 0, sent = 0, read = 0;

	fresh();
	seed = 7;
	for (int i = 0; i < 30000; i++) {
		switch (below(&seed, 6)) {
		case 0:
			backend_writes(&written, below(&seed, 1500));
			break;
		case 1:
			put(&sent, below(&seed, 3000));
			break;
		case 2:
			pvf_cons_look(&cons);
			break;
		case 3:
			pass(&passed, below(&seed, 1500));
			break;
		case 4:
			backend_reads(&read, below(&seed, 3000));
			break;
		default:
			if (!below(&seed, 3))
				again();
		}
		CHECK_EQ(cons.fault.rule, 0);
	}
	for (int i = 0; i < 5; i++) {
		again();
		pvf_cons_look(&cons);
		pass(&passed, 4096);
		backend_reads(&read, 4096);
	}
	CHECK_EQ(passed, written);
	CHECK_EQ(read, sent);
	CHECK(written > 100000 && sent > 100000);
}

static void full_while_held(void)
{
	uint64_t written = 0, passed = 0;

	fresh();
	CHECK_EQ(backend_writes(&written, 4096), PVF_CONS_IN);
	pvf_cons_look(&cons);
	CHECK_EQ(backend_writes(&written, 4096), PVF_CONS_IN);
	for (int i = 0; i < 3; i++) {
		again();
		pvf_cons_look(&cons);
		CHECK_EQ(cons.fault.rule, 0);
		CHECK_EQ(backend_writes(&written, 4096), 0);
	}
	struct pvf_fault fault = {0};

	CHECK(!pvf_cons_waiting(&cons, &fault));
	pass(&passed, 4096);
	CHECK_EQ(passed, written);
	CHECK(pvf_cons_waiting(&cons, &fault)); /* to be looked at: there is room again */
	CHECK_EQ(pvf_cons_look(&cons), 0);
	CHECK_EQ(backend_writes(&written, 4096), PVF_CONS_IN);
}

static void watched(void)
{
	uint64_t written = 0, sent = 0, read = 0, passed = 0;
	struct pvf_fault fault = {0};

	fresh();
	CHECK(!pvf_cons_waiting(&cons, &fault));
	backend_writes(&written, 1);
	CHECK(pvf_cons_waiting(&cons, &fault));
	pvf_cons_look(&cons);
	CHECK(!pvf_cons_waiting(&cons, &fault));
	backend_writes(&written, 1);
	CHECK(!pvf_cons_waiting(&cons, &fault)); /* whoever gets the first byte has not taken it */
	pass(&passed, 1);
	CHECK(pvf_cons_waiting(&cons, &fault));
	pvf_cons_look(&cons);
	put(&sent, 1);
	CHECK(!pvf_cons_waiting(&cons, &fault));
	backend_reads(&read, 1);
	CHECK(pvf_cons_waiting(&cons, &fault));
	ring->in_prod += 5000;
	CHECK(!pvf_cons_waiting(&cons, &fault));
	CHECK_EQ(fault.rule, 1);
	CHECK_EQ(cons.fault.rule, 0);
}

int main(void)
{
	static const struct test tests[] = {
		{"a ring begins empty, its page cleared", begins_empty},
		{"bytes pass both ways in order, in pieces of any size", passes_both_ways},
		{"indices wrap", index_wraps},
		{"rule 1: an index further than the ring is long breaks it, and nothing is taken", rule_1},
		{"rule 2: an index that moves backwards breaks it", rule_2},
		{"rule 4: what the backend writes over our bytes and indices is never read", rule_4},
		{"of a broken ring nothing is taken at its end, and the next is whole", broken_is_left_alone},
		{"no byte is lost or doubled over connections that end at any moment", survives},
		{"a ring looks full while bytes of the one before are not passed on", full_while_held},
		{"the watchdog sees what nobody has looked at, and changes nothing", watched},
	};

	return RUN_TESTS(tests);
}
