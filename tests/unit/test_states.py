# SPDX-License-Identifier: BSD-2-Clause
"""The table of the frontend's walk: total, without busy cycles, and it arrives."""

from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.states import (
    AWAITED,
    ENDS,
    WAITS,
    WRITES,
    Goal,
    Step,
    XenbusState,
    next_step,
    parse_state,
    read_state,
)

S = XenbusState
EVERYTHING = list(product(S, S, (True, False), Goal, (True, False)))
PUBLISHED_WITH = (S.INITIALISED, S.CONNECTED)
"""What keys are published with: a disk's, a network's."""


def decide(frontend, backend, online=True, goal=Goal.CONNECTED, published=False, started=True):
    return next_step(
        frontend, backend, online=online, goal=goal, published=published, started=started
    )


# -- reading a state ---------------------------------------------------------------------------


def test_the_nine_states_are_read():
    assert [parse_state(str(number)) for number in range(9)] == list(S)
    assert read_state("4").reason is None


@pytest.mark.parametrize(
    "value",
    [None, "", "9", "44", "-1", " 4", "4 ", "4\0", "+4", "\uff10", "\u0664", "x" * 10000, "\udcff"],
)
def test_anything_else_is_unknown_with_a_printable_reason(value):
    reading = read_state(value)
    assert reading.state is S.UNKNOWN
    assert reading.reason.isprintable()
    assert len(reading.reason) < 500


@given(st.text())
def test_no_text_raises(value):
    assert parse_state(value) in S


def test_states_are_shown_with_the_number_of_the_store():
    assert [state.label for state in S] == [
        "Unknown (0)",
        "Initialising (1)",
        "InitWait (2)",
        "Initialised (3)",
        "Connected (4)",
        "Closing (5)",
        "Closed (6)",
        "Reconfiguring (7)",
        "Reconfigured (8)",
    ]


# -- the table as a whole ----------------------------------------------------------------------


def test_every_combination_has_a_step_with_a_reason():
    assert len(EVERYTHING) == 9 * 9 * 2 * 2 * 2
    for case in EVERYTHING:
        decision = decide(*case)
        assert decision.step in WAITS | ENDS | set(WRITES), case
        assert decision.reason.isprintable(), case
        assert decision.reason, case


def test_every_step_is_used_and_is_a_write_a_wait_or_an_end():
    assert {decide(*case).step for case in EVERYTHING} == set(Step)
    assert set(WRITES) | WAITS | ENDS == set(Step)
    assert set(AWAITED) == WAITS
    assert not set(WRITES) & WAITS


def test_no_cycle_without_a_wait():
    """With a backend that does not move, a walk soon waits, pauses or ends."""
    for case, started, publish in product(EVERYTHING, (True, False), PUBLISHED_WITH):
        frontend, backend, online, goal, published = case
        seen = set()
        while True:
            step = decide(frontend, backend, online, goal, published, started).step
            if step in WAITS | ENDS or step is Step.PAUSE_THEN_WRITE_CLOSING:
                break
            found = frontend, published, started
            assert found not in seen, f"a cycle that never waits: {case}"
            seen.add(found)
            frontend = written(step, publish)
            published, started = after(step, published), begun(step, started)
        assert len(seen) <= 4, case


def test_a_wait_is_never_for_what_is_already_there():
    for case in EVERYTHING:
        assert case[1] not in AWAITED.get(decide(*case).step, ()), case


def after(step, published):
    return {Step.ALLOCATE_AND_PUBLISH: True, Step.CONNECT: published}.get(step, False)


def begun(step, started):
    return {Step.ALLOCATE_AND_PUBLISH: False, Step.CONNECT: True}.get(step, started)


def written(step, publish):
    return publish if step is Step.ALLOCATE_AND_PUBLISH else WRITES[step]


# -- whole walks against backends --------------------------------------------------------------


