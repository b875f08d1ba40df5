"""Options of XLA's compiler for a decode step on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallas_kernels.arch import Arch

ONE_GPU: dict[str, Any] = {
    # The graph holds the step's dependencies, not one chain: what does not depend on each other runs side by side. On one GPU only:
    # 40 layers on four, with exchanges in the graph, gained nothing (bench/STEP.md).
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


def step_options(arch: Arch | None, dump: Path | None = None, devices: int = 1) -> dict[str, Any] | None:
    """For compiling a step for ``devices`` GPUs of ``arch`` (None: no GPU), with XLA's dump in a folder; None where nothing differs
    from XLA's own."""
    dumped = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} if dump else {}
    return (ONE_GPU if arch is not None and devices == 1 else {}) | dumped or None
