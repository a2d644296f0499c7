# SPDX-License-Identifier: BSD-2-Clause
"""Packs build/dist/pvfront-*.whl and what it depends on as a Debian package: build/dist/*.deb.

What the wheel needs is packed in the versions that are installed beside us, those that the tests
run with, from wheels that are cached in ~/.cache/pvfront ($PVFRONT_CACHE) by name and version. All
of it becomes a virtual environment below /usr/lib/pvfront, for Debian's own Python.

The sources of the package are debian/, systemd/ and man/; dpkg-buildpackage works on a copy of
them. A build is kept as long as nothing of that changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "build" / "dist"
WORK = ROOT / "build" / "deb"
CACHE = Path(os.environ.get("PVFRONT_CACHE") or Path.home() / ".cache" / "pvfront")
HOME = "usr/lib/pvfront"
PARTS = ("debian", "docs", "man", "systemd", "README.md")

LAUNCHER = f"""#!/bin/sh
exec /{HOME}/bin/python3 -P -m pvfront "$@"
"""
# Of whose files the interpreter's own location tells (site.py); as written by `python3 -m venv`.
PYVENV = f"""home = /usr/bin
include-system-site-packages = false
version = {".".join(map(str, sys.version_info[:3]))}
"""


def run(*command: str | Path, cwd: Path = ROOT, log: Path | None = None) -> None:
    """Ends this program if the command fails; `log`: its output, shown then."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
    )
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(
            f"deb: {' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-4000:]}"
        )


def needed(name: str = "pvfront") -> Iterator[str]:
    """What a distribution requires, and what that requires: `name==version`."""
    for requirement in metadata.requires(name) or []:
        if "extra ==" in requirement:
            continue
        found = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert found, requirement
        try:
            yield f"{found[0]}=={metadata.version(found[0])}"
        except metadata.PackageNotFoundError:
            continue  # of another platform
        yield from needed(found[0])


def wheels() -> list[Path]:
    """The wheels of what pvfront needs, from the cache if they are there."""
    pins = sorted(set(needed()))
    recipe = "\n".join([sys.implementation.cache_tag, *pins])
    kept = CACHE / f"wheels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not kept.exists():
        new = kept.with_name(f"{kept.name}.new-{os.getpid()}")
        try:
            run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", new, *pins)
            if not kept.exists():
                new.rename(kept)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return sorted(kept.glob("*.whl"))


def check_licences(files: list[Path], text: str) -> None:
    for wheel in files:
        name = wheel.name.partition("-")[0]
        if not re.search(rf"^Files: {name}/\*$", text, re.MULTILINE | re.IGNORECASE):
            raise SystemExit(f"deb: {name} has no paragraph in debian/copyright")


def check_version(changelog: str) -> str:
    """The version, which must be the same in pyproject.toml and in the changelog."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    told = re.match(r"pvfront \((.*?)\)", changelog)
    if told is None or told[1] != version:
        raise SystemExit(
            f"deb: pyproject.toml says {version}, debian/changelog {told and told[1]}: "
            "write what is new into debian/changelog"
        )
    return version


def fill(tree: Path, files: list[Path]) -> None:
    """What is installed and no part of the sources."""
    home = tree / HOME
    run(
        sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
        "--ignore-installed", "--no-warn-script-location", "--prefix", home, *files,
    )  # fmt: skip
    for extra in ("bin", "man", "share", "include"):  # man pages are installed from man/
        shutil.rmtree(home / extra, ignore_errors=True)
    (site,) = home.glob("lib/python3*/site-packages")
    for path in site.glob("*.dist-info/*"):  # licences: debian/copyright; files: dpkg's list
        if path.name not in ("METADATA", "entry_points.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in site.rglob("*.py"):  # none is a program
        text = path.read_bytes()
        if text.startswith(b"#!"):
            path.write_bytes(text.partition(b"\n")[2])
    (home / "pyvenv.cfg").write_text(PYVENV)
    launcher = tree / "usr/bin/pvfront"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    completion = subprocess.run(
        [Path(sys.executable).with_name("pvfront")],
        env={**os.environ, "_PVFRONT_COMPLETE": "bash_source"},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    there = tree / "usr/share/bash-completion/completions"
    there.mkdir(parents=True)
    (there / "pvfront").write_text(completion)
    helper = tree / "usr/share/pvfront/pvfront-channel"  # for dom0 to have
    helper.parent.mkdir()
    shutil.copy2(ROOT / "pvfront/console/pvfront_channel.py", helper)
    helper.chmod(0o755)


def digest(files: list[Path]) -> str:
    found = hashlib.sha256(Path(__file__).read_bytes())
    for wheel in files:
        found.update(wheel.name.encode() + wheel.read_bytes())
    for part in PARTS:
        for path in sorted([ROOT / part, *(ROOT / part).rglob("*")]):
            if path.is_file():
                mode = b"x" if os.access(path, os.X_OK) else b"-"
                found.update(str(path.relative_to(ROOT)).encode() + mode + path.read_bytes())
    return found.hexdigest()


def main() -> None:
    (own,) = DIST.glob("pvfront-*.whl")
    files = [*wheels(), own]
    version = check_version((ROOT / "debian/changelog").read_text())
    check_licences(files[:-1], (ROOT / "debian/copyright").read_text())
    made = WORK / "digest"
    now = digest(files)
    debs = list(DIST.glob(f"pvfront*_{version}_*.deb"))
    if len(debs) == 2 and made.exists() and made.read_text() == now:
        return
    for old in (*DIST.glob("pvfront*.deb"), made):
        old.unlink(missing_ok=True)
    shutil.rmtree(WORK, ignore_errors=True)
    source = WORK / "pvfront"
    source.mkdir(parents=True)
    for part in PARTS:
        here = ROOT / part
        (shutil.copytree if here.is_dir() else shutil.copy2)(here, source / part)
    fill(source / "tree", files)
    run("dpkg-buildpackage", "-b", "-us", "-uc", cwd=source, log=WORK / "build.log")
    for deb in WORK.glob("*.deb"):
        shutil.copy2(deb, DIST)
    made.write_text(now)


if __name__ == "__main__":
    main()
