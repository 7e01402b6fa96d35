"""Bundles: other people's tools verify and read them, the same data give the same bytes, every fault is refused.

Hostile bundles are made by `reseal` (bundle_tools.py): all hashes and listings agree with the lie.
"""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from focal.datasets import (
    archive,
    bundle,
    open_collection,
    pack_bundle,
    storage,
    unpack_bundle,
    verify_bundle,
    verify_collection,
)
from focal.datasets import bag as bag_module
from focal.datasets.bag import read_bag, verify_bag
from focal.datasets.merging import merge_collections
from focal.datasets.sources import Below, Folder
from focal.errors import DiskFullError, FocalError, UsageError

from .bundle_fuzz import check_bundle_bytes, check_documents, json_changes, text_changes
from .bundle_tools import (
    Files,
    Memory,
    files_of,
    little_memory,
    refused,
    reseal,
    reseal_bag,
    reseal_tags,
    write_files,
    zip_of,
)

NAME = "walks-1.0.0"
STORE = "data/tasks/task_0001.zarr"
CONSOLIDATED = "consolidated_metadata"


@pytest.fixture(scope="module")
def source(make_collection, tmp_path_factory) -> Path:
    """A collection of two tasks, with a policy; never changed."""
    path = tmp_path_factory.mktemp("source") / "walks"
    make_collection(path, tasks=2, skills=(0.0, 0.4, 1.0), episodes=4, commit=False)
    write_files(path, {"policies/task_0000/step_000001000.json": b"{}", "policies/task_0000/x.safetensors": bytes(99)})
    make_collection(path, tasks=2, skills=(0.0, 0.4, 1.0), episodes=4)
    return path


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    """The bundle file."""
    return pack_bundle(source, tmp_path_factory.mktemp("packed") / "walks.focal.zip")[0]


@pytest.fixture(scope="module")
def bag(source, tmp_path_factory) -> Files:
    """The files of the same bundle as a folder."""
    return files_of(pack_bundle(source, tmp_path_factory.mktemp("packed") / NAME, as_folder=True)[0])


@pytest.fixture(params=["folder", "file"])
def as_form(request, tmp_path) -> Callable[[Files], Path]:
    """Writes a bag as a folder, or as a file."""
    if request.param == "folder":
        return partial(write_files, tmp_path / "given" / NAME)

    def write(files: Files) -> Path:
        (tmp_path / "given").mkdir()
        return zip_of(tmp_path / "given" / "x.zip", files, NAME)

    return write


def edit(files: Files, name: str, change: Callable[[dict], object]) -> Files:
    """Change a JSON file of a bag."""
    document = json.loads(files[name])
    change(document)
    return {**files, name: json.dumps(document).encode()}


def refused_whole(path: Path, folder: Path) -> str:
    """Verify and unpack a bundle: both refuse it alike, need no memory, and nothing is written."""
    with little_memory():
        message = refused(lambda: verify_bundle(path))
        assert refused(lambda: unpack_bundle(path, folder / "stores" / "walks")) == message
    assert not (folder / "stores").exists()
    return message


# ---- other people's tools ----

FOREIGN = """
import sys, zipfile, zarr, numpy as np
bundle, folder = sys.argv[1:]
store = zarr.storage.ZipStore(bundle, mode="r")
group = zarr.open_group(store, path="walks-1.0.0/data/tasks/task_0001.zarr", mode="r", zarr_format=3)
for name in ("observations", "actions", "rewards", "infos/sparse_reward", "episodes/length", "evaluation/returns"):
    np.save(folder + "/" + name.replace("/", "."), group[name][:])
assert not [name for name in sys.modules if name.partition(".")[0] == "focal"]
"""


