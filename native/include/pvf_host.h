/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The embedded host's shared memory: event channels and grants for processes on one machine that
 * has no Xen. The host's hub (pvfront/host/hub.py) makes the objects and hands out descriptors;
 * on the fast path the two ends touch memory and eventfds only, as two domains do under Xen.
 * docs/host.md says who sends what to the hub.
 *
 * Event channel
 *   One memfd page for each channel, with a word of flags for either end, and an eventfd for either
 *   end. Side 0 made the port (bind_unbound), side 1 bound to it. The rules of evtchn, exactly:
 *
 *     notify  old = fetch_or(other.flags, PENDING); if old has neither PENDING nor MASKED, write 1
 *             to the other's eventfd. An event is a bit: twice is once.
 *     take    drain the own eventfd (it may have nothing); if flags are PENDING without MASKED, they
 *             become MASKED in one compare-and-swap, and the port was delivered.
 *     unmask  old = fetch_and(own.flags, ~MASKED); if old has PENDING, write 1 to the own eventfd.
 *
 *   A masked end is never woken. The eventfd is only the wake-up: what counts is the word, so a
 *   hostile other end can wake for nothing (an event storm) and cannot do more.
 *
 * Grants
 *   One table for each granting domain, a memfd of PVF_GRANTS entries; a reference is an index.
 *   A page lies in an *arena*, the memfd of one open gntalloc. `word` holds Xen's GTF_* flags in
 *   the low half and the number of maps in the high half, so that each step is one
 *   compare-and-swap:
 *
 *     map     refuse unless GTF_permit_access, the domain is the mapper's and not (writable and
 *             GTF_readonly); else count + 1, GTF_reading, and GTF_writing if writable
 *     unmap   count - 1; at 0 GTF_reading and GTF_writing go
 *     end     only the hub: 0 if the count is 0; else tried again ten times a second, the entry still
 *             valid meanwhile, as the kernel does with pages that a backend keeps mapped
 *
 *   A mapper notes each map in its *maptrack*, a memfd of one u32 for each reference, before it counts
 *   in the table: if the mapper dies, the hub takes its maps back.
 */
#ifndef PVF_HOST_H
#define PVF_HOST_H

#include <stdint.h>

#define PVF_HOST_MAGIC 0x48465650u /* "PVFH" */
#define PVF_GRANTS 32768u          /* references of a domain; the first 8 are never given out */
#define PVF_GRANTS_RESERVED 8u
#define PVF_GRANT_COUNT_SHIFT 16

#define PVF_CHANNEL_PENDING 1u
#define PVF_CHANNEL_MASKED 2u

struct pvf_channel_end {
	uint32_t flags;
	uint32_t unused[15]; /* a cache line of its own */
};

struct pvf_channel {
	uint32_t magic;
	uint32_t unused[15];
	struct pvf_channel_end end[2];
};

struct pvf_grant {
	uint32_t word;   /* GTF_* | maps << PVF_GRANT_COUNT_SHIFT */
	uint16_t domid;  /* who may map */
	uint16_t arena;
	uint32_t page;   /* within the arena */
	uint32_t unused;
};

/* What `hand_over` leaves in a connection to the hub for the process that gets its descriptor next.
 * Descriptors beside it: HOST_EVENT: channel memfd, own eventfd, the other's eventfd;
 * HOST_PAGES: the arena's memfd. The connection itself stays open as long as the thing is held. */
enum pvf_host_kind {
	PVF_HOST_EVENT = 1,
	PVF_HOST_PAGES = 2,
};

struct pvf_host_packet {
	uint32_t magic;
	uint32_t kind; /* enum pvf_host_kind */
	uint32_t port; /* HOST_EVENT: the local port */
	uint32_t side; /* HOST_EVENT: which end of the channel is ours */
};

#endif
