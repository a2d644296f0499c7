# SPDX-License-Identifier: BSD-2-Clause
"""A network interface as xl-network-configuration(5) describes it, and the nodes that libxl makes
of it (libxl_nic.c). Pure.

`ip`, of which the manual says that its effect is the hotplug script's, gives the backend's end of
the interface its addresses here: "10.7.0.1/24 fd07::1/64".
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Self

from pvfront.errors import PvfrontError

_KEYS = (
    "mac", "bridge", "gatewaydev", "type", "vifname", "script", "ip", "backend", "devid", "mtu",
    "trusted",
)  # fmt: skip
_FLAGS = {"trusted": "1", "untrusted": "0"}
_OUI = (0x00, 0x16, 0x3E)  # Xen's
_SCRIPT = "/etc/xen/scripts/vif-bridge"
DEVIDS = 1 << 16


class VifSpecError(PvfrontError, ValueError):
    """A specification that xl would not take either; the message names what is wrong."""

    def __init__(self, spec: str, what: str) -> None:
        super().__init__(
            f"network interface {spec!r}: {what}",
            hint="for example: mac=00:16:3e:01:02:03,bridge=xenbr0,mtu=9000",
        )


@dataclass(frozen=True, slots=True)
class VifSpec:
    """One interface of a domain. What is None or "" is not written at all."""

    mac: str
    devid: int | None = None
    bridge: str = ""
    gatewaydev: str = ""
    vifname: str = ""
    script: str = _SCRIPT
    ip: str = ""
    mtu: int | None = None
    trusted: bool | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads xl's syntax; without a mac one of Xen's is drawn. Raises VifSpecError."""
        found: dict[str, str] = {}
        for word in (part.strip() for part in text.split(",")):
            key, equals, value = word.partition("=")
            if not equals:
                if not word:
                    continue
                if word not in _FLAGS:
                    raise VifSpecError(text, f"{word!r} is neither a flag nor key=value")
                key, value = "trusted", _FLAGS[word]
            if key not in _KEYS:
                raise VifSpecError(text, f"{key} is no parameter ({', '.join(_KEYS)})")
            if key in found:
                raise VifSpecError(text, f"{key} is given twice")
            found[key] = value
        mac = found.get("mac") or _random_mac()
        if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", mac):
            raise VifSpecError(text, f"mac={mac}: six bytes as 00:16:3e:01:02:03")
        if found.get("type", "vif") != "vif":
            raise VifSpecError(text, f"type={found['type']}: there is vif only")
        if found.get("backend", "") not in ("", "0", "Domain-0"):
            raise VifSpecError(text, f"backend={found['backend']}: there is domain 0 only")
        trusted = found.get("trusted")
        if trusted not in (None, "0", "1"):
            raise VifSpecError(text, f"trusted={trusted}: 0 or 1")
        return cls(
            mac=mac,
            devid=_number(text, found, "devid", DEVIDS - 1),
            bridge=found.get("bridge", ""),
            gatewaydev=found.get("gatewaydev", ""),
            vifname=found.get("vifname", ""),
            script=found.get("script") or _SCRIPT,
            ip=found.get("ip", ""),
            mtu=_number(text, found, "mtu", 65535),
            trusted=None if trusted is None else trusted == "1",
        )

    def frontend_keys(self, devid: int) -> dict[str, str]:
        """What libxl writes at the frontend of an interface."""
        keys = {"handle": str(devid), "mac": self.mac}
        if self.mtu is not None:
            keys["mtu"] = str(self.mtu)
        if self.trusted is not None:
            keys["trusted"] = str(int(self.trusted))
        return keys

    def backend_keys(self, devid: int) -> dict[str, str]:
        """What libxl writes at the backend of an interface."""
        keys = {
            "script": self.script,
            "vifname": self.vifname,
            "mac": self.mac,
            "ip": self.ip,
            "bridge": self.bridge,
            "gatewaydev": self.gatewaydev,
            "handle": str(devid),
            "type": "vif",
            "mtu": "" if self.mtu is None else str(self.mtu),
        }
        # libxl clears the status of the hotplug script, which sets it.
        return {key: value for key, value in keys.items() if value} | {"hotplug-status": ""}


def _number(text: str, found: dict[str, str], name: str, most: int) -> int | None:
    value = found.get(name, "")
    if not value:
        return None
    if not re.fullmatch(r"\d{1,9}", value) or int(value) > most:
        raise VifSpecError(text, f"{name}={value} is no number in 0..{most}")
    return int(value)


def _random_mac() -> str:
    low = [random.randrange(0x80), random.randrange(256), random.randrange(256)]
    return bytes((*_OUI, *low)).hex(":")
