/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "frames.h"

static struct pvf_packet p;

static void parse(const struct frame *f)
{
	/* A copy that ends where the bytes end: a sanitizer sees who looks further. */
	uint32_t have = pvf_min32(f->size, PVF_PACKET_HEAD);
	uint8_t *copy = malloc(have ? have : 1);

	memcpy(copy, f->bytes, have);
	pvf_packet_parse(&p, copy, have, f->size);
	free(copy);
}

static void sums(void)
{
	uint8_t bytes[1031];
	uint64_t seed = 7;

	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)draw(&seed);
	for (uint32_t round = 0; round < 2000; round++) {
		uint32_t size = below(&seed, sizeof(bytes)), cut = size ? below(&seed, size) : 0;
		uint64_t sum = pvf_csum_add(0, bytes, cut, false);

		sum = pvf_csum_add(sum, bytes + cut, size - cut, cut & 1);
		CHECK_EQ(be16toh(pvf_csum_fold(sum)), slow_sum(0, bytes, size));
	}
	memset(bytes, 0xff, sizeof(bytes));
	CHECK_EQ(pvf_csum_fold(pvf_csum_add(0, bytes, 1024, false)), 0xffff);
	CHECK_EQ(pvf_csum_fold(pvf_csum_add(0, bytes, 0, false)), 0);
}

static void found(void)
{
	for (int family = 4; family <= 6; family += 2) {
		struct frame f = tcp(family, 0, 100);
		uint32_t l4 = 14 + (family == 4 ? 20u : 40u);

		parse(&f);
		CHECK_EQ(p.family, family);
		CHECK_EQ(p.l4, l4);
		CHECK_EQ(p.payload, l4 + 20);
		CHECK_EQ(p.csum, 16);
		CHECK_EQ(p.l4_bytes, 120);
		CHECK(pvf_packet_plain(&p));
		f = udp(family, 0, 100);
		parse(&f);
		CHECK_EQ(p.payload, l4 + 8);
		CHECK_EQ(p.csum, 6);
		CHECK(pvf_packet_plain(&p));
	}
}

static void tags(void)
{
	for (uint32_t n = 1; n <= 3; n++) {
		struct frame f = tcp(4, n, 10);

		parse(&f);
		CHECK_EQ(p.tags, n < 3 ? n : 2);
		CHECK_EQ(p.payload, n < 3 ? 14 + 4 * n + 40 : 0);
		CHECK(!pvf_packet_plain(&p));
	}
}

static void extensions(void)
{
	struct frame f = udp(6, 0, 10);

	extend(&f, 0, 1); /* hop-by-hop options, of 16 bytes */
	parse(&f);
	CHECK(p.extensions);
	CHECK_EQ(p.l4, 14 + 40 + 16);
	CHECK_EQ(p.payload, 14 + 40 + 16 + 8);
	CHECK(!pvf_packet_plain(&p));
	extend(&f, 44, 0); /* a fragment: what follows is anybody's guess */
	parse(&f);
	CHECK_EQ(p.family, 6);
	CHECK_EQ(p.l4, 0);
	f = udp(6, 0, 10);
	extend(&f, 60, 255); /* as long as can be */
	parse(&f);
	CHECK_EQ(p.payload, 0);
}

static void fragments(void)
{
	struct frame f = udp(4, 0, 100);

	f.bytes[14 + 6] = 0x20; /* more follow */
	parse(&f);
	CHECK_EQ(p.family, 4);
	CHECK_EQ(p.l4, 0);
	f.bytes[14 + 6] = 0;
	f.bytes[14 + 7] = 9; /* at an offset */
	parse(&f);
	CHECK_EQ(p.l4, 0);
	f.bytes[14 + 6] = 0x40; /* may not be cut: no fragment */
	f.bytes[14 + 7] = 0;
	parse(&f);
	CHECK(pvf_packet_plain(&p));
}

