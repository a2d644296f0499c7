# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for the agent: section [agent] of pvfront.toml(5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..config import Between, Config
from .xeniface.policy import Settings as XenifaceSettings
from .xeniface.policy import is_relative


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What is off changes the guest on the toolstack's word."""

    volumes: bool = True  # publish file systems and how full they are
    set_time: bool = True  # set the clock after a resume where a source says how late it is
    memory_floor_mib: Annotated[int, Between(16, 1 << 24)] = 64  # what memory/target may go down to
    static_ip: bool = False  # obey xenserver/device/vif/N/static-ip-setting
    set_hostname: bool = False  # obey control/setcomputername
    xeniface: XenifaceSettings = field(default_factory=XenifaceSettings)
    """Section [agent.xeniface]: who may write on D-Bus, and what only root may read."""


def from_config(file: Config) -> AgentSettings:
    """Raises ConfigError."""
    found = file.section("agent").fill(AgentSettings)
    for key in ("write_paths", "hidden_paths"):
        # One that matches nothing would hide nothing, and nobody would know.
        for path in getattr(found.xeniface, key):
            if not is_relative(path):
                raise (
                    file.section("agent")
                    .section("xeniface")
                    .error(
                        key,
                        f"{key}: {ascii(path)[:80]} is no path below the guest's own directory",
                        hint='as in "data/app": no / at its ends',
                    )
                )
    return found
