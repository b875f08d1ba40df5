"""The error measures on cases worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compare import compare, rel_l2

NAN, INF = np.nan, np.inf


def test_by_hand() -> None:
    found = compare([[3.0, 4.0], [0.0, 1.0]], [[3.0, 4.0], [0.0, 0.0]])
    assert found.rel_l2 == pytest.approx(0.2)
    assert found.cosine == pytest.approx(25 / (5 * 26**0.5))
    assert (found.max_abs, found.worst, found.nan_got, found.nan_want) == (1.0, (1, 1), 0, 0)


def test_is_relative_to_want_and_not_symmetric() -> None:
    assert rel_l2([2.0], [1.0]) == 1.0
    assert rel_l2([1.0], [2.0]) == 0.5
    assert rel_l2([2e20], [1e20]) == pytest.approx(1.0)


def test_opposite_and_orthogonal() -> None:
    assert compare([-1.0, -2.0], [1.0, 2.0]).cosine == pytest.approx(-1.0)
    assert compare([-1.0, -2.0], [1.0, 2.0]).rel_l2 == pytest.approx(2.0)
    assert compare([0.0, 1.0], [1.0, 0.0]).cosine == 0.0


@pytest.mark.parametrize("same", [[0.0, 0.0], [1.0, NAN], [NAN, NAN], [INF, 1.0], [-INF, INF], []])
def test_equal_arrays(same: list[float]) -> None:
    found = compare(same, same)
    assert (found.rel_l2, found.max_abs, found.cosine) == (0.0, 0.0, 1.0)
    assert found.nan_got == found.nan_want == int(np.isnan(same).sum())


@pytest.mark.parametrize(
    ("got", "want"),
    [
        *[([1.0, NAN], [1.0, 2.0]), ([1.0, 2.0], [1.0, NAN]), ([1.0, INF], [1.0, 2.0]), ([1.0, 2.0], [1.0, INF])],
        *[([1.0, INF], [1.0, -INF]), ([1.0, NAN], [1.0, INF]), ([0.0, NAN], [0.0, 0.0])],
    ],
)
def test_an_unmatched_nan_or_infinity_is_infinitely_wrong(got: list[float], want: list[float]) -> None:
    found = compare(got, want)
    assert found.rel_l2 == INF and found.max_abs == INF
    assert found.worst == (1,)
    assert (found.nan_got, found.nan_want) == (int(np.isnan(got).sum()), int(np.isnan(want).sum()))


def test_matched_nan_is_left_out() -> None:
    assert rel_l2([NAN, 2.0], [NAN, 1.0]) == 1.0
    assert rel_l2([INF, 2.0], [INF, 1.0]) == 1.0


def test_anything_against_zero_is_infinitely_wrong() -> None:
    assert rel_l2([1e-30], [0.0]) == INF


def test_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"got \(1,\), want \(2,\)"):
        compare([1.0], [1.0, 1.0])


def test_takes_jax_arrays_and_sums_in_float64() -> None:
    want = jnp.full((1 << 12,), 1.0, jnp.bfloat16)
    got = want.at[7].set(jnp.asarray(1.5, jnp.bfloat16))
    assert rel_l2(got, want) == pytest.approx(0.5 / 64, rel=1e-15)
    assert compare(got, want).worst == (7,)
    assert rel_l2(np.float32(3), np.float32(4)) == 0.25


def test_text_names_the_numbers() -> None:
    text = str(compare([1.0, NAN], [1.0, 2.0]))
    assert "rel_l2=inf" in text and "at (1,)" in text and "nan=1/0" in text
