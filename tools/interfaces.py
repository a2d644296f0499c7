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


def main() -> int:
    if sys.argv[1:] != ["record"]:
        print(__doc__, file=sys.stderr)
        return 2
    name, version, now = "api.json", versions.API, interfaces.api_surface(api)
    if (interfaces.RECORDS / name).exists():
        before, has = interfaces.record(name)
        verdict = interfaces.judge("pvfront.api", (before, version), has, now, "versions.API")
        if verdict and (before == version or "is not recorded" not in verdict):
            print(verdict, file=sys.stderr)
            return 1
    interfaces.write_record(name, version, now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
