/* SPDX-License-Identifier: BSD-2-Clause */
#include <string.h>
#include <unistd.h>

#include <linux/nbd.h>

#include "check.h"
#include "nbd.h"

static struct pvf_geometry disk = {
	.sectors = 2048,
	.sector_size = 512,
	.features = PVF_BLK_FLUSH | PVF_BLK_DISCARD,
	.max_segments = 11,
};

static uint32_t check(uint16_t type, uint64_t from, uint32_t length, uint16_t flags)
{
	struct pvf_nbd_request r = {.flags = flags, .type = type, .from = from, .length = length};

	return pvf_nbd_check(&r, &disk, 0);
}

static void parse(void)
{
	static const uint8_t wire[28] = {
		0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 'h', 'a', 'n', 'd', 'l', 'e', '0', '1',
		0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0x10, 0,
	};
	struct pvf_nbd_request r;
	uint8_t bad[28];

	CHECK(pvf_nbd_parse(wire, &r));
	CHECK_EQ(r.flags, 1);
	CHECK_EQ(r.type, NBD_CMD_WRITE);
	CHECK(!memcmp(r.handle, "handle01", 8));
	CHECK_EQ(r.from, 0x100000200);
	CHECK_EQ(r.length, 4096);
	memcpy(bad, wire, 28);
	bad[3] ^= 1;
	CHECK(!pvf_nbd_parse(bad, &r));
}

static void reply(void)
{
	static const uint8_t expected[16] = {0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5,
					     'h',  'a',  'n',  'd',  'l', 'e', '0', '1'};
	uint8_t wire[16];

	pvf_nbd_reply(wire, (const uint8_t *)"handle01", PVF_NBD_EIO);
	CHECK(!memcmp(wire, expected, 16));
}

static void range(void)
{
	CHECK_EQ(check(NBD_CMD_READ, 0, 1 << 20, 0), 0);
	CHECK_EQ(check(NBD_CMD_READ, 512, 1 << 20, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_WRITE, 1 << 20, 512, 0), PVF_NBD_ENOSPC);
	CHECK_EQ(check(NBD_CMD_WRITE, UINT64_MAX - 511, 512, 0), PVF_NBD_ENOSPC);
	CHECK_EQ(check(NBD_CMD_TRIM, 1 << 20, 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_READ, 0, 0, 0), PVF_NBD_EINVAL);
}

static void alignment(void)
{
	CHECK_EQ(check(NBD_CMD_READ, 1, 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_WRITE, 0, 513, 0), PVF_NBD_EINVAL);
	disk.sector_size = 4096;
	CHECK_EQ(check(NBD_CMD_READ, 512, 4096, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_READ, 4096, 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_READ, 4096, 4096, 0), 0);
	disk.sector_size = 512;
}

static void read_only(void)
{
	disk.features |= PVF_BLK_READ_ONLY;
	CHECK_EQ(check(NBD_CMD_WRITE, 0, 512, 0), PVF_NBD_EPERM);
	CHECK_EQ(check(NBD_CMD_TRIM, 0, 512, 0), PVF_NBD_EPERM);
	CHECK_EQ(check(NBD_CMD_READ, 0, 512, 0), 0);
	disk.features &= ~PVF_BLK_READ_ONLY;
}

static void features(void)
{
	struct pvf_nbd_request flush = {.type = NBD_CMD_FLUSH};

	CHECK_EQ(check(NBD_CMD_FLUSH, 0, 0, 0), 0);
	CHECK_EQ(pvf_nbd_check(&flush, &disk, PVF_BLK_FLUSH), PVF_NBD_ENOTSUP);
	disk.features = 0;
	CHECK_EQ(check(NBD_CMD_FLUSH, 0, 0, 0), PVF_NBD_ENOTSUP);
	CHECK_EQ(check(NBD_CMD_TRIM, 0, 512, 0), PVF_NBD_ENOTSUP);
	CHECK_EQ(check(NBD_CMD_WRITE, 0, 512, PVF_NBD_FLAG_FUA), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_READ, 0, 512, PVF_NBD_FLAG_FUA), 0);
	disk.features = PVF_BLK_FLUSH | PVF_BLK_DISCARD;
	CHECK_EQ(check(NBD_CMD_WRITE, 0, 512, PVF_NBD_FLAG_FUA), 0);
}

static void unknown(void)
{
	CHECK_EQ(check(6, 0, 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_READ, 0, 512, 2), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_FLUSH, 512, 0, 0), PVF_NBD_EINVAL);
}

static void large(void)
{
	disk.sectors = 1ull << 40;
	CHECK_EQ(check(NBD_CMD_READ, 0, 32u << 20, 0), 0);
	CHECK_EQ(check(NBD_CMD_READ, 0, (32u << 20) + 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_WRITE, 0, (32u << 20) + 512, 0), PVF_NBD_EINVAL);
	CHECK_EQ(check(NBD_CMD_TRIM, 0, 0xfffffe00u, 0), 0);
	disk.sectors = 2048;
}

int main(void)
{
	static const struct test tests[] = {
		{"a header is parsed, a wrong magic is refused", parse},
		{"a reply is what the protocol says, the handle untouched", reply},
		{"requests beyond the end are refused, writes with ENOSPC", range},
		{"requests that are no whole sectors are refused", alignment},
		{"a read-only disk refuses writes and trims with EPERM", read_only},
		{"flush, trim and FUA are refused unless the backend has them", features},
		{"unknown commands and flags are refused with EINVAL", unknown},
		{"payloads up to 32 MiB are taken, trims of any length", large},
	};

	return RUN_TESTS(tests);
}
