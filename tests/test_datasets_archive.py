"""The bundle's file: its bytes are those of any other ZIP writer, and every other file is refused before it is read.

Hostile files are made with Python's zipfile, or by editing bytes at the places the format fixes:

    local header     signature 0, needs 4, flags 6, method 8, time 10, date 12, crc 14, stored 18, size 22, name 26
    central header   signature 0, made by 4, needs 6, flags 8, method 10, crc 16, stored 20, size 24, name 28,
                     extra 30, comment 32, disk 34, attributes 38, place 42
    end              signature 0, disks 4 6, counts 8 10, directory size 12, place 16, comment 20
"""

import errno
import os
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from focal.datasets.archive import Archive, open_archive, write_archive
from focal.datasets.bag import MAX_FILE_BYTES
from focal.errors import FocalError

from .bundle_tools import little_memory, plain_entry, refused, zip_entries

TOP = "walks-1.0.0"
STORE = "data/tasks/task_0000.zarr"
FILES = {
    "bag-info.txt": b"Author: Ada\n",
    "croissant.json": b"{}",
    f"{STORE}/rewards/c/0": bytes(range(256)),
    f"{STORE}/rewards/c/1": b"",
    f"{STORE}/zarr.json": b"{}\n",
}
LIMIT = 10**9


@pytest.fixture
def path(tmp_path) -> Path:
    """A good bundle file of five files."""
    write_archive(tmp_path / "x.focal.zip", TOP, FILES, FILES.__getitem__)
    return tmp_path / "x.focal.zip"


def make(path: Path, files: dict[str, bytes], change: Callable[[zipfile.ZipInfo], object] | None = None) -> Path:
    """Write a file of these full names with zipfile, the first entry's header changed."""
    entries = [(plain_entry(name), data) for name, data in files.items()]
    if change:
        change(entries[0][0])
    return zip_entries(path, entries)


def read_all(archive: Archive) -> dict[str, bytes]:
    return {name: archive.read(name, size) for name, size in archive.sizes().items()}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_made_meanwhile_is_kept(tmp_path, monkeypatch, links):
    out = tmp_path / "y.zip"

    def read(name):
        out.write_bytes(b"theirs")
        return FILES[name]

    if not links:

        def without(*names):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", without)
    with pytest.raises(FocalError, match=r"y\.zip was made by another command meanwhile, and is kept as it is"):
        write_archive(out, TOP, FILES, read)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"theirs"]
    out.unlink()
    write_archive(out, TOP, FILES, FILES.__getitem__)
    assert list(tmp_path.iterdir()) == [out]
    assert len(open_archive(out, LIMIT).sizes()) == len(FILES)


def edited(path: Path, place: int, new: bytes) -> Path:
    """Overwrite bytes; a negative place counts from the end."""
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(new)] = new
    path.write_bytes(data)
    return path


def u32(data: bytes, place: int) -> int:
    """The number at a place."""
    return struct.unpack_from("<L", data, place)[0]


def central_places(data: bytes) -> list[int]:
    """Where the central headers begin."""
    place, places = u32(data, len(data) - 6), []
    while data[place : place + 4] == b"PK\1\2":
        places.append(place)
        place += 46 + sum(struct.unpack("<3H", data[place + 28 : place + 34]))
    return places


def message_of(path: Path) -> str:
    """Open a hostile file; the refusal needs no memory and writes nothing."""
    before = sorted(path.parent.iterdir())
    with little_memory():
        message = refused(lambda: open_archive(path, LIMIT))
    assert sorted(path.parent.iterdir()) == before
    return message


# ---- what is written ----


def test_round_trip(path):
    archive = open_archive(path, LIMIT)
    assert archive.name == TOP
    assert read_all(archive) == FILES
    assert list(archive.sizes()) == sorted(FILES)
    assert archive.sizes(skip=("data",)) == {"bag-info.txt": 12, "croissant.json": 2}
    assert archive.sha256(f"{STORE}/rewards/c/1") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert archive.exists("croissant.json")
    assert not archive.exists("data")
    assert "'nothing' is missing" in refused(lambda: archive.read("nothing", 10))
    assert "larger than the 11 bytes" in refused(lambda: archive.read("bag-info.txt", 11))


