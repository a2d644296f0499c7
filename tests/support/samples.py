# SPDX-License-Identifier: BSD-2-Clause
"""Counters of devices that nobody serves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pvfront.abi import BlkOpStats, BlkStats, ffi, lib
from pvfront.counters import Sample

BUCKETS = lib.PVF_LATENCY_BUCKETS


def histogram(**buckets: int) -> tuple[int, ...]:
    """`b3=5`: five requests that took 8 to 16 microseconds."""
    counts = [0] * BUCKETS
    for name, count in buckets.items():
        counts[int(name[1:])] = count
    return tuple(counts)


def disk_queue(number: int = 0, **changed: Any) -> dict[str, Any]:
    """`read=BlkOpStats(...)`, `notifies=5`."""
    plain = {name: 0 for name in BlkStats.__dataclass_fields__ if name not in OPS}
    return asdict(BlkStats(**plain | {"queue": number, "wakeups": 1, **changed}))


OPS = ("read", "write", "flush", "discard")


def op(requests: int = 0, size: int = 0, errors: int = 0, **buckets: int) -> BlkOpStats:
    return BlkOpStats(requests, size, errors, requests, histogram(**buckets))


def net_queue(number: int = 0, **changed: Any) -> dict[str, Any]:
    """`tx={"packets": 3}`, `notifies=5`."""
    made: dict[str, Any] = {}
    for name, member in ffi.typeof("struct pvf_net_stats").fields:
        made[name] = way() if member.type.kind == "struct" else 0
    for direction in ("tx", "rx"):
        made[direction] |= changed.pop(direction, {})
    for name in ("magic", "version", "sequence", "reserved"):
        del made[name]
    return made | {"queue": number, "wakeups": 1, **changed}


def console_queue(**changed: Any) -> dict[str, Any]:
    """`in_bytes=3`, `unsent=5`."""
    fields = ffi.typeof("struct pvf_cons_stats").fields
    of_the_page = ("magic", "version", "sequence", "reserved")
    made = {name: 0 for name, _ in fields if name not in of_the_page}
    return made | {"wakeups": 1, **changed}


def way() -> dict[str, Any]:
    return {
        name: [0] * lib.PVF_NET_DROPS if member.type.kind == "array" else 0
        for name, member in ffi.typeof("struct pvf_net_way").fields
    }


def disk(at: float, *queues: dict[str, Any], **changed: Any) -> Sample:
    """xvdb."""
    return Sample("vbd", 51728, at, **{"phase": "connected", "queues": queues, **changed})


def vif(at: float, *queues: dict[str, Any], **changed: Any) -> Sample:
    """vif0."""
    return Sample("vif", 0, at, **{"phase": "connected", "queues": queues, **changed})


def console(at: float, *queues: dict[str, Any], **changed: Any) -> Sample:
    """org.example.chan1."""
    usual = {"phase": "connected", "label": "org.example.chan1", "queues": queues}
    return Sample("console", 1, at, **{**usual, **changed})
