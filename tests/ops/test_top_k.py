"""Selection against a sort in numpy: ties, NaN, infinities, zeros, every relation of length, k and n; slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import arch, lowering, registry
from pallas_kernels.registry import BackendRefused
from pallas_kernels.top_k import BACKENDS, top_k
from pallas_kernels.top_k.plan import make_plan
from pallas_kernels.top_k.spec import CASES, Spec

N = 40
run = jax.jit(top_k, static_argnums=2)


def expected(scores: np.ndarray, length: int, k: int) -> list[int]:
    """Ascending positions; scores compared as numbers in float64, where no float32 is a denormal."""
    if length <= k:
        chosen = list(range(length))
    else:
        value = np.where(np.isnan(scores[:length]), np.float32(-np.inf), scores[:length]).astype(np.float64)
        chosen = sorted(np.argsort(-value, kind="stable")[:k].tolist())
    return chosen + [-1] * (k - len(chosen))


@functools.cache
def hostile() -> np.ndarray:
    """Rows of scores: random, few distinct values, constant, NaN and infinities, denormals, and a NaN behind every second."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=N), rng.integers(-2, 2, N), np.zeros(N), np.full(N, -np.inf), np.full(N, np.nan)]
    rows.append(rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.5, -3e38], N))
    rows.append(np.where(np.arange(N) % 2, np.nan, rng.normal(size=N)))
    rows.append(-rng.uniform(1, 2, N))
    rows.append(rng.choice([0.0, -0.0, 1e-45, -1e-45, 3e-42, 1e-38], N))
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("k", [1, 8, N, N + 5])
def test_against_a_sort(k: int) -> None:
    lengths = sorted({n for n in (0, 1, k - 1, k, k + 1, N - 1, N) if 0 <= n <= N})
    for length in lengths:
        scores = hostile().copy()
        want = [expected(row, length, k) for row in scores]
        scores[:, length:] = np.resize(np.array([np.inf, np.nan, 9.0], np.float32), N - length)
        got = run(jnp.asarray(scores), jnp.full((len(scores),), length, jnp.int32), k)
        assert got.dtype == jnp.int32 and got.shape == (len(scores), k)
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=f"{length=} {k=}")


def test_each_row_has_its_length() -> None:
    lengths = np.array([0, 1, 7, 8, 9, 30, 39, 40, 40], np.int32)
    got = run(jnp.asarray(hostile()), jnp.asarray(lengths), 8)
    np.testing.assert_array_equal(
        np.asarray(got), [expected(row, int(n), 8) for row, n in zip(hostile(), lengths, strict=True)]
    )


@given(
    hnp.arrays(np.uint32, (3, N), elements=st.integers(0, 2**32 - 1)),
    st.lists(st.integers(0, N), min_size=3, max_size=3),
    st.sampled_from([1, 5, 39]),
    st.integers(0, 31),
)
def test_any_bits(bits: np.ndarray, lengths: list[int], k: int, shift: int) -> None:
    """Any float32 whatsoever; the shift makes scores that differ in low bits only."""
    scores = ((bits >> shift) ^ 0x42C80000).astype(np.uint32).view(np.float32)
    got = run(jnp.asarray(scores), jnp.asarray(lengths, jnp.int32), k)
    want = [expected(row, n, k) for row, n in zip(scores, lengths, strict=True)]
    np.testing.assert_array_equal(np.asarray(got), want)


def test_large_rows_keep_ties_in_order() -> None:
    scores = np.random.default_rng(1).integers(0, 50, (2, 5000)).astype(np.float32)
    got = run(jnp.asarray(scores), jnp.asarray([5000, 4001], jnp.int32), 2048)
    np.testing.assert_array_equal(np.asarray(got), [expected(scores[0], 5000, 2048), expected(scores[1], 4001, 2048)])


def test_negative_zero_equals_zero() -> None:
    """Exact zeros come from relu, negative ones from a negative head weight times zero: equal scores, lower position first."""
    scores = jnp.asarray([[-0.0, 0.0, -0.0, 0.0, -1.0]], jnp.float32)
    assert run(scores, jnp.asarray([5], jnp.int32), 2).tolist() == [[0, 1]]