def test_others_verify_and_read_it_without_our_software(packed, source, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    run = partial(subprocess.run, check=True, cwd=tmp_path, env=environment, capture_output=True)
    if shutil.which("unzip"):
        run(["unzip", "-q", packed])
    else:
        with zipfile.ZipFile(packed) as file:
            file.extractall(tmp_path)
    sums = ["sha256sum", "-c", "--strict", "--quiet", "tagmanifest-sha256.txt", "manifest-sha256.txt"]
    run(sums, cwd=tmp_path / NAME)
    validate = [sys.executable, Path(sys.executable).with_name("bagit.py"), "--validate", "--quiet", tmp_path / NAME]
    run(validate)
    run([sys.executable, "-c", FOREIGN, packed, tmp_path])
    task = open_collection(source).task(1)
    for name in ("observations", "actions", "rewards", "infos/sparse_reward", "episodes/length", "evaluation/returns"):
        found = np.load(tmp_path / (name.replace("/", ".") + ".npy"))
        np.testing.assert_array_equal(found, task.store.read(name), strict=True)
    with open(tmp_path / NAME / STORE / "rewards/c/0", "r+b") as file:
        file.write(b"x")
    for command in (sums, validate):
        with pytest.raises(subprocess.CalledProcessError):
            run(command, cwd=tmp_path / NAME)


def test_the_bag_says_what_it_holds(bag, source):
    collection = open_collection(source)
    info = dict(line.split(": ", 1) for line in bag["bag-info.txt"].decode().splitlines())
    payload = [data for name, data in bag.items() if name.startswith("data/")]
    assert info["External-Identifier"] == NAME
    assert info["Payload-Oxum"] == f"{sum(map(len, payload))}.{len(payload)}"
    assert info["Bagging-Date"] == collection.created[:10]
    assert (info["Licence"], info["Author"], info["Contact-Name"]) == ("CC-BY-4.0", "Ada Lovelace", "Ada Lovelace")
    assert info["Content-Hash"] == collection.content_hash
    assert {name.removeprefix("data/") for name in bag if name.startswith("data/")} == {*files_of(source)}
    assert {name for name in bag if not name.startswith("data/")} == {
        "bag-info.txt", "bagit.txt", "croissant.json", "manifest-sha256.txt", "tagmanifest-sha256.txt"
    }  # fmt: skip
    assert reseal_bag(bag) == bag


def test_croissant(bag, source):
    """The properties Croissant 1.0 asks of a dataset and of a file object, and what they must be here."""
    document = json.loads(bag["croissant.json"])
    assert document["@type"] == "sc:Dataset"
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert document["@context"]["cr"] == "http://mlcommons.org/croissant/"
    assert document["@context"]["conformsTo"] == "dct:conformsTo"
    assert re.fullmatch(r"[A-Za-z0-9._-]+", document["name"])
    assert (document["name"], document["version"]) == ("walks", "1.0.0")
    assert document["license"] == "https://spdx.org/licenses/CC-BY-4.0.html"
    assert document["creator"] == [{"@type": "sc:Person", "name": "Ada Lovelace"}]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["datePublished"])
    assert "sparse-point-robot: 2 tasks (1 to train on, 1 to test on), 480 transitions" in document["description"]
    assert "Ada Lovelace" in document["citeAs"]
    assert open_collection(source).content_hash in document["citeAs"]
    listed = {file["@id"]: file for file in document["distribution"]}
    assert set(listed) == {"manifest-sha256.txt", "data/dataset.json"}
    for name, file in listed.items():
        assert file["@type"] == "cr:FileObject"
        assert (file["name"], file["contentUrl"]) == (name, name)
        assert file["contentSize"] == f"{len(bag[name])} B"
        assert re.fullmatch(r"\w+/\w+", file["encodingFormat"])
        assert file["sha256"] == read_bag(Memory(bag)).files[name]


# ---- same data, same bytes ----

