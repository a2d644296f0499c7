/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Rule 3: what the backend may rewrite is read once.
 *
 * The ring's page is kept from being accessed. Each read of it traps, is done by a single step of
 * the processor, and what it has read is rewritten before the next instruction: a backend that
 * always strikes between two reads. Whoever reads something twice sees two values.
 */
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <linux/nbd.h>

#include "backend.h"
#include "blk.h"

#define TRAP_FLAG 0x100
#define WROTE 2 /* of the page fault's error code */
#define READS 64

static unsigned char *page;
static unsigned char *at;       /* accessed by the present instruction */
static bool rewrite;
static unsigned char *read_at[READS];
static int reads;

static void fault(int number, siginfo_t *info, void *context)
{
	ucontext_t *c = context;

	(void)number;
	at = info->si_addr;
	if (at < page || at >= page + PVF_PAGE_SIZE)
		_exit(2);
	rewrite = !(c->uc_mcontext.gregs[REG_ERR] & WROTE);
	mprotect(page, PVF_PAGE_SIZE, PROT_READ | PROT_WRITE);
	c->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void stepped(int number, siginfo_t *info, void *context)
{
	ucontext_t *c = context;

	(void)number;
	(void)info;
	if (rewrite && reads < READS) {
		read_at[reads++] = at;
		*at ^= 0x5a; /* no more than the byte that was read for certain */
	}
	mprotect(page, PVF_PAGE_SIZE, PROT_NONE);
	c->uc_mcontext.gregs[REG_EFL] &= ~(greg_t)TRAP_FLAG;
}

static void guard(void)
{
	reads = 0;
	mprotect(page, PVF_PAGE_SIZE, PROT_NONE);
}

static void open_again(void)
{
	mprotect(page, PVF_PAGE_SIZE, PROT_READ | PROT_WRITE);
}

static int reads_of(const void *where)
{
	int n = 0;

	for (int i = 0; i < reads; i++)
		n += read_at[i] == where;
	return n;
}

static struct blkif_sring *shared(void)
{
	return (struct blkif_sring *)page;
}

static void poll_reads_the_index_once(void)
{
	struct pvf_ring ring;
	struct pvf_fault broken = {0};
	struct blkif_request request = {0};
	uint32_t (*const polls[])(struct pvf_ring *, struct pvf_fault *) = {pvf_ring_poll,
									   pvf_ring_final_check};

	for (int i = 0; i < 2; i++) {
		open_again();
		pvf_ring_init(&ring, page, PVF_PAGE_SIZE, sizeof(union blkif_sring_entry), 0);
		for (int k = 0; k < 4; k++)
			CHECK(pvf_ring_put(&ring, &request, sizeof(request)));
		pvf_ring_push(&ring);
		shared()->rsp_prod = 3;
		guard();
		CHECK_EQ(polls[i](&ring, &broken), 3);
		CHECK_EQ(broken.rule, 0);
		CHECK_EQ(reads_of(&shared()->rsp_prod), 1);
		CHECK_EQ(ring.rsp_seen, 3);
	}
	open_again();
}

static void get_copies_each_byte_once(void)
{
	struct pvf_ring ring;
	struct pvf_fault broken = {0};
	struct blkif_request request = {0};
	const struct blkif_response written = {
		.id = 0x1122334455667788, .operation = BLKIF_OP_WRITE, .status = -77};
	struct blkif_response got;

	pvf_ring_init(&ring, page, PVF_PAGE_SIZE, sizeof(union blkif_sring_entry), 0);
	CHECK(pvf_ring_put(&ring, &request, sizeof(request)));
	pvf_ring_push(&ring);
	memcpy(&shared()->ring[0], &written, sizeof(written));
	shared()->rsp_prod = 1;
	CHECK_EQ(pvf_ring_poll(&ring, &broken), 1);
	guard();
	pvf_ring_get(&ring, &got, sizeof(got));
	open_again();
	CHECK_EQ(got.id, written.id);
	CHECK_EQ(got.operation, written.operation);
	CHECK_EQ(got.status, written.status);
	for (int i = 0; i < reads; i++)
		CHECK_EQ(reads_of(read_at[i]), 1);
}

static void a_request_is_completed_from_the_copy(void)
{
	static struct pvf_blk blk;
	static _Alignas(4096) unsigned char pool[8 * PVF_PAGE_SIZE];
	uint32_t grefs[8];
	const struct pvf_geometry geo = {
		.sectors = 1024, .sector_size = 512, .max_segments = PVF_BLK_SEGMENTS};
	const struct pvf_nbd_request read = {.type = NBD_CMD_READ, .length = PVF_PAGE_SIZE};

	backend_grefs(grefs, 8);
	pvf_blk_init(&blk);
	pvf_blk_attach(&blk, page, PVF_PAGE_SIZE, pool, 8, grefs, false);
	pvf_blk_start(&blk, &geo);
	pvf_blk_begin(&blk, &read);
	pvf_blk_step(&blk);
	pvf_ring_push(&blk.ring);
	CHECK_EQ(blk.in_flight, 1);
	const struct blkif_response response = {
		.id = shared()->ring[0].req.id, .operation = BLKIF_OP_READ, .status = BLKIF_RSP_OKAY};

	memcpy(&shared()->ring[0], &response, sizeof(response));
	shared()->rsp_prod = 1;
	guard();
	CHECK_EQ(pvf_blk_drain(&blk, pvf_ring_poll(&blk.ring, &blk.fault)), 1);
	open_again();
	CHECK_EQ(blk.fault.rule, 0);
	CHECK_EQ(blk.in_flight, 0);
	CHECK(reads >= 2);
	for (int i = 0; i < reads; i++)
		CHECK_EQ(reads_of(read_at[i]), 1);
}

int main(void)
{
	const struct sigaction on_fault = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
	const struct sigaction on_step = {.sa_sigaction = stepped, .sa_flags = SA_SIGINFO};

	page = mmap(NULL, PVF_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(page != MAP_FAILED);
	CHECK(!sigaction(SIGSEGV, &on_fault, NULL));
	CHECK(!sigaction(SIGTRAP, &on_step, NULL));
	const struct test tests[] = {
		{"rule 3: the response index is read once a look", poll_reads_the_index_once},
		{"rule 3: each byte of a response is copied once", get_copies_each_byte_once},
		{"rule 3: a request is completed from the copy", a_request_is_completed_from_the_copy},
	};

	return RUN_TESTS(tests);
}
