"""check_claims and check_scales: every difference named, by example and by random models."""

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glm52_jax.checkpoint import Checkpoint, CheckpointError
from glm52_jax.claims import Expected, check_claims, check_scales, scale_shape
from glm52_jax.safetensors_file import DTYPES
from tests.checkpoint_files import FUZZ, SHARD, Stored, Tensors, directory, header_of, one, pack_tensors

# Examples


def claims_of(directory: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    """A checkpoint of zeros: name -> (dtype, shape)."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return Checkpoint.open(one(directory, header, bytes(offset)))


def unclaimed(checkpoint: Checkpoint, expected: dict[str, Expected], *words: str, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_claims(checkpoint, expected, **kwargs)
    for word in (str(checkpoint.path), *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    return str(caught.value)


FLOAT = ("BF16", "F32")
WEIGHT = Expected((192, 256), FLOAT, block_scaled_allowed=True)


def test_claims_name_every_tensor_once(tmp_path):
    tensors = {
        "w_scale_inv": ("F32", (2, 2)),
        "norm": ("BF16", (4,)),
        "w": ("F8_E4M3", (192, 256)),
        "v": ("F32", (192, 256)),
        "skip.w": ("F8_E4M3", (128, 128)),
        "skip.w_scale_inv": ("F32", (1, 1)),
    }
    expected = {"w": WEIGHT, "v": WEIGHT, "norm": Expected((4,), FLOAT)}
    claimed = check_claims(claims_of(tmp_path, tensors), expected, ignore=lambda name: name == "skip.w")
    assert claimed == ["w", "w_scale_inv", "v", "norm"]


def test_scale_shapes_round_up():
    assert [scale_shape(s) for s in ((576, 6144), (128, 1), (129, 0))] == [(5, 48), (1, 1), (2, 0)]


def test_all_differences_are_reported_at_once(tmp_path):
    tensors = {
        "shape": ("BF16", (2, 3)),
        "dtype": ("I32", (4,)),
        "fp8": ("F8_E4M3", (128, 256)),
        "fp8_scale_inv": ("F32", (2, 1)),
        "half": ("F8_E4M3", (128, 256)),
        "half_scale_inv": ("BF16", (1, 2)),
        "bare": ("F8_E4M3", (128, 256)),
        "plain": ("BF16", (128, 256)),
        "plain_scale_inv": ("F32", (1, 2)),
        "gone_scale_inv": ("F32", (1, 2)),
        "norm": ("F8_E4M3", (128,)),
        "extra": ("U8", (1,)),
        "other_scale_inv": ("F32", (1, 1)),
    }
    scaled = Expected((128, 256), FLOAT, block_scaled_allowed=True)
    expected = {name: scaled for name in ("fp8", "half", "bare", "plain", "gone")}
    expected |= {"shape": Expected((3, 2), FLOAT), "dtype": Expected((4,), FLOAT), "norm": Expected((128,), FLOAT)}
    file = tmp_path / SHARD
    message = unclaimed(
        claims_of(tmp_path, tensors),
        expected,
        "2 missing:",
        "'gone', expected BF16 or F32 or F8_E4M3 with scales [128, 256]",
        f"'bare_scale_inv', the scales of the F8_E4M3 weight in {file}",
        "2 unexpected:",
        f"'extra' in {file}",
        f"'other_scale_inv' in {file}",
        "2 of the wrong shape:",
        f"'shape' in {file}: found [2, 3], expected [3, 2]",
        f"'fp8_scale_inv' in {file}: found [2, 1], expected [1, 2]",
        "3 of the wrong dtype:",
        f"'dtype' in {file}: found I32, expected BF16 or F32",
        f"'half_scale_inv' in {file}: found BF16, expected F32",
        f"'norm' in {file}: found F8_E4M3, expected BF16 or F32",
        "2 scales without an F8_E4M3 weight:",
        f"'plain_scale_inv' in {file}: its weight is BF16 in {file}",
        f"'gone_scale_inv' in {file}: its weight is missing",
    )
    assert message.count("\n") == 5 + 11


def test_ten_of_a_kind_are_listed(tmp_path):
    checkpoint = claims_of(tmp_path, {f"t{i:02}": ("U8", (1,)) for i in range(25)})
    message = unclaimed(checkpoint, {"m": Expected((1,), ("U8",))}, "1 missing", "25 unexpected", "'t09'", "...")
    assert "'t10'" not in message and len(re.findall(r"'t\d\d' in ", message)) == 10


def test_only_matrices_have_blocks():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        Expected((2, 3, 4), FLOAT, block_scaled_allowed=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
def test_bad_scales(bad):
    scales = np.ones((3, 4), np.float32)
    scales[1, 2] = bad
    with pytest.raises(CheckpointError, match=rf"'w_scale_inv' in s\.safetensors: 1 of 12 .*{bad}.* \[1, 2\]"):
        check_scales("w_scale_inv", scales, Path("s.safetensors"))


def test_good_scales():
    check_scales("w_scale_inv", np.asarray([[0.0, 1e-45, 3.4e38]], np.float32))
    check_scales("w_scale_inv", np.empty((0, 3), np.float32))


# Random models


@st.composite
def models(draw: st.DrawFn) -> tuple[Tensors, dict[str, Expected]]:
    """A small checkpoint with FP8 and plain tensors, and the expectations that it meets."""
    content: Tensors = {}
    expected = {}
    for i in range(draw(st.integers(1, 5))):
        name = f"layers.{i}.weight"
        if draw(st.booleans()):
            shape = (draw(st.integers(1, 300)), draw(st.integers(1, 4)))
            scales = np.ones(scale_shape(shape), np.float32)
            content[name] = Stored("F8_E4M3", shape, bytes(math.prod(shape)))
            content[name + "_scale_inv"] = Stored("F32", scales.shape, scales.tobytes())
            expected[name] = Expected(shape, ("BF16",), block_scaled_allowed=True)
        else:
            shape = (draw(st.integers(0, 4)),)
            content[name] = Stored("BF16", shape, bytes(2 * shape[0]))
            expected[name] = Expected(shape, ("BF16", "F32"))
    return {name: content[name] for name in draw(st.permutations(sorted(content)))}, expected


def claim(content: Tensors, expected: dict[str, Expected]) -> list[str]:
    with directory(model=pack_tensors(header_of(content), content)) as path:
        return check_claims(Checkpoint.open(path), expected)


@FUZZ
@given(models())
def test_every_tensor_is_claimed_once(model):
    content, expected = model
    claimed = claim(content, expected)
    assert sorted(claimed) == sorted(content)


@FUZZ
@given(models(), st.data())
def test_a_missing_tensor_or_scale_is_named(model, data):
    content, expected = model
    name = data.draw(st.sampled_from(sorted(content)))
    del content[name]
    with pytest.raises(CheckpointError, match=f"1 missing:\n    '{name}'"):
        claim(content, expected)


@FUZZ
@given(models(), st.booleans())
def test_an_extra_tensor_is_named(model, looks_like_a_scale):
    content, expected = model
    name = "extra_scale_inv" if looks_like_a_scale else "extra"
    content[name] = Stored("F32", (1, 1), bytes(4))
    with pytest.raises(CheckpointError, match=f"1 unexpected:\n    '{name}' in .*{SHARD}"):
        claim(content, expected)


@FUZZ
@given(models(), st.data())
def test_a_wrong_shape_is_named(model, data):
    content, expected = model
    name = data.draw(st.sampled_from(sorted(content)))
    dtype, shape, raw = content[name]
    content[name] = Stored(dtype, (*shape, 1), raw)
    with pytest.raises(CheckpointError, match=f"1 of the wrong shape:\n    '{name}' in .*{SHARD}: found"):
        claim(content, expected)


@FUZZ
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, width=32)),
    st.lists(st.sampled_from((math.nan, math.inf, -math.inf, -1.0, -1e-45)), max_size=3),
    st.data(),
)
def test_scales(scales, poison, data):
    scales[np.isinf(scales)] = 1.0
    if not poison:
        check_scales("w_scale_inv", scales)
        return
    for value in poison:
        scales[tuple(data.draw(st.integers(0, side - 1)) for side in scales.shape)] = value
    with pytest.raises(CheckpointError, match=rf"'w_scale_inv': [1-3] of {scales.size} scales"):
        check_scales("w_scale_inv", scales)


@FUZZ
@given(st.sampled_from((np.float32, ml_dtypes.bfloat16)), st.floats(width=32))
def test_one_scale(dtype, value):
    scales = np.asarray([[1.0, value]], np.float32).astype(dtype)
    good = 0 <= scales[0, 1].astype(np.float32) < math.inf
    if good:
        check_scales("w", scales)
    else:
        with pytest.raises(CheckpointError, match=r"at \[0, 1\]"):
            check_scales("w", scales)