ELSEWHEN = """
import datetime, os, sys, time
os.umask(0o077)
class Clock(datetime.datetime):
    now = classmethod(lambda cls, tz=None: cls(2044, 2, 29, tzinfo=tz))
    utcnow = classmethod(lambda cls: cls(2044, 2, 29))
datetime.datetime = Clock
time.time = lambda: 2340000000.0
from pathlib import Path
from focal.datasets import pack_bundle
pack_bundle(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_another_day_and_place_give_the_same_bytes(packed, source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "elsewhere" / "renamed")
    for file in copy.rglob("*"):
        file.chmod(0o700)
        os.utime(file, (10**9, 10**9))
    environment = {**os.environ, "TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", ELSEWHEN, copy, tmp_path / "x.zip"], check=True, cwd="/", env=environment)
    assert (tmp_path / "x.zip").read_bytes() == packed.read_bytes()


def test_pack_unpack_pack(packed, source, tmp_path):
    collection, report = unpack_bundle(packed, tmp_path / "walks")
    assert files_of(tmp_path / "walks") == files_of(source)
    assert collection.content_hash == open_collection(source).content_hash == report.content_hash
    again, _ = pack_bundle(collection.path, tmp_path / "x.zip")
    assert again.read_bytes() == packed.read_bytes()
    folder, _ = pack_bundle(source, tmp_path / NAME, as_folder=True)
    from_folder, _ = unpack_bundle(folder, stores=tmp_path / "stores")
    assert from_folder.path == tmp_path / "stores" / "sparse-point-robot"
    assert files_of(from_folder.path) == files_of(source)


def test_progress_counts_to_its_end(source, tmp_path):
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    for call in (
        lambda: pack_bundle(source, tmp_path / "x.zip", progress=progress),
        lambda: verify_bundle(tmp_path / "x.zip", progress=progress),
        lambda: unpack_bundle(tmp_path / "x.zip", tmp_path / "walks", progress=progress),
    ):
        seen.clear()
        call()
        shares = [done / total for done, total in seen]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert len(shares) > 60


def test_a_bundle_is_read_in_place(packed, source):
    """The same code opens the collection inside the file."""
    inside = bundle.open_bundle(packed)
    collection = bundle.open_bag(inside)
    np.testing.assert_array_equal(collection.load(1).rewards, open_collection(source).load(1).rewards)
    assert str(collection.source) == f"{packed}/data"
    assert Below(Folder(source), "tasks").exists("task_0000.zarr/zarr.json")
    assert Below(Folder(source), "tasks").sizes(skip=("task_0000.zarr",)).keys() == {
        name.removeprefix("tasks/") for name in files_of(source) if name.startswith("tasks/task_0001")
    }


# ---- what may be packed, and where ----


def test_authors(make_collection, source, tmp_path, make_record, make_episodes):
    with pytest.raises(UsageError, match=r"names its authors \(Ada Lovelace\), which never change; leave --author out"):
        pack_bundle(source, tmp_path / "x.zip", authors=["Eve"])
    path = nameless(shutil.copytree(source, tmp_path / "nameless"))
    with pytest.raises(UsageError, match="names no author, and a bundle must; add --author"):
        pack_bundle(path, tmp_path / "x.zip")
    with pytest.raises(UsageError, match="expected a printable name"):
        pack_bundle(path, tmp_path / "x.zip", authors=["a\nb"])
    assert not (tmp_path / "x.zip").exists()
    _, report = pack_bundle(path, tmp_path / "x.zip", authors=["Grace Hopper <grace@navy.mil>", "Ada  Lovelace"])
    assert report.authors == ("Grace Hopper <grace@navy.mil>", "Ada  Lovelace")
    assert verify_bundle(tmp_path / "x.zip").authors == ("Grace Hopper <grace@navy.mil>", "Ada Lovelace")
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        info = file.read(f"{NAME}/bag-info.txt").decode()
        croissant = json.loads(file.read(f"{NAME}/croissant.json"))
    assert "Contact-Name: Grace Hopper\nContact-Email: grace@navy.mil\n" in info
    assert [creator["name"] for creator in croissant["creator"]] == ["Grace Hopper <grace@navy.mil>", "Ada  Lovelace"]


def nameless(path: Path) -> Path:
    """A collection made without authors."""
    files = reseal(
        edit({f"data/{name}": data for name, data in files_of(path).items()}
             | {"bag-info.txt": b"", "bagit.txt": b"", "croissant.json": b""},
             "data/dataset.json", lambda document: document.update(authors=[]))
    )  # fmt: skip
    (path / "dataset.json").write_bytes(files["data/dataset.json"])
    return path


def test_a_damaged_collection_is_not_packed(source, tmp_path):
    path = shutil.copytree(source, tmp_path / "walks")
    with open(path / "tasks/task_0000.zarr/actions/c/0/0", "r+b") as file:
        file.write(b"x")
    for as_folder in (False, True):
        call = partial(pack_bundle, path, tmp_path / "x", as_folder=as_folder)
        assert "task 0, array actions, chunk 0" in refused(call)
    assert not (tmp_path / "x").exists()


def test_a_name_no_other_system_can_hold_is_not_packed(make_collection, tmp_path, make_episodes, monkeypatch):
    path = tmp_path / "walks"
    make_collection(path, tasks=2, skills=(0.0, 1.0), episodes=2, commit=False)
    write_files(path, {"policies/task_0000/nul.json": b"{}"})
    make_collection(path, tasks=2, skills=(0.0, 1.0), episodes=2)
    message = refused(lambda: pack_bundle(path, tmp_path / "x.zip"))
    assert "'data/policies/task_0000/nul.json' is reserved on Windows" in message


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_collection_whose_name_no_receiver_can_hold_is_not_packed(make_collection, tmp_path, as_folder, monkeypatch):
    """Whoever packs is told, not whoever receives."""
    given = make_collection(tmp_path / "aux.robot", tasks=2, skills=(0.0, 1.0), episodes=2)
    message = refused(lambda: pack_bundle(given.path, tmp_path / "x", as_folder=as_folder))
    assert "'aux.robot-1.0.0/data/README.md' is reserved on Windows" in message
    command = message.split("name: ")[1]
    assert command == f"focal-cli data merge {given.path} -o NEW --name OTHER"
    renamed = merge_collections([given], tmp_path / "new", name="robot")
    pack_bundle(renamed.path, tmp_path / "y", as_folder=as_folder)
    longest = max(len(name) for name in renamed.files) + len("robot-1.0.0/data/")
    monkeypatch.setattr(bag_module, "MAX_NAME", longest - 1)
    message = refused(lambda: pack_bundle(renamed.path, tmp_path / "z", as_folder=as_folder))
    assert f"is longer than {longest - 1} characters; give the data another or a shorter name" in message
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_same_pack_and_unpack_side_by_side(source, tmp_path, as_folder):
    """Whoever is second finds the same bundle, or the same collection, and keeps it; another thing is no success."""
    out, busy = tmp_path / "x", []

    def beside(done, total):
        if done > total * 0.9 and not busy:  # the first command to come here is overtaken
            busy.append(True)
            pack_bundle(source, out, as_folder=as_folder)

    pack_bundle(source, out, as_folder=as_folder, progress=beside)
    assert busy
    busy.clear()

    def unpacked(done, total):
        if done > total * 0.9 and not busy:
            busy.append(True)
            unpack_bundle(out, tmp_path / "y")

    unpack_bundle(out, tmp_path / "y", progress=unpacked)
    assert busy

    def other(done, total):
        if done > total * 0.9 and not (tmp_path / "z").exists():
            (tmp_path / "z").mkdir()
            (tmp_path / "z" / "theirs").write_text("x")

    if as_folder:
        assert "is not this bundle" in refused(
            lambda: pack_bundle(source, tmp_path / "z", as_folder=True, progress=other)
        )
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="link is a link to nothing"):
        pack_bundle(source, tmp_path / "link", as_folder=as_folder)


def test_nothing_else_is_ever_replaced(packed, source, tmp_path):
    out = tmp_path / "x.zip"
    pack_bundle(source, out)
    before = out.stat().st_mtime_ns
    pack_bundle(source, out)
    assert out.stat().st_mtime_ns == before, "the bundle is there already"
    out.write_bytes(packed.read_bytes()[:-1])
    assert "exists and is not this bundle" in refused(lambda: pack_bundle(source, out))
    out.write_text("my thesis")
    assert "exists and is not this bundle" in refused(lambda: pack_bundle(source, out))
    assert out.read_text() == "my thesis"
    with pytest.raises(UsageError, match=rf"is a folder; name the file: -o {tmp_path}/walks-1.0.0.focal.zip"):
        pack_bundle(source, tmp_path)
    for inside in (source, source / "x.zip", source / "policies" / "x"):
        with pytest.raises(UsageError, match="lies inside"):
            pack_bundle(source, inside)
    folder, _ = pack_bundle(source, tmp_path / NAME, as_folder=True)
    pack_bundle(source, folder, as_folder=True)
    with open(folder / STORE / "rewards/c/0", "r+b") as file:
        file.write(b"x")
    assert "exists and is not this bundle" in refused(lambda: pack_bundle(source, folder, as_folder=True))


def test_unpacking_never_replaces_anything(packed, source, tmp_path):
    target = tmp_path / "stores" / "walks"
    target.mkdir(parents=True)  # an empty folder is no loss
    first, _ = unpack_bundle(packed, target)
    second, _ = unpack_bundle(packed, target)
    assert first.content_hash == second.content_hash
    chunk = target / "tasks/task_0001.zarr/rewards/c/0"
    data = chunk.read_bytes()
    chunk.write_bytes(b"x" + data[1:])
    assert "array rewards, chunk 0) is damaged" in refused(lambda: unpack_bundle(packed, target))
    chunk.write_bytes(data)
    other = nameless(shutil.copytree(source, tmp_path / "other"))
    message = refused(lambda: unpack_bundle(packed, other))
    assert f"not the collection of this bundle; choose another folder, for example: -o {tmp_path / NAME}" in message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("all of it")
    for taken in (tmp_path / "notes", tmp_path / "notes" / "thesis.txt"):
        assert "exists and is not the collection" in refused(lambda taken=taken: unpack_bundle(packed, taken))
    folder, _ = pack_bundle(source, tmp_path / NAME, as_folder=True)
    with pytest.raises(UsageError, match="lies inside"):
        unpack_bundle(folder, folder / "x")


def test_what_is_no_bundle(source, packed, tmp_path):
    assert "no bundle at" in refused(lambda: verify_bundle(tmp_path / "nothing"))
    assert "is a collection, no bundle; pack it: focal-cli bundle pack" in refused(lambda: verify_bundle(source))
    assert "is no bundle (tagmanifest-sha256.txt is missing)" in refused(lambda: verify_bundle(tmp_path))
    assert "is a file, expected a collection's folder; unpack it" in refused(lambda: open_collection(packed))
    folder, _ = pack_bundle(source, tmp_path / "folder", as_folder=True)
    assert "is a bundle's folder, expected a collection's; unpack it" in refused(lambda: open_collection(folder))


def test_too_large(packed, bag, tmp_path, monkeypatch):
    assert "raise --max-size" in refused(lambda: unpack_bundle(packed, tmp_path / "walks", max_size=1000))
    folder = write_files(tmp_path / NAME, bag)
    assert "raise --max-size" in refused(lambda: verify_bundle(folder, max_size=1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))
    with pytest.raises(DiskFullError, match=r"needs \d+ bytes and 100000 are free: free space, or choose a folder on"):
        unpack_bundle(packed, tmp_path / "stores" / "walks")
    assert not (tmp_path / "stores").exists()


# ---- accidents ----


def test_a_flipped_byte_in_any_file(bag, tmp_path):
    """Folder form, and file form with a right CRC-32; test_datasets_archive.py damages the file as it is."""
    folder = write_files(tmp_path / NAME, bag)
    verify_bundle(folder)
    for name, data in bag.items():
        place = len(data) // 2
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        (folder / name).write_bytes(flipped)
        message = refused(lambda: verify_bundle(folder))
        if name.startswith("data/"):
            assert name.removeprefix("data/") in message
        (folder / name).write_bytes(data)
        if name in ("data/dataset.json", f"{STORE}/rewards/c/0", "bag-info.txt"):
            path = zip_of(tmp_path / "x.zip", {**bag, name: flipped}, NAME)
            assert "damaged" in refused(lambda path=path: verify_bundle(path))


def test_a_digit_of_a_task_parameter(packed, bag, tmp_path, as_form):
    text = bag[f"{STORE}/zarr.json"].decode()
    goal = repr(json.loads(text)["attributes"]["focal"]["task"]["params"]["goal"][0])
    changed = text.replace(goal, goal[:-1] + str((int(goal[-1]) + 1) % 10)).encode()
    files = {**bag, f"{STORE}/zarr.json": changed}
    assert f"{STORE.removeprefix('data/')}/zarr.json was changed" in refused_whole(as_form(files), tmp_path)


def test_a_signed_digit_of_a_task_parameter(bag, tmp_path, as_form):
    """All files' hashes agree with it, but not the content hash."""
    files = edit(
        bag, f"{STORE}/zarr.json", lambda d: d["attributes"]["focal"]["task"]["params"].update(goal=[0.5, 0.5])
    )
    message = refused_whole(as_form(reseal(files)), tmp_path)
    assert "task 1 is not the one dataset.json lists" in message
    assert "focal-cli bundle pull" in message, "the bundle itself is wrong: unpacking it again would not help"


