# SPDX-License-Identifier: BSD-2-Clause
"""What every benchmark brings: a figure of ours beside one of somebody else's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Figure:
    """One line of the result; ratio above 1: ours is better."""

    figure: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float


def more(figure: str, unit: str, ours: float, peer: float, peer_name: str) -> Figure:
    """More is better."""
    return Figure(figure, unit, ours, peer, peer_name, ours / peer if peer else 0.0)


def less(figure: str, unit: str, ours: float, peer: float, peer_name: str) -> Figure:
    """Less is better."""
    return Figure(figure, unit, ours, peer, peer_name, peer / ours if ours else 0.0)
