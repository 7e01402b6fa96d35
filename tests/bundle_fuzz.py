"""Random mutations of bundles: each is refused with a `FocalError`, or changes nothing that matters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from focal.datasets import verify_bundle
from focal.datasets.bag import open_bag, read_bag, verify_bag
from focal.errors import FocalError

from .bundle_tools import Files, Memory, reseal, reseal_tags

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=20),
    st.sampled_from(["", "../../x", "focal-collection/1", "10" * 400, "\ud800", 1e308, -1, 0, 10**30, [], {}, [[]]]),
    st.recursive(st.integers(), lambda deeper: st.lists(deeper) | st.dictionaries(st.text(max_size=3), deeper)),
)  # fmt: skip
Change = Callable[[Files], Files | None]


def check_bundle_bytes(data: st.DataObject, original: bytes, path: Path) -> None:
    """Mutate a bundle file's bytes: whatever changes it makes it no bundle, since each has one form only."""
    changed = bytearray(original)
    # the ends are where the structure is, and where a change does most
    places = st.one_of(st.integers(0, len(original) - 1), st.integers(0, 500), st.integers(-600, -1))
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        place = data.draw(places) % len(changed)
        length = data.draw(st.sampled_from([1, 2, 4, 8, 100]))
        match data.draw(st.sampled_from(["flip", "write", "insert", "delete", "cut", "copy", "swap"])):
            case "flip":
                changed[place] ^= 1 << data.draw(st.integers(0, 7))
            case "write":
                changed[place : place + length] = data.draw(st.binary(min_size=1, max_size=length))
            case "insert":
                changed[place:place] = data.draw(st.binary(min_size=1, max_size=length))
            case "delete":
                del changed[place : place + length]
            case "cut":
                del changed[max(place, 1) :]
            case "copy":
                other = data.draw(places) % len(changed)
                changed[place : place + length] = changed[other : other + length]
            case "swap":
                changed = changed[place:] + changed[:place]
    path.write_bytes(changed)
    assert passes(lambda: verify_bundle(path)) == (changed == original)


def passes(call: Callable[[], object]) -> bool:
    """Whether a call succeeds; it may refuse with one line, and do nothing else."""
    try:
        call()
    except FocalError as error:
        return "\n" in str(error) and pytest.fail(f"more than one line: {error}")
    return True


@st.composite
def json_changes(draw: Any) -> Change:
    """A structural change of one or two JSON documents of a collection; then every hash is made right again."""
    picks = [(draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(KINDS), draw(VALUES)) for _ in range(draw(ONE_OR_TWO))]
    again = draw(st.booleans())

    def change(files: Files) -> Files | None:
        names = ["data/dataset.json"] * 12 + [name for name in files if name.endswith("zarr.json")]
        for document_share, place_share, kind, value in picks:
            name = names[min(int(document_share * len(names)), len(names) - 1)]
            document = json.loads(files[name])
            mutate(document, place_share, kind, value)
            try:
                files = {**files, name: json.dumps(document).encode()}
                if again:
                    files = reseal(files)
            except (ValueError, TypeError, AttributeError):  # no JSON of ours holds a surrogate
                return None
        return files

    return change


KINDS = st.sampled_from(["replace", "delete", "rename", "nest", "duplicate"])
ONE_OR_TWO = st.integers(1, 2)


def mutate(document: Any, share: float, kind: str, value: Any) -> None:
    """Change the place that is `share` of the way through all places of a document."""
    places: list[tuple[Any, Any]] = []
    rest = [document]
    while rest:
        node = rest.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        rest += [node[key] for key in keys if isinstance(node[key], dict | list)]
    parent, key = places[min(int(share * len(places)), len(places) - 1)]
    old = parent[key]
    if kind == "replace":
        parent[key] = copy.deepcopy(value)
    elif kind == "nest":
        parent[key] = [old]
    elif kind == "delete":
        del parent[key]
    elif isinstance(parent, dict):
        parent[f"{key}x" if kind == "rename" else f"{key}/../x"] = old
        if kind == "rename":
            del parent[key]
    else:
        parent.insert(key, copy.deepcopy(old))


@st.composite
def text_changes(draw: Any) -> Change:
    """Changed bytes in a tag file, with the tagmanifest made right again."""
    name = draw(st.sampled_from(["bag-info.txt", "manifest-sha256.txt", "croissant.json", "bagit.txt"]))
    share, cut, new = (
        draw(st.floats(0, 1)),
        draw(st.integers(0, 70)),
        draw(st.binary(max_size=70) | st.text().map(encode)),
    )

    def change(files: Files) -> Files:
        place = int(share * len(files[name]))
        data = files[name][:place] + new + files[name][place + cut :]
        return reseal_tags({**files, name: data})

    return change


def encode(text: str) -> bytes:
    """Any text as bytes."""
    return text.encode(errors="replace")


def check_documents(files: Files, change: Change) -> None:
    """Apply a change; the bag is refused, or holds the same collection under the same name, licence and authors."""
    changed = change(files)
    if changed is None:
        return
    if not passes(lambda: verify_bag(read_bag(Memory(changed)))):
        return
    bag, found = read_bag(Memory(files)), read_bag(Memory(changed))
    true, collection = open_bag(bag), open_bag(found)
    assert collection.content_hash == true.content_hash
    assert (found.name, found.licence, found.authors) == (bag.name, bag.licence, bag.authors)
    for entry in true.tasks:
        for name in entry.store.layouts:
            assert collection.task(entry.index).content[name] == entry.content[name]
