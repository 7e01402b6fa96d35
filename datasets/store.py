"""One store: the Zarr v3 group that holds a sealed task's episodes.

    task_0000.zarr/
      zarr.json                       attributes and, for other readers, consolidated metadata
      observations (T+E, obs_dim) f4  actions (T, act_dim) f4   rewards (T,) f4   infos/<name> (T,) f4
      episodes/                       (E,) length i4, end u1, return f8, quality u1, sac_step i8, seed i8, heldout u1
      evaluation/                     sac_step (C,) i8, returns (C, R) f8: every return of every checkpoint

`attributes["focal"]` declares format, sizes and infos; every file must follow from those three, or the store is
refused before a chunk is decoded.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FocalError
from .arrays import (
    CHUNK_BYTES,
    MAX_METADATA_BYTES,
    Layout,
    check_chunk_files,
    check_metadata,
    decode_array,
    wanted_chunks,
    write_array,
)
from .episodes import PER_EPISODE, Array, Episodes
from .records import Reader
from .sources import Source
from .storage import AGAIN, parse_json, to_json, write_file

TASK_FORMAT = "focal-task/1"

MAX_EPISODES = MAX_STEPS = 10**8
MAX_WIDTH = 10**6
MAX_INFOS = 64
MAX_ATTRIBUTE_BYTES = 16 * 2**20
BOMB_BYTES, BOMB_RATIO = 256 * 2**20, 200
"""A store that decodes to more than both these bytes and this multiple of its files holds no real observations."""

_STORED_NAMES = {
    "lengths": "episodes/length",
    "ends": "episodes/end",
    "returns": "episodes/return",
    "qualities": "episodes/quality",
    "sac_steps": "episodes/sac_step",
    "seeds": "episodes/seed",
    "heldout": "episodes/heldout",
}
_INFO_NAME = r"[a-z][a-z0-9_]{0,63}"
_F4, _F8, _I8 = np.dtype("<f4"), np.dtype("<f8"), np.dtype("<i8")


@dataclass(frozen=True)
class Sizes:
    """The declared dimensions of a store."""

    episodes: int
    steps: int
    observation_dim: int
    action_dim: int
    checkpoints: int
    rollouts: int


@dataclass(frozen=True)
class Store:
    """A store whose structure was checked; its chunks were not read."""

    source: Source = field(repr=False)
    folder: str
    """Where it is in `source`, for example `tasks/task_0003.zarr`."""
    where: str
    """What error messages call it, for example `task 3`."""
    attributes: Mapping[str, Any]
    sizes: Sizes
    layouts: Mapping[str, Layout]
    """Every array by name."""

    @property
    def decoded_bytes(self) -> int:
        """Size of all its arrays in memory."""
        return sum(layout.row_bytes * layout.shape[0] for layout in self.layouts.values())

    def read(self, name: str, rows: Array | None = None) -> Array:
        """Decode one array, or only its rows where `rows` (n,) bool is True."""
        return self.read_arrays({name: rows})[name]

    def read_arrays(self, wanted: Mapping[str, Array | None]) -> dict[str, Array]:
        """Decode several arrays, or of each the rows where its mask is True.

        Chunks without a wanted row are not read, the others side by side where that is faster. Raises `FocalError`
        naming the chunk that is damaged.
        """
        layouts = {name: self.layouts[name] for name in wanted}
        paths = [
            f"{self.folder}/{name}/{file}" for name in wanted for _, file in wanted_chunks(layouts[name], wanted[name])
        ]
        files = iter(self.source.read_many(paths, max(layout.file_bytes for layout in layouts.values())))
        return {
            name: decode_array(files, f"{self.where}, array {name}", layout, wanted[name])
            for name, layout in layouts.items()
        }

    def read_table(self) -> dict[str, Array]:
        """Decode the (E,) arrays by their name in `Episodes`; the lengths are checked. Reads no transition."""
        arrays = self.read_arrays(dict.fromkeys(_STORED_NAMES.values()))
        table = {name: arrays[stored] for name, stored in _STORED_NAMES.items()}
        lengths = table["lengths"]
        if lengths.min() < 1 or lengths.sum(dtype=np.int64) != self.sizes.steps:
            raise FocalError(
                f"{self.where}: episodes/length has {lengths.min()} as its least and {lengths.sum(dtype=np.int64)} as "
                f"its sum, expected at least 1 and {self.sizes.steps}; {AGAIN}"
            )
        return table

    def read_episodes(self, mask: Array | None = None, table: Mapping[str, Array] | None = None) -> Episodes:
        """Decode and validate the episodes where `mask` (E,) bool is True, or all; `table` saves reading it again.

        Chunks that hold none of their rows are not read.
        """
        table = self.read_table() if table is None else table
        if mask is not None and mask.all():
            mask = None
        lengths = table["lengths"]
        steps = None if mask is None else np.repeat(mask, lengths)
        rows = None if mask is None else np.repeat(mask, lengths + 1)
        infos = [f"infos/{name}" for name in self.attributes["infos"]]
        arrays = self.read_arrays({"observations": rows} | dict.fromkeys(("actions", "rewards", *infos), steps))
        episodes = Episodes(
            observations=arrays["observations"],
            actions=arrays["actions"],
            rewards=arrays["rewards"],
            infos={name.removeprefix("infos/"): arrays[name] for name in infos},
            **{name: table[name] if mask is None else table[name][mask] for name in _STORED_NAMES},
        )
        episodes.validate(self.where)
        return episodes


def episodes_of(arrays: Mapping[str, Array]) -> Episodes:
    """The inverse of `episode_arrays`."""
    return Episodes(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        infos={name.removeprefix("infos/"): arrays[name] for name in arrays if name.startswith("infos/")},
        **{name: arrays[stored] for name, stored in _STORED_NAMES.items()},
    )


def episode_arrays(episodes: Episodes) -> dict[str, Array]:
    """Return the stored arrays of `episodes` by their name in the group."""
    return {
        "observations": episodes.observations,
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        **{f"infos/{name}": values for name, values in sorted(episodes.infos.items())},
        **{stored: getattr(episodes, name) for name, stored in _STORED_NAMES.items()},
    }


def evaluation_arrays(episodes: Episodes) -> dict[str, Array]:
    """Return every return of every checkpoint: sac_step (C,) and returns (C, R), short rows padded with NaN.

    Raises `FocalError` where checkpoints have so unequal numbers of episodes that it would be nearly all padding.
    """
    steps, checkpoint, counts = np.unique(episodes.sac_steps, return_inverse=True, return_counts=True)
    shape = len(steps), int(counts.max())
    if 8 * math.prod(shape) > BOMB_BYTES and math.prod(shape) > BOMB_RATIO * len(checkpoint):
        raise FocalError(
            f"{len(checkpoint)} episodes are of {len(steps)} checkpoints, one of which has {shape[1]}, expected about "
            "as many of each; is the checkpoint of every episode right?"
        )
    returns = np.full(shape, np.nan)
    order = np.argsort(checkpoint, kind="stable")
    column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # its place among its checkpoint's
    returns[checkpoint[order], column] = episodes.returns[order]
    return {"evaluation/sac_step": steps, "evaluation/returns": returns}


def write_store(
    folder: Path,
    episodes: Episodes,
    attributes: Mapping[str, Any],
    chunk_bytes: int = CHUNK_BYTES,
    compressor: str = "zstd",
) -> None:
    """Write a store into the empty `folder`; the caller makes it durable and renames it into place.

    `attributes` are added to format, sizes and infos. Chunk size and compressor change neither what is read nor any
    content hash.
    """
    evaluation = evaluation_arrays(episodes)
    sizes = Sizes(
        episodes.num_episodes,
        episodes.num_steps,
        episodes.observations.shape[1],
        episodes.actions.shape[1],
        *evaluation["evaluation/returns"].shape,
    )
    infos = sorted(episodes.infos)
    arrays = {**episode_arrays(episodes), **evaluation}
    expected = {name: (values.shape, values.dtype) for name, values in arrays.items()}
    assert expected == expected_arrays(sizes, infos), "write_store and expected_arrays disagree"
    members = {
        name: write_array(folder / name, values, chunk_bytes, compressor) for name, values in sorted(arrays.items())
    }
    for group in _groups(arrays):
        write_file(folder / group / "zarr.json", to_json(_group_metadata({})))
    focal = {"format": TASK_FORMAT, "sizes": asdict(sizes), "infos": infos, **attributes}
    metadata = {**_group_metadata({"focal": focal}), "consolidated_metadata": _consolidated(members)}
    write_file(folder / "zarr.json", to_json(metadata))


def inspect_store(
    source: Source, folder: str, where: str, files: Mapping[str, int], documents: Mapping[str, bytes]
) -> Store:
    """Check a store's structure: format, declared sizes, every array's metadata, every chunk file present, none extra.

    `files` maps the paths inside the store to bytes, and `documents` every `zarr.json` among them to its content; no
    other file is read. Raises `FocalError` saying what was found and expected.
    """
    if "zarr.json" not in files:
        raise FocalError(f"{where}: {folder}/zarr.json is missing; {AGAIN}")
    metadata = parse_json(documents["zarr.json"], f"{folder}/zarr.json")
    attributes = Reader(Reader(metadata, where).mapping("attributes"), where).mapping("focal")
    check_format(attributes, TASK_FORMAT, where)
    sizes, infos = _declared(attributes, where)
    expected = expected_arrays(sizes, infos)
    below: dict[str, dict[str, int]] = {name: {} for name in expected}
    groups = [f"{group}/zarr.json" for group in _groups(expected)]
    for name, size in files.items():
        owner = "/".join(name.split("/")[: 2 if name.startswith(("infos/", "episodes/", "evaluation/")) else 1])
        if owner in below:
            below[owner][name.removeprefix(owner + "/")] = size
        elif name not in ("zarr.json", *groups):
            raise FocalError(f"{where}: extra file {name!r}, expected only the declared arrays; delete it")
    layouts, members = {}, {}
    for name, (shape, dtype) in expected.items():
        if "zarr.json" not in below[name]:
            raise FocalError(f"{where}: array {name} is missing; {AGAIN}")
        members[name] = _member(documents, f"{name}/zarr.json", where)
        layouts[name] = check_metadata(members[name], f"{where}, array {name}", shape, dtype)
        check_chunk_files(f"{where}, array {name}", layouts[name], below[name])
    for name in groups:
        if name not in documents or _member(documents, name, where) != _group_metadata({}):
            raise FocalError(f"{where}: {name} is not a plain Zarr v3 group; {AGAIN}")
    _check_group(where, metadata, members)
    store, stored = Store(source, folder, where, attributes, sizes, layouts), sum(files.values())
    if (decoded := store.decoded_bytes) > max(BOMB_BYTES, BOMB_RATIO * stored):
        raise FocalError(f"{where}: its {stored} bytes claim to decode to {decoded}, expected real data; {AGAIN}")
    return store


def expected_arrays(sizes: Sizes, infos: list[str]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and type of every array a store of these sizes must have."""
    steps, episodes = sizes.steps, sizes.episodes
    return {
        "observations": ((steps + episodes, sizes.observation_dim), _F4),
        "actions": ((steps, sizes.action_dim), _F4),
        "rewards": ((steps,), _F4),
        **{f"infos/{name}": ((steps,), _F4) for name in infos},
        **{_STORED_NAMES[name]: ((episodes,), dtype) for name, dtype in PER_EPISODE.items()},
        "evaluation/sac_step": ((sizes.checkpoints,), _I8),
        "evaluation/returns": ((sizes.checkpoints, sizes.rollouts), _F8),
    }


