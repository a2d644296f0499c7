# SPDX-License-Identifier: BSD-2-Clause
"""`pvfront` with less patience for its backends than a user's, so that a test need not wait 30 s.

    python serve.py vbd serve ...

All but the numbers of `device.Deadlines` is the command that users start. `detach`, which is what a
toolstack sees, is as it is.
"""

import functools
import sys

import pvfront.device
from pvfront.cli import main

pvfront.device.Deadlines = functools.partial(  # type: ignore[misc]
    pvfront.device.Deadlines, init_wait=2.0, connected=2.0, closing=1.0, drain=2.0, busy_poll=0.2
)
pvfront.device.RETRY_FIRST, pvfront.device.RETRY_LAST = 0.15, 1.0

if __name__ == "__main__":
    sys.exit(main())