@pytest.mark.parametrize("name", [f"{STORE}/rewards/c/0", "data/dataset.json", "bagit.txt", "croissant.json",
                                  "manifest-sha256.txt", "tagmanifest-sha256.txt"])  # fmt: skip
def test_a_file_removed(bag, tmp_path, as_form, name):
    files = {other: data for other, data in bag.items() if other != name}
    message = refused_whole(as_form(files), tmp_path)
    assert "missing" in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{STORE}/rewards/c/1", "extra file"),
        ("data/policies/task_0001/agent.safetensors", "extra file"),
        ("data/notes.txt", "is none a bundle has"),
        ("notes.txt", "is none a bundle has"),
        ("data/run.py", "is none a bundle has"),
        ("data/tasks.zip", "is none a bundle has"),
        ("data/staging/header.json", "is none a bundle has"),
    ],
)
def test_a_file_added(bag, tmp_path, as_form, name, message):
    files = {**bag, name: b"{}"}
    assert message in refused_whole(as_form(files), tmp_path)


def test_a_listed_file_that_dataset_json_does_not_list(bag, tmp_path, as_form):
    files = reseal_bag({**bag, f"{STORE}/rewards/c/1": b"hidden"})
    assert "extra file 'tasks/task_0001.zarr/rewards/c/1'" in refused_whole(as_form(files), tmp_path)


