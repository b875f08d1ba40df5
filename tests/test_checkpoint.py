"""Checkpoint: what is read, and how files are mapped."""

import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from glm52_jax.checkpoint import Checkpoint, CheckpointError
from glm52_jax.safetensors_file import DTYPES
from tests.checkpoint_files import INDEX, SHARD, A, B, one, pack, sharded, write

# What is read


def test_reads_every_dtype_bit_for_bit(tmp_path):
    header, data = {}, b""
    rng = np.random.default_rng(0)
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2, 6 * dtype.itemsize, np.uint8).tobytes()
        header[name] = {"dtype": name, "shape": [3, 2], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    with Checkpoint.open(one(tmp_path, header, data)) as checkpoint:
        for name, dtype in DTYPES.items():
            array = checkpoint.read(name)
            begin, end = header[name]["data_offsets"]
            assert (array.dtype, array.shape) == (dtype, (3, 2))
            assert array.tobytes() == data[begin:end]
            assert not array.flags.writeable and not array.flags.owndata
        info = checkpoint.tensors["BF16"]
        assert (info.name, info.dtype, info.shape, info.nbytes) == ("BF16", "BF16", (3, 2), 12)
        assert info.file == tmp_path / SHARD
        assert info.file.read_bytes()[info.begin : info.end] == checkpoint.read("BF16").tobytes()
        assert checkpoint.bytes_by_dtype()["F8_E4M3"] == 6
        assert sum(checkpoint.bytes_by_dtype().values()) == len(data)


def test_fp8_is_the_variant_without_infinity(tmp_path):
    header = {"w": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}
    values = Checkpoint.open(one(tmp_path, header, bytes([0x7E, 0x38, 0x7F]))).read("w").astype(np.float32)
    assert values[0] == 448 and values[1] == 1 and np.isnan(values[2])


@pytest.mark.parametrize("pad", range(8))
def test_reads_at_any_alignment(tmp_path, pad):
    values = np.arange(5, dtype=np.float32)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]},
        "h": {"dtype": "BF16", "shape": [2], "data_offsets": [21, 25]},
    }
    raw = json.dumps(header).encode() + b" " * pad
    half = np.asarray([1.5, -3], ml_dtypes.bfloat16)
    checkpoint = Checkpoint.open(one(tmp_path, raw, b"\0" + values.tobytes() + half.tobytes()))
    assert np.array_equal(checkpoint.read("w"), values)
    assert np.array_equal(checkpoint.read("h").astype(np.float32), [1.5, -3])


def test_reads_scalars_and_empty_tensors(tmp_path):
    header = {
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "end": {"dtype": "BF16", "shape": [3, 0], "data_offsets": [8, 8]},
    }
    checkpoint = Checkpoint.open(one(tmp_path, header, (7).to_bytes(8, "little")))
    assert checkpoint.read("scalar").shape == () and checkpoint.read("scalar") == 7
    assert checkpoint.read("empty").shape == (0, 7) and checkpoint.read("end").shape == (3, 0)
    assert checkpoint.read("end").dtype == ml_dtypes.bfloat16 and not checkpoint.read("end").flags.writeable


def test_a_file_without_tensors_is_valid(tmp_path):
    assert Checkpoint.open(one(tmp_path, {"__metadata__": {"format": "pt"}}, b"")).tensors == {}


def test_reads_what_the_safetensors_library_wrote(tmp_path):
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    save_file(arrays, write(tmp_path) / SHARD, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"w", "b"}
    for name, array in arrays.items():
        assert checkpoint.read(name).dtype == array.dtype and np.array_equal(checkpoint.read(name), array)


def test_many_files_without_an_index(tmp_path):
    write(tmp_path, a=pack({"A": A}, bytes(24)), b=pack({"B": {**B, "data_offsets": [0, 8]}}, bytes(8)))
    (tmp_path / "._a.safetensors").write_bytes(b"AppleDouble")
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.files == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert checkpoint.ignored_files == [tmp_path / "._a.safetensors"]
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
        "A": "a.safetensors",
        "B": "b.safetensors",
    }


def test_the_index_decides_which_files_are_used(tmp_path):
    sharded(tmp_path, {"A": "a.safetensors", "B": "b.safetensors"})
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even a header")
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.tensors) == ["A", "B"] and checkpoint.path == tmp_path
    assert checkpoint.ignored_files == [tmp_path / "consolidated.safetensors"]


def test_links_of_the_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0").write_bytes(pack({"A": A}, bytes(24)))
    (blobs / "1").write_text('{"hidden_size": 8}')
    (blobs / "2").write_text(json.dumps({"weight_map": {"A": SHARD}}))
    for blob, name in enumerate((SHARD, "config.json", INDEX)):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.config == {"hidden_size": 8} and checkpoint.read("A").shape == (2, 3)


# Mapping


def mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_files_are_mapped_on_demand_and_unmapped_with_the_last_view(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint = Checkpoint.open(one(tmp_path, {"A": A, "B": B}, values.tobytes() + bytes(8)))
    file = tmp_path / SHARD
    assert not mapped(file)
    view = checkpoint.read("A")[1:]
    assert mapped(file)
    checkpoint.release(file)
    checkpoint.release(file)
    assert mapped(file) and np.array_equal(view, values[1:])
    del view
    assert not mapped(file)
    view = checkpoint.read("A")
    checkpoint.close()
    assert np.array_equal(view, values)
    del view
    assert not mapped(file)
    with pytest.raises(CheckpointError, match=r"closed.*'A'"):
        checkpoint.read("A")


def test_views_survive_the_removal_of_the_file(tmp_path):
    checkpoint = Checkpoint.open(one(tmp_path, {"A": A, "B": B}, b"\x01" * 32))
    view = checkpoint.read("A")
    (tmp_path / SHARD).unlink()
    checkpoint.release(tmp_path / SHARD)
    assert view.tobytes() == b"\x01" * 24
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / SHARD))):
        checkpoint.read("B")


def test_open_touches_no_tensor_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", lambda *args, **kwargs: pytest.fail("open() mapped a file"))
    size = 1 << 36  # a sparse file: reading it would take hours
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    one(tmp_path, header, b"")
    os.truncate(tmp_path / SHARD, 8 + len(json.dumps(header)) + size)
    assert Checkpoint.open(tmp_path).tensors["w"].nbytes == size


def test_a_file_that_shrank_after_open_is_refused(tmp_path):
    checkpoint = Checkpoint.open(one(tmp_path, {"A": A, "B": B}))
    size = (tmp_path / SHARD).stat().st_size
    os.truncate(tmp_path / SHARD, size - 4)
    with pytest.raises(CheckpointError, match=rf"{SHARD} changed.*{size} bytes then, {size - 4} now"):
        checkpoint.read("B")


def test_unknown_names(tmp_path):
    checkpoint = Checkpoint.open(one(tmp_path, {"A": A, "B": B}))
    with pytest.raises(CheckpointError, match="no tensor 'C'"):
        checkpoint.read("C")
    with pytest.raises(CheckpointError, match="elsewhere"):
        checkpoint.release(Path("elsewhere"))


def test_needs_no_jax():
    folder = Path(__file__).parents[1] / "glm52_jax"
    code = f"""
import sys, types
package = types.ModuleType("glm52_jax"); package.__path__ = [{str(folder)!r}]; sys.modules["glm52_jax"] = package
import glm52_jax.claims
assert not any(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
