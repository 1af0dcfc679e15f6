"""libvirt's save file: a header, the domain's definition, and QEMU's own stream after it.

Owns: reading the definition out of one, and putting another into a copy of it. libvirt itself
exchanges a definition (`virsh save-image-define`) only for one of the same name and UUID.

The layout is libvirt's `virQEMUSaveHeader` (src/qemu/qemu_saveimage.h), numbers in the host's
byte order. `data_len` bytes follow it: the XML, NUL, libvirt's cookie where there is one, NUL,
and zeros up to where the stream begins, which must stay where it is. Nothing of the stream is
looked at, so it may be compressed in any way.
"""

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from shared.hypervisor.errors import MemoryNotUsable

MAGIC = b"LibvirtQemudSave"
VERSION = 2
_HEADER = struct.Struct("=16s5I56x")  # magic, version, data_len, was_running, compressed, cookie
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class SaveFile:
    """What stands before the stream; `data_len` bytes have room for definition and cookie."""

    data_len: int
    was_running: int
    compressed: int
    xml: str
    cookie: str | None

    @classmethod
    def read(cls, path: Path) -> "SaveFile":
        """Raises MemoryNotUsable for a file that libvirt did not finish, or of another version."""
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise _unknown(path, "it is shorter than its header")
            magic, version, data_len, was_running, compressed, cookie_at = _HEADER.unpack(header)
            if magic != MAGIC:
                raise _unknown(path, "it is not a save file of libvirt's, or an unfinished one")
            if version != VERSION:
                raise _unknown(path, f"it is of version {version}, and {VERSION} is known here")
            if not cookie_at < data_len <= _MOST_BYTES:
                raise _unknown(path, f"its header tells of {data_len} bytes")
            data = file.read(data_len)
        if len(data) < data_len:
            raise _unknown(path, "it ends before its definition does")
        try:
            xml = _text(data)
            cookie = _text(data[cookie_at:]) if cookie_at else None
        except ValueError as error:
            raise _unknown(path, f"its definition cannot be read ({error})") from error
        return cls(data_len, was_running, compressed, xml, cookie)

    def with_definition(self, xml: str) -> "SaveFile":
        """The same memory for another definition. Raises MemoryNotUsable where it has no room."""
        changed = replace(self, xml=xml)
        if len(changed._data) > self.data_len:
            raise MemoryNotUsable(
                f"The clone's definition has {len(changed._data)} bytes, and the saved memory has "
                f"room for {self.data_len}. Choose a shorter name or directory for the clone."
            )
        return changed

    def write_to(self, path: Path) -> None:
        """Write this before the stream in `path`, a copy of the file that it was read from."""
        cookie_at = 0 if self.cookie is None else len(self.xml.encode()) + 1
        header = _HEADER.pack(
            MAGIC, VERSION, self.data_len, self.was_running, self.compressed, cookie_at
        )
        with path.open("r+b") as file:
            file.write(header + self._data.ljust(self.data_len, b"\0"))

    @property
    def _data(self) -> bytes:
        parts = [self.xml] if self.cookie is None else [self.xml, self.cookie]
        return b"".join(part.encode() + b"\0" for part in parts)


def _text(data: bytes) -> str:
    end = data.index(b"\0")
    return data[:end].decode()


def _unknown(path: Path, why: str) -> MemoryNotUsable:
    return MemoryNotUsable(
        f"The memory saved in {os.fspath(path)} cannot be used: {why}. Nothing was changed; go on "
        "without the memory."
    )
