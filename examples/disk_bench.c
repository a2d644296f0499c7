/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Measures a lent disk with the job shapes of fio, and shows how pvfront/disk.h is used:
 *
 *     pvfront vbd lend xvdb -- pvfront-disk-bench --rw randread --bs 4k --iodepth 32 --runtime 5
 *
 * --disk NAME      which of the lent disks (default: the first)
 * --rw KIND        read, write, randread, randwrite
 * --bs SIZE        bytes of a request; k and M are understood
 * --iodepth N      requests under way, up to 256
 * --runtime SECS   and --ramp SECS before, which do not count
 * --size SIZE      of the disk, what is used from its beginning (default: all)
 * --how WAY        poll: looks all the time, never sleeps; wait: sleeps in the library; epoll: sleeps
 *                  in a loop of its own
 * --verify         instead: writes all of it, every block by its number, then reads and compares
 *
 * The result is one JSON object in the manner of fio's, with the program's CPU time beside it.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include <pvfront/disk.h>

#define MOST 256
#define BUCKETS 40 /* of latencies: powers of two of nanoseconds */

enum how { POLL, WAIT, EPOLL };

struct job {
	const char *name, *kind;
	bool write, random, verify;
	size_t block;
	int depth;
	double runtime, ramp;
	uint64_t size;
	enum how how;
};

struct slot { /* one request under way; its number is the cookie */
	uint64_t offset, began;
	unsigned char *data;
};

static struct job job = {.kind = "randread", .block = 4096, .depth = 32, .runtime = 5};
static struct pvf_disk *disk;
static struct slot slots[MOST];
static uint64_t seed = 88172645463325252u, position, finished, latencies[BUCKETS];
static double latency_sum;

