"""The arithmetic of the Gluon kernels of top_k in numpy, without a GPU: every path on hostile rows, against a sort."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k.plan import Plan
from pallas_kernels.top_k.spec import Spec
from tests.ops import gluon_emulator
from tests.ops.top_k_rows import around, expected


@functools.cache
def kernels() -> dict[str, Any]:
    modules = ("gluon_bins", "gluon_outputs", "gluon_slices", "gluon_warps", "gluon_row", "gluon")
    return gluon_emulator.load("pallas_kernels.top_k", modules)


def hostile(n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    rows = [
        rng.normal(size=n),
        np.zeros(n),
        np.full(n, np.nan),
        rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.5, -3e38, 0.0, -0.0], n),
        rng.integers(-2, 2, n),
        100 + rng.normal(size=n),
        rng.choice([0.0, -0.0, 1e-45, -1e-45, 3e-42, 1e-38], n),
    ]
    low_bits = (0x42C80000 + rng.integers(0, 400, n)).astype(np.uint32).view(np.float32)
    return np.stack([*(row.astype(np.float32) for row in rows), low_bits])


@pytest.mark.parametrize(
    "plan,n,k",
    [
        (Plan(1, 1, 1024, warps=4), 1000, 100),
        (Plan(1, 1, 512, warps=4), 512, 512),
        (Plan(1, 1, 640, warps=4, short=True), 600, 70),  # five scores a thread
        (Plan(1, 1, 512, warps=4, short=True), 512, 512),
        (Plan(1, 1, 1152, warps=1, short=True), 1100, 300),
        (Plan(1, 1, 4608, short=True), 4352, 2048),
        (Plan(1, 1, 8192, short=True), 8192, 2048),
        (Plan(1, 1, 4096, warps=32, short=True), 4000, 9),
        (Plan(5, 1, 256, listed=1024, warps=4), 1280, 100),  # lists that fit, in half or in all
        (Plan(3, 3, 256, listed=1024, warps=4), 2001, 300),  # blocks in a slice; lists of zeros overflow
        (Plan(5, 2, 256, listed=256, warps=4), 2500, 130),  # almost every list overflows
        (Plan(1, 9, 256, listed=512, warps=4), 2300, 7),  # one slice
    ],
    ids=str,
)
def test_against_a_sort(plan: Plan, n: int, k: int) -> None:
    scores = np.concatenate([hostile(n), around(n, k)])
    rows, pages = len(scores), -(-n // 64) - 1  # the table ends before the row
    table = np.random.default_rng(k).permutation(rows // 2 * pages).astype(np.int32).reshape(rows // 2, pages)
    table[1::2, 0] = np.resize([-1, -(2**31)], len(table[1::2]))  # no page
    spec = Spec(rows, n, k, width=2, pages=pages)
    for length in sorted({m for m in (0, k - 1, k, k + 1, (n + k) // 2, n) if m <= n}):
        stale = scores.copy()
        stale[:, length:] = np.resize(np.array([np.inf, np.nan, 9e9], np.float32), n - length)
        lengths = np.full(rows, length, np.int32)
        args = (jnp.asarray(stale), jnp.asarray(lengths), jnp.asarray(table))
        positions, slots = (np.asarray(x) for x in kernels()["gluon"].run(spec, *args, plan=plan))
        want = np.stack([expected(row, length, k) for row in stale])
        np.testing.assert_array_equal(positions, want, err_msg=f"{length=}")
        page = np.take_along_axis(np.repeat(table, 2, axis=0), np.clip(want // 64, 0, pages - 1), axis=1)
        inside = (want >= 0) & (want < pages * 64) & (page >= 0)
        np.testing.assert_array_equal(slots, np.where(inside, page * 64 + want % 64, -1), err_msg=f"{length=}")


def test_rows_of_different_lengths_without_a_table() -> None:
    n, k = 1280, 60
    scores = hostile(n)
    lengths = np.array([n, 0, 700, 61, 59, n - 1, 257, 1024], np.int32)
    plan = Plan(5, 1, 256, listed=256, warps=4)
    got = kernels()["gluon"].run(Spec(len(scores), n, k), jnp.asarray(scores), jnp.asarray(lengths), plan=plan)
    np.testing.assert_array_equal(
        np.asarray(got), [expected(row, int(m), k) for row, m in zip(scores, lengths, strict=True)]
    )


def test_the_order_of_keys_is_that_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    edge = [
        0,
        1,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0x7FFFFFFF,
        0x80000000,
        0x80000001,
        0xFF7FFFFF,
        0xFF800000,
        0xFFFFFFFF,
    ]
    bits = np.concatenate([rng.integers(0, 1 << 32, 1 << 18), np.array(edge)]).astype(np.uint32)
    score = bits.view(np.float32)
    key = kernels()["gluon_bins"].key_of(gluon_emulator.Value(score)).array.astype(np.int64)
    value = np.where(np.isnan(score), np.float32(-np.inf), score).astype(np.float64)
    order = np.argsort(-value, kind="stable")
    # inf - inf is NaN, so equality and not a difference.
    equal = value[order][1:] == value[order][:-1]
    step = np.diff(key[order])
    assert (step[equal] == 0).all() and (step[~equal] > 0).all()
