"""Rotary angles and the rotation, against the official code's tables up to position 2^20 - 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax.rope import rope_tables
from pallas_kernels.rotary import apply_rotary
from tests.oracle.models import FIXTURES

with np.load(FIXTURES / "rope.npz") as stored:
    GOLDEN: dict[str, np.ndarray] = dict(stored)
THETAS = (1000000, 8000000)
POSITIONS = GOLDEN["positions"].astype(np.int32)
tables = jax.jit(rope_tables, static_argnums=(1, 2))


def test_fixture_reaches_the_last_position() -> None:
    assert POSITIONS.min() == 0 and POSITIONS.max() == 2**20 - 1


@pytest.mark.parametrize("theta", THETAS)
def test_tables_are_the_official_ones(theta: int) -> None:
    cos, sin = tables(jnp.asarray(POSITIONS), float(theta), 64)
    assert cos.dtype == sin.dtype == jnp.float32
    # A wrong last bit of inv_freq would show as 8e-3 here; sin and cos themselves differ by an ulp between libraries.
    np.testing.assert_allclose(np.asarray(cos), GOLDEN[f"cos.{theta}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(sin), GOLDEN[f"sin.{theta}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("theta", THETAS)
def test_range_reduction_is_accurate_for_large_angles(theta: int) -> None:
    """cos and sin of the float32 angle, which is exact as a float64, at positions spread over the whole context."""
    positions = np.unique(np.linspace(0, 2**20 - 1, 4096).astype(np.int32))
    angle = (positions[:, None].astype(np.float32) * GOLDEN[f"inv_freq.{theta}"]).astype(np.float64)
    assert angle.max() > 1e6
    cos, sin = tables(jnp.asarray(positions), float(theta), 64)
    np.testing.assert_allclose(np.asarray(cos), np.cos(angle), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(sin), np.sin(angle), rtol=0, atol=1e-6)


def test_tables_take_any_rank_and_width() -> None:
    flat, _ = tables(jnp.asarray(POSITIONS), 1e6, 10)
    square, _ = tables(jnp.asarray(POSITIONS.reshape(2, 8)), 1e6, 10)
    assert square.shape == (2, 8, 5)
    np.testing.assert_array_equal(np.asarray(square).reshape(16, 5), np.asarray(flat))
    want = np.cos(POSITIONS[3] * 1e6 ** -(np.arange(5) / 5))
    np.testing.assert_allclose(np.asarray(flat)[3], want, atol=1e-5)


@pytest.mark.parametrize("theta", THETAS)
def test_rotation_is_the_official_one_in_place(theta: int) -> None:
    cos, sin = (jnp.asarray(GOLDEN[f"{name}.{theta}"]) for name in ("cos", "sin"))
    rotated = apply_rotary(jnp.asarray(GOLDEN["x"]), cos, sin)
    assert rotated.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(rotated), GOLDEN[f"y.{theta}"], rtol=0, atol=1e-6)


def test_every_head_turns_by_its_rows_angle() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    angle = np.random.default_rng(1).uniform(0, 7, size=(3, 4)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    # The pair as a complex number turns by the angle.
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle.astype(np.float64))[:, None, :]
    want = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    got = apply_rotary(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin))
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-6)


def test_bfloat16_is_rounded_once() -> None:
    x = jnp.asarray(GOLDEN["x"]).astype(jnp.bfloat16)
    cos, sin = (jnp.asarray(GOLDEN[f"{name}.8000000"]) for name in ("cos", "sin"))
    got = apply_rotary(x, cos, sin)
    assert got.dtype == jnp.bfloat16
    want = apply_rotary(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_no_angle_changes_nothing() -> None:
    x = jnp.asarray(GOLDEN["x"])
    cos, sin = tables(jnp.zeros(16, jnp.int32), 8e6, 64)
    np.testing.assert_array_equal(np.asarray(apply_rotary(x, cos, sin)), GOLDEN["x"])