@dataclass
class Blkback:
    """How Linux's blkback answers the frontend's states (drivers/block/xen-blkback/xenbus.c)."""

    state: XenbusState
    online: bool = True
    busy: int = 0
    """Connects that it refuses with "pending I/O"."""
    publish = S.INITIALISED

    def react(self, frontend):
        if frontend is S.INITIALISING:
            if self.state is S.CLOSED or self.state is S.INITIALISING:
                self.state = S.INIT_WAIT
        elif frontend in (S.INITIALISED, S.CONNECTED):
            if self.state is S.CONNECTED:
                return
            if self.busy:
                self.busy -= 1
                self.state = S.CLOSING
            else:
                self.state = S.CONNECTED
        elif frontend is S.CLOSING:
            self.state = S.CLOSING
        elif frontend is S.CLOSED:
            self.state = S.CLOSED


@dataclass
class Netback(Blkback):
    """Linux's netback (drivers/net/xen-netback/xenbus.c): nothing happens before Connected."""

    publish = S.CONNECTED

    def react(self, frontend):
        if frontend is not S.INITIALISED:
            super().react(frontend)


def walk(frontend, backend, goal=Goal.CONNECTED, published=False, limit=40):
    """Drives the walk to its end; returns the steps. The backend reacts to each write."""
    steps, started = [], True
    for _ in range(limit):
        decision = decide(frontend, backend.state, backend.online, goal, published, started)
        steps.append(decision.step)
        if decision.step in ENDS:
            return steps
        if decision.step in WAITS:
            before = backend.state
            backend.react(frontend)
            assert backend.state is not before, f"stuck: {decision} ({frontend}, {before})"
            continue
        frontend = written(decision.step, backend.publish)
        published = after(decision.step, published)
        started = begun(decision.step, started)
        if decision.step is not Step.CONNECT:
            backend.react(frontend)
    raise AssertionError(f"does not arrive: {steps}")


LIVE_BACKEND = (S.INITIALISING, S.INIT_WAIT, S.CONNECTED, S.CLOSING, S.CLOSED)
KINDS = pytest.mark.parametrize("kind", [Blkback, Netback])


@KINDS
@pytest.mark.parametrize("backend", LIVE_BACKEND)
@pytest.mark.parametrize("frontend", list(S))
def test_from_any_states_found_the_walk_arrives_at_connected(frontend, backend, kind):
    end = kind(backend)
    assert walk(frontend, end)[-1] is Step.DONE
    assert end.state is S.CONNECTED


@KINDS
@pytest.mark.parametrize("backend", LIVE_BACKEND)
@pytest.mark.parametrize("frontend", list(S))
def test_from_any_states_found_the_walk_arrives_at_closed(frontend, backend, kind):
    end = kind(backend)
    assert walk(frontend, end, Goal.CLOSED)[-1] is Step.DONE
    assert end.state is S.CLOSED


@pytest.mark.parametrize("backend", [S.INIT_WAIT, S.CLOSING, S.CLOSED])
@pytest.mark.parametrize("frontend", list(S))
def test_a_detached_device_is_left_closed_and_never_connected_again(frontend, backend):
    steps = walk(frontend, Blkback(backend, online=False), published=frontend is S.CONNECTED)
    assert steps[-1] is Step.DETACHED
    assert Step.ALLOCATE_AND_PUBLISH not in steps
    assert Step.CONNECT not in steps


@KINDS
def test_a_fresh_device_is_connected_without_a_close_cycle(kind):
    assert walk(S.INITIALISING, kind(S.INIT_WAIT)) == [
        Step.ALLOCATE_AND_PUBLISH,
        Step.CONNECT,
        Step.DONE,
    ]


@KINDS
def test_what_a_crash_left_behind_goes_through_closing_closed_and_restart(kind):
    assert walk(S.CONNECTED, kind(S.CONNECTED)) == [
        Step.WRITE_CLOSING,
        Step.WRITE_CLOSED,
        Step.RESTART,
        Step.ALLOCATE_AND_PUBLISH,
        Step.CONNECT,
        Step.DONE,
    ]


