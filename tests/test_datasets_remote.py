"""Collections and bundles on an object store: a real S3 server, a connection that breaks, a process that is killed."""

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import bagit
import numpy as np
import pytest
from click.testing import CliRunner
from obstore.store import MemoryStore

from focal.cli import main
from focal.datasets import (
    Collection,
    find_collections,
    is_committed,
    open_collection,
    remote,
    transfer,
    verify_collection,
)
from focal.datasets.bundle import pack_bundle, verify_bundle
from focal.datasets.remote import Remote, connect
from focal.datasets.sources import sha256_of, side_by_side
from focal.datasets.storage import list_files
from focal.datasets.store import episode_arrays
from focal.datasets.transfer import PushReport, pull_bundle, push_bundle
from focal.errors import FocalError, UsageError

from .bundle_tools import Memory, files_of
from .object_store import BUCKET, READER, WRITER, Link, lying_server, seaweed

NAME = "point-1.0.0"
TAG_FILES = ["bag-info.txt", "bagit.txt", "croissant.json", "manifest-sha256.txt", "tagmanifest-sha256.txt"]


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> int:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def link(server) -> Link:
    link = Link(server)
    yield link
    link.close()


@pytest.fixture
def s3(link, monkeypatch, request) -> str:
    """A URL of this test alone, reached through `link` with the writer's key."""
    use(monkeypatch, link.endpoint)
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture
def impatient(monkeypatch) -> None:
    """A broken connection is an error at the first repetition, not after seconds."""
    backoff = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(
        remote, "_RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=5), "backoff": backoff}
    )


@pytest.fixture(scope="session")
def small(make_collection, tmp_path_factory) -> Collection:
    """Two tasks of some kilobytes."""
    return make_collection(tmp_path_factory.mktemp("stores") / "point", tasks=2)


@pytest.fixture(scope="session")
def large(make_collection, tmp_path_factory) -> Collection:
    """Two tasks whose observations are one file of 2.5 MB each, which does not compress."""
    path = tmp_path_factory.mktemp("stores") / "point"
    return make_collection(path, tasks=2, skills=(0.0, 1.0), episodes=10, obs_dim=1500)


@pytest.fixture(scope="session")
def other(make_collection, tmp_path_factory) -> Collection:
    """Another one of the same name and version as `small`."""
    return make_collection(tmp_path_factory.mktemp("stores") / "point", tasks=2, seed=1)


