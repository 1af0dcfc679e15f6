"""The quick yes to a qcow2: given to what is sound, never to what qemu-img finds damaged."""

import errno
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.disks import images
from shared.disks.errors import ImageDamaged
from shared.disks.qcow2 import below, plainly_sound

MIB = 1 << 20
CLUSTER = 65536
COPIED = 1 << 63


def made(path: Path, *options: str, size: str = "64M") -> Path:
    """An image in which a guest has written, discarded and zeroed."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(create, check=True)
    wrote(path, "write -P 7 0 1M", "write -P 8 20M 3M", "discard 21M 1M", "write -z 22M 512k")
    return path


def wrote(path: Path, *commands: str) -> None:
    told = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *told, str(path)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("qcow2") / "image.qcow2")


def header(path: Path) -> dict[str, int]:
    data = path.read_bytes()[:104]
    names = {"l1_at": (">Q", 40), "counts_at": (">Q", 48)}
    return {name: struct.unpack_from(form, data, at)[0] for name, (form, at) in names.items()}


def put(path: Path, at: int, form: str, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))


def got(path: Path, at: int) -> int:
    with path.open("rb") as file:
        file.seek(at)
        value: int = struct.unpack(">Q", file.read(8))[0]
        return value


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), "64M"),
        (("-o", "cluster_size=4k"), "200M"),
        (("-o", "cluster_size=2M"), "1G"),
        (("-o", "preallocation=metadata"), "64M"),
        (("-o", "lazy_refcounts=on"), "64M"),
        ((), "3T"),
    ],
)
def test_sound_images_need_no_process(tmp_path: Path, options: tuple[str, ...], size: str) -> None:
    """Whatever its cluster size and length, a plain image that is in order is told so here."""
    path = made(tmp_path / "a.qcow2", *options, size=size)
    assert plainly_sound(path)
    images.check_by_qemu(path, "qcow2")
    subprocess.run(["qemu-img", "resize", "-q", str(path), "+5G"], check=True)
    assert plainly_sound(path)


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "compat=0.10"),
        ("-o", "refcount_bits=64"),
        ("-o", "extended_l2=on"),
        ("-o", "compression_type=zstd"),
    ],
)
def test_other_kinds_are_qemus_to_judge(tmp_path: Path, options: tuple[str, ...]) -> None:
    """No yes to features that are not read here; the check as a whole passes all the same."""
    path = made(tmp_path / "a.qcow2", *options)
    assert not plainly_sound(path)
    images.check(path, "qcow2")


def test_what_refers_to_more_is_qemus_to_judge(tmp_path: Path, image: Path) -> None:
    """Snapshots and bitmaps have tables of their own; an overlay has another file."""
    with_snapshot = Path(shutil.copy(image, tmp_path / "snapshot.qcow2"))
    subprocess.run(["qemu-img", "snapshot", "-c", "one", str(with_snapshot)], check=True)
    with_bitmap = Path(shutil.copy(image, tmp_path / "bitmap.qcow2"))
    subprocess.run(["qemu-img", "bitmap", "--add", str(with_bitmap), "one"], check=True)
    compressed = tmp_path / "compressed.qcow2"
    convert = ["qemu-img", "convert", "-c", "-O", "qcow2", str(image), str(compressed)]
    subprocess.run(convert, check=True)
    overlay = tmp_path / "overlay.qcow2"
    over = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2"]
    subprocess.run([*over, str(overlay)], check=True)
    for path in (with_snapshot, with_bitmap, compressed, overlay):
        assert not plainly_sound(path)
        images.check(path, "qcow2")


def test_very_many_tables_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small sparse file may name so many that they would take all memory: qemu-img's to judge."""
    path = tmp_path / "wide.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1T"], check=True)
    at = header(path)["l1_at"]
    for number in range(2000):
        put(path, at + 8 * number, ">Q", COPIED | (100 + number) * CLUSTER)
    os.truncate(path, 2100 * CLUSTER)
    read: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda _file, _buffers, at: read.append(at))
    assert not plainly_sound(path)
    assert read == []


def _first_data(path: Path) -> tuple[int, int]:
    """Where the first entry of the first level 2 table is, and what it says."""
    at = got(path, header(path)["l1_at"]) & ~COPIED
    return at, got(path, at)


def _twice(path: Path) -> None:
    at, entry = _first_data(path)
    put(path, at + 8, ">Q", entry)


def _past_the_end(path: Path) -> None:
    at, _ = _first_data(path)
    put(path, at, ">Q", COPIED | 1 << 40)


def _crooked(path: Path) -> None:
    at, entry = _first_data(path)
    put(path, at, ">Q", entry + 512)


