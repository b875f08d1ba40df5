"""The Triton router and experts by Triton's interpreter on the CPU, against their references."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compare import compare
from tests.ops import triton_interpreter

ROUTED = (
    (1, 24, 6, "bfloat16"),
    (5, 24, 6, "bfloat16"),
    (20, 40, 3, "float32"),
    (70, 9, 9, "bfloat16"),
    (1, 256, 8, "float32"),
)
# rows, k, experts, width, shared width, e4m3 as a type
MIXED = (
    *((1, 4, 8, 128, 256, True), (1, 4, 8, 128, 128, False), (5, 3, 8, 128, 128, True)),
    *((20, 3, 6, 128, 256, False), (70, 2, 5, 128, 128, True)),
)


@pytest.mark.needs_triton
@pytest.mark.parametrize("what", ["router", "experts"])
def test_kernels_equal_references_in_the_interpreter(what: str) -> None:
    said = triton_interpreter.run_script(__file__, what)
    assert said.count("equal") == (len(ROUTED) + 2 if what == "router" else 4 * len(MIXED))


def _equal(got: Any, want: Any, tolerance: float, text: str) -> None:
    difference = compare(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert difference.rel_l2 <= tolerance, f"{text}: {difference}"
    print("equal", text, difference)


def _check_router() -> None:
    from pallas_kernels.router import reference, triton
    from pallas_kernels.router.spec import Spec, inputs

    for rows, experts, k, dtype in ROUTED:
        spec = Spec(rows, 384, experts, k, 2, dtype, dtype, 2.5)
        x, gate, bias, *_ = inputs(spec, jax.random.key(rows))
        args = (x, gate, bias, jnp.asarray(1, jnp.int32))
        (ids, weights), (wanted, expected) = triton.run(spec, *args), reference.run(spec, *args)
        np.testing.assert_array_equal(np.asarray(ids), np.asarray(wanted))
        _equal(weights, expected, 1e-6, str(spec))
    # Ties go to the lower id, a row of NaN still names experts that exist, and the other rows do not see it.
    spec = Spec(4, 128, 24, 6, 1, "float32", "float32", 2.5)
    x, bias = np.zeros((4, 128), np.float32), np.zeros((1, 24), np.float32)
    x[1, 5], bias[0, [22, 5, 11]], bias[0, :3] = np.nan, 1.0, -1.0
    gate = jnp.ones((1, 24, 128))
    ids, weights = triton.run(spec, jnp.asarray(x), gate, jnp.asarray(bias), jnp.asarray(0, jnp.int32))
    others = [0, 2, 3]
    _equal(np.asarray(ids)[others], [[5, 11, 22, 3, 4, 6]] * 3, 0.0, "ties")
    _equal(np.asarray(weights)[others], np.full((3, 6), 2.5 / 6), 1e-6, "weights of ties")
    assert len(set(np.asarray(ids)[1].tolist()) & set(range(24))) == 6


def _check_experts() -> None:
    from pallas_kernels.experts import reference, triton
    from pallas_kernels.experts.plan import plan_for
    from pallas_kernels.experts.spec import Spec, inputs

    for rows, k, experts, width, shared, native in MIXED:
        spec = Spec(rows, k, experts, 256, width, shared, 2)
        x, ids, weights, *stacks, _, _, _, _, _ = inputs(spec, jax.random.key(rows))
        plan = dataclasses.replace(plan_for(spec, None), native=native)
        random = np.random.default_rng(rows).integers(-3, experts + 2, ids.shape).astype(np.int32)
        for name, chosen in (
            *(("plain", np.asarray(ids)), ("random, repeated in a row, holes", random)),
            *(("one expert", np.full_like(random, experts - 1)), ("none", np.full_like(random, -1))),
        ):
            placed = (chosen >= 0) & (chosen < experts)
            given = np.where(placed, np.asarray(weights), np.nan).astype(np.float32)
            given[0, 0] = 0.0 if placed[0, 0] else np.nan
            args = (jnp.asarray(chosen), *(jnp.asarray(w) for w in (given, np.nan_to_num(given))))
            layer = jnp.asarray(1, jnp.int32)
            got = triton.run(spec, x, args[0], args[1], *stacks, layer, plan=plan)
            want = reference.run(spec, x, args[0], args[2], *stacks, layer)
            _equal(got, want, 3e-3, f"{name} {spec}")


if __name__ == "__main__":
    triton_interpreter.install()
    {"router": _check_router, "experts": _check_experts}[sys.argv[1]]()
