"""W_UV over the parts of one row's context by Triton's interpreter on the CPU, against numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.ops import triton_interpreter

PARTS = (1, 3, 8, 16)


@pytest.mark.needs_triton
def test_the_row_kernel_equals_numpy_in_the_interpreter() -> None:
    assert triton_interpreter.run_script(__file__).count("equal") == len(PARTS)


def _check(parts: int) -> None:
    from pallas_kernels.mla_out import triton
    from pallas_kernels.mla_out.spec import CASES

    spec = dataclasses.replace(CASES["h8_w8a16_parts"], heads=2, v=32, layers=2, parts=parts)
    rng = np.random.default_rng(parts)
    context = rng.standard_normal((1, parts, 2, 512)).astype(np.float32)
    lse = (3 * rng.standard_normal((1, parts, 2))).astype(np.float32)
    # A part in which nothing was selected, and a head with nothing at all.
    context[0, 0, 0], lse[0, 0, 0] = 0.0, -np.inf
    context[0, :, 1], lse[0, :, 1] = 0.0, -np.inf
    w_uv = jnp.asarray(0.04 * rng.standard_normal((2, 2, 32, 512)), jnp.bfloat16)
    assert triton.merges(spec)
    got = triton.up_project_parts(spec, jnp.asarray(context), jnp.asarray(lse), w_uv, jnp.asarray(1, jnp.int32))
    weight = np.exp(lse.astype(np.float64))[..., None]
    total = weight.sum(1)
    merged = (context * weight).sum(1) / np.where(total > 0, total, 1)
    merged = merged.astype(ml_dtypes.bfloat16).astype(np.float64)
    want = np.einsum("rhc,hvc->rhv", merged, np.asarray(w_uv[1], np.float64)).reshape(1, 64)
    assert not np.asarray(got)[0, 32:].any()
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 3e-3 * np.linalg.norm(want), parts
    print("equal", parts)


if __name__ == "__main__":
    triton_interpreter.install()
    for count in PARTS:
        _check(count)
