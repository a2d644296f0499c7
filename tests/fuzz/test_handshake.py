# SPDX-License-Identifier: BSD-2-Clause
"""The NBD handshake before any client: it wants little, ends, and says nothing malformed."""

from __future__ import annotations

import struct

from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from pvfront.blkfront.features import DiskGeometry
from pvfront.blkfront.nbdexport import OPTIONS, Export, Handshake, Step, Then

EXPORT_NAME, ABORT, LIST, INFO, GO = 1, 2, 3, 6, 7
U32 = st.one_of(st.integers(0, 40), st.integers(0, 0xFFFFFFFF))

DISKS = st.builds(
    DiskGeometry,
    sectors=st.integers(8, 1 << 53).map(lambda n: n - n % 8),
    sector_size=st.sampled_from([512, 4096]),
    physical_sector_size=st.sampled_from([4096, 1 << 31]),
    read_only=st.booleans(),
    flush=st.booleans(),
    discard=st.booleans(),
)


def option(kind: int, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", kind, size) + data


def asking(name: bytes, infos: list[int], length: int | None, count: int | None) -> bytes:
    size = len(name) if length is None else length
    number = len(infos) if count is None else count
    wanted = b"".join(struct.pack(">H", info) for info in infos)
    return struct.pack(">I", size) + name + struct.pack(">H", number & 0xFFFF) + wanted


names = st.one_of(st.sampled_from([b"", b"xvdb", b"xvdc", bytes(4096)]), st.binary(max_size=20))
questions = st.builds(
    asking, names, st.lists(st.integers(0, 0xFFFF) | st.integers(0, 4), max_size=5),
    st.none() | U32, st.none() | U32,
)  # fmt: skip
options = st.one_of(
    st.builds(option, st.sampled_from([INFO, GO]), questions),
    st.builds(option, st.just(EXPORT_NAME), names),
    st.builds(option, st.sampled_from([ABORT, LIST]), st.sampled_from([b"", b"x"])),
    st.builds(option, U32, st.binary(max_size=40)),
    st.builds(option, U32, st.binary(max_size=40), U32),
    st.binary(max_size=40),
)
flags = st.one_of(st.integers(0, 3), U32).map(lambda n: struct.pack(">I", n))


def well_formed(reply: bytes) -> None:
    while reply:
        magic, _, kind, length = struct.unpack_from(">QIII", reply)
        assert magic == 0x3E889045565A9
        assert kind in (1, 2, 3, 1 << 31 | 1, 1 << 31 | 2, 1 << 31 | 3, 1 << 31 | 6, 1 << 31 | 9)
        assert len(reply) >= 20 + length
        reply = reply[20 + length :]


@examples(600)
@given(DISKS, flags, st.lists(options, max_size=10), st.booleans())
def test_any_client_gets_well_formed_replies_and_its_handshake_ends(
    disk: DiskGeometry, begin: bytes, sent: list[bytes], admitted: bool
) -> None:
    export = Export.of("xvdb", disk)
    shake = Handshake(lambda: export)
    stream = begin + b"".join(sent)
    steps = 0
    while len(stream) >= shake.need:
        assert 0 < shake.need <= 8192, "nothing is wanted, or too much"
        part, stream = stream[: shake.need], stream[shake.need :]
        step = shake.feed(part)
        steps += 1
        assert steps <= 1 + 2 * (OPTIONS + 1)
        well_formed(step.reply)
        assert len(step.reply) < 8192
        if step.then is Then.GO and admitted:
            reply = shake.admit()
            assert shake.told is export
            if not reply.startswith(struct.pack(">Q", 0x3E889045565A9)):
                assert reply[:10] == struct.pack(">QH", export.size, export.flags)
                assert len(reply) in (10, 134)
            else:
                well_formed(reply)
            return
        if step.then is Then.GO:
            step = shake.refuse("another is connected")
            well_formed(step.reply)
        if step.then is Then.CLOSE:
            return


@examples(80)
@given(st.lists(options.filter(lambda o: len(o) >= 16), min_size=1, max_size=4))
def test_a_client_that_never_ends_is_ended(sent: list[bytes]) -> None:
    export = Export.of("xvdb", DiskGeometry(sectors=2048))
    shake = Handshake(lambda: export)
    shake.feed(struct.pack(">I", 3))
    stream, step = b"".join(sent), Step()
    for _ in range(2 * (OPTIONS + 1)):
        while len(stream) < shake.need:
            stream += b"".join(sent)
        part, stream = stream[: shake.need], stream[shake.need :]
        step = shake.feed(part)
        if step.then is Then.GO:
            step = shake.refuse("no")
        if step.then is Then.CLOSE:
            break
    assert step.then is Then.CLOSE
