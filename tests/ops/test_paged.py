"""Byte formats and writes of the paged caches, against bytes built by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged
from tests.ops.numpy_ops import BF16, E4M3, normal, quantize, regroup, to_bf16, wide

LAYERS, PAGES, RANK, ROPE = 2, 3, 160, 8
pack = jax.jit(paged.pack_latent, static_argnums=2)
unpack = jax.jit(paged.unpack_latent, static_argnums=(1, 2, 3))
write_rows = jax.jit(paged.write_rows)
write_index_keys = jax.jit(paged.write_index_keys)
# First and last slot of a page, of the cache, and nothing (twice, so that a clamped write would be seen).
SLOTS = np.array([0, -1, 63, 64, 127, 64 * PAGES - 1, -1, 70], np.int32)


def test_widths() -> None:
    assert paged.latent_width(512, 64, quantized=True) == 656
    assert paged.latent_width(512, 64, quantized=False) == 576
    assert paged.latent_width(RANK, ROPE, quantized=True) == 160 + 2 * 4 + 8 * 2
    assert paged.index_page_width(128) == 8448


def test_latent_row_of_656_bytes() -> None:
    """512 e4m3 values, four little-endian float32 scales, 64 bfloat16: with scales known exactly."""
    kr = normal(0, 2, 64)
    codes = np.random.default_rng(1).integers(0, 0x7F, (2, 512), np.uint8)
    codes[:, ::128] = 0x7E  # 448 in each group fixes its scale
    codes[0, 5], codes[1, 511] = 0x81, 0xFE
    scales = np.array([[1.0, 2.0**-20, 4.0, 2.0**90], [0.5, 2.0, 2.0**-10, 8.0]], np.float32)
    c = codes.view(E4M3).astype(np.float32) * np.repeat(scales, 128, -1)
    want = [codes[r].tobytes() + scales[r].astype("<f4").tobytes() + kr[r].astype(BF16).tobytes() for r in range(2)]
    got = pack(jnp.asarray(c), jnp.asarray(kr), jnp.uint8)
    assert got.dtype == jnp.uint8 and got.shape == (2, 656)
    assert [np.asarray(row).tobytes() for row in got] == want
    back = unpack(got, 512, 64, jnp.float32)
    np.testing.assert_array_equal(np.asarray(back)[:, :512], c)
    np.testing.assert_array_equal(wide(back)[:, 512:], to_bf16(kr))


def test_latent_row_with_a_short_group() -> None:
    c, kr = normal(2, 5, RANK), normal(3, 5, ROPE)
    got = np.asarray(pack(jnp.asarray(c), jnp.asarray(kr), jnp.uint8))
    values, scale = quantize(c, 128, 1e-10)
    assert got.shape == (5, 184)
    np.testing.assert_allclose(got[:, 160:168].copy().view("<f4"), scale, rtol=1.2e-7)
    np.testing.assert_array_equal(got[:, :160], values.view(np.uint8))
    np.testing.assert_array_equal(got[:, 168:].copy().view(BF16), kr.astype(BF16))
    back = wide(unpack(jnp.asarray(got[None]), RANK, ROPE, jnp.float32))
    np.testing.assert_allclose(back[0, :, :RANK], regroup(values, scale, 128), rtol=3e-7)
    in_bf16 = unpack(jnp.asarray(got), RANK, ROPE, jnp.bfloat16)
    np.testing.assert_array_equal(wide(in_bf16), to_bf16(back[0]))


def test_packing_what_the_bytes_held_changes_nothing() -> None:
    once = pack(jnp.asarray(normal(4, 9, RANK)), jnp.asarray(normal(5, 9, ROPE)), jnp.uint8)
    back = unpack(once, RANK, ROPE, jnp.float32)
    twice = np.asarray(pack(back[:, :RANK], back[:, RANK:], jnp.uint8))
    np.testing.assert_array_equal(twice[:, :160], np.asarray(once)[:, :160])
    np.testing.assert_array_equal(twice[:, 168:], np.asarray(once)[:, 168:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_latent_rows(dtype: str) -> None:
    c, kr = normal(6, 3, RANK), normal(7, 3, ROPE)
    row = pack(jnp.asarray(c), jnp.asarray(kr), jnp.dtype(dtype))
    assert row.dtype == jnp.dtype(dtype) and row.shape == (3, RANK + ROPE)
    want = np.concatenate([c, kr], -1).astype(row.dtype)
    np.testing.assert_array_equal(wide(row), wide(want))
    np.testing.assert_array_equal(wide(unpack(row, RANK, ROPE, jnp.float32)), wide(want))


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_write_rows_touches_its_slots_only(dtype: str) -> None:
    width = 184 if dtype == "uint8" else RANK + ROPE
    rng = np.random.default_rng(8)
    before, rows = (
        rng.integers(0, 100, shape).astype(jnp.dtype(dtype))
        for shape in ((LAYERS, PAGES, 64, width), (SLOTS.size, width))
    )
    want = before.copy()
    for slot, row in zip(SLOTS, rows, strict=True):
        if slot >= 0:
            want[1, slot // 64, slot % 64] = row
    traced = write_rows(jnp.asarray(before), jnp.asarray(1, jnp.int32), jnp.asarray(SLOTS), jnp.asarray(rows))
    static = paged.write_rows(jnp.asarray(before), 1, jnp.asarray(SLOTS), jnp.asarray(rows))
    for got in (traced, static):
        assert got.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(wide(got), wide(want))


def test_writing_nothing_anywhere() -> None:
    before = jnp.asarray(normal(9, LAYERS, PAGES, 64, RANK + ROPE))
    slots = jnp.full((SLOTS.size,), -1, jnp.int32)
    np.testing.assert_array_equal(write_rows(before, 0, slots, jnp.ones((SLOTS.size, RANK + ROPE))), before)


@pytest.mark.parametrize("head_dim", [128, 160])
def test_index_page_bytes(head_dim: int) -> None:
    """64 * head_dim values, then 64 scales: one scale a key, also where a key is wider than 128; floor 1e-4."""
    width = 64 * head_dim + 256
    before = np.random.default_rng(10).integers(0, 256, (LAYERS, PAGES, width), np.uint8)
    keys = normal(11, SLOTS.size, head_dim)
    keys[2], keys[3], keys[4] = 0.0, keys[4] * 1e-7, 3e38
    values, scale = quantize(keys, head_dim, 1e-4)
    got = np.asarray(write_index_keys(jnp.asarray(before), 1, jnp.asarray(SLOTS), jnp.asarray(keys)))
    want = before.copy()
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            page, at = divmod(int(slot), 64)
            want[1, page, at * head_dim : (at + 1) * head_dim] = values[i].view(np.uint8)[:head_dim]
            stored = got[1, page, 64 * head_dim + 4 * at :][:4]
            np.testing.assert_allclose(stored.copy().view("<f4"), scale[i], rtol=1.2e-7)
            want[1, page, 64 * head_dim + 4 * at :][:4] = stored
    np.testing.assert_array_equal(got, want)
    assert width == paged.index_page_width(head_dim)


def test_index_keys_in_float32() -> None:
    before = normal(12, LAYERS, PAGES, 64, 16)
    keys = normal(13, SLOTS.size, 16)
    want = before.copy()
    for slot, key in zip(SLOTS, keys, strict=True):
        if slot >= 0:
            want[0, slot // 64, slot % 64] = key
    got = write_index_keys(jnp.asarray(before), jnp.asarray(0, jnp.int32), jnp.asarray(SLOTS), jnp.asarray(keys))
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("quantized", [True, False])
def test_read_index_pages(quantized: bool) -> None:
    keys = normal(14, 64 * PAGES, 16)
    shape, dtype = ((1, PAGES, 64 * 20), jnp.uint8) if quantized else ((1, PAGES, 64, 16), jnp.float32)
    slots = jnp.arange(64 * PAGES, dtype=jnp.int32)
    cache = write_index_keys(jnp.zeros(shape, dtype), 0, slots, jnp.asarray(keys))
    read = jax.jit(functools.partial(paged.read_index_pages, head_dim=16))
    want = (regroup(*quantize(keys, 16, 1e-4), 16) if quantized else wide(keys)).reshape(PAGES, 64, 16)
    pages = np.array([[2, 0], [1, 1]], np.int32)
    got = read(cache, 0, jnp.asarray(pages))
    assert got.dtype == jnp.float32 and got.shape == (2, 128, 16)
    np.testing.assert_allclose(wide(got), want[pages].reshape(2, 128, 16), rtol=3e-7)
    outside = read(cache, jnp.asarray(0, jnp.int32), jnp.asarray([[-1, 99], [0, 2]], jnp.int32))
    np.testing.assert_allclose(wide(outside)[0], want[[0, 2]].reshape(128, 16), rtol=3e-7)
