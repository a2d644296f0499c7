# SPDX-License-Identifier: BSD-2-Clause
"""What others build on, as text that can be recorded and compared: names and signatures of a Python
module, members of interfaces on D-Bus, keys of JSON. `judge` says whether a change of it went with
its version.
"""

from __future__ import annotations

import ast
import enum
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import click

from pvfront.cli import cli

RECORDS = Path(__file__).resolve().parents[1] / "interfaces"

Surface = dict[str, str]
"""From the name of each part ("GrantPool.map") to what may be relied on ("() -> mmap.mmap")."""


# -- Python ------------------------------------------------------------------------------------

MADE_BY_CALLERS = {"Bus", "Permission"}
"""Classes whose constructors are public: all others are made by what returns them."""

PROTOCOLS = {"__enter__", "__aenter__", "__aiter__", "__anext__"}


def api_surface(module: ModuleType) -> Surface:
    """Each public name of a module with its signature, and those of its classes' members."""
    found: Surface = {}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            found.update(_class_surface(name, value))
        elif inspect.isroutine(value):
            found[name] = _signature(value)
        elif name != "VERSION":
            found[name] = f"= {value!r}"
    return found


def _class_surface(name: str, klass: type) -> Surface:
    """The public members, those of pvfront's base classes among them."""
    if issubclass(klass, enum.Enum):
        return {name: ", ".join(f"{one.name}={one.value!r}" for one in klass)}
    ours = [each for each in klass.__mro__ if each.__module__.startswith("pvfront.")]
    foreign = [each for each in klass.__mro__ if each not in ours]
    bases = ", ".join(each.__name__ for each in foreign if issubclass(each, Exception))
    found = {name: f"exception ({bases})" if bases else "class"}
    if name in MADE_BY_CALLERS:
        found[name] += f" {_signature(klass)}"
    for each in reversed(ours):
        members = dict.fromkeys(_set_by_constructor(each), "attribute")
        members |= inspect.get_annotations(each)
        members |= {
            member: _member(value)
            for member, value in vars(each).items()
            if not inspect.ismemberdescriptor(value)
        }
        for member, what in members.items():
            if not member.startswith("_") or member in PROTOCOLS:
                found[f"{name}.{member}"] = what
    return found


def _set_by_constructor(klass: type) -> list[str]:
    """The attributes that a class's own __init__ sets."""
    if "__init__" not in vars(klass) or hasattr(klass, "__dataclass_fields__"):
        return []
    tree = ast.parse(textwrap.dedent(inspect.getsource(klass.__init__)))  # type: ignore[misc]
    return [
        target.attr
        for target in ast.walk(tree)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    ]


def _member(value: object) -> str:
    if isinstance(value, property):
        return f"-> {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {_signature(value.__func__)}"
    return _signature(value) if inspect.isroutine(value) else f"= {value!r}"


def _signature(value: Any) -> str:
    kind = "async " if inspect.iscoroutinefunction(value) else ""
    # Annotations are text, and shown in quotes by some versions of Python only.
    return kind + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value)))


# -- D-Bus -------------------------------------------------------------------------------------


def dbus_surface(introspection: str) -> Surface:
    """Each method, signal and property of an introspection document, with its types."""
    found: Surface = {}
    for interface in ElementTree.fromstring(introspection).iter("interface"):
        for part in interface:
            name = f"{interface.get('name')}.{part.get('name')}"
            if part.tag == "property":
                notes = "".join(f" {each.get('value')}" for each in part)
                found[name] = f"property {part.get('type')} {part.get('access')}{notes}"
                continue
            ends: dict[str, list[str]] = {"in": [], "out": []}
            for arg in part.iter("arg"):
                given = arg.get("direction") or ("in" if part.tag == "method" else "out")
                ends[given].append(f"{arg.get('name')}: {arg.get('type')}")
            found[name] = f"{part.tag} ({', '.join(ends['in'])}) -> ({', '.join(ends['out'])})"
    return found


# -- the command line ----------------------------------------------------------------------------


