# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront.host._netback`` (cffi, API mode).

    python netback_build.py OUTPUT.c

Everything of netback.h, which is what pvfront/host/netengine.py calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from abi_build import declarations  # noqa: E402


def main(output: str) -> None:
    ffi = cffi.FFI()
    ffi.cdef(declarations((HERE / "netback.h").read_text()))
    ffi.set_source("pvfront.host._netback", '#include "netback.h"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
