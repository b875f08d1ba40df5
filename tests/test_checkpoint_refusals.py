"""Checkpoint: each refusal, with the file, tensor and value that it names."""

import json
import os

import pytest

from tests.checkpoint_files import INDEX, SHARD, A, B, one, pack, refused, sharded, write

# Refusals: the directory


def test_refuses_what_is_no_checkpoint_directory(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")
    refused(tmp_path / "\0", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", str(tmp_path / "file"), "is a file", "directory")
    refused(tmp_path, str(tmp_path), "has no config.json")
    write(tmp_path)
    refused(tmp_path, str(tmp_path), "no *.safetensors")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff{}", b'{"a": 1, "a": 2}', b"[1]", b"3", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_refuses_broken_json(tmp_path, name, text):
    one(tmp_path, {"A": A, "B": B})
    (tmp_path / name).write_bytes(text)
    refused(tmp_path, str(tmp_path / name), "JSON")


def test_refuses_huge_json_before_reading_it(tmp_path):
    one(tmp_path, {"A": A, "B": B})
    os.truncate(tmp_path / "config.json", 1 << 36)
    refused(tmp_path, str(tmp_path / "config.json"), str(1 << 36), "100000000")


@pytest.mark.parametrize("kind", ["directory", "dangling link", "fifo"])
def test_refuses_files_that_are_not_regular(tmp_path, kind):
    file = write(tmp_path) / SHARD
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("nowhere")
    refused(tmp_path, str(file), "does not exist" if kind == "dangling link" else "not a regular file")


def test_refuses_what_the_system_refuses(tmp_path):
    (write(tmp_path) / SHARD).symlink_to(SHARD)  # a loop
    refused(tmp_path, "cannot read", str(tmp_path / SHARD))


# Refusals: the header as a whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["only 0 bytes"]),
        (bytes(7), ["only 7 bytes"]),
        (bytes(64), ["header length 0"]),
        (b"\xff" * 64, [str(2**64 - 1), "100000000"]),
        (pack(b"{}", length=100_000_001), ["100000001"]),
        (pack(b"{}", length=3), ["truncated", "3 bytes", "only 2 follow"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS", "git lfs pull"]),
        (pack(b" {}"), ["begin with '{'", "b' '"]),
        (pack(b"[]"), ["begin with '{'"]),
        (pack(b"{]"), ["header is not valid JSON"]),
        (pack(b'{"a": 1}}'), ["header is not valid JSON"]),
        (pack(b'{"\xff": 1}'), ["header is not valid JSON", "utf-8"]),
        (pack(b'{"a": %s}' % (b"9" * 5000)), ["header is not valid JSON"]),
        (pack(b'{"a": ' * 100_000), ["header is not valid JSON"]),
        (pack({"__metadata__": []}), ["__metadata__", "[]"]),
        (pack({"__metadata__": {"format": 1}}), ["__metadata__", "'format': 1"]),
        (pack(b'{"__metadata__": {"k": "1", "k": "2"}}'), ["'k' occurs twice"]),
    ],
)
def test_refuses_headers(tmp_path, content, words):
    refused(write(tmp_path, model=content), str(tmp_path / SHARD), *words)


def test_refuses_a_tensor_twice_in_one_header(tmp_path):
    text = b'{"twin": %s, "twin": %s}' % (json.dumps(A).encode(), json.dumps(B).encode())
    refused(one(tmp_path, text), str(tmp_path / SHARD), "'twin' occurs twice")


# Refusals: one entry


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": None}, ["dtype", "None"]),
        ({"dtype": ["F32"]}, ["dtype", "['F32']"]),
        ({"dtype": "F4"}, ["unknown dtype 'F4'", "known are F64, F32"]),
        ({"dtype": "f32"}, ["unknown dtype 'f32'"]),
        ({"dtype": "F64"}, ["F64 [2, 3] takes 48 bytes", "[0, 24] span 24"]),
        ({"shape": [2, 4]}, ["[2, 4] takes 32 bytes", "span 24"]),
        ({"shape": None}, ["shape", "None"]),
        ({"shape": "23"}, ["shape", "'23'"]),
        ({"shape": [2, -3]}, ["shape", "[2, -3]"]),
        ({"shape": [-2, -3]}, ["shape", "[-2, -3]"]),
        ({"shape": [2.0, 3]}, ["shape", "[2.0, 3]"]),
        ({"shape": [True, 6]}, ["shape", "[True, 6]"]),
        ({"shape": [6, "1"]}, ["shape", "[6, '1']"]),
        ({"shape": [[2, 3]]}, ["shape", "[[2, 3]]"]),
        ({"shape": [2**63]}, ["shape", str(2**63)]),
        ({"shape": [2**62, 2**62, 4]}, ["overflow"]),
        ({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, ["overflow"]),
        ({"shape": [6] + [1] * 64}, ["shape", "at most 64"]),
        ({"data_offsets": None}, ["data_offsets", "None"]),
        ({"data_offsets": [24]}, ["data_offsets", "[24]"]),
        ({"data_offsets": [0, 24, 24]}, ["data_offsets", "[0, 24, 24]"]),
        ({"data_offsets": {"begin": 0}}, ["data_offsets", "'begin'"]),
        ({"data_offsets": [24, 0]}, ["begin <= end", "[24, 0]"]),
        ({"data_offsets": [-24, 0]}, ["data_offsets", "[-24, 0]"]),
        ({"data_offsets": [0.0, 24]}, ["data_offsets", "[0.0, 24]"]),
        ({"data_offsets": [False, 24]}, ["data_offsets", "[False, 24]"]),
        ({"data_offsets": [0, 2**64]}, ["data_offsets", str(2**64)]),
        ({"data_offsets": [0, 10**4000]}, ["data_offsets"]),
        ({"extra": 1}, ["exactly dtype, shape and data_offsets", "'extra': 1"]),
    ],
)
def test_refuses_entries(tmp_path, change, words):
    message = refused(one(tmp_path, {"B": B, "bad": {**A, **change}}), str(tmp_path / SHARD), "'bad'", *words)
    assert len(message) < 1000


@pytest.mark.parametrize("entry", [None, 3, [], "F32", {}, *({k: A[k] for k in A if k != out} for out in A)])
def test_refuses_entries_that_lack_something(tmp_path, entry):
    refused(one(tmp_path, {"bad": entry}), str(tmp_path / SHARD), "'bad'", "exactly dtype, shape and data_offsets")


def test_refuses_names_that_cannot_be_printed(tmp_path):
    refused(one(tmp_path, {"bad\ud800": A, "B": B}), SHARD, r"'bad\ud800'", "surrogate").encode()


def test_messages_stay_short(tmp_path):
    entry = {**A, "dtype": "x" * 1_000_000, "shape": [1] * 100_000}
    assert len(refused(one(tmp_path, {"n" * 1_000_000: entry}), SHARD, "dtype")) < 2000


# Refusals: where tensors lie


def test_refuses_overlap(tmp_path):
    header = {"A": A, "late": {**B, "data_offsets": [20, 28]}}
    refused(one(tmp_path, header, bytes(28)), str(tmp_path / SHARD), "'late'", "overlaps tensor 'A'")


def test_refuses_two_tensors_at_one_place(tmp_path):
    refused(one(tmp_path, {"A": A, "alias": A}, bytes(24)), str(tmp_path / SHARD), "'alias'", "overlaps", "'A'")


def test_refuses_an_empty_tensor_inside_another(tmp_path):
    header = {"A": A, "empty": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}
    refused(one(tmp_path, header, bytes(24)), "'empty'", "overlaps tensor 'A'")


def test_refuses_holes(tmp_path):
    refused(
        one(tmp_path, {"A": A, "late": {**B, "data_offsets": [29, 37]}}, bytes(37)), SHARD, "'late'", "5 bytes before"
    )
    refused(one(tmp_path, {"late": B}), SHARD, "'late'", "24 bytes before")
    refused(one(tmp_path, {"A": A}), SHARD, "8 bytes at the end")
    refused(one(tmp_path, {}, b"\0"), SHARD, "1 bytes at the end")


def test_a_truncated_file_names_the_first_cut_tensor_and_the_missing_bytes(tmp_path):
    header = {"B": B, "A": A}
    refused(one(tmp_path, header, bytes(31)), str(tmp_path / SHARD), "truncated", "'B'", "1 bytes are missing")
    refused(one(tmp_path, header, bytes(20)), str(tmp_path / SHARD), "truncated", "'A'", "12 bytes are missing")


def test_refuses_offsets_far_outside_the_file(tmp_path):
    header = {"A": {"dtype": "U8", "shape": [2**63 - 1], "data_offsets": [0, 2**63 - 1]}}
    refused(one(tmp_path, header), SHARD, "'A'", "truncated", str(2**63 - 1 - 32))


def test_refuses_a_tensor_in_two_files(tmp_path):
    twin = pack({"twin": A}, bytes(24))
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    refused(write(tmp_path, a=twin, b=twin), "'twin' is in two files", a, b)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"twin": "a.safetensors", "other": "b.safetensors"}}))
    refused(tmp_path, "'twin' is in two files", a, b)


