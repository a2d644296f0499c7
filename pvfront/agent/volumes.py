# SPDX-License-Identifier: BSD-2-Clause
"""File systems on block devices: `data/volumes/N`.

The list is the kernel's and tells of each change of it (proc_pid_mountinfo(5): POLLPRI). How full
they are is asked for now and then, in a thread: a device that hangs must not hang the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import sysfs
from ..blkfront.vdev import vdev_name
from ..errors import PvfrontError
from ..sysfs import Roots
from ..threads import to_its_end
from .board import Board
from .context import Context
from .keys import MAX_MOUNTS, MAX_VOLUMES, Volume, VolumeKeys

EVERY = 300.0  # seconds
DEADLINE = 20.0  # of one look at all of them
SETTLE = 0.5
_MOST_LINES = 4096
_SECTOR = 512
_LEVELS = 4  # of dm on MD on …
_MOST_BELOW = 8  # of each

Usage = Callable[[str], int | None]


def mounts(mountinfo: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Block devices that are mounted: their file system's type, and where. Pure.

    Lines as proc_pid_mountinfo(5): `36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw`.
    Of bind mounts (another root than `/`) none counts; the shortest place comes first.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for line in mountinfo.splitlines()[:_MOST_LINES]:
        left, dash, right = line.partition(" - ")
        words, what = left.split(" "), right.split(" ")
        if not dash or len(words) < 6 or len(what) < 2 or not what[1].startswith("/dev/"):
            continue
        device, where = _unescaped(what[1]), _unescaped(words[4])
        kind, places = found.setdefault(device, (what[0], []))
        if words[3] == "/" or kind == "btrfs":  # whose subvolumes are roots of their own
            places.append(where)
    return {
        device: (kind, tuple(sorted(set(places), key=lambda place: (len(place), place))))
        for device, (kind, places) in found.items()
        if places
    }


def _unescaped(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _free(place: str) -> int | None:
    """Bytes that an ordinary user may still write."""
    import psutil

    try:
        return int(psutil.disk_usage(place).free)
    except OSError:
        return None


def extents(roots: Roots) -> dict[str, str]:
    """Whole disks that are the toolstack's, by the kernel's name: nbd0 → xvdb."""
    found = {}
    for path in sorted(roots.run.glob("vbd-*.json")):
        try:
            state = json.loads(path.read_text())
            found[Path(str(state["os_device"])).name] = vdev_name(int(state["id"]))
        except (OSError, ValueError, KeyError, TypeError, PvfrontError):
            continue
    for name in sysfs.listdir(roots.sys / "block"):
        node = sysfs.read(roots.sys / "block" / name / "device" / "nodename") or ""
        number = node.removeprefix("device/vbd/")
        if number != node and number.isascii() and number.isdigit() and len(number) < 10:
            found[name] = vdev_name(int(number))
    return found


def look(mountinfo: str, roots: Roots, usage: Usage = _free) -> list[Volume]:
    """The volumes there are. Blocks: asks every file system."""
    names = extents(roots)
    found = []
    for device, (kind, places) in sorted(mounts(mountinfo).items())[:MAX_VOLUMES]:
        name = Path(os.path.realpath(device)).name
        directory = roots.block(name)
        sectors = sysfs.read_int(directory / "size")
        if sectors is None:
            continue
        found.append(
            Volume(
                device,
                sectors * _SECTOR,
                usage(places[0]),
                kind,
                places[:MAX_MOUNTS],
                tuple(dict.fromkeys(_disks(name, names, roots))),
            )
        )
    return found


def _disks(name: str, names: Mapping[str, str], roots: Roots, levels: int = _LEVELS) -> list[str]:
    """Those that a device is on: itself, its partition's, those that LVM, MD or dm made it of."""
    if name in names:
        return [names[name]]
    directory = roots.block(name)
    if disk := _disk_of(directory):
        return [names[disk]] if disk in names else []
    below = sysfs.listdir(directory / "slaves")[:_MOST_BELOW] if levels else []
    return [one for each in below for one in _disks(each, names, roots, levels - 1)]


def _disk_of(directory: Path) -> str:
    """The disk of a partition's sysfs directory; "" if it is none's."""
    if not (directory / "partition").exists():
        return ""
    return directory.resolve().parent.name


class Volumes:
    """Puts `data/volumes` on the board when mounts have changed, and every few minutes."""

    name = "volumes"

    def __init__(
        self, board: Board, keys: VolumeKeys, *, every: float = EVERY, usage: Usage = _free
    ) -> None:
        self._board = board
        self._keys = keys
        self._every = every
        self._usage = usage
        self._found: list[Volume] = []

    async def run(self, context: Context) -> None:
        if not context.settings.volumes:
            self._board.put("volumes", {})
            return
        roots = context.platform.roots
        source = roots.proc / "self" / "mountinfo"
        with source.open("rb", buffering=0) as file, _changes(file.fileno()) as changed:
            while True:
                changed.clear()
                text = _whole(file.fileno()).decode(errors="replace")
                looking = functools.partial(look, text, roots, self._usage)
                self._found = await to_its_end("file systems", looking, DEADLINE)
                self._board.put("volumes", self._keys.keys(self._found))
                try:
                    async with asyncio.timeout(self._every):
                        await changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(SETTLE)

    def status(self) -> dict[str, Any]:
        return {"mounted": len(self._found)}


def _whole(fd: int) -> bytes:
    parts = []
    os.lseek(fd, 0, os.SEEK_SET)
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def _changes(fd: int) -> Iterator[asyncio.Event]:
    """An event that is set when a file says POLLPRI. A regular file never does."""
    loop, event, epoll = asyncio.get_running_loop(), asyncio.Event(), select.epoll()

    def fired() -> None:
        epoll.poll(0)
        event.set()

    with epoll:
        with contextlib.suppress(PermissionError):  # a regular file
            epoll.register(fd, select.EPOLLPRI | select.EPOLLET)
        loop.add_reader(epoll.fileno(), fired)
        try:
            yield event
        finally:
            loop.remove_reader(epoll.fileno())
