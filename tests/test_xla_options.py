"""Options for compiling a step."""

from __future__ import annotations

from pathlib import Path

import jax

from glm52_jax.xla_options import ONE_GPU, step_options
from pallas_kernels import arch


def test_without_a_gpu_nothing_differs_from_xla() -> None:
    assert step_options(None) is None
    assert step_options(None, Path("/d")) == {"xla_dump_to": "/d", "xla_dump_hlo_as_text": True}


def test_kernels_run_side_by_side_on_one_gpu_only() -> None:
    assert step_options(arch.by_name("H200-141")) == ONE_GPU
    assert step_options(arch.by_name("H200-141"), devices=4) is None


def test_xla_knows_every_option(tmp_path: Path) -> None:
    options = step_options(arch.by_name("H200-141"), tmp_path)
    assert options is not None and options.items() > ONE_GPU.items() and ONE_GPU
    # A name or a value that XLA does not have is an error, also on a CPU.
    assert jax.jit(lambda x: x + 1).lower(1).compile(compiler_options=options)(1) == 2