def test_bytes_are_those_of_another_writer(path, tmp_path):
    other = make(tmp_path / "other.zip", {f"{TOP}/{name}": FILES[name] for name in sorted(FILES)})
    assert path.read_bytes() == other.read_bytes()


def test_files_are_sorted_whatever_their_order(path, tmp_path):
    write_archive(tmp_path / "y.zip", TOP, reversed(list(FILES)), FILES.__getitem__)
    assert (tmp_path / "y.zip").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count", [65_534, 65_535, 70_000])
def test_more_files_than_the_old_format_counts(tmp_path, count):
    """Zip64 begins at 65,535 files, the number that says `look there` (zipfile itself begins one later)."""
    names = [f"{STORE}/rewards/c/{number}" for number in range(count)]
    path = tmp_path / "many.zip"
    write_archive(path, TOP, names, lambda name: name[-5:].encode())
    archive = open_archive(path, LIMIT)
    assert len(archive.sizes()) == count
    assert archive.read(names[-1], 5) == names[-1][-5:].encode()
    data = path.read_bytes()
    assert (b"PK\6\6" in data[-200:]) == (count >= 65_535)
    with zipfile.ZipFile(path) as other:
        assert len(other.infolist()) == count
        assert other.read(f"{TOP}/{names[77]}") == names[77][-5:].encode()
    if count == 70_000:
        make(tmp_path / "other.zip", {f"{TOP}/{name}": name[-5:].encode() for name in sorted(names)})
        assert data == (tmp_path / "other.zip").read_bytes()
        if shutil.which("unzip"):
            subprocess.run(["unzip", "-tqq", path], check=True)
        end = len(data) - 22 - 20 - 56
        for place in range(end, len(data)):  # every byte of the three end records counts
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            refused(lambda: open_archive(path, LIMIT))


@pytest.mark.slow
def test_beyond_four_gigabytes(tmp_path):
    """Nine files of 512 MiB and a small one behind them, whose place needs 64 bits."""
    names = [f"{STORE}/rewards/c/{number}" for number in range(9)] + [f"{STORE}/zarr.json"]
    big, path = bytes(MAX_FILE_BYTES), tmp_path / "big.zip"
    write_archive(path, TOP, names, lambda name: b"{}" if name.endswith("json") else big)
    assert path.stat().st_size > 2**32
    archive = open_archive(path, 10**10)
    assert archive.entries[names[-1]].place > 2**32
    assert archive.read(names[-1], 2) == b"{}"
    assert archive.read(names[8], MAX_FILE_BYTES) == big
    with zipfile.ZipFile(path) as other:
        assert other.read(f"{TOP}/{names[-1]}") == b"{}"
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tqq", path], check=True)


# ---- accidents ----


def test_every_flipped_byte_is_found(path):
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(FocalError):
            read_all(open_archive(path, LIMIT))


