# SPDX-License-Identifier: BSD-2-Clause
"""The order of a suspend, driven by hand: which event in which stage asks for which action."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.suspend_machine import (
    Action,
    Armed,
    Commanded,
    Done,
    Event,
    Limits,
    Machine,
    Overdue,
    Refired,
    Stage,
    Started,
)
from pvfront.veto import Line, LogEvent

REFUSED = LogEvent(Line.REFUSED, "xen:manage: do_suspend: freeze processes failed -16")
SUSPENDING = LogEvent(Line.XEN_SUSPENDING)
FROZEN = LogEvent(Line.FREEZE_DONE)
THAWED = LogEvent(Line.THAWED)
LOST = LogEvent(Line.LOST)


def given_up(elapsed: float = 0.001) -> LogEvent:
    return LogEvent(Line.FREEZE_GIVEN_UP, elapsed=elapsed)


class Driver:
    """A machine and a clock; remembers what was asked for."""

    def __init__(self) -> None:
        self.machine = Machine(limits=Limits())
        self.now = 1000.0
        self.asked: list[Action] = []

    def tell(self, *events: Event) -> list[Action]:
        """Feeds the events; returns the actions of all of them."""
        asked = [action for event in events for action in self.machine.step(event, self.now)]
        self.asked += asked
        return asked

    def veto(self) -> list[Action]:
        """What a vetoed suspend leaves in the log."""
        return self.tell(given_up(), THAWED, REFUSED)

    def walk_to(self, stage: Stage) -> None:
        """From armed, by the straight way."""
        self.tell(Started(), Armed(True))
        steps: list[tuple[Stage, list[Event]]] = [
            (Stage.FREEZING, [given_up(), THAWED, REFUSED, Armed(True)]),
            (Stage.SETTLING, [Done(Action.FREEZE)]),
            (Stage.CLOSING, [Done(Action.SETTLE)]),
            (Stage.SUSPENDING, [Done(Action.CLOSE)]),
            (Stage.REARMING, [Done(Action.SUSPEND), FROZEN, SUSPENDING, THAWED]),
            (Stage.REOPENING, [Armed(True)]),
            (Stage.THAWING, [Done(Action.REOPEN)]),
        ]
        for reached, events in steps:
            self.tell(*events)
            assert self.machine.stage is reached
            if reached is stage:
                self.asked.clear()
                return


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_a_vetoed_suspend_is_carried_out_in_order(driver: Driver) -> None:
    driver.walk_to(Stage.THAWING)
    driver.tell(Refired(), Done(Action.THAW))
    assert driver.machine.stage is Stage.WATCHING
    assert driver.machine.counts.suspended == 1
    assert driver.machine.counts.refused == 0
    assert driver.machine.armed


def test_the_actions_of_a_whole_suspend_come_in_this_order(driver: Driver) -> None:
    machine = driver.machine
    driver.tell(Started(), Armed(True))
    driver.veto()
    driver.tell(Armed(True), Done(Action.FREEZE), Done(Action.SETTLE), Done(Action.CLOSE))
    driver.tell(Done(Action.SUSPEND), FROZEN, SUSPENDING, THAWED)
    driver.tell(Armed(True), Done(Action.REOPEN), Done(Action.THAW))
    assert driver.asked == [
        Action.ARM,
        Action.ARM,  # the veto is one shot: on again while everything is put away
        Action.FREEZE,
        Action.SETTLE,
        Action.CLOSE,
        Action.SUSPEND,
        Action.ARM,
        Action.REOPEN,
        Action.THAW,
    ]
    assert machine.stage is Stage.WATCHING


def test_a_poweroff_starts_nothing(driver: Driver) -> None:
    driver.tell(Started(), Armed(True))
    assert driver.tell(Commanded("poweroff"), Commanded("")) == []
    assert driver.machine.stage is Stage.WATCHING


def test_a_freeze_that_no_store_asked_for_only_rearms(driver: Driver) -> None:
    """Suspend to idle of the guest itself: vetoed, no do_suspend line."""
    driver.tell(Started(), Armed(True))
    assert driver.tell(given_up(), THAWED) == [Action.ARM]
    assert not driver.machine.armed
    assert driver.machine.stage is Stage.WATCHING


def test_the_time_a_failed_freeze_took_counts_from_the_request(driver: Driver) -> None:
    """Unarmed with programs that will not freeze: 20 s of the toolstack's 60 s are gone."""
    driver.tell(Started(), given_up(20.0), THAWED, REFUSED)
    assert driver.machine.stage is Stage.FREEZING
    assert driver.machine.requested_at == driver.now - 20.0


