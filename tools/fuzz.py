# SPDX-License-Identifier: BSD-2-Clause
"""Builds the fuzzers of native/fuzz with clang, replays what is kept of their inputs, and fuzzes.

Each fuzzer runs for the same time, one after the other. What it finds is left below build/fuzz/,
and the command that runs it again is printed. New inputs that reach new code are collected under
build/fuzz/NAME/corpus/; `--keep` makes the kept ones in native/fuzz/corpus/NAME/ out of both.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "native" / "fuzz"
BUILD = ROOT / "build" / "native-fuzz"
FOUND = ROOT / "build" / "fuzz"
NAMES = sorted(p.stem.removeprefix("fuzz_") for p in SOURCES.glob("fuzz_*.c"))

# Bytes of an input. Enough for some hundred steps: longer ones find nothing else, slower.
LONGEST = 600
# Seconds and MiB that one input may take. Wide: a machine that does something else is no finding.
PATIENCE = 60
MEMORY = 2048


@dataclass
class Result:
    name: str
    replayed: int = 0
    executions: int = 0
    edges: int = 0
    seconds: float = 0.0
    finding: str = ""

    def __str__(self) -> str:
        return (
            f"fuzz {self.name:8} {self.replayed} kept inputs, {self.executions} executions, "
            f"{self.edges} edges, {'1 finding' if self.finding else 'no finding'} "
            f"({self.seconds:.0f} s)"
        )


def build(names: list[str]) -> None:
    env = dict(os.environ, CC="clang")
    env["PATH"] = f"{ROOT / '.venv' / 'bin'}:{env['PATH']}"
    subprocess.run([ROOT / "tools" / "setup", SOURCES / "apt-packages.txt"], check=True)
    if not (BUILD / "build.ninja").exists():
        options = ["-Dabi=false", "-Dfuzz=true", "-Db_sanitize=address,undefined"]
        command = ["meson", "setup", *options, "-Db_lundef=false", BUILD, ROOT]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    targets = [f"native/fuzz_{name}" for name in names]
    subprocess.run(["ninja", "--quiet", "-C", BUILD, *targets], env=env, check=True)


def fuzzer(name: str) -> Path:
    return BUILD / "native" / f"fuzz_{name}"


def kept(name: str) -> Path:
    return SOURCES / "corpus" / name


def collected(name: str) -> Path:
    return FOUND / name / "corpus"


def fuzz(name: str, seconds: int) -> Result:
    result = Result(name, replayed=sum(1 for _ in kept(name).glob("*")))
    collected(name).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for folders, limit in (
        ([kept(name)], ["-runs=0"]),
        ([collected(name), kept(name)], [f"-max_total_time={seconds}", f"-max_len={LONGEST}"]),
    ):
        command = [
            fuzzer(name),
            *folders,
            *limit,
            f"-timeout={PATIENCE}",
            f"-rss_limit_mb={MEMORY}",
            f"-artifact_prefix={FOUND / name}/",
            "-print_final_stats=1",
        ]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        text = run.stdout + run.stderr
        result.executions += sum(map(int, re.findall(r"number_of_executed_units: (\d+)", text)))
        result.edges = max([result.edges, *map(int, re.findall(r"\bcov: (\d+)", text))])
        if run.returncode:
            result.finding = explain(name, run.returncode, text)
            break
    result.seconds = time.monotonic() - started
    return result


def explain(name: str, status: int, text: str) -> str:
    """What went wrong, the last of what the fuzzer said, and how to run it again."""
    (FOUND / name / "log").write_text(text)
    lines = [f"the fuzzer ended with status {status}; all it said: {FOUND / name / 'log'}"]
    told = re.findall(r"^.*(?:Bail out!|runtime error:|SUMMARY:|ERROR:|broken:).*$", text, re.M)
    lines += told[:8] or text.splitlines()[-8:]
    for artifact in re.findall(r"Test unit written to (\S+)", text):
        lines.append(f"run it again with: {fuzzer(name).relative_to(ROOT)} {relative(artifact)}")
    return "\n".join(lines)


def relative(path: str) -> str:
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


def keep(name: str) -> None:
    """Makes the kept corpus: few and small inputs that reach every branch that any reaches."""
    small = FOUND / name / "small"
    small.mkdir(parents=True, exist_ok=True)
    for old in small.iterdir():
        old.unlink()
    folders = [small, kept(name), collected(name)]
    command = [fuzzer(name), "-merge=1", "-use_counters=0", f"-max_len={LONGEST}", *folders]
    subprocess.run(command, check=True, capture_output=True)
    for old in kept(name).glob("*"):
        if len(old.name) == 40:  # libFuzzer's; what has a name was put there by somebody
            old.unlink()
    for new in small.iterdir():
        new.rename(kept(name) / new.name)


def write_junit(path: Path, results: list[Result]) -> None:
    bad = sum(bool(r.finding) for r in results)
    suite = ET.Element("testsuite", name="fuzz", tests=str(len(results)), failures=str(bad))
    for result in results:
        case = ET.SubElement(
            suite, "testcase", classname="fuzz", name=result.name, time=f"{result.seconds:.1f}"
        )
        if result.finding:
            ET.SubElement(case, "failure", message=result.finding)
        ET.SubElement(case, "system-out").text = str(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="unicode", xml_declaration=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the native engine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=600, help="for each fuzzer")
    parser.add_argument("--junit", type=Path, help="where to write the result")
    parser.add_argument("--keep", action="store_true", help="make the kept corpora anew")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no fuzzer {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    try:
        build(names)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"fuzz: cannot build: {error}", file=sys.stderr)
        return 1
    results = []
    for name in names:
        kept(name).mkdir(parents=True, exist_ok=True)
        if arguments.keep:
            keep(name)
            continue
        results.append(fuzz(name, arguments.seconds))
        print(results[-1], flush=True)
        if results[-1].finding:
            print(results[-1].finding, flush=True)
    if arguments.junit:
        write_junit(arguments.junit, results)
    return 1 if any(r.finding for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
