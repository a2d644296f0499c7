# SPDX-License-Identifier: BSD-2-Clause
"""What is wrong with this system, and how it is mended. Pure: facts (facts.py) in, findings out.

FAIL: devices cannot be served, or a suspend would harm the guest. WARN: something does not work as
it could, or will not after the next boot. What a fact makes pointless to ask is not asked: outside
of a guest nobody misses its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .agent import QUOTA
from .blkfront.settings import DiskSettings
from .facts import SERVICES, DeviceFacts, Facts
from .gntalloc import how_to_raise, raised_limit
from .inventory import KERNEL, NONE, PVFRONT
from .ledger import USUAL_PORTS
from .netfront.shape import Shape as NetShape

ROOM = 0.9
"""The share of a limit that may be used before it is worth a warning."""
_DISK = DiskSettings()
_WANTED = {
    "vbd": _DISK.max_pool_pages + (1 << _DISK.max_ring_page_order),
    "vif": NetShape().pages,
    "console": 1,
}
"""Granted pages that a device of one queue asks for."""
_CONFIG = {
    "xen-evtchn": "CONFIG_XEN_DEV_EVTCHN",
    "xen-gntalloc": "CONFIG_XEN_GRANT_DEV_ALLOC",
}
_SERVICE = {"vbd": "disk", "vif": "network", "console": "console"}
_SECTION = {"vbd": "disk", "vif": "vif", "console": "console"}


class Level(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `fix`: what to do, a command where there is one; "": nothing needs to be done."""

    level: Level
    subject: str
    text: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def failed(findings: Sequence[Finding]) -> bool:
    return any(finding.level is Level.FAIL for finding in findings)


