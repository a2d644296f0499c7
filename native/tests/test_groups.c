/* SPDX-License-Identifier: BSD-2-Clause */
#include <unistd.h>

#include "check.h"
#include "frames.h"
#include "groups.h"

static struct pvf_groups g;
static uint8_t told[200][6];
static bool added[200];
static uint32_t tells, room;

static bool tell(void *arg, const uint8_t *mac, bool add)
{
	CHECK(arg == &g);
	if (!room)
		return false;
	room--;
	CHECK(tells < 200);
	memcpy(told[tells], mac, 6);
	added[tells++] = add;
	return true;
}

static bool tell_with(uint32_t slots)
{
	tells = 0;
	room = slots;
	return pvf_groups_tell(&g, tell, &g);
}

/* What the backend is told must be this one thing. */
static void only(bool add, uint8_t a, uint8_t b, uint8_t c, uint8_t d, uint8_t e, uint8_t f)
{
	const uint8_t mac[6] = {a, b, c, d, e, f};

	CHECK(tell_with(200));
	CHECK_EQ(tells, 1);
	CHECK_EQ(added[0], add);
	CHECK(!memcmp(told[0], mac, 6));
}

static void nothing(void)
{
	CHECK(tell_with(200));
	CHECK_EQ(tells, 0);
}

static void fresh(void)
{
	pvf_groups_init(&g);
	CHECK(tell_with(200));
	CHECK_EQ(tells, 2); /* all systems, of both families */
}

static void look(struct frame *f)
{
	f->bytes[0] = 1;
	pvf_groups_snoop(&g, f->bytes, f->size, f->size);
}

static struct frame igmp(uint8_t type, uint8_t last)
{
	struct frame f = ip(4, 0, 2, 8);

	f.bytes[f.l4] = type;
	memcpy(f.bytes + f.l4 + 4, (const uint8_t[]){239, 200, 3, last}, 4);
	return f;
}

static struct frame igmp3(uint8_t kind, uint8_t last, uint16_t sources)
{
	struct frame f = ip(4, 0, 2, 8 + 8 + 4u * sources);
	uint8_t *at = f.bytes + f.l4;

	memset(at, 0, 16);
	at[0] = 0x22;
	put16(at + 6, 1);
	at[8] = kind;
	put16(at + 10, sources);
	memcpy(at + 12, (const uint8_t[]){239, 200, 3, last}, 4);
	return f;
}

static const uint8_t group6[16] = {0xff, 2, [13] = 7, [14] = 8, [15] = 9};

static struct frame mld(uint8_t type)
{
	struct frame f = ip(6, 0, 58, 24);

	f.bytes[f.l4] = type;
	memcpy(f.bytes + f.l4 + 8, group6, 16);
	extend(&f, 0, 0); /* the router alert */
	return f;
}

static struct frame mld2(uint8_t kind, uint16_t sources)
{
	struct frame f = ip(6, 0, 58, 8 + 20 + 16u * sources);
	uint8_t *at = f.bytes + f.l4;

	memset(at, 0, 28);
	at[0] = 143;
	put16(at + 6, 1);
	at[8] = kind;
	put16(at + 10, sources);
	memcpy(at + 12, group6, 16);
	extend(&f, 0, 0);
	return f;
}

static void all_versions(void)
{
	struct frame f;

	fresh();
	f = igmp(0x12, 1), look(&f), only(true, 1, 0, 0x5e, 72, 3, 1);
	f = igmp(0x16, 2), look(&f), only(true, 1, 0, 0x5e, 72, 3, 2);
	look(&f), nothing(); /* again */
	f = igmp(0x17, 2), look(&f), only(false, 1, 0, 0x5e, 72, 3, 2);
	f = igmp3(4, 3, 0), look(&f), only(true, 1, 0, 0x5e, 72, 3, 3);
	f = igmp3(3, 3, 0), look(&f), only(false, 1, 0, 0x5e, 72, 3, 3);
	f = igmp3(2, 4, 0), look(&f), only(true, 1, 0, 0x5e, 72, 3, 4);
	f = igmp3(5, 5, 2), look(&f), only(true, 1, 0, 0x5e, 72, 3, 5);
	f = igmp3(6, 5, 2), look(&f), nothing(); /* fewer sources */
	f = mld(131), look(&f), only(true, 0x33, 0x33, 0, 7, 8, 9);
	f = mld(132), look(&f), only(false, 0x33, 0x33, 0, 7, 8, 9);
	f = mld2(4, 0), look(&f), only(true, 0x33, 0x33, 0, 7, 8, 9);
	f = mld2(3, 0), look(&f), only(false, 0x33, 0x33, 0, 7, 8, 9);
	f = mld2(1, 3), look(&f), only(true, 0x33, 0x33, 0, 7, 8, 9);
}

