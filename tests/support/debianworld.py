# SPDX-License-Identifier: BSD-2-Clause
"""A Debian of its own for a test of our package: a kept root file system under a layer that is
thrown away. As root. No systemd runs in it: what services do is the lab's to show."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import image, paths

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "build" / "dist"
INCLUDE = "kmod,libseccomp2,man-db,python3,systemd,udev"
"""What the package depends on. Whether that is all of it, dpkg says."""


def base() -> Path:
    """The kept root file system: bookworm's essential packages and INCLUDE."""
    key = hashlib.sha256(f"1 {image.SUITE} {INCLUDE}".encode()).hexdigest()[:16]
    kept = paths.cache() / f"deb-root-{key}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=paths.cache()) as work:
            sources = Path(work) / "sources"
            sources.write_text(image.apt_sources())
            tree = Path(work) / "tree"
            subprocess.run(
                ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase",
                 f"--include={INCLUDE}", *image.apt_options(), "--dpkgopt=force-unsafe-io",
                 image.SUITE, str(tree), str(sources)],
                check=True,
            )  # fmt: skip
            tree.rename(kept)
    return kept


class Debian:
    """A root file system in which packages are installed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, ok: bool = True) -> str:
        """What the command says there, on both outputs."""
        done = subprocess.run(
            ["chroot", str(self.root), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
                 "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
        assert not ok or done.returncode == 0, done.stdout
        return done.stdout

    def install(self, deb: Path) -> str:
        shutil.copy2(deb, self.root / "tmp")
        return self.run("dpkg", "-i", f"/tmp/{deb.name}")

    def has(self, path: str) -> bool:
        return (self.root / path.lstrip("/")).exists()

    def files(self) -> set[str]:
        """Every path below /etc, /lib, /usr and /var, but for logs, caches and dpkg's own."""
        own = ("/var/lib/dpkg", "/var/log", "/var/cache", "/var/lib/systemd/deb-systemd-helper")
        return {
            path
            for top in ("etc", "usr", "var")
            for found in (self.root / top).rglob("*")
            if not (path := f"/{found.relative_to(self.root)}").startswith(own)
        }


@contextmanager
def debian() -> Iterator[Debian]:
    """A fresh one, for as long as the context lasts."""
    lower = base()
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["mount", "-t", "tmpfs", "layer", work], check=True)
        try:
            for name in ("upper", "work", "root"):
                (Path(work) / name).mkdir()
            root = Path(work) / "root"
            subprocess.run(
                ["mount", "-t", "overlay", "package", str(root), "-o",
                 f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work"],
                check=True,
            )  # fmt: skip
            try:
                yield Debian(root)
            finally:
                subprocess.run(["umount", "-l", str(root)], check=True)
        finally:
            subprocess.run(["umount", "-l", work], check=True)
