"""The launch that the Hopper kernels for 1 to 64 rows share, in Pallas Mosaic GPU: operands, grid, clusters, compiler options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_linear.once_plan import OncePlan
from pallas_kernels.fp8_linear.plan import Plan


class Worker:
    """The work of one block of threads, traced by every warpgroup.

    rows: x (or its values and scales, already quantized), norm, delta; arrays: (data, scale) a weight; outs: normed, total, then
    one a weight; memory: shared memory by name; height: output rows of a tile.
    """

    def __init__(
        self, plan: Any, height: int, layer: Any, rows: Any, arrays: Any, outs: Any, memory: dict[str, Any]
    ) -> None:
        self.plan, self.layer = plan, layer
        self.x, self.more = rows[0], rows[1:]
        self.weights, self.weight_scales = arrays[0::2], arrays[1::2]
        self.row_outs, self.outs = outs[: plan.row_outputs], outs[plan.row_outputs :]
        self.__dict__.update(memory)
        self.cta, self.wg = lax.axis_index("tile"), lax.axis_index("wg")
        self.part = lax.axis_index("part") if plan.split > 1 else 0
        self.share = self.part * plan.warpgroups + self.wg
        self.firsts = [sum(plan.ns[:j]) // height for j in range(len(plan.ns))]


def launched(
    plan: Plan | OncePlan, worker: Callable[..., Any], scratch: dict[str, Any], out_dtype: str, interpret: Any
) -> Callable[..., list[jax.Array]]:
    """The kernel whose blocks of threads ``worker(plan, layer, rows, arrays, outs, memory).compute()``; called as
    ``mosaic_sm90.build`` describes. scratch: shared memory by name, which memory holds."""
    inputs = 1 + plan.ready + bool(plan.norm) + plan.delta

    def fp8_linear(*refs: Any) -> None:
        count = len(plan.ns)
        layer: Any = 0
        if plan.offsets is None:
            layer, refs = refs[0][0], refs[1:]
        rows, refs = refs[:inputs], refs[inputs:]
        arrays, refs = refs[: 2 * count], refs[2 * count + 1 :]
        outs, memory = refs[: plan.row_outputs + count], refs[plan.row_outputs + count :]
        worker(plan, layer, rows, arrays, outs, dict(zip(scratch, memory, strict=True))).compute()

    rows_type = jax.ShapeDtypeStruct((plan.rows, plan.blocks, BLOCK), jnp.bfloat16)
    # Jitted: calls of several layers are traced once.
    call = plgpu.kernel(
        fp8_linear,
        out_type=[rows_type] * plan.row_outputs
        + [jax.ShapeDtypeStruct((plan.rows, n), jnp.dtype(out_dtype)) for n in plan.ns],
        grid=(plan.tiles,),
        grid_names=("tile",),
        cluster=(plan.split,) if plan.split > 1 else (),
        cluster_names=("part",) if plan.split > 1 else (),
        num_threads=plan.warpgroups,
        thread_name="wg",
        scratch_types=tuple(scratch.values()),
        # Every shared buffer here is ordered by hand; the automatic barriers cost a third of the time of a step.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # every reduction here stays within a warp; 2 KB a warpgroup otherwise
        ),
        interpret=interpret,
    )
    return jax.jit(call)