@pytest.mark.parametrize(
    ("stage", "action", "unwinds_with"),
    [
        (Stage.FREEZING, Action.FREEZE, Action.THAW),
        (Stage.SETTLING, Action.SETTLE, Action.THAW),
        (Stage.CLOSING, Action.CLOSE, Action.REOPEN),
        (Stage.SUSPENDING, Action.SUSPEND, Action.ARM),
    ],
)
def test_a_failure_undoes_what_was_done(
    driver: Driver, stage: Stage, action: Action, unwinds_with: Action
) -> None:
    driver.walk_to(stage)
    assert driver.tell(Done(action, "no")) == [unwinds_with]


def test_a_failure_is_tried_again_while_the_toolstack_waits(driver: Driver) -> None:
    driver.walk_to(Stage.CLOSING)
    driver.tell(Done(Action.CLOSE, "xvdb: does not drain"), Done(Action.REOPEN))
    assert driver.tell(Done(Action.THAW)) == [Action.FREEZE]
    assert driver.machine.stage is Stage.FREEZING


def test_a_failure_late_in_the_day_refuses_the_suspend(driver: Driver) -> None:
    driver.walk_to(Stage.CLOSING)
    driver.now += driver.machine.limits.retry_before + 1
    driver.tell(Done(Action.CLOSE, "xvdb: does not drain"), Done(Action.REOPEN))
    assert driver.tell(Done(Action.THAW)) == []
    assert driver.machine.stage is Stage.WATCHING
    assert driver.machine.last_refusal == "xvdb: does not drain"
    assert driver.machine.counts.refused == 1
    assert driver.machine.armed


def test_suspend_is_never_written_when_the_toolstack_may_have_given_up(driver: Driver) -> None:
    driver.walk_to(Stage.CLOSING)
    driver.now += driver.machine.limits.last_write + 0.1
    assert driver.tell(Done(Action.CLOSE)) == [Action.REOPEN]
    driver.tell(Done(Action.REOPEN), Done(Action.THAW))
    assert "too late" in driver.machine.last_refusal


@pytest.mark.parametrize(
    ("stage", "action"), [(Stage.FREEZING, Action.FREEZE), (Stage.SETTLING, Action.SETTLE)]
)
def test_no_device_is_closed_for_a_suspend_that_would_come_too_late(
    driver: Driver, stage: Stage, action: Action
) -> None:
    driver.walk_to(stage)
    driver.now += driver.machine.limits.last_write + 0.1
    assert driver.tell(Done(action)) == [Action.THAW]


def test_the_last_write_leaves_the_kernel_time_to_freeze_within_libxls_minute() -> None:
    limits = Limits()
    assert limits.last_write + 2 * limits.kernel_freeze < 60
    assert limits.freeze + limits.settle + limits.close < limits.last_write


def test_the_veto_is_put_back_before_anything_reopens(driver: Driver) -> None:
    driver.walk_to(Stage.SUSPENDING)
    assert not driver.machine.armed
    assert driver.tell(Done(Action.SUSPEND), FROZEN, SUSPENDING, THAWED) == [Action.ARM]
    assert driver.tell(Armed(True)) == [Action.REOPEN]


def test_devices_reopen_although_the_veto_cannot_be_put_back(driver: Driver) -> None:
    driver.walk_to(Stage.REARMING)
    assert driver.tell(Armed(False, "another wakeup source is active")) == [Action.REOPEN]
    assert driver.machine.why_unarmed == "another wakeup source is active"
    driver.tell(Armed(True))
    assert driver.machine.armed
    assert driver.machine.stage is Stage.REOPENING


def test_an_acknowledgement_alone_is_not_the_end(driver: Driver) -> None:
    """The node may be empty while the freeze is only about to begin."""
    driver.walk_to(Stage.SUSPENDING)
    assert driver.tell(Done(Action.SUSPEND), Commanded(""), Commanded("")) == []
    assert driver.machine.stage is Stage.SUSPENDING


def test_the_thaw_of_an_earlier_freeze_is_not_the_end(driver: Driver) -> None:
    driver.walk_to(Stage.SUSPENDING)
    assert driver.tell(Done(Action.SUSPEND), THAWED) == []


