# SPDX-License-Identifier: BSD-2-Clause
"""pytest in the lab: one boot of it for all tests of a run, a healthy guest for each test.

A plugin and no conftest.py, because two directories run under it: tests/lab, and tests/functional,
which runs on the embedded host where this is not loaded (`python -m lab test` does that).

`lab` is the machine with Xen, booted once. `guest` is a running guest of the kind that --guest
names (or $GUEST, or hvm). It is the same domain from test to test, and is started afresh only
after a test that failed, left it silent or gone, or gave it a configuration of its own.
HVM runs every test but those marked `embedded`, `area`, `long`, `pv` or for other kinds (`kinds`),
the others those marked `core` or for them, PV also those marked `pv`, pvh612 those marked `ublk`.
Where markers are asked for (-m), and in a soak, any kind runs what has them, `area` included.

Several runs may share one lab, each with a kind of guest of its own (`--lab-shared`).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import CallInfo, runtestprotocol

from . import paths, payload
from .errors import CommandFailed, DeadlineExceeded, LabError
from .guest import IMAGE, KINDS, STEPPED, Guest, Kind, triple_fault
from .progress import say
from .scenario import LOCK_DEADLINE, Lab

SUITES = (paths.PROJECT / "tests" / "functional", paths.PROJECT / "tests" / "lab")
"""The order is that of a run: what is last in tests/lab is last of all."""

TEST_DEADLINE = 1200
"""Seconds for a test that names none; the boot of the lab counts for the first test."""

REPEATS = 3
"""How often a test is repeated whose guest the emulator triple-faulted, or single-stepped."""

MARKERS = (
    "disk: disks (XENVBD)",
    "net: network interfaces (XENVIF)",
    "services: store, agent, packages (XENBUS, XENIFACE)",
    "console: consoles (XENCONS)",
    "survive: save/restore, restart, crash, backend loss",
    "core: runs in every guest type; the rest runs in HVM",
    "pv: runs in PV, whose guests boot fastest, and nowhere else",
    "kinds: core, but only in these kinds of guest: the others are the same but for the kernel",
    "area: left out of a whole run, but not where markers are asked for",
    "long: left out but in a soak, or where --every asks for it",
    "ublk: runs in guests whose kernel has ublk, and nowhere else",
    "embedded: not repeated in the lab, whose time is dear",
    "first: runs before all others: it begins with a boot, which is theirs then",
    "last: runs after all others: it ends with the guest's end",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lab")
    group.addoption(
        "--guest", choices=KINDS, default=os.environ.get("GUEST", "hvm"), help="guest type"
    )
    group.addoption(
        "--lab-attach", action="store_true", help="use the lab that `python -m lab up` left running"
    )
    group.addoption(
        "--lab-shared", action="store_true", help="use a running lab, in which the guest is ours"
    )
    group.addoption(
        "--lab-wait", type=float, default=LOCK_DEADLINE, help="seconds to wait for another lab"
    )
    group.addoption(
        "--soak", action="store_true", help="only what has `soak_round` or is marked `area`, `long`"
    )
    group.addoption(
        "--with-embedded", action="store_true", help="also what the embedded host is enough for"
    )
    group.addoption("--every", action="store_true", help="whatever guest a test is marked for")
    group.addoption("--no-payload", action="store_true", help="guests without pvfront")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `soak_round` runs once, and $PVFRONT_REPEATS times in a soak.

    As tests of their own, so that a soak goes on where it was interrupted, and an emulator's fault
    costs one round.
    """
    if "soak_round" in metafunc.fixturenames:
        metafunc.parametrize("soak_round", range(int(os.environ.get("PVFRONT_REPEATS", "1"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _is_ours(item)]
    for item in ours:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_DEADLINE))
    chosen = ours
    if not config.getoption("--with-embedded"):
        chosen = [item for item in chosen if not item.get_closest_marker("embedded")]
    if not config.getoption("--every"):
        chosen = [item for item in chosen if _in_guest(item, config)]
    if config.getoption("--soak"):
        done = _soaked(config).read_text().split("\n") if _soaked(config).exists() else []
        chosen = [
            item for item in chosen
            if "soak_round" in _fixtures(item)
            or item.get_closest_marker("area")
            or item.get_closest_marker("long")
        ]  # fmt: skip
        left = [item for item in chosen if item.nodeid not in done]
        if left:
            chosen = left
        else:  # all were done: begin again
            _soaked(config).unlink(missing_ok=True)
    others = [item for item in ours if item not in chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.get_closest_marker("first"):
        return -1
    return 1 if item.get_closest_marker("last") else 0


def _in_guest(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether the kind of guest is one that the test is marked for."""
    soak, asked = config.getoption("--soak"), config.getoption("-m")
    if item.get_closest_marker("long") and not soak:
        return False
    if item.get_closest_marker("area") and not (soak or asked):
        return False
    kind = config.getoption("--guest")
    if item.get_closest_marker("pv"):
        return bool(kind == "pv")
    if item.get_closest_marker("ublk"):
        return IMAGE[kind] == "guest612"
    if asked or soak:
        return True
    if kinds := item.get_closest_marker("kinds"):
        return kind in kinds.args
    return kind == "hvm" or item.get_closest_marker("core") is not None


def _is_ours(item: pytest.Item) -> bool:
    return any(suite in item.path.parents for suite in SUITES)


def _fixtures(item: pytest.Item) -> list[str]:
    return list(getattr(item, "fixturenames", []))


def _soaked(config: pytest.Config) -> Path:
    """The tests that passed in this round of the soak, one a line; that is how it resumes."""
    folder = paths.PROJECT / "build" / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{config.getoption('--guest')}-passed.txt"


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Xen and dom0, booted; the package under test waits on the guests' payload disk."""
    option = request.config.getoption
    if option("--lab-attach") or option("--lab-shared"):
        lab = Lab.attach()
        request.config.stash[LAB] = lab
        yield lab
        if option("--lab-shared"):
            with contextlib.suppress(CommandFailed, DeadlineExceeded):
                lab.guest(option("--guest")).destroy()  # its memory and CPU are others'
        return
    image = None if option("--no-payload") else payload.build()
    lab = Lab.up(
        image,
        owner=f"tests, pid {os.getpid()}",
        wait=option("--lab-wait"),
        kinds=[option("--guest")],
    )
    request.config.stash[LAB] = lab
    try:
        yield lab
    finally:
        lab.down()


@pytest.fixture
def guest(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A running, answering guest in the standard configuration."""
    kind: Kind = request.config.getoption("--guest")
    guest = lab.guest(kind)
    lab.check_services()
    attached = request.config.getoption("--lab-attach")
    if (guest.dirty and not attached) or not (
        guest.alive() or (guest.running() and _answers(guest))
    ):
        guest.destroy()
        guest.create()
    if not request.config.stash.get(CURRENT, False):
        request.config.stash[CURRENT] = True
        if attached and not request.config.getoption("--no-payload"):
            payload.install_if_other(guest)
    yield guest
    report = request.node.stash.get(REPORT, None)
    if report is not None and report.failed:
        guest.dirty = True
    lab.release_disks()
    if attached or not guest.dirty:
        with contextlib.suppress(CommandFailed, DeadlineExceeded):
            guest.detach_extras()
    lab.remove_disks()


def _answers(guest: Guest) -> bool:
    try:
        guest.wait_agent(60)
    except LabError as error:
        say(f"{guest.kind}: started afresh: {error}")
        return False
    return True


LAB = pytest.StashKey[Lab]()
CURRENT = pytest.StashKey[bool]()
MARK = pytest.StashKey[int]()
SAID = pytest.StashKey[int]()
REPORT = pytest.StashKey[pytest.TestReport]()
BEGIN = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    lab = item.config.stash.get(LAB, None)
    item.stash[MARK] = lab.outer.console.position() if lab else 0
    item.stash[SAID] = 0
    if lab:
        item.stash[SAID] = len(lab.guest(item.config.getoption("--guest")).console())
        lab.dom0.note(0, "begins", item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A test in which the emulator broke the guest (its faults) runs again, counted and printed.

    At most REPEATS times: one fault in about 15 minutes of a guest's life was seen, so a run of
    half an hour meets two, and one repeat alone would lose every tenth of them to another fault.
    Nothing else is ever repeated.
    """
    if not _is_ours(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    # The last test would take the lab with it, and its repeat would be in another one: it is let go
    # once that is known to be over.
    stays = nextitem or item.parent
    reports = runtestprotocol(item, nextitem=stays, log=False)  # type: ignore[arg-type]
    for _ in range(REPEATS):
        if not any(report.failed for report in reports) or not _emulator_faulted(item):
            break
        say(f"the emulator broke the guest in {item.name}: this test again")
        item.config.stash[LAB].tally.triple_faults.append(item.name)
        if REPORT in item.stash:
            del item.stash[REPORT]
        item._initrequest()  # type: ignore[attr-defined]
        reports = runtestprotocol(item, nextitem=stays, log=False)  # type: ignore[arg-type]
    if nextitem is None:
        rest = item.session._setupstate.teardown_exact
        end = CallInfo.from_call(lambda: rest(None), when="teardown")
        if end.excinfo:
            reports.append(item.ihook.pytest_runtest_makereport(item=item, call=end))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _emulator_faulted(item: pytest.Item) -> bool:
    lab = item.config.stash.get(LAB, None)
    if lab is None or not lab.outer.alive():
        return False
    guest = lab.guest(item.config.getoption("--guest"))
    dump = lab.outer.console.since(item.stash.get(MARK, 0))
    console = guest.console()
    said = console[item.stash.get(SAID, 0) :]
    return bool(STEPPED.search(said)) or triple_fault(dump, console, guest.domids or None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """On a failure, keep what can be had before anything is cleaned up."""
    report: pytest.TestReport = yield
    if report.passed and report.when == "call" and item.config.getoption("--soak"):
        with _soaked(item.config).open("a") as file:
            file.write(f"{item.nodeid}\n")
    if report.failed:
        lab = item.config.stash.get(LAB, None)
        if report.when == "call":
            item.stash[REPORT] = report
        if lab is not None:
            name = re.sub(r"[^\w.-]+", "_", item.name)[:80]
            where = lab.run / "failures" / f"{name}-{report.when}"
            lab.keep_evidence(where, item.config.getoption("--guest"))
            (where / "report.txt").write_text(report.longreprtext)
            fault = re.search(r"d\d+v\d+ Triple fault", lab.outer.console.since(item.stash[MARK]))
            if fault:
                report.sections.append(("lab", f"Xen's console says: {fault[0]}"))
            report.sections.append(("lab", f"evidence in {where}"))
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One line for the guest."""
    counts = {
        name: len(terminalreporter.stats.get(name, []))
        for name in ("passed", "failed", "error", "skipped", "rerun")
    }
    lab = config.stash.get(LAB, None)
    kind: Kind = config.getoption("--guest")
    notes = [f"{time.monotonic() - BEGIN:.0f} s"]
    if lab is not None:
        boot = lab.guest(kind).create_seconds
        notes += [f"guest boot {boot:.0f} s"] if boot else []
        faults = lab.tally.triple_faults
        notes += [f"{len(faults)} emulator triple faults repeated: {', '.join(faults) or 'none'}"]
        notes += [f"logs in {lab.run}"]
    failed = counts["failed"] + counts["error"]
    terminalreporter.write_line(
        f"{kind} guest: {counts['passed']} passed, {failed} failed, {counts['skipped']} skipped "
        f"({'; '.join(notes)})"
    )