static void lies(void)
{
	struct frame f = tcp(4, 0, 100);

	f.bytes[14 + 3]++; /* longer than the packet */
	parse(&f);
	CHECK_EQ(p.family, 0);
	f = tcp(4, 0, 100);
	f.bytes[14] = 0x44; /* a header of 16 bytes */
	parse(&f);
	CHECK_EQ(p.family, 0);
	f = tcp(4, 0, 0);
	f.bytes[34 + 12] = 0x60; /* TCP's options beyond the end */
	parse(&f);
	CHECK_EQ(p.payload, 0);
	f = tcp(4, 0, 100);
	f.bytes[34 + 12] = 0x40; /* a header of 16 bytes */
	parse(&f);
	CHECK_EQ(p.payload, 0);
	f = udp(4, 0, 100);
	f.bytes[34 + 5]--; /* UDP's length is not IP's */
	parse(&f);
	CHECK_EQ(p.payload, 0);
	f = tcp(6, 0, 100);
	f.bytes[14 + 4] = 0xff; /* longer than the packet */
	parse(&f);
	CHECK_EQ(p.family, 0);
	f = tcp(6, 0, 100);
	f.bytes[14] = 0x40; /* IPv4 in an IPv6 frame */
	parse(&f);
	CHECK_EQ(p.family, 0);
}

static void padding(void)
{
	struct frame f = udp(4, 0, 4);

	f.size = 60; /* Ethernet's shortest: bytes behind the packet that are none of it */
	parse(&f);
	CHECK(pvf_packet_plain(&p));
	CHECK_EQ(p.l4_bytes, 12);
}

static void cut(void)
{
	struct frame all[] = {tcp(4, 1, 30), tcp(6, 2, 30), udp(4, 0, 30), udp(6, 1, 30), tcp(6, 0, 30)};

	extend(&all[4], 43, 3);
	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		for (uint32_t size = 0; size <= all[i].size; size++) {
			struct frame f = all[i];

			f.size = size;
			parse(&f);
			CHECK(!p.payload || p.payload <= size);
			CHECK(!p.l4 || p.l4 + p.l4_bytes <= size);
			CHECK_EQ(!!p.payload, size == all[i].size);
		}
}

static void noise(void)
{
	uint64_t seed = 3;

	for (uint32_t round = 0; round < 100000; round++) {
		struct frame f = round & 1 ? tcp(round & 2 ? 4 : 6, below(&seed, 3), 40)
					   : udp(round & 2 ? 4 : 6, below(&seed, 3), 40);

		for (uint32_t i = 1 + below(&seed, 4); i; i--)
			f.bytes[12 + below(&seed, 60)] = (uint8_t)draw(&seed);
		f.size -= below(&seed, 3) ? 0 : below(&seed, f.size);
		parse(&f);
		CHECK(!p.payload || (p.payload <= f.size && p.l4 + p.csum + 2u <= p.payload));
		CHECK(!p.l4 || p.l4 + p.l4_bytes <= f.size);
	}
}

static void pseudo(void)
{
	for (int family = 4; family <= 6; family += 2) {
		struct frame f = udp(family, 0, 33);

		parse(&f);
		uint16_t sum = pvf_packet_pseudo(&p, f.bytes);

		memcpy(f.bytes + p.l4 + p.csum, &sum, 2);
		CHECK_EQ((uint16_t)~slow_sum(0, f.bytes + p.l4, p.l4_bytes), right_sum(&f));
	}
}

int main(void)
{
	static const struct test tests[] = {
		{"a sum is the same in whatever pieces its bytes come", sums},
		{"TCP and UDP behind IPv4 and IPv6 are found", found},
		{"VLAN tags are walked over, and make a packet one that netif cannot express", tags},
		{"IPv6 extension headers are walked over, a fragment's is not", extensions},
		{"a fragment has no transport header", fragments},
		{"lengths that do not hold together are not believed", lies},
		{"what pads a short frame is none of its packet", padding},
		{"a packet cut anywhere is never read beyond its end", cut},
		{"no packet makes the parser point outside it", noise},
		{"a checksum finished over the pseudo-header's sum is the right one", pseudo},
	};

	return RUN_TESTS(tests);
}
