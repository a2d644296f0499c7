# SPDX-License-Identifier: BSD-2-Clause
"""Keys of a network interface, written by somebody hostile: sound values, or one error each."""

from __future__ import annotations

import contextlib

from fuzzing import TEXTS, examples
from hypothesis import given
from hypothesis import strategies as st

from pvfront.negotiate import Problem
from pvfront.netfront import features, shape
from pvfront.netfront.features import NetError, Offer, QueueKeys
from pvfront.netfront.link import STATE_KEYS, link_state

NAMES = (*features.BACKEND_KEYS, *features.FRONTEND_KEYS, *STATE_KEYS, "x")
COPIES = {"feature-rx-copy": "1"}
directories = st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), TEXTS)


def named(problems: list[Problem]) -> None:
    for problem in problems:
        assert str(problem).isprintable()
        assert len(str(problem)) < 250
        assert problem.field in str(problem)


def clear(error: NetError) -> None:
    """One line."""
    assert str(error).isprintable()
    assert len(str(error)) < 250


def found(keys: dict[str, str]) -> Offer:
    offer, problems = features.parse_offer(keys)
    named(problems)
    return offer


@examples(600)
@given(directories, st.booleans())
def test_any_directory_is_a_sound_offer_or_an_error_that_names_its_key(
    keys: dict[str, str], copies: bool
) -> None:
    try:
        offer = found(COPIES | keys if copies else keys)
    except NetError as error:
        clear(error)
        return
    assert 1 <= offer.max_queues <= features.MAX_QUEUES
    assert not (offer.gso_tcpv4 or offer.gso_tcpv6) or offer.sg
    assert not offer.gso_tcpv4 or offer.csum_ipv4
    assert not offer.gso_tcpv6 or offer.csum_ipv6
    assert not offer.dynamic_multicast_control or offer.multicast_control
    asked = shape.wanted(offer, features.MAX_QUEUES)
    assert shape.fit(asked, asked.pages) == asked


@examples(400)
@given(directories, directories, st.booleans())
def test_any_mtu_is_one_that_a_packet_can_have(
    frontend: dict[str, str], backend: dict[str, str], sg: bool
) -> None:
    mtu, problems = features.parse_mtu(frontend, backend, sg=sg)
    named(problems)
    assert features.MTU_LEAST <= mtu <= (features.MTU_LARGEST if sg else features.MTU_ONE_PAGE)


@examples(400)
@given(st.none() | TEXTS)
def test_any_mac_is_the_address_of_one_machine_or_an_error(text: str | None) -> None:
    mac = b"\0" * 6
    try:
        mac = features.parse_mac(text)
    except NetError as error:
        clear(error)
    else:
        assert len(mac) == 6
        assert not mac[0] & 1
        assert any(mac)


@examples(300)
@given(directories)
def test_whom_nobody_calls_trusted_in_so_many_words_is_not(keys: dict[str, str]) -> None:
    trusted, problems = features.trusted(keys)
    named(problems)
    assert trusted == (keys.get("trusted", "1").strip() == "1")
    assert not (trusted and problems)


@examples(400)
@given(directories, directories)
def test_any_keys_are_a_state_of_the_link(
    backend: dict[str, str], frontend: dict[str, str]
) -> None:
    state, problems = link_state(backend, frontend)
    named(problems)
    assert state.speed is None or state.speed >= 0
    assert state.up or state.why


@examples(300)
@given(directories, st.integers(1, 16), st.booleans(), st.booleans())
def test_what_is_published_is_removed_as_stale_afterwards_and_nothing_of_the_toolstacks(
    keys: dict[str, str], queues: int, split: bool, wanted: bool
) -> None:
    offer = Offer()
    with contextlib.suppress(NetError):
        offer = found(COPIES | keys)
    rings = [QueueKeys(8 + n, 40 + n, 80 + n, 120 + n if split else None) for n in range(queues)]
    ours = features.frontend_keys(rings, offer=offer, control=(7, 9), multicast_filter=wanted)
    assert all(features.stale_key(key) for key in ours)
    assert all(value.isdecimal() for value in ours.values())
    assert not any(features.stale_key(key) for key in (*features.FRONTEND_KEYS, *STATE_KEYS))
