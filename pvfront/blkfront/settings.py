# SPDX-License-Identifier: BSD-2-Clause
"""What an admin sets for disks: section [disk] of pvfront.toml(5), and [disk.NAME] for one.

The names are those of the parameters of the kernel's drivers (xen-blkfront), and of a crash loop
those of systemd and of nbd (startlimit.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .. import config
from ..abi import lib
from ..config import Between, Config, PerDevice
from ..startlimit import Limits
from .features import DIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER
from .vdev import parse_name

SECTION = "disk"

Export = Literal["auto", "nbd", "ublk", "socket"]


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Of one disk. Upper bounds: what the backend does not offer, no setting brings."""

    max_ring_page_order: Annotated[int, Between(0, MAX_RING_PAGE_ORDER)] = 2
    max_indirect_segments: Annotated[int, Between(0, MAX_INDIRECT_SEGMENTS)] = 64
    # Granted pages for each queue.
    max_pool_pages: Annotated[int, Between(DIRECT_SEGMENTS, lib.PVF_MAX_POOL_PAGES)] = 704
    # 0: what suits the target (target.py, `usual_queues`).
    max_queues: Annotated[int, Between(0, lib.PVF_MAX_QUEUES)] = 0
    feature_persistent: bool = True
    # Look for a response for so long before sleeping.
    poll_us: Annotated[int, Between(0, lib.PVF_POLL_MAX_US)] = 0
    start_limit_burst: Annotated[int, Between(0, 1000)] = Limits.start_limit_burst
    # Seconds, both.
    start_limit_interval: Annotated[int, Between(1, 86400)] = int(Limits.start_limit_interval)
    dead_conn_timeout: Annotated[int, Between(0, 999999999)] = int(Limits.dead_conn_timeout)

    @property
    def start_limits(self) -> Limits:
        return Limits(self.start_limit_burst, self.start_limit_interval, self.dead_conn_timeout)


@dataclass(frozen=True, slots=True)
class DiskService:
    """Of the service."""

    claim: tuple[str, ...] = ()
    target: Export = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    disks: PerDevice[DiskSettings]
    service: DiskService


def parse_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as the command line has it. Raises ValueError with what is wrong."""
    return config.parse_option(DiskSettings, text)


def from_config(file: Config) -> Settings:
    """Raises ConfigError."""
    section = file.section(SECTION)
    disks, service = config.per_device(section, DiskSettings, DiskService, parse_name)
    config.check_patterns(section, service.claim)
    return Settings(disks, service)
