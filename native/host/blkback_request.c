/* SPDX-License-Identifier: BSD-2-Clause
 *
 * A request: checked as Linux's blkback does, its grants mapped, done.
 */
#include <errno.h>
#include <string.h>

#include "blkback_int.h"

#define PAGE_SECTORS (BB_PAGE / BB_SECTOR)
#define INDIRECT_OF_PAGE (BB_PAGE / sizeof(struct blkif_request_segment))

const struct pvf_bb_rule *bb_action(const struct bb_request *q, uint32_t kind)
{
	for (uint32_t i = 0; i < q->actions; i++)
		if (q->action[i].kind == kind)
			return &q->action[i];
	return NULL;
}

/* Grants */

static int map_segment(struct bb_ring *r, struct bb_segment *s, bool writable)
{
	bool persistent = r->conn->persistent;
	int rc;

	if (persistent && s->ref < PVF_GRANTS && r->kept[s->ref].page) {
		if (!r->kept[s->ref].used) {
			r->kept[s->ref].used = true;
			s->page = r->kept[s->ref].page;
			s->mapped = BB_KEPT;
			s->writable = true;
			ADD(r->stats.persistent_hits, 1);
			return 0;
		}
		ADD(r->stats.persistent_twice, 1); /* blkback logs an alert */
	}
	rc = pvf_peer_map(&r->conn->peer, s->ref, writable || persistent, &s->page);
	if (rc)
		return rc;
	ADD(r->stats.maps, 1);
	s->writable = writable || persistent;
	s->mapped = BB_MAPPED;
	if (persistent && !r->kept[s->ref].page &&
	    r->kept_count < LOAD(r->bb->features.max_persistent)) {
		r->kept[s->ref] = (struct bb_kept){s->page, true};
		r->kept_ref[r->kept_count++] = s->ref;
		ADD(r->stats.persistent, 1);
		s->mapped = BB_KEPT;
	} else if (!persistent) {
		r->recent[r->recent_count++ % BB_RECENT] = s->ref;
	}
	return 0;
}

static void unmap_segment(struct bb_ring *r, struct bb_segment *s)
{
	if (s->mapped == BB_KEPT)
		r->kept[s->ref].used = false;
	else if (s->mapped == BB_MAPPED)
		pvf_peer_unmap(&r->conn->peer, s->ref);
	s->mapped = BB_UNMAPPED;
}

void bb_unmap_all(struct bb_ring *r, struct bb_request *q)
{
	for (uint32_t i = 0; i < q->segments; i++)
		unmap_segment(r, &q->segment[i]);
}

/* Parsing: as dispatch_rw_block_io() and its kin, on our copy of the request. */

static bool add_segment(struct bb_request *q, uint32_t ref, uint8_t first, uint8_t last)
{
	if (last >= PAGE_SECTORS || last < first)
		return false;
	q->segment[q->segments++] = (struct bb_segment){.ref = ref, .first = first, .last = last};
	q->sectors += (uint64_t)(last - first) + 1;
	return true;
}

static bool parse_direct(struct bb_request *q, const struct blkif_request *req)
{
	q->sector = req->sector_number;
	if (req->nr_segments > BLKIF_MAX_SEGMENTS_PER_REQUEST)
		return false;
	for (uint32_t i = 0; i < req->nr_segments; i++)
		if (!add_segment(q, req->seg[i].gref, req->seg[i].first_sect,
				 req->seg[i].last_sect))
			return false;
	return true;
}

static bool parse_indirect(struct bb_ring *r, struct bb_request *q,
			   const struct blkif_request_indirect *req)
{
	q->sector = req->sector_number;
	if (req->nr_segments > LOAD(r->bb->features.max_indirect))
		return false;
	for (uint32_t n = 0; n < req->nr_segments; n += INDIRECT_OF_PAGE) {
		struct bb_segment page = {.ref = req->indirect_grefs[n / INDIRECT_OF_PAGE]};
		uint32_t here = req->nr_segments - n;
		bool good = true;

		if (map_segment(r, &page, false)) {
			ADD(r->stats.map_errors, 1);
			return false;
		}
		for (uint32_t i = 0; good && i < here && i < INDIRECT_OF_PAGE; i++) {
			struct blkif_request_segment s;

			/* The frontend may write there meanwhile: one copy, and that is looked at. */
			memcpy(&s, page.page + i * sizeof(s), sizeof(s));
			__asm__ volatile("" ::: "memory");
			good = add_segment(q, s.gref, s.first_sect, s.last_sect);
		}
		unmap_segment(r, &page);
		if (!good)
			return false;
		q->table = page.ref;
		q->entries = here < INDIRECT_OF_PAGE ? here : INDIRECT_OF_PAGE;
	}
	return true;
}

/* What blkback checks against the disk (xen_vbd_translate and the alignment after it). */
static bool allowed(const struct bb_ring *r, const struct bb_request *q)
{
	uint64_t sectors = bb_disk_bytes(&r->bb->disk) / BB_SECTOR;
	uint64_t mask = LOAD(r->bb->features.sector_size) / BB_SECTOR - 1;

	if (q->op != BLKIF_OP_READ && LOAD(r->bb->features.flags) & PVF_BB_READ_ONLY)
		return false;
	if (q->sectors && (q->sector + q->sectors < q->sector || q->sector + q->sectors > sectors))
		return false;
	if (q->op == BLKIF_OP_DISCARD)
		return !((q->sector | q->sectors) & mask);
	for (uint32_t i = 0; i < q->segments; i++)
		if ((q->sector | (uint64_t)(q->segment[i].last - q->segment[i].first + 1)) & mask)
			return false;
	return true;
}

