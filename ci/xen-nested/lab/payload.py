# SPDX-License-Identifier: BSD-2-Clause
"""The package under test, as guests see it: what `make deb` made, unpacked.

`build` makes an ext4 image of it, and of what tests want beside it; every guest has that image as a
read-only disk, and `files/payload-enter` puts its parts where they belong before systemd starts:

    usr/lib/pvfront   the package's environment, with byte code, as its postinst makes it
    files/            everything else in the package, copied
    conffiles/        its conffiles, copied unless they are there
    opt/pvfront       pytest in an environment of its own, which sees the package's modules;
                      under lab/ tests/guest
    enter             files/payload-enter

The units are not enabled, and take the command line of a service from /etc/default/UNIT if it is
there: that is how tests start them. `install` puts a newer build over it in a running guest.

What is pytest's is cached by its names, so a new package costs seconds.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

from . import paths
from .errors import LabError
from .guest import Guest
from .progress import step

HOME = "usr/lib/pvfront"
TESTS = "opt/pvfront"
PYTHON = "/usr/bin/python3"
"""Debian's: the interpreter that the environments refer to must exist in the guest."""

CONFFILE = "etc/pvfront/pvfront.toml"
ENTER = paths.LAB / "files/payload-enter"
LABEL = "payload"

_SETTINGS = {
    "pvfront-vbd": "vbd serve $PVFRONT_DISKS",
    "pvfront-vif": "vif serve $PVFRONT_VIFS",
    "pvfront-console": "console serve $PVFRONT_CONSOLES",
}
_DROP_IN = """[Service]
EnvironmentFile=-/etc/default/{unit}
ExecStart=
ExecStart=/usr/bin/pvfront {command}
# The emulator takes more than the unit's two minutes while other guests boot beside this one.
TimeoutStartSec=10min
"""


def find_deb() -> Path:
    """The package in build/dist. Raises LabError(payload)."""
    debs = list((paths.PROJECT / "build/dist").glob("pvfront_*.deb"))
    if not debs:
        raise LabError("payload", "no package in build/dist: run make deb")
    return max(debs, key=lambda path: path.stat().st_mtime)


def _run(*command: str | Path) -> None:
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if result.returncode:
        said = (result.stdout + result.stderr)[-3000:]
        raise LabError("payload", f"{' '.join(map(str, command))}:\n{said}")


