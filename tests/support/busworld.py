# SPDX-License-Identifier: BSD-2-Clause
"""A system bus of the tests' own, with XENIFACE on it, and callers of several users.

The bus is Debian's dbus-daemon with the rules of /usr/share/dbus-1/system.conf and the policy file
that pvfront installs: what that forgets to allow does not work here either.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.auth import UID_NOT_SPECIFIED, AuthExternal
from waiting import PATIENCE, eventually

from pvfront.agent.context import Context
from pvfront.agent.resume import Resumes
from pvfront.agent.service import Agent
from pvfront.agent.settings import AgentSettings
from pvfront.agent.xeniface.component import Xeniface
from pvfront.agent.xeniface.policy import Limits, Settings
from pvfront.host import Host
from pvfront.platform import platform

NAME = "org.pvfront.Xeniface1"
PATH = "/org/pvfront/Xeniface1"
MAIN, STORE, SESSION = NAME, f"{NAME}.Store", f"{NAME}.Session"

POLICY = Path(__file__).resolve().parents[2] / "systemd/dbus" / f"{NAME}.conf"

NOBODY, DAEMON = 65534, 1
"""Users without rights: of no group, and of the group of GROUP."""
GROUP = "daemon"

CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  {policy}
</busconfig>
"""

requires_bus = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("dbus-daemon") or not shutil.which("busctl"),
    reason="callers of several users on a system bus want root, dbus-daemon and busctl",
)


class Failure(Exception):
    """An error that a call was answered with: `name` and text."""

    def __init__(self, reply: Message) -> None:
        super().__init__(reply.body[0] if reply.body else "")
        self.name = (reply.error_name or "").removeprefix(f"{NAME}.Error.")


class Client:
    """A connection to the bus; `signals` are those that came: path, member, body."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.signals: list[tuple[str, str, list[Any]]] = []
        bus.add_message_handler(self._take)

    def _take(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.sender != "org.freedesktop.DBus":
            assert message.path
            assert message.member
            self.signals.append((message.path, message.member, list(message.body)))
        return False

    async def call(
        self, member: str, signature: str = "", *body: Any, path: str = PATH, interface: str = STORE
    ) -> Any:
        """The reply's value. Raises Failure."""
        reply = await asyncio.wait_for(
            self.bus.call(
                Message(
                    destination=NAME, path=path, interface=interface, member=member,
                    signature=signature, body=list(body),
                )
            ),
            PATIENCE,
        )  # fmt: skip
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise Failure(reply)
        return reply.body[0] if reply.body else None

    async def session(self) -> str:
        return str(await self.call("OpenSession", interface=MAIN))

    async def comes(self, member: str, body: list[Any]) -> None:
        await eventually(
            f"{member} {body}",
            lambda: any((m, b) == (member, body) for _, m, b in self.signals),
            why=lambda: self.signals,
        )

    async def listen(self) -> None:
        """To the signals that are everybody's."""
        await self.bus.call(
            Message(
                destination="org.freedesktop.DBus", path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus", member="AddMatch", signature="s",
                body=[f"type='signal',path='{PATH}'"],
            )
        )  # fmt: skip


class BusWorld:
    """The bus, the agent with XENIFACE on it, and the host below."""

    def __init__(self, host: Host, address: str, context: Context, agent: Agent) -> None:
        self.host = host
        self.address = address
        self.context = context
        self.agent = agent
        self._buses: list[MessageBus] = []

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **self.host.environ, "DBUS_SYSTEM_BUS_ADDRESS": self.address}

    async def client(self, uid: int = 0, gid: int | None = None) -> Client:
        """A connection of that user, until `hang_up`."""
        bus = MessageBus(self.address, BusType.SYSTEM, auth=AuthExternal(uid=UID_NOT_SPECIFIED))
        with _as_user(uid, uid if gid is None else gid):
            await bus.connect()
        self._buses.append(bus)
        return Client(bus)

    async def hang_up(self) -> None:
        """Ends all connections, and waits for the end of what they had."""
        for bus in self._buses:
            bus.disconnect()
        self._buses.clear()
        await eventually(
            "the end of all sessions", lambda: not self.agent.status()["xeniface"].get("sessions")
        )

    async def run(self, *command: str, uid: int = 0, status: int = 0) -> str:
        """What a program prints, as that user; its stderr if it fails as it should."""
        if uid:
            command = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command)
        process = await asyncio.create_subprocess_exec(
            *command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == status, (out, err)
        return (err if status else out).decode()

    async def busctl(self, *arguments: str, uid: int = 0, status: int = 0) -> str:
        return await self.run("busctl", *arguments, uid=uid, status=status)

    async def write(self, path: str, value: str) -> None:
        """The toolstack writes into the guest's directory, and lets the guest do what it likes."""
        await self.host.store.write(f"/local/domain/1/{path}", value)


@contextlib.contextmanager
def _as_user(uid: int, gid: int) -> Iterator[None]:
    """A connection that is made meanwhile is that user's."""
    groups = os.getgroups()
    os.setgroups([gid])
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _config(directory: Path) -> Path:
    policy = POLICY.read_text().partition("<busconfig>")[2].replace("</busconfig>", "")
    directory.chmod(0o755)
    config = directory / "bus.conf"
    config.write_text(CONFIG.format(socket=directory / "socket", policy=policy))
    return config


@contextlib.asynccontextmanager
async def system_bus() -> AsyncIterator[str]:
    """The address of a bus that is there meanwhile."""
    # Not pytest's directory: other users must reach the socket.
    directory = Path(tempfile.mkdtemp(prefix="pvfront-bus-"))
    try:
        config = _config(directory)
        daemon = await asyncio.create_subprocess_exec(
            "dbus-daemon", "--nofork", "--nopidfile", "--nosyslog", f"--config-file={config}"
        )
        try:
            await eventually("the bus", lambda: (directory / "socket").exists())
            yield f"unix:path={directory / 'socket'}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                daemon.terminate()
            await daemon.wait()
    finally:
        shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def bus_world(
    host: Host, settings: Settings | None = None, limits: Limits | None = None
) -> AsyncIterator[BusWorld]:
    """XENIFACE of domain 1 of `host`, in this process, on a bus of its own."""
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(system_bus())
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        on = platform(host.environ)
        on.run_dir.mkdir(exist_ok=True)
        store = await stack.enter_async_context(await on.store())
        context = Context(on, store, AgentSettings(xeniface=settings or Settings()))
        service = Xeniface(limits)
        resumes = Resumes()
        agent = Agent(context, [resumes, service], pauses=(0.05, 0.1))
        world = BusWorld(host, address, context, agent)
        task = asyncio.create_task(agent.run(signals=False))

        async def end() -> None:
            agent.stop()
            await task

        stack.push_async_callback(end)
        await eventually(
            "the name on the bus",
            lambda: (service.status()["served"] and resumes.status()["watching"]) or task.done(),
            why=agent.status,
        )
        yield world
        await world.hang_up()


__all__ = [
    "DAEMON", "GROUP", "MAIN", "NAME", "NOBODY", "PATH", "SESSION", "STORE", "BusWorld", "Client",
    "Failure", "Variant", "bus_world", "requires_bus",
]  # fmt: skip
