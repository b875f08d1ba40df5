"""GPU backends of sparse MLA against the reference: every case, hostile slots, repeats, split counts, LSE merge."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lowering, mla_out, paged, registry
from pallas_kernels.compare import rel_l2
from pallas_kernels.registry import BackendRefused
from pallas_kernels.sparse_mla import BACKENDS, attend
from pallas_kernels.sparse_mla.spec import CASES, Spec, inputs, tolerance

pytestmark = pytest.mark.gpu

GPU_BACKENDS = [backend.name for backend in BACKENDS if backend.name != "reference"]
# lse is a sum of rounded products: absolute error, in nats, at scores of a few units.
LSE_TOLERANCE = 2e-2
SMALL = dataclasses.replace(CASES["h64_k2048_fp8"], rows=3, k=200, layers=2, pages=8)


def run(spec: Spec, args: tuple[jax.Array, ...], backend: str) -> tuple[jax.Array, jax.Array]:
    call = functools.partial(
        attend, kv_lora_rank=spec.kv_lora_rank, scale=spec.scale, splits=spec.splits, backend=backend
    )
    return jax.jit(call)(*args)


def supported(spec: Spec, backend: str) -> bool:
    """The backends that serve a spec here; a refusal is data, tested in test_sparse_mla_lowering."""
    entry = next(b for b in BACKENDS if b.name == backend)
    return entry.supports(spec, lowering.default_arch()) is None


def assert_forced_is_refused(spec: Spec, args: tuple[jax.Array, ...], backend: str) -> None:
    with pytest.raises(BackendRefused, match=backend):
        run(spec, args, backend)


def assert_equal_to_reference(spec: Spec, args: tuple[jax.Array, ...], backend: str) -> None:
    context, lse = run(spec, args, backend)
    # The reference in float32 over the same bfloat16 query: its own rounding of the keys stays out of the comparison.
    want, want_lse = run(spec, (args[0].astype(jnp.float32), *args[1:]), "reference")
    assert context.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    empty = np.isneginf(np.asarray(want_lse))
    np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), empty)
    assert np.isfinite(np.asarray(context, np.float32)).all() and not np.asarray(context)[empty].any()
    assert rel_l2(context, want) < tolerance(spec, backend)
    np.testing.assert_allclose(np.asarray(lse)[~empty], np.asarray(want_lse)[~empty], atol=LSE_TOLERANCE)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
# Eight rows: of 64 heads the partials are bfloat16. Nine: with up to eight, 16 heads have the kernel of one tile a program.
@pytest.mark.parametrize("rows", [1, 5, 8, 9])
@pytest.mark.parametrize("name", list(CASES))
def test_cases(name: str, rows: int, backend: str) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=2)
    q, cache, _, slots = inputs(spec, jax.random.key(rows))
    if not supported(spec, backend):
        assert_forced_is_refused(spec, (q, cache, jnp.asarray(1, jnp.int32), slots), backend)
        return
    assert_equal_to_reference(spec, (q, cache, jnp.asarray(1, jnp.int32), slots), backend)


def hostile_slots(spec: Spec) -> np.ndarray:
    """Row 0: nothing; row 1: one slot, at the end; row 2: padding first, wild indices, whole tiles masked; then nothing."""
    slots = np.full((spec.rows, spec.k), -1, np.int32)
    slots[1, -1] = 7
    wild = [spec.capacity, spec.capacity + 63, 2**31 - 1, -2, -(2**31)]
    slots[2, 130:135] = wild
    slots[2, 140:150] = np.arange(100, 110)
    return slots


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (1, "uint8"),
        (8, "uint8"),
        (16, "uint8"),
        (24, "uint8"),
        (64, "uint8"),
        (80, "uint8"),
        (16, "bfloat16"),
        (64, "float32"),
    ],
)
@pytest.mark.parametrize("rows", [8, 9])
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_hostile_slots_on_a_cache_of_nan(splits: int, rows: int, heads: int, dtype: str, backend: str) -> None:
    """Everything that is not selected holds NaN, also the other layer and slot 0; k = 200 is no multiple of a tile."""
    spec = dataclasses.replace(SMALL, rows=rows, heads=heads, cache_dtype=dtype, splits=splits)
    q, cache, _, _ = inputs(spec, jax.random.key(0))
    slots = hostile_slots(spec)
    if not supported(spec, backend):
        assert_forced_is_refused(spec, (q, cache, jnp.asarray(1, jnp.int32), jnp.asarray(slots)), backend)
        return
    used = np.unique(slots[(slots >= 0) & (slots < spec.capacity)])
    page, offset = used // paged.PAGE, used % paged.PAGE
    nan = jnp.full(cache.shape, 0xFF if dtype == "uint8" else jnp.nan, cache.dtype)
    hostile = nan.at[1, page, offset].set(cache[1, page, offset])
    assert_equal_to_reference(spec, (q, hostile, jnp.asarray(1, jnp.int32), jnp.asarray(slots)), backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("k", [1, 63, 64, 65, 128, 2048])
@pytest.mark.parametrize("heads", [5, 13, 64])
def test_lengths(heads: int, k: int, backend: str) -> None:
    spec = dataclasses.replace(SMALL, heads=heads, k=k, pages=64)
    args = inputs(spec, jax.random.key(k))
    assert_equal_to_reference(spec, args, backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_repeats_are_bitwise_equal_and_splits_agree(backend: str) -> None:
    spec = dataclasses.replace(SMALL, k=2048, pages=64)
    args = inputs(spec, jax.random.key(1))
    whole, whole_lse = run(dataclasses.replace(spec, splits=1), args, backend)
    for splits in (0, 1, 2, 5, 16, 32):
        call = jax.jit(functools.partial(attend, kv_lora_rank=512, scale=spec.scale, splits=splits, backend=backend))
        first = [np.asarray(x) for x in call(*args)]
        for _ in range(4):
            for a, b in zip(first, call(*args), strict=True):
                np.testing.assert_array_equal(a, np.asarray(b))
        # Measured 2e-3: the weights and the context are rounded to bfloat16 at other places.
        assert rel_l2(first[0], whole) < 5e-3
        np.testing.assert_allclose(first[1], np.asarray(whole_lse), atol=1e-4)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("heads", [16, 64])
def test_scores_that_rise_from_tile_to_tile(heads: int, backend: str) -> None:
    """Every tile's scores are far above those of the tiles before it, and the last tiles' far below: sums are rescaled."""
    spec = dataclasses.replace(SMALL, rows=9, heads=heads, k=512, pages=64, splits=1)
    q, cache, layer, slots = inputs(spec, jax.random.key(5))
    raw = np.asarray(cache).reshape(spec.layers, spec.capacity, 656).copy()
    level = np.array([1, 2, 8, 32, 128, 2, 128, 1], np.float32)[np.arange(spec.k) // 64]
    scales = np.ones((spec.capacity, 4), np.float32)
    for row in np.asarray(slots):
        scales[row] = level[:, None] / 448
    raw[0, :, 512:528] = scales.view(np.uint8).reshape(spec.capacity, 16)
    hostile = jnp.asarray(raw).reshape(cache.shape)
    context, lse = run(spec, (q, hostile, layer, slots), backend)
    want, want_lse = run(spec, (q.astype(jnp.float32), hostile, layer, slots), "reference")
    assert np.isfinite(np.asarray(lse)).all()
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want_lse), rtol=2e-3, atol=LSE_TOLERANCE)
    # Scores of a hundred nats: rounding of 1e-3 in them moves the weights of close keys by a tenth.
    assert rel_l2(context, want) < 5e-2


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("heads", [8, 16, 64])
def test_a_row_keeps_its_bits_whatever_the_others_are(heads: int, backend: str) -> None:
    spec = dataclasses.replace(SMALL, rows=8, heads=heads, k=2048, pages=512)
    q, cache, layer, slots = inputs(spec, jax.random.key(6))
    first = run(spec, (q, cache, layer, slots), backend)
    other = slots.at[:5].set(-1).at[6:].set(slots[:2])
    again = run(spec, (q.at[:5].set(jnp.nan).at[6:].set(7e4), cache, layer, other), backend)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a[5]), np.asarray(b[5]))
    # What is not selected meets no query, not even one of NaN.
    assert not np.asarray(again[0][:5]).any() and np.isneginf(np.asarray(again[1][:5])).all()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_shards_merge_by_lse(backend: str) -> None:
    spec = dataclasses.replace(SMALL, k=512, pages=64)
    q, cache, layer, slots = inputs(spec, jax.random.key(2))
    left = jnp.arange(spec.k) < 100
    parts = [run(spec, (q, cache, layer, jnp.where(side, slots, -1)), backend) for side in (left, ~left)]
    whole, whole_lse = run(spec, (q, cache, layer, slots), backend)
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(c.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for c, part in parts)
    assert rel_l2(merged, whole) < 5e-3
    np.testing.assert_allclose(np.asarray(lse), np.asarray(whole_lse), atol=1e-4)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("heads", [8, 64])
def test_scale_extremes(heads: int, backend: str) -> None:
    """FP8 scales of 1e-12 (the floor) to 1e5, subnormal and largest e4m3 values, huge scores."""
    spec = dataclasses.replace(SMALL, heads=heads, k=64)
    q, cache, layer, slots = inputs(spec, jax.random.key(3))
    raw = np.asarray(cache).reshape(spec.layers, spec.capacity, 656).copy()
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0
    raw[..., :512] = np.tile(codes, 2)
    scales = np.array([1e-12, 1.0, 3e-3, 1e5], np.float32)
    raw[..., 512:528] = scales.view(np.uint8)
    hostile = jnp.asarray(raw).reshape(cache.shape)
    tiny = (q * jnp.asarray(1e-7)).astype(q.dtype)
    context, lse = run(spec, (tiny, hostile, layer, slots), backend)
    want, want_lse = run(spec, (tiny.astype(jnp.float32), hostile, layer, slots), "reference")
    for group in range(4):
        part = slice(group * 128, group * 128 + 128)
        assert rel_l2(context[..., part], want[..., part]) < tolerance(spec, backend)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want_lse), rtol=1e-2, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_layers_beyond_two_to_the_31_bytes(backend: str) -> None:
    """Offsets are 64-bit: the last layer of a 3.2 GB cache."""
    spec = dataclasses.replace(SMALL, layers=75, pages=1024)
    small = dataclasses.replace(spec, layers=1)
    q, one, _, slots = inputs(small, jax.random.key(4))
    stacked = jax.jit(lambda x: jnp.zeros((75, *x.shape[1:]), x.dtype).at[74].set(x[0]))(one)
    got = run(spec, (q, stacked, jnp.asarray(74, jnp.int32), slots), backend)
    want = run(small, (q, one, jnp.asarray(0, jnp.int32), slots), backend)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("heads", [5, 8, 16])
def test_parts_are_merged_with_w_uv(heads: int, rows: int) -> None:
    """The two launches that the layer makes against the references, with hostile slots; again; and with other rows beside one."""
    spec = dataclasses.replace(SMALL, rows=max(rows, 3), heads=heads, k=2048, pages=512)
    q, cache, layer, slots = inputs(spec, jax.random.key(heads + rows))
    slots = jnp.roll(slots.at[0].set(-1).at[1, :-1].set(-1).at[1, -1].set(7).at[2, 100:900].set(2**31 - 1), -1, 0)[
        :rows
    ]
    q = q[:rows]
    w_uv = (0.04 * jax.random.normal(jax.random.key(0), (2, heads, 256, 512), jnp.float32)).astype(jnp.bfloat16)
    o_proj = jnp.eye(heads * 256, dtype=jnp.bfloat16)[None].repeat(2, 0)

    def values(q: jax.Array, slots: jax.Array) -> jax.Array:
        context, lse = attend(q, cache, layer, slots, kv_lora_rank=512, scale=spec.scale, apart=True)
        assert context.shape[1] == 1 or rows <= 8
        return mla_out.output(context, w_uv, o_proj, 1, lse=lse)

    got = jax.jit(values)(q, slots)
    whole, lse = run(dataclasses.replace(spec, rows=rows), (q.astype(jnp.float32), cache, layer, slots), "reference")
    want = mla_out.output(whole.astype(jnp.bfloat16), w_uv, o_proj, 1, backend="reference")
    empty = np.isneginf(np.asarray(lse)).all(1)
    assert np.isfinite(np.asarray(got, np.float32)).all() and not np.asarray(got)[empty].any()
    assert rel_l2(got, want) < 1e-2
    np.testing.assert_array_equal(np.asarray(got), np.asarray(jax.jit(values)(q, slots)))
    alone = jax.jit(values)(q.at[1:].set(jnp.nan), slots.at[1:].set(-1))
    np.testing.assert_array_equal(np.asarray(got)[0], np.asarray(alone)[0])


def test_a_gpu_backend_is_the_default() -> None:
    choice = registry.resolve("sparse_mla", BACKENDS, CASES["h64_k2048_fp8"])
    assert choice.backend != "reference", str(choice)
