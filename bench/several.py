"""What the benchmarks of several GPUs share: the mesh, whether a program is one graph, and where figures go.

Records are JSON under ``bench/results/<gpu>/x<devices>/``, one file a benchmark, with a table beside each, made from it alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bench import records, timing
from bench.records import Ceilings, FigureFile
from glm52_jax import audit
from pallas_kernels.lowering import default_arch

AXIS = "devices"


def mesh_of(devices: int) -> Mesh:
    """The first ``devices`` devices; ValueError where there are fewer."""
    if jax.device_count() < devices:
        raise ValueError(f"{devices} devices are needed, JAX sees {jax.device_count()}: {jax.devices()}")
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def compiled(lowered: Any) -> tuple[Callable[..., Any], bool | None]:
    """(executable, whether it is exactly one command buffer); None where XLA dumps no thunks, as on CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        text = audit.dumped_thunks(Path(folder))
    return executable, None if text is None else audit.graph_of(text).whole


class Results:
    """Figures of one run on the devices of this machine, written as they come: what was kept stays if the time runs out."""

    def __init__(
        self,
        file: FigureFile[Any],
        folder: Path,
        table: Callable[[Sequence[Any]], list[str]],
        say: Callable[[str], None],
    ) -> None:
        """Brings all clocks up and measures the copy bandwidth of the first device, which is kept with the figures."""
        for device in jax.devices():
            with jax.default_device(device):
                timing.raise_clocks(0.3)
        arch = default_arch()
        self.copy = timing.copy_bandwidth(3)
        self.environment = records.environment(arch, Ceilings(self.copy, float("nan")))
        del self.environment["matmul_tflop_s"]  # Not measured here: it heats, and nothing here is bound by it.
        self.name = f"{self.environment['date']} {self.environment['sources']}"
        self._file, self._folder, self._table, self.say = file, folder / records.gpu_folder(arch), table, say

    def keep(self, devices: int, figures: Sequence[Any]) -> Path:
        """Merges figures of ``devices`` devices into their file and writes the table of all that it holds."""
        path = self._folder / f"x{devices}" / f"{self._file.name}.json"
        self._file.merge(path, figures, self.environment)
        runs, kept = self._file.read(path)
        path.with_suffix(".md").write_text("\n".join([*_head(self._file.name, devices, runs), *self._table(kept), ""]))
        return path


def _head(name: str, devices: int, runs: dict[str, Any]) -> list[str]:
    lines = [f"<!-- Written by python -m bench.{name} from {name}.json. -->"]
    for run in runs.values():
        smi, used = run["nvidia_smi"], run["versions"]
        packages = ", ".join(f"{package} {version}" for package, version in used.items() if package != "glm52-jax")
        lines.append(
            f"{devices} x {run['device_kind']}, driver {smi.get('driver_version', 'unknown')}; copy {run['copy_tb_s']:.2f} TB/s; "
            f"{packages}; revision {run['revision']}, sources {run['sources']}, {run['date']}"
        )
    return [*lines, ""]
