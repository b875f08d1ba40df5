"""GPU backends of the MQA logits against float64: hostile lengths, tables and pages, NaN and infinities, accuracy, repeats."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lowering, paged, registry
from pallas_kernels.blocks import E4M3
from pallas_kernels.mqa_logits import BACKENDS, paged_logits
from pallas_kernels.mqa_logits.spec import CASES, Spec, comparable, inputs
from tests.ops.numpy_ops import wide

pytestmark = pytest.mark.gpu

GPU_BACKENDS = [backend.name for backend in BACKENDS if backend.name != "reference"]
# Of sum_h |w_h| |q_h| |k|: Hopper's FP8 units cut products below some 14 bits of the largest of a step. Measured 1.1e-4 with one
# head that counts, 1.3e-5 with 32.
ACCUMULATION = 2.0**-12
LAYERS, TABLE, HEADS, DIM = 2, 6, 32, 128
SPAN = 64 * TABLE


@dataclasses.dataclass
class Problem:
    """Sequences of ``lengths`` [batch, rows] keys: q, weights, a cache of NaN but for them, and a table in random order."""

    lengths: np.ndarray
    starts: np.ndarray | None = None
    heads: int = HEADS
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        batch, rows = self.lengths.shape
        self.q = jnp.asarray(rng.normal(size=(batch, rows, self.heads, DIM), scale=100).clip(-448, 448).astype(E4M3))
        self.weights = jnp.asarray(rng.normal(size=(batch, rows, self.heads)).astype(np.float32))
        pages = batch * TABLE + 3
        used = rng.permutation(pages)[: batch * TABLE].reshape(batch, TABLE).astype(np.int32)
        slots = [used[b, s // 64] * 64 + s % 64 for b in range(batch) for s in range(self.lengths[b].max())]
        cache = jnp.full((LAYERS, pages, paged.index_page_width(DIM)), 0xFF, jnp.uint8)
        if slots:
            keys = jnp.asarray(rng.normal(size=(len(slots), DIM)).astype(np.float32))
            cache = paged.write_index_keys(cache, 1, jnp.asarray(np.array(slots, np.int32)), keys)
        self.cache = cache
        # Pages past the end are never looked up: wild ids there.
        self.table = used.copy()
        for b in range(batch):
            end = -(-int(self.lengths[b].max()) // 64)
            self.table[b, end:] = [2**31 - 1, -1, pages, 7, -(2**31), pages + 5][: TABLE - end]
        self.keys = wide(paged.read_index_pages(cache, 1, jnp.asarray(used), DIM))

    def run(self, backend: str) -> np.ndarray:
        call = jax.jit(functools.partial(paged_logits, backend=backend))
        starts = None if self.starts is None else jnp.asarray(self.starts)
        args = (self.q, self.weights, self.cache, jnp.asarray(1, jnp.int32), jnp.asarray(self.table))
        return np.asarray(call(*args, jnp.asarray(self.lengths), starts=starts))

    def live(self) -> np.ndarray:
        position = np.arange(SPAN)
        first = 0 if self.starts is None else self.starts[..., None]
        return (position >= first) & (position < self.lengths[..., None])

    def want(self) -> tuple[np.ndarray, np.ndarray]:
        """(scores, the sizes that rounding is measured by): float64 [batch, rows, span]."""
        q, w = wide(self.q), wide(self.weights)
        with np.errstate(invalid="ignore"):
            dots = np.einsum("brhd,bsd->brhs", q, self.keys)
            norms = np.einsum("brh,bs->brhs", np.sqrt((q**2).sum(-1)), np.sqrt((self.keys**2).sum(-1)))
            scores = np.einsum("brh,brhs->brs", w, np.maximum(dots, 0))
        return scores, np.einsum("brh,brhs->brs", np.abs(w), norms)


def supported(backend: str, heads: int = HEADS) -> bool:
    spec = dataclasses.replace(CASES["decode_2k"], heads=heads)
    entry = next(b for b in BACKENDS if b.name == backend)
    return entry.supports(spec, lowering.default_arch()) is None


def assert_right(problem: Problem, backend: str) -> None:
    got, live = problem.run(backend), problem.live()
    want, size = problem.want()
    assert got.dtype == np.float32 and np.isfinite(got[live]).all()
    error = np.abs(got - want)[live] / size[live]
    assert error.max(initial=0) <= ACCUMULATION, f"{error.max()} of the norms"


def table_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 383, 384])
def test_one_row(length: int, backend: str) -> None:
    assert_right(Problem(table_of([length])), backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("rows", range(1, 10))
def test_ragged_batches_with_several_rows(rows: int, backend: str) -> None:
    """Consecutive rows, empty sequences between full ones; nine rows take the kernel of the prefill."""
    longest = table_of([0], [1], [65], [384], [0], [200], [64])
    lengths = np.maximum(longest - np.arange(rows - 1, -1, -1, dtype=np.int32)[None, :], 0)
    assert_right(Problem(lengths, seed=rows), backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
def test_starts(rows: int, backend: str) -> None:
    """First positions inside a page, at a page, past the length; the keys before them are NaN for nobody's use."""
    rng = np.random.default_rng(rows)
    lengths = rng.integers(0, SPAN + 1, (3, rows)).astype(np.int32)
    starts = rng.integers(0, SPAN // 2, (3, rows)).astype(np.int32)
    starts[0] = 64
    assert_right(Problem(lengths, starts, seed=rows), backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_other_head_counts(rows: int, heads: int, backend: str) -> None:
    if not supported(backend, heads):
        problem = Problem(np.full((1, rows), 10, np.int32), heads=heads)
        with pytest.raises(registry.BackendRefused, match=str(heads)):
            problem.run(backend)
        return
    lengths = np.random.default_rng(rows).integers(0, SPAN + 1, (2, rows)).astype(np.int32)
    assert_right(Problem(lengths, heads=heads, seed=rows), backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_nothing_outside_is_written(rows: int, backend: str) -> None:
    """A donated buffer of the output's type is what XLA lets the kernel write into: the marker stays."""
    lengths = np.random.default_rng(rows).integers(1, SPAN, (2, rows)).astype(np.int32)
    problem = Problem(lengths, seed=rows)
    marker = 12345.0

    def marked(previous: jax.Array) -> jax.Array:
        del previous
        return paged_logits(
            problem.q, problem.weights, problem.cache, 1, jnp.asarray(problem.table), jnp.asarray(lengths), backend=backend
        )  # fmt: skip

    call = jax.jit(marked, donate_argnums=0, keep_unused=True)
    got = np.asarray(call(jnp.full((2, rows, SPAN), marker, jnp.float32)))
    assert (got[~problem.live()] == marker).all()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_nan_and_infinities_propagate(backend: str) -> None:
    """inf * relu(negative) is NaN, as in the reference; NaN queries make their row NaN, NaN scales their key."""
    problem = Problem(np.full((2, 3), 130, np.int32))
    problem.weights = problem.weights.at[0, 0, 3].set(jnp.inf).at[0, 1, 4].set(-jnp.inf)
    bad = jax.lax.bitcast_convert_type(problem.q, jnp.uint8).at[1, 2, 5, 7].set(0x7F)
    problem.q = jax.lax.bitcast_convert_type(bad, E4M3)
    page = int(problem.table[1, 1])
    problem.cache = problem.cache.at[1, page, 64 * DIM + 3 : 64 * DIM + 4].set(0x7F)
    problem.cache = problem.cache.at[1, page, 64 * DIM + 2 : 64 * DIM + 3].set(0xC0)
    got, want = problem.run(backend), problem.run("reference")
    live = problem.live()
    np.testing.assert_array_equal(np.isnan(got[live]), np.isnan(want[live]))
    finite = np.isfinite(want) & live
    np.testing.assert_array_equal(got[live & np.isinf(want)], want[live & np.isinf(want)])
    assert np.isnan(want[0, 0, :130]).any() and np.isinf(want[0, 0, :130]).any() and np.isnan(want[1, 2, :130]).all()
    assert np.isnan(want[1, 0, 64]) and finite.any()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_accumulation_error_of_a_single_head(backend: str) -> None:
    """Nothing averages here: the error of one product of 128."""
    problem = Problem(np.full((4, 4), SPAN, np.int32), seed=3)
    problem.weights = jnp.zeros_like(problem.weights).at[:, :, 5].set(1.0)
    assert_right(problem, backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_accumulation_error_where_products_cancel(backend: str) -> None:
    """One large product that cancels, then 126 small ones that a 14-bit accumulator cuts: the error stays within the bound."""
    problem = Problem(np.full((1, 1), SPAN, np.int32))
    rng = np.random.default_rng(3)
    q = rng.normal(size=(1, 1, HEADS, DIM))
    q[..., 0], q[..., 1] = 448, 448
    problem.q = jnp.asarray(q.astype(E4M3))
    keys = rng.normal(size=(SPAN, DIM)).astype(np.float32)
    keys[:, 0], keys[:, 1] = 448, -448
    slots = np.array([problem.table[0, s // 64] * 64 + s % 64 for s in range(SPAN)], np.int32)
    problem.cache = paged.write_index_keys(problem.cache, 1, jnp.asarray(slots), jnp.asarray(keys))
    problem.keys = wide(paged.read_index_pages(problem.cache, 1, jnp.asarray(problem.table), DIM))
    assert_right(problem, backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("name", ["decode_32k", "decode_32k_8rows", "prefill_1000_8k_starts"])
def test_repeats_are_bitwise_equal(name: str, backend: str) -> None:
    spec = dataclasses.replace(CASES[name], rows=3)
    args = inputs(spec, jax.random.key(1))
    call = jax.jit(lambda *a: comparable(spec, run_spec(spec, backend, a)))
    first = np.asarray(call(*args))
    for _ in range(4):
        np.testing.assert_array_equal(first, np.asarray(call(*args)))


def run_spec(spec: Spec, backend: str, args: tuple) -> jax.Array:
    *most, starts = args
    return paged_logits(*most, starts=starts, backend=backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_layers_beyond_two_to_the_31_bytes(backend: str) -> None:
    """Offsets are 64-bit: the last layer of a 2.8 GB cache, and the last pages of a layer of 2.2 GB."""
    spec = CASES["decode_8k"]
    q, weights, cache, _, table, lengths, _ = inputs(spec, jax.random.key(4))
    want = np.asarray(paged_logits(q, weights, cache, 0, table, lengths, backend=backend))
    far = jax.jit(lambda x: jnp.zeros((3, 110_000, x.shape[-1]), x.dtype).at[2, 1000:1128].set(x[0]))(cache)
    got = paged_logits(q, weights, far, 2, table + 1000, lengths, backend=backend)
    np.testing.assert_array_equal(np.asarray(got), want)
    far = jax.jit(lambda x: jnp.zeros((1, 260_000, x.shape[-1]), x.dtype).at[0, -128:].set(x[0]))(cache)
    got = paged_logits(q, weights, far, 0, table + (260_000 - 128), lengths, backend=backend)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_a_gpu_backend_is_the_default() -> None:
    choice = registry.resolve("mqa_logits", BACKENDS, CASES["decode_128k"])
    assert choice.backend != "reference", str(choice)
