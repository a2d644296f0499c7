# SPDX-License-Identifier: BSD-2-Clause
"""Settings of network interfaces: what `pvfront vif serve -o KEY=VALUE` may say."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from .features import MAX_QUEUES


@dataclass(frozen=True, slots=True)
class NetSettings:
    """Upper bounds: what the backend does not offer, no setting brings."""

    max_queues: int = 0  # 0: one for each processor
    hash: int = 1  # 0: the backend spreads packets over the queues as it likes
    split_event_channels: int = 1  # 0: one event channel for both rings of a queue
    multicast_filter: int = 0  # 1: multicast packets that nobody joined are not wanted


NAMES = tuple(field.name for field in fields(NetSettings))
_LARGEST = {"max_queues": MAX_QUEUES, "hash": 1, "split_event_channels": 1, "multicast_filter": 1}


def parse_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as the command line has it. Raises ValueError with what is wrong."""
    key, equals, value = text.partition("=")
    if not equals or key not in NAMES:
        raise ValueError(f"{text!r} is no KEY=VALUE with KEY one of {', '.join(NAMES)}")
    most = _LARGEST[key]
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) > most:
        raise ValueError(f"{key} = {value!r}: must be a number from 0 to {most}")
    return key, int(value)
