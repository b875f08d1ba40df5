"""The GPU kernels of top_k: equal to numpy on hostile rows, in every plan, and the same bits in every replay."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lowering
from pallas_kernels.top_k import top_k
from pallas_kernels.top_k.plan import Plan, make_plan
from pallas_kernels.top_k.spec import Spec
from tests.ops.top_k_rows import around, expected

pytestmark = pytest.mark.gpu


def hostile(n: int) -> np.ndarray:
    """Rows [11, n]: what breaks a radix selection, one kind a row."""
    rng = np.random.default_rng(n)
    rows = [
        rng.normal(size=n),
        np.zeros(n),
        np.full(n, np.nan),
        np.full(n, -np.inf),
        rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.5, -3e38, 0.0, -0.0], n),
        np.where(np.arange(n) % 2, np.nan, rng.normal(size=n)),
        rng.integers(-2, 2, n),
        100 + rng.normal(size=n),  # the top bits of all scores are the same
        np.where(np.arange(n) == n - 1, 7.0, -1.0),
    ]
    low_bits = (0x42C80000 + rng.integers(0, 4000, n)).astype(np.uint32).view(np.float32)
    denormal = np.where(np.arange(n) % 3, 0, 1 << 31).astype(np.uint32) | rng.integers(0, 5000, n).astype(np.uint32)
    return np.stack([*(row.astype(np.float32) for row in rows), low_bits, denormal.view(np.float32)])


def check(n: int, k: int, lengths: list[int], plan: Plan | None = None) -> None:
    """Every kind of row at every length, what lies behind it being the best of all; three calls, the last two replays."""
    from pallas_kernels.top_k import gluon

    scores = np.concatenate([hostile(n), around(n, k)])
    rows = len(scores)
    pages = -(-n // 64)
    table = np.random.default_rng(k).permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    run = jax.jit(functools.partial(gluon.run, Spec(rows, n, k, pages=pages), plan=plan))
    for length in lengths:
        stale = scores.copy()
        stale[:, length:] = np.resize(np.array([np.inf, np.nan, 9e9], np.float32), n - length)
        args = (jnp.asarray(stale), jnp.full((rows,), length, jnp.int32), jnp.asarray(table))
        want = np.stack([expected(row, length, k) for row in stale])
        page = np.take_along_axis(table, np.maximum(want, 0) // 64, axis=1)
        for _ in range(3):
            positions, slots = run(*args)
            np.testing.assert_array_equal(np.asarray(positions), want, err_msg=f"{n=} {k=} {length=}")
            np.testing.assert_array_equal(np.asarray(slots), np.where(want >= 0, page * 64 + want % 64, -1))


@pytest.mark.parametrize("n,k", [(8192, 2048), (4352, 2048), (4096, 100), (2049, 2048), (300, 1), (100, 130)])
def test_one_launch(n: int, k: int) -> None:
    check(n, k, sorted({m for m in (0, 1, k - 1, k, k + 1, n - 1, n) if 0 <= m <= n}))


@pytest.mark.parametrize(
    "n,plan",
    [(8192, Plan(1, 1, 8192, short=True)), (4000, Plan(1, 1, 4096, warps=8, short=True)), (4000, Plan(1, 1, 4096))],
    ids=str,
)
def test_other_plans_of_one_launch(n: int, plan: Plan) -> None:
    check(n, 2048, [2049, 2100, n], plan)


@pytest.mark.parametrize("n,k", [(10_001, 2048), (65536, 2048), (65536, 3), (262_144, 2048)])
def test_two_launches(n: int, k: int) -> None:
    check(n, k, [0, k - 1, k, k + 1, 2049, 8191, 40_000, n] if n == 65536 else [1, k + 1, n])


@pytest.mark.parametrize(
    "plan",
    [Plan(5, 4, 2048, 2048), Plan(10, 1, 4096), Plan(3, 7, 2048, 4096, 8), Plan(1, 20, 2048)],
    ids=str,
)
def test_lists_that_fit_overflow_or_need_blocks(plan: Plan) -> None:
    """n = 40000 with lists smaller than the k-th's bin, so that the row is read again, and larger, so that blocks are walked."""
    check(40_000, 2048, [2049, 20_001, 40_000], plan)


def test_a_million_and_two_rows_a_sequence() -> None:
    """Rows of different lengths in one call; every second row belongs to the sequence of the one before."""
    n, k = 1 << 20, 2048
    scores = hostile(n)[:8]
    lengths = np.array([n, n - 1, 700_001, 2048, 0, n, 5000, n], np.int32)
    table = np.random.default_rng(5).permutation(4 * n // 64).astype(np.int32).reshape(4, n // 64)
    positions, slots = jax.jit(lambda s, m, t: top_k(s, m, k, table=t))(scores, lengths, table)
    want = np.stack([expected(row, int(m), k) for row, m in zip(scores, lengths, strict=True)])
    np.testing.assert_array_equal(np.asarray(positions), want)
    page = np.take_along_axis(np.repeat(table, 2, axis=0), np.maximum(want, 0) // 64, axis=1)
    np.testing.assert_array_equal(np.asarray(slots), np.where(want >= 0, page * 64 + want % 64, -1))


def test_a_table_that_ends_before_the_row() -> None:
    scores = np.random.default_rng(6).normal(size=(2, 20_000)).astype(np.float32)
    table = np.random.default_rng(7).permutation(200).astype(np.int32).reshape(2, 100)  # 6400 positions
    lengths = jnp.asarray([20_000, 2000], jnp.int32)
    positions, slots = (np.asarray(x) for x in top_k(jnp.asarray(scores), lengths, 2048, table=jnp.asarray(table)))
    page = np.take_along_axis(table, np.clip(positions // 64, 0, 99), axis=1)
    inside = (positions >= 0) & (positions < 6400)
    np.testing.assert_array_equal(slots, np.where(inside, page * 64 + positions % 64, -1))


def test_the_default_plan_here() -> None:
    """The kernels under test are those that calls choose: one launch up to 8192 scores, two beyond."""
    here = lowering.default_arch()
    assert make_plan(Spec(1, 4352, 2048), here).short and not make_plan(Spec(1, 8192, 2048), here).short
    assert make_plan(Spec(1, 8192, 2048), here).slices == 1
    assert make_plan(Spec(1, 65536, 2048), here).slices > 1
    text = jax.jit(lambda s, m: top_k(s, m, 2048)).lower(jnp.zeros((1, 65536)), jnp.zeros((1,), jnp.int32)).as_text()
    assert text.count("triton_kernel_call") == 2 and "sort" not in text
