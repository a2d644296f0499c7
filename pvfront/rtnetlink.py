# SPDX-License-Identifier: BSD-2-Clause
"""pyroute2's rtnetlink, without the rest of pyroute2 (netlink.py says why and how).

A hundred modules fewer: an emulated guest's network service starts a second earlier.
"""

from __future__ import annotations

from . import netlink  # first: pyroute2 is there without its __init__

from pyroute2.iproute.linux import AsyncIPRoute, IPRoute  # isort: skip

NetlinkError = netlink.NetlinkError

__all__ = ["AsyncIPRoute", "IPRoute", "NetlinkError"]