def test_the_end_may_be_read_before_the_write_is_reported(driver: Driver) -> None:
    driver.walk_to(Stage.SUSPENDING)
    assert driver.tell(FROZEN, SUSPENDING, THAWED) == [Action.ARM]
    assert driver.tell(Done(Action.SUSPEND)) == []
    assert driver.tell(Armed(True)) == [Action.REOPEN]


def test_the_kernels_own_failure_to_freeze_is_tried_again(driver: Driver) -> None:
    driver.walk_to(Stage.SUSPENDING)
    driver.tell(Done(Action.SUSPEND))
    assert driver.tell(given_up(5.0), THAWED, REFUSED) == [Action.ARM]
    driver.tell(Armed(True), Done(Action.REOPEN))
    assert driver.tell(Done(Action.THAW)) == [Action.FREEZE]
    # Events of our own first write may still arrive: they are no foreign command.
    driver.tell(Commanded(""), Commanded(""))
    assert driver.tell(Done(Action.FREEZE)) == [Action.SETTLE]


def test_a_cancelled_suspend_counts_as_cancelled(driver: Driver) -> None:
    driver.walk_to(Stage.THAWING)
    driver.tell(Done(Action.THAW))
    assert driver.machine.counts.cancelled == 1
    assert driver.machine.counts.suspended == 0


def test_a_resume_as_a_new_domain_is_told_by_the_watch_that_fires_again(driver: Driver) -> None:
    driver.walk_to(Stage.REARMING)
    assert driver.machine.cancelled is True
    driver.tell(Refired())
    assert driver.machine.cancelled is False


def test_a_silent_log_ends_the_suspend_as_unknown(driver: Driver) -> None:
    driver.walk_to(Stage.SUSPENDING)
    driver.tell(Done(Action.SUSPEND), LOST)
    assert driver.tell(Overdue()) == [Action.ARM]
    assert driver.machine.cancelled is None


def test_overdue_after_the_end_is_nothing(driver: Driver) -> None:
    driver.walk_to(Stage.REOPENING)
    assert driver.tell(Overdue()) == []


def test_three_suspends_in_a_row_work(driver: Driver) -> None:
    driver.walk_to(Stage.THAWING)
    driver.tell(Refired(), Done(Action.THAW))
    for _ in range(2):
        driver.veto()
        driver.tell(Armed(True), Done(Action.FREEZE), Done(Action.SETTLE), Done(Action.CLOSE))
        driver.tell(Done(Action.SUSPEND), FROZEN, SUSPENDING, THAWED, Refired())
        driver.tell(Armed(True), Done(Action.REOPEN), Done(Action.THAW))
    assert driver.machine.counts.suspended == 3
    assert driver.machine.stage is Stage.WATCHING


@pytest.mark.parametrize("stage", [Stage.FREEZING, Stage.SETTLING, Stage.CLOSING])
def test_a_second_request_meanwhile_gives_new_time(driver: Driver, stage: Stage) -> None:
    driver.walk_to(stage)
    driver.now += 40
    assert driver.veto() == [Action.ARM]
    assert driver.machine.stage is stage
    assert driver.machine.requested_at == pytest.approx(driver.now, abs=0.01)


@pytest.mark.parametrize("stage", [Stage.REARMING, Stage.REOPENING, Stage.THAWING])
def test_a_request_during_the_return_is_carried_out_next(driver: Driver, stage: Stage) -> None:
    driver.walk_to(stage)
    driver.veto()
    driver.tell(Armed(True), Done(Action.REOPEN))
    driver.tell(Done(Action.THAW))
    assert driver.machine.stage is Stage.FREEZING


def test_a_poweroff_meanwhile_stops_the_suspend_for_good(driver: Driver) -> None:
    driver.walk_to(Stage.SETTLING)
    driver.tell(Commanded(""), Commanded(""), Commanded("poweroff"))
    assert driver.tell(Done(Action.SETTLE)) == [Action.THAW]
    assert driver.tell(Done(Action.THAW)) == []
    assert driver.machine.stage is Stage.WATCHING
    assert "poweroff" in driver.machine.last_refusal


def test_a_command_that_was_acknowledged_before_we_looked_stops_it_too(driver: Driver) -> None:
    driver.walk_to(Stage.FREEZING)
    driver.tell(*[Commanded("")] * 4)
    assert driver.tell(Done(Action.FREEZE)) == [Action.THAW]
    assert driver.tell(Done(Action.THAW)) == []


