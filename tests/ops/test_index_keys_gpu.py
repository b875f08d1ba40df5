"""GPU backends of index_keys against the reference: rows, weights of both kinds, hostile slots, extremes, replays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_linear, index_keys, lowering, paged, registry
from pallas_kernels.blocks import BlockScaled, dequantize
from pallas_kernels.compare import rel_l2
from pallas_kernels.index_keys import reference
from pallas_kernels.index_keys.spec import BOTH, CASES, Spec, inputs
from pallas_kernels.norm_quant.reference import quantize_groups

pytestmark = pytest.mark.gpu

BOTH_FP8 = dataclasses.replace(CASES["both_w8a16"], layers=2, pages=8)
SMALL = dataclasses.replace(BOTH_FP8, hidden=1024, q_lora_rank=512)


def run(spec: Spec, args: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    cache, latent, x, wk, norm, bias, wq_b, proj, layer, slots, cos, sin = args
    call = functools.partial(
        index_keys.write_and_query, quantized=True, arithmetic=spec.arithmetic, backend=backend
    )  # fmt: skip
    return jax.jit(call)(latent, x, wk, norm, bias, wq_b, proj, cache, layer, slots, cos, sin)


def codes_near(got: np.ndarray, want: np.ndarray, noise: float = 2.0**-9, share: float = 0.005) -> None:
    """e4m3 bytes whose values, of which the largest is 448, are a step apart at most, and few of them at all.

    noise: error before the rounding to e4m3, in the same units. Small values have small steps.
    """
    a, b = (np.ascontiguousarray(codes).view(jnp.float8_e4m3fn).astype(np.float32) for codes in (got, want))
    apart = np.abs(a - b)
    bound = np.maximum(np.abs(a), np.abs(b)) / 8 + noise
    assert a.shape == b.shape and not (apart > bound).any(), f"{apart.max()} apart at {np.argwhere(apart > bound)[:5]}"
    assert (a != b).mean() <= share, f"{(a != b).mean():.2%} of the codes differ"


def split_cache(cache: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [layers, slots, 128] and scales [layers, slots] of a cache."""
    raw = np.asarray(cache)
    values, scales = raw[..., : 64 * 128], raw[..., 64 * 128 :]
    layers = raw.shape[0]
    return values.reshape(layers, -1, 128), np.ascontiguousarray(scales).view(np.float32).reshape(layers, -1)