def test_every_length_it_is_cut_to_is_found(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(lambda: open_archive(path, LIMIT))


def test_every_inserted_byte_is_found(path):
    data = path.read_bytes()
    for place in range(len(data) + 1):
        path.write_bytes(data[:place] + b"\0" + data[place:])
        with pytest.raises(FocalError):
            read_all(open_archive(path, LIMIT))


def test_what_is_no_bundle(tmp_path):
    for content in (b"", b"hello", b"\0" * 100, b"PK\3\4" + bytes(18)):
        (tmp_path / "x").write_bytes(content)
        refused(lambda: open_archive(tmp_path / "x", LIMIT))
    with pytest.raises(FocalError, match="cannot read"):
        open_archive(tmp_path / "nothing", LIMIT)
    os.mkfifo(tmp_path / "pipe")
    assert "is no plain file" in refused(lambda: open_archive(tmp_path / "pipe", LIMIT))
    with zipfile.ZipFile(tmp_path / "empty", "w"):
        pass
    assert "holds no folder" in message_of(tmp_path / "empty")


def test_changed_after_it_was_opened(path):
    archive = open_archive(path, LIMIT)
    path.write_bytes(path.read_bytes().replace(b"Author", b"author"))
    assert "'bag-info.txt' is damaged (its CRC-32 differs)" in refused(lambda: archive.read("bag-info.txt", 100))
    path.write_bytes(b"PK")
    with pytest.raises(FocalError, match=r"cannot read .*: it ends before byte"):
        archive.sha256("bag-info.txt")


# ---- hostile authors ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.txt", "leaves the bundle's folder (..)"),
        (f"{TOP}/../../evil.txt", "leaves the bundle's folder (..)"),
        (f"{TOP}/data/../../../evil.txt", "leaves the bundle's folder (..)"),
        ("/etc/passwd", "is absolute"),
        (f"{TOP}/data/./dataset.json", "has an empty part"),
        (f"{TOP}//data/dataset.json", "has an empty part"),
        (f"{TOP}\\data\\dataset.json", "holds a backslash or a colon"),
        ("C:/windows/system32", "holds a backslash or a colon"),
        (f"{TOP}/bag-info.txt:stream", "holds a backslash or a colon"),
        (f"{TOP}/bag\x00info.txt", "control character"),
        (f"{TOP}/bag\ninfo.txt", "control character"),
        (f"{TOP}/\u202etxt.exe", "control character"),
        (f"{TOP}/e\u0301.txt", "composed form (NFC)"),
        (f"{TOP}/\u00e9.txt", "is none a bundle has"),
        (f"{TOP}/{STORE}/infos/aux/zarr.json", "is reserved on Windows"),
        (f"{TOP}/NUL.txt", "is reserved on Windows"),
        (f"{TOP}/data./dataset.json", "ends in a dot or a space"),
        (f"{TOP}/data /dataset.json", "ends in a dot or a space"),
        (f"{TOP}/{STORE}/" + "a/" * 5 + "0", "folders deep"),
        (f"{TOP}/" + "a" * 300, "longer than 255"),
        (f"{TOP}/inner.zip", "is none a bundle has"),
        (f"{TOP}/data/tasks/task_0000.zip", "is none a bundle has"),
        (f"{TOP}/data/tasks/task_0000.zarr/arrays.npz", "is none a bundle has"),
        (f"{TOP}/data/policies/task_0000/agent.pkl", "is none a bundle has"),
        (f"{TOP}/data/setup.py", "is none a bundle has"),
        (f"{TOP}/data/staging/header.json", "is none a bundle has"),
        (f"{TOP}/run.sh", "is none a bundle has"),
        ("elsewhere-1.0.0/bag-info.txt", "lies outside its one folder"),
        ("bag-info.txt", "lies outside its one folder"),
        (f"{TOP}/data/", "is a folder's entry"),
    ],
)  # fmt: skip
def test_names_are_refused(tmp_path, name, message):
    entries = [(plain_entry(f"{TOP}/croissant.json"), b"{}"), (plain_entry(TOP), b"x")]
    entries[1][0].filename = name  # ZipInfo itself cuts a name at NUL
    assert message in message_of(zip_entries(tmp_path / "x.zip", entries))


def test_a_name_that_is_not_utf8(path):
    data = path.read_bytes().replace(b"croissant.json", b"\xff\xfeoissant.json")
    path.write_bytes(data)
    assert "holds a backslash or a colon" in message_of(path)  # as the bytes are shown


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bag-info.txt", "bag-info.txt"], "is there twice"),
        (["data/policies/task_0000/A.json", "data/policies/task_0000/a.json"], "are one file on some systems"),
        ([f"{STORE}/rewards/c/0", f"{STORE}/rewards/c/0/0"], "is a file and the folder of"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_collide(tmp_path, names, message):
    path = zip_entries(tmp_path / "x.zip", [(plain_entry(f"{TOP}/{name}"), b"{}") for name in names])
    assert message in message_of(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ((stat.S_IFLNK | 0o777) << 16, "is a symbolic link"),
        ((stat.S_IFIFO | 0o644) << 16, "is not a plain file"),
        ((stat.S_IFCHR | 0o644) << 16, "is not a plain file"),
        ((stat.S_IFDIR | 0o755) << 16, "is not a plain file"),
        ((stat.S_IFREG | 0o4755) << 16, "unexpected header fields"),
        (0, "unexpected header fields"),
    ],
)
def test_only_plain_files(tmp_path, attributes, message):
    files = {f"{TOP}/bag-info.txt": b"/etc/passwd", f"{TOP}/croissant.json": b"{}"}
    path = make(tmp_path / "x.zip", files, lambda entry: setattr(entry, "external_attr", attributes))
    assert message in message_of(path)


