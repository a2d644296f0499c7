# SPDX-License-Identifier: BSD-2-Clause
"""What is known of the guest → the keys that toolstacks read. Pure, and bounded.

The names are those of xe-guest-utilities and xen-guest-agent, which XAPI and its users read, and of
Xen's docs/misc/xenstore-paths; what has no name there is below `data/pvfront`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

MAX_VALUE = 256  # bytes of a value
MAX_ADDRESSES = 10  # of one family of one vif
MAX_VIFS = 16
MAX_VOLUMES = 24
MAX_MOUNTS = 4  # of one volume
MAX_EXTENTS = 4  # the same
MAX_KEYS = 400
"""xenstored gives a guest 1000 nodes, its kernel's and the toolstack's included."""

Keys = dict[str, str]


def clean(text: str, limit: int = MAX_VALUE) -> str:
    """One printable line of ASCII, as short as that: what a toolstack shows, it shows unescaped."""
    shown = "".join(char if " " <= char <= "~" else "?" for char in text[: 2 * limit])
    return shown[:limit].strip()


@dataclass(frozen=True, slots=True)
class Address:
    family: int  # 4 or 6
    address: str
    prefix: int
    worth: int = 0
    """The larger, the sooner it has a place among too many: 2 global, 1 site, 0 link-local."""


@dataclass(frozen=True, slots=True)
class Vif:
    devid: int
    ifname: str
    mac: str
    addresses: tuple[Address, ...]
    up: bool = True  # whether there is a link


@dataclass(frozen=True, slots=True)
class Volume:
    device: str  # /dev/xvda1
    size: int  # bytes
    free: int | None  # bytes, of the file system; None: nobody knows
    filesystem: str
    mounts: tuple[str, ...]
    extents: tuple[str, ...]  # the disks that it is on, as the toolstack calls them: xvda


class Slots:
    """Numbers for things that come and go: one keeps its number for as long as it is there.

    Toolstacks show `ipv4/0` as *the* address: it must not wander because another one has gone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, int] = {}

    def remember(self, name: str, number: int) -> None:
        """What an earlier agent has published, the first to claim a number."""
        if 0 <= number < self._most and number not in self._held.values():
            self._held.setdefault(name, number)

    def place(self, names: Iterable[str]) -> dict[str, int]:
        """The number of each, in the order of preference; those beyond the bound have none."""
        wanted = list(dict.fromkeys(names))
        there = set(wanted)
        self._held = {name: number for name, number in self._held.items() if name in there}
        free = sorted(set(range(self._most)) - set(self._held.values()), reverse=True)
        for name in wanted:
            if name not in self._held and free:
                self._held[name] = free.pop()
        return dict(self._held)


class VifKeys:
    """`attr/vif/N`: names and addresses; remembers which index each address has."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], Slots] = {}
        self.left_out = 0
        """Addresses that had no place the last time."""

    def remember(self, published: Mapping[str, str]) -> None:
        """The keys that an earlier agent has left: `attr/vif/0/ipv4/1` → address."""
        for path, value in sorted(published.items()):
            match path.split("/"):
                case ["attr", "vif", devid, ("ipv4" | "ipv6") as kind, index] if (
                    _is_number(devid) and _is_number(index) and value
                ):
                    self._of(int(devid), int(kind[3])).remember(value, int(index))

    def _of(self, devid: int, family: int) -> Slots:
        return self._slots.setdefault((devid, family), Slots(MAX_ADDRESSES))

    def keys(self, vifs: Collection[Vif]) -> Keys:
        found: Keys = {}
        self.left_out = 0
        shown = sorted(vifs, key=lambda vif: vif.devid)[:MAX_VIFS]
        for vif in shown:
            base = f"attr/vif/{vif.devid}"
            found[f"{base}/name"] = clean(vif.ifname, 15)
            found[f"{base}/mac"] = clean(vif.mac, 17)
            for family in (4, 6):
                there = {
                    one.address: one
                    for one in sorted(vif.addresses, key=lambda one: -one.worth)
                    if one.family == family
                }
                places = self._of(vif.devid, family).place(there)
                self.left_out += len(there) - len(places)
                for address, number in places.items():
                    path = f"{base}/ipv{family}/{number}"
                    found[path] = clean(address, 45)
                    found[f"{path}/prefix"] = str(there[address].prefix)
        for gone in [key for key in self._slots if key[0] not in {vif.devid for vif in shown}]:
            del self._slots[gone]
        return found


class VolumeKeys:
    """`data/volumes/N`; remembers which number each device has."""

    def __init__(self) -> None:
        self._slots = Slots(MAX_VOLUMES)

    def remember(self, published: Mapping[str, str]) -> None:
        for path, value in sorted(published.items()):
            match path.split("/"):
                case ["data", "volumes", number, "name"] if _is_number(number):
                    self._slots.remember(value, int(number))

    def keys(self, volumes: Collection[Volume]) -> Keys:
        there = {clean(one.device): one for one in volumes}
        found: Keys = {}
        for name, number in self._slots.place(sorted(there)).items():
            one, base = there[name], f"data/volumes/{number}"
            found[f"{base}/name"] = name
            found[f"{base}/size"] = str(one.size)
            if one.free is not None:
                found[f"{base}/free"] = str(one.free)
            if one.filesystem:
                found[f"{base}/filesystem"] = clean(one.filesystem, 32)
            for index, extent in enumerate(one.extents[:MAX_EXTENTS]):
                found[f"{base}/extents/{index}"] = clean(extent, 32)
            for index, mount in enumerate(one.mounts[:MAX_MOUNTS]):
                found[f"{base}/mount_points/{index}"] = clean(mount)
        return found


def os_keys(release: Mapping[str, str], uname: str) -> Keys:
    """`data/os_*` of the fields of os-release(5) and the kernel's release."""
    version = clean(release.get("VERSION_ID", ""), 32)
    major, _, rest = version.partition(".")
    minor, _, build = rest.partition(".")
    found = {
        "data/os_name": release.get("PRETTY_NAME") or release.get("NAME") or "Linux",
        "data/os_distro": release.get("ID") or "linux",
        "data/os_majorver": major,
        "data/os_minorver": minor,
        "data/os_buildver": build,
        "data/os_uname": uname,
    }
    return {path: clean(value, 128) for path, value in found.items() if value}


def version_keys(version: str) -> Keys:
    """`attr/PVAddons`: that there is an agent, and of which version."""
    numbers = ([part for part in version.split(".") if _is_number(part)] + ["0"] * 4)[:4]
    names = ("MajorVersion", "MinorVersion", "MicroVersion", "BuildVersion")
    return {
        "attr/PVAddons/Installed": "1",
        **{f"attr/PVAddons/{name}": value for name, value in zip(names, numbers, strict=True)},
    }


def driver_keys(names: Iterable[str], version: str) -> Keys:
    """`drivers/N` as the Windows drivers write it: vendor, name, version."""
    return {f"drivers/{index}": f"pvfront {name} {version}" for index, name in enumerate(names)}


def memory_keys(total_kib: int, available_kib: int) -> Keys:
    return {"data/meminfo_total": str(total_kib), "data/meminfo_free": str(available_kib)}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6
