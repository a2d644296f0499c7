# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE's end on D-Bus: method calls in, replies, errors and signals out.

What there is to call stands in org.pvfront.Xeniface1.xml, which is also what introspection answers:
a call is looked up there and its signature compared before anything else is done with it. Who calls
is what the bus says (GetConnectionCredentials), never what a message says.

A call is a task. A connection has few at a time, and all together have too: one more is refused
before anything is looked at. The reply of a call is sent in the same step in which its work ends.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import pwd
import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.introspection import Method, Node

from ...errors import PvfrontError
from ...inventory import NoSuchDevice
from ...versions import DBUS
from ...xenstore import Transaction, XenstoreError, XenstoreLost, XenstoreTimeout
from ...xswire import decode, encode_text
from .framing import MOST, has_lost_its_body
from .policy import Caller, Refused
from .sessions import Requests, Session, Sessions

log = logging.getLogger(__name__)

NAME = "org.pvfront.Xeniface1"
PATH = "/org/pvfront/Xeniface1"
SESSIONS = f"{PATH}/sessions"
MAIN, STORE, SESSION = NAME, f"{NAME}.Store", f"{NAME}.Session"

INTROSPECTION = files(__package__).joinpath(f"{NAME}.xml").read_text()

PENDING = 16
"""Calls of one connection that are being worked on."""
ALL_PENDING = 256
DEVICES = 20
"""A question for devices counts as so many more requests: it is as many reads of the store."""
KNOWN = 256
"""Callers whose user is remembered. A unique name is never given to another connection."""

_BUS = "org.freedesktop.DBus"
_GENERIC = {
    "AccessDenied",
    "Failed",
    "InvalidArgs",
    "LimitsExceeded",
    "PropertyReadOnly",
    "UnknownInterface",
    "UnknownMethod",
    "UnknownObject",
    "UnknownProperty",
}
"""Errors that D-Bus has names for; all others are NAME.Error.*"""

_ERRNO = {
    errno.ENOENT: "NoSuchNode",
    errno.EEXIST: "NodeExists",
    errno.EACCES: "StoreRefused",
    errno.EPERM: "StoreRefused",
    errno.EINVAL: "StoreRefused",
    errno.ENOSPC: "QuotaExceeded",
    errno.EDQUOT: "QuotaExceeded",
    errno.E2BIG: "QuotaExceeded",
    errno.EAGAIN: "Conflict",
}
"""What the store's errors are called: refusals of its own are no AccessDenied, which is ours."""


class Guest(Protocol):
    """What there is to know beside the store."""

    async def devices(self) -> list[dict[str, Any]]:
        """Every device as `pvfront list --json` has it."""

    async def device(self, name: str) -> dict[str, Any]:
        """One device as `pvfront status --json` has it. Raises NoSuchDevice."""

    def resumes(self) -> int:
        """How often the domain was resumed."""


