# SPDX-License-Identifier: BSD-2-Clause
"""The versions of what others build on, MAJOR.MINOR each; docs/interfaces.md has the policy.

An addition raises MINOR. What is removed, renamed or means something else raises MAJOR. The tests
of tests/unit/test_interfaces.py hold it: they compare what there is with tests/interfaces/, which
`tools/interfaces.py record` writes, and only for a version that is not recorded yet.
"""

API = "1.0"
"""Of the Python names in `pvfront.api`."""
DBUS = "1.0"
"""Of XENIFACE's interfaces on D-Bus, as its property Version."""
JSON = "1.1"
"""Of what commands print with --json."""
