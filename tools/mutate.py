# SPDX-License-Identifier: BSD-2-Clause
"""Shows that each rule's tests fail when the rule's check is removed (tools/mutations.toml).

    python tools/mutate.py [--sample N] [--rule N] [--junit FILE]

Works on a copy of the tree in build/mutate: a native mutation builds the worker there, a Python one
changes a copy of the package there. Exit status 1: a mutant survived, or a check is no longer found
where the table says.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
WORK = ROOT / "build" / "mutate"
TREE = WORK / "tree"  # what is built, as it is now
BUILD = WORK / "build"
SITE = WORK / "site"  # the installed package, with the Python of now
COPIED = ("native", "examples", "meson.build", "meson_options.txt")

# Of a mutant's test that waits for something that never comes: seconds. A detach from a stalled
# backend may take ten.
PATIENCE = "20"
NATIVE = "native:"
LIMIT = 900.0  # of a command that hangs: a build takes minutes where others have the processors


class Stale(Exception):
    """The table does not fit the source."""


@dataclass(frozen=True)
class Edit:
    file: str
    old: str
    new: str

    @property
    def path(self) -> Path:
        return (SITE if self.file.startswith("pvfront/") else TREE) / self.file


@dataclass(frozen=True)
class Mutation:
    rule: int
    name: str
    test: str
    edits: tuple[Edit, ...]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Mutation:
        edits = [Edit(e["file"], e["old"], e["new"]) for e in [entry, *entry.get("also", [])]]
        return cls(entry["rule"], entry["name"], entry["test"], tuple(edits))

    @property
    def native(self) -> bool:
        return any(edit.file.startswith("native/") for edit in self.edits)

    def __str__(self) -> str:
        return f"rule {self.rule}: {self.name}"


def table() -> list[Mutation]:
    with (ROOT / "tools" / "mutations.toml").open("rb") as file:
        return [Mutation.of(entry) for entry in tomllib.load(file)["mutation"]]


def adopt_orphans() -> None:
    """What a command leaves behind becomes a child of ours, so that `run` can end it."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def end_orphans() -> None:
    """Workers outlive a supervisor that a mutant broke: they have nobody left but us."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def run(*command: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=LIMIT,
        )
    finally:
        end_orphans()
    return done.returncode, done.stdout


def same(source: Path, copy: Path) -> None:
    """Makes `copy` what `source` is; what is equal keeps its time, so that little is built."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                same(path, copy / path.relative_to(source))
        return
    data = source.read_bytes()
    if not copy.exists() or copy.read_bytes() != data:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)


def prepare() -> None:
    """The copies, unmutated, and the build directory."""
    for name in COPIED:
        same(ROOT / name, TREE / name)
    code, found = run(BIN / "python", "-P", "-c", "import pvfront; print(pvfront.__path__[0])")
    if code:
        raise SystemExit(f"mutate: there is no installed pvfront: make build\n{found}")
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(found.strip(), SITE / "pvfront")
    same(ROOT / "pvfront", SITE / "pvfront")
    if not (BUILD / "build.ninja").exists():
        code, out = run(BIN / "meson", "setup", "-Dabi=false", "-Dwerror=false", BUILD, TREE)
        if code:
            raise SystemExit(f"mutate: meson setup failed\n{out}")


def build(target: str) -> None:
    code, out = run(BIN / "ninja", "-C", BUILD, f"native/{target}")
    if code:
        raise Stale(f"the mutant does not build:\n{out[-2000:]}")


def apply(mutation: Mutation) -> dict[Path, str]:
    """Edits the copies; returns what was there before."""
    before: dict[Path, str] = {}
    for edit in mutation.edits:
        text = edit.path.read_text()
        before.setdefault(edit.path, text)
        if text.count(edit.old) != 1:
            restore(before)
            raise Stale(f"{edit.file}: {text.count(edit.old)} times, not once:\n{edit.old}")
        edit.path.write_text(text.replace(edit.old, edit.new))
    return before


def restore(before: dict[Path, str]) -> None:
    for path, text in before.items():
        path.write_text(text)


