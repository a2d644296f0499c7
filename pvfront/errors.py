# SPDX-License-Identifier: BSD-2-Clause
"""Errors meant for people: one line that says what is wrong, and what to do about it."""

from __future__ import annotations


class PvfrontError(Exception):
    """Base of every error that a command prints instead of a traceback.

    `str(error)` is one line that names what is wrong. `hint`, if there is one, says what to do
    about it: a command to run, a setting to change.
    """

    hint: str | None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ClosedError(PvfrontError):
    """A handle was used after its close, or a port after its unbind.

    Refused before the kernel sees it: descriptors, ports and grant references are reused, so the
    same number may by now belong to somebody else.
    """


class DeviceUnavailable(PvfrontError):
    """A device node could not be opened; the hint says what is missing.

    `path` is the node, `errno` the reason that open(2) gave.
    """

    def __init__(self, path: str, errno: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.errno = errno