class Adapter:
    """The service on one connection to the bus."""

    def __init__(
        self, bus: MessageBus, sessions: Sessions, requests: Requests, guest: Guest
    ) -> None:
        self._bus = bus
        self._sessions = sessions
        self._requests = requests
        self._guest = guest
        self._write_group = sessions.policy.settings.write_group
        self._interfaces = {each.name: each for each in Node.parse(INTROSPECTION).interfaces}
        self._callers: dict[str, Caller] = {}
        self._pending: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        bus.add_message_handler(self._take)

    async def end(self) -> None:
        """Takes no more, and gives up what is being worked on."""
        self._bus.remove_message_handler(self._take)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> dict[str, Any]:
        """For `pvfront agent status`."""
        return {"bus_name": NAME, "served": True, **self._sessions.status()}

    # -- signals ---------------------------------------------------------------------------

    def watch_fired(self, session: Session, number: int, path: str) -> None:
        """To the session's owner alone."""
        self._signal(
            f"{SESSIONS}/{session.number}", SESSION, "WatchFired", "us", [number, path],
            to=session.caller.name,
        )  # fmt: skip

    def resumed(self, count: int) -> None:
        self._signal(PATH, MAIN, "Resumed", "t", [count])
        changed = {"SuspendCount": Variant("t", count)}
        self._signal(
            PATH, f"{_BUS}.Properties", "PropertiesChanged", "sa{sv}as", [MAIN, changed, []]
        )

    def shutdown_requested(self, kind: str) -> None:
        self._signal(PATH, MAIN, "ShutdownRequested", "s", [text(kind)])

    def _signal(
        self, path: str, interface: str, member: str, signature: str, body: list[Any],
        to: str | None = None,
    ) -> None:  # fmt: skip
        self._bus.send(
            Message(
                message_type=MessageType.SIGNAL,
                destination=to,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=body,
            )
        )

    # -- calls -----------------------------------------------------------------------------

    def _take(self, message: Message) -> bool:
        """What the bus brings: calls to our objects, and news of who has gone."""
        if message.message_type is MessageType.SIGNAL:
            self._gone(message)
            return False
        path = message.path or ""
        if message.message_type is not MessageType.METHOD_CALL or not message.sender:
            return False
        if path != "/" and not f"{SESSIONS}/".startswith(f"{path}/") and not _number(path):
            return False  # an object that nobody has: the library says so
        if message.interface == f"{_BUS}.Peer":
            return False
        if has_lost_its_body(message):
            self._answer_error(
                message, Refused("LimitsExceeded", f"a message has at most {MOST} bytes")
            )
            return True
        sender = message.sender
        if self._pending[sender] >= PENDING or len(self._tasks) >= ALL_PENDING:
            refusal = Refused("LimitsExceeded", "too many calls wait for their replies")
            self._answer_error(message, refusal)
            return True
        self._pending[sender] += 1
        task = asyncio.create_task(self._call(message, sender))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._done(task, sender))
        return True

    def _done(self, task: asyncio.Task[None], sender: str) -> None:
        self._tasks.discard(task)
        self._pending[sender] -= 1
        if not self._pending[sender]:
            del self._pending[sender]

    async def _call(self, message: Message, sender: str) -> None:
        try:
            signature, body = await self._carry_out(message, sender)
        except (PvfrontError, OSError) as error:
            self._answer_error(message, error)
        except Exception:
            log.exception("D-Bus call %s of %s", message.member, sender)
            self._answer_error(message, Refused("Failed", "an error of pvfront: see its log"))
        else:
            if not message.flags & message.flags.NO_REPLY_EXPECTED:
                self._bus.send(Message.new_method_return(message, signature, body))

    def _answer_error(self, message: Message, error: Exception) -> None:
        if not message.flags & message.flags.NO_REPLY_EXPECTED:
            hint = getattr(error, "hint", None)
            said = f"{error} ({hint})" if hint else str(error)
            self._bus.send(Message.new_error(message, error_name(error), text(said)))

    async def _carry_out(self, message: Message, sender: str) -> tuple[str, list[Any]]:
        """The signature and body of the reply."""
        caller = await self._caller(sender)
        self._sessions.request(caller)
        path = message.path or "/"
        body = list(message.body)
        if message.interface == f"{_BUS}.Introspectable" and message.member == "Introspect":
            return "s", [self._introspection(caller, path)]
        if message.interface == f"{_BUS}.Properties":
            return self._property(path, message.member or "", body)
        number = _number(path)
        session = self._sessions.of(caller, number) if number else None
        if session is None and path != PATH:
            raise Refused("UnknownObject", f"there is nothing to call at {path}")
        has = (STORE, SESSION) if session is not None else (MAIN, STORE)
        interface, method = self._method(message, has)
        if interface == STORE:
            found = await self._store_call(caller, session, method.name, body)
        elif session is not None:
            found = await self._session_call(session, method.name, body)
        else:
            found = await self._main_call(caller, method.name, body)
        return method.out_signature, [] if found is None else [found]

    def _method(self, message: Message, has: tuple[str, ...]) -> tuple[str, Method]:
        """The called method and its interface; a call may leave the interface out."""
        if message.interface and message.interface not in has:
            raise Refused("UnknownInterface", f"{message.path} has no {message.interface}")
        for name in has if not message.interface else (message.interface,):
            for method in self._interfaces[name].methods:
                if method.name == message.member:
                    if method.in_signature != message.signature:
                        raise Refused(
                            "InvalidArgs",
                            f"{method.name} takes '{method.in_signature}', "
                            f"not '{message.signature}'",
                        )
                    return name, method
        raise Refused("UnknownMethod", f"{message.path} has no method {message.member}")

    async def _main_call(self, caller: Caller, member: str, body: list[Any]) -> Any:
        match member, body:
            case "OpenSession", []:
                return await self._open_session(caller)
            case "ListDevices", []:
                self._sessions.request(caller, DEVICES)
                return [variants(each) for each in await self._guest.devices()]
            case "GetDevice", [name]:
                self._sessions.request(caller, DEVICES)
                return variants(await self._guest.device(name))
        raise AssertionError(member)

    async def _store_call(
        self, caller: Caller, session: Session | None, member: str, body: list[Any]
    ) -> Any:
        if session is None:
            return await self._one_request(caller, None, member, body)
        async with session.turn() as transaction:
            return await self._one_request(caller, transaction, member, body)

    async def _one_request(
        self, caller: Caller, within: Transaction | None, member: str, body: list[Any]
    ) -> Any:
        requests = self._requests
        match member, body:
            case "Read", [path]:
                return as_text(await requests.read(caller, path, within))
            case "ReadBytes", [path]:
                return await requests.read(caller, path, within)
            case "Write", [path, value]:
                return await requests.write(caller, path, encode_text(value), within)
            case "WriteBytes", [path, value]:
                return await requests.write(caller, path, bytes(value), within)
            case "MakeDirectory", [path]:
                return await requests.make_directory(caller, path, within)
            case "Remove", [path]:
                return await requests.remove(caller, path, within)
            case "Directory", [path]:
                return [text(name) for name in await requests.directory(caller, path, within)]
            case "GetPermissions", [path]:
                return await requests.get_permissions(caller, path, within)
            case "SetPermissions", [path, permissions]:
                return await requests.set_permissions(caller, path, permissions, within)
        raise AssertionError(member)

    async def _session_call(self, session: Session, member: str, body: list[Any]) -> Any:
        match member, body:
            case "Watch", [path]:
                return session.watch(path)
            case "Unwatch", [number]:
                return await session.unwatch(number)
            case "Begin", []:
                return await session.begin()
            case "Commit", []:
                return await session.commit()
            case "Abort", []:
                return await session.abort()
            case "Close", []:
                await self._sessions.close(session)
                await self._forget(session.caller.name)
                return None
        raise AssertionError(member)

    def _property(self, path: str, member: str, body: list[Any]) -> tuple[str, list[Any]]:
        match member, body:
            case "Set", [str(), str(name), _]:
                raise Refused("PropertyReadOnly", f"{name} cannot be set")
            case "GetAll", [str()]:
                return "a{sv}", [self._properties(path, body[0])]
            case "Get", [str(), str(name)]:
                properties = self._properties(path, body[0])
                if name not in properties:
                    raise Refused("UnknownProperty", f"{body[0]} has no property {name}")
                return "v", [properties[name]]
        raise Refused("UnknownMethod", f"{_BUS}.Properties has no such {member}")

    def _properties(self, path: str, interface: str) -> dict[str, Variant]:
        if path == PATH and interface in ("", MAIN):
            count = Variant("t", self._guest.resumes())
            return {"Version": Variant("s", DBUS), "SuspendCount": count}
        if interface in ("", STORE, SESSION):
            return {}
        raise Refused("UnknownInterface", f"{path} has no {interface}")

    def _introspection(self, caller: Caller, path: str) -> str:
        """Of an object, or of what is above one."""
        node = Node(path)
        number = _number(path)
        if number:
            self._sessions.of(caller, number)
            node.interfaces = [self._interfaces[STORE], self._interfaces[SESSION]]
        elif path == SESSIONS:
            node.nodes = [Node(str(each)) for each in self._sessions.numbers_of(caller)]
        elif path == PATH:
            node.interfaces = [self._interfaces[MAIN], self._interfaces[STORE]]
            node.nodes = [Node("sessions")]
        else:
            below = PATH.removeprefix(path).lstrip("/")
            node.nodes = [Node(below.partition("/")[0])]
        return str(node.tostring())

    # -- callers ---------------------------------------------------------------------------

    async def _caller(self, sender: str) -> Caller:
        """Whose connection it is. Raises Refused for one that has gone."""
        found = self._callers.get(sender)
        if found is None:
            (credentials,) = await self._ask_bus("GetConnectionCredentials", "s", sender)
            uid = credentials["UnixUserID"].value
            groups = credentials.get("UnixGroupIDs")
            found = Caller(
                sender,
                uid,
                bool(self._write_group)
                and _is_member(uid, self._write_group, groups.value if groups else None),
            )
            while len(self._callers) >= KNOWN:
                del self._callers[next(iter(self._callers))]
            self._callers[sender] = found
        return found

    async def _open_session(self, caller: Caller) -> str:
        """A session that ends with its connection, even if that has gone already."""
        session = self._sessions.open(caller)
        try:
            await self._ask_bus("AddMatch", "s", _match(caller.name))
            # Had it gone before that, nobody would tell us.
            await self._ask_bus("GetConnectionUnixUser", "s", caller.name)
        except BaseException:
            await self._sessions.close(session)
            await self._forget(caller.name)
            raise
        return f"{SESSIONS}/{session.number}"

    def _gone(self, message: Message) -> None:
        if (message.sender, message.member, message.signature) != (
            _BUS, "NameOwnerChanged", "sss"
        ):  # fmt: skip
            return
        name, _, owner = message.body
        if not owner and self._sessions.has(name):
            task = asyncio.create_task(self._end_sessions(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_sessions(self, name: str) -> None:
        await self._sessions.close_all(name)
        await self._forget(name)

    async def _forget(self, name: str) -> None:
        """The bus need not tell of the end of a connection that has no session any more."""
        if not self._sessions.has(name):
            try:
                await self._ask_bus("RemoveMatch", "s", _match(name))
            except Refused as error:
                log.debug("%s", error)  # it was never added

    async def _ask_bus(self, member: str, signature: str, *body: Any) -> list[Any]:
        """Raises Refused with what the bus says."""
        reply = await self._bus.call(
            Message(
                destination=_BUS, path="/org/freedesktop/DBus", interface=_BUS, member=member,
                signature=signature, body=list(body),
            )
        )  # fmt: skip
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise Refused("Failed", f"the bus refuses {member}: {reply.error_name}")
        return list(reply.body)


# -- pure ------------------------------------------------------------------------------------


def error_name(error: Exception) -> str:
    """What an error is called on the bus."""
    if isinstance(error, Refused):
        name = error.name
    elif isinstance(error, XenstoreTimeout):
        name = "StoreTimeout"
    elif isinstance(error, XenstoreLost):
        name = "StoreLost"
    elif isinstance(error, NoSuchDevice):
        name = "NoSuchDevice"
    elif isinstance(error, XenstoreError):
        name = _ERRNO.get(error.errno or 0, "StoreFailed")
    else:
        name = "Failed"
    return f"{_BUS}.Error.{name}" if name in _GENERIC else f"{NAME}.Error.{name}"


def text(value: str) -> str:
    """`value` as the bus takes text: no NUL, no lone surrogates, and no control characters."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in value
    )


def as_text(value: bytes) -> str:
    """A node's value as the bus takes text. Raises Refused if it is none."""
    found = decode(value)
    if "\0" in found or any("\udc80" <= each <= "\udcff" for each in found):
        raise Refused("NotText", "the value is no text: ReadBytes reads it")
    return found


def variants(value: Mapping[str, Any]) -> dict[str, Variant]:
    """An object of JSON as the bus has it; what is null is left out."""
    return {text(key): variant(each) for key, each in value.items() if each is not None}


def variant(value: Any) -> Variant:
    match value:
        case bool():
            return Variant("b", value)
        case int() if -(1 << 63) <= value < 1 << 63:
            return Variant("x", value)
        case int() if 0 <= value < 1 << 64:
            return Variant("t", value)
        case float():
            return Variant("d", value)
        case Mapping():
            return Variant("a{sv}", variants(value))
        case list() | tuple():
            return Variant("av", [variant(each) for each in value if each is not None])
        case _:
            return Variant("s", text(str(value)))


def _number(path: str) -> int:
    """The number of the session whose object `path` is; 0 if it is none's."""
    found = re.fullmatch(rf"{SESSIONS}/([1-9][0-9]{{0,8}})", path)
    return int(found[1]) if found else 0


def _match(name: str) -> str:
    return f"type='signal',sender='{_BUS}',member='NameOwnerChanged',arg0='{name}'"


def _is_member(uid: int, group: str, groups: list[int] | None) -> bool:
    """`groups`: those of the connection, if the bus tells them; else what the system knows."""
    try:
        wanted = grp.getgrnam(group).gr_gid
        if groups is None:
            user = pwd.getpwuid(uid)
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False
    return wanted in groups
