"""Checkpoint against random and damaged files: the declared content, or CheckpointError, and nothing else."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from glm52_jax.checkpoint import Checkpoint, CheckpointError
from glm52_jax.claims import Expected, check_claims
from glm52_jax.safetensors_file import DTYPES
from tests.checkpoint_files import FUZZ, INDEX, SHARD, Tensors, directory, header_of, pack_tensors, tensors

# What the safetensors library's numpy side knows; F8 is missing there, which is why there is a reader here.
SHARED_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def files_refused(*words: str, **files: bytes) -> None:
    with directory(**files) as path:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path)
        for word in (str(path), *words):
            assert word in str(caught.value)


def loads_as_declared_or_refused(content: bytes) -> bool:
    """Opens a file; if that works, what it holds must be what its header declares by a naive reading."""
    with directory(model=content) as path:
        try:
            checkpoint = Checkpoint.open(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            str(error).encode()
            return False
        data = 8 + int.from_bytes(content[:8], "little")
        declared = json.loads(content[8:data])
        declared.pop("__metadata__", None)
        assert set(checkpoint.tensors) == set(declared)
        for name, entry in declared.items():
            begin, end = entry["data_offsets"]
            array = checkpoint.read(name)
            assert array.dtype == DTYPES[entry["dtype"]] and array.shape == tuple(entry["shape"])
            assert array.tobytes() == content[data + begin : data + end]
        return True


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(2**62, 2**66),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


# Valid files


@FUZZ
@given(tensors(), st.integers(0, 9), st.randoms())
def test_roundtrip(content, pad, random):
    entries = list(header_of(content).items())
    random.shuffle(entries)  # the header's order need not be the order of the data
    with directory(model=pack_tensors(dict(entries), content, pad)) as path, Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.tensors) == set(content)
        for name, stored in content.items():
            array = checkpoint.read(name)
            assert (array.dtype, array.shape) == (DTYPES[stored.dtype], stored.shape)
            assert array.tobytes() == stored.raw and not array.flags.writeable


@FUZZ
@given(tensors(SHARED_DTYPES))
def test_reads_what_the_library_writes(content):
    arrays = {name: np.frombuffer(s.raw, DTYPES[s.dtype]).reshape(s.shape) for name, s in content.items()}
    with directory() as path:
        save_file(arrays, path / SHARD, metadata={"format": "np"})
        checkpoint = Checkpoint.open(path)
        for name, stored in content.items():
            assert (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) == (stored.dtype, stored.shape)
            assert checkpoint.read(name).tobytes() == stored.raw


@FUZZ
@given(tensors(SHARED_DTYPES), st.integers(0, 9))
def test_the_library_reads_the_same(content, pad):
    with directory(model=pack_tensors(header_of(content), content, pad)) as path:
        checkpoint = Checkpoint.open(path)
        with safe_open(path / SHARD, framework="np") as library:
            assert set(library.keys()) == set(checkpoint.tensors)
            for name, info in checkpoint.tensors.items():
                theirs = library.get_tensor(name)
                assert (theirs.dtype, theirs.shape) == (DTYPES[info.dtype], info.shape)
                assert checkpoint.read(name).tobytes() == theirs.tobytes()


@FUZZ
@given(tensors(min_size=2), st.data())
def test_shards_with_an_index(content, data):
    shards: dict[str, Tensors] = {"a": {}, "b": {}}
    weight_map = {}
    for name, stored in content.items():
        stem = data.draw(st.sampled_from(("a", "b")))
        shards[stem][name], weight_map[name] = stored, f"{stem}.safetensors"
    files = {stem: pack_tensors(header_of(shard), shard) for stem, shard in shards.items() if shard}
    with directory(**files, unused=b"") as path:
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.ignored_files == [path / "unused.safetensors"]
            for name, stored in content.items():
                assert checkpoint.tensors[name].file == path / weight_map[name]
                assert checkpoint.read(name).tobytes() == stored.raw


# Damaged files


@FUZZ
@given(tensors(), st.data())
def test_truncated_anywhere(content, data):
    whole = pack_tensors(header_of(content), content)
    files_refused(SHARD, model=whole[: data.draw(st.integers(0, len(whole) - 1), label="kept")])


@FUZZ
@given(tensors(), st.binary(min_size=1, max_size=9))
def test_trailing_bytes(content, tail):
    files_refused(SHARD, "at the end", model=pack_tensors(header_of(content), content) + tail)


@FUZZ
@given(tensors(), st.integers(-40, 40) | st.integers(0, 2**64 - 1), st.integers(0, 9))
def test_wrong_length_field(content, change, pad):
    whole = pack_tensors(header_of(content), content, pad)
    right = int.from_bytes(whole[:8], "little")
    length = right + change if abs(change) <= 40 else change
    assume(length != right and 0 <= length < 2**64)
    files_refused(SHARD, model=length.to_bytes(8, "little") + whole[8:])


@FUZZ
@given(tensors(bytes_min=1), st.sampled_from((0, 1)), st.integers(-20, 20).filter(bool), st.booleans(), st.data())
def test_moved_offsets(content, which, change, both, data):
    """Overlaps, holes, spans that do not fit the shape, ends beyond the file."""
    header = header_of(content)
    name = data.draw(st.sampled_from(sorted(content)))
    offsets = header[name]["data_offsets"]
    for i in (0, 1) if both else (which,):
        offsets[i] += change
    files_refused(SHARD, model=pack_tensors(header, content))


@FUZZ
@given(tensors(min_size=2, bytes_min=1), st.data())
def test_overlapping_tensors(content, data):
    header = header_of(content)
    first, second = data.draw(st.permutations(sorted(content)))[:2]
    header[second] = header[first]
    files_refused(SHARD, model=pack_tensors(header, content))


@FUZZ
@given(tensors(bytes_min=1), st.sampled_from(sorted(DTYPES)), st.data())
def test_other_dtypes(content, dtype, data):
    """Of another size: refused. Of the same size: the file says so, and check_claims has the last word."""
    name = data.draw(st.sampled_from(sorted(content)))
    assume(dtype != content[name].dtype)
    header = header_of(content)
    header[name]["dtype"] = dtype
    same_size = DTYPES[dtype].itemsize == DTYPES[content[name].dtype].itemsize
    if not same_size:
        files_refused(SHARD, dtype, "takes", model=pack_tensors(header, content))
        return
    with directory(model=pack_tensors(header, content)) as path:
        expected = {key: Expected(stored.shape, (stored.dtype,)) for key, stored in content.items()}
        with pytest.raises(
            CheckpointError, match=f"1 of the wrong dtype(.|\n)*found {dtype}, expected {content[name].dtype}"
        ):
            check_claims(Checkpoint.open(path), expected)


@FUZZ
@given(tensors(), st.data())
def test_a_tensor_twice(content, data):
    name = data.draw(st.sampled_from(sorted(content)))
    header = header_of(content)
    pairs = [*header.items(), (name, header[name])]
    text = "{" + ",".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in pairs) + "}"
    files_refused(SHARD, "occurs twice", model=pack_tensors(text.encode(), content))
    twin = {name: content[name]}
    files = {"a": pack_tensors(header, content), "b": pack_tensors(header_of(twin), twin)}
    files_refused("is in two files", "a.safetensors", "b.safetensors", **files)


@settings(FUZZ, max_examples=250)
@given(tensors(), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_bytes_changed_in_the_header(content, changes, digits):
    whole = bytearray(pack_tensors(header_of(content), content))
    length = int.from_bytes(whole[:8], "little")
    for position, value in changes:
        whole[8 + position % length] = ord("0") + value % 10 if digits else value
    loads_as_declared_or_refused(bytes(whole))


@FUZZ
@given(tensors(), st.sampled_from(("dtype", "shape", "data_offsets", "more")), any_json, st.data())
def test_any_json_in_an_entry(content, key, value, data):
    header = header_of(content)
    header[data.draw(st.sampled_from(sorted(content)))][key] = value
    loads_as_declared_or_refused(pack_tensors(json.dumps(header).encode(), content))


@FUZZ
@given(any_json, st.binary(max_size=20))
def test_any_json_as_a_header(value, data):
    raw = json.dumps(value).encode()
    loads_as_declared_or_refused(len(raw).to_bytes(8, "little") + raw + data)


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_as_a_file(content):
    loads_as_declared_or_refused(content)


@FUZZ
@given(tensors(), any_json, st.booleans())
def test_any_json_as_an_index(content, value, whole):
    with directory(model=pack_tensors(header_of(content), content)) as path:
        (path / INDEX).write_text(json.dumps(value if whole else {"weight_map": value}))
        with pytest.raises(CheckpointError):
            Checkpoint.open(path)


@FUZZ
@given(tensors(), any_json | st.sampled_from(("../a.safetensors", "/etc/passwd", ".", "config.json")), st.data())
def test_any_target_in_an_index(content, target, data):
    weight_map: dict[str, Any] = dict.fromkeys(content, SHARD)
    name = data.draw(st.sampled_from(sorted(content)))
    weight_map[name] = target
    with directory(model=pack_tensors(header_of(content), content)) as path:
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json|config\.json"):
            Checkpoint.open(path)


@pytest.mark.parametrize("depth", [50, 500, 900, 1_000, 5_000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nested_json(depth, opening, closing):
    value = opening * depth + "0" + closing * depth
    for text in (f'{{"a": {value}}}', f'{{"__metadata__": {{"a": {value}}}}}', f'{{"a": {{"dtype": {value}}}}}'):
        assert not loads_as_declared_or_refused(pack_tensors(text.encode(), {}))