def test_a_backend_with_pending_io_is_asked_again_after_a_pause_each_time():
    steps = walk(S.INITIALISING, Blkback(S.INIT_WAIT, busy=3))
    assert steps.count(Step.PAUSE_THEN_WRITE_CLOSING) == 3
    assert steps.count(Step.ALLOCATE_AND_PUBLISH) == 4
    assert steps[-1] is Step.DONE


# -- single rules ------------------------------------------------------------------------------


def test_an_unbound_device_answers_the_detach_although_it_was_never_connected():
    assert decide(S.INITIALISING, S.CLOSING, online=False).step is Step.WRITE_CLOSING


def test_a_live_connection_is_left_alone_while_the_backend_only_says_offline():
    assert decide(S.CONNECTED, S.CONNECTED, online=False, published=True).step is Step.DONE


@pytest.mark.parametrize("backend", [s for s in S if s is not S.CONNECTED])
def test_any_jump_of_the_backend_ends_a_live_connection_in_order(backend):
    for online in (True, False):
        assert decide(S.CONNECTED, backend, online, published=True).step is Step.WRITE_CLOSING


@pytest.mark.parametrize(("online", "goal"), list(product((True, False), Goal)))
@pytest.mark.parametrize("backend", list(S))
def test_connected_before_the_data_path_runs_is_what_initialised_is(backend, online, goal):
    """Keys that are published with Connected: the backend's answer is yet to come."""
    as_connected = decide(S.CONNECTED, backend, online, goal, published=True, started=False)
    as_initialised = decide(S.INITIALISED, backend, online, goal, published=True)
    assert as_connected == as_initialised


@pytest.mark.parametrize(
    ("backend", "step"),
    [
        (S.INIT_WAIT, Step.WAIT_CONNECTED),
        (S.INITIALISED, Step.WAIT_CONNECTED),
        (S.CONNECTED, Step.CONNECT),
        (S.CLOSING, Step.PAUSE_THEN_WRITE_CLOSING),
        (S.CLOSED, Step.PAUSE_THEN_WRITE_CLOSING),
        (S.UNKNOWN, Step.PAUSE_THEN_WRITE_CLOSING),
    ],
)
def test_keys_published_with_connected_wait_for_the_backend_to_take_them(backend, step):
    assert decide(S.CONNECTED, backend, published=True, started=False).step is step


def test_whether_the_data_path_runs_matters_only_for_keys_that_are_ours():
    for frontend, backend, online, goal, published in EVERYTHING:
        if frontend is S.CONNECTED and published:
            continue
        case = frontend, backend, online, goal, published
        assert decide(*case, started=False) == decide(*case, started=True), case


def test_a_connection_that_was_never_started_is_closed_when_it_is_not_wanted_any_more():
    for case in ({"online": False}, {"goal": Goal.CLOSED}):
        step = decide(S.CONNECTED, S.INIT_WAIT, published=True, started=False, **case).step
        assert step is Step.WRITE_CLOSING


def test_vanished_nodes_end_the_walk_at_once():
    assert decide(S.UNKNOWN, S.UNKNOWN).step is Step.DETACHED
    assert decide(S.UNKNOWN, S.CLOSING, online=False).step is Step.DETACHED


def test_nobody_is_waited_for_when_the_backend_node_is_gone():
    steps = [
        decide(frontend, S.UNKNOWN, online=False, published=True).step
        for frontend in (S.CONNECTED, S.CLOSING, S.CLOSED)
    ]
    assert steps == [Step.WRITE_CLOSING, Step.WRITE_CLOSED, Step.DETACHED]


def test_the_reason_names_the_state_that_the_backend_is_stuck_in():
    assert "Connected (4)" in decide(S.CLOSING, S.CONNECTED).reason
    assert "Closing (5)" in decide(S.CLOSED, S.CLOSING).reason