def test_every_length_a_bundle_file_is_cut_to(packed, tmp_path):
    data, path = packed.read_bytes(), tmp_path / "x.zip"
    for length in [*range(0, len(data), 997), *range(len(data) - 200, len(data))]:
        path.write_bytes(data[:length])
        refused(lambda: verify_bundle(path))


# ---- hostile authors ----


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"External-Identifier: walks-1.0.0", b"External-Identifier: walks-2.0.0", "External-Identifier|calls it"),
        (
            b"Licence: CC-BY-4.0",
            b"Licence: CC0-1.0",
            "bag-info.txt says Licence 'CC0-1.0', dataset.json says 'CC-BY-4.0'",
        ),
        (b"Author: Ada Lovelace", b"Author: Eve", "says Author 'Eve', dataset.json says 'Ada Lovelace'"),
        (b"Author: Ada Lovelace\n", b"", "Author is missing"),
        (b"Content-Hash: ", b"Content-Hash: 0", "bag-info.txt says Content-Hash"),
        (b"Payload-Oxum: ", b"Payload-Oxum: 1", "its payload is"),
        (b"Licence: ", b"Licence:", "expected 'Label: value'"),
        (b"Author: Ada", b"Author: \x1b[31mAda", "expected 'Label: value'"),
        (b"Author: Ada", b"Author: \xff", "is not UTF-8 text"),
    ],
)
def test_bag_info_that_lies(bag, tmp_path, as_form, old, new, message):
    assert old in bag["bag-info.txt"]
    files = reseal_tags({**bag, "bag-info.txt": bag["bag-info.txt"].replace(old, new)})
    text = refused_whole(as_form(files), tmp_path)
    assert any(part in text for part in message.split("|")), text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bagit.txt", lambda data: data.replace(b"1.0", b"0.97"), "is not that of BagIt 1.0"),
        ("manifest-sha256.txt", lambda data: data + data.splitlines(True)[0], "expected one line 'SHA256  NAME'"),
        ("manifest-sha256.txt", lambda data: data.replace(b"  ", b" *", 1), "expected one line 'SHA256  NAME'"),
        ("manifest-sha256.txt", lambda data: data.replace(b"data/README.md", b"../../README.md"), "is missing"),
        ("manifest-sha256.txt", lambda data: data.upper(), "expected one line"),
        ("manifest-sha256.txt", lambda data: data + b"0" * 64 + b"  data/x\n", "larger than|'data/x' is missing"),
        ("manifest-sha256.txt", lambda data: b"", "expected one line"),
        ("manifest-sha256.txt", lambda data: data[::-1], "expected one line"),
        ("croissant.json", lambda data: data.replace(b"CC-BY-4.0.", b"CC0-1.0."), "croissant.json says license"),
        ("croissant.json", lambda data: data.replace(b'"1.0.0"', b'"9.0.0"'), "croissant.json says version '9.0.0'"),
        ("croissant.json", lambda data: b"[]", "is not readable JSON"),
        ("croissant.json", lambda data: b"{" * 10**5, "is not readable JSON"),
        ("croissant.json", lambda data: b" " * (2**20 + 1), "larger than the 1048576 bytes"),
    ],
)  # fmt: skip
def test_tag_files_that_lie(bag, tmp_path, as_form, name, change, message):
    files = reseal_tags({**bag, name: change(bag[name])})
    text = refused_whole(as_form(files), tmp_path)
    assert any(part in text for part in message.split("|")), text


