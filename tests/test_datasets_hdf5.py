"""HDF5 files made to harm their reader: refused before anything is read or allocated. And plain ones: read exactly."""

import contextlib
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from focal.datasets import hdf5
from focal.datasets.hdf5 import Hdf5File
from focal.datasets.npy import parse_npy, read_npy
from focal.errors import FocalError

SECRET = b"secret of another file, 32 bytes"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "secret.txt").write_bytes(SECRET)
    return tmp_path / "a.hdf5"


def refused(path, read):
    with pytest.raises(FocalError) as caught, Hdf5File(path) as file:
        read(file.root)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def array(name="a", width=None):
    return lambda root: root.array(name, width)


VALUES = np.random.default_rng(0).normal(size=(103, 4)).astype("f4")


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (10, 4)},
        {"chunks": (10, 3), "shuffle": True},
        {"chunks": (10, 3), "compression": "gzip"},
        {"chunks": (50, 4), "compression": "gzip", "shuffle": True},
        {"chunks": (200, 8), "maxshape": (None, None), "compression": "gzip", "shuffle": True},
    ],
)
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "u1", "?"])
def test_plain_arrays_are_read_exactly(path, storage, dtype):
    values = (VALUES * 10).astype(dtype)
    with h5py.File(path, "w") as file:
        file.create_dataset("group/a", data=values, **storage)
    with Hdf5File(path) as file:
        found = file.root.group("group").array("a", 4)
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, values)


def test_a_chunk_that_gzip_could_not_shrink(path):
    """HDF5 stores such a chunk plain and marks the filter as skipped."""
    values = np.random.default_rng(0).integers(256, size=64, dtype=np.uint8)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("a", (64,), "u1", chunks=(32,), compression="gzip")
        dataset.id.write_direct_chunk((0,), values[:32].tobytes(), filter_mask=1)
        dataset.id.write_direct_chunk((32,), zlib.compress(values[32:].tobytes()))
    with Hdf5File(path) as file:
        assert np.array_equal(file.root.array("a"), values)


def test_one_column_is_a_vector(path):
    with h5py.File(path, "w") as file:
        file["a"] = VALUES[:, :1]
    with Hdf5File(path) as file:
        assert np.array_equal(file.root.array("a"), VALUES[:, 0])


def test_numbers_in_attributes(path):
    with h5py.File(path, "w") as file:
        file.attrs.update({"i": np.uint8(7), "f": 0.1, "one": np.array([3])})
        file.attrs.update({"many": np.zeros(3), "text": "7", "reference": file.ref})
    with Hdf5File(path) as file:
        assert [file.root.number(name) for name in ("i", "f", "one", "none")] == [7, 0.1, 3, None]
        for name in ("many", "text", "reference"):
            with pytest.raises(FocalError, match="an attribute that is no single number"):
                file.root.number(name)


# ---- files that read other files ----


def test_links_are_refused(path):
    with h5py.File(path.with_name("other.hdf5"), "w") as file:
        file["a"] = VALUES
    with h5py.File(path, "w") as file:
        file["real"] = VALUES
        file["soft"] = h5py.SoftLink("/real")
        file["external"] = h5py.ExternalLink("other.hdf5", "/a")
        file["dangling"] = h5py.SoftLink("/nowhere")
        file["group/inner"] = h5py.ExternalLink("other.hdf5", "/")
    assert "found a soft link" in refused(path, array("soft", 4))
    assert "found an external link" in refused(path, array("external", 4))
    assert "found a soft link" in refused(path, array("dangling"))
    assert "found an external link" in refused(path, lambda root: root.group("group").group("inner"))
    assert "link" in refused(path, lambda root: root.names())
    with Hdf5File(path) as file:
        assert np.array_equal(file.root.array("real", 4), VALUES), "only links are refused, not the file"


def test_a_path_in_a_name_is_refused(path):
    """HDF5 would follow the links on the way."""
    with h5py.File(path.with_name("other.hdf5"), "w") as file:
        file["a"] = VALUES
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink("other.hdf5", "/")
    for name in ("x/a", "/x", ".", ""):
        assert "found a path" in refused(path, array(name, 4))


def test_external_storage_is_refused(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (32,), "u1", external=[(str(path.with_name("secret.txt")), 0, 32)])
    with h5py.File(path) as file:
        assert bytes(file["a"][()]) == SECRET, "the attack works on a reader that trusts the file"
    assert "found external storage" in refused(path, array())


