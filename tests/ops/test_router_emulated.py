"""The router's launch of few rows in numpy: programs meet in a mailbox, in any order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.router.reference as reference
from pallas_kernels.router.spec import CASES, Spec, inputs, mailbox_words
from tests.ops import gluon_emulator

EXPERTS, UNIT = 40, 8
# In order of import.
MODULES = ("gluon_words", "gluon_rank", "gluon_choice", "gluon_norm", "gluon_few", "gluon_one")


def few_rows(spec: Spec, *args: Any) -> tuple[Any, ...]:
    modules = gluon_emulator.load("pallas_kernels.router", MODULES)
    return modules["gluon_one" if modules["gluon_one"].serves(spec) else "gluon_few"].run(spec, *args)


def spec_of(rows: int, **changes: object) -> Spec:
    base = Spec(rows, 512, EXPERTS, 6, 2, "bfloat16", "bfloat16", 2.5, "bfloat16", True, 1e-5, UNIT, True)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def lists(ids: np.ndarray, experts: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    count = np.bincount(ids.ravel(), minlength=experts)
    table = np.stack([np.cumsum(count), np.cumsum(-(-count // unit))])
    return table, np.argsort(ids.ravel(), kind="stable")


def check_lists(made: Any, ids: Any, spec: Spec) -> None:
    assert (made is not None) == (spec.rows > 1 and bool(spec.unit))
    if made is not None:
        table, order = (np.asarray(part) for part in made)
        # The order comes in whole lines of 32.
        assert order.size == -(-spec.rows * spec.k // 32) * 32
        for got, expected in zip(
            (table, order[: ids.size]), lists(np.asarray(ids), spec.experts, spec.unit), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


def check_terms(terms: Any, normed: Any, spec: Spec) -> None:
    """The very numbers of the reference, of the rows that there are."""
    assert (terms is not None) == bool(spec.norm)
    if terms is not None:
        for got, want in zip(terms, reference.split(normed), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            live = [8 * t + row for t in range(want.shape[1] // 8) for row in range(spec.rows)]
            np.testing.assert_array_equal(np.asarray(got, np.float32)[:, live], np.asarray(want, np.float32)[:, live])


CHANGES = ["no sum", "no norm", "neither", "few experts", "all experts", "odd size", "many"]
ALONE = ["no sum", "no norm", "few experts", "all experts", "odd size", "many", "wide"]


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        *((rows, "") for rows in (1, 2, 3, 5, 8)),
        *((2 + 5 * (i % 2), c) for i, c in enumerate(CHANGES)),
        (1, "neither"),
        *((1, change) for change in ALONE),
    ],
)
def test_equals_the_reference(rows: int, change: str) -> None:
    given = {
        "": {}, "no sum": {"delta": False}, "no norm": {"norm": ""}, "neither": {"norm": "", "delta": False},
        "few experts": {"experts": 23, "k": 3}, "all experts": {"experts": 8, "k": 8}, "odd size": {"hidden": 384 + 128 * rows},
        "many": {"experts": 256, "k": 8}, "wide": {"hidden": 3072},
    }  # fmt: skip
    spec = spec_of(rows, **given[change])
    x, gate, bias, _, _, norm, delta, mailbox = inputs(dataclasses.replace(spec, norm="bfloat16"), jax.random.key(rows))
    # A number that is known and one that is on the device are two ways to the same layer.
    layer = 1 if rows % 2 else jnp.asarray(1, jnp.int32)
    args = (x, gate, bias, layer, norm if spec.norm else None, delta, mailbox)
    total, normed, ids, weights, made, terms, left = few_rows(spec, *args)
    want = reference.run(spec, *args[:4], None, *args[4:])
    np.testing.assert_array_equal(np.asarray(total, np.float32), np.asarray(want[0], np.float32))
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(want[1], np.float32), rtol=2**-7)
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(want[2]))
    np.testing.assert_allclose(np.asarray(weights), np.asarray(want[3]), rtol=2e-3)
    assert left.shape == (mailbox_words(rows, spec.hidden, spec.experts),) and not np.asarray(left).any()
    check_lists(made, ids, spec)
    check_terms(terms, normed, spec)


@pytest.mark.parametrize("rows", [1, 6])
def test_ties_zeros_and_a_row_of_nan(rows: int) -> None:
    """Logits of exactly zero are there all the same; a row of NaN names experts that exist and leaves the others alone."""
    spec = spec_of(rows, norm="", delta=False)
    bias = np.zeros((2, EXPERTS), np.float32)
    bias[1, [22, 35, 11]], bias[1, :3] = 1.0, -1.0
    x = np.zeros((rows, spec.hidden), np.float32)
    x[rows // 2] = np.nan if rows > 1 else 0.0
    gate = jnp.ones((2, EXPERTS, spec.hidden), jnp.bfloat16)
    mailbox = jnp.zeros(mailbox_words(rows, spec.hidden, EXPERTS), jnp.int32)
    args = (jnp.asarray(x, jnp.bfloat16), gate, jnp.asarray(bias), 1, None, None, mailbox)
    _, _, ids, weights, made, _, left = few_rows(spec, *args)
    others = [row for row in range(rows) if rows == 1 or row != rows // 2]
    np.testing.assert_array_equal(np.asarray(ids)[others], [[11, 22, 35, 3, 4, 5]] * len(others))
    np.testing.assert_allclose(np.asarray(weights)[others], 2.5 / 6, rtol=1e-6)
    assert all(len(set(row.tolist()) & set(range(EXPERTS))) == 6 for row in np.asarray(ids))
    assert not np.asarray(left).any()
    check_lists(made, ids, spec)


def tied(norm: str, bias: np.ndarray, k: int) -> np.ndarray:
    """Who is chosen of keys that are the bias: scores of sigmoid(-256) or less, which is 0."""
    spec = spec_of(1, norm=norm, delta=False, experts=bias.size, k=k, split=False)
    mailbox = jnp.zeros(mailbox_words(1, spec.hidden, bias.size), jnp.int32)
    gate, x = jnp.ones((2, bias.size, spec.hidden), jnp.bfloat16), jnp.full((1, spec.hidden), -0.5, jnp.bfloat16)
    both = jnp.asarray(np.stack([np.zeros_like(bias), bias]))
    weight = jnp.ones((2, spec.hidden), jnp.bfloat16) if norm else None
    return np.asarray(few_rows(spec, x, gate, both, 1, weight, None, mailbox)[2])[0]


@pytest.mark.parametrize("norm", ["", "bfloat16"])
@pytest.mark.parametrize("k", [6, 14])
def test_keys_that_are_almost_equal(k: int, norm: str) -> None:
    """Of keys that differ in their last bits the larger wins, in its lane or in another."""
    rank = np.random.default_rng(0).permutation(EXPERTS)
    bias = (0.5 + rank * np.float32(2**-24)).astype(np.float32)
    np.testing.assert_array_equal(tied(norm, bias, k), np.argsort(-bias, kind="stable")[:k])


@pytest.mark.parametrize("norm", ["", "bfloat16"])
@pytest.mark.parametrize("scale", [0.25, -0.25, 2**-24, 1e-42, 0.0])
@pytest.mark.parametrize("experts", [EXPERTS, 256])
def test_equal_keys_everywhere(experts: int, scale: float, norm: str) -> None:
    """Few different keys, negative, tiny and zero ones too: of equal ones the lower expert, wherever the two are."""
    number = np.random.default_rng(experts).integers(1, 5, experts)
    bias = (number * np.float32(scale)).astype(np.float32)
    np.testing.assert_array_equal(tied(norm, bias, 8), np.argsort(-bias, kind="stable")[:8])


def test_of_the_real_shape_every_program_has_its_part() -> None:
    """134 programs; calls one after the other leave nothing behind."""
    spec = dataclasses.replace(CASES["glm_norm"], rows=3, hidden=2048, layers=2, unit=8)
    x, gate, bias, _, _, norm, delta, mailbox = inputs(spec, jax.random.key(9))
    for layer in (0, 1):
        at = jnp.asarray(layer, jnp.int32)
        _, _, ids, weights, made, _, mailbox = few_rows(spec, x, gate, bias, at, norm, delta, mailbox)
        want = reference.run(spec, x, gate, bias, at, None, norm, delta, mailbox)
        np.testing.assert_array_equal(np.asarray(ids), np.asarray(want[2]))
        np.testing.assert_allclose(np.asarray(weights), np.asarray(want[3]), rtol=2e-3)
        check_lists(made, ids, spec)
