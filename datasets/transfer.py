"""Bundles to and from an object store, there in their folder form with one object per file.

push   URL/NAME-VERSION/
         manifest-sha256.txt       first, and only if absent: it takes the name for this payload
         bag-info.txt, ...         the other tag files, only if absent
         data/...                  side by side; a file that is there with its size and sha256 is left alone
         data/dataset.json         only if absent, as is what follows
         tagmanifest-sha256.txt    last: until it is there, no reader takes the rest for a bundle

pull   STORES/.pull-FAMILY-3f9a.../    named by the tagmanifest's sha256; survives a kill, and the next pull goes on here
         partial/data/tasks/...        files under way, which only grow
         data/tasks/...                a file comes here when its sha256 is right
         dataset.json                  the commit point, kept out of data/ until everything is verified
       STORES/FAMILY/                  in the end one rename of data/
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FocalError
from .bag import (
    CROISSANT,
    FETCH_AGAIN,
    MANIFEST,
    MAX_FILE_BYTES,
    SIGNATURE,
    TAG_FILES,
    TAGMANIFEST,
    Bag,
    open_bag,
    read_bag,
    verify_bag,
    verify_opened,
)
from .bundle import (
    MAX_SIZE,
    BundleReport,
    already_unpacked,
    bundle_report,
    check_room,
    check_size,
    last_third,
    open_bundle,
    two_thirds,
)
from .collection import Collection
from .integrity import Progress
from .opening import DOCUMENT, PAYLOAD, open_collection
from .records import CollectionHeader
from .remote import SIDE_BY_SIDE, Remote, connect, no_bundle
from .signing import Trust, check_signature
from .sources import Folder, read_checked, sha256_of, side_by_side
from .storage import MAX_JSON_BYTES, file_hash, list_files, make_folder, parse_json, sync, sync_tree, write_all, writing

_DOCUMENT = f"{PAYLOAD}/{DOCUMENT}"
_PARTIAL = "partial"
_UPLOADS = 8
"""Files in memory at once while pushing."""


@dataclass(frozen=True)
class PushReport:
    """What a push did."""

    url: str
    """Where the bundle is now."""
    files: int
    """How many it has,"""
    sent: int
    """how many of them were uploaded by this push,"""
    sent_bytes: int
    """and their bytes."""


def push_bundle(path: Path, url: str, max_size: int = MAX_SIZE, progress: Progress | None = None) -> PushReport:
    """Verify a bundle, file or folder, and upload it to `url`/NAME-VERSION/.

    After a cut the same call uploads what is missing. A bundle that is there already is left alone, and another one
    under its name is refused. `progress` counts every byte three times: twice verifying, once uploading. Raises
    `FocalError`.
    """
    bag = open_bundle(path, max_size)
    check_signature(bag, None)
    verify_bag(bag, two_thirds(progress))
    remote = connect(f"{url.rstrip('/')}/{bag.name}", create=True)
    sizes, there = bag.source.sizes(), remote.sizes()
    _refuse_another(bag, sizes, remote, there)
    missing = _missing(bag, sizes, remote, there)
    for name in (MANIFEST, *(name for name in TAG_FILES if name != MANIFEST)):
        if name in missing:
            _create(bag, remote, name, sizes[name])
    payload = [name for name in missing if name.startswith(f"{PAYLOAD}/") and name != _DOCUMENT]
    whole = sum(size for name, size in sizes.items() if name.startswith(f"{PAYLOAD}/"))
    advance = last_third(progress, whole)
    advance(whole - sum(sizes[name] for name in payload))
    for size in side_by_side(lambda name: _upload(bag, remote, name), payload, _UPLOADS, _UPLOADS):
        advance(size)
    for name in (_DOCUMENT, SIGNATURE, TAGMANIFEST):
        if name in missing:
            _create(bag, remote, name, sizes[name])
    return PushReport(remote.url, len(sizes), len(missing), sum(sizes[name] for name in missing))


def _refuse_another(bag: Bag, sizes: Mapping[str, int], remote: Remote, there: Mapping[str, int]) -> None:
    """Refuse a place where something else is, even if it is not complete."""
    for name in (MANIFEST, *TAG_FILES, TAGMANIFEST, SIGNATURE, _DOCUMENT):
        if name in there and name in sizes:
            _compare(bag, remote, name, there[name])
    if extra := sorted({*there} - {*sizes, SIGNATURE}):
        raise FocalError(
            f"{remote} has an object {extra[0]!r} that is no part of this bundle, expected its files only; delete it, "
            "or push to another URL"
        )


def _missing(bag: Bag, sizes: Mapping[str, int], remote: Remote, there: Mapping[str, int]) -> list[str]:
    """The files that are not there, or not as they should be.

    Sizes say enough of a bundle that is complete; of what a cut push left, also the sha256 kept with each.
    """
    present = [name for name, size in sizes.items() if there.get(name) == size]
    if TAGMANIFEST not in there:
        payload = [name for name in present if name.startswith(f"{PAYLOAD}/") and name != _DOCUMENT]
        right = side_by_side(lambda name: remote.holds(name, bag.files[name]), payload, SIDE_BY_SIDE)
        wrong = {name for name, good in zip(payload, right, strict=True) if not good}
        present = [name for name in present if name not in wrong]
    return sorted({*sizes} - {*present})


def _upload(bag: Bag, remote: Remote, name: str) -> int:
    data = read_checked(bag.source, name, MAX_FILE_BYTES, bag.files[name])
    remote.put(name, data, bag.files[name])
    return len(data)


def _create(bag: Bag, remote: Remote, name: str, size: int) -> None:
    """Write a file that decides which bundle this is. Raises `FocalError` where another writer was first."""
    if not remote.create(name, bag.source.read(name, size)):
        _compare(bag, remote, name, size)


def _compare(bag: Bag, remote: Remote, name: str, size: int) -> None:
    data = bag.source.read(name, MAX_FILE_BYTES)
    if size == len(data) and remote.read(name, size) == data:
        return
    if name == SIGNATURE:
        raise FocalError(f"{remote} is signed already, and not as {bag.source} is; to replace it, delete its {name}")
    raise FocalError(
        f"{remote} is another bundle (its {name} differs), and one that was pushed never changes; give yours a new "
        "version or name, or push it to another URL"
    )


def pull_bundle(
    url: str,
    target: Path | None = None,
    stores: Path = Path("stores"),
    allowed_signers: Path | None = None,
    require_signature: bool = False,
    max_size: int = MAX_SIZE,
    progress: Progress | None = None,
    announce: Callable[[Bag, Trust], None] | None = None,
) -> tuple[Collection, BundleReport]:
    """Download the bundle at `url`, verify it, and put its collection into the folder `target` (STORES/FAMILY).

    Signature, names, sizes and room are checked before a byte of the payload is asked for, then `announce` is told what
    comes and who signed it. After a cut or a kill the same call goes on: finished files stay, an unfinished one
    continues at its last byte. Nothing that opens as a collection is there before every byte is verified, and nothing
    is ever replaced. `progress` counts every byte three times: once downloading, twice verifying. Raises `FocalError`.
    """
    remote = connect(url)
    if not remote.exists(TAGMANIFEST):
        raise no_bundle(remote)
    bag = read_bag(remote)
    trust = check_signature(bag, allowed_signers, require_signature)
    check_size(remote, bag.payload_bytes, max_size)
    target = target or stores / _family(bag)
    if announce:
        announce(bag, trust)
    staging = target.parent / f".pull-{target.name}-{sha256_of(bag.tagmanifest)[:16]}"
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        collection = already_unpacked(target, bag)
        verified = verify_opened(collection)
    else:
        make_folder(staging)
        with _locked(staging, target):
            _fetch_all(bag, remote, staging, target, progress)
            verified = verify_bag(replace(bag, source=_Staging(staging)), _two_thirds_after(progress))
            _put_in_place(staging, target)
        collection = open_collection(target)
    shutil.rmtree(staging, ignore_errors=True)
    return collection, bundle_report(remote.url, collection, bag.authors, trust, verified)


@dataclass(frozen=True)
class _Staging(Folder):
    """A bag under way, whose dataset.json is not in its place, so that nothing here opens as a collection."""

    def place(self, name: str) -> Path:
        return self.path / (DOCUMENT if name == _DOCUMENT else name)

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        found = list_files(self.path, (_PARTIAL, *skip))
        return {_DOCUMENT if name == DOCUMENT else name: size for name, size in found.items()}

    def read(self, name: str, limit: int) -> bytes:
        return Folder(self.place(name).parent).read(self.place(name).name, limit)

    def sha256(self, name: str) -> str:
        return file_hash(self.place(name))

    def exists(self, name: str) -> bool:
        return self.place(name).is_file()