static void others(void)
{
	struct frame f = udp(4, 0, 60);

	fresh();
	look(&f);
	f = igmp(0x11, 1), look(&f); /* a query */
	f = igmp(0x16, 1), f.bytes[f.l4 + 4] = 10, look(&f); /* no group */
	f = igmp(0x16, 1), f.bytes[0] = 2, pvf_groups_snoop(&g, f.bytes, f.size, f.size); /* to one station */
	f = igmp3(4, 1, 0), put16(f.bytes + f.l4 + 10, 9000), look(&f); /* sources that are not there */
	f = igmp3(4, 1, 0), put16(f.bytes + f.l3 + 2, 20 + 12), look(&f); /* a record that is not there */
	f = mld2(4, 0), f.bytes[f.l4] = 135, look(&f);
	for (uint32_t n = 0; n < f.size; n++)
		pvf_groups_snoop(&g, f.bytes, n, f.size);
	nothing();
	CHECK_EQ(g.set.count, 2);
}

static void whoever_stays(void)
{
	struct frame one = igmp(0x16, 1), two = igmp(0x16, 1), tagged = ip(4, 1, 2, 8);

	fresh();
	two.bytes[11] = 77; /* another station, behind a bridge */
	memcpy(tagged.bytes + tagged.l4, one.bytes + one.l4, 8);
	look(&one);
	look(&two);
	look(&tagged);
	only(true, 1, 0, 0x5e, 72, 3, 1);
	one.bytes[one.l4] = two.bytes[two.l4] = tagged.bytes[tagged.l4] = 0x17;
	look(&one);
	look(&tagged);
	nothing();
	look(&two);
	only(false, 1, 0, 0x5e, 72, 3, 1);
}

static void too_many(void)
{
	struct frame f;

	fresh();
	for (uint32_t i = 0; i < 100; i++)
		f = igmp(0x16, (uint8_t)i), look(&f);
	CHECK(tell_with(200));
	CHECK_EQ(tells, PVF_NET_GROUPS - 2);
	CHECK_EQ(g.lost, 100 - (PVF_NET_GROUPS - 2));
	CHECK_EQ(g.count, PVF_NET_GROUPS);
	for (uint32_t i = 0; i < 100; i++)
		f = igmp(0x17, (uint8_t)i), look(&f);
	for (uint32_t i = 0; i < PVF_NET_GROUPS - 2; i++)
		f = igmp(0x16, (uint8_t)(100 + i)), look(&f);
	CHECK(tell_with(200)); /* what is left goes first: a backend has no more room */
	CHECK_EQ(tells, 2 * (PVF_NET_GROUPS - 2));
	for (uint32_t i = 0; i < tells; i++)
		CHECK_EQ(added[i], i >= PVF_NET_GROUPS - 2);
}

static void as_there_is_room(void)
{
	struct frame f;

	fresh();
	for (uint32_t i = 0; i < 10; i++)
		f = igmp(0x16, (uint8_t)i), look(&f);
	CHECK(!tell_with(4));
	CHECK(!tell_with(3));
	CHECK(tell_with(3));
	nothing();
	pvf_groups_untold(&g); /* another backend */
	CHECK(tell_with(200));
	CHECK_EQ(tells, 12);
}

static void replaced(void)
{
	const uint8_t now[3][6] = {{1, 0, 0x5e, 72, 3, 1}, {0x33, 0x33, 0, 1, 2, 3}, {0x33, 0x33, 0, 0, 0, 1}};
	struct frame f;

	fresh();
	f = igmp(0x16, 1), look(&f);
	f = igmp(0x16, 2), look(&f);
	CHECK(tell_with(200));
	pvf_groups_replace(&g, now, 3);
	CHECK(tell_with(200));
	CHECK_EQ(tells, 2);
	CHECK(!added[0] && told[0][5] == 2 && added[1] && told[1][0] == 0x33);
	CHECK_EQ(g.set.count, 4);
	f = mld(131), memcpy(f.bytes + f.l4 + 21, (const uint8_t[]){1, 2, 3}, 3);
	look(&f), nothing(); /* now it is known who listens */
	CHECK_EQ(g.set.count, 4);
	f.bytes[f.l4] = 132, look(&f), only(false, 0x33, 0x33, 0, 1, 2, 3);
}

static void noise(void)
{
	uint64_t seed = 3;
	struct frame f;

	fresh();
	for (uint32_t i = 0; i < 50000; i++) {
		f = below(&seed, 2) ? igmp3((uint8_t)below(&seed, 8), (uint8_t)below(&seed, 99), 3)
				    : mld2((uint8_t)below(&seed, 8), 2);
		for (uint32_t n = below(&seed, 4); n; n--)
			f.bytes[below(&seed, f.size)] = (uint8_t)draw(&seed);
		pvf_groups_snoop(&g, f.bytes, 1 + below(&seed, f.size), f.size);
		CHECK(pvf_groups_possible(&g.set));
		if (!below(&seed, 50))
			tell_with(below(&seed, 140));
	}
}

int main(void)
{
	static const struct test tests[] = {
		{"joins and leaves of all versions are told to the backend", all_versions},
		{"what is no report changes nothing", others},
		{"an address is left when the last who listens has left", whoever_stays},
		{"more than the backend has room for is counted", too_many},
		{"what finds no room is told later, and everything to another backend", as_there_is_room},
		{"what the kernel says replaces what was learnt", replaced},
		{"reports of noise do no harm", noise},
	};

	return RUN_TESTS(tests);
}