def test_a_virtual_dataset_is_refused(path):
    with h5py.File(path.with_name("other.hdf5"), "w") as file:
        file["a"] = VALUES
    layout = h5py.VirtualLayout(VALUES.shape, "f4")
    layout[:] = h5py.VirtualSource(path.with_name("other.hdf5"), "a", VALUES.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("a", layout)
    with h5py.File(path) as file:
        assert np.array_equal(file["a"][()], VALUES)
    assert "found a virtual dataset" in refused(path, array("a", 4))


def test_the_file_itself_may_be_no_link(path):
    with h5py.File(path, "w") as file:
        file["a"] = VALUES
    path.with_name("link.hdf5").symlink_to(path)
    with pytest.raises(FocalError, match="is no plain file"):
        Hdf5File(path.with_name("link.hdf5"))
    with pytest.raises(FocalError, match="is no plain file"):
        Hdf5File(path.parent)


# ---- types that are no numbers ----


@pytest.mark.parametrize("kind", ["object", "region", "reference", "string", "bytes", "compound", "array", "opaque"])
def test_other_types_are_refused(path, kind):
    with h5py.File(path, "w") as file:
        file["real"] = VALUES
        if kind == "object":
            file.create_dataset("a", (3,), h5py.vlen_dtype(np.uint8))
        elif kind == "region":
            file.create_dataset("a", (3,), h5py.regionref_dtype)[0] = file["real"].regionref[:2]
        elif kind == "reference":
            file.create_dataset("a", (3,), h5py.ref_dtype)[0] = file["real"].ref
        elif kind == "string":
            file.create_dataset("a", data=["x", "y"])
        else:
            kinds = {"bytes": "S4", "compound": [("x", "f4")], "array": "(3,)f4", "opaque": "V8"}
            file.create_dataset("a", (3,), np.dtype(kinds[kind]))
    assert "is refused: found type" in refused(path, array())


def test_numbers_of_odd_width_are_refused(path):
    with h5py.File(path, "w") as file:
        odd = h5py.h5t.IEEE_F32LE.copy()
        odd.set_fields(19, 14, 5, 0, 14)
        odd.set_precision(20)
        h5py.h5d.create(file.id, b"a", odd, h5py.h5s.create_simple((3,)))
        file["long"] = np.zeros(3, np.longdouble)
    assert "plain numbers of at most 8 bytes" in refused(path, array())
    assert "plain numbers of at most 8 bytes" in refused(path, array("long"))


# ---- claims ----


def peak_of(read):
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rows", [10**9, 2**50])
@pytest.mark.parametrize("storage", [{}, {"chunks": (1000, 4)}, {"chunks": (1000, 4), "compression": "gzip"}])
def test_shapes_without_data_allocate_nothing(path, rows, storage):
    """A file of some kilobytes may claim any shape: what was never written reads as zeros."""
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (rows, 4), "f4", **storage)
    peak = peak_of(lambda: refused(path, array("a", 4)))
    assert peak < 2**20


def test_a_shape_with_most_of_its_chunks_missing(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (10_000, 4), "f4", chunks=(100, 4))[:100] = 1
        file.create_dataset("b", (10_000, 4), "f4")
    assert "found 1 chunks, expected 100" in refused(path, array("a", 4))
    assert "found 0 bytes stored, expected 160000" in refused(path, array("b", 4))


@pytest.mark.parametrize("storage", [{}, {"shuffle": True}, {"compression": "gzip"}])
def test_a_missing_chunk_and_one_outside_the_shape(path, storage):
    """As many chunks as the shape has, but one lies behind it: what is missing would read as zeros, or as memory."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("a", (30_000,), "f8", chunks=(10_000,), maxshape=(None,), **storage)
        dataset[:10_000], dataset[20_000:] = 1, 2
    data, rows = path.read_bytes(), (30_000).to_bytes(8, "little")
    assert data.count(rows)
    path.write_bytes(data.replace(rows, (20_000).to_bytes(8, "little")))
    with h5py.File(path) as file:
        assert file["a"].shape == (20_000,)
        assert file["a"].id.get_num_chunks() == 2
    assert "found a chunk at [20000], expected every chunk of [10000] once, inside" in refused(path, array())


def test_an_index_that_computes_its_chunks_takes_no_memory(path):
    """Unfiltered chunks that are allocated at once have no index in the file, so it may claim any number of them."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((10,))
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(path, "w", libver="latest") as file:
        h5py.h5d.create(file.id, b"a", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((10**5,)), plan)
    with Hdf5File(path) as file:
        assert file.root.array("a").shape == (10**5,)
        file.size = 10**4  # as if the rest were not in it
        with pytest.raises(FocalError, match=r"found 10000 chunks in 10000 bytes, expected at least 10 bytes for each"):
            file.root.array("a")


def test_gzip_that_decodes_to_more_than_its_chunk(path):
    """HDF5 itself would inflate all of it: 128 MiB here, from 130 kB."""
    bomb = zlib.compressobj(9)
    data = b"".join([*(bomb.compress(bytes(2**20)) for _ in range(128)), bomb.flush()])
    assert len(data) < 2**20
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("a", (2**18, 4), "f4", chunks=(2**18, 4), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), data)
    peak = peak_of(lambda: refused(path, array("a", 4)))
    assert "decodes to 4194305 bytes or more" in refused(path, array("a", 4))
    assert peak < 32 * 2**20


def test_a_bomb_of_zeros_and_one_of_links(path, monkeypatch):
    monkeypatch.setattr(hdf5, "BOMB_BYTES", 2**20)
    monkeypatch.setattr(hdf5, "BOMB_RATIO", 50)
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.zeros((2**22, 4), "f4"), chunks=(2**14, 4), compression="gzip")
        file["real"] = np.zeros((10_000, 4), "f4")
        for number in range(1000):
            file[f"link_{number}"] = file["real"]  # a hard link: the same 160 kB again
    assert "decode to far more than its size" in refused(path, array("a", 4))
    read_all = lambda root: [root.array(f"link_{number}", 4).shape for number in range(1000)]  # noqa: E731
    assert "decode to far more than its size" in refused(path, read_all)


