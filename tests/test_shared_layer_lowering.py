"""A sparse layer on four GPUs that are not there: lowered with every kernel, no exchange of XLA's is left in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Operations of XLA's that split a CUDA graph; a device's number is one of them.
SPLITTING = r"stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|partition_id|sort)\b"


@pytest.mark.needs_triton
@pytest.mark.parametrize(("mode", "rows"), [("tp", 1), ("ep", 1), ("ep+dp", 64)])
def test_layer_has_no_exchange_of_xla(mode: str, rows: int) -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.test_shared_layer_lowering", mode, str(rows)]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def lowered(mode: str, rows: int, peers: bool = True) -> tuple[str, Counter[tuple[str, str]]]:
    """StableHLO of two layers at GLM-5.2's sizes on four H200, in a loop, and (operation, backend) of their calls."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from bench import moe_layer
    from glm52_jax import parallel
    from glm52_jax.cache import Selection
    from pallas_kernels import arch, lowering, registry
    from pallas_kernels.collectives import workspace

    spec = moe_layer.spec_of(mode, 4, rows)
    share = spec.plan.parallel
    assert share is not None

    def array(shape: tuple[int, ...], dtype: object, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(share.mesh, where))

    batch, pages, split = parallel.batch_spec(spec.plan), parallel.cache_spec(spec.plan), PartitionSpec(share.axis)
    selected = array((rows, 1, spec.config.index_topk), jnp.int32, batch)
    given = (spec.shapes(), (array((rows, spec.pages), jnp.int32, batch), Selection(selected, selected)))
    latents = array((2, rows * spec.pages, 64, 656), jnp.uint8, pages)
    state = (array((rows, spec.config.hidden_size), jnp.bfloat16, batch), latents)
    units = 4 * workspace.limit(4) // workspace.UNIT_PAYLOAD + workspace.PARTIALS
    work = workspace.Workspace(array((4, 2, units, 4), jnp.uint32, split), array((4, 5, 2), jnp.uint32, split))
    calls = workspace.State(array((4, 1), jnp.uint32, split), array((4, 1), jnp.int32, split))
    layers = moe_layer.part_of(spec, moe_layer.LAYER, 2, loop=True)

    def program(given: object, state: object, work: workspace.Workspace, calls: workspace.State) -> object:
        if not peers:
            return layers(given, state), calls
        with parallel.exchanging(work, calls) as box:
            out = layers(given, state)
        return out, box.state

    with lowering.target(arch.by_name("H200-141")), registry.recorded() as found:
        traced = jax.jit(program, donate_argnums=(1, 3)).trace(given, state, work, calls)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, Counter((choice.operation, choice.backend) for choice in found if not choice.inside)


def main(mode: str, rows: int) -> None:
    text, found = lowered(mode, rows)
    assert not re.findall(SPLITTING, text), Counter(re.findall(SPLITTING, text))
    # Two layers: sums after attention (with the norm) and after the experts, or the rows to the experts and back.
    assert found["collectives", "triton"] == 4 and ("collectives", "reference") not in found, found
    launches = Counter(re.findall(r"custom_call @(triton_kernel_call_ffi|mosaic_gpu_v2)", text))
    print(mode, rows, dict(launches), dict(found))
    if (mode, rows) == ("tp", 1):
        assert launches.total() <= 2 * 12, launches
        text, found = lowered(mode, rows, peers=False)
        assert re.findall(SPLITTING, text) and found["collectives", "reference"] == 4, "the check above sees nothing"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