def test_the_tagmanifest_must_list_the_tag_files(bag, tmp_path, as_form):
    lines = bag["tagmanifest-sha256.txt"].splitlines(True)
    files = {**bag, "tagmanifest-sha256.txt": b"".join(lines[:-1])}
    assert "tagmanifest-sha256.txt lists" in refused_whole(as_form(files), tmp_path)


def test_the_folder_in_a_file_has_the_bundles_name(bag, tmp_path):
    path = zip_of(tmp_path / "x.zip", bag, "other-1.0.0")
    assert "bag-info.txt calls it 'walks-1.0.0', expected 'other-1.0.0'" in refused_whole(path, tmp_path)


def frame_of(data: bytes) -> bytes:
    """A chunk with a right checksum."""
    frame = blosc.compress(data, b"zstd", 3, 1, 0, 4)
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def set_sizes(document: dict, **sizes: int) -> None:
    document["attributes"]["focal"]["sizes"].update(sizes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rewards/zarr.json", lambda d: d.update(shape=[10**9]), "found shape [1000000000], expected [240]"),
        ("zarr.json", lambda d: set_sizes(d, steps=10**9), "'steps' is 1000000000, expected 12 to 100000000"),
        ("rewards/zarr.json", lambda d: d["codecs"].insert(0, {"name": "pickle"}), "found codecs ['pickle', 'bytes'"),
        ("rewards/zarr.json", lambda d: d["codecs"].append({"name": "vlen-bytes"}), "found codecs"),
        ("rewards/zarr.json", lambda d: d.update(data_type="object"), "found data_type 'object'"),
        ("rewards/zarr.json", lambda d: d.update(zarr_format=2), "found zarr_format 2"),
    ],
)
def test_hostile_metadata(bag, tmp_path, as_form, name, change, message):
    files = reseal(edit(bag, f"{STORE}/{name}", change))
    assert message in refused_whole(as_form(files), tmp_path)


