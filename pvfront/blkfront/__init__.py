# SPDX-License-Identifier: BSD-2-Clause
"""Disks: the blkif protocol towards the backend, an nbd device towards the guest."""
