"""The Hopper kernel of fp8_linear on the GPU, beyond the named cases: rows, hostile values, far layers, replays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_linear, registry
from pallas_kernels.compare import compare
from pallas_kernels.fp8_linear import mosaic_sm90, reference
from pallas_kernels.fp8_linear.spec import CASES, Spec, inputs
from pallas_kernels.layer_index import KnownLayer

pytestmark = pytest.mark.gpu


# Relative L2. wgmma keeps some 14 bits of the largest product within a block: measured 2.2e-4 on random weights; bfloat16
# outputs add their one rounding, 1.7e-3. In W8A8 that holds for ``settled`` inputs.
TOLERANCE = {"float32": 5e-4, "bfloat16": 2.5e-3}


def scales(wide: np.ndarray) -> np.ndarray:
    """Of the groups of 128 of a row, float32 [rows, groups, 1]."""
    amax = np.abs(wide.reshape(wide.shape[0], -1, 128)).max(axis=-1, keepdims=True)
    return np.maximum(amax, np.float32(1e-10)) * np.float32(1 / 448)


def settled(x: jax.Array) -> jax.Array:
    """x whose quantization leaves no choice: what lies on the middle of two e4m3 values is moved by one bfloat16.

    v * 448 / amax is such a middle, exactly, wherever 7 v / amax is one in units of the last place: 27 of the 5120 elements of
    8 rows of 640. There an ulp decides, which the kernel (times 1 / scale) and the reference (over scale) need not share; all 27
    one way or the other move SwiGLU's outputs by 1.2e-2 of their norm.
    """
    wide = np.asarray(x.astype(jnp.float32))
    q = np.abs(wide.reshape(wide.shape[0], -1, 128).astype(np.float64)) / scales(wide)
    ulp = np.exp2(np.floor(np.log2(np.maximum(q, 2.0**-6))) - 3)
    middle = (np.abs(q / ulp % 1 - 0.5) * ulp < 1e-6 * q).reshape(wide.shape)
    assert middle.sum() < 0.02 * middle.size
    return jnp.asarray(np.where(middle, wide * np.float32(1 + 2.0**-7), wide), jnp.bfloat16)


def multiplied(x: jax.Array, arithmetic: str) -> jax.Array:
    """What the weights are multiplied by, float32."""
    wide = np.asarray(x.astype(jnp.float32))
    if arithmetic == "w8a16":
        return jnp.asarray(wide)
    scale = scales(wide)
    values = (wide.reshape(*scale.shape[:2], 128) / scale).astype(jnp.float8_e4m3fn).astype(np.float32)
    return jnp.asarray((values * scale).reshape(wide.shape))


def kernel(spec: Spec, x: jax.Array, weights: tuple[Any, ...], index: Any) -> tuple[jax.Array, ...]:
    """Through the public functions, with the kernel forced."""
    out = jnp.dtype(spec.out_dtype)
    if spec.form == "swiglu":
        return (fp8_linear.swiglu(x, weights[0], (index,), arithmetic=spec.arithmetic, backend="mosaic_sm90"),)
    return fp8_linear.linears(x, weights, (index,), arithmetic=spec.arithmetic, dtype=out, backend="mosaic_sm90")


def agrees(spec: Spec, x: jax.Array, weights: tuple[Any, ...], layer: int) -> None:
    x = settled(x) if spec.arithmetic == "w8a8" else x
    got = jax.jit(lambda x, w, i: kernel(spec, x, w, i))(x, weights, jnp.asarray(layer, jnp.int32))
    wide = dataclasses.replace(spec, arithmetic="w8a16", x_dtype="float32", out_dtype="float32")
    want = jax.jit(lambda x, w: reference.run(wide, x, w, (layer,)))(multiplied(x, spec.arithmetic), weights)
    for a, b in zip(got, want, strict=True):
        difference = compare(np.asarray(a.astype(jnp.float32)), b)
        assert difference.rel_l2 < TOLERANCE[spec.out_dtype], f"{spec}: {difference}"


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("rows", [2, 7, 9, 17, 33, 64])
def test_every_number_of_rows(rows: int, arithmetic: str) -> None:
    """n = 576 beside another, float32 outputs: what is left is the accumulation of FP8 wgmma."""
    spec = Spec(rows, 1024, (128, 576), arithmetic, layers=2, out_dtype="float32")
    x, weights, _, _ = inputs(spec, jax.random.key(rows))
    agrees(spec, x, weights, 1)


@pytest.mark.parametrize("k", [128, 512, 640, 1024, 1536, 3584])
@pytest.mark.parametrize("rows", [1, 8])
def test_every_share_of_k(rows: int, k: int) -> None:
    for form in ("linear", "swiglu"):
        spec = Spec(rows, k, (192,), "w8a8", form, layers=2)
        x, weights, _, _ = inputs(spec, jax.random.key(k))
        agrees(spec, x, weights, 1)


FEW_TILES = {"q_a_kv_a": {}, "q_b_tp8": {}, "index_q": {}, "shared_gate_up": {"ns": (1536,)}}


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("name", FEW_TILES)
def test_clusters_that_share_k(name: str, arithmetic: str) -> None:
    """Few tiles: right, the same bits in each replay, and those of a row whatever the other rows are."""
    spec = dataclasses.replace(CASES[f"{name}_{arithmetic}"], layers=2, **FEW_TILES[name])
    x, weights, _, _ = inputs(dataclasses.replace(spec, rows=8), jax.random.key(3))
    found = {}
    for rows in (1, 2, 8):
        sized = dataclasses.replace(spec, rows=rows)
        agrees(sized, x[:rows], weights, 1)
        step = jax.jit(lambda x, w, i, sized=sized: kernel(sized, x, w, i))
        found[rows] = [np.asarray(step(x[:rows], weights, 1)[-1]).view(np.uint16) for _ in range(20)]
        for again in found[rows][1:]:
            np.testing.assert_array_equal(again, found[rows][0])
    np.testing.assert_array_equal(found[8][0][:2], found[2][0])


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("k", [2048, 3072])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 64])
def test_norm_in_the_launch(rows: int, k: int, residual: bool, arithmetic: str) -> None:
    """total is exact, normed as far as the last bit of its sum goes, and the projections are those of that normed.

    Several rows: in the product's launch (short ones) or in one that quantizes them too (with a residual)."""
    spec = Spec(
        rows, k, (128, 576), arithmetic, layers=2, out_dtype="float32", norm="bfloat16", delta=residual, eps=1e-5
    )
    x, weights, _, _, norm, delta = inputs(spec, jax.random.key(rows))
    run = jax.jit(
        lambda *a: fp8_linear.norm_linears(
            *a, eps=1e-5, delta=delta, arithmetic=arithmetic, dtype=jnp.float32, backend="mosaic_sm90"
        )
    )
    index = jnp.asarray(1, jnp.int32)
    total, normed, outs = run(x, norm, weights, (index,))
    want_total, want_normed = reference.add_norm(x, delta, norm[1], 1e-5)
    np.testing.assert_array_equal(np.asarray(total.astype(jnp.float32)), np.asarray(want_total.astype(jnp.float32)))
    assert compare(normed.astype(jnp.float32), want_normed.astype(jnp.float32)).rel_l2 < 5e-4
    plain = dataclasses.replace(spec, norm="", delta=False)
    for got, want in zip(outs, kernel(plain, normed, weights, index), strict=True):
        assert compare(got, want).rel_l2 < 1e-5  # another order of the blocks


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("name", ["norm_q_b_tp8", "add_norm_q_a_kv_a"])
def test_normed_rows_stay_by_themselves(name: str, arithmetic: str) -> None:
    """A row has the same bits whatever the other rows are and however many, and in each replay."""
    spec = dataclasses.replace(CASES[f"{name}_{arithmetic}"], rows=8, layers=2)
    x, weights, _, _, norm, delta = inputs(spec, jax.random.key(5))

    @jax.jit
    def run(x: Any, delta: Any) -> Any:
        given = {"delta": delta, "arithmetic": arithmetic, "backend": "mosaic_sm90"}
        return fp8_linear.norm_linears(x, norm, weights, (1,), eps=1e-5, **given)

    def bits(x: Any, delta: Any) -> list[np.ndarray]:
        return [np.asarray(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(run(x, delta))]

    first = bits(x, delta)
    for rows in (2, 3, 8):
        others = x.at[2:].multiply(-3)[:rows]
        for got, want in zip(bits(others, None if delta is None else delta[:rows]), first, strict=True):
            np.testing.assert_array_equal(got[:2], want[:2])
    for _ in range(20):
        for got, want in zip(bits(x, delta), first, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_hostile_rows_stay_by_themselves(rows: int, arithmetic: str) -> None:
    """One group of the first row is all hostile: the other rows keep their bits, nothing not finite gets lost."""
    spec = Spec(rows, 1024, (64,), arithmetic, out_dtype="float32")
    x, weights, _, _ = inputs(spec, jax.random.key(1))
    step = jax.jit(lambda x, w: kernel(spec, x, w, jnp.zeros((), jnp.int32))[0])
    clean = np.asarray(step(x, weights))
    for value in (0.0, np.nan, np.inf, 1e30, 1e-38):
        got = np.asarray(step(x.at[0, :128].set(jnp.bfloat16(value)), weights))
        np.testing.assert_array_equal(got[1:], clean[1:])
        assert np.isfinite(got[0]).all() if np.isfinite(value) else not np.isfinite(got[0]).any(), value


def test_w8a16_keeps_small_elements() -> None:
    spec = Spec(1, 1024, (64,), "w8a16", out_dtype="float32")
    _, weights, _, _ = inputs(spec, jax.random.key(0))
    x = np.full((1, 1024), 1.0078125 * 2.0**-14, np.float32)
    x[0, ::128] = 1.0
    agrees(spec, jnp.asarray(x, jnp.bfloat16), weights, 0)


def test_reads_a_layer_beyond_32_bit_offsets() -> None:
    spec = dataclasses.replace(CASES["o_proj_w8a8"], layers=45)
    x, weights, _, _ = inputs(spec, jax.random.key(0))
    assert weights[0].data.size > 2**32
    agrees(spec, x, weights, 44)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["q_a_kv_a", "o_proj_tp8", "norm_q_b_tp8", "add_norm_q_a_kv_a", "shared_gate_up"])
def test_a_known_layer_has_the_bits_of_a_traced_one(name: str, rows: int) -> None:
    """Slices that start at 256 bytes, within them (kv_a's scales), and the last layer's, which are all of the stack."""
    spec = dataclasses.replace(CASES[f"{name}_w8a16"], rows=rows, layers=3)
    x, weights, _, _, *norm = inputs(spec, jax.random.key(4))

    def run(index: Any) -> list[np.ndarray]:
        given = (x, weights, (index,), None, *norm)
        outs = jax.jit(lambda x, w, i, *rest: mosaic_sm90.run(spec, x, w, i, *rest))(*given)
        return [np.asarray(out.astype(jnp.float32)) for out in outs]

    for layer in range(3):
        for known, traced in zip(run(KnownLayer(layer)), run(jnp.asarray(layer, jnp.int32)), strict=True):
            np.testing.assert_array_equal(known, traced)


@pytest.mark.parametrize("rows", [1, 8])
def test_replays_give_the_bits_of_the_first_call(rows: int) -> None:
    spec = dataclasses.replace(CASES["o_proj_w8a8"], rows=rows, layers=2)
    x, weights, _, _ = inputs(spec, jax.random.key(0))
    step = jax.jit(lambda x, w, i: kernel(spec, x, w, i))
    first = np.asarray(step(x, weights, jnp.asarray(1, jnp.int32))[0].astype(jnp.float32))
    for _ in range(20):
        again = step(x, weights, jnp.asarray(1, jnp.int32))[0].astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(again), first)


@pytest.mark.parametrize(("rows", "backend"), [(1, "mosaic_sm90"), (64, "mosaic_sm90"), (65, "mosaic_prefill_sm90")])
def test_chosen_by_itself(rows: int, backend: str) -> None:
    x, weights, _, _ = inputs(Spec(rows, 512, (128,)), jax.random.key(0))
    with registry.recorded() as choices:
        text = jax.jit(lambda x, w: fp8_linear.linear(x, w, (0,))).lower(x, weights[0]).as_text()
    assert [choice.backend for choice in choices] == [backend]
    assert "mosaic_gpu" in text
