# SPDX-License-Identifier: BSD-2-Clause
"""A key that tells, after a suspend, whether the domain is another one now.

A restored or migrated domain has a directory of its own in the store, which the toolstack makes
anew (libxl's, `libxl__domain_make`); one whose suspend was cancelled keeps the old one. The key is
written before, and is gone or belongs to another id after. That holds however slow the store is:
the watches that the kernel sets anew come in a time that nobody can name.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from .xenstore import XenstoreError

log = logging.getLogger(__name__)

MARK = "data/pvfront/suspending"
DOMID = "domid"


class Store(Protocol):
    """What suspend needs of the store; `Xenstore` is one."""

    async def read_opt(self, path: str, /) -> str | None: ...
    async def write(self, path: str, value: str, /) -> None: ...
    async def remove(self, path: str, /) -> None: ...
    def watch(self, path: str, /) -> Any: ...


class Mark:
    """Written before the suspend, looked at once after it, and taken away."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stands = False

    async def put(self) -> None:
        """Without it, where the store refuses it, `moved` knows nothing."""
        try:
            await self._store.write(MARK, await self._store.read_opt(DOMID) or "")
            self._stands = True
        except XenstoreError as error:
            log.info("suspend: %s", error)

    async def moved(self) -> bool:
        """Whether this is another domain for certain. False: it is not, or nobody can tell."""
        if not self._stands:
            return False
        self._stands = False
        try:
            was, now = await self._store.read_opt(MARK), await self._store.read_opt(DOMID)
            if was is not None:
                await self._store.remove(MARK)
        except XenstoreError as error:
            log.info("suspend: %s", error)
            return False
        return was is None or was != (now or "")
