# SPDX-License-Identifier: BSD-2-Clause
"""XENVIF and XENNET: network interfaces on a TAP."""
