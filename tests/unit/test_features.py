# SPDX-License-Identifier: BSD-2-Clause
"""Backend keys to a disk's geometry, and what we publish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvfront.blkfront import features
from pvfront.blkfront.features import DiskGeometry, GeometryError, RingLimits

DISK = {"sectors": "131072", "sector-size": "512", "info": "0"}
"""What blkback writes at the least."""

NONSENSE = ("", "-1", "0x10", "1e3", "12 34", "one", "\u0663", "9" * 5000, "1_000", "+1", "\x00")


def geometry(**keys: str) -> DiskGeometry:
    """The geometry of DISK with keys changed; `_` in a name stands for `-`."""
    changed = {name.replace("_", "-"): value for name, value in keys.items()}
    return features.parse_geometry(DISK | changed)[0]


def problems(**keys: str) -> list[str]:
    changed = {name.replace("_", "-"): value for name, value in keys.items()}
    return [problem.field for problem in features.parse_geometry(DISK | changed)[1]]


def test_a_plain_disk_has_its_size_and_no_feature() -> None:
    assert geometry() == DiskGeometry(sectors=131072)
    assert geometry().size == 64 << 20


def test_every_key_of_a_rich_backend_is_taken() -> None:
    found, complaints = features.parse_geometry(
        {
            "sectors": "800",
            "sector-size": "4096",
            "physical-sector-size": "8192",
            "info": "6",
            "mode": "r",
            "feature-flush-cache": "1",
            "feature-barrier": "1",
            "feature-persistent": "1",
            "feature-discard": "1",
            "discard-granularity": "65536",
            "discard-alignment": "4096",
            "discard-secure": "1",
            "device-type": "disk",
        }
    )
    assert complaints == []
    assert found == DiskGeometry(
        sectors=800,
        sector_size=4096,
        physical_sector_size=8192,
        read_only=True,
        removable=True,
        flush=True,
        barrier=True,
        persistent=True,
        discard=True,
        discard_granularity=65536,
        discard_alignment=4096,
        discard_secure=True,
    )


@pytest.mark.parametrize("field", ["sectors", "sector-size", "info"])
def test_a_missing_key_without_which_there_is_no_disk_is_refused_by_name(field: str) -> None:
    keys = {name: value for name, value in DISK.items() if name != field}
    with pytest.raises(GeometryError, match=f"{field}: missing"):
        features.parse_geometry(keys)


@pytest.mark.parametrize("field", ["sectors", "sector-size", "info"])
@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_in_such_a_key_is_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(GeometryError, match=field) as caught:
        features.parse_geometry(DISK | {field: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", ["0", "1", "256", "513", "1000", "8192", "4294967296"])
def test_a_sector_size_that_is_no_power_of_two_from_512_to_4096_is_refused(size: str) -> None:
    with pytest.raises(GeometryError, match="sector-size"):
        geometry(sector_size=size)


def test_a_large_sector_size_is_refused_from_anything_but_blkback() -> None:
    keys = DISK | {"sector-size": "4096"}
    assert features.parse_geometry(keys)[0].sector_size == 4096
    with pytest.raises(GeometryError, match="sector-size"):
        features.parse_geometry(keys, blkback=False)


def test_an_empty_disk_is_refused() -> None:
    with pytest.raises(GeometryError, match="empty"):
        geometry(sectors="0")


@pytest.mark.parametrize("sectors", [1 << 54, (1 << 55) + 1, (1 << 64) - 1])
def test_a_size_that_overflows_when_counted_in_bytes_is_refused(sectors: int) -> None:
    with pytest.raises(GeometryError, match="2\\^63"):
        geometry(sectors=str(sectors))


def test_the_largest_size_that_fits_is_taken() -> None:
    assert geometry(sectors=str((1 << 54) - 1)).size == (1 << 63) - 512


def test_sectors_that_do_not_fill_a_block_are_rounded_down_and_said() -> None:
    assert geometry(sectors="1001", sector_size="4096").sectors == 1000
    assert problems(sectors="1001", sector_size="4096") == ["sectors"]


def test_a_disk_smaller_than_one_block_is_refused() -> None:
    with pytest.raises(GeometryError, match="less than one sector"):
        geometry(sectors="7", sector_size="4096")


@pytest.mark.parametrize("value", ["0", "256", "513", "1536", "nonsense", "99999999999"])
def test_an_impossible_physical_sector_size_is_ignored_and_said(value: str) -> None:
    assert geometry(physical_sector_size=value).physical_sector_size == 512
    assert problems(physical_sector_size=value) == ["physical-sector-size"]


def test_either_info_or_mode_makes_a_disk_read_only() -> None:
    assert not geometry(mode="w").read_only
    assert geometry(mode="r").read_only
    assert geometry(info="4").read_only


def test_info_tells_a_cdrom_and_a_removable_disk() -> None:
    assert geometry(info="1").device_type == "cdrom"
    assert geometry(info="2").removable
    assert geometry(removable="1").removable


def test_a_discard_granularity_that_splits_sectors_turns_discard_off() -> None:
    keys = {"feature_discard": "1", "discard_granularity": "700"}
    assert not geometry(**keys).discard
    assert problems(**keys) == ["discard-granularity"]


def test_a_discard_alignment_that_splits_sectors_turns_discard_off() -> None:
    keys = {"feature_discard": "1", "discard_alignment": "100"}
    assert not geometry(**keys).discard
    assert problems(**keys) == ["discard-alignment"]


def test_a_discard_granularity_of_zero_means_one_sector() -> None:
    assert geometry(feature_discard="1", discard_granularity="0").discard_granularity == 512


def test_secure_discard_without_discard_is_nothing() -> None:
    assert not geometry(discard_secure="1").discard_secure


@pytest.mark.parametrize("value", NONSENSE)
def test_a_feature_key_of_nonsense_is_off_and_said(value: str) -> None:
    assert not geometry(feature_flush_cache=value).flush
    assert problems(feature_flush_cache=value) == ["feature-flush-cache"]


def test_an_unknown_device_type_is_a_disk_and_said() -> None:
    found, complaints = features.parse_geometry(DISK, device_type="toaster")
    assert found.device_type == "disk"
    assert [problem.field for problem in complaints] == ["device-type"]


def test_a_problem_names_field_value_and_reason_in_one_short_line() -> None:
    _, complaints = features.parse_geometry(DISK | {"feature-flush-cache": "\n" * 4000})
    text = str(complaints[0])
    assert text.startswith("feature-flush-cache=")
    assert "\n" not in text
    assert len(text) < 250


def test_limits_default_to_one_page_one_queue_no_indirect_segments() -> None:
    assert features.parse_limits({}) == (RingLimits(), [])


def test_limits_are_clamped_to_our_own() -> None:
    limits, complaints = features.parse_limits(
        {
            "feature-max-indirect-segments": "4096",
            "max-ring-page-order": "31",
            "multi-queue-max-queues": "1000000",
        }
    )
    assert limits == RingLimits(max_indirect=256, max_ring_page_order=4, max_queues=64)
    assert complaints == []


@pytest.mark.parametrize("field", features.LIMIT_KEYS)
@pytest.mark.parametrize("value", ["-1", "x", "99999999999999999999999"])
def test_a_limit_of_nonsense_is_its_default_and_said(field: str, value: str) -> None:
    limits, complaints = features.parse_limits({field: value})
    assert limits == RingLimits()
    assert [problem.field for problem in complaints] == [field]


def test_no_queues_at_all_are_one() -> None:
    assert features.parse_limits({"multi-queue-max-queues": "0"})[0].max_queues == 1


@given(st.dictionaries(st.sampled_from(features.GEOMETRY_KEYS + features.LIMIT_KEYS), st.text()))
def test_any_text_gives_a_sound_geometry_or_a_geometry_error(keys: dict[str, str]) -> None:
    features.parse_limits(keys)
    try:
        found, _ = features.parse_geometry(DISK | keys)
    except GeometryError:
        return
    check(found)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(min_value=0, max_value=1 << 65).map(str)
            for name in features.GEOMETRY_KEYS
        },
    )
)
def test_any_numbers_give_a_sound_geometry_or_a_geometry_error(keys: dict[str, str]) -> None:
    try:
        found, _ = features.parse_geometry(DISK | keys)
    except GeometryError:
        return
    check(found)


def check(found: DiskGeometry) -> None:
    """What everything that uses a geometry relies on."""
    assert found.sector_size in (512, 1024, 2048, 4096)
    assert 0 < found.sectors * 512 < 1 << 63
    assert found.sectors % (found.sector_size // 512) == 0
    assert found.physical_sector_size % found.sector_size == 0
    assert 0 < found.discard_granularity < 1 << 32
    assert found.discard_granularity % found.sector_size == 0
    assert 0 <= found.discard_alignment < found.discard_granularity
    assert found.discard_alignment % found.sector_size == 0


def test_one_ring_page_is_published_as_ring_ref() -> None:
    assert features.frontend_keys(port=7, ring_refs=[42]) == {
        "ring-ref": "42",
        "event-channel": "7",
        "protocol": "x86_64-abi",
        "feature-persistent": "0",
    }


def test_several_ring_pages_are_published_one_by_one_and_never_as_ring_ref() -> None:
    keys = features.frontend_keys(port=7, ring_refs=[5, 6, 7, 8])
    assert keys["ring-page-order"] == "2"
    assert [keys[f"ring-ref{page}"] for page in range(4)] == ["5", "6", "7", "8"]
    assert "ring-ref" not in keys


@pytest.mark.parametrize("pages", [0, 3, 5, 32])
def test_a_ring_of_an_impossible_size_is_a_mistake_of_the_caller(pages: int) -> None:
    with pytest.raises(ValueError, match="pages"):
        features.frontend_keys(port=1, ring_refs=list(range(pages)))


def test_everything_we_publish_counts_as_stale_afterwards() -> None:
    published = features.frontend_keys(port=1, ring_refs=[1]) | features.frontend_keys(
        port=1, ring_refs=[1, 2]
    )
    assert all(features.stale_key(key) for key in published)


@pytest.mark.parametrize(
    "key", ["backend", "backend-id", "state", "virtual-device", "device-type", "trusted", "handle"]
)
def test_the_toolstacks_keys_are_never_stale(key: str) -> None:
    assert not features.stale_key(key)


@pytest.mark.parametrize(("value", "trust"), [("1", True), ("0", False), ("yes", False)])
def test_trusted_is_believed_only_when_it_says_1(value: str, trust: bool) -> None:
    assert features.trusted({"trusted": value}) is trust


def test_a_backend_is_trusted_unless_the_toolstack_says_otherwise() -> None:
    assert features.trusted({})
