"""The bundle's folder: a BagIt 1.0 bag (RFC 8493) whose payload is a collection.

    NAME-VERSION/
      bagit.txt                    two fixed lines
      bag-info.txt                 identifier, licence, authors, date, Payload-Oxum, content hash
      croissant.json               for dataset search engines (croissant.py)
      data/                        the collection without staging/, byte for byte
      manifest-sha256.txt          sha256 of every file below data/
      tagmanifest-sha256.txt       sha256 of the four files above that are not below data/
      tagmanifest-sha256.txt.sig   optional signature over the tagmanifest, and so over everything (signing.py)

Written and read by hand: the same collection gives the same bytes (Bagging-Date is the day the collection was made),
and a bag is read through a `Source`, so that a folder, a file (archive.py) and an object store are checked alike.
Anybody checks one without this software: `sha256sum -c --strict tagmanifest-sha256.txt manifest-sha256.txt`.
"""

import contextlib
import datetime
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import FocalError
from .collection import Collection, quoted
from .croissant import croissant_document, describe
from .integrity import Progress, VerifyReport, verify_collection
from .opening import DOCUMENT, PAYLOAD, check_allowed, open_source
from .sources import Below, Source, sha256_of
from .storage import AGAIN, MAX_JSON_BYTES, parse_json, to_json

TAGMANIFEST = "tagmanifest-sha256.txt"
SIGNATURE = f"{TAGMANIFEST}.sig"
MANIFEST = "manifest-sha256.txt"
BAG_INFO = "bag-info.txt"
CROISSANT = "croissant.json"
DECLARATION = "bagit.txt"
TAG_FILES = (BAG_INFO, DECLARATION, CROISSANT, MANIFEST)
"""What the tagmanifest lists."""

MAX_TAG_BYTES = 2**20
MAX_FILE_BYTES = 512 * 2**20
"""No chunk, policy or document comes near it, so every file may be read whole."""
MAX_FILES = 10**6
MAX_DEPTH = 8
MAX_NAME = 255

FETCH_AGAIN = "fetch the bundle again from where it came (focal-cli bundle pull, or copy the file again)"
"""The next command where a bundle is damaged."""

_DECLARATION = b"BagIt-Version: 1.0\nTag-File-Character-Encoding: UTF-8\n"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_LABEL = re.compile(r"([A-Z][A-Za-z-]*): (\S.*)")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Bag:
    """A bag whose structure was checked; its payload was not read."""

    source: Source
    """The bag's root."""
    name: str
    """NAME-VERSION of the collection."""
    info: Mapping[str, str]
    """bag-info.txt; values of a label that occurs several times (Author) are separated by newlines."""
    files: Mapping[str, str] = field(repr=False)
    """sha256 of every file but the tagmanifest and its signature, by name;"""
    sizes: Mapping[str, int] = field(repr=False)
    """their bytes, as they were when they were checked. An object store may list others each time it is asked."""
    tagmanifest: bytes = field(repr=False)
    """The file that hashes all others, as it was read: what a signature signs."""

    @property
    def licence(self) -> str:
        """SPDX expression."""
        return self.info["Licence"]

    @property
    def authors(self) -> tuple[str, ...]:
        """Who made the data."""
        return tuple(self.info["Author"].split("\n"))

    @property
    def payload_bytes(self) -> int:
        """Bytes below data/."""
        return int(self.info["Payload-Oxum"].partition(".")[0])


def payload_files(collection: Collection) -> dict[str, tuple[int, str]]:
    """Return bytes and sha256 of every file a bag of `collection` has below data/, by its name in the bag.

    Raises `FocalError` for a name that some system cannot hold, alone or below the folder NAME-VERSION, or a file too
    large.
    """
    document = collection.source.read(DOCUMENT, MAX_JSON_BYTES)
    files = {**collection.files, DOCUMENT: (len(document), sha256_of(document))}
    payload = {f"{PAYLOAD}/{name}": facts for name, facts in sorted(files.items())}
    check_names(collection.source, payload, AGAIN)
    for name in (*payload, *TAG_FILES, TAGMANIFEST, SIGNATURE):
        if fault := name_fault(full := f"{bag_name(collection)}/{name}"):
            raise FocalError(
                f"{collection.source}: the bundle's file {full[:300]!r} {fault}; give the data another or a shorter "
                f"name: focal-cli data merge {quoted(collection.source)} -o NEW --name OTHER"
            )
    check_sizes(collection.source, {name: size for name, (size, _) in payload.items()})
    return payload


