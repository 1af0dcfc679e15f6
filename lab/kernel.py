"""Owns one thing: a kernel that an emulated guest starts sooner, unpacked from the packed one.

QEMU boots the ELF file inside a bzImage as well, by its PVH entry. A guest that has to unpack it
first spends a sixth of its boot on that, since it does it in emulation.
"""

from __future__ import annotations

import lzma
import subprocess

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\x00"
#: The ELF note that says where to enter: name "Xen", type XEN_ELFNOTE_PHYS32_ENTRY (18).
_PVH_NOTE = b"\x12\0\0\0Xen\0"


def unpacked(bzimage: bytes) -> bytes:
    """The ELF file inside a bzImage; the bzImage as it is where that is of no use to QEMU."""
    # https://docs.kernel.org/arch/x86/boot.html: setup_sects, payload_offset and payload_length
    payload_offset = int.from_bytes(bzimage[0x248:0x24C], "little")
    payload_length = int.from_bytes(bzimage[0x24C:0x250], "little")
    start = ((bzimage[0x1F1] or 4) + 1) * 512 + payload_offset
    payload = bzimage[start : start + payload_length]
    if payload.startswith(_LZ4_LEGACY):
        kernel = _unlz4(payload)
    elif payload.startswith(_XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(_ZSTD):
        # Its size stands behind it, which zstd takes for garbage: not its status counts.
        done = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True)
        kernel = done.stdout
    else:
        return bzimage
    return kernel if kernel.startswith(b"\x7fELF") and _PVH_NOTE in kernel else bzimage


def _unlz4(payload: bytes) -> bytes:
    """Blocks of LZ4's legacy frame, each after its size. Python has no module for it, and no
    package that the lab needs anyway brings the program.
    """
    kernel = bytearray()
    at = len(_LZ4_LEGACY)
    while at + 4 <= len(payload):
        size = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        if size > len(payload) - at:  # not a block: the size of the whole, at the end
            break
        kernel += _unlz4_block(payload[at : at + size])
        at += size
    return bytes(kernel)


def _unlz4_block(block: bytes) -> bytes:
    """https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md"""
    out = bytearray()
    at, end = 0, len(block)

    def more(length: int) -> int:
        """A length of 15 goes on in further bytes."""
        nonlocal at
        while length >= 15:
            byte = block[at]
            at += 1
            length += byte
            if byte != 255:
                break
        return length

    while at < end:
        token = block[at]
        at += 1
        literals = more(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= end:
            break  # the last sequence has no match
        offset = block[at] | block[at + 1] << 8
        at += 2
        length = more(token & 15) + 4
        start = len(out) - offset
        if offset >= length:
            out += out[start : start + length]
        else:  # it repeats what it is just writing
            pattern = out[start:]
            out += (pattern * (length // offset + 1))[:length]
    return bytes(out)
