# SPDX-License-Identifier: BSD-2-Clause
"""Small helpers for the kernel's text files, with the file system's root as a parameter.

Everything that looks at /sys, /proc, /dev or /run takes a `Roots`, so that a test can hand it a
directory that merely looks like them.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import PvfrontError


@dataclass(frozen=True)
class Roots:
    """Where the kernel's and the system's directories are found."""

    root: Path = Path("/")

    @property
    def sys(self) -> Path:
        return self.root / "sys"

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    @property
    def dev(self) -> Path:
        return self.root / "dev"

    @property
    def run(self) -> Path:
        """The project's own run-time directory."""
        return self.root / "run" / "pvfront"

    def block(self, name: str) -> Path:
        """The sysfs directory of a whole disk or, through its disk, of a partition."""
        return self.sys / "class" / "block" / name


SYSTEM = Roots()

# What reading a vanishing device's attribute may answer instead of ENOENT.
_GONE = frozenset({errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR})


def read(path: Path) -> str | None:
    """The file's text without trailing white space, or None if it, or its device, is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise PvfrontError(f"cannot read {path}: {errno_text(error)}") from error


def read_int(path: Path) -> int | None:
    """The file's decimal number, or None if the file is missing or holds anything else."""
    text = read(path)
    if text is None or not text.isascii() or not text.lstrip("-").isdigit():
        return None
    return int(text)


def write(path: Path, value: object) -> None:
    """Write one attribute in one write(), as sysfs wants it.

    Raises PvfrontError naming the file, the value and the errno.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, f"{value}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        hint = "run it as root" if error.errno in (errno.EACCES, errno.EPERM) else None
        text = f"cannot write {value!r} to {path}: {errno_text(error)}"
        raise PvfrontError(text, hint=hint) from error


def listdir(path: Path) -> list[str]:
    """The directory's names in order, or none if it does not exist."""
    try:
        return sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise PvfrontError(f"cannot list {path}: {errno_text(error)}") from error


def errno_name(number: int | None) -> str:
    """`EBUSY` for 16."""
    return errno.errorcode.get(number or 0, f"errno {number}")


def errno_text(error: OSError) -> str:
    """`EBUSY (Device or resource busy)`."""
    return f"{errno_name(error.errno)} ({os.strerror(error.errno or 0)})"
