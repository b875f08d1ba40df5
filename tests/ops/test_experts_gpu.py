"""The experts on a GPU: hostile choices, long inputs, offsets beyond 2^31. The plain cases are in test_backends_gpu."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import BlockScaled, take
from pallas_kernels.compare import rel_l2
from pallas_kernels.experts import mailbox_words, mix
from pallas_kernels.experts.spec import CASES, Spec, inputs, tolerance
from pallas_kernels.router.reference import split

pytestmark = pytest.mark.gpu
SMALL = dataclasses.replace(CASES["small"], layers=2)
# Few numbers of rows, shared by the tests, so that little is compiled; the Hopper kernels serve up to 64.
ROWS = [(1, "triton"), (17, "triton"), (65, "triton"), (1, "mosaic_sm90"), (7, "mosaic_sm90"), (17, "mosaic_sm90")]
RUN = jax.jit(mix, static_argnames="backend")


def made(spec: Spec, seed: int = 0) -> tuple[Any, ...]:
    """(x, ids, weights, gate_up, down, shared_gate_up, shared_down)."""
    return inputs(spec, jax.random.key(seed))[:7]


def run(args: tuple[Any, ...], layer: int = 1, backend: str = "triton") -> np.ndarray:
    """The result as float32."""
    return np.asarray(RUN(*args, jnp.int32(layer), backend=backend).astype(jnp.float32))


@pytest.mark.parametrize("rows,backend", ROWS)
@pytest.mark.parametrize("how", ["one expert", "none", "random with holes and repeats", "first and last"])
def test_hostile_choices(how: str, rows: int, backend: str) -> None:
    x, ids, weights, *stacks = made(dataclasses.replace(SMALL, rows=rows), rows)
    random = np.random.default_rng(rows).integers(-3, SMALL.experts + 2, ids.shape)
    chosen = {
        "one expert": np.full(ids.shape, SMALL.experts - 1),
        "none": np.full(ids.shape, -1),
        "random with holes and repeats": random,
        "first and last": np.where(random % 2 == 0, 0, SMALL.experts - 1),
    }[how].astype(np.int32)
    placed = (chosen >= 0) & (chosen < SMALL.experts)
    given = np.where(placed, np.asarray(weights), np.nan).astype(np.float32)
    given[0, 0] = 0.0 if placed[0, 0] else np.nan
    got = run((x, jnp.asarray(chosen), jnp.asarray(given), *stacks), backend=backend)
    want = run((x, jnp.asarray(chosen), jnp.asarray(np.nan_to_num(given)), *stacks), backend="reference")
    assert rel_l2(got, want) < 4e-3


@pytest.mark.parametrize("rows,backend", [row for row in ROWS if row[0] > 1])
def test_a_row_of_nan_does_not_leak(rows: int, backend: str) -> None:
    x, *rest = made(dataclasses.replace(SMALL, rows=rows))
    got, clean = (run((rows_of_x, *rest), backend=backend) for rows_of_x in (x.at[1].set(jnp.nan), x))
    others = np.arange(rows) != 1
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("rows,backend", ROWS)
def test_an_expert_reaches_only_rows_that_chose_it(rows: int, backend: str) -> None:
    x, ids, weights, gate_up, *rest = made(dataclasses.replace(SMALL, rows=rows))
    ids = jnp.where(ids == 3, 4, ids).at[0, 0].set(3)
    poisoned = BlockScaled(gate_up.data, gate_up.scale.at[:, 3].set(jnp.nan))
    got, clean = (run((x, ids, weights, w, *rest), backend=backend) for w in (poisoned, gate_up))
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1:], clean[1:])


@pytest.mark.parametrize("case", ["ep4", "tp8"])
def test_many_rows_at_the_real_sizes(case: str) -> None:
    args = made(dataclasses.replace(CASES[case], rows=300))
    assert rel_l2(run(args, 0), run(args, 0, "reference")) < 4e-3


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("case", ["small", "tp8", "ep8_sliced_shared"])
def test_w8a8(case: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[case], rows=rows, layers=2, arithmetic="w8a8")
    args = made(spec)
    call = jax.jit(mix, static_argnames=("backend", "arithmetic"))
    got, want = (
        np.asarray(call(*args, jnp.int32(1), arithmetic="w8a8", backend=backend).astype(jnp.float32))
        for backend in ("mosaic_sm90", "reference")
    )
    assert rel_l2(got, want) < tolerance(spec, "mosaic_sm90")
    exact = run(args, 1, "reference")
    assert rel_l2(want, exact) > 1.5 * rel_l2(got, want)  # the kernel is nearer to W8A8 than W8A8 is to W8A16


@pytest.mark.parametrize("rows,backend", [(2, "triton"), (1, "mosaic_sm90"), (2, "mosaic_sm90")])
def test_offsets_beyond_32_bits(rows: int, backend: str) -> None:
    """The third layer of 64 experts starts at element 3.2e9 of gate_up; its matrices alone must give the same bits."""
    spec = dataclasses.replace(CASES["ep4"], rows=rows, layers=3)
    x, ids, weights, *stacks = made(spec)
    assert 2 * spec.experts * 2 * spec.width * spec.hidden > 2**31
    whole = run((x, ids, weights, *stacks), 2, backend)
    alone = run((x, ids, weights, *(take(w, (slice(2, 3),)) for w in stacks)), 0, backend)  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize(
    "case,rows",
    [("small", 1), ("tp8", 1), ("ep8_sliced_shared", 1), ("small", 2), ("small", 8), ("tp8", 2), ("tp8", 7)],
)
def test_a_static_layer(case: str, rows: int, layer: int) -> None:
    """A layer known when traced is cut from the stacks, and x may come quantized: the bits of neither may be others."""
    spec = dataclasses.replace(CASES[case], rows=rows, layers=3, experts=16, distinct=16)
    x, ids, *rest = made(spec)
    ids = ids.at[0, 0].set(-1)  # a choice that is no expert, before others
    values, scales = jax.jit(split)(x)
    # Rows that the batch has not may hold anything.
    lacks = jnp.arange(8) >= rows
    quantized = jnp.where(jnp.tile(lacks, 2)[:, None], jnp.nan, values), jnp.where(lacks, jnp.nan, scales)
    want = run((x, ids, *rest), layer, "mosaic_sm90")
    static = jax.jit(mix, static_argnames=("layer", "backend"))
    for given in (None, quantized):
        got = static(x, ids, *rest, layer=layer, quantized=given, backend="mosaic_sm90")
        np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), want)


@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("case", ["small", "tp8_57"])
def test_many_calls_on_one_mailbox(case: str, rows: int) -> None:
    """Layers, rows and choices in turn, so that words of a call before would show: the bits of calls on mailboxes of their own."""
    spec = dataclasses.replace(CASES[case], rows=rows, layers=2)
    x, ids, *rest = made(spec, rows)
    fewer = jnp.where(jnp.arange(spec.k) % 3 == 1, -1, ids[::-1])
    calls = [(a, b, layer) for a, b in ((x, ids), (x[::-1], fewer)) for layer in range(2)]
    alone = [np.asarray(RUN(a, b, *rest, jnp.int32(layer)).astype(jnp.float32)) for a, b, layer in calls]
    box = jnp.zeros((mailbox_words(rows, spec.k, spec.width, spec.shared_width),), jnp.int32)
    for n in range(200):
        a, b, layer = calls[n % 4]
        y, box = RUN(a, b, *rest, jnp.int32(layer), mailbox=box, epoch=jnp.int32(n + 1))
        if n < 8 or n % 10 < 4:
            np.testing.assert_array_equal(np.asarray(y.astype(jnp.float32)), alone[n % 4], err_msg=f"call {n}")


@pytest.mark.parametrize("width", [128, 256])
def test_a_row_does_not_depend_on_its_batch(width: int) -> None:
    """The same bits beside other rows, which choose other experts."""
    spec = dataclasses.replace(SMALL, rows=8, width=width, shared_width=width)
    x, ids, weights, *stacks = made(spec)
    others = jnp.flip(ids, 1).at[0].set(ids[0]).at[1:3].set(-1)
    got, want = (
        run((a, b, weights, *stacks), backend="mosaic_sm90") for a, b in ((x.at[1:].multiply(3), others), (x, ids))
    )
    np.testing.assert_array_equal(got[0], want[0])
    assert np.any(got[4] != want[4])