@pytest.fixture(scope="session")
def bundles(small, large, other, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    pairs = {"small": small, "large": large, "other": other}
    return {name: pack_bundle(found.path, folder / f"{name}.zip")[0] for name, found in pairs.items()}


def use(monkeypatch, endpoint: str, key: tuple[str, str] = WRITER) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key[1])
    for name in ("AWS_ALLOW_HTTP", "AWS_SKIP_SIGNATURE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def refused(call, kind=FocalError) -> str:
    """The message of the refusal: one line with a next step, and never a key."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.__cause__ is None or "Key" not in str(caught.value.__cause__)
    message = str(caught.value)
    assert message.isprintable()
    assert ";" in message or "," in message
    assert not any(word in message for word in (*WRITER, *READER, "wrong-secret"))
    return message


def same_files(left: Path, right: Path) -> bool:
    names = list_files(left)
    return names == list_files(right) and all((left / n).read_bytes() == (right / n).read_bytes() for n in names)


def payload(paths: list[str]) -> set[str]:
    """Which files below data/ these requests name."""
    return {path.partition("/data/")[2] for path in paths if "/data/" in path}


# --- the source, without a server -----------------------------------------------------------------------------------


def in_memory(**files: bytes) -> Remote:
    store = MemoryStore()
    for name, data in files.items():
        store.put(name, data)
    return Remote("memory://", store)


def test_sizes_from_the_listing_without_folder_markers():
    source = in_memory(**{"b/c": b"12", "a": b"", "b": b"", "": b"", "staging/x": b"1"})
    assert source.sizes() == {"a": 0, "b/c": 2, "staging/x": 1}
    assert list(source.sizes(skip=("staging",))) == ["a", "b/c"]
    assert in_memory().sizes() == {}


def test_read_up_to_the_limit_and_missing():
    source = in_memory(a=b"12345")
    assert source.read("a", 5) == b"12345"
    assert "larger than the 4 bytes" in refused(lambda: source.read("a", 4))
    assert "b: it is not there" in refused(lambda: source.read("b", 4))
    assert source.exists("a")
    assert not source.exists("b")


def test_a_file_that_is_too_large_is_not_downloaded(s3, link):
    source = connect(s3)
    source.put("big", bytes(2 * 10**7), "")  # more than the sockets on the way hold
    before = link.down
    refused(lambda: source.read("big", 10))
    assert link.down - before < 10**7, "the answer must be dropped once its size is known"


def test_read_many_in_order_and_side_by_side():
    names = [f"{number:03}" for number in range(100)]
    source = in_memory(**{name: name.encode() for name in names})
    assert list(source.read_many(reversed(names), 3)) == [(name, name.encode()) for name in reversed(names)]
    assert "nothing: it is not there" in refused(lambda: list(source.read_many(["000", "nothing", "001"], 3)))


def test_side_by_side_is_bounded_ordered_and_ends_at_the_first_error():
    begun, lock = [], threading.Lock()

    def square(number: int) -> int:
        with lock:
            begun.append(number)
        time.sleep(0.001 * (number % 3))
        if number == 20:
            raise FocalError("twenty")
        return number**2

    results = side_by_side(square, range(10**6), workers=4, ahead=6)
    assert [next(results) for _ in range(10)] == [n**2 for n in range(10)]
    assert max(begun) <= 10 + 6
    with pytest.raises(FocalError, match="twenty"):
        list(results)
    assert max(begun) <= 20 + 6
    assert list(side_by_side(str, [], 3)) == []


def test_sha256_and_stream_from_an_offset():
    data = np.random.default_rng(0).bytes(10**6)
    source = in_memory(a=data, empty=b"")
    assert source.sha256("a") == sha256_of(data)
    assert source.sha256("empty") == sha256_of(b"")
    assert b"".join(source.stream("a", 999_990)) == data[-10:]


def test_create_lets_one_writer_win():
    source = in_memory()
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: source.create("a", bytes([number])), range(8)))
    assert sum(won) == 1
    assert source.read("a", 1) == bytes([won.index(True)])


@pytest.mark.parametrize("where", ["s3", "file"])
def test_holds_compares_the_sha256_that_was_put(where, request, tmp_path):
    url = request.getfixturevalue("s3") if where == "s3" else f"file://{tmp_path}/new"
    source = connect(url, create=True)
    source.put("a", b"1", sha256_of(b"1"))
    source.put("large", bytes(20 * 2**20), sha256_of(bytes(20 * 2**20)))  # in parts
    assert source.holds("a", sha256_of(b"1"))
    assert not source.holds("a", sha256_of(b"2"))
    assert source.holds("large", sha256_of(bytes(20 * 2**20)))
    assert source.sha256("large") == sha256_of(bytes(20 * 2**20))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "names no object store, expected s3://BUCKET/PATH"),
        ("s3://", "names no object store"),
        ("s3://[", "malformed"),
        ("s3://key:wrong-secret@bucket/x", "credentials belong into the environment"),
        ("s3://bucket/x?X-Amz-Signature=wrong-secret", "credentials belong into the environment"),
    ],
)
def test_urls_that_are_none(url, words):
    assert words in refused(lambda: open_collection(url), UsageError)


def test_without_obstore(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert "pip install -c constraints.txt -e '.[s3]'" in refused(lambda: open_collection("s3://bucket/x"))


# --- push and pull ---------------------------------------------------------------------------------------------------


def test_push_then_pull_is_the_same_collection(s3, link, small, bundles, tmp_path):
    report = push_bundle(bundles["small"], s3)
    size = sum(list_files(small.path).values())
    assert report.url == f"{s3}/{NAME}"
    assert report.files == report.sent == len(small.files) + 1 + len(TAG_FILES)
    assert report.sent_bytes > size
    puts = [path.partition(f"/{NAME}/")[2] for path in link.asked("PUT")]
    assert puts[0] == "manifest-sha256.txt"
    assert puts[-2:] == ["data/dataset.json", "tagmanifest-sha256.txt"]
    assert sorted(puts) == sorted(connect(report.url).sizes())

    told, steps = [], []
    pulled, pull_report = pull_bundle(
        report.url,
        tmp_path / "here",
        announce=lambda bag, trust: told.append((bag.name, str(trust))),
        progress=lambda done, total: steps.append(done / total),
    )
    assert told == [(NAME, "unsigned")]
    assert steps == sorted(steps)
    assert steps[-1] == 1
    assert pulled.content_hash == small.content_hash == pull_report.content_hash
    assert same_files(tmp_path / "here", small.path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"], "no staging may be left"
    assert open_collection(report.url).content_hash == small.content_hash
    assert verify_collection(report.url) == verify_collection(small)
    assert verify_bundle(report.url).verified == verify_collection(small)


def test_pushing_and_pulling_again_does_nothing(s3, link, small, bundles, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    pull_bundle(url, stores=tmp_path)
    assert [path.name for path in find_collections(tmp_path)] == [small.family]
    link.reset()
    assert push_bundle(bundles["small"], s3) == PushReport(url, len(small.files) + 6, 0, 0)
    assert pull_bundle(url, stores=tmp_path)[0].content_hash == small.content_hash
    assert link.asked("PUT") == []
    assert payload(link.asked("GET")) <= {"dataset.json"}


def test_a_folder_is_pushed_like_a_file(small, bundles, tmp_path):
    folder, _ = pack_bundle(small.path, tmp_path / "folder", as_folder=True)
    url = push_bundle(folder, f"file://{tmp_path}/a b").url
    assert url == push_bundle(bundles["small"], f"file://{tmp_path}/a b/").url
    assert same_files(tmp_path / "a b" / NAME, folder)
    bagit.Bag(str(tmp_path / "a b" / NAME)).validate()
    sums = ["sha256sum", "-c", "--strict", "--quiet", "manifest-sha256.txt", "tagmanifest-sha256.txt"]
    subprocess.run(sums, cwd=tmp_path / "a b" / NAME, check=True)


def test_a_target_is_never_replaced(s3, small, bundles, other, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not the collection of this bundle" in refused(lambda: pull_bundle(url, tmp_path / "mine"))
    assert "is not the collection of this bundle" in refused(lambda: pull_bundle(url, other.path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert pull_bundle(url, tmp_path / "empty")[0].content_hash == small.content_hash


def test_one_task_costs_metadata_its_table_and_its_chunks(s3, link, collection, tmp_path):
    url = push_bundle(pack_bundle(collection.path, tmp_path / "x.zip")[0], s3).url
    link.reset()
    found = open_collection(url)
    opened = link.asked("GET")
    assert payload(opened) == {"dataset.json", *(f"tasks/task_{index:04}.zarr/zarr.json" for index in range(4))}
    assert len(link.requests) <= 1 + 1 + 1 + 4, "tagmanifest?, dataset.json, listing, one zarr.json per task"
    link.reset()
    episodes = found.load(3)
    for name, values in episode_arrays(collection.load(3)).items():
        assert episode_arrays(episodes)[name].tobytes() == values.tobytes()
    chunks = {name for name in collection.files if name.startswith("tasks/task_0003.zarr/") and "/c/" in name}
    chunks = {name for name in chunks if "/evaluation/" not in name}
    assert payload(link.asked("GET")) == chunks
    assert len(link.requests) == len(chunks) == 11
    assert link.down < sum(collection.files[name][0] for name in chunks) + 1500 * len(chunks)


def test_only_chunks_with_chosen_episodes_are_fetched(s3, link, make_collection, tmp_path, monkeypatch):
    monkeypatch.setattr("focal.datasets.store.write_store.__defaults__", (1600, "zstd"))  # bytes of a chunk
    made = make_collection(tmp_path / "stores" / "point", tasks=2)
    url = push_bundle(pack_bundle(made.path, tmp_path / "x.zip")[0], s3).url
    found = open_collection(url)
    link.reset()
    chosen = found.select("expert", tasks=[1])
    assert payload(link.asked("GET")) == {
        name for name in made.files if name.startswith("tasks/task_0001.zarr/episodes/") and "/c/" in name
    }
    link.reset()
    episodes = chosen.load(1)
    assert episodes.num_steps == made.select("expert", tasks=[1]).counts[1].steps
    rows = np.flatnonzero(np.repeat(chosen.masks[1], chosen.tables[1]["lengths"] + 1))
    expected = {f"tasks/task_0001.zarr/observations/c/{row // 200}/0" for row in rows}  # 200 rows of 8 bytes
    assert {name for name in payload(link.asked("GET")) if "/observations/" in name} == expected
    assert expected < {name for name in made.files if "/observations/c/" in name and "_0001" in name}


# --- refusals --------------------------------------------------------------------------------------------------------


def every_verb(url: str, file: Path, target: Path) -> list[str]:
    """What each verb says when it is refused."""
    verbs = (
        lambda: open_collection(url),
        lambda: verify_bundle(url),
        lambda: pull_bundle(url, target),
        lambda: push_bundle(file, url.rpartition("/")[0]),
    )
    return [refused(verb) for verb in verbs]


def test_wrong_keys(s3, link, bundles, tmp_path, monkeypatch):
    url = push_bundle(bundles["small"], s3).url
    use(monkeypatch, link.endpoint, (WRITER[0], "wrong-secret"))
    for message in every_verb(url, bundles["small"], tmp_path / "x"):
        assert "refuses" in message
        assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert "SignatureDoesNotMatch" in refused(lambda: connect(url).sizes())
    use(monkeypatch, link.endpoint, ("no-such-key", "wrong-secret"))
    assert "InvalidAccessKeyId" in refused(lambda: connect(url).sizes())
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_may_only_read(s3, link, small, bundles, tmp_path, monkeypatch):
    url = push_bundle(bundles["small"], s3).url
    use(monkeypatch, link.endpoint, READER)
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == small.content_hash
    message = refused(lambda: push_bundle(bundles["small"], f"{s3}/elsewhere"))
    assert "refuses access (AccessDenied)" in message
    assert "ask the bucket's owner" in message
    assert connect(f"{s3}/elsewhere").sizes() == {}


def test_no_bucket_no_bundle(s3, bundles, tmp_path):
    for message in every_verb("s3://no-such-bucket/x/y", bundles["small"], tmp_path / "x")[:3]:
        assert "has no bucket 'no-such-bucket'" in message
    for verb in (open_collection, verify_bundle, pull_bundle):
        assert f"nothing is at {s3}/nothing" in refused(lambda verb=verb: verb(f"{s3}/nothing"))
    connect(s3).put("notes/readme.txt", b"hello", "")
    assert "is no bundle (tagmanifest-sha256.txt is missing)" in refused(lambda: pull_bundle(f"{s3}/notes"))


def test_nobody_answers(monkeypatch, impatient, bundles, tmp_path):
    use(monkeypatch, "http://127.0.0.1:9")
    for message in every_verb("s3://bucket/x", bundles["small"], tmp_path / "x"):
        assert "cannot connect to 127.0.0.1:9 (refused)" in message
        assert "AWS_ENDPOINT_URL" in message
    use(monkeypatch, "http://user:wrong-secret@127.0.0.1:9")
    assert "127.0.0.1:9" in refused(lambda: connect("s3://bucket/x").sizes())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "localhost:8333", "AWS_ENDPOINT_URL is no URL"),
        ("AWS_ACCESS_KEY_ID", "writer-key\n", "AWS_ACCESS_KEY_ID holds a line break"),
        ("AWS_SESSION_TOKEN", "\x07", "AWS_SESSION_TOKEN holds a line break or another control"),
    ],
)
def test_an_environment_that_would_crash_the_library(name, value, words, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    assert words in refused(lambda: open_collection("s3://bucket/x"), UsageError)


def test_plain_http_is_for_this_machine_only(monkeypatch):
    use(monkeypatch, "http://192.0.2.1:1")
    assert "AWS_ALLOW_HTTP=true" in refused(lambda: connect("s3://bucket/x").sizes())


def test_a_damaged_bundle(s3, link, small, bundles, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    bag = connect(url)
    rewards = "data/tasks/task_0001.zarr/rewards/c/0"
    good = bag.read(rewards, 10**6)
    bag.store.put(rewards, good[:-1] + bytes([good[-1] ^ 1]))
    message = refused(lambda: pull_bundle(url, tmp_path / "x"))
    assert rewards in message
    assert "sha256" in message
    assert "sha256" in refused(lambda: verify_collection(url))
    assert not (tmp_path / "x").exists()
    assert not any(is_committed(path) for path in tmp_path.rglob("*") if path.is_dir())

    bag.store.put(rewards, good)  # mended: the pull goes on from what it has
    link.reset()
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == small.content_hash
    assert payload(link.asked("GET")) < {"dataset.json", *small.files}

    bag.store.put("data/tasks/task_0001.zarr/extra/c/0", b"")
    assert "extra file 'data/tasks/task_0001.zarr/extra/c/0'" in refused(lambda: pull_bundle(url, tmp_path / "y"))
    assert "is no part of this bundle" in refused(lambda: push_bundle(bundles["small"], s3))
    bag.store.delete("data/tasks/task_0001.zarr/extra/c/0")
    bag.store.put("data/run.sh", b"#!/bin/sh")
    assert "'data/run.sh'" in refused(lambda: pull_bundle(url, tmp_path / "y"))
    bag.store.delete("data/run.sh")
    bag.store.delete(rewards)
    assert "is missing" in refused(lambda: pull_bundle(url, tmp_path / "y"))
    assert push_bundle(bundles["small"], s3).sent == 1, "pushing again mends it"
    assert not (tmp_path / "y").exists()


def test_nothing_of_the_payload_is_asked_for_before_it_is_wanted(s3, link, bundles, tmp_path):
    url = push_bundle(bundles["large"], s3).url
    link.reset()
    told = []
    refused(lambda: pull_bundle(url, tmp_path / "x", require_signature=True, announce=lambda *what: told.append(what)))
    assert "raise --max-size" in refused(lambda: pull_bundle(url, tmp_path / "x", max_size=10**6))
    assert told == []
    assert payload(link.asked("GET")) == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_signature_travels_along(s3, link, small, bundles, tmp_path):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    trusted = tmp_path / "allowed_signers"
    trusted.write_text(f"ada@example.org {key.with_suffix('.pub').read_text()}")
    signed, _ = pack_bundle(small.path, tmp_path / "signed.zip", signing_key=key)
    url = push_bundle(signed, s3).url
    puts = [path.partition(f"/{NAME}/")[2] for path in link.asked("PUT")]
    assert puts[-2:] == ["tagmanifest-sha256.txt.sig", "tagmanifest-sha256.txt"], "no reader may see it unsigned"
    _, report = pull_bundle(url, tmp_path / "x", allowed_signers=trusted, require_signature=True)
    assert str(report.trust) == "signed by ada@example.org (trusted)"
    assert push_bundle(bundles["small"], s3).sent == 0, "the same bundle, unsigned, changes nothing"

    connect(url).put("tagmanifest-sha256.txt.sig", b"forged", "")
    link.reset()
    assert "is no good signature" in refused(lambda: pull_bundle(url, tmp_path / "y"))
    assert payload(link.asked("GET")) == set()
    assert "is signed already, and not as" in refused(lambda: push_bundle(signed, s3))


@pytest.mark.parametrize(
    "key",
    ["x/../../../etc/passwd", "x//data/dataset.json", "x/data\\..\\y.json", "x/data/CON", "x/data/a:b", "x/\u212b"],
)
def test_hostile_names_in_a_listing(key, monkeypatch, tmp_path):
    with lying_server([(f"b/{key}".removeprefix("b/"), 5), ("x/tagmanifest-sha256.txt", 1)]) as endpoint:
        use(monkeypatch, endpoint)
        message = refused(lambda: pull_bundle("s3://b/x", tmp_path / "y"))
        assert "name" in message
    assert list(tmp_path.iterdir()) == []


def test_hostile_sizes_in_a_listing(monkeypatch, tmp_path):
    with lying_server([("x/tagmanifest-sha256.txt", 1), ("x/data/dataset.json", 2**40)]) as endpoint:
        use(monkeypatch, endpoint)
        assert f"has {2**40} bytes, expected at most" in refused(lambda: pull_bundle("s3://b/x", tmp_path / "y"))


def test_a_listing_that_grows_after_the_check(bundles, monkeypatch, tmp_path):
    """Only the sizes held against --max-size bound the download, however often a server lists and whatever it lists."""
    shutil.unpack_archive(bundles["small"], tmp_path / "bag", "zip")
    files = files_of(tmp_path / "bag" / NAME)
    grown = "data/tasks/task_0000.zarr/actions/c/0/0"

    class Growing(Memory):
        url, listed, sent = "s3://bucket/x", 0, 0

        def sizes(self, skip=()):
            self.listed += 1
            return {**super().sizes(skip), **({grown: 10**8} if self.listed > 1 else {})}

        def stream(self, name, start=0):
            for piece in [bytes(10**6)] * 100 if name == grown else [self.files[name]]:
                self.sent += len(piece)
                yield piece

    source = Growing(files)
    monkeypatch.setattr(transfer, "open_bag_at", lambda url: source)
    message = refused(lambda: pull_bundle("s3://bucket/x", tmp_path / "y", max_size=10**6))
    assert f"{grown!r} has more than the {len(files[grown])} bytes listed" in message
    assert source.sent < 3 * 10**6


# --- cuts, kills, rivals ---------------------------------------------------------------------------------------------


def test_a_push_that_is_cut_goes_on(s3, link, impatient, large, bundles, tmp_path):
    link.cut = 3 * 10**6
    assert "run the same command again" in refused(lambda: push_bundle(bundles["large"], s3))
    sent = set(payload(link.asked("PUT")))
    link.reset()
    url = f"{s3}/{NAME}"
    assert "whose push was cut; finish it: focal-cli bundle push FILE" in refused(lambda: open_collection(url))
    assert "whose push was cut" in refused(lambda: pull_bundle(url, tmp_path / "x"))
    whole = {name: size for name, (size, _) in large.files.items()}
    there = {name.removeprefix("data/") for name in connect(url).sizes() if name.startswith("data/")}
    assert there
    assert there <= sent
    link.reset()
    report = push_bundle(bundles["large"], s3)
    assert payload(link.asked("PUT")) == {*whole, "dataset.json"} - there
    assert link.up < sum(size for name, size in whole.items() if name not in there) + 200_000
    assert report.sent_bytes < sum(whole.values()) - 2 * 10**6
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash


def test_what_a_cut_push_left_spoiled_is_sent_again(s3, large, bundles, tmp_path):
    url = f"{s3}/{NAME}"
    connect(url).put("data/README.md", bytes(len((large.path / "README.md").read_bytes())), "0" * 64)
    assert push_bundle(bundles["large"], s3).sent == len(large.files) + 6
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash


def test_a_pull_that_is_cut_goes_on_at_the_last_byte(s3, link, impatient, large, bundles, tmp_path):
    url = push_bundle(bundles["large"], s3).url
    link.reset()
    link.cut = 4 * 10**6
    assert "run the same command again" in refused(lambda: pull_bundle(url, tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    [staging] = tmp_path.iterdir()
    assert not any(is_committed(path) for path in [staging, *staging.rglob("*")] if path.is_dir())
    finished = {name.removeprefix("data/") for name in list_files(staging) if name.startswith("data/")}
    kept = sum(list_files(staging).values())
    assert kept > 2 * 10**6, "a piece per file may be lost, and what was on the way"
    assert any(size > 10**5 for name, size in list_files(staging).items() if name.startswith("partial/"))
    link.reset()
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash
    assert payload(link.asked("GET")).isdisjoint(finished - {"dataset.json"})
    assert link.down < sum(size for size, _ in large.files.values()) - kept + 100_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_short_cut_is_bridged(s3, link, large, bundles, tmp_path):
    url = push_bundle(bundles["large"], s3).url
    link.reset()
    link.cut = 10**6

    def mend() -> None:
        while link.cut != 0:
            time.sleep(0.01)
        link.cut = None

    helper = threading.Thread(target=mend)
    helper.start()
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash
    helper.join()


def test_a_killed_pull_goes_on(s3, link, large, bundles, tmp_path):
    url = push_bundle(bundles["large"], s3).url
    link.reset()
    link.pause = 0.02
    code = "import pathlib, sys; from focal.datasets.transfer import pull_bundle; "
    code += "pull_bundle(sys.argv[1], pathlib.Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path / "x")])
    while link.down < 2 * 10**6:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "x").exists()
    [staging] = tmp_path.iterdir()
    assert not any(is_committed(path) for path in [staging, *staging.rglob("*")] if path.is_dir())
    kept = sum(list_files(staging).values())
    assert kept > 3 * 10**5
    link.reset()
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash
    assert link.down < sum(size for size, _ in large.files.values()) - kept + 100_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_spoiled_staging_is_fetched_anew(s3, large, bundles, tmp_path, impatient, link):
    url = push_bundle(bundles["large"], s3).url
    link.reset()
    link.cut = 3 * 10**6
    refused(lambda: pull_bundle(url, tmp_path / "x"))
    link.reset()
    [staging] = tmp_path.iterdir()
    for name in list_files(staging):
        (staging / name).write_bytes(b"spoiled by a power cut")
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == large.content_hash


def test_two_pulls_at_once(s3, link, small, bundles, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    link.pause = 0.01

    def pull(_: int) -> str:
        try:
            return pull_bundle(url, tmp_path / "x")[0].content_hash
        except FocalError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = sorted(pool.map(pull, range(2)), key=len)
    assert results[0] == small.content_hash
    assert results[1] == small.content_hash or "another process is pulling" in results[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_another_bundle_under_a_name_that_is_taken(s3, small, bundles, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    assert "is another bundle (its manifest-sha256.txt differs)" in refused(lambda: push_bundle(bundles["other"], s3))
    assert pull_bundle(url, tmp_path / "x")[0].content_hash == small.content_hash


def test_of_two_pushers_of_different_bundles_one_wins(s3, small, other, bundles, tmp_path):
    def push(name: str) -> str | None:
        try:
            push_bundle(bundles[name], s3)
        except FocalError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        errors = dict(zip(("small", "other"), pool.map(push, ("small", "other")), strict=True))
    [winner] = [name for name, error in errors.items() if error is None]
    [loser] = [error for error in errors.values() if error is not None]
    assert "is another bundle" in loser
    expected = {"small": small, "other": other}[winner]
    assert pull_bundle(f"{s3}/{NAME}", tmp_path / "x")[0].content_hash == expected.content_hash


# --- the command line ------------------------------------------------------------------------------------------------


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_commands(s3, small, bundles, tmp_path):
    assert f"the other team: focal-cli bundle pull {s3}/{NAME}" in cli("bundle", "push", bundles["small"], s3)
    url = f"{s3}/{NAME}"
    assert "all there" in cli("bundle", "push", bundles["small"], s3)
    assert json.loads(cli("bundle", "push", bundles["small"], s3, "--json"))["sent"] == 0
    assert json.loads(cli("data", "show", url, "--json"))["content"] == small.content_hash
    assert "good" in cli("data", "verify", url)
    assert "good" in cli("bundle", "verify", url)
    assert "unsigned" in cli("bundle", "pull", url, "--stores", tmp_path)
    assert find_collections(tmp_path) == [tmp_path / "sparse-point-robot"]
    pulled = json.loads(cli("bundle", "pull", url, "-o", tmp_path / "named", "--json"))
    assert pulled["content_hash"] == small.content_hash
    cli("data", "show", f"{s3}/nothing", code=1)
    cli("data", "show", "ftp://host/x", code=2)
    cli("bundle", "unpack", url, code=2)


def test_relabel_and_policies_from_afar(s3, small, bundles, tmp_path):
    url = push_bundle(bundles["small"], s3).url
    cli("data", "relabel", url, "-o", tmp_path / "new", "--set", "expert_from=0.8")
    [origin] = open_collection(tmp_path / "new").derived_from
    assert origin["content_hash"] == small.content_hash
    assert open_collection(url).read_file("README.md", 10**5) == (small.path / "README.md").read_bytes()


@pytest.mark.slow
def test_train_and_test_straight_from_the_store(s3, link, tmp_path, monkeypatch):
    """A run on the URL is the run on the folder; what it trains on is fetched once for all its seeds."""
    monkeypatch.chdir(tmp_path)
    cli("data", "generate", "--env", "point", "--scale", "smoke")
    cli("bundle", "pack", "--author", "Ada", "-o", "x.zip")
    url = json.loads(cli("bundle", "push", "x.zip", s3, "--json"))["url"]
    link.reset()
    for where, name in ((url, "far"), ("stores/sparse-point-robot", "near")):
        cli("train", "--collection", where, "--data", "mixed", "--seeds", 2, "--name", name)
    asked = [path for path in link.asked("GET") if "/observations/c/" in path]
    assert len(set(asked)) == len(open_collection(url).tasks)
    trained = {f"{entry.folder}/observations/c/0/0" for entry in open_collection(url).train_tasks()}
    assert all(sum(path.endswith(name) for path in asked) == 1 for name in trained)
    far = json.loads(cli("test", "runs/far", "--episodes", 2, "--no-figures", "--stores", "none", "--json"))
    near = json.loads(cli("test", "runs/near", "--episodes", 2, "--no-figures", "--json"))
    assert far["seeds"] == near["seeds"]
    assert "expert" in far["seeds"]["0"]["conditions"]
