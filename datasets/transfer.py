"""Bundles to and from an object store, there in their folder form with one object per file.

push   URL/NAME-VERSION/
         manifest-sha256.txt       first, and only if absent: it takes the name for this payload
         bag-info.txt, ...         the other tag files, only if absent
         data/...                  side by side; a file that is there with its size and sha256 is left alone
         data/dataset.json         only if absent, as is what follows
         tagmanifest-sha256.txt    last: until it is there, no reader takes the rest for a bundle

pull   STORES/.pull-FAMILY-3f9a.../    named by the tagmanifest's sha256; survives a kill, the next pull goes on here
         partial/data/tasks/...        files under way, which only grow
         data/tasks/...                a file comes here when its sha256 is right
         dataset.json.unverified       the commit point, kept out of data/ until everything is verified
       STORES/FAMILY/                  in the end one rename of data/
"""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FocalError
from ..files import sync
from .bag import (
    CROISSANT,
    FETCH_AGAIN,
    MANIFEST,
    MAX_FILE_BYTES,
    SIGNATURE,
    TAG_FILES,
    TAGMANIFEST,
    Bag,
    read_bag,
    verify_bag,
)
from .bundle import (
    MAX_SIZE,
    BundleReport,
    bundle_report,
    check_new_folder,
    check_room,
    check_size,
    copying,
    open_bundle,
    open_unpacked,
    verifying,
)
from .collection import Collection
from .integrity import Progress, VerifyReport, verify_collection
from .opening import DOCUMENT, PAYLOAD, open_collection
from .records import CollectionHeader
from .remote import SIDE_BY_SIDE, Remote, connect, open_bag_at
from .signing import Trust, check_signature
from .sources import Folder, read_checked, sha256_of, side_by_side
from .storage import (
    MAX_JSON_BYTES,
    file_hash,
    list_files,
    make_folder,
    parse_json,
    read_bytes,
    sync_tree,
    write_all,
    writing,
)

_DOCUMENT = f"{PAYLOAD}/{DOCUMENT}"
_PARTIAL, _HELD = "partial", f"{DOCUMENT}.unverified"
_CLAIMS = (MANIFEST, *(name for name in TAG_FILES if name != MANIFEST))
"""Tag files in the order of their pushing: all pushers meet at the same one first, and one of them wins."""
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


def push_bundle(path: Path | str, url: str, progress: Progress | None = None) -> PushReport:
    """Verify a bundle, file or folder, and upload it to `url`/NAME-VERSION/.

    After a cut the same call uploads what is missing. A bundle that is there already is left alone, and another one
    under its name is refused. `progress` counts every byte three times: twice verifying, once uploading. Raises
    `FocalError`.
    """
    bag = open_bundle(path, sys.maxsize)
    check_signature(bag, None)
    verify_bag(bag, verifying(progress))
    remote = connect(f"{url.rstrip('/')}/{bag.name}", create=True)
    sizes, there = bag.source.sizes(), remote.sizes()
    _refuse_another(bag, sizes, remote, there)
    missing = _missing(bag, sizes, remote, there)
    for name in _CLAIMS:
        if name in missing:
            _create(bag, remote, name)
    payload = [name for name in missing if name.startswith(f"{PAYLOAD}/") and name != _DOCUMENT]
    whole = sum(size for name, size in sizes.items() if name.startswith(f"{PAYLOAD}/"))
    advance = copying(progress, whole, after=2)
    advance(whole - sum(sizes[name] for name in payload))
    for size in side_by_side(lambda name: _upload(bag, remote, name), payload, _UPLOADS, _UPLOADS):
        advance(size)
    for name in (_DOCUMENT, SIGNATURE, TAGMANIFEST):
        if name in missing:
            _create(bag, remote, name)
    return PushReport(remote.url, len(sizes), len(missing), sum(sizes[name] for name in missing))


def _refuse_another(bag: Bag, sizes: Mapping[str, int], remote: Remote, there: Mapping[str, int]) -> None:
    """Refuse a place where something else is, even if it is not complete."""
    for name in (*_CLAIMS, TAGMANIFEST, SIGNATURE, _DOCUMENT):
        if name in there and name in sizes:
            _compare(bag, remote, name)
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


def _create(bag: Bag, remote: Remote, name: str) -> None:
    """Write a file that says which bundle this is. Raises `FocalError` where another writer was first."""
    if not remote.create(name, bag.source.read(name, MAX_FILE_BYTES)):
        _compare(bag, remote, name)


def _compare(bag: Bag, remote: Remote, name: str) -> None:
    if remote.sha256(name) == bag.source.sha256(name):
        return
    if name == SIGNATURE:
        raise FocalError(f"{remote} is signed already, and not as {bag.source} is; to replace it, delete its {name}")
    raise FocalError(
        f"{remote} is another bundle (its {name} differs), and one that was pushed never changes; push yours to "
        "another URL, or give it another name first: focal-cli data merge COLLECTION --name OTHER -o NEW"
    )


