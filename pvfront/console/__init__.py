# SPDX-License-Identifier: BSD-2-Clause
"""XENCONS: PV consoles with a login. Nothing is built here yet."""