def test_the_events_of_the_request_itself_do_not_stop_it(driver: Driver) -> None:
    driver.walk_to(Stage.FREEZING)
    driver.tell(Commanded(""), Commanded(""))
    assert driver.tell(Done(Action.FREEZE)) == [Action.SETTLE]


def test_a_second_request_explains_two_more_events(driver: Driver) -> None:
    driver.walk_to(Stage.FREEZING)
    driver.tell(Commanded(""), Commanded(""))
    driver.veto()
    driver.tell(Commanded("suspend"), Commanded(""))
    assert driver.tell(Done(Action.FREEZE)) == [Action.SETTLE]


def test_a_suspend_that_nobody_held_up_poisons_the_devices(driver: Driver) -> None:
    driver.tell(Started(), Armed(True))
    assert driver.tell(FROZEN, SUSPENDING, THAWED) == [Action.ARM, Action.POISON]
    assert driver.machine.counts.unprepared == 1
    assert driver.machine.stage is Stage.WATCHING
    assert driver.tell(Refired()) == []


@pytest.mark.parametrize(
    ("stage", "action"),
    [
        (Stage.FREEZING, Action.FREEZE),
        (Stage.SETTLING, Action.SETTLE),
        (Stage.CLOSING, Action.CLOSE),
    ],
)
def test_a_suspend_before_all_is_closed_poisons_and_ends_the_sequence(
    driver: Driver, stage: Stage, action: Action
) -> None:
    driver.walk_to(stage)
    assert Action.POISON in driver.tell(FROZEN, SUSPENDING, THAWED)
    driver.tell(Done(action), Done(Action.REOPEN), Done(Action.THAW))
    assert driver.machine.stage is Stage.WATCHING
    assert Action.SUSPEND not in driver.asked


def test_lost_log_lines_rearm(driver: Driver) -> None:
    driver.tell(Started(), Armed(True))
    assert driver.tell(LOST) == [Action.ARM]


def test_a_resume_that_only_the_watch_tells_of_poisons_if_log_lines_were_lost(
    driver: Driver,
) -> None:
    driver.tell(Started(), Armed(True), LOST)
    assert driver.tell(Refired()) == [Action.POISON]


def test_a_watch_that_fires_with_a_complete_log_poisons_nothing(driver: Driver) -> None:
    driver.walk_to(Stage.THAWING)
    driver.tell(Done(Action.THAW))
    assert driver.tell(Refired()) == []


EVENTS = st.one_of(
    st.sampled_from([Started(), Overdue(), Refired()]),
    st.builds(Armed, st.booleans()),
    st.builds(Done, st.sampled_from(list(Action)), st.sampled_from(["", "", "no"])),
    st.builds(Commanded, st.sampled_from(["", "suspend", "poweroff"])),
    st.builds(LogEvent, st.sampled_from(list(Line))),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 30)), max_size=60))
def test_whatever_happens_suspend_is_asked_for_only_after_a_successful_close_in_time(
    events: list[tuple[Event, float]],
) -> None:
    driver = Driver()
    for event, later in events:
        driver.now += later
        before = driver.machine.stage
        asked = driver.tell(event)
        if Action.SUSPEND in asked:
            assert before is Stage.CLOSING
            assert event == Done(Action.CLOSE)
            assert driver.now - driver.machine.requested_at <= driver.machine.limits.last_write
        if Action.REOPEN in asked and before is not Stage.CLOSING:
            assert before is Stage.REARMING


@given(st.lists(st.tuples(EVENTS, st.floats(0, 30)), max_size=60))
def test_whatever_happened_the_machine_gets_back_to_watching(
    events: list[tuple[Event, float]],
) -> None:
    driver = Driver()
    for event, later in events:
        driver.now += later
        driver.tell(event)
    driver.now += 100
    pending: dict[Stage, list[Event]] = {
        Stage.FREEZING: [Done(Action.FREEZE, "no")],
        Stage.SETTLING: [Done(Action.SETTLE, "no")],
        Stage.CLOSING: [Done(Action.CLOSE, "no")],
        Stage.SUSPENDING: [Overdue()],
        Stage.REARMING: [Armed(False)],
        Stage.REOPENING: [Done(Action.REOPEN)],
        Stage.THAWING: [Done(Action.THAW)],
    }
    for _ in range(20):
        if driver.machine.stage is Stage.WATCHING:
            return
        driver.now += 30
        driver.tell(*pending[driver.machine.stage])
    raise AssertionError(f"stuck in {driver.machine.stage}")
