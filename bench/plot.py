# SPDX-License-Identifier: BSD-2-Clause
"""Bars of ours and every peer, a row for each figure: bench.svg and bench-xen.svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ["#1f6fb4", "#e08a1e", "#8b8f94", "#c3c7cb", "#5aa469"]
BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 11, 14, 250, 420, 160, 60


def svg(figures: Sequence[Mapping[str, Any]], ours: str, where: str) -> str:
    """The picture, as text. Of `figures`, those with peers are drawn; `where` is for the title."""
    rows: dict[str, list[tuple[str, float]]] = {}
    units: dict[str, str] = {}
    for figure in figures:
        name = str(figure["figure"])
        if not figure["peer"]:
            continue
        rows.setdefault(name, [(ours, figure["ours"])]).append(
            (figure["peer_name"], figure["peer"])
        )
        units[name] = figure["unit"]
    names = list(dict.fromkeys(who for row in rows.values() for who, _ in row))
    names = [n for n in names if not n[0].isdigit()]
    colour = dict(zip(names, COLOURS, strict=False))
    out = []
    x = LEFT
    for name in names[: len(COLOURS)]:
        out.append(f'<rect x="{x}" y="24" width="12" height="12" fill="{colour[name]}"/>')
        out.append(f'<text x="{x + 17}" y="34">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    y = TOP
    for name, row in rows.items():
        most = max(value for _, value in row) or 1.0
        middle = y + BAR * len(row) / 2 + 4
        out.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        for index, (who, value) in enumerate(row):
            width = WIDTH * value / most
            top = y + index * BAR
            fill = colour.get(who, COLOURS[1])
            out.append(
                f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{fill}"/>'
                f'<text x="{LEFT + width + 4:.1f}" y="{top + BAR - 3}" class="value">'
                f"{value:,.{0 if value >= 100 else 2}f} {escape(units[name])}</text>"
            )
        y += BAR * len(row) + GAP
    total = LEFT + WIDTH + RIGHT
    style = "text{font:12px sans-serif;fill:#222}.value{font-size:9px}.title{font-size:15px}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{y}" '
        f'viewBox="0 0 {total} {y}"><style>{style}</style>'
        f'<rect width="{total}" height="{y}" fill="#fff"/>'
        f'<text x="10" y="20" class="title">Disks {escape(where)}; each row on its own scale'
        "</text>" + "\n".join(out) + "</svg>\n"
    )
