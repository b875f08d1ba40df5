"""The merge of bfloat16 partials by Triton's interpreter on the CPU, against numpy, and where it serves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import arch, lowering
from pallas_kernels.sparse_mla import attend
from pallas_kernels.sparse_mla.spec import CASES
from tests.ops import triton_interpreter

SPLITS = (2, 8)


@pytest.mark.needs_triton
def test_the_kernel_equals_numpy_in_the_interpreter() -> None:
    assert triton_interpreter.run_script(__file__).count("equal") == len(SPLITS)


@pytest.mark.needs_triton
@pytest.mark.parametrize(("heads", "rows", "short"), [(64, 8, True), (64, 9, False), (64, 4, False), (8, 64, False)])
def test_eight_splits_of_32_heads_have_bfloat16_partials(heads: int, rows: int, short: bool) -> None:
    spec = dataclasses.replace(CASES["h64_k2048_fp8"], rows=rows, heads=heads)

    def call(q: jax.Array, cache: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attend(q, cache, 0, slots, kv_lora_rank=512, scale=spec.scale, backend="gluon")

    shapes = (
        jax.ShapeDtypeStruct((rows, heads, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, spec.pages, 64, spec.width), jnp.uint8),
        jax.ShapeDtypeStruct((rows, spec.k), jnp.int32),
    )
    text = lowering.lower_for_cuda(call, *shapes, arch=arch.by_name("H200-141"))
    assert (f"tensor<{rows}x8x{heads}x512xbf16>" in text) is short
    assert text.count("triton_kernel_call") == 2


def _check(splits: int) -> None:
    from pallas_kernels.sparse_mla import triton

    spec = dataclasses.replace(CASES["h64_k2048_fp8"], rows=2, heads=3)
    rng = np.random.default_rng(splits)
    part = rng.standard_normal((2, splits, 3, 512)).astype(ml_dtypes.bfloat16)
    log_sum = (5 * rng.standard_normal((2, splits, 3))).astype(np.float32)
    # A split in which nothing was selected, and a head with nothing at all.
    part[0, 0, 0], log_sum[0, 0, 0] = 0.0, -np.inf
    part[1, :, 2], log_sum[1, :, 2] = 0.0, -np.inf
    context, lse = triton.merge_short(spec, splits, jnp.asarray(part), jnp.asarray(log_sum))
    weight = np.exp2(log_sum.astype(np.float64))[..., None]
    total = weight.sum(1)
    want = (part.astype(np.float64) * weight).sum(1) / np.where(total > 0, total, 1)
    got = np.asarray(context, np.float64)
    assert context.dtype == jnp.bfloat16 and not got[1, 2].any()
    np.testing.assert_allclose(got, want, rtol=1.01 * 2.0**-8, atol=1e-6)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(np.asarray(lse), np.log(total[..., 0]), rtol=1e-5, atol=1e-5)
    print("equal", splits)


if __name__ == "__main__":
    triton_interpreter.install()
    for count in SPLITS:
        _check(count)
