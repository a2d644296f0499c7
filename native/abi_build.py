# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront._abi`` (cffi, API mode).

    python abi_build.py OUTPUT.c

The declarations are taken from the headers themselves, so that there is one definition of every
structure: pvf_ctl.h, and ring.h for the control ring of a network and for unit tests. The C
compiler then checks every size and offset that cffi derived.
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
#include <xen/io/netif.h>
enum {
    PVF_BLK_RING_SLOTS = __CONST_RING_SIZE(blkif, 4096),
    PVF_BLK_MAX_SEGMENTS = BLKIF_MAX_SEGMENTS_PER_REQUEST,
    PVF_NET_CTRL_SLOTS = __CONST_RING_SIZE(xen_netif_ctrl, 4096),
    PVF_NET_CTRL_SLOT = sizeof(union xen_netif_ctrl_sring_entry),
};
"""

CONSTANTS = (
    "PVF_BLK_RING_SLOTS",
    "PVF_BLK_MAX_SEGMENTS",
    "PVF_NET_CTRL_SLOTS",
    "PVF_NET_CTRL_SLOT",
    "XEN_NETIF_CTRL_HASH_ALGORITHM_NONE",
    "XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ",
    "XEN_NETIF_CTRL_HASH_TYPE_IPV4",
    "XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP",
    "XEN_NETIF_CTRL_HASH_TYPE_IPV6",
    "XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP",
    "XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS",
    "XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS",
    "XEN_NETIF_CTRL_TYPE_SET_HASH_KEY",
    "XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE",
    "XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE",
    "XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING",
    "XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM",
    "XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE",
    "XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING",
    "XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING",
    "XEN_NETIF_CTRL_STATUS_SUCCESS",
    "XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED",
    "XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER",
    "XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW",
    "XEN_NETIF_CTRLF_GREF_readonly",
)

# The compiler checks them against netif.h.
CONTROL = """
struct xen_netif_ctrl_request { uint16_t id, type; uint32_t data[3]; };
struct xen_netif_ctrl_response { uint16_t id, type; uint32_t status, data; };
struct xen_netif_gref { uint32_t ref; uint16_t flags, status; };
"""


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
    ffi.cdef(CONTROL)
    ffi.cdef("struct pvf_fault { uint32_t rule; uint64_t value; const char *field, *text; };")
    ffi.cdef(declarations((HERE / "ring.h").read_text()))
    ffi.set_source("pvfront._abi", SOURCE)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