def test_a_deflate_bomb(tmp_path):
    """500 MB of zeros in half a megabyte; it is refused for being compressed at all."""
    path = tmp_path / "bomb.zip"
    entry = plain_entry(f"{TOP}/data/dataset.json")
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive, archive.open(entry, "w") as file:
        for _ in range(500):
            file.write(bytes(10**6))
    assert path.stat().st_size < 10**6
    message = message_of(path)
    assert "'data/dataset.json' is compressed (method 8), expected stored" in message
    assert "unzip it and give the folder" in message, "for whoever merely packed it anew"


def test_overlapping_entries(path):
    """Two names for the same bytes: how 12 kB become 500 MB."""
    data = path.read_bytes()
    first, second, *_ = central_places(data)
    edited(path, second + 42, data[first + 42 : first + 46])
    assert "it overlaps the file before it" in message_of(path)


@pytest.mark.parametrize("where", ["before", "between", "directory", "after", "comment"])
def test_hidden_data(path, where):
    data = bytearray(path.read_bytes())
    hidden, places, end = b"#!/bin/sh\n", central_places(data), len(data) - 22
    if where == "after":
        path.write_bytes(data + hidden)
        assert "data were added at its end" in message_of(path)
    elif where == "comment":
        data[-2:] = struct.pack("<H", len(hidden))
        path.write_bytes(data + hidden)
        assert "data were added at its end" in message_of(path)
    else:  # what is behind the hidden data moves, and its places are corrected
        moved = {"before": places, "between": places[1:], "directory": []}[where]
        begin = u32(data, moved[0] + 42) if moved else u32(data, end + 16)
        for place in (*(place + 42 for place in moved), end + 16):
            data[place : place + 4] = struct.pack("<L", u32(data, place) + len(hidden))
        path.write_bytes(data[:begin] + hidden + data[begin:])
        with zipfile.ZipFile(path) as lenient:
            assert lenient.testzip() is None, "zipfile lets it pass"
        expected = {"before": "does not begin like a ZIP file", "directory": "bytes are hidden between"}
        assert expected.get(where, "data are hidden before it") in message_of(path)


def test_hidden_data_that_look_like_a_file(path):
    """A local file in front that no directory lists."""
    data = bytearray(path.read_bytes())
    places = central_places(data)
    hidden = bytes(data[: u32(data, places[1] + 42)])
    for place in (*(place + 42 for place in places), len(data) - 6):
        data[place : place + 4] = struct.pack("<L", u32(data, place) + len(hidden))
    path.write_bytes(hidden + data)
    assert "begins at byte 66, expected 0: data are hidden before it" in message_of(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (6, b"\1\0", "has another header before its content"),
        (8, b"\x08\0", "has another header before its content"),
        (18, struct.pack("<L", 500), "has another header before its content"),
        (22, struct.pack("<L", 5), "has another header before its content"),
        (26, struct.pack("<H", 3), "has another header before its content"),
        (28, struct.pack("<H", 1), "has another header before its content"),
        (30, b"evil", "has another header before its content"),
    ],
)
def test_local_headers_that_lie(path, place, value, message):
    assert message in message_of(edited(path, place, value))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (8, b"\1\0", "is encrypted"),
        (8, b"\x08\0", "unexpected header fields"),
        (10, b"\x0c\0", "is compressed (method 12)"),
        (12, b"\xff\xff", "unexpected header fields"),
        (16, b"\0\0\0\0", "has another header before its content"),
        (20, struct.pack("<L", 11), "claims 11 bytes stored and 12 unpacked"),
        (24, struct.pack("<L", 2**31), "claims 12 bytes stored and 2147483648 unpacked"),
        (20, struct.pack("<2L", 2**31, 2**31), "claims 2147483648 bytes, more than there are"),
        (20, struct.pack("<2L", 13, 13), "unexpected header fields|has another header"),
        (28, struct.pack("<H", 60_000), "central directory is damaged|is no folder|holds"),
        (34, b"\1\0", "unexpected header fields"),
        (42, struct.pack("<L", 2**32 - 1), "data are hidden before it"),
    ],
)
def test_central_headers_that_lie(path, place, value, message):
    edited(path, central_places(path.read_bytes())[0] + place, value)
    text = message_of(path)
    assert any(part in text for part in message.split("|")), text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (-18, b"\1\0", "its end record has unexpected fields"),
        (-14, b"\4\0\4\0", "central directory is longer than its 4 files need"),
        (-14, b"\6\0\6\0", "lists fewer files than 6"),
        (-14, b"\xff\xff\xff\xff", "claims"),
        (-10, struct.pack("<L", 2**31), "claims a central directory of 2147483648 bytes for 5 files"),
        (-6, struct.pack("<L", 2**31), "claims a central directory behind its end"),
        (-6, struct.pack("<L", 10), "data are hidden or missing before its end"),
        (-2, b"\1\0", "its end record has unexpected fields"),
    ],
)
def test_ends_that_lie(path, place, value, message):
    assert message in message_of(edited(path, place, value))