def hostile(selection: str, *, native: bool, mutant: bool = True) -> tuple[int, str]:
    """Runs those tests of tests/hostile on what is in the copies."""
    env = {"PYTHONPATH": str(SITE)}
    if mutant:  # else what is waited for comes, however slowly
        env["PVFRONT_PATIENCE"] = PATIENCE
    if native:
        build("pvfront-worker")
        env["PVFRONT_WORKER"] = str(BUILD / "native" / "pvfront-worker")
    return run(
        BIN / "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/hostile", "-k", selection,
        env=env,
    )  # fmt: skip


def native_test(name: str) -> tuple[int, str]:
    build(f"test_{name}")
    return run(BUILD / "native" / f"test_{name}")


def tests(mutation: Mutation) -> tuple[int, str]:
    """Runs the tests of a mutation; 0: they pass."""
    if mutation.test.startswith(NATIVE):
        return native_test(mutation.test.removeprefix(NATIVE))
    return hostile(mutation.test, native=mutation.native)


def baseline(mutations: list[Mutation]) -> None:
    """All of the tests pass while nothing is mutated, or else a failure would mean nothing."""
    programs = {m.test.removeprefix(NATIVE) for m in mutations if m.test.startswith(NATIVE)}
    chosen = sorted({f"({m.test})" for m in mutations if not m.test.startswith(NATIVE)})
    runs = [native_test(name) for name in sorted(programs)]
    if chosen:
        runs.append(hostile(" or ".join(chosen), native=True, mutant=False))
    for code, out in runs:
        if code:
            raise SystemExit(f"mutate: without any mutation these fail:\n{out[-4000:]}")


def judge(mutation: Mutation) -> str | None:
    """None: killed. Else why not."""
    try:
        before = apply(mutation)
    except Stale as error:
        return str(error)
    try:
        code, out = tests(mutation)
    except Stale as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"its tests did not end in {LIMIT:.0f} s"
    finally:
        restore(before)
    if code == 0:
        return "SURVIVED: its tests pass"
    # pytest: 1 is "a test failed"; 2 to 5 mean that none was judged.
    if not mutation.test.startswith(NATIVE) and code != 1:
        return f"its tests were not run (pytest {code}):\n{out[-2000:]}"
    return None


def sampled(mutations: list[Mutation], count: int) -> list[Mutation]:
    """So many of them, others with each commit."""
    _, commit = run("git", "rev-parse", "HEAD")
    seed = commit.strip()[:12]
    print(f"mutate: a sample of {count} of {len(mutations)}, seed {seed}", flush=True)
    return random.Random(seed).sample(mutations, min(count, len(mutations)))


def junit(path: Path, results: list[tuple[Mutation, str | None, float]]) -> None:
    failures = sum(why is not None for _, why, _ in results)
    suite = ET.Element(
        "testsuite", name="mutate", tests=str(len(results)), failures=str(failures), errors="0",
        skipped="0",
    )  # fmt: skip
    for mutation, why, seconds in results:
        case = ET.SubElement(
            suite, "testcase", classname="mutate", name=str(mutation), time=f"{seconds:.1f}"
        )
        if why is not None:
            ET.SubElement(case, "failure", message=why)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, drawn by the commit")
    parser.add_argument("--rule", type=int, action="append", help="those of this rule")
    parser.add_argument("--junit", type=Path)
    options = parser.parse_args()
    chosen = [m for m in table() if not options.rule or m.rule in options.rule]
    if options.sample:
        chosen = sampled(chosen, options.sample)
    adopt_orphans()
    prepare()
    baseline(chosen)
    results = []
    for mutation in chosen:
        began = time.monotonic()
        why = judge(mutation)
        seconds = time.monotonic() - began
        results.append((mutation, why, seconds))
        print(f"{'killed' if why is None else 'NOT KILLED':10} {seconds:4.0f} s  {mutation}")
        if why is not None:
            print("    " + why.replace("\n", "\n    "))
        sys.stdout.flush()
    if options.junit:
        junit(options.junit, results)
    bad = sum(why is not None for _, why, _ in results)
    print(f"mutate: {len(results) - bad} of {len(results)} killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