def _base() -> Path:
    """The cached environment with the test tools."""
    project = tomllib.loads((paths.PROJECT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = sorted(project["optional-dependencies"]["test"])
    version = subprocess.run(
        [PYTHON, "--version"], capture_output=True, text=True, check=True
    ).stdout
    key = hashlib.sha256("\n".join(["2", version, *wanted]).encode()).hexdigest()[:16]
    base = paths.cache() / f"venv-{key}"
    if not base.exists():
        new = paths.cache() / f"venv-{key}.new-{os.getpid()}"
        try:
            with step("payload: environment with the test tools (cached)"):
                _run(PYTHON, "-m", "venv", new)
                _run(new / "bin/python", "-m", "pip", "install", "-q", *wanted)
                _run(new / "bin/python", "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools")
                for script in (new / "bin").iterdir():
                    if not script.is_symlink():  # theirs begin with the path that we have here
                        script.unlink()
                (site,) = new.glob("lib/python3*/site-packages")
                (site / "pvfront.pth").write_text(f"/{HOME}/{site.relative_to(new)}\n")
                (new / "key").write_text(key)
            new.rename(base)
        except OSError:
            if not base.exists():  # else: somebody else was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return base


def tree(deb: Path, directory: Path) -> None:
    """Fill `directory` with what the payload disk has."""
    base = _base()
    shutil.rmtree(directory, ignore_errors=True)
    files = directory / "files"
    files.mkdir(parents=True)
    _run("dpkg-deb", "-x", deb, files)
    # As on a system where /lib is a link.
    shutil.copytree(files / "lib", files / "usr/lib", dirs_exist_ok=True)
    for unwanted in ("lib", "usr/share/doc", "usr/share/man"):
        shutil.rmtree(files / unwanted)
    (directory / HOME).parent.mkdir(parents=True)
    (files / HOME).rename(directory / HOME)
    kept = directory / "conffiles" / CONFFILE
    kept.parent.mkdir(parents=True)
    (files / CONFFILE).rename(kept)
    for unit, command in _SETTINGS.items():
        drop_in = files / f"etc/systemd/system/{unit}.service.d/lab.conf"
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text(_DROP_IN.format(unit=unit, command=command))
    _run(PYTHON, "-m", "compileall", "-q", "-j", "0", "-s", directory, "-p", "/",
         directory / HOME)  # fmt: skip
    tests = directory / TESTS
    shutil.copytree(base, tests, symlinks=True)
    (tests / "lab").mkdir()
    (tests / "lab/digest").write_text(_digest(deb))
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(paths.PROJECT / "tests/guest", tests / "lab/tests", ignore=ignored)
    shutil.copy2(ENTER, directory / "enter")
    (tests / "payload-key").write_text(_key(directory))


def _key(directory: Path) -> str:
    """Of what is not ours in the environments: their versions."""
    versions = sorted(
        path.name
        for path in (directory / HOME).glob("lib/python3*/site-packages/*.dist-info")
        if not path.name.startswith("pvfront-")
    )
    text = "\n".join([(directory / TESTS / "key").read_text(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(deb: Path) -> str:
    digest = hashlib.sha256()
    for path in (deb, Path(__file__), ENTER):
        digest.update(path.read_bytes())
    for path in sorted((paths.PROJECT / "tests/guest").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(paths.PROJECT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(deb: Path | None = None) -> Path:
    """The ext4 image for the guests; the same one as long as nothing in it changed."""
    deb = deb or find_deb()
    paths.BUILD.mkdir(parents=True, exist_ok=True)
    image = paths.BUILD / f"payload-{_digest(deb)}.img"
    if image.exists():
        image.touch()
        return image
    with step(f"payload: image with {deb.name}"):
        work = paths.BUILD / f"payload-tree-{os.getpid()}"
        try:
            tree(deb, work)
            used = sum(f.lstat().st_size + 4096 for f in work.rglob("*"))
            new = image.with_suffix(f".new-{os.getpid()}")
            size = used * 5 // 4 // 2**20 + 16
            _run(
                "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", LABEL, "-m", "0",
                "-E", "root_owner=0:0", "-d", work, new, f"{size}M",
            )  # fmt: skip
            new.rename(image)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    old = sorted(paths.BUILD.glob("payload-*.img"), key=lambda path: path.stat().st_mtime)[:-3]
    for path in old:
        path.unlink()
    return image


_NEW = "run/lab-payload"

# Runs in the guest: forget the files of the installed build, unpack the new ones.
_UNPACK = f"""
import pathlib, shutil, subprocess, sys, tarfile
everything = ["/{HOME}/*", "/{TESTS}/*"]
ours = ["/{HOME}/lib/python3*/site-packages/pvfront*", "/{TESTS}/lab"]
for pattern in ["/{_NEW}", *(everything if sys.argv[1] == "all" else ours)]:
    for path in pathlib.Path("/").glob(pattern[1:]):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
with tarfile.open("/{_NEW}.tar") as archive:
    archive.extractall("/")
subprocess.run(["/{_NEW}/enter", "refresh"], check=True)
"""


def install(guest: Guest, deb: Path | None = None) -> None:
    """Put a build of the package over what a running guest has.

    Running services keep the old code until restarted.
    """
    deb = deb or find_deb()
    work = paths.BUILD / f"install-{os.getpid()}"
    try:
        tree(deb, work)
        present = guest.run(["cat", f"/{TESTS}/payload-key"], check=False).stdout
        same = present == (work / TESTS / "payload-key").read_text()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("files", "conffiles", "enter"):
                archive.add(work / name, f"{_NEW}/{name}")
            if same:
                (site,) = work.glob(f"{HOME}/lib/python3*/site-packages")
                for path in [*site.glob("pvfront*"), work / TESTS / "lab"]:
                    archive.add(path, path.relative_to(work))
            else:
                archive.add(work / HOME, HOME)
                archive.add(work / TESTS, TESTS)
        with step(f"{guest.kind}: installing {deb.name}, {len(buffer.getvalue()) >> 10} KiB"):
            guest.write(f"/{_NEW}.tar", buffer.getvalue())
            guest.run([PYTHON, "-c", _UNPACK, "update" if same else "all"], timeout=300)
            guest.run(f"rm -rf /{_NEW} /{_NEW}.tar")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_if_other(guest: Guest) -> None:
    """`install` unless the guest has exactly this build."""
    deb = find_deb()
    present = guest.run(["cat", f"/{TESTS}/lab/digest"], check=False).stdout
    if present != _digest(deb):
        install(guest, deb)
