/* SPDX-License-Identifier: BSD-2-Clause */
#include "groups.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/eventfd.h>

#define IPPROTO_MLD 58 /* ICMPv6's */

enum { /* of both protocols' newest versions (RFC 3376, 4.2.12; RFC 3810, 5.2.12) */
	MODE_IS_INCLUDE = 1,
	MODE_IS_EXCLUDE = 2,
	CHANGE_TO_INCLUDE = 3,
	CHANGE_TO_EXCLUDE = 4,
	ALLOW_NEW_SOURCES = 5,
};

static const struct pvf_group always[] = {
	{.mac = {0x01, 0x00, 0x5e, 0x00, 0x00, 0x01}},
	{.mac = {0x33, 0x33, 0x00, 0x00, 0x00, 0x01}},
};
#define ALWAYS (sizeof(always) / sizeof(*always))

static void show(struct pvf_groups *g)
{
	__atomic_store_n(&g->count, g->set.count, __ATOMIC_RELAXED);
	__atomic_store_n(&g->lost, g->set.lost, __ATOMIC_RELAXED);
}

/* Whoever tells the backend is woken: another queue may have seen the report. */
static void news(struct pvf_groups *g)
{
	show(g);
	if (!__atomic_exchange_n(&g->news, 1, __ATOMIC_ACQ_REL) && g->wake_fd >= 0)
		eventfd_write(g->wake_fd, 1);
}

void pvf_groups_init(struct pvf_groups *g)
{
	memset(g, 0, sizeof(*g));
	g->wake_fd = -1;
	pthread_mutex_init(&g->lock, NULL);
	memcpy(g->set.group, always, sizeof(always));
	g->set.count = ALWAYS;
	g->news = 1;
	show(g);
}

void pvf_groups_free(struct pvf_groups *g)
{
	pthread_mutex_destroy(&g->lock);
}

/* The set; with the lock held */

static bool same_mac(const uint8_t *a, const uint8_t *b)
{
	return !memcmp(a, b, 6);
}

static bool wanted(const struct pvf_group_set *s, const uint8_t *mac)
{
	for (uint32_t i = 0; i < s->count; i++)
		if (same_mac(s->group[i].mac, mac))
			return true;
	return false;
}

static bool same(const struct pvf_group *a, const struct pvf_group *b)
{
	return a->family == b->family && same_mac(a->station, b->station) &&
	       !memcmp(a->tag, b->tag, sizeof(a->tag)) &&
	       !memcmp(a->address, b->address, sizeof(a->address));
}

static void join(struct pvf_groups *g, const struct pvf_group *who)
{
	struct pvf_group_set *s = &g->set;
	uint32_t known = s->count;

	for (uint32_t i = ALWAYS; i < s->count; i++) {
		if (same(&s->group[i], who))
			return;
		if (!s->group[i].family && same_mac(s->group[i].mac, who->mac))
			known = i; /* now it is known by whom */
	}
	if (known == PVF_NET_GROUPS) {
		s->lost++;
		return show(g);
	}
	s->group[known] = *who;
	s->count += known == s->count;
	news(g);
}

static void drop(struct pvf_groups *g, uint32_t index)
{
	struct pvf_group_set *s = &g->set;

	s->group[index] = s->group[--s->count];
	news(g);
}

static void leave(struct pvf_groups *g, const struct pvf_group *who)
{
	struct pvf_group_set *s = &g->set;

	for (uint32_t i = ALWAYS; i < s->count; i++)
		if (same(&s->group[i], who) ||
		    (!s->group[i].family && same_mac(s->group[i].mac, who->mac)))
			return drop(g, i);
}

/* Reports */

static void report(struct pvf_groups *g, struct pvf_group *who, const uint8_t *address, bool joins)
{
	if (who->family == 4 ? address[0] >> 4 != 14 : address[0] != 0xff)
		return; /* no group */
	memset(who->address, 0, sizeof(who->address));
	if (who->family == 4) {
		const uint8_t mac[6] = {0x01, 0x00, 0x5e, address[1] & 0x7f, address[2], address[3]};

		memcpy(who->address, address, 4);
		memcpy(who->mac, mac, 6);
	} else {
		const uint8_t mac[6] = {0x33, 0x33, address[12], address[13], address[14], address[15]};

		memcpy(who->address, address, 16);
		memcpy(who->mac, mac, 6);
	}
	if (joins)
		join(g, who);
	else
		leave(g, who);
}

/* Records of {type, auxiliary words, sources (16 bits), group, sources, auxiliary data}. */
static void records(struct pvf_groups *g, struct pvf_group *who, const uint8_t *at, const uint8_t *end,
		    uint32_t count)
{
	uint32_t size = who->family == 4 ? 4 : 16;

	for (; count && end - at >= (ptrdiff_t)(4 + size); count--) {
		uint32_t sources = (uint32_t)at[2] << 8 | at[3];
		size_t bytes = 4 + size + (size_t)sources * size + at[1] * 4u;
		bool includes = at[0] == MODE_IS_INCLUDE || at[0] == CHANGE_TO_INCLUDE ||
				at[0] == ALLOW_NEW_SOURCES;

		if ((size_t)(end - at) < bytes)
			return;
		if (at[0] == MODE_IS_EXCLUDE || at[0] == CHANGE_TO_EXCLUDE || (includes && sources))
			report(g, who, at + 4, true);
		else if (at[0] == CHANGE_TO_INCLUDE || at[0] == MODE_IS_INCLUDE)
			report(g, who, at + 4, false);
		at += bytes;
	}
}

