# SPDX-License-Identifier: BSD-2-Clause
"""Keys of a network interface: what is taken from the store, and what is written there."""

from __future__ import annotations

import pytest

from pvfront.netfront.features import (
    MTU_LARGEST,
    NetError,
    Offer,
    QueueKeys,
    frontend_keys,
    lost,
    multicast_later,
    parse_mac,
    parse_mtu,
    parse_offer,
    stale_key,
    trusted,
)

NETBACK = {
    "feature-rx-copy": "1",
    "feature-rx-flip": "0",
    "feature-sg": "1",
    "feature-gso-tcpv4": "1",
    "feature-gso-tcpv6": "1",
    "feature-ipv6-csum-offload": "1",
    "feature-multicast-control": "1",
    "feature-dynamic-multicast-control": "1",
    "feature-split-event-channels": "1",
    "multi-queue-max-queues": "2",
    "feature-ctrl-ring": "1",
    "feature-xdp-headroom": "1",
}
"""What Linux 6.1's netback writes."""


def test_all_that_netback_offers_is_taken() -> None:
    offer, problems = parse_offer(NETBACK)
    assert offer == Offer(True, True, True, True, True, True, True, True, True, True, 2)
    assert problems == []


def test_a_backend_that_says_nothing_finishes_ipv4_checksums_only() -> None:
    offer, problems = parse_offer({"feature-rx-copy": "1"})
    assert offer == Offer()
    assert (offer.csum_ipv4, offer.csum_ipv6, offer.max_queues) == (True, False, 1)
    assert problems == []


@pytest.mark.parametrize("keys", [{}, {"feature-rx-copy": "0"}, {"feature-rx-copy": "yes"}])
def test_a_backend_that_cannot_copy_is_refused_by_name(keys: dict[str, str]) -> None:
    with pytest.raises(NetError, match="feature-rx-copy"):
        parse_offer(keys)


def test_large_packets_without_their_slots_or_checksums_are_not_offered() -> None:
    offer, problems = parse_offer({**NETBACK, "feature-sg": "0"})
    assert (offer.gso_tcpv4, offer.gso_tcpv6) == (False, False)
    assert [problem.field for problem in problems] == ["feature-gso-tcpv4", "feature-gso-tcpv6"]
    offer, _ = parse_offer({**NETBACK, "feature-no-csum-offload": "1"})
    assert (offer.csum_ipv4, offer.gso_tcpv4, offer.gso_tcpv6) == (False, False, True)
    offer, _ = parse_offer({**NETBACK, "feature-ipv6-csum-offload": "0"})
    assert (offer.gso_tcpv4, offer.gso_tcpv6) == (True, False)


@pytest.mark.parametrize(
    ("text", "queues"),
    [("0", 1), ("1", 1), ("16", 16), ("17", 16), ("99999999999999999999999", 1), ("-1", 1)],
)
def test_the_number_of_queues_is_clamped(text: str, queues: int) -> None:
    offer, _ = parse_offer({**NETBACK, "multi-queue-max-queues": text})
    assert offer.max_queues == queues


def test_a_mac_is_six_bytes_of_one_machine() -> None:
    assert parse_mac("00:16:3E:0a:0b:0c\n") == bytes.fromhex("00163e0a0b0c")


