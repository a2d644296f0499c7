# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront.host._host`` (cffi, API mode).

    python host_build.py OUTPUT.c

The embedded host's shared memory as Python sees it: everything of pvf_host.h, channel.h, grants.h
and memfd.h, and the flags of <xen/grant_table.h>.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from abi_build import declarations  # noqa: E402

SOURCE = """
#include <stdbool.h>
#include "pvf_host.h"
#include "channel.h"
#include "grants.h"
#include "memfd.h"
#include <xen/xen.h>
#include <xen/grant_table.h>
"""

HEADERS = ("../include/pvf_host.h", "memfd.h", "channel.h", "grants.h")
FLAGS = ("GTF_permit_access", "GTF_readonly", "GTF_reading", "GTF_writing")


def main(output: str) -> None:
    ffi = cffi.FFI()
    for header in HEADERS:
        ffi.cdef(declarations((HERE / header).read_text()))
    ffi.cdef("\n".join(f"static const int {name};" for name in FLAGS))
    ffi.set_source("pvfront.host._host", SOURCE)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
