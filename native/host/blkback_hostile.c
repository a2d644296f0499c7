/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What no backend may do: the writing faults, and those that need no request.
 */
#include <unistd.h>

#include "blkback_int.h"

#define IDLE_US 100 /* between rewritings, unless a rule says otherwise */

static void fill(unsigned char *at, size_t n, uint64_t word)
{
	uint64_t *p = (uint64_t *)(void *)at;

	for (size_t i = 0; i < n / sizeof(*p); i++)
		STORE(p[i], word);
}

static uint64_t pattern(struct bb_ring *r, const struct pvf_bb_rule *rule)
{
	return rule->value ? rule->value : bb_rules_draw(&r->bb->rules);
}

void bb_rewrite_pages(struct bb_ring *r, struct bb_request *q, const struct pvf_bb_rule *rule)
{
	uint64_t word = pattern(r, rule);

	for (uint32_t i = 0; i < q->segments; i++) {
		struct bb_segment *s = &q->segment[i];

		if (s->mapped && s->writable)
			fill(s->page + s->first * BB_SECTOR,
			     (size_t)(s->last - s->first + 1) * BB_SECTOR, word);
	}
}

void bb_write_outside(struct bb_ring *r, struct bb_request *q, const struct pvf_bb_rule *rule)
{
	uint64_t word = pattern(r, rule);

	for (uint32_t i = 0; i < q->segments; i++) {
		struct bb_segment *s = &q->segment[i];
		size_t end = (size_t)(s->last + 1) * BB_SECTOR;

		if (!s->mapped || !s->writable)
			continue;
		fill(s->page, s->first * BB_SECTOR, word);
		fill(s->page + end, BB_PAGE - end, word);
	}
}

/* Behind the entries of an indirect request's page, which was mapped and let go before. */
static void look_at_table(struct bb_ring *r, const struct bb_request *q, uint64_t value)
{
	unsigned char *page = NULL;

	if (!q->entries)
		return;
	bool kept = r->conn->persistent && r->kept[q->table].page;

	if (kept)
		page = r->kept[q->table].page;
	else if (pvf_peer_map(&r->conn->peer, q->table, false, &page))
		return;
	for (size_t at = q->entries * sizeof(struct blkif_request_segment); at < BB_PAGE;
	     at += sizeof(value))
		if (LOAD(*(const uint64_t *)(const void *)(page + at)) == value)
			ADD(r->stats.canaries, 1);
	if (!kept)
		pvf_peer_unmap(&r->conn->peer, q->table);
}

/* Counts `value` in every word of the granted pages that the frontend had no reason to fill. */
void bb_look(struct bb_ring *r, const struct bb_request *q, uint64_t value)
{
	for (uint32_t i = 0; i < q->segments; i++) {
		const struct bb_segment *s = &q->segment[i];
		const uint64_t *p = (const uint64_t *)(const void *)s->page;

		for (size_t w = 0; w < BB_PAGE / sizeof(*p); w++) {
			size_t sector = w * sizeof(*p) / BB_SECTOR;

			if (q->op != BLKIF_OP_READ && sector >= s->first && sector <= s->last)
				continue;
			if (LOAD(p[w]) == value)
				ADD(r->stats.canaries, 1);
		}
	}
	look_at_table(r, q, value);
}

void bb_rewrite_slots(struct bb_ring *r, RING_IDX from, RING_IDX to,
			  const struct pvf_bb_rule *rule)
{
	uint64_t word = pattern(r, rule);

	for (; from != to; from++)
		fill((unsigned char *)RING_GET_RESPONSE(&r->ring, from),
		     sizeof(union blkif_sring_entry), word);
}

void bb_corrupt(struct bb_ring *r, const struct pvf_bb_rule *rule, uint64_t *id, uint8_t *op,
		    int16_t *status)
{
	bool set = rule->mode == PVF_BB_SET;

	if (rule->field == PVF_BB_OPERATION) {
		*op = (uint8_t)(set ? rule->value : *op ^ rule->value);
	} else if (rule->field == PVF_BB_STATUS) {
		*status = (int16_t)(set ? rule->value : (uint16_t)*status ^ rule->value);
	} else if (rule->mode == PVF_BB_STALE) {
		*id = r->answered ? r->last_id : ~*id;
	} else if (rule->mode == PVF_BB_OTHER) {
		if (r->held_count)
			*id = r->request[r->held[0]].id;
	} else {
		*id = set ? rule->value : *id ^ rule->value;
	}
}