@pytest.mark.parametrize(
    "text",
    ["", "00:16:3e:0a:0b", "00:16:3e:0a:0b:0c:0d", "00-16-3e-0a-0b-0c", "g0:16:3e:0a:0b:0c",
     "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "x" * 5000],
)  # fmt: skip
def test_anything_else_is_no_mac_and_is_named(text: str) -> None:
    with pytest.raises(NetError, match="mac=") as caught:
        parse_mac(text)
    assert len(str(caught.value)) < 200


def test_a_missing_mac_is_named() -> None:
    with pytest.raises(NetError, match="mac is missing"):
        parse_mac(None)


@pytest.mark.parametrize(
    ("text", "mtu"),
    [("1500", 1500), ("9000", 9000), ("65517", 65517), ("65535", MTU_LARGEST), ("0", 68),
     ("nine thousand", 1500), ("-1", 1500)],
)  # fmt: skip
def test_an_mtu_is_clamped_to_what_netif_carries(text: str, mtu: int) -> None:
    found, problems = parse_mtu({"mtu": text}, {"mtu": "2000"}, sg=True)
    assert found == mtu
    assert bool(problems) == (str(mtu) != text)


def test_a_large_mtu_wants_packets_of_several_slots() -> None:
    mtu, problems = parse_mtu({"mtu": "9000"}, {}, sg=False)
    assert mtu == 1500
    assert "feature-sg" in str(problems[0])
    assert parse_mtu({}, {}, sg=False) == (1500, [])
    assert parse_mtu({}, {"mtu": "9000"}, sg=True) == (9000, [])


def test_one_queue_stands_in_the_directory_itself() -> None:
    keys = frontend_keys([QueueKeys(8, 9, 20)], offer=Offer())
    assert (keys["tx-ring-ref"], keys["rx-ring-ref"], keys["event-channel"]) == ("8", "9", "20")
    assert (keys["request-rx-copy"], keys["feature-rx-notify"]) == ("1", "1")
    assert not any(key.startswith(("queue-", "multi-queue", "request-multicast")) for key in keys)


def test_several_queues_have_a_directory_each() -> None:
    offer, _ = parse_offer(NETBACK)
    keys = frontend_keys([QueueKeys(8, 9, 20, 21), QueueKeys(10, 11, 22, 23)], offer=offer)
    assert keys["multi-queue-num-queues"] == "2"
    assert keys["queue-1/tx-ring-ref"] == "10"
    assert keys["queue-1/event-channel-rx"] == "23"
    assert not keys.keys() & {"event-channel", "tx-ring-ref"}
    assert keys["request-multicast-control"] == "0"


def test_every_key_that_is_written_is_removed_again_and_none_of_the_toolstacks() -> None:
    offer, _ = parse_offer(NETBACK)
    for queues in ([QueueKeys(8, 9, 20)], [QueueKeys(8, 9, 20, 21), QueueKeys(10, 11, 22, 23)]):
        assert all(stale_key(key) for key in frontend_keys(queues, offer=offer))
    toolstacks = ("mac", "mtu", "trusted", "backend", "backend-id", "state", "handle", "disconnect")
    assert not any(stale_key(key) for key in toolstacks)


def test_the_control_ring_and_a_zero_of_xdp_are_published_where_they_are_offered() -> None:
    offer, _ = parse_offer(NETBACK)
    keys = frontend_keys([QueueKeys(8, 9, 20)], offer=offer, control=(77, 30))
    assert (keys["ctrl-ring-ref"], keys["event-channel-ctrl"]) == ("77", "30")
    assert keys["xdp-headroom"] == "0"
    assert all(stale_key(key) for key in keys)
    assert not frontend_keys([QueueKeys(8, 9, 20)], offer=Offer()).keys() & {
        "ctrl-ring-ref", "event-channel-ctrl", "xdp-headroom",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("static", "dynamic", "wanted", "now", "later"),
    [
        ("1", "0", False, "0", False),
        ("1", "0", True, "1", False),
        ("1", "1", True, "0", True),
        ("1", "1", False, "0", False),
        ("0", "0", True, None, False),
        ("0", "1", True, None, False),
    ],
)
def test_a_multicast_filter_is_asked_for_at_once_or_when_joins_are_told(
    static: str, dynamic: str, wanted: bool, now: str | None, later: bool
) -> None:
    offer, problems = parse_offer(
        {
            **NETBACK,
            "feature-multicast-control": static,
            "feature-dynamic-multicast-control": dynamic,
        }
    )
    keys = frontend_keys([QueueKeys(8, 9, 20)], offer=offer, multicast_filter=wanted)
    assert keys.get("request-multicast-control") == now
    assert multicast_later(offer, multicast_filter=wanted) is later
    assert bool(problems) == (static < dynamic)


@pytest.mark.parametrize(
    ("text", "is_trusted", "problems"),
    [("1", True, 0), ("0", False, 0), ("", False, 1), ("yes", False, 1), ("2", False, 1)],
)
def test_a_backend_is_trusted_unless_the_toolstack_says_anything_but_1(
    text: str, is_trusted: bool, problems: int
) -> None:
    found, named = trusted({"trusted": text})
    assert (found, len(named)) == (is_trusted, problems)
    assert trusted({}) == (True, [])


def test_what_a_backend_has_lost_is_named_and_what_it_gained_is_not() -> None:
    rich, _ = parse_offer(NETBACK)
    poor, _ = parse_offer({"feature-rx-copy": "1"})
    assert len(lost(rich, poor)) == 8
    assert lost(rich, poor)[-1] == "1 queues at most, not 2"
    assert lost(poor, rich) == lost(rich, rich) == []
