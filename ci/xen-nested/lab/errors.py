# SPDX-License-Identifier: BSD-2-Clause
"""What can go wrong, each with the stage at which it did."""

from __future__ import annotations


class LabError(Exception):
    """The lab itself is broken (never: the code under test). `stage` names where.

    Stages, in order: lock, host, image, payload, qemu, xen, dom0, services, network, agent,
    create, boot, console.
    """

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"lab broken at stage '{stage}': {message}")
        self.stage = stage


class CommandFailed(Exception):
    """A command in dom0 or a guest ended with a status the caller did not accept."""


class DeadlineExceeded(Exception):
    """A wait ended without what it waited for; the message says what never came."""
