"""What a figure was measured on, and the JSON files that hold figures: one for each GPU and operation."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax

from pallas_kernels.arch import Arch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu,pstate"
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "numpy", "glm52-jax")


@dataclasses.dataclass(frozen=True)
class Record:
    """One figure.

    us: microseconds of one call, spread: (slowest - fastest round) / us. tb_s, tflop_s: bytes and flops of the call
    (what must move, what must be computed) over that time. bound_us: the larger of bytes over the copy bandwidth and flops
    over the matmul rate, both measured in the same run; bound: which of them. percent_of_bound: 100 * bound_us / us.
    against: other figure's microseconds / us by name (the reference and rivals): above 1 is faster than they are.
    run: key of the run's environment in the same file.
    """

    operation: str
    case: str
    rows: int
    backend: str
    reason: str
    spec: dict[str, Any]
    us: float
    spread: float
    calls: int
    l2: str
    bytes: int
    flops: int
    tb_s: float
    tflop_s: float
    bound: str
    bound_us: float
    percent_of_bound: float
    error: float
    tolerance: float
    rivals_us: dict[str, float]
    against: dict[str, float]
    run: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.operation, self.case, self.backend, self.rows)


class Keyed(Protocol):
    """A figure that a file holds, a dataclass: ``key`` says which older one it replaces, ``run`` where it was measured."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> Any: ...
    @property
    def run(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class FigureFile[Figure: Keyed]:
    """A kind of JSON file: figures in a list ``name``, the environments of their runs beside it. called: what errors say."""

    name: str
    figure: type[Figure]
    called: str

    def read(self, path: Path) -> tuple[dict[str, Any], list[Figure]]:
        """(environments by run, figures); ValueError names a file of another kind."""
        try:
            content = json.loads(path.read_text())
            return content["runs"], [self.figure(**figure) for figure in content[self.name]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} holds no {self.called} of this version: {error!r}. Remove it and run again"
            ) from error

    def merge(self, path: Path, figures: Sequence[Figure], run_environment: dict[str, Any]) -> Path:
        """Adds figures, each in place of the older one of its key; an environment leaves with its last figure."""
        path.parent.mkdir(parents=True, exist_ok=True)
        runs, old = self.read(path) if path.exists() else ({}, [])
        merged = {figure.key: figure for figure in [*old, *figures]}
        runs |= {figure.run: run_environment for figure in figures}
        kept = sorted(merged.values(), key=lambda figure: figure.key)
        content = {
            "runs": {run: runs[run] for run in sorted({figure.run for figure in kept})},
            self.name: [dataclasses.asdict(figure) for figure in kept],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


FILE = FigureFile("records", Record, "bench records")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """copy: bytes/s of a device-to-device copy; matmul: bf16 FLOP/s. Both measured in the run they are stored with."""

    copy: float
    matmul: float

    def bound(self, nbytes: int, flops: int, operand_bits: int = 16) -> tuple[str, float]:
        """Which ceiling binds, and its microseconds. 8-bit operands have twice the bf16 rate."""
        memory, compute = nbytes / self.copy * 1e6, flops / (self.matmul * 16 / operand_bits) * 1e6
        return ("memory", memory) if memory >= compute else ("compute", compute)

    def bound_of(self, spec: Any) -> tuple[str, float]:
        """``bound`` of one call, as an operation's spec counts it."""
        bits = spec.operand_bits() if hasattr(spec, "operand_bits") else 16
        return self.bound(int(spec.bytes()), int(spec.flops()), bits)


def provenance() -> dict[str, Any]:
    """What every record says of the run it comes from: now, on which device, with which versions and sources."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device_kind": jax.devices()[0].device_kind,
        "nvidia_smi": nvidia_smi(),
        "versions": versions(),
        "revision": revision(),
        "sources": sources(),
    }


def environment(arch: Arch | None, ceilings: Ceilings) -> dict[str, Any]:
    """GPU, driver, clocks, versions and revision of this run. Call it while the clocks are still up."""
    run = provenance()
    return {
        **run,
        "gpu": arch.name if arch else run["device_kind"],
        "copy_tb_s": round(ceilings.copy / 1e12, 4),
        "matmul_tflop_s": round(ceilings.matmul / 1e12, 1),
        "versions": {"python": platform.python_version(), **run["versions"]},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def nvidia_smi() -> dict[str, str]:
    """Name, driver, clocks (MHz), power (W), temperature (C) of the first GPU; empty where nvidia-smi is absent."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={_SMI}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode != 0:
        return {"error": (answer.stdout + answer.stderr).strip()[:200]}
    return dict(zip(_SMI.split(","), (value.strip() for value in answer.stdout.split(",")), strict=False))


def versions() -> dict[str, str]:
    """Versions of the installed packages that figures depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The git revision, with "+" where the working tree differs; GLM52_REVISION where there is no repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return os.environ.get("GLM52_REVISION", "unknown")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("GLM52_REVISION", "unknown")
    return head + ("+" if git("status", "--porcelain", "--", "pallas_kernels", "bench") else "")


def sources() -> str:
    """A digest of the kernels' sources: it identifies what ran also where git does not."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pallas_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def gpu_folder(arch: Arch | None) -> str:
    """The folder name of a GPU's results: "h200" for "H200-141", "rtx-4090" for "RTX 4090"."""
    name = arch.name if arch else jax.devices()[0].device_kind
    stem, _, size = name.rpartition("-")
    return (stem if stem and size.isdigit() else name).lower().replace("nvidia", "").strip().replace(" ", "-")


def save(folder: Path, records: list[Record], run_environment: dict[str, Any]) -> list[Path]:
    """Merges records into ``folder/<operation>.json``: a new figure replaces the old one of its case, backend and rows."""
    return [
        FILE.merge(folder / f"{operation}.json", [r for r in records if r.operation == operation], run_environment)
        for operation in sorted({record.operation for record in records})
    ]


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Returns (environments by run, records) of one file; ValueError names a file that is not one of ours."""
    return FILE.read(path)
