# SPDX-License-Identifier: BSD-2-Clause
"""Metrics by HTTP on a Unix socket: GET /metrics, one answer for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path

from .metrics import exposition
from .service import sd_notify
from .unixserver import listening

ASKING = 10.0
"""Seconds for the head of a request."""
Exposition = Callable[[str], tuple[bytes, str]]


def answer(head: bytes, expose: Exposition = exposition) -> bytes:
    """The answer to a request's head, whatever that is. Pure but for what `expose` tells."""
    lines = head.decode("latin-1").splitlines()
    words = lines[0].split(" ") if lines else []
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _response(HTTPStatus.BAD_REQUEST)
    method, target, _ = words
    if target.partition("?")[0] not in ("/", "/metrics"):
        return _response(HTTPStatus.NOT_FOUND, b"there is /metrics\n")
    if method not in ("GET", "HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"", "Allow: GET, HEAD")
    fields = (line.partition(":") for line in lines[1:])
    accept = ",".join(value for name, _, value in fields if name.strip().lower() == "accept")
    body, kind = expose(accept)
    response = _response(HTTPStatus.OK, body, f"Content-Type: {kind}")
    return response[: -len(body)] if method == "HEAD" and body else response


def _response(status: HTTPStatus, body: bytes = b"", *fields: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        *fields,
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def serve(path: Path) -> None:
    """Answers at `path`, which root alone may open, until SIGTERM or SIGINT. Raises OSError."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ASKING)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = b""
        with contextlib.suppress(ConnectionError):  # it has gone
            writer.write(await asyncio.to_thread(answer, head))
            await writer.drain()

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with listening(path, handle):
        sd_notify("READY=1")
        await stop.wait()
        sd_notify("STOPPING=1")
