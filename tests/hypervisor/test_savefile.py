"""libvirt's save file, byte by byte, and what is not touched in it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from shared.hypervisor.errors import MemoryNotUsable
from shared.hypervisor.savefile import SaveFile

XML = "<domain>\n  <name>web1</name>\n</domain>\n"
COOKIE = "<cookie>\n  <slirpHelper/>\n</cookie>\n"
STREAM = b"QEVM\0\0\0\3 and what else QEMU writes"
ROOM = 128
HEADER = bytes.fromhex(
    "4c69627669727451656d7564536176650200000080000000000000000000000028000000" + 56 * "00"
)
"""As libvirt 9.0 writes it on x86: version 2, `data_len` 128, paused, not compressed, and the
cookie 40 bytes after the beginning of the XML."""


def golden(header: bytes = HEADER, data: bytes | None = None) -> bytes:
    if data is None:
        data = XML.encode() + b"\0" + COOKIE.encode() + b"\0"
    return header + data.ljust(ROOM, b"\0") + STREAM


def changed(offset: int, number: int) -> bytes:
    header = bytearray(HEADER)
    struct.pack_into("=I", header, offset, number)
    return bytes(header)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "memory.save"
    path.write_bytes(golden())
    return path


def test_a_save_file_is_read(saved: Path) -> None:
    """Definition and cookie are what stands between header and stream."""
    assert SaveFile.read(saved) == SaveFile(ROOM, 0, 0, XML, COOKIE)


def test_what_was_read_is_written_again(saved: Path) -> None:
    """To the byte, the stream included."""
    SaveFile.read(saved).write_to(saved)
    assert saved.read_bytes() == golden()


def test_another_definition_leaves_the_stream_where_it_is(saved: Path) -> None:
    """The cookie follows the definition wherever that ends; nothing of the old one is left."""
    short = "<domain><name>x</name></domain>"
    SaveFile.read(saved).with_definition(short).write_to(saved)

    data = short.encode() + b"\0" + COOKIE.encode() + b"\0"
    assert saved.read_bytes() == golden(changed(32, len(short) + 1), data)
    assert SaveFile.read(saved) == SaveFile(ROOM, 0, 0, short, COOKIE)


def test_a_save_file_without_a_cookie(saved: Path) -> None:
    """It has no offset then, before and after."""
    bare = golden(changed(32, 0), XML.encode() + b"\0")
    saved.write_bytes(bare)
    assert SaveFile.read(saved).cookie is None
    SaveFile.read(saved).write_to(saved)
    assert saved.read_bytes() == bare


def test_a_compressed_stream_is_none_of_our_business(saved: Path) -> None:
    """libvirt decompresses it; the number that says how stays."""
    saved.write_bytes(golden(changed(28, 5)))
    SaveFile.read(saved).with_definition(XML.replace("web1", "web2")).write_to(saved)
    assert SaveFile.read(saved).compressed == 5
    assert saved.read_bytes().endswith(STREAM)


def test_a_definition_that_does_not_fit_is_refused(saved: Path) -> None:
    """It may fill the room to the last byte, and nothing is written past that."""
    stored = SaveFile.read(saved)
    room = ROOM - len(COOKIE) - 2
    assert stored.with_definition("x" * room).data_len == ROOM
    with pytest.raises(MemoryNotUsable, match="shorter name"):
        stored.with_definition("x" * room + "x")
    assert saved.read_bytes() == golden()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "shorter than its header"),
        (golden(b"LibvirtQemudPart" + HEADER[16:]), "unfinished"),
        (golden(changed(16, 3)), "version 3"),
        (golden(changed(16, 2 << 24)), "version"),  # the other byte order
        (golden(changed(20, 0)), "header"),
        (golden(changed(20, 1 << 30)), "header"),
        (golden(changed(20, 4096)), "ends before"),
        (golden(changed(32, ROOM)), "header"),
        (golden(data=b"x" * ROOM), "cannot be read"),
        (golden(data=b"\xff\0\0"), "cannot be read"),
    ],
)
def test_what_is_not_known_is_refused(saved: Path, content: bytes, why: str) -> None:
    """A file of another version or make is not guessed at."""
    saved.write_bytes(content)
    with pytest.raises(MemoryNotUsable, match=why):
        SaveFile.read(saved)
    assert saved.read_bytes() == content
