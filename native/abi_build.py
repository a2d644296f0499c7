# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront._abi`` (cffi, API mode).

    python abi_build.py OUTPUT.c

The declarations are taken from the headers themselves, so that there is one definition of every
structure: pvf_ctl.h, and ring.h for the unit tests of the ring. The C compiler then checks every
size and offset that cffi derived.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent

SOURCE = """
#include "pvf_ctl.h"
#include "nbd.h"
#include "ring.h"
#include <xen/xen.h>
#include <xen/io/blkif.h>
enum {
    PVF_BLK_RING_SLOTS = __CONST_RING_SIZE(blkif, 4096),
    PVF_BLK_MAX_SEGMENTS = BLKIF_MAX_SEGMENTS_PER_REQUEST,
};
"""

CONSTANTS = ("PVF_BLK_RING_SLOTS", "PVF_BLK_MAX_SEGMENTS")


def declarations(text: str) -> str:
    """What cffi can parse of one of our headers: no preprocessor but plain numbers."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    kept = []
    for line in text.splitlines():
        if line.startswith("#"):
            number = re.fullmatch(r"#define\s+(\w+)\s+(0x[0-9a-fA-F]+|\d+)u?", line.strip())
            if number:
                kept.append(f"#define {number[1]} {number[2]}")
        else:
            kept.append(line)
    return "\n".join(kept)


def main(output: str) -> None:
    ffi = cffi.FFI()
    ffi.cdef(declarations((HERE / "include/pvf_ctl.h").read_text()))
    ffi.cdef("\n".join(f"static const int {name};" for name in CONSTANTS))
    ffi.cdef("struct pvf_fault { uint32_t rule; uint64_t value; const char *field, *text; };")
    ffi.cdef(declarations((HERE / "ring.h").read_text()))
    ffi.set_source("pvfront._abi", SOURCE)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
