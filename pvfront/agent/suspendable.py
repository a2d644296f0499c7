# SPDX-License-Identifier: BSD-2-Clause
"""Whether this guest can be suspended, and why not: `control/feature-suspend`, and a reason.

Whoever owns suspend says how it stands in suspend.json (suspend.py). Where nobody owns it, the
kernel suspends alone, and its own `control/feature-suspend` holds. A guest whose owner cannot hold
a suspend up must not be suspended: ports left bound crash the kernel later (docs/suspend.md).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from .board import Board
from .context import Context
from .keys import Keys, clean
from .resume import owned

REASON = "data/pvfront/suspend-refused"
FEATURE = "control/feature-suspend"
CANNOT = "data/cant_suspend_reason"
"""XAPI's key: while it is there, whatever it says, XAPI takes the guest for one that cannot."""
OURS = "pvfront: "
"""How a reason of ours begins: the toolstack writes that key too (a device that cannot move)."""
EVERY = 5.0  # seconds
_AT_REST = "watching"
_MOST = 1 << 16


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """What the owner of suspend last said; None: there is none."""
    if not owned(run_dir):
        return None
    try:
        with (run_dir / "suspend.json").open("rb") as file:
            found = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Judge:
    """From states, one after the other, to keys. Pure."""

    def __init__(self) -> None:
        self._unarmed = 0
        self._ever_off = False

    def keys(self, state: dict[str, Any] | None) -> Keys:
        """Unarmed twice in a row is no moment between two suspends."""
        found: Keys = {}
        at_rest = state is not None and state.get("stage") == _AT_REST
        unarmed = at_rest and state is not None and not state.get("armed")
        self._unarmed = self._unarmed + 1 if unarmed else 0
        reason = ""
        if self._unarmed > 1:
            assert state is not None
            reason = f"suspend cannot be held up: {state.get('why_unarmed') or 'no reason given'}"
            self._ever_off = True
            found[CANNOT] = clean(OURS + reason)
        elif at_rest and state is not None and (refusal := state.get("last_refusal")):
            reason = f"the last one: {refusal}"
        found[REASON] = clean(reason)
        if self._ever_off:
            found[FEATURE] = "0" if self._unarmed > 1 else "1"
        return found


class Suspendable:
    """Puts what the judge finds on the board."""

    name = "suspendable"

    def __init__(self, board: Board, *, every: float = EVERY) -> None:
        self._board = board
        self._every = every
        self._reason = ""

    async def run(self, context: Context) -> None:
        judge = Judge()
        while True:
            found = judge.keys(read_state(context.platform.run_dir))
            self._reason = found[REASON]
            self._board.put("suspendable", found)
            await asyncio.sleep(self._every)

    def status(self) -> dict[str, Any]:
        return {"refused": self._reason}