def make_tag_files(
    collection: Collection, payload: Mapping[str, tuple[int, str]], authors: Sequence[str]
) -> dict[str, bytes]:
    """Return the bag's files outside data/ but the signature, by name.

    The same collection, its `payload_files` and authors give the same bytes.
    """
    manifest = _manifest({name: sha256 for name, (_, sha256) in payload.items()})
    document = f"{PAYLOAD}/{DOCUMENT}"
    listing = {MANIFEST: (len(manifest), sha256_of(manifest)), document: payload[document]}
    date = _date_of(collection)
    oxum = f"{sum(size for size, _ in payload.values())}.{len(payload)}"
    tags = {
        DECLARATION: _DECLARATION,
        BAG_INFO: _bag_info(collection, authors, date, oxum),
        CROISSANT: to_json(croissant_document(collection, authors, date, listing)),
        MANIFEST: manifest,
    }
    return {**tags, TAGMANIFEST: _manifest({name: sha256_of(data) for name, data in tags.items()})}


def bag_name(collection: Collection) -> str:
    """NAME-VERSION."""
    return f"{collection.name}-{collection.version}"


def read_bag(source: Source, name: str | None = None) -> Bag:
    """Check the structure of the bag at the root of `source`: the payload's names and listing, and every tag file.

    tagmanifest -> hashes of the tag files -> manifest -> exactly the listed files are there, under allowed names.
    `name` is the NAME-VERSION it must have (None: any). Raises `FocalError` saying what was found and expected.
    """
    sizes = source.sizes()
    if TAGMANIFEST not in sizes:
        raise FocalError(f"{source} is no bundle ({TAGMANIFEST} is missing); make one: focal-cli bundle pack PATH")
    check_names(source, sizes)
    check_sizes(source, sizes)
    tagmanifest = source.read(TAGMANIFEST, MAX_TAG_BYTES)
    tags = _read_tag_files(source, sizes, tagmanifest)
    info = _parse_info(tags[BAG_INFO][1], f"{source}/{BAG_INFO}")
    if name not in (None, info["External-Identifier"]):
        raise FocalError(
            f"{source}: {BAG_INFO} calls it {info['External-Identifier']!r}, expected {name!r}; {FETCH_AGAIN}"
        )
    payload = {file: size for file, size in sizes.items() if file.startswith(f"{PAYLOAD}/")}
    listed = _parse_manifest(tags[MANIFEST][1], f"{source}/{MANIFEST}")
    for file in sorted({*listed, *payload}):
        if file not in payload:
            raise FocalError(f"{source}: {file!r} is missing, {MANIFEST} lists it; {FETCH_AGAIN}")
        if file not in listed:
            raise FocalError(f"{source}: extra file {file!r}, {MANIFEST} does not list it; delete it or {FETCH_AGAIN}")
    if (oxum := f"{sum(payload.values())}.{len(payload)}") != info["Payload-Oxum"]:
        raise FocalError(
            f"{source}: its payload is {oxum} (bytes.files), {BAG_INFO} says {info['Payload-Oxum']}; {FETCH_AGAIN}"
        )
    files = {**{file: tags[file][0] for file in TAG_FILES}, **listed}
    checked = {**{file: len(tags[file][1]) for file in TAG_FILES}, **payload}
    return Bag(source, info["External-Identifier"], info, files, checked, tagmanifest)


def open_bag(bag: Bag) -> Collection:
    """Open the collection inside a bag, in place, and check that the bag and the collection say the same of it."""
    payload = Below(bag.source, PAYLOAD)
    if payload.sha256(DOCUMENT) != bag.files.get(f"{PAYLOAD}/{DOCUMENT}"):
        raise FocalError(f"{payload}/{DOCUMENT} is damaged or missing (sha256 differs from {MANIFEST}); {FETCH_AGAIN}")
    with _bundle_advice():
        collection = open_source(payload)
    for name, (_, sha256) in collection.files.items():
        if bag.files.get(f"{PAYLOAD}/{name}") != sha256:
            raise FocalError(f"{bag.source}: {MANIFEST} and {DOCUMENT} differ about {name!r}; {FETCH_AGAIN}")
    said = {"External-Identifier": bag.name, "Licence": bag.licence, "Content-Hash": bag.info["Content-Hash"]}
    true = {
        "External-Identifier": bag_name(collection),
        "Licence": collection.licence,
        "Content-Hash": collection.content_hash,
    }
    if collection.authors:
        said["Author"], true["Author"] = "\n".join(bag.authors), "\n".join(map(_one_line, collection.authors))
    for label, value in true.items():
        if said[label] != value:
            raise FocalError(
                f"{bag.source}: {BAG_INFO} says {label} {said[label][:100]!r}, {DOCUMENT} says {value[:100]!r}; "
                f"{FETCH_AGAIN}"
            )
    _check_croissant(bag, collection)
    return collection


