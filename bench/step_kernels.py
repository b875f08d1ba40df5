"""Where a step's time goes: every kernel of the replayed graph, timed by the profiler, under the operation that launched it.

XLA's profiler reports the kernels of a CUDA graph by name and time, but not which instruction each belongs to. Our kernels are
custom calls, which run in the order of the compiled program: the n-th launch is the n-th call, whose scope says layer, stage and
operation. XLA's own kernels carry their fusion's name. What is left of the step's time, measured without the profiler, lies between
kernels.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

BETWEEN = "between kernels"
OTHER = "rest"
# Stages in the order in which they are told, and the scopes that mean them: of a path, the last that is known.
STAGES = {
    **{"attention": "attention", "indexer": "indexer", "dense": "dense", "router": "router", "experts": "experts"},
    **{"collectives": "collectives", "head": "head", "sample_logits": "sampling"},
}
_OURS = ("mosaic_gpu_v2", "triton_kernel_call_ffi", "triton_kernel_call")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(?[a-z0-9]+\[[\d,]*\]).*? (fusion|custom-call)\(")
_OPERATION = re.compile(r"^([a-z_0-9]+)\.(?:triton|gluon|mosaic\w*|reference)$")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch in a program. ours: one of this repository's; else a fusion of XLA's, by its kernel's name."""

    stage: str
    what: str
    ours: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of a step that are alike. us: of a step, together."""

    stage: str
    what: str
    kernel: str
    launches: int
    us: float


def launches(hlo: str) -> tuple[list[Launch], dict[str, Launch]]:
    """(our custom calls in the order in which they run, XLA's kernels by name) of an optimized, scheduled module."""
    ours, fusions = [], {}
    for line in hlo.partition("\nENTRY ")[2].splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        scope = re.search(r'metadata=\{op_name="([^"]*)"', line)
        launch = _launch(scope[1] if scope else "", found[2].lstrip("("))
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if target is None:
            fusions[found[1].replace(".", "_").replace("-", "_")] = dataclasses.replace(launch, ours=False)
        elif target[1] in _OURS:
            ours.append(launch)
    return ours, fusions


def _launch(scope: str, shape: str) -> Launch:
    parts = scope.split("/")
    operations = [found[1] for part in parts if (found := _OPERATION.match(part))]
    known = [STAGES[name] for part in parts if (name := part.partition(".")[0]) in STAGES]
    return Launch(known[-1] if known else OTHER, f"{'/'.join(operations)} {shape}".strip(), True)


def kernels(events: Sequence[tuple[int, str, float]], hlo: str, steps: int) -> list[Kernel]:
    """Kernels of a step from (start, name, microseconds) of everything that ran in ``steps`` of them.

    ValueError where the launches of our kernels are not those of the program.
    """
    ours, fusions = launches(hlo)
    called: list[tuple[str, float]] = []
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _, name, us in sorted(events):
        if _is_ours(name):
            called.append((name, us))
        else:
            launch = fusions.get(name, Launch(OTHER, "", False))
            times[launch.stage, launch.what, name].append(us)
    if len(called) != steps * len(ours):
        names = ", ".join(dict.fromkeys(name for name, _ in called))
        raise ValueError(f"{len(called)} launches in {steps} steps of {len(ours)} calls of our kernels: {names}")
    for number, (name, us) in enumerate(called):
        launch = ours[number % len(ours)]
        times[launch.stage, launch.what, name].append(us)
    order = [*STAGES.values(), OTHER]
    found = [Kernel(*key, round(len(us) / steps), round(sum(us) / steps, 3)) for key, us in times.items()]
    return sorted(found, key=lambda kernel: (order.index(kernel.stage), -kernel.us))


def _is_ours(name: str) -> bool:
    """Whether a kernel is one of this repository's, whose functions are all called so; libraries' are templates."""
    return re.fullmatch(r"[a-z][a-z0-9_]*_kernel", name) is not None


def stages(found: Sequence[Kernel], step_us: float) -> dict[str, float]:
    """Microseconds of each stage that a step has, and of what lies between kernels: they add up to ``step_us``."""
    sums: dict[str, float] = {}
    for kernel in found:
        sums[kernel.stage] = sums.get(kernel.stage, 0.0) + kernel.us
    return {**{name: round(us, 2) for name, us in sums.items()}, BETWEEN: round(step_us - sum(sums.values()), 2)}


def profiled(steps: Any, count: int = 4) -> tuple[list[Kernel], float]:
    """(kernels of a step of ``bench.step.Steps``, microseconds of its graph), from ``count`` steps under the profiler.

    Of several GPUs it is the first one's. ValueError where the profile does not hold those steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps.run(count)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    hlo = steps.program.executable.as_text()
    module = re.search(r"^HloModule ([\w.-]+)", hlo)
    events = events_of(data, module[1] if module else "")
    return kernels(events, hlo, count), graph_us(events, count)


def graph_us(events: Sequence[tuple[int, str, float]], steps: int) -> float:
    """Microseconds from the start of a step's first kernel to the end of its last one, median over the steps."""
    ordered, each = sorted(events), len(events) // steps
    spans = []
    for i in range(0, each * steps, each):
        own = ordered[i : i + each]
        spans.append(max(start / 1e3 + us for start, _, us in own) - own[0][0] / 1e3)
    return round(statistics.median(spans), 2)


def events_of(data: Any, module: str) -> list[tuple[int, str, float]]:
    """(start in ns, name, microseconds) of the first GPU's kernels of that module; what rewinds positions is another one."""
    found = []
    with warnings.catch_warnings():
        # Of JAX 0.11.2's bindings; where warnings are errors, it would end the process.
        warnings.filterwarnings("ignore", "builtin type event_stats has no __module__", DeprecationWarning)
        for plane in data.planes:
            lines = plane.lines if plane.name == "/device:GPU:0" else ()
            for event in (event for line in lines for event in line.events):
                of = next((str(value) for name, value in event.stats if name == "hlo_module"), "")
                if of == module:
                    found.append((int(event.start_ns), event.name, event.duration_ns / 1e3))
    return found


def lines(found: Sequence[Kernel]) -> list[str]:
    """A line for each kernel: stage, launches, microseconds of one and of all, operation and name."""
    return [
        f"    {k.stage:12} {k.launches:4d} x {k.us / k.launches:7.2f} = {k.us:9.1f} us  {k.what or '-':44} {k.kernel}"
        for k in found
    ]
