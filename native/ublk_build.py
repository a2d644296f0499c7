# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront.blkfront._ublk`` (cffi, API mode).

    python ublk_build.py OUTPUT.c

Everything of ublk_control.h, which is what pvfront/blkfront/ublkcontrol.py calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi
from abi_build import declarations

HERE = Path(__file__).resolve().parent


def main(output: str) -> None:
    ffi = cffi.FFI()
    ffi.cdef(declarations((HERE / "ublk_control.h").read_text()))
    ffi.set_source("pvfront.blkfront._ublk", '#include "ublk_control.h"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
