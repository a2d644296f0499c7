# SPDX-License-Identifier: BSD-2-Clause
"""pyroute2's generic netlink, without the rest of pyroute2.

Importing anything of pyroute2 runs its ``__init__``, which imports all of it: 150 modules more than
the 16 that are wanted here, and half of the time in which a supervisor starts. A boot waits for
that, and so do disks whose supervisor died; and what is imported stays in locked memory. Here the
package is there without its ``__init__`` having run. Whoever asks it for more, in this process,
gets it: the first name that is no submodule runs the ``__init__``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_NAME = "pyroute2"


def _bare(name: str) -> ModuleType:
    """A package whose ``__init__`` runs when it is asked for something that it does not have."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if importlib.util.find_spec(f"{name}.{attribute}"):
            return importlib.import_module(f"{name}.{attribute}")
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = missing  # PEP 562
    return package


if _NAME not in sys.modules:
    sys.modules[_NAME] = _bare(_NAME)

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla  # noqa: E402
from pyroute2.netlink.exceptions import NetlinkError  # noqa: E402
from pyroute2.netlink.generic import (  # noqa: E402
    AsyncGenericNetlinkSocket,
    GenericNetlinkSocket,
)

__all__ = [
    "NLM_F_ACK",
    "NLM_F_REQUEST",
    "AsyncGenericNetlinkSocket",
    "GenericNetlinkSocket",
    "NetlinkError",
    "genlmsg",
    "nla",
]
