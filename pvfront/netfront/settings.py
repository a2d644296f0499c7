# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for networks: section [vif] of pvfront.toml(5), and [vif.NAME] for one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from .. import config
from ..config import Between, Config, PerDevice
from .features import MAX_QUEUES

SECTION = "vif"


@dataclass(frozen=True, slots=True)
class NetSettings:
    """Of one vif. Upper bounds: what the backend does not offer, no setting brings."""

    max_queues: Annotated[int, Between(0, MAX_QUEUES)] = 0  # 0: one for each processor
    hash: bool = True  # False: the backend spreads packets over the queues as it likes
    split_event_channels: bool = True  # False: one event channel for both rings of a queue
    multicast_filter: bool = False  # True: multicast packets that nobody joined are not wanted


@dataclass(frozen=True, slots=True)
class NetService:
    """Of the service."""

    claim: tuple[str, ...] = ()
    force: bool = False  # take the interface of the default route, too


@dataclass(frozen=True, slots=True)
class Settings:
    vifs: PerDevice[NetSettings]
    service: NetService


def parse_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as the command line has it. Raises ValueError with what is wrong."""
    return config.parse_option(NetSettings, text)


def parse_name(name: str) -> int | None:
    """The number of the vif called "1", "vif1", "vif-1" or "enX1"; None: it is none of these."""
    found = re.fullmatch(r"(?:vif[-/]?|enX)?([0-9]{1,6})", name, re.ASCII)
    return int(found[1]) if found else None


def from_config(file: Config) -> Settings:
    """Raises ConfigError."""
    section = file.section(SECTION)
    vifs, service = config.per_device(section, NetSettings, NetService, parse_name)
    config.check_patterns(section, service.claim)
    return Settings(vifs, service)
