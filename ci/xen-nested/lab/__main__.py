# SPDX-License-Identifier: BSD-2-Clause
from .run import main

raise SystemExit(main())
