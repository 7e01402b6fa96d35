"""Bundles: a collection packed for another team, as one file or as a folder, checked whole before it is used.

pack_bundle     collection -> NAME-VERSION.focal.zip, or the folder NAME-VERSION/      bag.py, archive.py
verify_bundle   every byte, in place: signature, bag, collection                       signing.py, integrity.py
unpack_bundle   verify, then copy beside the target, each file hashed again, then one rename
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DiskFullError, FocalError, MadeMeanwhileError, UsageError
from .archive import open_archive, write_archive
from .bag import (
    MAX_FILE_BYTES,
    MAX_TAG_BYTES,
    SIGNATURE,
    TAGMANIFEST,
    Bag,
    bag_name,
    make_tag_files,
    open_bag,
    payload_files,
    read_bag,
    verify_bag,
    verify_opened,
)
from .collection import Collection, quoted
from .integrity import Progress, VerifyReport, verify_collection
from .opening import DOCUMENT, PAYLOAD, is_committed, open_collection
from .signing import Trust, check_signature, sign, verify_signature
from .sources import Folder, read_checked
from .storage import make_folder, new_folder, remove_temporaries, write_file

MAX_SIZE = 50 * 10**9
"""Bytes a bundle may have unless the receiver says otherwise."""
_BLOCK = 4096


@dataclass(frozen=True)
class BundleReport:
    """What a bundle is, every byte verified."""

    path: str
    name: str
    """NAME-VERSION."""
    family: str
    licence: str
    authors: tuple[str, ...]
    content_hash: str
    trust: Trust
    verified: VerifyReport

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "authors": list(self.authors)}


def pack_bundle(
    collection: Path | str,
    out: Path | str | None = None,
    signing_key: Path | None = None,
    as_folder: bool = False,
    authors: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Path, BundleReport]:
    """Verify a collection and pack it into the file, or with `as_folder` the folder, `out`; return where it is.

    `out` defaults to NAME-VERSION.focal.zip, or NAME-VERSION, in the current folder. The same collection gives the
    same bytes, whenever and wherever it is packed. `authors` are only for a collection that names none: they are
    recorded in bag-info.txt and croissant.json, since dataset.json is never changed. `signing_key` is the file of an
    SSH key (signing.py). A bundle that is there already is verified and kept; nothing else is ever replaced.

    `progress(done, total)` counts every byte three times. Raises `UsageError` for authors missing or given twice, and
    `FocalError` for a damaged collection, an `out` that is something else, or a full disk.
    """
    opened = open_collection(collection)
    named = _authors(opened, authors)
    out = Path(out or bag_name(opened) + ("" if as_folder else ".focal.zip"))
    _check_outside(out, collection)
    if out.is_symlink() and not out.exists():
        raise UsageError(f"{out} is a link to nothing, expected a new name; choose another one with -o")
    if as_folder:
        check_new_folder(out)
    elif out.is_dir():
        raise UsageError(f"{out} is a folder; name the file: -o {quoted(out / (bag_name(opened) + '.focal.zip'))}")
    payload = payload_files(opened)
    tags = make_tag_files(opened, payload, named)
    trust = Trust("unsigned")
    if signing_key:  # asks for its passphrase before the long work, and before a progress bar fills the terminal
        tags[SIGNATURE] = sign(tags[TAGMANIFEST], signing_key)
        trust = verify_signature(str(signing_key), tags[TAGMANIFEST], tags[SIGNATURE])
    verified = verify_collection(opened, verifying(progress))
    if not _is_packed(out, tags, as_folder):
        try:
            _write_bundle(opened, payload, tags, out, as_folder, progress)
        except MadeMeanwhileError:
            _is_packed(out, tags, as_folder)  # the same command beside this one made it; raises where it is another
    return out, bundle_report(out, opened, named, trust, verified)


def verify_bundle(
    path: Path | str,
    allowed_signers: Path | None = None,
    require_signature: bool = False,
    max_size: int = MAX_SIZE,
    progress: Progress | None = None,
) -> BundleReport:
    """Verify every byte of a bundle, file, folder or URL, in place: signature, listing, checksums, the collection.

    `allowed_signers` is the file of trusted keys, `max_size` the most bytes it may have; `progress(done, total)` counts
    every byte twice. Raises `FocalError` naming the first thing that is wrong, or a signature that is not good (or,
    with `require_signature`, not trusted).
    """
    return _verify(path, allowed_signers, require_signature, max_size, progress)[2]


def unpack_bundle(
    path: Path | str,
    target: Path | str | None = None,
    stores: Path | str = "stores",
    allowed_signers: Path | None = None,
    require_signature: bool = False,
    max_size: int = MAX_SIZE,
    progress: Progress | None = None,
) -> tuple[Collection, BundleReport]:
    """Verify a bundle, then copy its collection to the folder `target` (default STORES/FAMILY) and open it there.

    Everything is checked before a byte is written, and each file once more while it is written. The folder appears
    whole by a rename; killed at any moment, the same call again finishes. A target that holds this very collection is
    verified and kept, anything else is never replaced. `progress` counts every byte three times; the rest as for
    `verify_bundle`. Raises `FocalError`.
    """
    if target is not None:
        check_new_folder(Path(target))
    progressing = verifying(progress)
    bag, collection, report = _verify(path, allowed_signers, require_signature, max_size, progressing)
    target = Path(target or Path(stores) / collection.family)
    _check_outside(target, path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        there = open_unpacked(target, bag)
        verify_collection(there)
        return there, report
    check_room(target, bag)
    make_folder(target.parent)
    remove_temporaries(target.parent, target.name)
    advance = copying(progress, bag.payload_bytes, after=2)
    names = [name.removeprefix(f"{PAYLOAD}/") for name in bag.files if name.startswith(f"{PAYLOAD}/")]
    with new_folder(target, keep_first=True) as folder:  # whose it is by then is looked at below
        for name in sorted(names, key=lambda name: (name == DOCUMENT, name)):  # dataset.json, the commit point, last
            data = read_checked(collection.source, name, MAX_FILE_BYTES, bag.files[f"{PAYLOAD}/{name}"])
            write_file(folder / name, data)
            advance(len(data))
    return open_unpacked(target, bag), report


def open_bundle(path: Path | str, max_size: int = MAX_SIZE) -> Bag:
    """Check the structure of a bundle, file, folder or URL, of at most `max_size` bytes; its payload is not read."""
    if "://" in str(path):
        from .remote import open_bag_at  # an optional dependency

        bag = read_bag(open_bag_at(str(path)))
        check_size(bag, max_size)
        return bag
    path = Path(path)
    if path.is_dir():
        if is_committed(path):
            raise FocalError(f"{path} is a collection, no bundle; pack it: focal-cli bundle pack {quoted(path)}")
        bag = read_bag(Folder(path))
        check_size(bag, max_size)
        return bag
    if not path.exists():
        raise FocalError(f"no bundle at {path}; make one: focal-cli bundle pack COLLECTION -o {quoted(path)}")
    archive = open_archive(path, max_size)
    return read_bag(archive, archive.name)


def _verify(
    path: Path | str, allowed_signers: Path | None, require_signature: bool, max_size: int, progress: Progress | None
) -> tuple[Bag, Collection, BundleReport]:
    bag = open_bundle(path, max_size)
    trust = check_signature(bag, allowed_signers, require_signature)
    collection = open_bag(bag)
    verified = verify_opened(collection, progress)
    return bag, collection, bundle_report(path, collection, bag.authors, trust, verified)


def bundle_report(
    path: Path | str, collection: Collection, authors: Sequence[str], trust: Trust, verified: VerifyReport
) -> BundleReport:
    """Return what is told of a bundle whose every byte was read."""
    return BundleReport(
        path=str(path),
        name=bag_name(collection),
        family=collection.family,
        licence=collection.licence,
        authors=tuple(authors),
        content_hash=collection.content_hash,
        trust=trust,
        verified=verified,
    )


def _authors(collection: Collection, authors: Sequence[str]) -> tuple[str, ...]:
    if collection.authors and authors:
        raise UsageError(
            f"{collection.source} names its authors ({', '.join(collection.authors)}), which never change; "
            "leave --author out"
        )
    if not collection.authors and not authors:
        raise UsageError(f"{collection.source} names no author, and a bundle must; add --author 'Ada Lovelace'")
    return collection.authors or replace(collection.header, authors=tuple(authors)).authors  # which checks them


def check_new_folder(target: Path) -> None:
    """Refuse, before any work, a place that no folder can be renamed to."""
    if target.name in ("", "..") or (target.is_dir() and target.samefile(".")):
        raise UsageError(
            f"{target} is the current folder or has no name of its own, expected a new folder; name it, for example: "
            f"-o {quoted(target / 'NAME')}"
        )


def _check_outside(target: Path, source: Path | str) -> None:
    """Refuse to write into what is read."""
    if "://" not in str(source) and target.resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"{target} lies inside {source}, which is never changed; choose another place with -o")


def _is_packed(out: Path, tags: Mapping[str, bytes], as_folder: bool) -> bool:
    """Whether `out` is this bundle already, every byte of it. Raises `FocalError` when it is anything else."""
    if not out.exists():
        return False
    try:
        bag = open_bundle(out, sys.maxsize)
        signature = bag.source.read(SIGNATURE, MAX_TAG_BYTES) if bag.source.exists(SIGNATURE) else None
        same = (out.is_dir(), bag.tagmanifest, signature) == (as_folder, tags[TAGMANIFEST], tags.get(SIGNATURE))
        if same:
            verify_bag(bag)
    except FocalError:
        same = False
    if not same:
        raise FocalError(f"{out} exists and is not this bundle; choose another place with -o, or delete it")
    return True


def _write_bundle(
    collection: Collection,
    payload: Mapping[str, tuple[int, str]],
    tags: Mapping[str, bytes],
    out: Path,
    as_folder: bool,
    progress: Progress | None,
) -> None:
    advance = copying(progress, sum(size for size, _ in payload.values()), after=2)

    def read(name: str) -> bytes:
        if name in tags:
            return tags[name]
        advance(payload[name][0])
        return read_checked(collection.source, name.removeprefix(f"{PAYLOAD}/"), *payload[name])

    if not as_folder:
        write_archive(out, bag_name(collection), [*payload, *tags], read)
        return
    make_folder(out.parent)
    remove_temporaries(out.parent, out.name)
    with new_folder(out) as folder:
        for name in [*payload, *tags]:
            write_file(folder / name, read(name))


def open_unpacked(target: Path, bag: Bag) -> Collection:
    """Open the collection at `target`. Raises `FocalError` when it is not the bundle's."""
    if not is_committed(target) or Folder(target).sha256(DOCUMENT) != bag.files[f"{PAYLOAD}/{DOCUMENT}"]:
        raise FocalError(
            f"{target} exists and is not the collection of this bundle; choose another folder, for example: "
            f"-o {quoted(target.with_name(bag.name))}"
        )
    return open_collection(target)