def array_hash(values: Array) -> str:
    """sha256 of type, shape and little-endian C-order bytes: the same for any codec and any chunks."""
    values = np.ascontiguousarray(values)
    digest = hashlib.sha256(f"{values.dtype.newbyteorder('<').str} {list(values.shape)}\n".encode())
    digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def check_format(document: Mapping[str, Any], form: str, where: object) -> None:
    """Refuse a document of another format or format version."""
    if (found := document.get("format")) != form:
        raise FocalError(
            f"{where}: found format {repr(found)[:80]}, expected '{form}'; "
            "install the focal-omrl version that wrote it, or generate the data again: focal-cli data generate"
        )


def _declared(attributes: Mapping[str, Any], where: str) -> tuple[Sizes, list[str]]:
    read = Reader(Reader(attributes, where).mapping("sizes"), f"{where} sizes")
    episodes = read.integer("episodes", 1, MAX_EPISODES)
    sizes = Sizes(
        episodes,
        read.integer("steps", episodes, MAX_STEPS),
        read.integer("observation_dim", 1, MAX_WIDTH),
        read.integer("action_dim", 1, MAX_WIDTH),
        read.integer("checkpoints", 1, episodes),
        read.integer("rollouts", 1, episodes),
    )
    return sizes, read_infos(Reader(attributes, where), where)