/* Fills in `q` but for what the rules say; the status is what an honest backend would begin with. */
int16_t bb_parse(struct bb_ring *r, struct bb_request *q, const struct blkif_request *req)
{
	uint32_t flags = LOAD(r->bb->features.flags);
	struct blkif_request_discard discard;
	struct blkif_request_indirect indirect;
	bool good = true;

	q->id = req->id; /* at the same place in every kind of request */
	q->op = req->operation;
	q->sector = q->sectors = 0;
	q->segments = q->actions = q->entries = 0;
	switch (req->operation) {
	case BLKIF_OP_WRITE_BARRIER:
		if (!(flags & PVF_BB_BARRIER))
			return BLKIF_RSP_EOPNOTSUPP;
		ADD(r->stats.barriers, 1);
		good = parse_direct(q, req);
		break;
	case BLKIF_OP_FLUSH_DISKCACHE:
		if (!(flags & PVF_BB_FLUSH))
			return BLKIF_RSP_EOPNOTSUPP;
		ADD(r->stats.flushes, 1);
		good = parse_direct(q, req);
		break;
	case BLKIF_OP_DISCARD:
		memcpy(&discard, req, sizeof(discard));
		q->sector = discard.sector_number;
		q->sectors = discard.nr_sectors;
		if (!(flags & PVF_BB_DISCARD))
			return BLKIF_RSP_EOPNOTSUPP;
		ADD(r->stats.discards, 1);
		break;
	case BLKIF_OP_INDIRECT:
		if (!LOAD(r->bb->features.max_indirect))
			return BLKIF_RSP_EOPNOTSUPP;
		memcpy(&indirect, req, sizeof(indirect));
		q->op = indirect.indirect_op;
		if (q->op != BLKIF_OP_READ && q->op != BLKIF_OP_WRITE)
			return BLKIF_RSP_ERROR;
		ADD(r->stats.indirect, 1);
		good = parse_indirect(r, q, &indirect) && q->segments;
		break;
	case BLKIF_OP_READ:
	case BLKIF_OP_WRITE:
		good = parse_direct(q, req) && q->segments;
		break;
	default:
		return BLKIF_RSP_EOPNOTSUPP;
	}
	if (q->op == BLKIF_OP_READ)
		ADD(r->stats.reads, 1);
	else if (q->op == BLKIF_OP_WRITE)
		ADD(r->stats.writes, 1);
	return good && allowed(r, q) ? BLKIF_RSP_OKAY : BLKIF_RSP_ERROR;
}

int16_t bb_map_all(struct bb_ring *r, struct bb_request *q)
{
	/* A rule that writes there wants write access, and does without if it is refused. */
	bool hostile = bb_action(q, PVF_BB_PAGES) || bb_action(q, PVF_BB_OUTSIDE);

	for (uint32_t i = 0; i < q->segments; i++) {
		struct bb_segment *s = &q->segment[i];
		bool reads = q->op == BLKIF_OP_READ;

		if (map_segment(r, s, reads || hostile) &&
		    (reads || !hostile || map_segment(r, s, false))) {
			ADD(r->stats.map_errors, 1);
			bb_unmap_all(r, q);
			return BLKIF_RSP_ERROR;
		}
	}
	return BLKIF_RSP_OKAY;
}

/* Doing it */

static int16_t status_of(struct bb_ring *r, int rc)
{
	if (rc == -EOPNOTSUPP)
		return BLKIF_RSP_EOPNOTSUPP;
	if (rc)
		ADD(r->stats.io_errors, 1);
	return rc ? BLKIF_RSP_ERROR : BLKIF_RSP_OKAY;
}

/* Moves the first `sectors` sectors. Neighbours in memory are moved in one piece. */
static int move(struct bb_ring *r, struct bb_request *q, uint64_t sectors)
{
	bool write = q->op != BLKIF_OP_READ;
	uint64_t at = q->sector * BB_SECTOR, left = sectors * BB_SECTOR;

	for (uint32_t i = 0; i < q->segments && left;) {
		struct bb_segment *s = &q->segment[i];
		unsigned char *from = s->page + s->first * BB_SECTOR, *to = from;

		while (i < q->segments) {
			s = &q->segment[i];
			if (s->page + s->first * BB_SECTOR != to)
				break;
			to = s->page + (s->last + 1) * BB_SECTOR;
			i++;
		}
		uint64_t n = (uint64_t)(to - from) < left ? (uint64_t)(to - from) : left;
		int rc = bb_disk_io(&r->bb->disk, write, at, from, n);

		if (rc)
			return rc;
		at += n;
		left -= n;
	}
	ADD(*(write ? &r->stats.sectors_written : &r->stats.sectors_read), sectors);
	return 0;
}

int16_t bb_execute(struct bb_ring *r, struct bb_request *q, uint64_t limit)
{
	struct bb_disk *disk = &r->bb->disk;
	uint64_t sectors = q->sectors < limit ? q->sectors : limit;
	int rc = 0;

	switch (q->op) {
	case BLKIF_OP_FLUSH_DISKCACHE:
	case BLKIF_OP_WRITE_BARRIER:
		rc = bb_disk_flush(disk);
		if (!rc && sectors)
			rc = move(r, q, sectors);
		if (!rc && q->op == BLKIF_OP_WRITE_BARRIER)
			rc = bb_disk_flush(disk);
		break;
	case BLKIF_OP_DISCARD:
		rc = bb_disk_discard(disk, q->sector * BB_SECTOR, sectors * BB_SECTOR,
				     LOAD(r->bb->features.discard_granularity),
				     LOAD(r->bb->features.discard_alignment));
		if (!rc)
			ADD(r->stats.sectors_discarded, sectors);
		break;
	default:
		rc = move(r, q, sectors);
	}
	return status_of(r, rc);
}