def test_slots_through_the_block_table() -> None:
    """Two rows a sequence, pages in random order, positions past the table and padding."""
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(4, 300)).astype(np.float32)
    lengths = np.array([300, 299, 0, 20], np.int32)
    table = rng.permutation(8).reshape(2, 4).astype(np.int32)  # 256 positions
    positions, slots = jax.jit(lambda s, n, t: top_k(s, n, 30, table=t))(scores, lengths, table)
    np.testing.assert_array_equal(
        np.asarray(positions), [expected(r, int(n), 30) for r, n in zip(scores, lengths, strict=True)]
    )
    at = np.asarray(positions)
    page = np.take_along_axis(np.repeat(table, 2, axis=0), np.clip(at // 64, 0, 3), axis=1)
    np.testing.assert_array_equal(np.asarray(slots), np.where((at >= 0) & (at < 256), page * 64 + at % 64, -1))
    assert (np.asarray(slots)[0] == -1).any() and (at[0] >= 256).any()


def test_a_negative_page_is_no_slot() -> None:
    table = jnp.asarray([[3, -1, 2**31 // 64 - 1]], jnp.int32)
    args = jnp.zeros((1, 192), jnp.float32), jnp.asarray([192], jnp.int32)
    positions, slots = top_k(*args, 192, table=table)
    assert positions.tolist() == [list(range(192))]
    assert (
        slots[0, :64].tolist() == list(range(192, 256))
        and (slots[0, 64:128] == -1).all()
        and (slots[0, 128:] > 0).all()
    )


def test_refusals_name_the_numbers() -> None:
    scores, lengths = jnp.zeros((3, 8), jnp.float32), jnp.zeros((3,), jnp.int32)
    with pytest.raises(ValueError, match="k=0"):
        top_k(scores, lengths, 0)
    with pytest.raises(ValueError, match="rows=3"):
        top_k(scores, lengths, 2, table=jnp.zeros((2, 4), jnp.int32))
    for shape in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="neither 0"):
            top_k(scores, lengths, 2, table=jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match="bfloat16"):
        top_k(scores.astype(jnp.bfloat16), lengths, 2)
    with pytest.raises(BackendRefused, match="NVIDIA"):
        top_k(scores, lengths, 2, backend="gluon")
    h200 = arch.by_name("H200-141")
    assert registry.resolve("top_k", BACKENDS, CASES["1m"], h200, forced="gluon").backend == "gluon"
    choice = registry.resolve("top_k", BACKENDS, Spec(1, 8192, 4096), h200)
    assert choice.backend == "reference" and "4096" in choice.reason


@pytest.mark.parametrize("gpu", ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"])
@pytest.mark.parametrize("rows", [1, 5, 8, 32, 64, 1024])
@pytest.mark.parametrize("n", [1, 63, 2048, 8192, 8193, 65536, 100_001, 1 << 20])
def test_plans_cover_the_row(n: int, rows: int, gpu: str) -> None:
    """Every position is in one slice, and no block has fewer elements than its program has threads."""
    target = arch.by_name(gpu)
    plan = make_plan(Spec(rows, n, 2048), target)
    span = plan.blocks * plan.block
    assert (plan.slices - 1) * span < n <= plan.slices * span
    assert plan.block >= 32 * plan.warps and plan.listed // 2 >= 32 * plan.warps
    # Slices of a row may wait for each other, so all must be on the GPU at once.
    assert plan.slices == 1 or (plan.slices <= 128 and plan.slices * rows <= target.num_sms)


@pytest.mark.needs_triton
@pytest.mark.parametrize("gpu", ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"])
@pytest.mark.parametrize("rows,n,k,slots", [(64, 1 << 20, 2048, True), (200, 20_001, 7, False), (3, 300, 1, True)])
def test_gluon_compiles(rows: int, n: int, k: int, slots: bool, gpu: str) -> None:
    """Several blocks a slice, one slice a row, rows of odd lengths, no table; one launch for short rows, else two."""
    args = [jax.ShapeDtypeStruct((rows, n), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    if slots:
        args.append(jax.ShapeDtypeStruct((rows, -(-n // 64)), jnp.int32))
    text = lowering.lower_for_cuda(
        lambda s, m, *t: top_k(s, m, k, backend="gluon", **({"table": t[0]} if t else {})),
        *args,
        arch=arch.by_name(gpu),
    )
    assert text.count("triton_kernel_call") == (1 if n <= 8192 else 2)