def read_infos(read: Reader, where: str) -> list[str]:
    """Read the names of the infos: some will be names of folders, so nothing but plain words is one."""
    infos: list[str] = read.items("infos", str)
    if (
        len(infos) > MAX_INFOS
        or infos != sorted(set(infos))
        or not all(re.fullmatch(_INFO_NAME, name) for name in infos)
    ):
        raise FocalError(f"{where}: infos is {repr(infos)[:80]}, expected sorted lower-case names; {AGAIN}")
    return infos


def _groups(arrays: Mapping[str, Any]) -> list[str]:
    return sorted({name.partition("/")[0] for name in arrays if "/" in name})


def _group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def _consolidated(members: Mapping[str, Any]) -> dict[str, Any]:
    """All arrays' metadata in one place, as zarr.consolidate_metadata writes it: one request instead of 17 on S3."""
    empty = {"kind": "inline", "must_understand": False, "metadata": {}}
    groups = {name: {**_group_metadata({}), "consolidated_metadata": empty} for name in _groups(members)}
    return {"kind": "inline", "must_understand": False, "metadata": {**groups, **members}}


def consolidated_documents(data: bytes, where: str) -> dict[str, bytes]:
    """Return the `zarr.json` of every member, as `write_store` spells it, from the store's own; by name in the store.

    What another program wrote may be spelt otherwise: compare hashes before use.
    """
    found: Any = parse_json(data, where).get("consolidated_metadata")
    members = found.get("metadata") if isinstance(found, dict) else None
    return {
        f"{name}/zarr.json": to_json({key: value for key, value in member.items() if key != "consolidated_metadata"})
        for name, member in (members.items() if isinstance(members, dict) else ())
        if isinstance(member, dict)
    }


def _member(documents: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if len(documents[name]) > MAX_METADATA_BYTES:
        raise FocalError(f"{where}: {name} is larger than the {MAX_METADATA_BYTES} bytes allowed there; {AGAIN}")
    return parse_json(documents[name], f"{where}: {name}")


def _check_group(where: str, metadata: Mapping[str, Any], members: Mapping[str, Any]) -> None:
    """Refuse group metadata that would show another reader other arrays than the ones checked here."""
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "group":
        raise FocalError(f"{where}: zarr.json is not a Zarr v3 group; {AGAIN}")
    if metadata.get("consolidated_metadata", _consolidated(members)) != _consolidated(members):
        raise FocalError(f"{where}: the consolidated metadata differ from the arrays' own; {AGAIN}")
