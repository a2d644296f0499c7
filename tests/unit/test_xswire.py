# SPDX-License-Identifier: BSD-2-Clause
"""The store's wire protocol without I/O: packets, paths, permissions, errors."""

import errno
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pvfront
from pvfront import xswire
from pvfront.xswire import Op, Parser, Permission, WireError, XenstoreError

RESET_WATCHES = 21  # xen/include/public/io/xs_wire.h


def packet(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    return struct.pack("=IIII", op, req_id, tx_id, len(payload)) + payload


packets = st.tuples(
    st.sampled_from(list(Op)),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=200),
)


@given(st.lists(packets, max_size=6), st.data())
def test_packets_come_out_whole_however_the_stream_is_cut(sent, data):
    stream = b"".join(packet(*p) for p in sent)
    parser, found = Parser(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += parser.feed(stream[:cut])
        stream = stream[cut:]
    assert [tuple(p) for p in found] == sent
    assert parser.partial == 0


@given(st.binary(max_size=300))
def test_any_bytes_are_packets_or_a_wire_error(garbage):
    parser = Parser()
    try:
        found = list(parser.feed(garbage))
    except WireError:
        return
    assert sum(16 + len(p.payload) for p in found) + parser.partial == len(garbage)


@given(packets)
def test_what_is_encoded_parses_back(sent):
    op, req_id, tx_id, payload = sent
    if op in (Op.WATCH_EVENT, Op.ERROR):
        with pytest.raises(ValueError, match="must not be sent"):
            xswire.encode(*sent)
    else:
        assert xswire.encode(*sent) == packet(*sent)
        assert [tuple(p) for p in Parser().feed(xswire.encode(*sent))] == [
            (op, req_id, tx_id, payload)
        ]


def test_a_length_beyond_the_protocol_is_garbage_before_its_payload_came():
    with pytest.raises(WireError, match="4097 bytes"):
        list(Parser().feed(struct.pack("=IIII", Op.READ, 1, 0, 4097)))


@pytest.mark.parametrize("number", [0, 8, 20, RESET_WATCHES, 23, 128, 0xFFFF, 0xFFFFFFFF])
def test_an_unknown_packet_type_is_garbage(number):
    with pytest.raises(WireError, match=f"type {number}"):
        list(Parser().feed(packet(number, 1, 0, b"")))


def test_reset_watches_has_no_name_and_cannot_be_encoded():
    assert RESET_WATCHES not in [int(op) for op in Op]
    for op in (RESET_WATCHES, 19, 0):
        with pytest.raises(ValueError, match="must not be sent"):
            xswire.encode(op, 1, 0, b"\0")  # type: ignore[arg-type]


def test_frames_are_made_nowhere_but_in_encode():
    """The guard in `encode` holds only if nothing else packs headers or calls pyxs."""
    sources = list(Path(pvfront.__file__).parent.rglob("*.py"))
    assert sources
    users = {s.name for s in sources if re.search(r"\bpyxs\b.*import|import pyxs", s.read_text())}
    assert users == {"xswire.py"}
    wire = Path(xswire.__file__).read_text()
    assert len(re.findall(r"_HEADER\.pack", wire)) == 1


def test_operation_numbers_are_those_of_the_public_header():
    header = Path("/usr/include/xen/io/xs_wire.h")
    if not header.exists():
        pytest.skip("libxen-dev is not installed: no xen/io/xs_wire.h to compare with")
    body = header.read_text().split("enum xsd_sockmsg_type")[1].split("};")[0]
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    numbers, value = {}, -1
    for name, _, after, plus in re.findall(r"XS_(\w+)(\s*=\s*XS_(\w+)\s*\+\s*(\d+))?", body):
        value = numbers[after] + int(plus) if after else value + 1
        numbers.setdefault(name, value)
        value = numbers[name]
    assert numbers["RESET_WATCHES"] == RESET_WATCHES
    for op in Op:
        assert numbers[op.name] == op, op


@given(st.binary(max_size=50))
def test_any_value_survives_being_text(value):
    assert xswire.encode_text(xswire.decode(value)) == value


@given(st.binary(max_size=50))
def test_any_text_is_printable_in_a_log(value):
    shown = xswire.printable(xswire.decode(value))
    assert shown.isprintable()
    shown.encode("ascii" if value.isascii() else "utf-8")


@pytest.mark.parametrize(
    "path", ["/", "device", "/local/domain/0", "a-b_c@d", "/local/domain/0/backend/vbd/1/51728"]
)
def test_store_paths_are_accepted(path):
    assert xswire.encode_path(path, "read") == path.encode()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a b",
        "device/",
        "a//b",
        "//",
        "device\n",
        "device\0",
        "a\0b",
        "ä",
        "a.b",
        "\udcff",
        "r" * 2049,
        "/" + "a" * 3072,
    ],
)
def test_what_no_store_accepts_is_refused_before_it_is_sent(path):
    with pytest.raises(XenstoreError) as caught:
        xswire.encode_path(path, "read")
    assert caught.value.errno == errno.EINVAL


