"""The graph of a decode step, without the GPU: XLA compiles for one that is described to it, and its thunks are read.

Needs JAX's CUDA plugin (``./dev install cuda13``) and Triton, no GPU and no driver; 78 layers take about half a minute. What is
compiled is what a GPU runs, except that XLA cannot try which of its own matrix products is fastest there (the head's).
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.step_launches import Launch, launches
from bench.step_model import StepSpec
from glm52_jax import audit, decode
from glm52_jax.shapes import abstract_state
from glm52_jax.xla_options import step_options
from pallas_kernels import lowering
from pallas_kernels.arch import Arch


@dataclasses.dataclass(frozen=True)
class StepGraph:
    """ours: launches of this repository's kernels in their order; xla: of XLA's, by kernel; splitting: what no graph can hold."""

    graph: audit.Graph
    ours: list[Launch]
    xla: dict[str, Launch]
    splitting: Counter[str]
    lower_s: float
    compile_s: float

    def lines(self) -> list[str]:
        """What the graph is, and its launches by stage and operation."""
        counts = Counter((launch.stage, launch.what) for launch in [*self.ours, *self.xla.values()])
        head = f"{self.graph}; splitting: {dict(self.splitting) or 'nothing'}; "
        return [head + f"lowered in {self.lower_s:.0f} s, compiled in {self.compile_s:.0f} s"] + [
            f"    {stage:12} {count:4d} x {what}" for (stage, what), count in counts.items()
        ]


def described(arch: Arch) -> str:
    """A GPU as XLA wants it told: the fields that its compiler reads, in protobuf's text form."""
    major, minor = arch.compute_capability
    info = {
        **{"threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 << 10},
        **{"shared_memory_per_core": arch.smem_per_block + 1024, "threads_per_core_limit": 2048, "fpus_per_core": 128},
        **{"core_count": arch.num_sms, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535},
        **{"block_dim_limit_z": 65535, "memory_bandwidth": int(arch.bandwidth), "l2_cache_size": arch.l2_bytes},
        **{"clock_rate_ghz": 1.98, "device_memory_size": arch.memory_bytes, "registers_per_core_limit": 65536},
        **{"shared_memory_per_block_optin": arch.smem_per_block, "registers_per_block_limit": 65536},
        **{"thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64, "device_address_bits": 64},
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    features = " feature_extension: ACCELERATED_FEATURES" if arch.sm in (90, 100, 120) else ""
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor}{features} }}"
    versions = 'driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"'
    text = f'device_vendor: "NVIDIA Corporation" name: "{arch.name}" {versions} dnn_version: "9.10.0"'
    return (
        f'gpu_device_info {{ {fields} {capability} {text} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{arch.name}"'
    )


def mesh_of(arch: Arch) -> Mesh:
    """A mesh of one GPU that is not there; ValueError where JAX has no compiler for it."""
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc("", "cuda", target_config=described(arch), topology="1x1x1")
    except NotImplementedError as error:
        raise ValueError(
            f"compiling for {arch.name} needs JAX's CUDA plugin: ./dev install cuda13 ({error})"
        ) from error
    return Mesh(found.devices, ("devices",))


def graph_of(spec: StepSpec, arch: Arch) -> StepGraph:
    """Compiles a spec's step for that GPU. The spec's mesh must be ``mesh_of(arch)``."""
    assert spec.mesh is not None
    here = NamedSharding(spec.mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here), tree)

    state = abstract_state(spec.config, spec.plan, spec.rows, spec.pages, spec.rows * spec.pages)

    # Named as in ``program``: a profile tells steps by it.
    def traced(weights: Any, state: Any) -> Any:
        return inspect.unwrap(decode.decode_step)(weights, state, config=spec.config, plan=spec.plan)

    start = time.perf_counter()
    with lowering.target(arch):
        lowered = jax.jit(traced, donate_argnums=1).lower(placed(spec.shapes()), placed(state))
    middle = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = step_options(arch, Path(folder)) or {}
        hlo = lowered.compile(compiler_options=options | {"xla_gpu_autotune_level": 0}).as_text() or ""
        thunks = audit.dumped_thunks(Path(folder))
    end = time.perf_counter()
    assert thunks is not None
    ours, xla = launches(hlo)
    return StepGraph(audit.graph_of(thunks), ours, xla, audit.not_graphable(hlo), middle - start, end - middle)