def test_whole_chunks_count_however_small_the_array(path, monkeypatch):
    """A chunk is decoded whole: linked a thousand times, one value in a large chunk would cost hours."""
    monkeypatch.setattr(hdf5, "BOMB_BYTES", 2**24)
    monkeypatch.setattr(hdf5, "BOMB_RATIO", 1)
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.zeros(1), chunks=(2**18,), maxshape=(None,), compression="gzip")
        for number in range(1000):
            file[f"link_{number}"] = file["a"]
    with Hdf5File(path) as file:
        for number in range(8):
            assert file.root.array(f"link_{number}").shape == (1,), "what fits is read: such arrays are honest, too"
        with pytest.raises(FocalError, match="link_8: with its 2097152 bytes the file claims to decode to far more"):
            file.root.array("link_8")


def test_automatic_chunks_of_arrays_that_grow(path):
    """h5py's own choice of chunks, larger than the small arrays that most episodes are."""
    with h5py.File(path, "w") as file:
        for number in range(300):
            file.create_dataset(f"{number}", data=VALUES, maxshape=(None, 4), compression="gzip")
    with Hdf5File(path) as file:
        assert all(np.array_equal(file.root.array(f"{number}", 4), VALUES) for number in range(300))


def test_huge_chunks_are_refused(path):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("a", (8, 4), "f4", chunks=(2**25, 4), maxshape=(None, 4), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), zlib.compress(b"x"))
    assert "found chunks of 536870912 bytes" in refused(path, array("a", 4))


@pytest.mark.parametrize("options", [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 4}])
def test_other_filters_are_refused(path, options):
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=VALUES, chunks=(10, 4), **options)
    assert "expected gzip and shuffle only; convert" in refused(path, array("a", 4))


@pytest.mark.parametrize(("values", "width"), [(VALUES, 3), (VALUES, None), (VALUES[None], 4), (np.float32(1), None)])
def test_other_shapes_are_refused(path, values, width):
    with h5py.File(path, "w") as file:
        file["a"] = values
    assert "found shape" in refused(path, array("a", width))


def test_what_is_missing_or_of_another_kind(path):
    with h5py.File(path, "w") as file:
        file["a"] = VALUES
        file["group/x"] = 1
        file["type"] = np.dtype("f4")
        file["null"] = h5py.Empty("f4")
    assert "has no 'b', expected it beside a, group" in refused(path, array("b"))
    assert "found no array" in refused(path, array("group"))
    assert "found no array" in refused(path, array("type"))
    assert "found no array" in refused(path, array("null"))
    assert "found no group" in refused(path, lambda root: root.group("a"))


@pytest.mark.parametrize("cut", [0, 10, 500, -100])
def test_damaged_files(path, cut):
    with h5py.File(path, "w") as file:
        file["a"] = VALUES
    path.write_bytes(path.read_bytes()[:cut])
    assert "cannot be read as HDF5" in refused(path, array("a", 4))


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_give_errors_or_numbers(path, seed):
    """Whatever is damaged, the answer is an array of the declared shape or one clear line."""
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=VALUES, chunks=(40, 4), compression="gzip", shuffle=True)
    rng = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    for position in rng.integers(len(data), size=8):
        data[position] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    with contextlib.suppress(FocalError), Hdf5File(path) as file:
        assert file.root.array("a", 4).shape[1] == 4


# ---- .npy files ----


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_npy_files_are_read_exactly(tmp_path):
    for number, values in enumerate(
        [VALUES, np.asfortranarray(VALUES), VALUES.astype(">f8"), np.arange(3), VALUES > 0]
    ):
        np.save(tmp_path / f"{number}.npy", values)
        assert np.array_equal(read_npy(tmp_path / f"{number}.npy", 10**6), values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 20)}\n"),
         "found 0 bytes of content, expected the 160000000000000 its header claims"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}\n") + bytes(8), "found 8 bytes of content"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}\n"), "nothing is unpickled here"),
        (header("{'descr': '<U8', 'fortran_order': False, 'shape': (2,)}\n"), "expected real numbers"),
        (header("{'descr': '<c16', 'fortran_order': False, 'shape': ()}\n") + bytes(16), "expected real numbers"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -3)}\n"), "expected whole numbers from 0"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}\n"), "expected whole numbers from 0"),
        (header("__import__('os').system('touch ran')\n"), "no readable .npy header"),
        (header("{'descr': '<f8'}\n"), "no readable .npy header"),
        (header("(" * 3000), "no readable .npy header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "no readable .npy header"),
        (b"\x93NUMPY\x09\x00", "no readable .npy header"),
        (b"", "no readable .npy header"),
    ],
)  # fmt: skip
def test_hostile_npy_files(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FocalError, match=message):
        parse_npy(data, "a.npy")
    assert not (tmp_path / "ran").exists()