def test_special_names_can_only_be_watched():
    assert xswire.encode_path("@releaseDomain", "watch", watch=True) == b"@releaseDomain"
    with pytest.raises(XenstoreError):
        xswire.encode_path("@somethingElse", "watch", watch=True)
    with pytest.raises(XenstoreError):
        xswire.encode_path("@releaseDomain\n", "watch", watch=True)


@given(st.integers(0, 0xFFFF), st.booleans(), st.booleans())
def test_permissions_read_back_as_written(domid, read, write):
    permission = Permission(domid, read=read, write=write)
    assert Permission.parse(permission.encode().decode()) == permission


@pytest.mark.parametrize(
    "text", ["", "r", "x5", "r-1", "r 5", "r5\n", "r65536", "r٣", "b" + "9" * 999]
)
def test_a_permission_that_makes_no_sense_is_a_value_error(text):
    with pytest.raises(ValueError, match="not a"):
        Permission.parse(text)


def test_an_impossible_domain_cannot_be_given_permissions():
    with pytest.raises(ValueError, match="-1"):
        Permission(-1, read=True).encode()


def test_request_ids_wrap_at_32_bits_and_step_over_pending_ones():
    assert xswire.next_request_id(-1, ()) == 0
    assert xswire.next_request_id(0xFFFFFFFF, ()) == 0
    assert xswire.next_request_id(0xFFFFFFFE, {0xFFFFFFFF, 0, 1}) == 2


def test_an_error_says_operation_path_and_name():
    error = XenstoreError(errno.ENOENT, "read", "device/vbd/51728/state")
    assert str(error) == "xenstore: read device/vbd/51728/state: ENOENT (No such file or directory)"
    assert (error.errno, error.path, error.op) == (2, "device/vbd/51728/state", "read")


def test_errors_are_the_builtin_ones_too():
    assert isinstance(XenstoreError(errno.ENOENT, "read", "a"), FileNotFoundError)
    assert isinstance(XenstoreError(errno.EACCES, "read", "a"), PermissionError)
    assert isinstance(XenstoreError(errno.EEXIST, "watch", "a"), FileExistsError)
    assert type(XenstoreError(errno.EINVAL, "read", "a")) is XenstoreError


def test_an_error_with_a_hostile_path_is_one_printable_line():
    text = str(XenstoreError(errno.EINVAL, "read", "a\nb\x1b[31m\udcff"))
    assert "\n" not in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"EACCES\0", errno.EACCES),
        (b"EAGAIN", errno.EAGAIN),
        (b"EQUOTA\0", errno.EPROTO),
        (b"errorcode\0", errno.EPROTO),
        (b"", errno.EPROTO),
        (b"\xff\n", errno.EPROTO),
    ],
)
def test_error_names_become_errnos_and_unknown_ones_are_shown(payload, code):
    error = xswire.error_from_reply("read", "a", payload)
    assert error.errno == code
    assert str(error).isprintable()


def test_pyxs_is_imported_without_a_warning():
    code = "import pvfront.xenstore"
    run = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code],
        cwd=Path(pvfront.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
