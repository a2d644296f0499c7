# SPDX-License-Identifier: BSD-2-Clause
"""Xen PV frontend drivers in the userspace of a Linux guest."""

__version__ = "0.1.0"
