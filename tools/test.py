# SPDX-License-Identifier: BSD-2-Clause
"""Runs the test stages and adds up what they counted.

`all` runs in two lanes. One runs a guest of the lab, whose emulated machine leaves more than half
a core idle, the other, with a low priority, everything else; then each runs one more guest of the
same lab as long as there are more. What C tests want compiled is so while Python's tests wait.
`lab` is the guests alone. What is not of the first lane is shown stage by stage, as each ends. Any
other list of stages runs one after the other, each kind of guest in a lab of its own.

Every stage leaves a JUnit file under build/junit/; the sum of all of them is the last line. A
stage that fails without saying which test failed (it could not build, the lab did not boot)
counts as one failure, so that a broken stage is never a green run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
JUNIT = ROOT / "build" / "junit"

LOGS = ROOT / "build" / "log"

LINT = ["ruff", "mypy"]
FAST = [*LINT, "unit", "hostile", "native", "asan", "tsan", "fuzz", "mutate", "deb"]
AGAINST = [
    *(f"tests/unit/test_{name}.py" for name in (
        "device", "device_suspend", "disk_frontend", "supervisor", "supervisor_says", "suspend",
        "suspend_members", "upgrade", "worker_liars", "xenbus",
    )),
    "tests/fuzz/test_xenbus_walk.py",
]  # fmt: skip
"""What `unit` runs once more with an adversary (tests/support/adversary.py), in some seconds."""
LAB = ["hvm", "pv", "pvh612"]  # the longest first; pvh612 is a PVH guest
NATIVE = {
    "native": [],
    "asan": ["-Db_lundef=false", "-Db_sanitize=address,undefined"],
    "tsan": ["-Db_lundef=false", "-Db_sanitize=thread"],
}
"""What meson is told of each build of the C code."""
CACHE = Path(os.environ.get("PVFRONT_CACHE") or Path.home() / ".cache" / "pvfront")
COMPILER_CACHE = {
    "CCACHE_DIR": str(CACHE / "ccache"),
    "CCACHE_BASEDIR": str(ROOT),
    "CCACHE_NOHASHDIR": "1",
    "CCACHE_MAXSIZE": "1G",
}
"""Of the C compilers (meson takes ccache where it is): any clone has what another one compiled."""
NAMED = ["pvh"]  # make test-xen GUEST=pvh: PVH with the kernel of the others
GROUPS = {"lint": LINT, "fast": FAST, "lab": LAB, "all": [*FAST, *LAB]}

_this = threading.local()
"""Of a thread's stages. `file`: where they write; absent: our own output. `nice`: how far they
stand back (nice(1)). `shared`: their guests are in a lab that runs already."""


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run(*command: str | Path) -> int:
    env = {**COMPILER_CACHE, **os.environ}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT / "ci" / "xen-nested")
    sys.stdout.flush()
    file = getattr(_this, "file", None)
    nice = ["nice", "-n", str(_this.nice)] if getattr(_this, "nice", 0) else []
    return subprocess.run(
        [str(c) for c in (*nice, *command)],
        cwd=ROOT,
        env=env,
        check=False,
        stdout=file,
        stderr=subprocess.STDOUT if file else None,
    ).returncode


def read_junit(path: Path) -> Count:
    count = Count()
    for suite in ET.parse(path).getroot().iter("testsuite"):
        total = int(suite.get("tests", "0"))
        bad = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
        skipped = int(suite.get("skipped", "0"))
        count += Count(total - bad - skipped, bad, skipped)
    return count


def results(stage: str) -> list[Path]:
    """The JUnit files of a stage."""
    return [*JUNIT.glob(f"{stage}.xml"), *JUNIT.glob(f"{stage}-*.xml")]


def set_up(name: str) -> int:
    build = ROOT / "build" / f"native-{name}"
    if (build / "build.ninja").exists():
        return 0
    return run(BIN / "meson", "setup", "-Dabi=false", *NATIVE[name], build, ROOT)


def meson(name: str, suite: str = "") -> int:
    """Builds the C tests in a directory of their own and runs them, or one suite of them."""
    build = ROOT / "build" / f"native-{name}"
    log = build / "meson-logs" / "testlog.junit.xml"
    if set_up(name):
        return 1
    log.unlink(missing_ok=True)
    which = ["--suite", suite] if suite else []
    code = run(BIN / "meson", "test", "-C", build, "--print-errorlogs", "--quiet", *which)
    if log.exists():
        log.replace(JUNIT / f"{name}.xml")
    return code


def sanitized(name: str, rules: str, suite: str = "") -> int:
    """The C tests, and the worker's and some rules' tests on a worker, built with a sanitizer."""
    code = meson(name, suite)
    build = ROOT / "build" / f"native-{name}"
    worker = build / "native" / "pvfront-worker"
    # `meson test` builds what the C tests need, and the worker is none of that.
    if run(BIN / "meson", "compile", "-C", build, "pvfront-worker"):
        return 1
    return code | run(
        "env", "PVFRONT_SANITIZED=1", f"PVFRONT_WORKER={worker}", BIN / "pytest", "-q",
        f"--junit-xml={JUNIT / f'{name}-worker.xml'}", "tests/worker",
        f"tests/hostile/test_rules_{rules}.py",
    )  # fmt: skip


def stage(name: str) -> int:
    for old in results(name):
        old.unlink()
    junit = JUNIT / f"{name}.xml"
    match name:
        case "ruff":
            return run(BIN / "ruff", "check", "--quiet", ".")
        case "mypy":
            return run(BIN / "mypy", "--no-error-summary")
        case "unit":
            code = run(BIN / "pytest", "-q", f"--junit-xml={junit}")
            return code | run(
                "env", "PVFRONT_ADVERSARY=1", BIN / "pytest", "-q",
                f"--junit-xml={JUNIT / 'unit-adversary.xml'}", *AGAINST,
            )  # fmt: skip
        case "hostile":
            return run(BIN / "pytest", "-q", f"--junit-xml={junit}", "tests/hostile")
        case "deb":
            if run("make", "--no-print-directory", "deb"):
                return 1
            return run(BIN / "pytest", "-q", f"--junit-xml={junit}", "tests/package")
        case "native":
            return meson("native")
        case "asan":
            return sanitized("asan", "ring")
        case "tsan":  # what starts no thread has nothing for it to find
            return sanitized("tsan", "queues", suite="threads")
        case "fuzz":
            return run(BIN / "python", "tools/fuzz.py", "--seconds", "5", "--junit", junit)
        case "mutate":
            return run(BIN / "python", "tools/mutate.py", "--sample", "2", "--junit", junit)
        case "hvm" | "pvh" | "pv" | "pvh612":
            where = ["--lab-shared"] if getattr(_this, "shared", False) else []
            guest = ["--guest", name, f"--junit={junit}"]
            return run(BIN / "python", "-m", "lab", "test", *where, *guest)
    raise ValueError(name)


@dataclass
class Ended:
    """A stage that has ended."""

    name: str
    count: Count
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:8} {self.count}  ({self.seconds:.0f} s)"


def timed(name: str) -> Ended:
    started = time.monotonic()
    code = stage(name)
    files = results(name)
    count = sum(map(read_junit, files), Count())
    if code and not count.failed:
        count += Count(failed=1)
    if not code and not files:
        count += Count(passed=1)  # a check without cases of its own: ruff, mypy
    return Ended(name, count, time.monotonic() - started)


def aloud(name: str) -> Ended:
    print(f"== {name}", flush=True)
    return timed(name)


def aside(name: str) -> Ended:
    """Runs a stage beside others: its output in a file and shown at its end."""
    log = LOGS / f"{name}.log"
    with log.open("w") as _this.file:
        ended = timed(name)
    text = log.read_text(errors="replace")
    print(f"== {name} (beside others)\n{text}{ended}\n", end="", flush=True)
    return ended


def lane(names: list[str], how: Callable[[str], Ended], ended: list[Ended], **this: int) -> None:
    vars(_this).update(this)
    for name in names:
        try:
            ended.append(how(name))
        except Exception as error:  # a lane that ends early must not look green
            print(f"test: stage {name}: {error!r}", flush=True)
            ended.append(Ended(name, Count(failed=1), 0.0))


def compile_ahead(names: Sequence[str]) -> None:
    """What those stages compile, behind all else: the Python tests that run meanwhile mostly wait.

    What fails here fails again in its stage, which says so.
    """
    _this.nice = 19
    for name in names:
        with (LOGS / f"compile-{name}.log").open("w") as _this.file:
            if not set_up(name):
                run(BIN / "meson", "compile", "-C", ROOT / "build" / f"native-{name}", "-j", "2")


def in_lanes(beside: list[str], ended: list[Ended]) -> None:
    """The lab's guests, and what runs beside the first of them.

    The lab ends when its holder's standard input does: with us, at the latest.
    """
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for kind in LAB[1:]:
        left.put(kind)
    ready = threading.Event()
    there = False

    def guests(how: Callable[[str], Ended]) -> None:
        ready.wait()
        while not left.empty():
            with contextlib.suppress(queue.Empty):
                kind = left.get_nowait()
                if there:
                    lane([kind], how, ended, nice=0, shared=True)
                else:
                    ended.append(Ended(kind, Count(failed=1), 0.0))

    def other() -> None:
        compiled = [name for name in ("native", "asan") if name in beside]
        early = beside[: beside.index(compiled[0])] if compiled else []
        compiler = threading.Thread(target=compile_ahead, args=[compiled], daemon=True)
        compiler.start()
        lane(early, aside, ended, nice=10)
        compiler.join()
        lane(beside[len(early) :], aside, ended, nice=19)
        guests(aside)

    second = threading.Thread(target=other, daemon=True)  # an interrupt ends us
    second.start()
    with subprocess.Popen(
        [BIN / "python", "-m", "lab", "hold", *[f"--guest={kind}" for kind in LAB]],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "ci" / "xen-nested")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdin
        assert holder.stdout
        there = holder.stdout.readline().strip() == "ready"
        ready.set()
        if there:
            lane(LAB[:1], aloud, ended, shared=True)
        else:
            print("test: there is no lab", flush=True)
            ended.append(Ended(LAB[0], Count(failed=1), 0.0))
        guests(aloud)
        second.join()
        holder.stdin.close()


def main() -> int:
    for folder in (JUNIT, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    names = [n for arg in sys.argv[1:] for n in GROUPS.get(arg, [arg])]
    known = [*GROUPS["all"], *NAMED]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"test: no stage {unknown[0]!r}; there are {', '.join(known)}")
    ended: list[Ended] = []
    if sys.argv[1:] in (["all"], ["lab"]):
        in_lanes([name for name in names if name not in LAB], ended)
    else:
        lane(names, aloud, ended)
    total = sum((e.count for e in ended), Count())
    print("\n" + "\n".join(map(str, ended)))
    print(total, flush=True)
    return 1 if total.failed or not total.passed or len(ended) != len(names) else 0


if __name__ == "__main__":
    sys.exit(main())
