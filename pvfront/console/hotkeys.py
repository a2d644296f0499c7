# SPDX-License-Identifier: BSD-2-Clause
"""Hot keys in what comes from the backend's side: an escape byte, and a key after it. Pure.

The escape byte twice is the byte itself. The pair of a key that is known is taken out of the
stream; any other passes unchanged. An escape byte is held back until the next byte has come.
"""

from __future__ import annotations

from collections.abc import Collection


class HotKeys:
    """`escape`: one byte; `known`: the keys that are taken, one printable character each."""

    def __init__(self, escape: int, known: Collection[str]) -> None:
        self.escape = escape
        self.known = frozenset(known)
        self._held = False

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        """What is left of `data`, and the keys that were pressed in it."""
        passed = bytearray()
        pressed = []
        for byte in data:
            if self._held:
                self._held = False
                if byte == self.escape:
                    passed.append(byte)
                elif chr(byte) in self.known:
                    pressed.append(chr(byte))
                else:
                    passed += bytes((self.escape, byte))
            elif byte == self.escape:
                self._held = True
            else:
                passed.append(byte)
        return bytes(passed), pressed
