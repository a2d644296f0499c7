# SPDX-License-Identifier: BSD-2-Clause
"""The socket that clients of a console attach to: /run/pvfront/console-1.attach, root's.

A client begins with a line of JSON: "who" (for people), "write" (it wants to be the one that
writes), "steal" (also if another one is), "history" (bytes of it, at most, that it wants first).
The answer is a line of JSON: "ok", "writes", "writer" (who does; "" if nobody). After it, the
client's bytes are the console's input if it writes, and are refused otherwise; ours are frames: a
byte that says what it is, the length as 32 bits, high byte first, and the body.

    d   bytes that came from the backend
    e   the end, and its reason as text
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from typing import Any

from .hub import CHUNK, PATIENCE, Client, Hub

FRAME = struct.Struct(">cI")
DATA, END = b"d", b"e"
_ASKING = 10.0  # seconds for the first line
_WHO = 64


def frame(kind: bytes, body: bytes) -> bytes:
    return FRAME.pack(kind, len(body)) + body


async def serve(hub: Hub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One client, from its first line to its end."""
    try:
        asked = json.loads(await asyncio.wait_for(reader.readline(), _ASKING))
        wanted = int(asked["history"])
        client = Client(str(asked["who"])[:_WHO], hub.history.end)
        write, steal = bool(asked["write"]), bool(asked["steal"])
    except (TimeoutError, ValueError, TypeError, KeyError, OSError, RecursionError):
        return  # it has gone, or is none
    client.position = max(hub.history.begin, hub.history.end - max(0, wanted))
    hub.join(client)
    try:
        before = hub.who_writes
        writes = write and (steal or not before)
        if writes:
            hub.take_over(client)
        writer.write(json.dumps(_answer(writes, before)).encode() + b"\n")
        tasks = [
            asyncio.create_task(_feed(hub, client, writer)),
            asyncio.create_task(_take(hub, client, reader)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if client.sent_away:
            writer.write(frame(END, client.sent_away.encode()))
    finally:
        hub.leave(client)


def _answer(writes: bool, before: str) -> dict[str, Any]:
    return {"ok": True, "writes": writes, "writer": "" if writes else before}


async def _feed(hub: Hub, client: Client, writer: asyncio.StreamWriter) -> None:
    """Gives it what there is, until it is sent away."""
    with contextlib.suppress(OSError):
        while not client.sent_away:
            if client.position == hub.history.end:
                client.news.clear()
                await client.news.wait()
                continue
            data = hub.history.read(client.position, CHUNK)
            writer.write(frame(DATA, data))
            try:
                await asyncio.wait_for(writer.drain(), PATIENCE)
            except TimeoutError:
                client.sent_away = f"nothing was read for {PATIENCE:g} s"
                return
            client.position += len(data)
            hub.spread()


async def _take(hub: Hub, client: Client, reader: asyncio.StreamReader) -> None:
    """Sends what it writes, until it hangs up."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            if hub.writer is not client:
                continue  # it was told that it does not write
            hub.send(data)
            await hub.room()
