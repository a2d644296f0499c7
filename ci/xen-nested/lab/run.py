# SPDX-License-Identifier: BSD-2-Clause
"""The lab's command line: `python -m lab COMMAND` with ci/xen-nested on PYTHONPATH."""

from __future__ import annotations

import argparse
import os
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from . import image, paths, payload
from .client import Machine
from .errors import CommandFailed, DeadlineExceeded, LabError
from .guest import KINDS, Guest
from .progress import say
from .scenario import LOCK_DEADLINE, Lab, State, end_running_lab


def _machine(lab: Lab, name: str) -> Machine:
    if name == "dom0":
        return lab.dom0
    for kind in KINDS:
        if kind == name:
            return lab.guest(kind)
    raise SystemExit(f"no machine {name!r}: dom0, {', '.join(KINDS)}")


def _payload(options: argparse.Namespace) -> Path | None:
    """The payload image that the options ask for; none with --no-payload."""
    if options.no_payload:
        return None
    return payload.build(Path(options.deb) if options.deb else None)


def _install(options: argparse.Namespace) -> int:
    lab = Lab.attach()
    for kind in options.kinds or KINDS:
        if lab.has_guest(kind) and lab.guest(kind).running():
            payload.install(lab.guest(kind), Path(options.deb) if options.deb else None)
    return 0


def _up(options: argparse.Namespace) -> int:
    state = State.load()
    if state is None:
        owner = f"up, started by pid {os.getpid()}"
        lab = Lab.up(
            _payload(options), owner=owner, keep=True, wait=options.wait, kinds=options.guest or []
        )
    else:
        say(f"already up: {state.owner}")
        lab = Lab.attach()
    for kind in options.guest or []:
        if not lab.guest(kind).running():
            lab.guest(kind).create()
    print(f"lab is up; logs in {lab.run}")
    return 0


def _hold(options: argparse.Namespace) -> int:
    """A lab for other programs, from the line "ready" until our standard input ends."""
    kinds = options.guest or list(KINDS)
    with_payload = _payload(options)
    owner = f"hold, pid {os.getpid()}"
    lab = Lab.up(with_payload, owner=owner, wait=options.wait, kinds=kinds)
    try:
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        lab.down()
    return 0


def _down(_options: argparse.Namespace) -> int:
    print("lab ended" if end_running_lab() else "no lab runs")
    return 0


def _status(_options: argparse.Namespace) -> int:
    state = State.load()
    if state is None:
        print("no lab runs")
        return 1
    lab = Lab.attach()
    print(f"{state.owner}: QEMU pid {state.pid}, logs in {state.run}, payload: {state.payload}")
    print(lab.xl("list").stdout, end="")
    for kind in KINDS:
        if lab.has_guest(kind) and lab.guest(kind).running():
            print(f"{kind}: agent {'answers' if lab.guest(kind).alive() else 'SILENT'}")
    return 0


def _exec(options: argparse.Namespace) -> int:
    """Run a command there, output as it comes, its status as ours."""
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not words:
        raise SystemExit("exec: no command given")
    stdin = b"" if sys.stdin.isatty() or not options.stdin else sys.stdin.buffer.read()
    machine = _machine(Lab.attach(), options.machine)
    command: str | Sequence[str] = words[0] if len(words) == 1 else words
    job = machine.start(command, stdin=stdin, unit=options.unit)
    begin = time.monotonic()
    try:
        while True:
            out, err = job.poll(wait=1.0)
            sys.stdout.buffer.write(out)
            sys.stdout.buffer.flush()
            sys.stderr.buffer.write(err)
            sys.stderr.buffer.flush()
            if job.code is not None:
                break
            if options.timeout and time.monotonic() - begin > options.timeout:
                job.kill()
                raise SystemExit(f"killed after {options.timeout} s")
    except KeyboardInterrupt:
        job.kill()
        return 130
    machine.forget(job)
    return job.code


