# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for the agent: section [agent] of pvfront.toml(5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..config import Between, Config
from .xeniface.policy import Settings as XenifaceSettings


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
    return file.section("agent").fill(AgentSettings)
