# SPDX-License-Identifier: BSD-2-Clause
"""Runs the test stages one after the other and adds up what they counted.

Every stage leaves a JUnit file under build/junit/; the sum of all of them is the last line. A
stage that fails without saying which test failed (it could not build, the lab did not boot)
counts as one failure, so that a broken stage is never a green run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
JUNIT = ROOT / "build" / "junit"

GROUPS = {
    "lint": ["ruff", "mypy"],
    "fast": ["ruff", "mypy", "unit", "native", "asan", "tsan"],
    "all": ["ruff", "mypy", "unit", "native", "asan", "tsan", "hvm", "pvh", "pv"],
}


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
    env = dict(os.environ)
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT / "ci" / "xen-nested")
    sys.stdout.flush()
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=env, check=False).returncode


def read_junit(path: Path) -> Count:
    count = Count()
    for suite in ET.parse(path).getroot().iter("testsuite"):
        total = int(suite.get("tests", "0"))
        bad = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
        skipped = int(suite.get("skipped", "0"))
        count += Count(total - bad - skipped, bad, skipped)
    return count


def meson(name: str, *options: str) -> int:
    """Builds the C tests in a directory of their own and runs them."""
    build = ROOT / "build" / f"native-{name}"
    log = build / "meson-logs" / "testlog.junit.xml"
    if not (build / "build.ninja").exists() and run(
        BIN / "meson", "setup", "-Dabi=false", *options, build, ROOT
    ):
        return 1
    log.unlink(missing_ok=True)
    code = run(BIN / "meson", "test", "-C", build, "--print-errorlogs", "--quiet")
    if log.exists():
        log.replace(JUNIT / f"{name}.xml")
    return code


def stage(name: str) -> int:
    junit = JUNIT / f"{name}.xml"
    junit.unlink(missing_ok=True)
    match name:
        case "ruff":
            return run(BIN / "ruff", "check", "--quiet", ".")
        case "mypy":
            return run(BIN / "mypy", "--no-error-summary")
        case "unit":
            return run(BIN / "pytest", "-q", f"--junit-xml={junit}")
        case "native":
            return meson("native")
        case "asan":
            return meson("asan", "-Db_sanitize=address,undefined", "-Db_lundef=false")
        case "tsan":
            return meson("tsan", "-Db_sanitize=thread", "-Db_lundef=false")
        case "hvm" | "pvh" | "pv":
            return run(
                BIN / "python", "-m", "lab", "test", "--guest", name, f"--junit={junit}"
            )
    raise SystemExit(f"test: no stage {name!r}; there are {', '.join(GROUPS['all'])}")


def main() -> int:
    JUNIT.mkdir(parents=True, exist_ok=True)
    names = [n for arg in sys.argv[1:] for n in GROUPS.get(arg, [arg])]
    total = Count()
    lines = []
    for name in names:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        code = stage(name)
        junit = JUNIT / f"{name}.xml"
        count = read_junit(junit) if junit.exists() else Count()
        if code and not count.failed:
            count += Count(failed=1)
        if not code and not junit.exists():
            count += Count(passed=1)  # a check without cases of its own: ruff, mypy
        total += count
        lines.append(f"{name:8} {count}  ({time.monotonic() - started:.0f} s)")
    print("\n" + "\n".join(lines))
    print(total, flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
