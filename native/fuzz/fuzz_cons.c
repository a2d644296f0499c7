/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A console's ring whose backend writes anything anywhere in the page at any moment.
 *
 * What must hold: nothing is read or written outside of the page and the private buffers; what is passed on was in
 * the page; a broken rule stops the taking; room, what came and what is unsent stay within their bounds; and what the
 * backend has not taken when a connection ends stands at the beginning of the next, unchanged.
 */
#include "fuzz.h"

#include <xen/io/console.h>

#include "cons.h"

static _Alignas(4096) unsigned char page[4096];

static void check(const struct pvf_cons *c)
{
	const unsigned char *data;
	uint32_t came = pvf_cons_came(c, &data);

	CHECK(came <= sizeof(c->in) && data >= c->in && data + came <= c->in + sizeof(c->in));
	CHECK(pvf_cons_unsent(c) <= PVF_CONS_OUT);
	CHECK(pvf_cons_room(c) + pvf_cons_unsent(c) == PVF_CONS_OUT);
	CHECK(c->held || c->in_seen - c->in_cons <= PVF_CONS_IN);
}

static void leave(struct pvf_cons *c)
{
	struct xencons_interface *ring = (struct xencons_interface *)(void *)page;

	pvf_cons_detach(c);
	uint32_t unsent = pvf_cons_unsent(c), at = c->out_cons;
	unsigned char kept[PVF_CONS_OUT];

	memcpy(kept, c->out, sizeof(kept));
	pvf_cons_attach(c, page);
	CHECK_EQ(pvf_cons_unsent(c), unsent);
	CHECK_EQ(ring->out_prod, unsent);
	for (uint32_t i = 0; i < unsent; i++)
		CHECK_EQ((unsigned char)ring->out[i], kept[(at + i) % PVF_CONS_OUT]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	struct xencons_interface *ring = (struct xencons_interface *)(void *)page;
	uint32_t *index[] = {&ring->in_cons, &ring->in_prod, &ring->out_cons, &ring->out_prod};
	static struct pvf_cons cons;
	unsigned char bytes[PVF_CONS_OUT];
	const unsigned char *came;
	struct pvf_fault fault = {0};
	uint32_t n;

	cons = (struct pvf_cons){0};
	pvf_cons_attach(&cons, page);
	while (more(&in)) {
		switch (upto(&in, 8)) {
		case 0: /* an index, by a little or to anything */
			*index[upto(&in, 4)] += (uint32_t)(int8_t)number(&in, 1);
			break;
		case 1:
			*index[upto(&in, 4)] = (uint32_t)number(&in, 4);
			break;
		case 2: /* an honest backend */
			n = (uint32_t)number(&in, 2) % (PVF_CONS_IN + 1);
			ring->in_prod = cons.in_seen + (n < PVF_CONS_IN - (cons.in_seen - cons.in_cons) ? n : 0);
			ring->out_cons = cons.out_prod;
			break;
		case 3: /* any byte */
			page[number(&in, 2) % sizeof(page)] = (unsigned char)number(&in, 1);
			break;
		case 4:
			if (!cons.fault.rule)
				pvf_cons_look(&cons);
			break;
		case 5:
			n = pvf_cons_came(&cons, &came);
			pvf_cons_passed(&cons, (uint32_t)number(&in, 2) % (n + 1));
			break;
		case 6:
			n = (uint32_t)number(&in, 2) % (pvf_cons_room(&cons) + 1);
			memset(bytes, (int)number(&in, 1), n);
			pvf_cons_put(&cons, bytes, n);
			break;
		default:
			pvf_cons_waiting(&cons, &fault);
			leave(&cons);
		}
		check(&cons);
	}
	pvf_cons_detach(&cons);
	check(&cons);
	return 0;
}