def _shell(options: argparse.Namespace) -> int:
    """A shell in the running lab, else in one of our own that ends with it."""
    ours = State.load() is None
    lab = (
        Lab.up(_payload(options), owner=f"shell, pid {os.getpid()}", kinds=[options.guest])
        if ours
        else Lab.attach()
    )
    try:
        machine = _machine(lab, options.machine or options.guest)
        if isinstance(machine, Guest):
            if not machine.running():
                machine.create()
            elif not options.no_payload and not ours:
                payload.install_if_other(machine)
        return machine.shell()
    finally:
        if ours:
            lab.down()


def _push(options: argparse.Namespace) -> int:
    _machine(Lab.attach(), options.machine).push(options.source, options.target)
    return 0


def _pull(options: argparse.Namespace) -> int:
    _machine(Lab.attach(), options.machine).pull(options.source, options.target)
    return 0


def _create(options: argparse.Namespace) -> int:
    guest = Lab.attach().guest(options.kind)
    guest.destroy()
    guest.create(disks=options.disk or [], vifs=options.vif or [])
    return 0


def _destroy(options: argparse.Namespace) -> int:
    Lab.attach().guest(options.kind).destroy()
    return 0


def _test(options: argparse.Namespace) -> int:
    """Run the plugin's suites; the last line is `N passed, N failed, N skipped`."""
    import pytest

    # `python -m lab` in the checkout puts its folder first, and pvfront's sources there, which lack
    # what is built, would hide the installed package.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != paths.PROJECT]

    name = "soak" if options.soak else "lab"
    if options.soak:
        os.environ.setdefault("PVFRONT_REPEATS", "10")
    junit = Path(options.junit or paths.PROJECT / f"build/junit/{name}-{options.guest}.xml")
    junit.parent.mkdir(parents=True, exist_ok=True)
    junit.unlink(missing_ok=True)
    tests = [word for word in options.pytest if Path(word.split("::")[0]).exists()]
    suites = ("tests/functional", "tests/lab")
    arguments = [] if tests else [str(paths.PROJECT / suite) for suite in suites]
    arguments += ["-p", "lab.plugin", "--guest", options.guest, f"--junit-xml={junit}", "-v"]
    arguments += ["--rootdir", str(paths.PROJECT)]
    arguments += ["-m", options.k] if options.k else []
    for flag in ("lab_attach", "lab_shared", "no_payload", "soak"):
        arguments += ["--" + flag.replace("_", "-")] if getattr(options, flag) else []
    status = int(pytest.main([*arguments, *options.pytest]))
    counts = _count(junit) if junit.exists() else (0, 0, 0)
    if status and not counts[1]:
        reason = {5: "no test matches"}.get(status, f"pytest ended with {status}")
        print(f"lab: {reason}; counted as one failure", file=sys.stderr)
        counts = (counts[0], 1, counts[2])
    print("{} passed, {} failed, {} skipped".format(*counts))
    return 1 if counts[1] else 0


