# SPDX-License-Identifier: BSD-2-Clause
"""What ``pvfront store`` does with the store."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .xenstore import Xenstore, XenstoreError


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a listing. `value` is empty and `readable` False where reading is refused."""

    path: str
    depth: int  # below the listed path's children
    value: str
    readable: bool
    permissions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "path": self.path,
            "value": self.value if self.readable else None,
        }
        if self.permissions:
            found["permissions"] = list(self.permissions)
        return found


def text(value: bytes) -> str:
    """A value as text; bytes that are no UTF-8 become escapes."""
    return value.decode("utf-8", errors="backslashreplace")


async def tree(store: Xenstore, path: str, *, permissions: bool = False) -> list[Node]:
    """Everything below `path`, parents first. Nodes that vanish meanwhile are left out.

    "" is the domain's own directory. Raises XenstoreError if `path` itself cannot be listed.
    """
    if path not in ("", "/"):
        path = path.rstrip("/")
    if path == "":
        path = await home(store)
    found: list[Node] = []
    pending = [(child, 0) for child in reversed(await _children(store, path))]
    while pending:
        child, depth = pending.pop()
        try:
            value, readable = text(await store.read_bytes(child)), True
        except XenstoreError as error:
            if error.errno == errno.ENOENT:
                continue
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            value, readable = "", False
        shown = await _permissions(store, child) if permissions and readable else ()
        found.append(Node(child, depth, value, readable, shown))
        try:
            below = await _children(store, child)
        except XenstoreError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM):
                raise
            below = []
        pending += [(each, depth + 1) for each in reversed(below)]
    return found


async def read_all(store: Xenstore, paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Each path with its value."""
    return [(path, await store.read_bytes(path)) for path in paths]


async def write_all(store: Xenstore, pairs: Sequence[tuple[str, str]]) -> None:
    """All or nothing."""
    async for transaction in store.transaction():
        async with transaction:
            for path, value in pairs:
                await transaction.write(path, value)


async def remove_all(store: Xenstore, paths: Sequence[str]) -> None:
    """All or nothing. A path that does not exist is an error, unlike in the protocol."""
    async for transaction in store.transaction():
        async with transaction:
            for path in paths:
                try:
                    await transaction.read_bytes(path)
                except XenstoreError as error:
                    if error.errno == errno.ENOENT:
                        raise XenstoreError(errno.ENOENT, "rm", path) from error
                    if error.errno not in (errno.EACCES, errno.EPERM):
                        raise  # else removing it says whether it may be
                await transaction.remove(path)


async def home(store: Xenstore) -> str:
    """The domain's own directory. `domid` is readable in every guest; dom0 has it too."""
    domid = await store.read_opt("domid")
    if domid is None or not domid.isdigit():
        return await store.domain_path(0)
    return await store.domain_path(int(domid))


async def _children(store: Xenstore, path: str) -> list[str]:
    base = path.rstrip("/")
    return [f"{base}/{name}" for name in sorted(await store.directory(path))]


async def _permissions(store: Xenstore, path: str) -> tuple[str, ...]:
    try:
        listed = await store.get_permissions(path)
    except XenstoreError:
        return ()
    return tuple(str(each) for each in listed)
