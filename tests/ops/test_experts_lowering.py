"""The experts without a GPU: choices, plans, bytes, refusals, and their kernels compiled for more rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, experts, lowering, registry
from pallas_kernels.experts.plan import plan_for
from pallas_kernels.experts.spec import CASES, Spec, inputs

H200 = arch.by_name("H200-141")
GPUS = ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"]


@pytest.mark.needs_triton
@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("gpu", GPUS)
def test_triton_compiles(gpu: str, rows: int) -> None:
    spec = dataclasses.replace(CASES["ep4"], rows=rows)
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    backend = next(b for b in experts.BACKENDS if b.name == "triton")
    text = lowering.lower_for_cuda(lambda *a: backend.load()(spec, *a), *args, arch=arch.by_name(gpu))
    assert text.count("triton_kernel_call") == 4


def changed(**changes: object) -> Spec:
    return dataclasses.replace(CASES["ep4"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (changed(dtype="float32"), "float32"),
        (changed(weights="bfloat16 without scales"), "bfloat16 without scales"),
        (changed(arithmetic="w8a8", rows=65), "w8a8"),
        (changed(k=40, rows=65, arithmetic="w8a8"), "got 65"),
        (changed(width=2112), "width 2112"),
        (changed(shared_width=64), "shared_width 64"),
        (changed(hidden=6100), "hidden 6100"),
        (changed(experts=2048), "2048 experts"),
    ],
)
def test_refusals_name_the_number(spec: Spec, words: str) -> None:
    choice = registry.resolve("experts", experts.BACKENDS, spec, H200)
    assert choice.backend == "reference" and words in choice.reason


def test_the_hopper_kernel_serves_few_rows() -> None:
    for case, spec in CASES.items():
        for rows, name in ((1, "mosaic_sm90"), (64, "mosaic_sm90"), (65, "triton")):
            choice = registry.resolve("experts", experts.BACKENDS, dataclasses.replace(spec, rows=rows), H200)
            assert choice.backend == name, (case, choice)
    assert registry.resolve("experts", experts.BACKENDS, changed(arithmetic="w8a8"), H200).backend == "mosaic_sm90"
    for spec, words in ((changed(k=33), "33 choices"), (changed(hidden=6272), "no plan")):
        choice = registry.resolve("experts", experts.BACKENDS, spec, H200)
        assert choice.backend == "triton" and words in choice.reason


def test_who_serves_what() -> None:
    for spec in CASES.values():
        for gpu in GPUS:
            assert registry.resolve("experts", experts.BACKENDS, spec, arch.by_name(gpu), "triton").backend == "triton"
        assert registry.resolve("experts", experts.BACKENDS, spec, None).backend == "reference"


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 512, 4096])
@pytest.mark.parametrize("case", list(CASES))
def test_plans_have_a_place_for_every_row(case: str, rows: int) -> None:
    """Whatever is chosen: the items of any counts that add up to the pairs are at most the plan's."""
    spec = dataclasses.replace(CASES[case], rows=rows)
    for gpu in GPUS:
        plan = plan_for(spec, arch.by_name(gpu))
        random = np.random.default_rng(rows)
        for spread in (1, 2, spec.experts):
            counts = np.bincount(random.integers(0, spread, spec.pairs), minlength=spec.experts)
            needed = spec.pairs if rows == 1 else int((-(-counts // plan.block_rows)).sum())
            assert needed <= plan.items, (spread, plan)
        assert spec.width % plan.half == spec.shared_width % plan.half == spec.hidden % plan.block_down == 0
        assert 128 % plan.half == 128 % plan.block_down == 0  # a tile lies in one block of scales
        staged = plan.stages * (max(2 * plan.half, plan.block_down) * 128 + plan.block_rows * 256)
        assert staged <= arch.by_name(gpu).smem_per_block


def test_bytes_of_the_real_shape() -> None:
    """One row: eight experts and the shared one, 340 MB; eight rows: 57 and the shared one."""
    expert = 3 * 6144 * 2048
    one, eight = CASES["ep4"], changed(rows=8)
    assert (one.hit, eight.hit) == (8, 57)
    assert one.bytes() == 9 * (expert + expert // 128**2 * 4) + 2 * 6144 * 2 + 64
    assert eight.bytes() - 58 * (expert + expert // 128**2 * 4) == 8 * (2 * 6144 * 2 + 64)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_inputs_hit_what_bytes_counts(rows: int) -> None:
    for case in ("small", "small_one_expert"):
        spec = dataclasses.replace(CASES[case], rows=rows)
        # Jitted around: the stacks, which nobody reads, are not made.
        ids = np.asarray(jax.jit(lambda key, spec=spec: inputs(spec, key)[1])(jax.random.key(0)))
        assert len(np.unique(ids)) == spec.hit and ids.min() >= 0 and ids.max() < spec.experts
        assert all(len(set(row)) == spec.k for row in ids.tolist())


def test_shapes_must_match() -> None:
    def check(key: jax.Array) -> jax.Array:
        x, ids, weights, *stacks, _, _, _, _, _ = inputs(CASES["small"], key)
        with pytest.raises(ValueError, match="need down and the shared two"):
            experts.mix(x[:, :256], ids, weights, *stacks, 0)
        with pytest.raises(ValueError, match=r"\(1, 3\)"):
            experts.mix(x, ids[:, :3], weights, *stacks, 0)
        with pytest.raises(ValueError, match="arithmetic='w4'"):
            experts.mix(x, ids, weights, *stacks, 0, arithmetic="w4")
        return experts.mix(x, ids, weights, *stacks, 0, backend="reference")

    # Traced, not run: it is shapes that are looked at.
    assert jax.eval_shape(check, jax.random.key(0)).dtype == jnp.bfloat16