def test_600_megabytes_in_a_small_chunk(bag, tmp_path, as_form):
    chunk = frame_of(bytes(600 * 10**6))
    assert len(chunk) < 200_000
    files = reseal({**bag, f"{STORE}/rewards/c/0": chunk})
    assert "array rewards: found chunk 0" in refused_whole(as_form(files), tmp_path)


def test_a_frame_that_claims_600_megabytes(bag, tmp_path, as_form):
    frame = bytearray(frame_of(bytes(960))[:-4])
    frame[4:8] = (600 * 10**6).to_bytes(4, "little")
    chunk = bytes(frame) + google_crc32c.value(bytes(frame)).to_bytes(4, "little")
    files = reseal({**bag, f"{STORE}/rewards/c/0": chunk})
    assert "chunk 0 is damaged (its blosc frame claims 600000000 bytes" in refused_whole(as_form(files), tmp_path)


def test_nothing_can_name_code_to_import(bag, tmp_path):
    """gymnasium.make("module:name") imports the module, and users hand it what a task says."""

    def entry_point(document: dict) -> None:
        document["attributes"]["focal"]["task"]["env_id"] = "antigravity:focal/Fly-v0"

    sys.modules.pop("antigravity", None)
    hostile = edit(edit(bag, f"{STORE}/zarr.json", entry_point), f"{STORE}/zarr.json", lambda d: d.pop(CONSOLIDATED))
    folder = write_files(tmp_path / NAME, reseal(hostile))
    assert "env_id is 'antigravity:focal/Fly-v0', expected a registered name" in refused_whole(folder, tmp_path)
    hostile = edit(bag, "data/dataset.json", lambda d: d.update(format="antigravity:open", entry_point="antigravity"))
    path = zip_of(tmp_path / "x.zip", reseal(hostile), NAME)
    assert "found format 'antigravity:open'" in refused_whole(path, tmp_path)
    assert "antigravity" not in sys.modules, "a module that opens a browser, here for who imports it"


@pytest.mark.parametrize("name", [f"{STORE}/rewards/c/0", "bag-info.txt", "data/tasks"])
def test_links_in_the_folder_form(bag, tmp_path, name):
    folder = write_files(tmp_path / NAME, bag)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused_whole(folder, tmp_path)


def test_a_bundle_swapped_while_it_is_unpacked(packed, source, tmp_path, monkeypatch):
    """Verified, then changed: the copy is hashed while it is written."""
    folder, _ = pack_bundle(source, tmp_path / NAME, as_folder=True)
    make = storage.make_folder

    def swap(path: Path) -> None:
        with open(folder / STORE / "rewards/c/0", "r+b") as file:
            file.write(b"x")
        make(path)

    monkeypatch.setattr(bundle, "make_folder", swap)
    message = refused(lambda: unpack_bundle(folder, tmp_path / "stores" / "walks"))
    assert "rewards/c/0' is damaged (its sha256 is not the one listed)" in message
    assert list((tmp_path / "stores").iterdir()) == []