def projected_queries(spec: Spec, args: tuple[Any, ...], backend: str | None = None) -> tuple[jax.Array, jax.Array]:
    """(e4m3 queries, scales [rows, heads]) of fp8_linear's float32 projection on that backend, the rest by the reference."""

    def run(latent: jax.Array, wq_b: Any, layer: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
        how = {"arithmetic": spec.arithmetic, "dtype": jnp.float32, "backend": backend}
        return reference._rotate_front(
            fp8_linear.linear(latent, wq_b, (layer,), **how).reshape(spec.rows, spec.heads, -1), cos, sin
        )

    q = jax.jit(run)(args[1], args[6], args[8], args[10], args[11])
    values, scale = jax.jit(lambda q: quantize_groups(q, group=spec.head_dim))(q)
    return values, scale[..., 0]


def reference_scale(spec: Spec, args: tuple[Any, ...]) -> jax.Array:
    return projected_queries(spec, args, "reference")[1]


def assert_equal_to_reference(spec: Spec, args: tuple[Any, ...]) -> tuple[Any, ...]:
    got, want = run(spec, args, "triton"), run(spec, args, "reference")
    (values, scales), (want_values, want_scales) = split_cache(got[0]), split_cache(want[0])
    slots = np.asarray(args[9])
    written = np.unique(slots[(slots >= 0) & (slots < spec.pages * paged.PAGE)])
    layer = int(args[8])
    codes_near(values[layer, written], want_values[layer, written])
    np.testing.assert_allclose(scales[layer, written], want_scales[layer, written], rtol=2e-5)
    # Everything else, other layers included, byte for byte what it was.
    kept = np.ones(scales.shape, bool)
    kept[layer, written] = False
    before_values, before_scales = split_cache(args[0])
    np.testing.assert_array_equal(values[kept], before_values[kept])
    np.testing.assert_array_equal(scales[kept].view(np.int32), before_scales[kept].view(np.int32))
    # On the backend's own projection: how exact that one is, and which ties it breaks, are fp8_linear's tests to say.
    q, scale = projected_queries(spec, args)
    codes_near(np.asarray(got[1]), np.asarray(q))
    # w has no rounding but float32's: the reference's without its own queries' scales, with these.
    assert rel_l2(got[2] / scale, want[2] / reference_scale(spec, args)) < 1e-3
    return got


@pytest.mark.parametrize(
    ("rows", "arithmetic"),
    [*((rows, "w8a16") for rows in (1, 2, 8, 17, 64, 130, 512)), (1, "w8a8"), (33, "w8a8")],
)
def test_rows(rows: int, arithmetic: str) -> None:
    spec = dataclasses.replace(BOTH_FP8, rows=rows, arithmetic=arithmetic)
    args = inputs(spec, jax.random.key(rows))
    assert_equal_to_reference(spec, (*args[:8], jnp.asarray(1, jnp.int32), *args[9:]))


@pytest.mark.parametrize(
    "wk,wq_b", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")]
)
@pytest.mark.parametrize("rows", [1, 40])
def test_weights_of_both_kinds(rows: int, wk: str, wq_b: str) -> None:
    spec = dataclasses.replace(SMALL, rows=rows, wk=wk, wq_b=wq_b)
    assert_equal_to_reference(spec, inputs(spec, jax.random.key(3)))


def test_fp8_equals_its_dequantized_twin() -> None:
    """Exact decoding: float8 blocks with power-of-two scales are bfloat16 numbers."""
    spec = dataclasses.replace(SMALL, rows=3)
    args = list(inputs(spec, jax.random.key(4)))
    args[3] = BlockScaled(args[3].data, jnp.exp2(jnp.round(jnp.log2(args[3].scale))))
    twin = [*args[:3], dequantize(args[3], jnp.bfloat16), *args[4:]]
    a, b = (run(spec, tuple(one), "triton") for one in (args, twin))
    codes_near(split_cache(a[0])[0], split_cache(b[0])[0])


@pytest.mark.parametrize("rows", [9, 70])
def test_hostile_slots_in_a_cache_of_nan(rows: int) -> None:
    """Page boundaries, the first and the last slot, and slots that must write nothing; all other bytes stay NaN."""
    spec = dataclasses.replace(SMALL, rows=rows)
    args = list(inputs(spec, jax.random.key(5)))
    capacity = spec.pages * paged.PAGE
    slots = np.full(rows, -1, np.int32)
    slots[:9] = [0, 63, -1, 64, 127, capacity - 1, capacity, -(2**31), 2**31 - 1]
    args[0] = jnp.full(args[0].shape, 0xFF, jnp.uint8)
    args[8], args[9] = jnp.asarray(1, jnp.int32), jnp.asarray(slots)
    assert_equal_to_reference(spec, tuple(args))


def test_extremes() -> None:
    """Row 0: zeros, so the key is the rotated bias; row 1: huge; row 2: tiny, where LayerNorm's epsilon decides."""
    spec = dataclasses.replace(SMALL, rows=3)
    args = list(inputs(spec, jax.random.key(6)))
    args[2] = args[2] * jnp.asarray([0.0, 1e15, 1e-4], jnp.bfloat16)[:, None]
    args[1] = args[1] * jnp.asarray([0.0, 1e10, 1e-6], jnp.bfloat16)[:, None]
    got = assert_equal_to_reference(spec, tuple(args))
    assert np.isfinite(np.asarray(got[2])).all() and not np.asarray(got[1], np.float32)[0].any()
    # A key below the floor of 1e-4 keeps the floor's scale.
    args[4], args[5] = args[4] * jnp.bfloat16(1e-7), args[5] * jnp.bfloat16(1e-7)
    _, scales = split_cache(assert_equal_to_reference(spec, tuple(args))[0])
    np.testing.assert_allclose(scales[0, np.asarray(args[9])], 1e-4 / 448, rtol=1e-6)


def test_sides_alone_equal_both_and_replays_are_bitwise_equal() -> None:
    spec = dataclasses.replace(SMALL, rows=5)
    args = inputs(spec, jax.random.key(7))
    cache, latent, x, wk, norm, bias, wq_b, proj, layer, slots, cos, sin = args
    both = run(spec, args, "triton")
    write = jax.jit(functools.partial(index_keys.write, backend="triton"))
    query = jax.jit(functools.partial(index_keys.query, quantized=True, backend="triton"))
    for _ in range(4):
        alone = (
            write(x, wk, norm, bias, cache, layer, slots, cos, sin),
            *query(latent, x, wq_b, proj, layer, cos, sin),
        )
        for a, b in zip(both, alone, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_donated_cache_is_written_in_place() -> None:
    spec = dataclasses.replace(SMALL, rows=2)
    cache, _, x, wk, norm, bias, _, _, layer, slots, cos, sin = inputs(spec, jax.random.key(8))
    step = jax.jit(lambda c: index_keys.write(x, wk, norm, bias, c, layer, slots, cos, sin), donate_argnums=0)
    own = jnp.copy(cache)
    addresses = set()
    for _ in range(5):
        own = step(own)
        addresses.add(own.unsafe_buffer_pointer())
    assert len(addresses) == 1


def test_layers_beyond_two_to_the_31_bytes() -> None:
    """The last of 22 layers of 16,384 pages: a cache of 3 GB."""
    spec = dataclasses.replace(SMALL, rows=2, layers=1, pages=16384)
    args = list(inputs(spec, jax.random.key(9)))
    args[9] = jnp.asarray([16384 * 64 - 1, 5], jnp.int32)
    small = run(spec, tuple(args), "triton")

    def stacked(a: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.zeros((21, *a.shape[1:]), a.dtype), a])

    big = [jax.tree.map(stacked, args[i]) if i in (0, 3, 4, 5, 6, 7) else args[i] for i in range(12)]
    big[8] = jnp.asarray(21, jnp.int32)
    found = run(dataclasses.replace(spec, layers=22), tuple(big), "triton")
    np.testing.assert_array_equal(np.asarray(found[0][21]), np.asarray(small[0][0]))
    assert not np.asarray(jnp.any(found[0][:21]))
    for a, b in zip(found[1:], small[1:], strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_gpu_backend_is_the_default() -> None:
    choice = registry.resolve("index_keys", index_keys.BACKENDS, CASES["both_w8a16"], lowering.default_arch())
    assert choice.backend == "triton" and CASES["both_w8a16"].form == BOTH, str(choice)