def commands(group: click.Group = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Each command by its words ("vbd serve")."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


# -- JSON --------------------------------------------------------------------------------------

Shape = Any
"""Of a value, as tests/interfaces/shapes.json has it:

"str", "int|null"               its kind; int is a number too
{"key": shape, "key?": shape}   an object; "key?" may be missing, "key??" may be null as well
{"*": shape}                    all other keys
[shape]                         a list
"@list"                         as the entry of that name
"any"                           promises nothing

Entries whose name begins with "_" are of no command.
"""

_KINDS = {bool: "bool", int: "int", float: "number", str: "str", type(None): "null"}


def shapes() -> dict[str, Shape]:
    """What `--json` of each command prints, by the command's words: "store ls"."""
    found = json.loads((RECORDS / "shapes.json").read_text())
    return {
        verb: _resolved(shape, found) for verb, shape in found.items() if not verb.startswith("_")
    }


def _resolved(shape: Shape, entries: Mapping[str, Shape]) -> Shape:
    if isinstance(shape, str):
        return _resolved(entries[shape[1:]], entries) if shape.startswith("@") else shape
    if isinstance(shape, list):
        return [_resolved(shape[0], entries)]
    return {key: _resolved(each, entries) for key, each in shape.items()}


def json_surface(of: Mapping[str, Shape]) -> Surface:
    """Every key of every command's JSON, with its kind."""
    found: Surface = {}
    for verb, shape in of.items():
        _flatten(f"{verb}: ", shape, "", found)
    return found


def _flatten(where: str, shape: Shape, note: str, found: Surface) -> None:
    if isinstance(shape, list):
        _flatten(f"{where}[]", shape[0], note, found)
    elif isinstance(shape, Mapping):
        found[where] = f"object{note}"
        for key, each in shape.items():
            kind = {0: "", 1: ", may be missing", 2: ", may be null or missing"}[key.count("?")]
            _flatten(f"{where}.{key.rstrip('?')}", each, kind, found)
    else:
        found[where] = f"{shape}{note}"


def differences(value: Any, shape: Shape, where: str = "") -> list[str]:
    """What a value has that its shape does not say, or the other way; a line each."""
    if shape == "any":
        return []
    if isinstance(shape, str):
        kind = _KINDS.get(type(value), "list" if isinstance(value, list) else "object")
        kinds = shape.split("|")
        fits = kind in kinds or (kind == "int" and "number" in kinds)
        return [] if fits else [f"{where or 'it'} is {kind}, recorded as {shape}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where or 'it'} is no list, recorded as one"]
        return [line for one in value for line in differences(one, shape[0], f"{where}[]")]
    if not isinstance(value, Mapping):
        return [f"{where or 'it'} is no object, recorded as one"]
    known = {key.rstrip("?"): (each, key.count("?")) for key, each in shape.items()}
    rest = known.pop("*", None)
    found: list[str] = []
    for key, each in value.items():
        if key in known:
            if each is not None or known[key][1] < 2:
                found += differences(each, known[key][0], f"{where}.{key}")
        elif rest is not None:
            found += differences(each, rest[0], f"{where}.*")
        else:
            found.append(f"{where}.{key} is not recorded")
    missing = [key for key, (_, optional) in known.items() if not optional and key not in value]
    return found + [f"{where}.{key} is missing" for key in missing]


# -- records -----------------------------------------------------------------------------------


def record(name: str) -> tuple[str, dict[str, Any]]:
    """The version that was recorded, and what it has."""
    found = json.loads((RECORDS / name).read_text())
    return found["version"], found["has"]


def write_record(name: str, version: str, has: Mapping[str, Any]) -> None:
    text = json.dumps({"version": version, "has": has}, indent=1, sort_keys=True)
    (RECORDS / name).write_text(text + "\n")


RECORD_IT = "run tools/interfaces.py record and commit what it writes."


def judge(
    what: str,
    versions: tuple[str, str],
    recorded: Mapping[str, Any],
    now: Mapping[str, Any],
    constant: str,
) -> str:
    """ "" if what there is now may be called so; else a sentence that says what to do.

    `versions`: the recorded one and the one of now. `constant`: where the latter stands.
    """
    before, version = versions
    gone = [name for name in recorded if recorded[name] != now.get(name)]
    new = [name for name in now if name not in recorded]
    changes = "; ".join(
        [f"{name} is not what it was ({recorded[name]})" for name in gone]
        + [f"{name} is new" for name in new]
    )
    wanted = _next(before, major=bool(gone)) if gone or new else before
    if version == before:
        if not changes:
            return ""
        return (
            f"{what} {before} has changed: {changes}. Either undo that, or set {constant} to "
            f'"{wanted}" (docs/interfaces.md says why) and run tools/interfaces.py record.'
        )
    if _parts(version) < _parts(wanted):
        return (
            f"{what} calls itself {version}, but after {before} this must be {wanted} or later: "
            f"{changes or 'nothing has changed'}. Set {constant}."
        )
    return f"{what} {version} is not recorded (that is {before}): {RECORD_IT}"


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _next(version: str, *, major: bool) -> str:
    first, second = _parts(version)
    return f"{first + 1}.0" if major else f"{first}.{second + 1}"