def verify_bag(bag: Bag, progress: Progress | None = None) -> VerifyReport:
    """Verify every byte of the payload: the manifest's hashes, then the collection's own; see `verify_collection`.

    Both list the same hashes (`open_bag` compares them), so each file is hashed once. Raises `FocalError` naming the
    first file, array or chunk that is wrong.
    """
    return verify_opened(open_bag(bag), progress)


def verify_opened(collection: Collection, progress: Progress | None = None) -> VerifyReport:
    """`verify_bag` for a collection that `open_bag` opened."""
    with _bundle_advice():
        return verify_collection(collection, progress)


def check_names(where: object, names: Iterable[str], advice: str = FETCH_AGAIN) -> None:
    """Refuse a name no bundle has, and two names that are one on some system.

    The allow-list holds only what a collection is made of. What it refuses anyway is named first, because the reason
    matters to who reads the message.
    """
    seen: dict[str, str] = {}
    for name in names:
        if fault := name_fault(name) or _kind_fault(name):
            raise FocalError(f"{where}: file name {name[:200]!r} {fault}; {advice}")
        if (folded := name.casefold()) in seen:
            same = "is there twice" if seen[folded] == name else f"and {seen[folded]!r} are one file on some systems"
            raise FocalError(f"{where}: {name!r} {same}; {advice}")
        seen[folded] = name
    for folded, name in seen.items():
        for end in (index for index, letter in enumerate(folded) if letter == "/"):
            if folded[:end] in seen:
                raise FocalError(f"{where}: {seen[folded[:end]]!r} is a file and the folder of {name!r}; {advice}")


def check_sizes(where: object, sizes: Mapping[str, int]) -> None:
    """Refuse more files, or a larger file, than any collection has."""
    if len(sizes) > MAX_FILES:
        raise FocalError(f"{where}: {len(sizes)} files, expected at most {MAX_FILES}; {FETCH_AGAIN}")
    for name, size in sizes.items():
        if size > MAX_FILE_BYTES:
            raise FocalError(f"{where}: {name!r} has {size} bytes, expected at most {MAX_FILE_BYTES}; {FETCH_AGAIN}")


def name_fault(name: str) -> str | None:
    """What is wrong with a file's name on some system, or None; none that leads out of its folder passes."""
    parts = name.split("/")
    if not name.isprintable():
        return "holds a control character"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's composed form (NFC)"
    if "\\" in name or ":" in name:
        return "holds a backslash or a colon"
    if name.startswith("/"):
        return "is absolute, expected one inside the bundle"
    if ".." in parts:
        return "leaves the bundle's folder (..)"
    if any(part in ("", ".") or part.endswith((".", " ")) for part in parts):
        return "has an empty part, or one that ends in a dot or a space"
    if any(_RESERVED.fullmatch(part) for part in parts):
        return "is reserved on Windows"
    if len(name) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    return None


def _kind_fault(name: str) -> str | None:
    """Why a bundle has no file of that name, or None."""
    if name.count("/") >= MAX_DEPTH:
        return f"is more than {MAX_DEPTH} folders deep"
    if name in (TAGMANIFEST, SIGNATURE, *TAG_FILES):
        return None
    try:
        check_allowed("", name.removeprefix(f"{PAYLOAD}/") if name.startswith(f"{PAYLOAD}/") else "")
    except FocalError:
        return "is none a bundle has (chunks, safetensors, json, README.md, its own text files; no archive, no program)"
    return None


