"""Options of XLA's compiler for a decode step on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallas_kernels.arch import Arch

STEP: dict[str, Any] = {
    # The graph holds the step's dependencies, not one chain: what does not depend on each other runs side by side.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


def step_options(arch: Arch | None, dump: Path | None = None) -> dict[str, Any] | None:
    """For compiling a step for ``arch`` (None: no GPU), with XLA's dump in a folder; None where nothing differs from XLA's own."""
    dumped = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} if dump else {}
    return (STEP if arch is not None else {}) | dumped or None
