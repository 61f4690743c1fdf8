"""Gzip headers: what the format forbids is damage, as it is to zlib; found by tests/fuzz."""

from __future__ import annotations

import gzip
import zlib

import pytest

from img2parquet.read.gzip_stream import GzipBytes

EXTRAS = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x03\0abc" + b"name\0" + b"comment\0"
DEFLATED = gzip.compress(b"image" * 100, mtime=0)[10:]


def read(data: bytes) -> tuple[bytes, str]:
    source = GzipBytes(iter([data]))
    return source.take(10_000), source.fault


def test_a_header_with_everything_in_it_is_read() -> None:
    checksum = (zlib.crc32(EXTRAS) & 0xFFFF).to_bytes(2, "little")
    assert read(EXTRAS + checksum + DEFLATED) == (b"image" * 100, "")


@pytest.mark.parametrize("flag", [0x20, 0x40, 0x80])
def test_reserved_flags_are_damage(flag: int) -> None:
    data, fault = read(b"\x1f\x8b\x08" + bytes([flag]) + bytes(6) + DEFLATED)
    assert data == b"" and "header is damaged" in fault


def test_a_header_with_a_wrong_checksum_is_damage() -> None:
    data, fault = read(EXTRAS + b"\0\0" + DEFLATED)
    assert data == b"" and "header is damaged" in fault


def test_damage_in_a_second_member_leaves_the_first() -> None:
    data, fault = read(gzip.compress(b"first") + b"\x1f\x8b\x08\x40" + bytes(6) + DEFLATED)
    assert data == b"first" and "header is damaged" in fault
