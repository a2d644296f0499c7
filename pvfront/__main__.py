# SPDX-License-Identifier: BSD-2-Clause
"""`python -m pvfront`."""

from .cli import main

main()
