# SPDX-License-Identifier: BSD-2-Clause
"""Virtual device numbers of vbds and the names that go with them. Pure.

Rules from Xen's docs/man/xen-vbd-interface.7: a number encodes what the guest should call the
disk.

    1 << 28 | disk << 8 | partition    xvd, disks from 16 or partitions from 16 on ("extended")
    202 << 8 | disk << 4 | partition   xvd, disks 0..15, partitions 0..15
      8 << 8 | disk << 4 | partition   sd,  disks 0..15, partitions 0..15
      3 << 8 | disk << 6 | partition   hd,  disks 0..1, partitions 0..63
     22 << 8 | (disk - 2) << 6 | partition   hd, disks 2..3
    2 << 28 onwards                    reserved

A disk is a letter or more: a..z, aa..zz, ... Partition 0 is the whole disk. What has no name of
this kind is called by its number.
"""

from __future__ import annotations

import re

_XVD, _SD, _HD, _HD2 = 202, 8, 3, 22
_EXTENDED = 1 << 28
_MAX_EXTENDED_DISK = (1 << 20) - 1

_NAME = re.compile(r"(xvd|sd|hd)([a-z]{1,5})(\d{0,3})")
_NUMBER = re.compile(r"\d{1,10}")
# "d2p3": disk 2, partition 3, as the document and xl call it independently of any driver.
_PLAIN = re.compile(r"d(\d{1,7})(?:p(\d{1,3}))?")


def vdev_name(number: int) -> str:
    """`xvdb` for 51728, `xvdaa` for an extended number, the decimal number itself if unnamed."""
    if number < 0:
        return str(number)
    if number >= _EXTENDED:
        if number >= 2 * _EXTENDED:
            return str(number)
        return _spell("xvd", number >> 8 & _MAX_EXTENDED_DISK, number & 0xFF)
    major, minor = number >> 8, number & 0xFF
    if major == _XVD:
        return _spell("xvd", minor >> 4, minor & 0xF)
    if major == _SD:
        return _spell("sd", minor >> 4, minor & 0xF)
    if major in (_HD, _HD2) and minor >> 6 < 2:
        return _spell("hd", (minor >> 6) + (2 if major == _HD2 else 0), minor & 0x3F)
    return str(number)


def parse_name(text: str) -> int | None:
    """The number behind `xvdb`, `xvdb1`, `sda`, `hdc`, `d1p2` or `51728`; None for anything else.

    A path in /dev is a name too: `/dev/xvdb`.
    """
    text = text.strip().removeprefix("/dev/").removeprefix("pvfront/")
    if _NUMBER.fullmatch(text):
        number = int(text)
        return number if number < 1 << 32 else None
    plain = _PLAIN.fullmatch(text)
    if plain:
        return _xvd(int(plain[1]), int(plain[2] or 0))
    match = _NAME.fullmatch(text)
    if match is None or match[3].startswith("0"):
        return None
    disk = _disk_number(match[2])
    partition = int(match[3] or 0)
    if match[1] == "xvd":
        return _xvd(disk, partition)
    if match[1] == "sd":
        return _SD << 8 | disk << 4 | partition if disk < 16 and partition < 16 else None
    if disk < 4 and partition < 64:
        return (_HD if disk < 2 else _HD2) << 8 | (disk & 1) << 6 | partition
    return None


def _xvd(disk: int, partition: int) -> int | None:
    if disk < 16 and partition < 16:
        return _XVD << 8 | disk << 4 | partition
    if disk <= _MAX_EXTENDED_DISK and partition < 256:
        return _EXTENDED | disk << 8 | partition
    return None


def _spell(prefix: str, disk: int, partition: int) -> str:
    letters = ""
    disk += 1
    while disk:
        disk, digit = divmod(disk - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"{prefix}{letters}{partition or ''}"


def _disk_number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1