def pull_bundle(
    url: str,
    target: Path | str | None = None,
    stores: Path | str = "stores",
    allowed_signers: Path | None = None,
    require_signature: bool = False,
    max_size: int = MAX_SIZE,
    progress: Progress | None = None,
    announce: Callable[[Bag, Trust], None] | None = None,
) -> tuple[Collection, BundleReport]:
    """Download the bundle at `url`, verify it, and put its collection into the folder `target` (STORES/FAMILY).

    Signature, names and sizes are checked and `announce` is told what comes and who signed it, before any data but
    dataset.json are asked for. After a cut or a kill the same call goes on: finished files stay, an unfinished one
    continues at its last byte. Nothing that opens as a collection is there before every byte is verified, and nothing
    is ever replaced. `progress` counts every byte three times: once downloading, twice verifying. Raises `FocalError`.
    """
    if target is not None:
        check_new_folder(Path(target))
    remote = open_bag_at(url)
    bag = read_bag(remote)
    trust = check_signature(bag, allowed_signers, require_signature)
    check_size(bag, max_size)
    target = Path(target or Path(stores) / _header(bag).family)
    if announce:
        announce(bag, trust)
    staging = target.parent / f".pull-{target.name}-{sha256_of(bag.tagmanifest)[:16]}"
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        collection = open_unpacked(target, bag)
        verified = verify_collection(collection)
    else:
        make_folder(staging)
        with _locked(staging, target):
            _fetch_all(bag, remote, staging, target, progress)
            verified = _verify_staged(bag, staging, progress)
            _put_in_place(staging, target)
        collection = open_collection(target)
    shutil.rmtree(staging, ignore_errors=True)
    return collection, bundle_report(remote.url, collection, bag.authors, trust, verified)


@dataclass(frozen=True)
class _Staging(Folder):
    """A bag under way, whose dataset.json is not in its place, so that nothing here opens as a collection."""

    def place(self, name: str) -> Path:
        """Where the bag's file `name` is."""
        return self.path / (_HELD if name == _DOCUMENT else name)

    def sizes(self, skip: tuple[str, ...] = ()) -> dict[str, int]:
        """See `Source`."""
        found = list_files(self.path, (_PARTIAL, *skip))
        return {_DOCUMENT if name == _HELD else name: size for name, size in found.items()}

    def read(self, name: str, limit: int) -> bytes:
        """See `Source`."""
        return read_bytes(self.place(name), limit)

    def sha256(self, name: str) -> str:
        """See `Source`."""
        return file_hash(self.place(name))

    def exists(self, name: str) -> bool:
        """See `Source`."""
        return self.place(name).is_file()


def _header(bag: Bag) -> CollectionHeader:
    document = read_checked(bag.source, _DOCUMENT, MAX_JSON_BYTES, bag.files[_DOCUMENT])
    where = f"{bag.source}/{_DOCUMENT}"
    return CollectionHeader.from_json(parse_json(document, where), where)


@contextlib.contextmanager
def _locked(staging: Path, target: Path) -> Iterator[None]:
    """Keep a second pull out of the same folder; a kill gives it free. Nothing downloaded leaves no folder behind."""
    with writing(staging):
        descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is not empty, or moved
                staging.rmdir()
    except BlockingIOError as error:
        raise FocalError(f"another process is pulling this bundle to {target}; wait until it has finished") from error
    finally:
        os.close(descriptor)


def _fetch_all(bag: Bag, remote: Remote, staging: Path, target: Path, progress: Progress | None) -> None:
    """Download the payload, and the one tag file that verifying reads, into `staging`."""
    wanted = [name for name in bag.files if name.startswith(f"{PAYLOAD}/") or name == CROISSANT]
    # the listing that --max-size was held against; another one could raise what is downloaded
    sizes = {name: bag.sizes[name] for name in wanted}
    check_room(target, bag, sum(list_files(staging).values()))
    advance = copying(progress, sum(sizes.values()), after=0)

    def fetch(name: str) -> int:
        place = _Staging(staging).place(name)
        if not (place.is_file() and file_hash(place) == bag.files[name]):
            _fetch(remote, name, sizes[name], bag.files[name], staging / _PARTIAL / name, place)
        return sizes[name]

    for size in side_by_side(fetch, wanted, SIDE_BY_SIDE):
        advance(size)


def _fetch(remote: Remote, name: str, size: int, sha256: str, partial: Path, place: Path) -> None:
    """Download a file to `partial`, going on where that ends, and move it to `place` when its sha256 is right."""
    with writing(place):
        for folder in (partial.parent, place.parent):
            folder.mkdir(parents=True, exist_ok=True)
        resumed = partial.exists() and partial.stat().st_size > 0
        if not resumed or partial.stat().st_size < size:
            _append(remote, name, size, partial)
        if resumed and file_hash(partial) != sha256:  # a power cut may have spoiled what was there
            partial.unlink()
            _append(remote, name, size, partial)
        if file_hash(partial) != sha256:
            partial.unlink()
            raise FocalError(f"{remote}: {name!r} is damaged (its sha256 is not the one listed); {FETCH_AGAIN}")
        os.replace(partial, place)


def _append(remote: Remote, name: str, size: int, partial: Path) -> None:
    with open(partial, "ab", buffering=0) as file:
        for piece in remote.stream(name, file.tell()):
            if file.tell() + len(piece) > size:
                raise FocalError(f"{remote}: {name!r} has more than the {size} bytes listed; {FETCH_AGAIN}")
            write_all(file, piece)


def _verify_staged(bag: Bag, staging: Path, progress: Progress | None) -> VerifyReport:
    """Verify what was downloaded. Every hash is right by now, so what is wrong here is wrong at its source: drop it."""
    try:
        return verify_bag(replace(bag, source=_Staging(staging)), verifying(progress, after=1))
    except FocalError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _put_in_place(staging: Path, target: Path) -> None:
    """Turn what was verified into the collection at `target`, which does not exist or is an empty folder."""
    with writing(target):
        sync_tree(staging)
        os.rename(staging / _HELD, staging / _DOCUMENT)
        sync(staging / PAYLOAD)
        os.rename(staging / PAYLOAD, target)
        sync(target.parent)
