# SPDX-License-Identifier: BSD-2-Clause
"""How many examples.

A normal run draws the same few hundred examples each time. ``--hypothesis-profile=long`` draws many
times as many, others each time (`make fuzz`).
"""

from hypothesis import settings

settings.register_profile("long", max_examples=10000, deadline=None)
