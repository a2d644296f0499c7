# SPDX-License-Identifier: BSD-2-Clause
"""The package under test, as guests see it: /opt/pvfront.

A virtual environment made with Debian's Python (the guests have the same), holding the project's
wheel, what it depends on, and pytest; beside it, under lab/, the project's systemd/ directory and
tests/guest/. `build` makes an ext4 image of that, which every guest mounts read-only under a
writable layer; `install` puts a newer build over it in a running guest.

The environment with the dependencies alone is cached by their names, so a new wheel costs seconds.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

from . import paths
from .errors import LabError
from .guest import Guest
from .progress import step

TARGET = "/opt/pvfront"
PYTHON = "/usr/bin/python3"
"""Debian's: the interpreter that the environment refers to must exist in the guest."""

DISTRIBUTION = "pvfront"
LABEL = "payload"


def find_wheel() -> Path:
    """The newest wheel of build/dist. Raises LabError(payload)."""
    wheels = list((paths.PROJECT / "build/dist").glob(f"{DISTRIBUTION}-*.whl"))
    if not wheels:
        raise LabError("payload", "no wheel in build/dist: run make build")
    return max(wheels, key=lambda path: path.stat().st_mtime)


def _pip(python: Path, *arguments: str) -> None:
    result = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check",
         "--no-warn-script-location", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise LabError("payload", f"pip install {' '.join(arguments)}:\n{result.stderr[-3000:]}")


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    return sorted(re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE))


def _base(wheel: Path) -> Path:
    """The cached environment with the wheel's dependencies and test tools, but not the wheel."""
    version = subprocess.run(
        [PYTHON, "--version"], capture_output=True, text=True, check=True
    ).stdout
    recipe = "\n".join(["1", version, *_requirements(wheel)])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    base = paths.cache() / f"venv-{key}"
    if not base.exists():
        new = paths.cache() / f"venv-{key}.new-{os.getpid()}"
        try:
            with step("payload: environment with the dependencies (cached)"):
                subprocess.run([PYTHON, "-m", "venv", str(new)], check=True)
                python = new / "bin/python"
                _pip(python, f"{wheel}[test]")
                subprocess.run(
                    [str(python), "-m", "pip", "uninstall", "-q", "-y", DISTRIBUTION], check=True
                )
                (new / "key").write_text(key)
            new.rename(base)
        except OSError:
            if not base.exists():  # else: somebody else was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return base


def tree(wheel: Path, directory: Path) -> None:
    """Fill `directory` with what guests have at /opt/pvfront."""
    base = _base(wheel)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(base, directory, symlinks=True)
    _pip(directory / "bin/python", "--no-deps", "--no-index", str(wheel))
    for name in ("pip", "pip-*", "setuptools", "setuptools-*", "_distutils_hack"):
        for path in directory.glob(f"lib/python3*/site-packages/{name}"):
            shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob("lib/python3*/site-packages/distutils-precedence.pth"):
        path.unlink()
    for script in (directory / "bin").iterdir():
        if script.name.startswith(("pip", "activate", "Activate")):
            script.unlink()
        elif script.is_file() and not script.is_symlink():
            text = script.read_bytes()
            if text.startswith(b"#!") and b"/bin/python" in text.split(b"\n", 1)[0]:
                rest = text.split(b"\n", 1)[1]
                script.write_bytes(f"#!{TARGET}/bin/python3\n".encode() + rest)
    lab = directory / "lab"
    lab.mkdir()
    (lab / "digest").write_text(_digest(wheel))
    for source, name in (("systemd", "systemd"), ("tests/guest", "tests")):
        if (paths.PROJECT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(paths.PROJECT / source, lab / name, ignore=ignored)


def _digest(wheel: Path) -> str:
    digest = hashlib.sha256(wheel.read_bytes() + Path(__file__).read_bytes())
    for folder in ("systemd", "tests/guest"):
        for path in sorted((paths.PROJECT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(paths.PROJECT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(wheel: Path | None = None) -> Path:
    """The ext4 image for the guests; the same one as long as nothing in it changed."""
    wheel = wheel or find_wheel()
    paths.BUILD.mkdir(parents=True, exist_ok=True)
    image = paths.BUILD / f"payload-{_digest(wheel)}.img"
    if image.exists():
        image.touch()
        return image
    with step(f"payload: image with {wheel.name}"):
        work = paths.BUILD / f"payload-tree-{os.getpid()}"
        try:
            tree(wheel, work)
            used = sum(f.lstat().st_size + 4096 for f in work.rglob("*"))
            new = image.with_suffix(f".new-{os.getpid()}")
            size = used * 5 // 4 // 2**20 + 16
            result = subprocess.run(
                ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", LABEL, "-m", "0",
                 "-E", "root_owner=0:0", "-d", str(work), str(new), f"{size}M"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if result.returncode:
                raise LabError("payload", f"mke2fs: {result.stderr}")
            new.rename(image)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    old = sorted(paths.BUILD.glob("payload-*.img"), key=lambda path: path.stat().st_mtime)[:-3]
    for path in old:
        path.unlink()
    return image


# Runs in the guest: forget the files of the installed distribution, unpack the new ones.
_UNPACK = """
import pathlib, shutil, subprocess, sys, tarfile
target = pathlib.Path("/opt/pvfront")
if sys.argv[1] == "all":
    for path in target.glob("*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
for record in target.glob("lib/python3*/site-packages/pvfront-*.dist-info/RECORD"):
    site = record.parent.parent
    for line in record.read_text().splitlines():
        (site / line.rsplit(",", 2)[0]).unlink(missing_ok=True)
shutil.rmtree(target / "lab", ignore_errors=True)
target.mkdir(exist_ok=True)
with tarfile.open("/run/lab-payload.tar") as archive:
    archive.extractall(target)
subprocess.run(["/lab/guest-payload", "refresh"], check=True)
"""


def install(guest: Guest, wheel: Path | None = None) -> None:
    """Put a build of the package over what a running guest has at /opt/pvfront.

    Running services keep the old code until restarted.
    """
    wheel = wheel or find_wheel()
    work = paths.BUILD / f"install-{os.getpid()}"
    try:
        tree(wheel, work)
        key = (work / "key").read_text()
        same = guest.run(["cat", f"{TARGET}/key"], check=False).stdout == key
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            if same:
                (record,) = work.glob(
                    f"lib/python3*/site-packages/{DISTRIBUTION}-*.dist-info/RECORD"
                )
                site = record.parent.parent
                names = [ln.rsplit(",", 2)[0] for ln in record.read_text().splitlines()]
                files = sorted({(site / name).resolve() for name in names})
                for file in files:
                    if file.exists():
                        archive.add(file, file.relative_to(work.resolve()))
                archive.add(work / "lab", "lab")
            else:
                archive.add(work, ".")
        with step(f"{guest.kind}: installing {wheel.name}, {len(buffer.getvalue()) >> 10} KiB"):
            guest.write("/run/lab-payload.tar", buffer.getvalue())
            mode = "update" if same else "all"
            guest.run([PYTHON, "-c", _UNPACK, mode], timeout=300)
            guest.run("rm -f /run/lab-payload.tar")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_if_other(guest: Guest) -> None:
    """`install` unless the guest has exactly this build."""
    wheel = find_wheel()
    present = guest.run(["cat", f"{TARGET}/lab/digest"], check=False).stdout
    if present != _digest(wheel):
        install(guest, wheel)
