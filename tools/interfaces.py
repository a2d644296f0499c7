# SPDX-License-Identifier: BSD-2-Clause
"""Records what others build on in tests/interfaces/, for versions that are not recorded yet.

    .venv/bin/python tools/interfaces.py record

A version that is recorded is never recorded again: raise it first (pvfront/versions.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import interfaces

from pvfront import api, versions
from pvfront.agent.xeniface.bus import INTROSPECTION


def main() -> int:
    if sys.argv[1:] != ["record"]:
        print(__doc__, file=sys.stderr)
        return 2
    failed = False
    for what, constant, name, now in (
        ("pvfront.api", "API", "api.json", interfaces.api_surface(api)),
        ("XENIFACE", "DBUS", "dbus.json", interfaces.dbus_surface(INTROSPECTION)),
        ("the JSON", "JSON", "json.json", interfaces.json_surface(interfaces.shapes())),
    ):
        version = getattr(versions, constant)
        if (interfaces.RECORDS / name).exists():
            before, has = interfaces.record(name)
            said = interfaces.judge(what, (before, version), has, now, f"versions.{constant}")
            if said and not said.endswith(interfaces.RECORD_IT):
                print(said, file=sys.stderr)
                failed = True
                continue
        interfaces.write_record(name, version, now)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