static void igmp(struct pvf_groups *g, struct pvf_group *who, const uint8_t *at, const uint8_t *end)
{
	if (end - at < 8)
		return;
	switch (at[0]) {
	case 0x12: /* version 1 */
	case 0x16: /* version 2 */
		return report(g, who, at + 4, true);
	case 0x17:
		return report(g, who, at + 4, false);
	case 0x22: /* version 3 */
		return records(g, who, at + 8, end, (uint32_t)at[6] << 8 | at[7]);
	}
}

static void mld(struct pvf_groups *g, struct pvf_group *who, const uint8_t *at, const uint8_t *end)
{
	if (end - at < 8)
		return;
	switch (at[0]) {
	case 131: /* version 1 */
	case 132:
		if (end - at >= 24)
			report(g, who, at + 8, at[0] == 131);
		return;
	case 143: /* version 2 */
		return records(g, who, at + 8, end, (uint32_t)at[6] << 8 | at[7]);
	}
}

void pvf_groups_snoop(struct pvf_groups *g, const uint8_t *head, uint32_t have, uint32_t total)
{
	struct pvf_packet p;
	struct pvf_group who = {0};

	if (have < PVF_ETH_HEADER || !(head[0] & 1)) /* all reports go to a group */
		return;
	pvf_packet_parse(&p, head, have, total);
	if (!p.l4 || !(p.family == 4 ? p.protocol == IPPROTO_IGMP : p.protocol == IPPROTO_MLD))
		return;
	memcpy(who.station, head + 6, 6);
	if (p.tags)
		memcpy(who.tag, head + 12, 4);
	who.family = p.family;
	const uint8_t *end = head + pvf_min32(have, p.l4 + (uint32_t)p.l4_bytes);

	pthread_mutex_lock(&g->lock);
	if (p.family == 4)
		igmp(g, &who, head + p.l4, end);
	else
		mld(g, &who, head + p.l4, end);
	pthread_mutex_unlock(&g->lock);
}

/* From elsewhere, and to the backend */

void pvf_groups_replace(struct pvf_groups *g, const uint8_t (*mac)[6], uint32_t count)
{
	struct pvf_group_set *s = &g->set;

	pthread_mutex_lock(&g->lock);
	for (uint32_t i = s->count; i-- > ALWAYS;) {
		bool stays = false;

		for (uint32_t k = 0; k < count; k++)
			stays |= same_mac(mac[k], s->group[i].mac);
		if (!stays)
			drop(g, i);
	}
	for (uint32_t k = 0; k < count; k++) {
		struct pvf_group one = {0};

		memcpy(one.mac, mac[k], 6);
		if (!wanted(s, mac[k]))
			join(g, &one);
	}
	pthread_mutex_unlock(&g->lock);
}

void pvf_groups_untold(struct pvf_groups *g)
{
	pthread_mutex_lock(&g->lock);
	g->set.told = 0;
	news(g);
	pthread_mutex_unlock(&g->lock);
}

static bool tell_all(struct pvf_group_set *s, bool (*tell)(void *, const uint8_t *, bool), void *arg)
{
	/* First what is left: the backend has no more room than there is here. */
	for (uint32_t i = s->told; i-- > 0;) {
		if (wanted(s, s->mac_told[i]))
			continue;
		if (!tell(arg, s->mac_told[i], false))
			return false;
		memcpy(s->mac_told[i], s->mac_told[--s->told], 6);
	}
	for (uint32_t i = 0; i < s->count; i++) {
		bool known = false;

		for (uint32_t k = 0; k < s->told; k++)
			known |= same_mac(s->mac_told[k], s->group[i].mac);
		if (known || s->told == PVF_NET_GROUPS)
			continue;
		if (!tell(arg, s->group[i].mac, true))
			return false;
		memcpy(s->mac_told[s->told++], s->group[i].mac, 6);
	}
	return true;
}

bool pvf_groups_tell(struct pvf_groups *g, bool (*tell)(void *, const uint8_t *, bool), void *arg)
{
	/* Before the set is read: what is noted after that is told in another turn. */
	if (!__atomic_exchange_n(&g->news, 0, __ATOMIC_ACQ_REL))
		return true;
	pthread_mutex_lock(&g->lock);
	bool all = tell_all(&g->set, tell, arg);

	if (!all) /* nobody is woken: the backend's answers are waited for */
		__atomic_store_n(&g->news, 1, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&g->lock);
	return all;
}

void pvf_groups_take_over(struct pvf_groups *g, const struct pvf_group_set *set)
{
	pthread_mutex_lock(&g->lock);
	g->set = *set;
	news(g);
	pthread_mutex_unlock(&g->lock);
}

bool pvf_groups_possible(const struct pvf_group_set *s)
{
	if (s->count < ALWAYS || s->count > PVF_NET_GROUPS || s->told > PVF_NET_GROUPS)
		return false;
	for (uint32_t i = 0; i < s->count; i++)
		if (!(s->group[i].mac[0] & 1))
			return false;
	return true;
}