def _not_counted(path: Path) -> None:
    _, entry = _first_data(path)
    block = got(path, header(path)["counts_at"])
    put(path, block + (entry & ~COPIED) // CLUSTER * 2, ">H", 0)


def _onto_the_header(path: Path) -> None:
    at, _ = _first_data(path)
    put(path, at, ">Q", COPIED)


def _shared_table(path: Path) -> None:
    at = header(path)["l1_at"]
    put(path, at + 8, ">Q", got(path, at))


def _cut(path: Path) -> None:
    os.truncate(path, 5 * CLUSTER)


@pytest.mark.parametrize(
    "damage",
    [
        _twice,
        _past_the_end,
        _crooked,
        _not_counted,
        _shared_table,
        _cut,
    ],
)
def test_damage_is_never_called_sound(tmp_path: Path, damage: Any) -> None:
    """Each kind that qemu-img finds; it is the one that says what is wrong."""
    path = made(tmp_path / "a.qcow2", size="2G")
    damage(path)
    assert not plainly_sound(path)
    with pytest.raises(ImageDamaged):
        images.check(path, "qcow2")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_yes_is_only_said_where_qemu_finds_nothing(image: Path, data: st.DataObject) -> None:
    """Whatever bytes of header and tables change: no yes to what qemu-img calls damaged."""
    tables = [0, header(image)["l1_at"], header(image)["counts_at"]]
    tables += [got(image, header(image)["counts_at"]), _first_data(image)[0]]
    path = image.with_name("changed.qcow2")
    shutil.copy(image, path)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(tables)) + data.draw(st.integers(0, 255))
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data.draw(st.integers(0, 255))]))
    if plainly_sound(path):
        done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True)
        assert done.returncode in (0, 3), done.stderr


def overlay(folder: Path, name: str, on: str, *options: str, image_format: str = "qcow2") -> Path:
    """An image on that one, which is named as it is given."""
    made = folder / name
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", on, "-F", image_format]
    subprocess.run([*create, *options, str(made), "1M"], check=True, cwd=folder)
    return made


def test_a_chain_is_followed_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By relative and absolute names, through a link, with spaces, down to a raw file; also where
    one is not there."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    middle = overlay(tmp_path / "elsewhere", "the middle.qcow2", "../base.raw", image_format="raw")
    (tmp_path / "link.qcow2").symlink_to(middle)
    first = overlay(tmp_path, "first.qcow2", str(tmp_path / "link.qcow2"))
    lost = overlay(tmp_path, "lost.qcow2", "gone.qcow2")
    alone = made(tmp_path / "alone.qcow2")
    by_qemu = {each: images.chain(each, "qcow2") for each in (first, middle, lost, alone)}
    monkeypatch.setattr(images, "below", lambda path: None)
    told = {each: images.chain(each, "qcow2") for each in by_qemu}

    assert below(middle) == [tmp_path / "elsewhere/../base.raw"]
    assert below(lost) == [tmp_path / "gone.qcow2"]
    assert below(alone) == []
    resolved = {each: [path.resolve() for path in found] for each, found in by_qemu.items()}
    assert resolved == {each: [path.resolve() for path in found] for each, found in told.items()}
    assert resolved[middle] == [tmp_path / "base.raw"]
    assert resolved[lost] == resolved[alone] == []


def test_what_is_below_an_unreadable_image_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image itself is, by what is above it."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    middle = overlay(tmp_path, "middle.qcow2", "base.raw", image_format="raw")
    first = overlay(tmp_path, "first.qcow2", "middle.qcow2")
    opened = Path.open

    def fail(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == middle:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", fail)
    assert images.chain(first, "qcow2") == [middle]


def test_a_chain_through_a_device_is_for_qemu(tmp_path: Path) -> None:
    """None is no verdict; it may go on below that."""
    device = tmp_path / "device"
    os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    overlay(tmp_path, "first.qcow2", "device")
    assert below(tmp_path / "first.qcow2") is None


@pytest.mark.parametrize(
    "how", ["version 2", "a protocol", "another format", "a data file", "a loop"]
)
def test_a_chain_that_is_not_plain_is_for_qemu(tmp_path: Path, how: str) -> None:
    """None is no verdict."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    options: list[str] = {
        "version 2": ["-o", "compat=0.10"],
        "a data file": ["-o", "data_file=data.raw"],
    }.get(how, [])
    name = {"a protocol": "nbd://localhost/x", "a loop": "first.qcow2"}.get(how, "base.raw")
    if how == "a data file":
        create = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "first.qcow2", "1M"]
        subprocess.run(create, check=True, cwd=tmp_path)
    else:
        image_format = {"another format": "vmdk", "a loop": "qcow2"}.get(how, "raw")
        overlay(tmp_path, "first.qcow2", name, *options, image_format=image_format)
    assert below(tmp_path / "first.qcow2") is None
