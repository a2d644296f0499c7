# SPDX-License-Identifier: BSD-2-Clause
"""Questions to a supervisor: one JSON object a line, one JSON answer a line, on a Unix socket.

The socket is also what makes a supervisor the only one of its class. `inventory.py` asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import PvfrontError
from .unixserver import listening

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

_ASKING = 10.0  # seconds for a question


async def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One question, and its answer. Raises OSError if nobody listens, PvfrontError for nonsense."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    line = b""
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        # A supervisor that ends has hung up before it knew of us.
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            line = await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    try:
        answer = json.loads(line)
    except ValueError:
        raise PvfrontError(f"the supervisor at {path} ended without an answer") from None
    if not isinstance(answer, dict):
        raise PvfrontError(f"the supervisor at {path} answered nonsense")
    return answer


@contextlib.asynccontextmanager
async def answering(path: Path, klass: str, verbs: Mapping[str, Verb]) -> AsyncIterator[None]:
    """Answers at `path` meanwhile. Raises PvfrontError if another supervisor does so already."""
    _clear(path, klass)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(verbs, reader, writer)

    async with listening(path, answer):
        yield


def _clear(path: Path, klass: str) -> None:
    """What a dead supervisor has left is replaced."""
    if path.exists():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            raise PvfrontError(
                f"another supervisor already serves {klass} devices ({path})",
                hint="`pvfront list` shows what it serves; "
                f"`systemctl stop pvfront-{klass}` ends it",
            )


async def _answer(
    verbs: Mapping[str, Verb], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        line = await asyncio.wait_for(reader.readline(), _ASKING)
        try:
            request = _parse(line)
            verb = verbs.get(str(request.get("verb")))
            if verb is None:
                raise PvfrontError(f"unknown request; known are: {', '.join(verbs)}")
            answer = await verb(request)
        except (PvfrontError, OSError) as error:
            answer = {
                "ok": False,
                "error": str(error),
                "hint": getattr(error, "hint", None),
            }
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    except (TimeoutError, OSError, ValueError):
        pass  # the asker has gone, or never asked


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise PvfrontError("the request is no JSON object on one line")
    return request
