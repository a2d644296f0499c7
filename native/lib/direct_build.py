# SPDX-License-Identifier: BSD-2-Clause
"""Writes the C source of the extension ``pvfront.blkfront._direct`` (cffi, API mode).

    python direct_build.py OUTPUT.c

All of pvfront/disk.h. The calls release the GIL.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from abi_build import declarations  # noqa: E402

SOURCE = "#include <pvfront/disk.h>"


def main(output: str) -> None:
    text = (HERE / "pvfront/disk.h").read_text()
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.S)
    ffi = cffi.FFI()
    ffi.cdef("struct iovec { void *iov_base; size_t iov_len; };")
    ffi.cdef(declarations(text))
    ffi.set_source("pvfront.blkfront._direct", SOURCE)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