def _count(junit: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit file."""
    passed = failed = skipped = 0
    for suite in ET.parse(junit).getroot().iter("testsuite"):
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        left_out = int(suite.get("skipped", 0))
        passed += int(suite.get("tests", 0)) - bad - left_out
        failed += bad
        skipped += left_out
    return passed, failed, skipped


def _image(_options: argparse.Namespace) -> int:
    for name in ("dom0", "guest"):
        print(image.build(name).directory)
    return 0


def _clean(_options: argparse.Namespace) -> int:
    image.clean()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="The nested-Xen test lab of pvfront.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    machines = ("dom0", *KINDS)
    default = os.environ.get("GUEST", "hvm")

    boots = argparse.ArgumentParser(add_help=False)
    boots.add_argument("--deb", help="pvfront's package; default: the newest in build/dist")
    boots.add_argument("--no-payload", action="store_true", help="guests without pvfront")
    wait = "seconds to wait for another lab's end"
    verb = verbs.add_parser("up", help="boot a lab and leave it running", parents=[boots])
    verb.add_argument("--guest", action="append", choices=KINDS, help="also start this guest")
    verb.add_argument("--wait", type=float, default=0, help=wait)
    verb.set_defaults(call=_up)
    verb = verbs.add_parser("hold", help="a lab until standard input ends", parents=[boots])
    verb.add_argument("--guest", action="append", choices=KINDS, help="its disk is there")
    verb.add_argument("--wait", type=float, default=LOCK_DEADLINE, help=wait)
    verb.set_defaults(call=_hold)
    verb = verbs.add_parser("install", help="put a new build into running guests")
    verb.add_argument("kinds", nargs="*", metavar="GUEST", help="default: all that run")
    verb.add_argument("--deb", help="pvfront's package; default: the newest in build/dist")
    verb.set_defaults(call=_install)
    for name, call, text in (
        ("down", _down, "end the running lab"),
        ("status", _status, "what runs"),
        ("image", _image, "build the images"),
        ("clean", _clean, "forget the cached images"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(call=call)
    for name, text in (
        ("test", "run tests/functional and tests/lab in a lab of its own"),
        ("soak", "the tests that repeat, ten times as often; goes on where it was interrupted"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("--guest", choices=KINDS, default=default)
        verb.add_argument("-k", metavar="MARKERS", help="marker expression, like: core and not net")
        verb.add_argument("--junit", help="default: build/junit/lab-GUEST.xml")
        verb.add_argument("--lab-attach", action="store_true", help="use the running lab")
        verb.add_argument(
            "--lab-shared", action="store_true", help="use the running lab; the guest is ours alone"
        )
        verb.add_argument("--no-payload", action="store_true", help="guests without pvfront")
        verb.add_argument("pytest", nargs="*", help="tests or pytest arguments, after --")
        verb.set_defaults(call=_test, soak=name == "soak")
    verb = verbs.add_parser("exec", help="run a command; one word goes to bash -c")
    verb.add_argument("--unit", help="run it in a systemd scope of this name (guests)")
    verb.add_argument("--stdin", action="store_true", help="pass our standard input on")
    verb.add_argument("--timeout", type=float, default=0, help="kill it after so many seconds")
    verb.add_argument("machine", choices=machines)
    verb.add_argument("command", nargs=argparse.REMAINDER)
    verb.set_defaults(call=_exec)
    verb = verbs.add_parser("shell", help="an interactive shell (starts a lab if none runs)")
    verb.add_argument("machine", nargs="?", choices=machines)
    verb.add_argument("--guest", choices=KINDS, default=default, help="if no MACHINE is given")
    verb.add_argument("--deb", help="pvfront's package; default: the newest in build/dist")
    verb.add_argument("--no-payload", action="store_true", help="a guest without pvfront")
    verb.set_defaults(call=_shell)
    for name, copy, text in (
        ("push", _push, "copy a file or directory there: push hvm SOURCE TARGET"),
        ("pull", _pull, "copy a file from there: pull hvm SOURCE TARGET"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("machine", choices=machines)
        verb.add_argument("source")
        verb.add_argument("target")
        verb.set_defaults(call=copy)
    verb = verbs.add_parser("create", help="(re)start a guest of the running lab")
    verb.add_argument("kind", choices=KINDS)
    verb.add_argument("--disk", action="append", help="phy:/dev/ram0,xvdb,w")
    verb.add_argument("--vif", action="append", help="bridge=xenbr0,type=vif")
    verb.set_defaults(call=_create)
    verb = verbs.add_parser("destroy", help="destroy a guest of the running lab")
    verb.add_argument("kind", choices=KINDS)
    verb.set_defaults(call=_destroy)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.call(options)
    except (LabError, CommandFailed, DeadlineExceeded) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return status
