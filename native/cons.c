/* SPDX-License-Identifier: BSD-2-Clause */
#include "cons.h"

#include <string.h>

#include <xen/io/console.h>

_Static_assert(sizeof(((struct xencons_interface *)0)->in) == PVF_CONS_IN, "in");
_Static_assert(sizeof(((struct xencons_interface *)0)->out) == PVF_CONS_OUT, "out");
_Static_assert(sizeof(struct xencons_interface) <= PVF_PAGE_SIZE, "one page");

void pvf_cons_attach(struct pvf_cons *c, void *page)
{
	unsigned char kept[PVF_CONS_OUT];
	uint32_t left = pvf_cons_unsent(c);

	for (uint32_t i = 0; i < left; i++)
		kept[i] = c->out[(c->out_cons + i) % PVF_CONS_OUT];
	memset(page, 0, PVF_PAGE_SIZE);
	c->shared = page;
	c->in_cons = c->in_seen = c->out_cons = c->out_prod = 0;
	c->held = c->begin != c->end;
	if (c->held)
		c->in_cons -= PVF_CONS_IN;
	__atomic_store_n(&c->shared->in_cons, c->in_cons, __ATOMIC_RELEASE);
	c->fault = (struct pvf_fault){0};
	pvf_cons_put(c, kept, left);
}

/* The backend's index `now`: it was `before`, and cannot be past `limit`. */
static bool accept_index(uint32_t now, uint32_t before, uint32_t limit, const char *field,
			 struct pvf_fault *fault)
{
	if (now - before <= limit - before)
		return true;
	/* Half of all numbers lie behind any, which is what backwards means. */
	bool back = before - now <= INT32_MAX;

	*fault = (struct pvf_fault){
		back ? 2 : 1, now, field,
		back ? "an index moved backwards" : "an index is further than the ring is long"};
	return false;
}

static bool read_indices(const struct pvf_cons *c, uint32_t *in_prod, uint32_t *out_cons,
			 struct pvf_fault *fault)
{
	/* Acquire: the bytes that an index speaks of are read, or overwritten, after it. */
	*in_prod = __atomic_load_n(&c->shared->in_prod, __ATOMIC_ACQUIRE);
	*out_cons = __atomic_load_n(&c->shared->out_cons, __ATOMIC_ACQUIRE);
	return accept_index(*in_prod, c->in_seen, c->in_cons + PVF_CONS_IN, "in_prod", fault) &&
	       accept_index(*out_cons, c->out_cons, c->out_prod, "out_cons", fault);
}

/* Copies what was published; there is room for it. */
static void take(struct pvf_cons *c)
{
	if (c->held)
		c->in_cons = c->in_seen;
	c->held = false;
	while (c->in_cons != c->in_seen)
		c->in[c->end++] = (unsigned char)c->shared->in[c->in_cons++ % PVF_CONS_IN];
	/* Release: the backend writes over these bytes from here on. */
	__atomic_store_n(&c->shared->in_cons, c->in_cons, __ATOMIC_RELEASE);
}

uint32_t pvf_cons_look(struct pvf_cons *c)
{
	uint32_t in_prod, out_cons;

	if (!read_indices(c, &in_prod, &out_cons, &c->fault))
		return 0;
	uint32_t moved = in_prod - c->in_seen + (out_cons - c->out_cons);

	c->in_seen = in_prod;
	c->out_cons = out_cons;
	if (c->begin == c->end) {
		c->begin = c->end = 0;
		take(c);
	}
	return moved;
}

void pvf_cons_detach(struct pvf_cons *c)
{
	uint32_t in_prod, out_cons;
	struct pvf_fault fault = {0};

	if (!c->shared)
		return;
	/* After a broken rule nothing of the page is looked at any more. */
	if (!c->fault.rule && read_indices(c, &in_prod, &out_cons, &fault)) {
		c->out_cons = out_cons;
		c->in_seen = in_prod;
		memmove(c->in, c->in + c->begin, c->end - c->begin);
		c->end -= c->begin;
		c->begin = 0;
		if (!c->held)
			take(c);
	}
	c->shared = NULL;
}

uint32_t pvf_cons_came(const struct pvf_cons *c, const unsigned char **data)
{
	*data = c->in + c->begin;
	return c->end - c->begin;
}

void pvf_cons_passed(struct pvf_cons *c, uint32_t bytes)
{
	PVF_ASSERT(bytes <= c->end - c->begin);
	c->begin += bytes;
}

bool pvf_cons_waiting(const struct pvf_cons *c, struct pvf_fault *fault)
{
	uint32_t in_prod, out_cons;

	return read_indices(c, &in_prod, &out_cons, fault) &&
	       ((in_prod != c->in_cons && c->begin == c->end) || out_cons != c->out_cons);
}

uint32_t pvf_cons_room(const struct pvf_cons *c)
{
	return PVF_CONS_OUT - pvf_cons_unsent(c);
}

void pvf_cons_put(struct pvf_cons *c, const void *data, uint32_t bytes)
{
	const unsigned char *from = data;

	PVF_ASSERT(bytes <= pvf_cons_room(c));
	for (uint32_t i = 0; i < bytes; i++) {
		uint32_t at = (c->out_prod + i) % PVF_CONS_OUT;

		c->out[at] = from[i];
		c->shared->out[at] = (char)from[i];
	}
	c->out_prod += bytes;
	/* Release: the backend reads these bytes from here on. */
	__atomic_store_n(&c->shared->out_prod, c->out_prod, __ATOMIC_RELEASE);
}

uint32_t pvf_cons_unsent(const struct pvf_cons *c)
{
	return c->out_prod - c->out_cons;
}