# Refusals: the index


@pytest.mark.parametrize("weight_map", [None, [], "a.safetensors", 3, {}])
def test_refuses_an_index_without_a_weight_map(tmp_path, weight_map):
    refused(sharded(tmp_path, weight_map), str(tmp_path / INDEX), "weight_map")
    (tmp_path / INDEX).write_text("{}")
    refused(tmp_path, str(tmp_path / INDEX), "weight_map", "None")


def test_refuses_names_that_escape_the_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path, a=pack({"A": A}, bytes(24)))
    absolute = str(tmp_path / "a.safetensors")
    for target in ("../a.safetensors", absolute, "sub/../../a.safetensors", "./a.safetensors", "..", ".", "", "..\\a"):
        refused(sharded(inside, {"A": target}), str(inside / INDEX), "'A'", repr(target), "beside the index")


@pytest.mark.parametrize("target", [None, 3, ["a.safetensors"]])
def test_refuses_targets_that_are_no_names(tmp_path, target):
    refused(sharded(tmp_path, {"A": target}), str(tmp_path / INDEX), "'A'", repr(target))


@pytest.mark.parametrize("target", ["c.safetensors", "\0", "\ud800", "n" * 5000])
def test_refuses_missing_shards(tmp_path, target):
    refused(sharded(tmp_path, {"A": target}), str(tmp_path / INDEX), "'A'", "not in the directory").encode()


def test_refuses_an_index_that_disagrees_with_its_files(tmp_path):
    a, b = "a.safetensors", "b.safetensors"
    index = str(tmp_path / INDEX)
    refused(sharded(tmp_path, {"A": a, "B": b, "C": b}), index, "'C'", f"is not in {b}")
    refused(sharded(tmp_path, {"A": b, "B": a}), index, "'A'", f"maps to {b}", str(tmp_path / a))
    write(tmp_path, a=pack({"A": A, "B": B}, bytes(32)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"A": a}}))
    refused(tmp_path, index, "does not name", "'B'", str(tmp_path / a))
    write(tmp_path, a=pack({"A": A, "B": B, "C": {**A, "data_offsets": [32, 56]}}, bytes(56)))
    refused(tmp_path, index, "does not name 2 tensors", "'B'", str(tmp_path / a))
