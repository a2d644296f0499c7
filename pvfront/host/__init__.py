# SPDX-License-Identifier: BSD-2-Clause
"""The embedded host: Xen without Xen, for tests, demonstrations and measurements (docs/host.md)."""
