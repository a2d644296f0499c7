# SPDX-License-Identifier: BSD-2-Clause
"""The tests beside a workload, for as long as one likes.

python tests/hostile/soak.py faults [SECONDS [SEED]]
python tests/hostile/soak.py absences [TIMES [SEED]]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = {
    "faults": ("test_random_faults.py", "PVFRONT_FAULT_SECONDS", "60"),
    "absences": ("test_backend_comes_and_goes.py", "PVFRONT_ABSENCES", "10000"),
}


def main() -> None:
    if not 2 <= len(sys.argv) <= 4 or sys.argv[1] not in TESTS:
        sys.exit((__doc__ or "").strip())
    file, variable, usual = TESTS[sys.argv[1]]
    os.environ[variable] = "".join(sys.argv[2:3]) or usual
    if sys.argv[3:]:
        os.environ["PVFRONT_FAULT_SEED"] = sys.argv[3]
    # A machine that does something else meanwhile may need minutes to start a process.
    os.environ.setdefault("PVFRONT_PATIENCE", "180")
    pytest = ["-m", "pytest", "-q", "-s", "--timeout=0", "-k", "not fio", str(HERE / file)]
    # -P: the installed package, wherever this is started.
    os.execv(sys.executable, [sys.executable, "-P", *pytest])


if __name__ == "__main__":
    main()