def _read_tag_files(source: Source, sizes: Mapping[str, int], tagmanifest: bytes) -> dict[str, tuple[str, bytes]]:
    """Return sha256 and content of the tag files, checked against the tagmanifest."""
    listed = _parse_manifest(tagmanifest, f"{source}/{TAGMANIFEST}")
    if sorted(listed) != sorted(TAG_FILES):
        raise FocalError(
            f"{source}: {TAGMANIFEST} lists {str(sorted(listed))[:200]}, expected {', '.join(TAG_FILES)}; {FETCH_AGAIN}"
        )
    longest_manifest = sum(len(name) + 67 for name in sizes)  # its lines are 64 digits, two spaces, name, newline
    tags = {}
    for name, sha256 in listed.items():
        if name not in sizes:
            raise FocalError(f"{source}: {name!r} is missing, {TAGMANIFEST} lists it; {FETCH_AGAIN}")
        data = source.read(name, longest_manifest if name == MANIFEST else MAX_TAG_BYTES)
        if sha256_of(data) != sha256:
            raise FocalError(f"{source}: {name} is damaged (sha256 differs from {TAGMANIFEST}); {FETCH_AGAIN}")
        tags[name] = sha256, data
    if tags[DECLARATION][1] != _DECLARATION:
        raise FocalError(f"{source}: {DECLARATION} is not that of BagIt 1.0 in UTF-8; {FETCH_AGAIN}")
    return tags


def _manifest(hashes: Mapping[str, str]) -> bytes:
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items())).encode()


def _parse_manifest(data: bytes, where: str) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for line in _lines(data, where):
        match = _LINE.fullmatch(line)
        if not match or match[2] in hashes:
            raise FocalError(f"{where}: found {line[:120]!r}, expected one line 'SHA256  NAME' per file; {FETCH_AGAIN}")
        hashes[match[2]] = match[1]
    return hashes


def _bag_info(collection: Collection, authors: Sequence[str], date: str, oxum: str) -> bytes:
    contact = re.fullmatch(r"(.*\S)\s*<(\S+@\S+)>", _one_line(authors[0]))
    pairs = [
        ("External-Identifier", bag_name(collection)),
        ("External-Description", describe(collection)),
        ("Contact-Name", contact[1] if contact else authors[0]),
        *([("Contact-Email", contact[2])] if contact else []),
        *(("Author", author) for author in authors),
        ("Licence", collection.licence),
        ("Content-Hash", collection.content_hash),
        ("Bagging-Date", date),
        ("Payload-Oxum", oxum),
    ]
    return "".join(f"{label}: {_one_line(value)}\n" for label, value in pairs).encode()


def _parse_info(data: bytes, where: str) -> dict[str, str]:
    info: dict[str, str] = {}
    for line in _lines(data, where):
        match = _LABEL.fullmatch(line)
        if not match or not line.isprintable():
            raise FocalError(f"{where}: found {line[:120]!r}, expected 'Label: value'; {FETCH_AGAIN}")
        info[match[1]] = f"{info[match[1]]}\n{match[2]}" if match[1] in info else match[2]
    for label in ("External-Identifier", "Author", "Licence", "Content-Hash", "Bagging-Date", "Payload-Oxum"):
        if label not in info:
            raise FocalError(f"{where}: {label} is missing; {FETCH_AGAIN}")
    return info


def _lines(data: bytes, where: str) -> list[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FocalError(f"{where} is not UTF-8 text; {FETCH_AGAIN}") from error
    return text.removesuffix("\n").split("\n")


def _check_croissant(bag: Bag, collection: Collection) -> None:
    """What search engines are told of name, version and licence must be true; the rest may change with the format."""
    with _bundle_advice():
        found = parse_json(bag.source.read(CROISSANT, MAX_TAG_BYTES), f"{bag.source}/{CROISSANT}")
    true = croissant_document(collection, bag.authors, bag.info["Bagging-Date"], {})
    for key in ("name", "version", "license"):
        if found.get(key) != true[key]:
            raise FocalError(
                f"{bag.source}: {CROISSANT} says {key} {repr(found.get(key))[:100]}, expected {true[key]!r}; "
                f"{FETCH_AGAIN}"
            )


def _date_of(collection: Collection) -> str:
    """The day the collection was made, YYYY-MM-DD: another day of packing changes no byte."""
    try:
        return datetime.datetime.fromisoformat(collection.created).date().isoformat()
    except ValueError as error:
        raise FocalError(
            f"{collection.source}: created is {collection.created[:80]!r}, expected a date and time; {AGAIN}"
        ) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def _bundle_advice() -> Iterator[None]:
    """The collection's errors say to unpack the bundle again; here the bundle itself is wrong."""
    try:
        yield
    except FocalError as error:
        if AGAIN not in str(error):
            raise
        raise FocalError(str(error).replace(AGAIN, FETCH_AGAIN)) from error
