# SPDX-License-Identifier: BSD-2-Clause
"""A real Xen in a virtual machine: dom0 and guests to test pvfront with. See docs/lab.md."""