def with_zip64_end(path: Path, count: int, size: int, place: int) -> Path:
    """Replace the end by zip64 records that claim these, and an old end that says `look there`."""
    data = path.read_bytes()[:-22]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 3 << 8 | 45, 45, 0, 0, count, count, size, place)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data), 1)
    path.write_bytes(
        data + record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[65535] * 2, *[2**32 - 1] * 2, 0)
    )
    return path


def test_zip64_tricks(path):
    data = path.read_bytes()
    size, place = struct.unpack("<2L", data[-10:-2])
    for count, claimed, message in (
        (5, size, "data are hidden or missing before its end"),  # needed by nothing here
        (2**63, size, "claims 9223372036854775808 files, expected at most 1000000"),
        (10**6, 2**64 - 1, "claims a central directory of 18446744073709551615 bytes"),
        (10**6, 10**8, "claims a central directory behind its end"),
    ):
        path.write_bytes(data)
        assert message in message_of(with_zip64_end(path, count, claimed, place))
    path.write_bytes(data)
    assert "behind its end" in message_of(with_zip64_end(path, 5, size, 2**64 - 1))
    path.write_bytes(data)
    edited(path, -14, b"\xff\xff\xff\xff")
    assert "claims" in message_of(path)  # the bytes where the record should be are something else


def test_zip64_place_where_none_is_needed(tmp_path):
    """The same place told by an extra field: other readers may prefer one or the other."""

    def add_extra(entry: zipfile.ZipInfo) -> None:
        entry.extra = struct.pack("<2HQ", 1, 8, 0)

    path = make(tmp_path / "x.zip", {f"{TOP}/bag-info.txt": b"1", f"{TOP}/croissant.json": b"{}"}, add_extra)
    edited(path, central_places(path.read_bytes())[0] + 42, b"\xff\xff\xff\xff")
    assert "unexpected header fields" in message_of(path)


def test_sizes_beyond_the_limits(path, tmp_path):
    size = path.stat().st_size
    open_archive(path, size)
    message = refused(lambda: open_archive(path, size - 1))
    assert f"has {size} bytes, more than the {size - 1} allowed; raise --max-size" in message


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(path):
    with open(path, "r+b") as file:
        file.truncate(10**12)
    assert "more than the" in message_of(path)


def test_unsorted_files(tmp_path):
    path = make(tmp_path / "x.zip", {f"{TOP}/croissant.json": b"{}", f"{TOP}/bag-info.txt": b"x"})
    assert "are not sorted by name" in message_of(path)


def test_packed_anew_with_another_program(path, tmp_path):
    if not shutil.which("zip"):
        pytest.skip("no zip program")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    subprocess.run(["zip", "-qr0", "again.zip", TOP], cwd=tmp_path, check=True)
    assert "unzip it and give the folder instead: focal-cli bundle verify FOLDER" in message_of(tmp_path / "again.zip")
