"""The router on a GPU: ties, rows of NaN, many rows. The plain cases are in test_backends_gpu."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compare import rel_l2
from pallas_kernels.router import add_norm_route, route
from pallas_kernels.router.spec import CASES, Spec, comparable, inputs

pytestmark = pytest.mark.gpu


def routed(spec: Spec, x: jax.Array, gate: jax.Array, bias: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    return jax.jit(route, static_argnames=("k", "scale", "backend"))(
        x, gate, bias, jnp.int32(spec.layers - 1), k=spec.k, scale=spec.scale, backend=backend
    )


@pytest.mark.parametrize("case", ["glm", "glm_f32_gate", "small"])
@pytest.mark.parametrize("rows", [2, 17, 65, 500])
def test_rows(case: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[case], rows=rows, layers=2)
    x, gate, bias, _, _ = inputs(spec, jax.random.key(rows))
    got, want = (comparable(spec, routed(spec, x, gate, bias, b)) for b in ("triton", "reference"))
    assert rel_l2(got, want) < 2e-6


def test_any_numbers() -> None:
    """Inputs whose sums do round: the weights of the experts that both choose; a near tie for the last place may go two ways."""
    spec = dataclasses.replace(CASES["glm"], rows=64)
    x, gate, bias, _, _ = inputs(spec, jax.random.key(3))
    x, gate = (x.astype(jnp.float32) * 1.0123).astype(x.dtype), (gate.astype(jnp.float32) * 0.9877).astype(gate.dtype)
    got, want = (np.asarray(comparable(spec, routed(spec, x, gate, bias, b))) for b in ("triton", "reference"))
    same = ((got > 0) == (want > 0)).all(axis=-1)
    assert same.sum() >= 62 and rel_l2(got[same], want[same]) < 1e-4


@pytest.mark.parametrize("rows", [1, 4])
def test_ties_go_to_the_lower_id(rows: int) -> None:
    spec = dataclasses.replace(CASES["glm"], rows=rows)
    _, gate, _, _, _ = inputs(spec, jax.random.key(0))
    bias = jnp.zeros((1, 256)).at[0, jnp.asarray([22, 250, 11])].set(1.0).at[0, :3].set(-1.0)
    ids, weights = routed(spec, jnp.zeros((rows, spec.hidden), jnp.bfloat16), gate, bias, "triton")
    np.testing.assert_array_equal(np.asarray(ids), [[11, 22, 250, 3, 4, 5, 6, 7]] * rows)
    np.testing.assert_allclose(np.asarray(weights), 2.5 / 8, rtol=1e-6)


def test_a_row_of_nan_names_experts_and_does_not_leak() -> None:
    spec = dataclasses.replace(CASES["glm"], rows=6)
    x, gate, bias, _, _ = inputs(spec, jax.random.key(1))
    ids, weights = routed(spec, x.at[2].set(jnp.nan), gate, bias, "triton")
    clean, expected = routed(spec, x, gate, bias, "triton")
    others = np.arange(6) != 2
    np.testing.assert_array_equal(np.asarray(ids)[others], np.asarray(clean)[others])
    np.testing.assert_array_equal(np.asarray(weights)[others], np.asarray(expected)[others])
    assert len(set(np.asarray(ids)[2].tolist()) & set(range(256))) == 8


def test_rows_with_a_norm_do_not_see_each_other() -> None:
    """Up to four rows one launch serves: a row has the bits that it has alone, beside a row of NaN, and counts are zeros again."""
    spec = dataclasses.replace(CASES["glm_norm"], rows=4, layers=2)
    x, gate, bias, _, _, norm, delta, tickets = inputs(spec, jax.random.key(5))

    @jax.jit
    def routed_after_norm(x: jax.Array, delta: jax.Array, tickets: jax.Array) -> tuple[jax.Array, ...]:
        return add_norm_route(x, delta, norm, gate, bias, 1, tickets, eps=spec.eps, k=spec.k, scale=spec.scale)

    together = routed_after_norm(x.at[2].set(jnp.nan), delta, tickets)
    for row in (0, 1, 3):
        one = slice(row, row + 1)
        alone = routed_after_norm(x[one], delta[one], tickets[one])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(a[one].astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))
    assert len(set(np.asarray(together[2])[2].tolist()) & set(range(256))) == 8
    assert not np.asarray(together[4]).any()


def test_without_a_norm_one_launch_is_the_router() -> None:
    spec = dataclasses.replace(CASES["glm"], rows=3)
    x, gate, bias, layer, _ = inputs(spec, jax.random.key(6))
    tickets = jnp.zeros(3, jnp.int32)
    _, _, ids, weights, _ = add_norm_route(x, None, None, gate, bias, layer, tickets, eps=0.0, k=8, scale=2.5)
    want_ids, want = routed(spec, x, gate, bias, "triton")
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(want_ids))
    np.testing.assert_allclose(np.asarray(weights), np.asarray(want), rtol=1e-6)
