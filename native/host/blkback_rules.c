/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Which faults fire when. The table is shared by the rings of a disk, so `count: 1` is one in all.
 */
#include <errno.h>
#include <string.h>

#include "blkback_int.h"

/* xorshift64* */
static uint64_t draw(struct bb_rules *rules)
{
	uint64_t x = rules->random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	rules->random = x;
	return x * UINT64_C(0x2545f4914f6cdd1d);
}

static bool is_idle(const struct pvf_bb_rule *rule)
{
	return rule->kind == PVF_BB_STORM ||
	       ((rule->kind == PVF_BB_PAGES || rule->kind == PVF_BB_SLOTS) &&
		rule->mode == PVF_BB_IDLE);
}

static bool sensible(const struct pvf_bb_rule *rule)
{
	uint32_t modes = 1;

	switch (rule->kind) {
	case PVF_BB_DROP:
	case PVF_BB_STORM:
		modes = 2;
		break;
	case PVF_BB_CORRUPT:
		modes = rule->field == PVF_BB_ID ? 4 : 2;
		break;
	case PVF_BB_PAGES:
	case PVF_BB_SLOTS:
		modes = 3;
		break;
	case PVF_BB_REORDER:
		if (!rule->value || rule->value > BB_SLOTS)
			return false;
		break;
	case PVF_BB_DUPLICATE:
		if (!rule->value || rule->value > BB_SLOTS)
			return false;
		break;
	case PVF_BB_DELAY:
		if (rule->extra < rule->value)
			return false;
		break;
	default:
		break;
	}
	return rule->kind > PVF_BB_NONE && rule->kind <= PVF_BB_DIE && rule->mode < modes &&
	       rule->field <= PVF_BB_STATUS && rule->first <= rule->last;
}

int pvf_bb_set_rules(struct pvf_bb *bb, const struct pvf_bb_rule *rules, uint32_t count,
		     uint64_t seed, uint32_t *bad)
{
	struct bb_rules *table = &bb->rules;

	*bad = 0;
	if (count > PVF_BB_RULES) {
		*bad = PVF_BB_RULES;
		return -EINVAL;
	}
	for (uint32_t i = 0; i < count; i++) {
		if (!sensible(&rules[i])) {
			*bad = i;
			return -EINVAL;
		}
	}
	pthread_mutex_lock(&table->lock);
	if (count)
		memcpy(table->rule, rules, count * sizeof(*rules));
	table->random = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	if (!table->random)
		table->random = 1;
	__atomic_store_n(&table->count, count, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&table->lock);
	for (uint32_t i = 0; bb->conn && i < bb->conn->rings; i++)
		bb_ring_kick(bb->conn->ring[i]);
	return 0;
}

/* A rule that matched: does it fire? */
static bool fires(struct bb_rules *rules, struct pvf_bb_rule *rule)
{
	if (!rule->chance)
		return false;
	if (rule->skip) {
		rule->skip--;
		return false;
	}
	if (rule->chance != PVF_BB_ALWAYS && (uint32_t)(draw(rules) >> 32) >= rule->chance)
		return false;
	if (rule->count && !--rule->count)
		rule->chance = 0; /* it was the last time */
	return true;
}

static bool touches(const struct pvf_bb_rule *rule, uint64_t sector, uint64_t sectors)
{
	if (!sectors)
		return rule->first == 0 && rule->last == UINT64_MAX;
	return sector <= rule->last && sector + (sectors - 1) >= rule->first;
}

uint32_t bb_rules_match(struct bb_rules *rules, uint8_t op, uint64_t sector, uint64_t sectors,
			struct pvf_bb_rule *action)
{
	uint32_t n = 0, seen = 0;

	if (!__atomic_load_n(&rules->count, __ATOMIC_ACQUIRE))
		return 0;
	pthread_mutex_lock(&rules->lock);
	for (uint32_t i = 0; i < rules->count && n < PVF_BB_ACTIONS; i++) {
		struct pvf_bb_rule *rule = &rules->rule[i];

		if (is_idle(rule) || seen & 1u << rule->kind ||
		    (rule->ops && (op > 31 || !(rule->ops & 1u << op))) ||
		    !touches(rule, sector, sectors) || !fires(rules, rule))
			continue;
		rules->fired[rule->kind]++;
		seen |= 1u << rule->kind;
		action[n++] = *rule;
	}
	pthread_mutex_unlock(&rules->lock);
	return n;
}

static struct pvf_bb_rule *find_idle(struct bb_rules *rules, uint32_t kind)
{
	for (uint32_t i = 0; i < rules->count; i++)
		if (rules->rule[i].kind == kind && rules->rule[i].chance && is_idle(&rules->rule[i]))
			return &rules->rule[i];
	return NULL;
}

bool bb_rules_idle(struct bb_rules *rules, uint32_t kind, struct pvf_bb_rule *rule)
{
	struct pvf_bb_rule *found;

	if (!__atomic_load_n(&rules->count, __ATOMIC_ACQUIRE))
		return false;
	pthread_mutex_lock(&rules->lock);
	found = find_idle(rules, kind);
	if (found)
		*rule = *found;
	pthread_mutex_unlock(&rules->lock);
	return found != NULL;
}

bool bb_rules_fire(struct bb_rules *rules, uint32_t kind)
{
	struct pvf_bb_rule *found;
	bool fired;

	pthread_mutex_lock(&rules->lock);
	found = find_idle(rules, kind);
	fired = found && fires(rules, found);
	pthread_mutex_unlock(&rules->lock);
	return fired;
}

void bb_rules_fired(struct bb_rules *rules, uint32_t kind)
{
	pthread_mutex_lock(&rules->lock);
	rules->fired[kind]++;
	pthread_mutex_unlock(&rules->lock);
}

uint64_t bb_rules_draw(struct bb_rules *rules)
{
	uint64_t word;

	pthread_mutex_lock(&rules->lock);
	word = draw(rules);
	pthread_mutex_unlock(&rules->lock);
	return word;
}