def check_size(bag: Bag, max_size: int) -> None:
    """Refuse a bundle whose payload is larger than the receiver allows."""
    if bag.payload_bytes > max_size:
        raise FocalError(
            f"{bag.source} has {bag.payload_bytes} bytes, more than the {max_size} allowed; raise --max-size"
        )


def check_room(target: Path, bag: Bag, written: int = 0) -> None:
    """Refuse when the disk has no room for what is not `written` yet, every file rounded up to whole blocks."""
    needed = -written + sum(-(-size // _BLOCK) * _BLOCK for size in bag.sizes.values())
    ancestor = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(ancestor).free) < needed:
        raise DiskFullError(
            f"{target} needs {needed} bytes and {free} are free",
            "free space, or choose a folder on another disk with -o, and run the same command again",
        )


def verifying(progress: Progress | None, after: int = 0) -> Progress | None:
    """Verifying, which counts every byte twice, as two thirds of a work, when `after` thirds of it are done."""
    return progress and (lambda done, total: progress(done + after * total // 2, total * 3 // 2))


def copying(progress: Progress | None, size: int, after: int) -> Callable[[int], None]:
    """Return a function to call with the bytes of every file copied, `size` in all: one third of a work, likewise."""
    done = after * size

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress:
            progress(done, 3 * size)

    return advance
