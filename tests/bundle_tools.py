"""What a hostile author, or an accident, does to a bundle; shared by the bundle's tests.

A bag is a dictionary of its files here, names relative to its root. `reseal` signs every lie: all listings and hashes
agree with the files again. `zip_of` writes with Python's zipfile, which is not ours.
"""

import hashlib
import json
import re
import resource
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from focal.datasets.opening import document_hash
from focal.errors import FocalError

NEXT_COMMAND = (
    "focal-cli bundle|focal-cli data generate|delete it|copy the file again|run the same command again|--max-size|-o"
)
Files = dict[str, bytes]


def refused(call: Callable[[], object]) -> str:
    """The message of the refusal, which must be one line that holds a next command."""
    with pytest.raises(FocalError, match=NEXT_COMMAND) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


@contextmanager
def little_memory(kilobytes: int = 60_000) -> Iterator[None]:
    """Fail when the block makes this process grow by more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kilobytes


def files_of(folder: Path) -> Files:
    """Read a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Files) -> Path:
    """Write a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def reseal(files: Files) -> Files:
    """Make dataset.json, the manifests and Payload-Oxum agree with the files."""
    files = dict(files)
    document = json.loads(files["data/dataset.json"])
    document["files"] = {
        name.removeprefix("data/"): {"bytes": len(data), "sha256": sha256(data)}
        for name, data in files.items()
        if name.startswith("data/") and name != "data/dataset.json"
    }
    document["document_hash"] = document_hash(document)
    files["data/dataset.json"] = json.dumps(document).encode()
    return reseal_bag(files)


def reseal_bag(files: Files) -> Files:
    """Make the manifests and Payload-Oxum agree with the files."""
    payload = {name: data for name, data in sorted(files.items()) if name.startswith("data/")}
    manifest = "".join(f"{sha256(data)}  {name}\n" for name, data in payload.items())
    oxum = f"Payload-Oxum: {sum(map(len, payload.values()))}.{len(payload)}".encode()
    info = re.sub(rb"Payload-Oxum: .*", oxum, files["bag-info.txt"])
    return reseal_tags({**files, "manifest-sha256.txt": manifest.encode(), "bag-info.txt": info})


def reseal_tags(files: Files) -> Files:
    """Make the tagmanifest agree with the tag files."""
    tags = ("bag-info.txt", "bagit.txt", "croissant.json", "manifest-sha256.txt")
    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in tags)
    return {**files, "tagmanifest-sha256.txt": lines.encode()}


def plain_entry(name: str) -> zipfile.ZipInfo:
    """The header of a plain stored file of 1980."""
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def zip_entries(path: Path, entries: Iterable[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    """Write any entries, in the order given."""
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


def zip_of(path: Path, files: Mapping[str, bytes], top: str) -> Path:
    """Write a bag as a bundle file."""
    return zip_entries(path, [(plain_entry(f"{top}/{name}"), data) for name, data in sorted(files.items())])


class Memory:
    """A `Source` of files in memory."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __str__(self) -> str:
        return "memory"

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        return {name: len(data) for name, data in sorted(self.files.items()) if name.partition("/")[0] not in skip}

    def read(self, name: str, limit: int) -> bytes:
        if name not in self.files or len(self.files[name]) > limit:
            raise FocalError(f"memory: {name} is missing or larger than {limit}; delete it")
        return self.files[name]

    def read_many(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        return ((name, self.read(name, limit)) for name in names)

    def sha256(self, name: str) -> str:
        return sha256(self.read(name, 2**62))

    def exists(self, name: str) -> bool:
        return name in self.files
