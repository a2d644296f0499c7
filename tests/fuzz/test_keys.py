# SPDX-License-Identifier: BSD-2-Clause
"""Keys of the store, written by somebody hostile: sound values and complaints, or one error."""

from __future__ import annotations

from fuzzing import TEXTS, examples
from hypothesis import given
from hypothesis import strategies as st

from pvfront import states
from pvfront.blkfront import features
from pvfront.blkfront.features import DiskGeometry, GeometryError
from pvfront.blkfront.nbdexport import Export
from pvfront.negotiate import BadValue, Keys, Problem, is_power_of_two, parse_uint

DISK = {"sectors": "131072", "sector-size": "512", "info": "0"}
KEYS = (*features.GEOMETRY_KEYS, *features.LIMIT_KEYS, "device-type", "state", "x")

directories = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), TEXTS),
    st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=9)), TEXTS),
)


def named(problems: list[Problem]) -> None:
    for problem in problems:
        assert str(problem).isprintable()
        assert len(str(problem)) < 200


def clear(text: str, *names: str) -> None:
    """One line that names a key."""
    assert any(name in text for name in names or DISK)
    assert text.isprintable()


def sound(disk: DiskGeometry) -> None:
    assert disk.sector_size in (512, 1024, 2048, 4096)
    assert 0 < disk.size < 1 << 63
    assert disk.size % disk.sector_size == 0
    assert is_power_of_two(disk.physical_sector_size)
    assert disk.sector_size <= disk.physical_sector_size <= 1 << 31
    assert disk.device_type in ("disk", "cdrom", "floppy")
    assert 0 < disk.discard_granularity < 1 << 32
    assert 0 <= disk.discard_alignment < disk.discard_granularity
    assert disk.discard_granularity % disk.sector_size == 0
    assert disk.discard_alignment % disk.sector_size == 0
    assert disk.discard or not disk.discard_secure


@examples(600)
@given(directories, st.booleans(), st.booleans(), st.none() | TEXTS)
def test_any_directory_is_a_sound_disk_or_a_geometry_error_that_names_its_key(
    keys: dict[str, str], complete: bool, blkback: bool, device_type: str | None
) -> None:
    backend = DISK | keys if complete else keys
    try:
        disk, problems = features.parse_geometry(backend, device_type=device_type, blkback=blkback)
    except GeometryError as error:
        clear(str(error))
        return
    sound(disk)
    named(problems)
    assert blkback or disk.sector_size == 512
    export = Export.of("xvdb", disk)
    assert 0 < export.minimum <= export.preferred <= export.maximum < 1 << 32
    assert export.flags < 1 << 16


@examples(400)
@given(directories)
def test_any_directory_gives_limits_within_ours(keys: dict[str, str]) -> None:
    limits, problems = features.parse_limits(keys)
    assert 0 <= limits.max_indirect <= features.MAX_INDIRECT_SEGMENTS
    assert 0 <= limits.max_ring_page_order <= features.MAX_RING_PAGE_ORDER
    assert 1 <= limits.max_queues <= features.MAX_QUEUES
    named(problems)


@examples(300)
@given(directories)
def test_distrust_is_what_nonsense_means(keys: dict[str, str]) -> None:
    if features.trusted(keys):
        assert keys.get("trusted", "1").strip() == "1"


@examples(500)
@given(TEXTS, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_any_text_is_a_number_in_range_or_a_bad_value(text: str, lo: int, more: int) -> None:
    try:
        number = parse_uint(text, lo=lo, hi=lo + more, field="key")
    except BadValue as error:
        clear(str(error), "key")
    else:
        assert lo <= number <= lo + more
        assert int(text) == number
    keys = Keys({"key": text})
    assert lo <= keys.uint("key", default=lo, lo=lo, hi=lo + more) <= lo + more
    assert is_power_of_two(keys.power_of_two("key", default=8, lo=1, hi=1 << 20))
    keys.flag("key")
    named(keys.problems)


@examples(300)
@given(st.none() | TEXTS)
def test_any_text_is_a_state_and_nonsense_says_why(text: str | None) -> None:
    reading = states.read_state(text)
    if reading.reason is None:
        assert text == str(int(reading.state))
    else:
        assert reading.state is states.XenbusState.UNKNOWN
        assert reading.reason.isprintable()


@examples(300)
@given(st.lists(st.integers(0, 1 << 32), max_size=20), st.integers(0, 1 << 32), st.booleans())
def test_what_is_published_is_removed_as_stale_afterwards(
    refs: list[int], port: int, persistent: bool
) -> None:
    try:
        keys = features.frontend_keys(port=port, ring_refs=refs, persistent=persistent)
    except ValueError:
        assert len(refs) not in (1, 2, 4, 8, 16)
        return
    assert all(features.stale_key(key) for key in keys)
    assert sum(key.startswith("ring-ref") for key in keys) == len(refs)
