# SPDX-License-Identifier: BSD-2-Clause
"""The ioctl numbers and struct sizes in the code are those of the kernel's headers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pvfront import evtchn, gntalloc, gntdev

PROGRAM = r"""
#include <stdio.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;
#include <xen/evtchn.h>
#include <xen/gntalloc.h>
#include <xen/gntdev.h>
#define SHOW(name, value) printf("%s %lu\n", name, (unsigned long)(value))
int main(void) {
    SHOW("evtchn._BIND_INTERDOMAIN", IOCTL_EVTCHN_BIND_INTERDOMAIN);
    SHOW("evtchn._BIND_UNBOUND_PORT", IOCTL_EVTCHN_BIND_UNBOUND_PORT);
    SHOW("evtchn._UNBIND", IOCTL_EVTCHN_UNBIND);
    SHOW("evtchn._NOTIFY", IOCTL_EVTCHN_NOTIFY);
    SHOW("evtchn._RESET", IOCTL_EVTCHN_RESET);
    SHOW("gntalloc._ALLOC_GREF", IOCTL_GNTALLOC_ALLOC_GREF);
    SHOW("gntalloc._DEALLOC_GREF", IOCTL_GNTALLOC_DEALLOC_GREF);
    SHOW("gntalloc._SET_UNMAP_NOTIFY", IOCTL_GNTALLOC_SET_UNMAP_NOTIFY);
    SHOW("gntalloc._ALLOC.size", offsetof(struct ioctl_gntalloc_alloc_gref, gref_ids));
    SHOW("gntalloc._ALLOC_SIZE", sizeof(struct ioctl_gntalloc_alloc_gref));
    SHOW("gntalloc._DEALLOC.size", sizeof(struct ioctl_gntalloc_dealloc_gref));
    SHOW("gntalloc._NOTIFY.size", sizeof(struct ioctl_gntalloc_unmap_notify));
    SHOW("gntalloc._FLAG_WRITABLE", GNTALLOC_FLAG_WRITABLE);
    SHOW("gntalloc._CLEAR_BYTE", UNMAP_NOTIFY_CLEAR_BYTE);
    SHOW("gntalloc._SEND_EVENT", UNMAP_NOTIFY_SEND_EVENT);
    SHOW("gntdev._MAP_GRANT_REF", IOCTL_GNTDEV_MAP_GRANT_REF);
    SHOW("gntdev._UNMAP_GRANT_REF", IOCTL_GNTDEV_UNMAP_GRANT_REF);
    SHOW("gntdev._MAP.size", offsetof(struct ioctl_gntdev_map_grant_ref, refs));
    SHOW("gntdev._GRANT.size", sizeof(struct ioctl_gntdev_grant_ref));
    SHOW("gntdev._UNMAP.size", sizeof(struct ioctl_gntdev_unmap_grant_ref));
    return 0;
}
"""


def test_numbers_and_sizes_match_the_headers(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/xen/gntalloc.h").exists():
        pytest.skip("needs a C compiler and linux-libc-dev's xen/gntalloc.h")
    source, program = tmp_path / "show.c", tmp_path / "show"
    source.write_text(PROGRAM)
    subprocess.run([compiler, "-o", str(program), str(source)], check=True)
    shown = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    modules = {"evtchn": evtchn, "gntalloc": gntalloc, "gntdev": gntdev}
    lines = shown.splitlines()
    assert len(lines) == 20
    for line in lines:
        name, value = line.split()
        module, *rest = name.split(".")
        found = modules[module]
        for attribute in rest:
            found = getattr(found, attribute)
        assert found == int(value), name
