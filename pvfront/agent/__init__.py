# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE: store and time for user space, guest agent. Nothing is built here yet."""