static void fail(const char *what, int error)
{
	fprintf(stderr, "pvfront-disk-bench: %s: %s\n", what, strerror(-error));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static double cpu_seconds(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
	       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static uint64_t draw(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void fill(unsigned char *data, uint64_t offset)
{
	for (size_t at = 0; at < job.block; at += sizeof(uint64_t)) {
		uint64_t word = (offset + at) * 0x9e3779b97f4a7c15u;

		memcpy(data + at, &word, sizeof(word));
	}
}

static void compare(const unsigned char *data, uint64_t offset)
{
	for (size_t at = 0; at < job.block; at += sizeof(uint64_t)) {
		uint64_t word = (offset + at) * 0x9e3779b97f4a7c15u;

		if (memcmp(data + at, &word, sizeof(word))) {
			fprintf(stderr, "pvfront-disk-bench: byte %" PRIu64 " is not what was written\n",
				offset + at);
			exit(1);
		}
	}
}

static void ask(int number)
{
	struct slot *s = &slots[number];
	uint64_t blocks = job.size / job.block;
	int rc;

	s->offset = (job.random ? draw() % blocks : position++ % blocks) * job.block;
	s->began = now_ns();
	if (job.write && job.verify)
		fill(s->data, s->offset);
	if (job.write)
		rc = pvf_disk_write(disk, s->data, job.block, s->offset, (uint64_t)number);
	else
		rc = pvf_disk_read(disk, s->data, job.block, s->offset, (uint64_t)number);
	if (rc)
		fail("a request was refused", rc);
}

/* At least one completion. */
static int get(struct pvf_disk_done *done, int max)
{
	struct pollfd polled = {.fd = pvf_disk_fd(disk), .events = POLLIN};
	int n;

	if (job.how == WAIT) {
		while (!(n = pvf_disk_wait(disk, done, max, -1)))
			;
		return n;
	}
	while (!(n = pvf_disk_poll(disk, done, max)))
		if (job.how == EPOLL && !pvf_disk_arm(disk))
			poll(&polled, 1, -1);
	return n;
}

static void note(const struct pvf_disk_done *done)
{
	uint64_t ns = now_ns() - slots[done->cookie].began;

	if (done->result < 0)
		fail("a request failed", done->result);
	finished++;
	latency_sum += (double)ns;
	latencies[63 - __builtin_clzll(ns | 1)]++;
	if (job.verify && !job.write)
		compare(slots[done->cookie].data, slots[done->cookie].offset);
}

/* Until the time is over, or (`total`) so many requests are done. */
static void run(double seconds, uint64_t total)
{
	struct pvf_disk_done done[MOST];
	uint64_t end = now_ns() + (uint64_t)(seconds * 1e9), asked = 0;
	int idle[MOST], idles = 0, under_way = 0;

	for (int i = job.depth - 1; i >= 0; i--)
		idle[idles++] = i;
	while (1) {
		bool more = total ? asked < total : now_ns() < end;

		for (; more && idles && (!total || asked < total); asked++, under_way++)
			ask(idle[--idles]);
		if (!under_way)
			return;
		int n = get(done, MOST);

		for (int i = 0; i < n; i++) {
			note(&done[i]);
			idle[idles++] = (int)done[i].cookie;
		}
		under_way -= n;
	}
}

static double percentile(double part)
{
	uint64_t seen = 0;

	for (int i = 0; i < BUCKETS; i++) {
		seen += latencies[i];
		if ((double)seen >= part * (double)finished)
			return (double)(2ull << i); /* the bucket's end */
	}
	return 0;
}

static void measure(void)
{
	run(job.ramp, 0);
	finished = 0;
	latency_sum = 0;
	memset(latencies, 0, sizeof(latencies));
	uint64_t began = now_ns();
	double cpu = cpu_seconds();

	run(job.runtime, 0);
	double seconds = (double)(now_ns() - began) / 1e9;

	cpu = cpu_seconds() - cpu;
	printf("{\"jobs\": [{\"error\": 0, \"%s\": {\"iops\": %.1f, \"bw_bytes\": %.0f, "
	       "\"total_ios\": %" PRIu64 ", \"lat_ns\": {\"mean\": %.0f, \"p50_below\": %.0f, "
	       "\"p99_below\": %.0f}}, \"cpu_seconds\": %.3f, \"runtime\": %.3f}]}\n",
	       job.write ? "write" : "read", (double)finished / seconds,
	       (double)finished * (double)job.block / seconds, finished,
	       finished ? latency_sum / (double)finished : 0.0, percentile(0.5), percentile(0.99),
	       cpu, seconds);
}

static void verify(void)
{
	struct pvf_disk_done done;
	struct pvf_disk_info info;

	job.write = true;
	job.random = false;
	run(0, job.size / job.block);
	pvf_disk_get_info(disk, &info);
	if (info.flags & PVF_DISK_FLUSH) {
		int rc = pvf_disk_flush(disk, 0);

		if (rc)
			fail("flush was refused", rc);
		while (!pvf_disk_wait(disk, &done, 1, -1))
			;
		if (done.result)
			fail("flush failed", done.result);
	}
	job.write = false;
	job.random = true;
	run(0, job.size / job.block);
	printf("{\"verified\": %" PRIu64 ", \"generation\": %" PRIu32 "}\n",
	       job.size / job.block * job.block, info.generation);
}

static uint64_t size_of(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (*end == 'k' || *end == 'K')
		value <<= 10, end++;
	else if (*end == 'M')
		value <<= 20, end++;
	else if (*end == 'G')
		value <<= 30, end++;
	if (*end || !value) {
		fprintf(stderr, "pvfront-disk-bench: %s is no size\n", text);
		exit(2);
	}
	return value;
}

static void usage(void)
{
	fprintf(stderr, "usage: pvfront vbd lend NAME -- pvfront-disk-bench [--disk NAME] [--rw "
			"read|write|randread|randwrite] [--bs SIZE] [--iodepth 1..256] [--runtime SECS] "
			"[--ramp SECS] [--size SIZE] [--how poll|wait|epoll] [--verify]\n");
	exit(2);
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{"disk", required_argument, NULL, 'd'},	   {"rw", required_argument, NULL, 'r'},
		{"bs", required_argument, NULL, 'b'},	   {"iodepth", required_argument, NULL, 'q'},
		{"runtime", required_argument, NULL, 't'}, {"ramp", required_argument, NULL, 'a'},
		{"size", required_argument, NULL, 's'},	   {"how", required_argument, NULL, 'h'},
		{"verify", no_argument, NULL, 'v'},	   {0},
	};
	static const char *const ways[] = {"poll", "wait", "epoll"};
	int opt, way = 0;

	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (opt) {
		case 'd':
			job.name = optarg;
			break;
		case 'r':
			job.kind = optarg;
			break;
		case 'b':
			job.block = size_of(optarg);
			break;
		case 'q':
			job.depth = atoi(optarg);
			break;
		case 't':
			job.runtime = atof(optarg);
			break;
		case 'a':
			job.ramp = atof(optarg);
			break;
		case 's':
			job.size = size_of(optarg);
			break;
		case 'h':
			while (way < 3 && strcmp(ways[way], optarg))
				way++;
			break;
		case 'v':
			job.verify = true;
			break;
		default:
			usage();
		}
	job.random = !strncmp(job.kind, "rand", 4);
	job.write = !strcmp(job.kind + (job.random ? 4 : 0), "write");
	if (!job.write && strcmp(job.kind + (job.random ? 4 : 0), "read"))
		usage();
	if (optind != argc || way == 3 || job.depth < 1 || job.depth > MOST ||
	    job.block > PVF_DISK_MAX_BYTES || job.block % sizeof(uint64_t))
		usage();
	job.how = (enum how)way;
}

int main(int argc, char **argv)
{
	struct pvf_disk_info info;
	int rc;

	parse(argc, argv);
	rc = pvf_disk_open(job.name, &disk);
	if (rc)
		fail("no disk (was this started by `pvfront vbd lend`?)", rc);
	pvf_disk_get_info(disk, &info);
	if (!job.size || job.size > info.size)
		job.size = info.size;
	if (job.block % info.sector_size || job.size < job.block)
		fail("--bs: not a multiple of the disk's sectors, or more than the disk", -EINVAL);
	for (int i = 0; i < job.depth; i++) {
		if (posix_memalign((void **)&slots[i].data, 4096, job.block))
			fail("memory", -ENOMEM);
		for (size_t at = 0; at < job.block; at += sizeof(uint64_t)) {
			uint64_t word = draw();

			memcpy(slots[i].data + at, &word, sizeof(word));
		}
	}
	if (job.verify)
		verify();
	else
		measure();
	pvf_disk_close(disk);
	return 0;
}