def examine(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which they are best mended."""
    found = [*_guest(facts), *_worker(facts), *_config(facts)]
    if facts.embedded or (facts.guest and facts.root):
        if not facts.embedded:
            found += [*_modules(facts), *_nodes(facts)]
        found += [*_store(facts), *_limits(facts)]
        if not facts.embedded:
            found += _suspend(facts)
        found += [*_services(facts), *_agent(facts), *_hooks(facts), *_devices(facts)]
    return found


def _guest(facts: Facts) -> Iterator[Finding]:
    if facts.embedded:
        yield Finding(Level.OK, "guest", f"none: the embedded host at {facts.embedded}")
        return
    if not facts.guest:
        yield Finding(
            Level.FAIL, "guest", "this is not a guest of Xen", "run it inside a guest of Xen"
        )
        return
    text = f"{facts.guest} guest of Xen {facts.xen or '(unknown version)'}, Linux {facts.kernel}"
    if facts.domain0:
        yield Finding(
            Level.WARN, "guest", f"{text}; it is domain 0, which has backends",
            "run it in a guest that has PV devices",
        )  # fmt: skip
    elif release(facts.kernel) < (6, 1):
        yield Finding(Level.WARN, "guest", text, "use Linux 6.1 or later: nothing older was tried")
    else:
        yield Finding(Level.OK, "guest", text)
    if not facts.root:
        yield Finding(
            Level.FAIL, "user", "only root may use the store and the devices: most is not known",
            "run it again with sudo",
        )  # fmt: skip


def release(kernel: str) -> tuple[int, int]:
    """(6, 1) of "6.1.0-40-amd64"; what is no number is taken for a new kernel's."""
    numbers = [part for part in kernel.replace("-", ".").split(".") if part.isascii()]
    if len(numbers) < 2 or not numbers[0].isdigit() or not numbers[1].isdigit():
        return 99, 0
    return int(numbers[0]), int(numbers[1])


def _worker(facts: Facts) -> Iterator[Finding]:
    if facts.user is not None:
        yield _problem("user", facts.user)
    if facts.worker is None:
        yield Finding(Level.OK, "worker", "it starts, confines itself and answers")
    elif facts.worker != facts.user:  # else it is said already
        yield _problem("worker", facts.worker)


def _config(facts: Facts) -> Iterator[Finding]:
    for problem in facts.config:
        yield _problem("settings", problem)
    if facts.config_file and not facts.config:
        yield Finding(Level.OK, "settings", f"nothing is wrong in {facts.config_file}")


def _problem(subject: str, problem: tuple[str, str | None]) -> Finding:
    text, hint = problem
    return Finding(Level.FAIL, subject, text, hint or "")


def _modules(facts: Facts) -> Iterator[Finding]:
    fine = []
    for name, option in _CONFIG.items():
        state = facts.modules.get(name, "missing")
        if state in ("loaded", "built in"):
            fine.append(name)
        elif state == "there":
            yield Finding(
                Level.FAIL, "modules", f"{name} is not loaded",
                f"modprobe {name}; for every boot: echo {name} > /etc/modules-load.d/{name}.conf",
            )  # fmt: skip
        else:
            yield Finding(
                Level.FAIL, "modules", f"this kernel has no {name}", f"use one with {option}"
            )
    exports = [name for name in ("ublk_drv", "nbd") if facts.modules.get(name) != "missing"]
    if exports:
        fine.append(f"{exports[0]} for disks")
    elif any(one.device.klass == "vbd" for one in facts.devices):
        yield Finding(
            Level.FAIL, "modules", "this kernel has neither ublk_drv nor nbd: no block devices",
            "use one with CONFIG_BLK_DEV_NBD, or serve disks to programs: --target socket",
        )  # fmt: skip
    if not facts.tun.problem or facts.modules.get("tun") != "missing":
        fine.append("tun for networks")
    elif any(one.device.klass == "vif" for one in facts.devices):
        yield Finding(
            Level.FAIL, "modules", "this kernel has no tun: no network interfaces",
            "use one with CONFIG_TUN",
        )  # fmt: skip
    if fine:
        yield Finding(Level.OK, "modules", ", ".join(fine))


def _nodes(facts: Facts) -> Iterator[Finding]:
    fine = []
    for name, node in facts.nodes.items():
        module = name.replace("xen/", "xen-")
        if node.problem == "ENOENT" and facts.modules.get(module, "loaded") not in (
            "loaded",
            "built in",
        ):
            continue  # the module is the finding
        if node.problem:
            yield Finding(
                Level.FAIL, "nodes", f"/dev/{name} cannot be opened: {node.problem}",
                "leave a container, or let its unit have it (DeviceAllow=)"
                if node.problem in ("EPERM", "EACCES")
                else "udevadm trigger; is devtmpfs mounted at /dev?",
            )  # fmt: skip
        elif node.mode & 0o066:
            yield Finding(
                Level.WARN, "nodes",
                f"/dev/{name} may be used by others than root (mode {node.mode:04o}), who then "
                "can do what root can", f"chmod 600 /dev/{name}; remove the udev rule that says so",
            )  # fmt: skip
        else:
            fine.append(f"/dev/{name}")
    if fine:
        yield Finding(Level.OK, "nodes", ", ".join(fine))


def _store(facts: Facts) -> Iterator[Finding]:
    if facts.store is not None:
        yield _problem("store", facts.store)
    else:
        count = len(facts.devices)
        yield Finding(Level.OK, "store", f"it answers: {count} device{'s' * (count != 1)}")


def _limits(facts: Facts) -> Iterator[Finding]:
    wanted = sum(_WANTED.get(one.device.klass, 0) for one in facts.devices)
    held = sum(holder.pages for holder in facts.holdings.holders)
    if facts.limit is not None:
        text = f"{facts.limit} granted pages, {held} held"
        if facts.limit < wanted:
            text += f"; {wanted} are what these devices ask for with one queue each"
        raised = raised_limit(max(wanted, facts.limit))
        if facts.limit < wanted or held > ROOM * facts.limit:
            fix = (
                f"put another gntalloc limit into {facts.embedded}/limits.json"
                if facts.embedded
                else how_to_raise(raised)
            )
            yield Finding(Level.WARN, "limits", text, fix)
        else:
            yield Finding(Level.OK, "limits", text)
    ports = facts.holdings.ports
    if ports is not None and ports > ROOM * USUAL_PORTS:
        yield Finding(
            Level.WARN, "limits", f"{ports} event channels of {USUAL_PORTS}, xl's usual limit",
            "max_event_channels in the guest's xl configuration",
        )  # fmt: skip
    for klass, service in facts.services.items():
        if service.pid is None or facts.embedded:
            continue
        name = f"the {_SERVICE[klass]} service"
        if service.locked is not None:
            yield Finding(
                Level.WARN, "limits", f"{name} may lock {service.locked} bytes of memory only, "
                "and can wait for memory that its own devices are to free",
                f"LimitMEMLOCK=infinity in pvfront-{klass}.service",
            )  # fmt: skip
        if klass == "vif" and service.realtime == 0:
            yield Finding(
                Level.WARN, "limits", f"{name} has no real-time priority: it receives slower",
                f"LimitRTPRIO=1 in pvfront-{klass}.service",
            )  # fmt: skip


def _suspend(facts: Facts) -> Iterator[Finding]:
    before = len(facts.devices)
    for finding in _suspend_trouble(facts):
        before = -1
        yield finding
    if before >= 0:
        yield Finding(
            Level.OK, "suspend",
            "a save or migration can be held up until all event channels are closed: one that "
            "stays open crashes this kernel later",
        )  # fmt: skip


def _suspend_trouble(facts: Facts) -> Iterator[Finding]:
    if not facts.can_suspend:
        yield Finding(
            Level.FAIL, "suspend",
            "this kernel cannot be kept from suspending: event channels that are open at a save or "
            "migration crash it later", "use one with CONFIG_PM_SLEEP",
        )  # fmt: skip
    elif not facts.may_veto:
        yield Finding(
            Level.FAIL, "suspend", "a service started like this could not hold up a suspend",
            "let it have CAP_BLOCK_SUSPEND (CapabilityBoundingSet=)",
        )  # fmt: skip
    if not facts.cgroup2:
        yield Finding(
            Level.WARN, "suspend", "no cgroup v2: programs are not stopped before a suspend, and "
            "those that write may make it fail", "boot with systemd.unified_cgroup_hierarchy=1",
        )  # fmt: skip
    if facts.suspend is not None and facts.suspend.get("armed") is False:
        why = str(facts.suspend.get("why_unarmed") or "no reason is known")
        yield Finding(
            Level.WARN, "suspend", f"the next suspend would not be held up: {why}",
            "see the service's journal; until then, stop the services before a save",
        )  # fmt: skip
    parkers = sum(holder.parker for holder in facts.holdings.holders)
    if parkers:
        yield Finding(
            Level.WARN, "suspend", f"event channels of before an unstopped suspend are parked in "
            f"{parkers} process{'es' * (parkers != 1)}, for ever", "reboot when it suits",
        )  # fmt: skip
    for one in facts.devices:
        if one.status.get("worker_runs") and one.device.supervisor_pid is None:
            yield Finding(
                Level.WARN, "suspend", f"{one.device.name}: its worker has no service, so that "
                "the next suspend is refused", f"systemctl start pvfront-{one.device.klass}",
            )  # fmt: skip


def _services(facts: Facts) -> Iterator[Finding]:
    if facts.absent is not None:
        text, fix = facts.absent
        if facts.embedded or any(one.named or one.device.owner == PVFRONT for one in facts.devices):
            yield Finding(Level.WARN, "service", text, fix)
        else:  # as it is after the installation
            yield Finding(Level.OK, "service", f"{text}: pvfront.toml names nothing for it")
    for klass in SERVICES:
        service = facts.services.get(klass)
        if service is None or service.pid is None:
            continue
        text = f"the {_SERVICE[klass]} service runs (pid {service.pid})"
        if service.enabled is False:
            yield Finding(
                Level.WARN, "service", f"{text}, but will not after the next boot",
                f"systemctl enable pvfront-{klass}",
            )  # fmt: skip
        else:
            yield Finding(Level.OK, "service", text)


def _agent(facts: Facts) -> Iterator[Finding]:
    agent, name = facts.agent, "the guest agent"
    if agent.problem:
        yield Finding(
            Level.WARN, "agent", f"{name} does not answer: {agent.problem}",
            "systemctl restart pvfront-agent",
        )  # fmt: skip
    elif agent.says is not None:
        publish = agent.says.get("publish", {})
        text = f"{name} runs and has published {publish.get('keys', 0)} keys"
        if agent.enabled is False:
            yield Finding(
                Level.WARN, "agent", f"{text}, but will not after the next boot",
                "systemctl enable pvfront-agent",
            )  # fmt: skip
        else:
            yield Finding(Level.OK, "agent", text)
        for part, says in agent.says.items():
            if "failed" in says:
                yield Finding(
                    Level.WARN, "agent", f"its part {part} does not work: {says['failed']}",
                    "journalctl -u pvfront-agent says since when; it is tried again and again",
                )  # fmt: skip
        if any(why in QUOTA for why in publish.get("refused", {}).values()):
            yield Finding(
                Level.WARN, "agent", "the store takes no more keys of this guest: some are missing",
                "raise the quota of dom0's xenstored (--entry-nb), or save most of them: "
                "volumes = false in [agent] of pvfront.toml",
            )  # fmt: skip
    elif agent.enabled:
        yield Finding(
            Level.WARN, "agent", f"{name} is enabled and does not run: toolstacks see no addresses",
            "systemctl start pvfront-agent; journalctl -u pvfront-agent",
        )  # fmt: skip
    elif agent.enabled is False:
        yield Finding(
            Level.OK, "agent", f"{name} is not enabled: toolstacks see no addresses",
            "systemctl enable --now pvfront-agent",
        )  # fmt: skip


def _hooks(facts: Facts) -> Iterator[Finding]:
    for text, fix in facts.hooks:
        yield Finding(Level.WARN, "hooks", text, fix)


def _devices(facts: Facts) -> Iterator[Finding]:
    for one in facts.devices:
        yield _device(one)


def _device(one: DeviceFacts) -> Finding:
    device, status = one.device, one.status
    name = device.name
    called = f" as {device.os_device}" if device.os_device else ""
    if device.owner == PVFRONT:
        phase = str(status.get("phase") or "released")
        if status.get("worker_outdated"):
            return Finding(
                Level.WARN, name, f"served{called} by a worker of another version",
                f"pvfront upgrade {name}",
            )  # fmt: skip
        if phase == "connected":
            return Finding(Level.OK, name, f"served{called}")
        why = str(status.get("reason") or status.get("last_trouble") or "")
        return Finding(
            Level.WARN, name, f"{phase}{': ' if why else ''}{why}", f"pvfront trace {name}"
        )
    refused = str(status.get("refused") or "")
    if one.used and (one.fixed or not refused):
        if one.fixed:
            return Finding(Level.OK, name, f"stays with the kernel{called}: {one.used}")
        fix = "end that use" if device.klass == "vbd" else "force = true in [vif] of pvfront.toml"
        text = f"the kernel's{called}, in use: {one.used}"
        return Finding(Level.WARN if one.named else Level.OK, name, text, fix)
    if refused:
        return Finding(Level.WARN, name, f"not served: {refused}", f"pvfront trace {name}")
    if device.klass not in SERVICES:
        return Finding(Level.OK, name, "of a class that pvfront does not serve")
    if one.named:
        whose = "nobody" if device.owner == NONE else "the kernel"
        return Finding(
            Level.WARN,
            name,
            f"pvfront.toml names it, but {whose} has it",
            f"systemctl restart pvfront-{device.klass}",
        )
    section = _SECTION.get(device.klass)
    serve = f"pvfront {device.klass} serve {name}"
    if section is not None:
        serve = f'claim = ["{name}"] in [{section}] of pvfront.toml'
    if device.owner == KERNEL and device.klass == "console":
        # Its resume gives back a port by the number that it had before (hvc_xen.c, `evtchn_put`).
        text = f"the kernel's{called}: a restore may take an interrupt from another device then"
        return Finding(Level.WARN, name, text, serve)
    if device.owner == KERNEL:
        lost = "; the kernel cannot have it back" if device.klass == "vbd" else ""
        return Finding(Level.OK, name, f"the kernel's{called}; it can be taken{lost}", serve)
    return Finding(Level.WARN, name, "nobody has it", serve)