/* Faults that need no request */

static uint64_t storm(struct bb_ring *r, uint64_t now)
{
	struct pvf_bb_rule rule;
	uint64_t pause;

	if (!bb_rules_idle(&r->bb->rules, PVF_BB_STORM, &rule))
		return BB_NEVER;
	pause = rule.value ? 1000000 / rule.value : 0;
	if (now < r->storm_due)
		return r->storm_due;
	if (bb_rules_fire(&r->bb->rules, PVF_BB_STORM)) {
		const uint64_t one = 1;

		if (rule.mode == PVF_BB_EVENTS)
			bb_notify(r);
		else if (write(r->other_fd, &one, sizeof(one)) < 0)
			pause = pause ? pause : IDLE_US; /* full: it is awake */
		bb_rules_fired(&r->bb->rules, PVF_BB_STORM);
	}
	r->storm_due = now + pause;
	return r->storm_due;
}

/* Pages that the frontend granted and no request of ours uses. */
static void rewrite_idle_pages(struct bb_ring *r, const struct pvf_bb_rule *rule)
{
	uint64_t word = pattern(r, rule);
	uint32_t recent = r->recent_count < BB_RECENT ? r->recent_count : BB_RECENT;
	unsigned char *page;

	for (uint32_t i = 0; i < r->kept_count; i++)
		if (!r->kept[r->kept_ref[i]].used)
			fill(r->kept[r->kept_ref[i]].page, BB_PAGE, word);
	for (uint32_t i = 0; i < recent; i++) {
		if (pvf_peer_map(&r->conn->peer, r->recent[i], true, &page))
			continue; /* read-only, or ended */
		fill(page, BB_PAGE, word);
		pvf_peer_unmap(&r->conn->peer, r->recent[i]);
	}
}

/* Nothing asked, nothing owed, and the frontend has seen every answer. */
static bool quiet(const struct bb_ring *r)
{
	const struct blkif_sring *s = r->ring.sring;

	return !r->held_count &&
	       __atomic_load_n(&s->req_prod, __ATOMIC_ACQUIRE) == r->ring.req_cons &&
	       __atomic_load_n(&s->rsp_event, __ATOMIC_ACQUIRE) == r->published + 1;
}

static uint64_t rewriting(struct bb_ring *r, uint64_t now, uint32_t kind, uint64_t *due)
{
	struct pvf_bb_rule rule;

	if (!bb_rules_idle(&r->bb->rules, kind, &rule))
		return BB_NEVER;
	if (now < *due)
		return *due;
	*due = now + (rule.extra ? rule.extra : IDLE_US);
	if (!quiet(r) || !bb_rules_fire(&r->bb->rules, kind))
		return *due;
	if (kind == PVF_BB_PAGES)
		rewrite_idle_pages(r, &rule);
	else
		/* Responses that were seen, in the slots that are used again last: requests not yet
		 * published stand in the others, and would come to us as garbage. */
		bb_rewrite_slots(r, r->ring.req_cons - RING_SIZE(&r->ring) / 4, r->ring.req_cons,
				 &rule);
	bb_rules_fired(&r->bb->rules, kind); /* who waits for it then uses what was rewritten */
	return *due;
}

uint64_t bb_idle_faults(struct bb_ring *r)
{
	uint64_t now, next, other;

	if (!__atomic_load_n(&r->bb->rules.count, __ATOMIC_ACQUIRE))
		return BB_NEVER;
	now = bb_now();
	next = storm(r, now);
	other = rewriting(r, now, PVF_BB_PAGES, &r->pages_due);
	next = other < next ? other : next;
	other = rewriting(r, now, PVF_BB_SLOTS, &r->slots_due);
	return other < next ? other : next;
}
