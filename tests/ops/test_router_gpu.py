"""The router on a GPU: ties, rows of NaN, many rows. The plain cases are in test_backends_gpu."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compare import rel_l2
from pallas_kernels.router import add_norm_route, route
from pallas_kernels.router.reference import split
from pallas_kernels.router.spec import CASES, Spec, comparable, inputs, mailbox_words

pytestmark = pytest.mark.gpu


def routed(spec: Spec, x: jax.Array, gate: jax.Array, bias: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    return jax.jit(route, static_argnames=("k", "scale", "backend"))(
        x, gate, bias, jnp.int32(spec.layers - 1), k=spec.k, scale=spec.scale, backend=backend
    )


@pytest.mark.parametrize("case", ["glm", "glm_f32_gate", "small"])
@pytest.mark.parametrize("rows", [2, 17, 65, 500])
def test_rows(case: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[case], rows=rows, layers=2)
    x, gate, bias, *_ = inputs(spec, jax.random.key(rows))
    got, want = (comparable(spec, routed(spec, x, gate, bias, b)) for b in ("triton", "reference"))
    assert rel_l2(got, want) < 2e-6


def test_any_numbers() -> None:
    """Inputs whose sums do round: the weights of the experts that both choose; a near tie for the last place may go two ways."""
    spec = dataclasses.replace(CASES["glm"], rows=64)
    x, gate, bias, *_ = inputs(spec, jax.random.key(3))
    x, gate = (x.astype(jnp.float32) * 1.0123).astype(x.dtype), (gate.astype(jnp.float32) * 0.9877).astype(gate.dtype)
    got, want = (np.asarray(comparable(spec, routed(spec, x, gate, bias, b))) for b in ("triton", "reference"))
    same = ((got > 0) == (want > 0)).all(axis=-1)
    assert same.sum() >= 62 and rel_l2(got[same], want[same]) < 1e-4


@pytest.mark.parametrize("rows", [1, 4])
def test_ties_go_to_the_lower_id(rows: int) -> None:
    spec = dataclasses.replace(CASES["glm"], rows=rows)
    _, gate, *_ = inputs(spec, jax.random.key(0))
    bias = jnp.zeros((1, 256)).at[0, jnp.asarray([22, 250, 11])].set(1.0).at[0, :3].set(-1.0)
    ids, weights = routed(spec, jnp.zeros((rows, spec.hidden), jnp.bfloat16), gate, bias, "triton")
    np.testing.assert_array_equal(np.asarray(ids), [[11, 22, 250, 3, 4, 5, 6, 7]] * rows)
    np.testing.assert_allclose(np.asarray(weights), 2.5 / 8, rtol=1e-6)


def test_a_row_of_nan_names_experts_and_does_not_leak() -> None:
    spec = dataclasses.replace(CASES["glm"], rows=6)
    x, gate, bias, *_ = inputs(spec, jax.random.key(1))
    ids, weights = routed(spec, x.at[2].set(jnp.nan), gate, bias, "triton")
    clean, expected = routed(spec, x, gate, bias, "triton")
    others = np.arange(6) != 2
    np.testing.assert_array_equal(np.asarray(ids)[others], np.asarray(clean)[others])
    np.testing.assert_array_equal(np.asarray(weights)[others], np.asarray(expected)[others])
    assert len(set(np.asarray(ids)[2].tolist()) & set(range(256))) == 8


@pytest.mark.parametrize("rows", [2, 4, 8, 13])
def test_rows_with_a_norm_do_not_see_each_other(rows: int) -> None:
    """A row has the same bits beside a row of NaN as beside numbers, in every call, and the mailbox is zeros again."""
    spec = dataclasses.replace(CASES["glm_norm"], rows=rows, layers=2)
    x, gate, bias, _, _, norm, delta, mailbox = inputs(spec, jax.random.key(5))

    @jax.jit
    def routed_after_norm(x: jax.Array, mailbox: jax.Array) -> tuple[Any, ...]:
        *out, lists, terms, mailbox = add_norm_route(
            x, delta, norm, gate, bias, 1, mailbox, eps=spec.eps, k=spec.k, scale=spec.scale, unit=8, split=True
        )
        # What nobody has written, behind the pairs and of rows that are not there, may be anything.
        lists = () if lists is None else (lists[0], lists[1][: rows * spec.k])
        terms = () if terms is None else (terms[0][:, :rows], terms[0][:, 8 : 8 + rows], terms[1][:, :rows])
        return *out, lists, terms, mailbox

    clean = routed_after_norm(x, mailbox)
    beside = routed_after_norm(x.at[1].set(jnp.nan), clean[-1])
    others = np.arange(rows) != 1
    for a, b in zip(clean[:4], beside[:4], strict=True):
        want, got = (np.asarray(side.astype(jnp.float32))[others] for side in (a, b))
        np.testing.assert_array_equal(got, want)
    for a, b in zip(clean[5], beside[5], strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32)[:, others], np.asarray(b, np.float32)[:, others])
    assert len(clean[5]) == (3 if rows <= 8 else 0)
    assert len(set(np.asarray(beside[2])[1].tolist()) & set(range(256))) == 8
    again = clean
    for _ in range(200):
        again = routed_after_norm(x, again[-1])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))
    assert not np.asarray(again[-1]).any()


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_lists_are_those_of_the_experts_plan(rows: int) -> None:
    spec = dataclasses.replace(CASES["glm_norm"], rows=rows, unit=8)
    x, gate, bias, layer, _, norm, delta, mailbox = inputs(spec, jax.random.key(8))
    # Rows that are alike choose the same experts.
    x, delta = x.at[1:].set(x[:1]), delta.at[1 : rows - 1].set(delta[:1])
    _, _, ids, _, lists, _ = add_norm_route(
        x, delta, norm, gate, bias, layer, mailbox, eps=spec.eps, k=spec.k, scale=spec.scale, unit=8
    )
    assert lists is not None
    count = np.bincount(np.asarray(ids).ravel(), minlength=256)
    assert count.max() == max(rows - 1, 1) or count.max() == rows
    np.testing.assert_array_equal(np.asarray(lists[0]), [np.cumsum(count), np.cumsum(-(-count // 8))])
    np.testing.assert_array_equal(np.asarray(lists[1])[: ids.size], np.argsort(np.asarray(ids).ravel(), kind="stable"))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("hidden", [6144, 1408, 512])
def test_terms_are_those_of_the_norm(rows: int, hidden: int) -> None:
    """All numbers; at one row of 6144 every program has its own 1 / RMS, and what is stored is what was multiplied."""
    spec = dataclasses.replace(CASES["glm_norm"], rows=rows, hidden=hidden, unit=8)
    x, gate, bias, layer, _, norm, delta, mailbox = inputs(spec, jax.random.key(rows))
    x = x.at[0, :128].set(0.0)
    how = {"eps": spec.eps, "k": spec.k, "scale": spec.scale, "unit": 8}
    *first, left = add_norm_route(x, delta, norm, gate, bias, layer, mailbox, **how)
    _, normed, *rest, terms, left = add_norm_route(x, delta, norm, gate, bias, layer, left, **how, split=True)
    np.testing.assert_array_equal(np.asarray(first[2]), np.asarray(rest[0]))
    np.testing.assert_array_equal(np.asarray(normed, np.float32), np.asarray(first[1], np.float32))
    for got, want in zip(terms, jax.jit(split)(normed), strict=True):
        live = [8 * t + row for t in range(want.shape[1] // 8) for row in range(rows)]
        np.testing.assert_array_equal(np.asarray(got, np.float32)[:, live], np.asarray(want, np.float32)[:, live])
    assert not np.asarray(left).any()


@pytest.mark.parametrize(("rows", "k"), [(1, 8), (8, 8), (2, 14)])
def test_ties_in_one_launch_go_to_the_lower_id(rows: int, k: int) -> None:
    """Equal keys, in one lane and in several, and keys that differ in their last bits only."""
    spec = dataclasses.replace(CASES["glm"], rows=rows)
    _, gate, *_ = inputs(spec, jax.random.key(0))
    mailbox = jnp.zeros(mailbox_words(rows, spec.hidden, spec.experts), jnp.int32)
    equal = jnp.zeros((1, 256)).at[0, jnp.asarray([22, 250, 11])].set(1.0).at[0, :3].set(-1.0)
    close = 0.25 + jnp.arange(256.0)[None] % 32 * 2.0**-24
    for bias in (equal, close, jnp.zeros((1, 256)), equal * -1.0):
        x = jnp.zeros((rows, spec.hidden), jnp.bfloat16)
        _, _, ids, weights, *_ = add_norm_route(x, None, None, gate, bias, 0, mailbox, eps=0.0, k=k, scale=2.5, unit=8)
        np.testing.assert_array_equal(
            np.asarray(ids), [np.argsort(-(np.asarray(bias)[0] + 0.5), kind="stable")[:k]] * rows
        )
        np.testing.assert_allclose(np.asarray(weights), 2.5 / k, rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 16, 17])
def test_a_layer_that_is_known_is_the_one_on_the_device(layer: int) -> None:
    spec = dataclasses.replace(CASES["glm_norm"], rows=2, layers=18, experts=64, hidden=512)
    x, gate, bias, _, _, norm, delta, mailbox = inputs(spec, jax.random.key(2))
    known, there = (
        add_norm_route(x, delta, norm, gate, bias, at, mailbox, eps=spec.eps, k=8, scale=2.5, unit=8)
        for at in (layer, jnp.int32(layer))
    )
    for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(there), strict=True):
        # Pairs by expert fill whole lines, and nobody writes what is behind them.
        a, b = (array[: 2 * 8] if array.shape == known[4][1].shape else array for array in (a, b))
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_without_a_norm_one_launch_is_the_router(rows: int) -> None:
    spec = dataclasses.replace(CASES["glm"], rows=rows)
    x, gate, bias, layer, *_ = inputs(spec, jax.random.key(6))
    mailbox = jnp.zeros(mailbox_words(rows, spec.hidden, spec.experts), jnp.int32)
    _, _, ids, weights, _, _ = add_norm_route(x, None, None, gate, bias, layer, mailbox, eps=0.0, k=8, scale=2.5)
    want_ids, want = routed(spec, x, gate, bias, "triton")
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(want_ids))
    np.testing.assert_allclose(np.asarray(weights), np.asarray(want), rtol=1e-6)