def test_another_folder_that_came_first(packed, make_collection, tmp_path, monkeypatch):
    """The target is made by somebody else between the check and the rename."""
    other, rename = make_collection(tmp_path / "other", tasks=2, skills=(0.0, 1.0), episodes=2).path, os.rename

    def race(old: Path, new: Path) -> None:
        shutil.copytree(other, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", race)
    message = refused(lambda: unpack_bundle(packed, tmp_path / "walks"))
    assert f"{tmp_path / 'walks'} exists and is not the collection of this bundle" in message
    assert files_of(tmp_path / "walks") == files_of(other)


# ---- full disks ----


def disk_full(call: Callable[[], object]) -> str | None:
    """The message of a full disk, or None where there was room."""
    try:
        call()
    except DiskFullError as error:
        return str(error)
    return None


@pytest.mark.parametrize("what", ["file", "folder", "unpack"])
def test_a_full_disk_at_every_write(source, packed, tmp_path, monkeypatch, what):
    """The n-th write stops half-way, for every n: an error, nothing left behind, and the same call then works."""
    out, original = tmp_path / "made" / "walks", storage.write_all
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # some thousand; their failures are tested below
    calls: dict[str, Callable[[], object]] = {
        "file": lambda: pack_bundle(source, out),
        "folder": lambda: pack_bundle(source, out, as_folder=True),
        "unpack": lambda: unpack_bundle(packed, out),
    }
    for number in itertools.count():
        counter = itertools.count()

        def failing(file, data, counter=counter, number=number):
            if next(counter) == number:
                original(file, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            original(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_all", failing)
            patch.setattr(archive, "write_all", failing)
            message = disk_full(calls[what])
        if not message:
            break
        assert message.startswith(f"disk full while writing {out}")
        assert message.endswith("run the same command again; nothing finished was lost")
        assert list((tmp_path / "made").iterdir()) == [], number
    assert number > 60
    verify_collection(out) if what == "unpack" else verify_bundle(out)
    assert [entry.name for entry in (tmp_path / "made").iterdir()] == ["walks"]


@pytest.mark.parametrize("function", ["fsync", "rename", "link"])
def test_a_full_disk_when_the_work_is_published(source, packed, tmp_path, monkeypatch, function):
    def failing(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "made").mkdir()
    calls = [lambda: pack_bundle(source, tmp_path / "made" / "x.zip")] if function != "rename" else []
    if function != "link":
        calls += [lambda: pack_bundle(source, tmp_path / "made" / NAME, as_folder=True)]
        calls += [lambda: unpack_bundle(packed, tmp_path / "made" / "walks")]
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            with pytest.raises(DiskFullError):
                call()
        assert list((tmp_path / "made").iterdir()) == []
    for call in calls:
        call()


def test_what_killed_writers_left_is_deleted(source, packed, tmp_path):
    left = [tmp_path / f".tmp-{name}-4711" for name in ("x.zip", NAME, "walks")]
    left[0].write_bytes(packed.read_bytes()[:1000])
    write_files(left[1], {"bagit.txt": b""})
    write_files(left[2], {"tasks/task_0000.zarr/zarr.json": b"{}"})
    other = write_files(tmp_path / ".tmp-walks-of-somebody-else-17", {"x": b""})
    refused(lambda: verify_bundle(left[0]))
    refused(lambda: verify_bundle(left[1]))
    refused(lambda: open_collection(left[2]))
    pack_bundle(source, tmp_path / "x.zip")
    pack_bundle(source, tmp_path / NAME, as_folder=True)
    unpack_bundle(packed, tmp_path / "walks")
    assert not any(path.exists() for path in left)
    assert other.exists()


# ---- random mutations; test_datasets_bundle_slow.py does thousands ----

FEW = settings(max_examples=40, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@FEW
@given(data=st.data())
def test_mutated_bundle_files(packed, tmp_path, data):
    check_bundle_bytes(data, packed.read_bytes(), tmp_path / "x.zip")


@FEW
@given(change=json_changes())
def test_mutated_documents(bag, change):
    check_documents(bag, change)


@FEW
@given(change=text_changes())
def test_mutated_tag_files(bag, change):
    check_documents(bag, change)


def test_the_unchanged_bag_passes_the_same_check(bag):
    report = verify_bag(read_bag(Memory(bag)))
    assert report.episodes == 24
    with pytest.raises(FocalError):
        verify_bag(read_bag(Memory(bag), "other-1.0.0"))
