# SPDX-License-Identifier: BSD-2-Clause
"""Pictures of what was measured: bench.svg (rates) and bench-xen.svg (ratios)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ["#1f6fb4", "#e08a1e", "#8b8f94", "#c3c7cb", "#5aa469"]
BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 11, 14, 250, 420, 160, 60


STYLE = "text{font:12px sans-serif;fill:#222}.value{font-size:9px}.title{font-size:15px}"


def page(width: float, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>' + "\n".join(body) + "</svg>\n"
    )


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
    heading = f"pvfront {escape(where)}; each row on its own scale"
    out.insert(0, f'<text x="10" y="20" class="title">{heading}</text>')
    return page(LEFT + WIDTH + RIGHT, y, out)


TARGETS = ["nbd", "direct", "ublk", "nbd 6.12"]
RATIO_WIDTH, RATIO_MOST = 260, 2.6  # of a panel: pixels, and the ratio where bars are cut off


def aim(job: str, target: str, panel: str) -> float:
    """The ratio that is wanted."""
    if panel == "rate" and "QD1" in job:
        return 0.9
    return 1.5 if panel == "rate" and target == "direct" and "4k QD32" in job else 1.0


def ratios(figures: Sequence[Mapping[str, Any]], peer: str) -> str:
    """Two panels, rate and CPU time: a row for each job, in it a bar for each target's ratio.

    Names are "JOB", "JOB TARGET" (without one: nbd) and the same with " CPU" at the end; others are
    left out.
    """
    found = {str(figure["figure"]): float(figure["ratio"]) for figure in figures}
    jobs = list(dict.fromkeys(" ".join(name.split()[:4]) for name in found))
    seen = [t for t in TARGETS if any(name_of(job, t) in found for job in jobs)]
    title = f"pvfront beside {peer}: ratios, above 1 pvfront is better; | what was aimed at"
    out = [f'<text x="10" y="20" class="title">{escape(title)}</text>']
    scale = RATIO_WIDTH / RATIO_MOST
    left = 150
    x = left
    for target in seen:
        fill = COLOURS[TARGETS.index(target)]
        out.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{fill}"/>')
        out.append(f'<text x="{x + 17}" y="40">{target}</text>')
        x += 90
    bottom = TOP + 10 + len(jobs) * (BAR * len(seen) + GAP)
    for number, (panel, suffix) in enumerate((("rate", ""), ("CPU time per GiB", " CPU"))):
        x = left + number * (RATIO_WIDTH + 60)
        out.append(f'<text x="{x}" y="{TOP}">{panel}</text>')
        out.append(
            f'<line x1="{x + scale}" x2="{x + scale}" y1="{TOP + 4}" y2="{bottom}" stroke="#999"/>'
        )
        y = TOP + 10
        for job in jobs:
            if not number:
                middle = y + BAR * len(seen) / 2 + 4
                out.append(
                    f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(job)}</text>'
                )
            for index, target in enumerate(seen):
                ratio = found.get(name_of(job, target) + suffix)
                if ratio is None:
                    continue
                top = y + index * BAR
                width = scale * min(ratio, RATIO_MOST)
                wanted = x + scale * aim(job, target, panel)
                fill = COLOURS[TARGETS.index(target)]
                out.append(
                    f'<rect x="{x}" y="{top}" width="{width:.1f}" height="{BAR - 2}" '
                    f'fill="{fill}"/>'
                    f'<rect x="{wanted - 1:.1f}" y="{top - 1}" width="2" height="{BAR}"/>'
                    f'<text x="{x + max(width, wanted - x) + 5:.1f}" y="{top + BAR - 3}" '
                    f'class="value">{ratio:.2f}{" (cut off)" if ratio > RATIO_MOST else ""}</text>'
                )
            y += BAR * len(seen) + GAP
    return page(left + 2 * (RATIO_WIDTH + 60), bottom + 10, out)


def name_of(job: str, target: str) -> str:
    return job if target == "nbd" else f"{job} {target}"
