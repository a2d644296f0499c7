# SPDX-License-Identifier: BSD-2-Clause
"""How many examples a fuzzing test draws, and text as a hostile domain would write it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG_RUN = 40
"""The `long` profile draws so many times more examples than a normal run."""


settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
"""The same examples each time, and no opinion of how fast a machine is."""


def examples(count: int, **more: object) -> settings:
    """`count` examples, the same each time; under the profile `long` many more and others."""
    long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=count * (LONG_RUN if long else 1),
        derandomize=not long,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **more,  # type: ignore[arg-type]
    )


NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from(
        [2**n + d for n in (8, 9, 12, 15, 16, 31, 32, 48, 53, 54, 55, 63, 64) for d in (-1, 0, 1)]
    ),
    st.integers(0, 2**66),
).map(str)

ODD = st.sampled_from(
    [
        *("", " ", "0x10", "1e3", "+1", "-0", "00", "1 ", " 1", "1\n", "1\0", "1_0", "nan", "true"),
        *("\u0663", "²", "9" * 21, "9" * 5000, "\udcff", "\x1b[31m"),
        *("w", "r", "rw", "ro", "disk", "cdrom"),
    ]
)

TEXTS = st.one_of(NUMBERS, ODD, st.text(max_size=30))
"""Values of keys: numbers around every limit, nonsense, anything."""
