# SPDX-License-Identifier: BSD-2-Clause
"""XENCONS: secondary PV consoles as terminals."""
