"""Where a step's time goes: every kernel of the replayed graph, timed by the profiler, under the operation that launched it.

XLA's profiler reports the kernels of a CUDA graph by name and time, but not which instruction each belongs to. Our kernels are
custom calls: the n-th launch of a name is the n-th call of it in the compiled program, whose scope says layer, stage and operation
(two of one name that run side by side may be taken for each other). XLA's own kernels carry their fusion's name. What is left of
the step's time, measured without the profiler, lies between kernels.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench.step_launches import OTHER, STAGES, Launch, launches

BETWEEN, BESIDE = "between kernels", "side by side"
# (start in ns, name, microseconds) of everything that ran.
type Events = Sequence[tuple[int, str, float]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of a step that are alike. us: of a step, together."""

    stage: str
    what: str
    kernel: str
    launches: int
    us: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of a step: its kernels, the GPU's time of its graph, and how much of that at least one kernel was running."""

    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    graph_us: float = 0.0
    busy_us: float = 0.0


def kernels(events: Events, hlo: str, steps: int) -> list[Kernel]:
    """Kernels of a step from everything that ran in ``steps`` of them.

    ValueError where the launches of our kernels are not those of the program.
    """
    ours, fusions = launches(hlo)
    calls: dict[str, list[Launch]] = defaultdict(list)
    for launch in ours:
        calls[launch.kernel].append(launch)
    seen: Counter[str] = Counter()
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _, name, us in sorted(events):
        if _is_ours(name):
            same = calls.get(name)
            launch = same[seen[name] % len(same)] if same else Launch(OTHER, "", name)
            seen[name] += 1
        else:
            launch = fusions.get(name, Launch(OTHER, ""))
        times[launch.stage, launch.what, name].append(us)
    wanted = {name: steps * len(same) for name, same in calls.items()}
    wrong = [
        f"{name} {seen[name]} times, not {wanted.get(name, 0)}"
        for name in wanted | seen
        if seen[name] != wanted.get(name, 0)
    ]
    if wrong:
        raise ValueError(f"a profile of {steps} steps has {', '.join(wrong)}")
    order = [*STAGES.values(), OTHER]
    found = [Kernel(*key, round(len(us) / steps), round(sum(us) / steps, 3)) for key, us in times.items()]
    return sorted(found, key=lambda kernel: (order.index(kernel.stage), -kernel.us))


def _is_ours(name: str) -> bool:
    """Whether a kernel is one of this repository's, whose functions are all called so; libraries' are templates."""
    return re.fullmatch(r"[a-z][a-z0-9_]*_kernel", name) is not None


def stages(profile: Profile, step_us: float) -> dict[str, float]:
    """Microseconds of each stage that a step has, and of what lies between kernels; nothing without a profile.

    What runs beside something else counts in both stages and is taken off again as "side by side": all add up to ``step_us``.
    """
    sums: dict[str, float] = {}
    for kernel in profile.kernels:
        sums[kernel.stage] = sums.get(kernel.stage, 0.0) + kernel.us
    if not sums:
        return {}
    beside = profile.busy_us - sum(sums.values())
    told = {**sums, **({BESIDE: beside} if beside < -0.005 else {})}
    return {name: round(us, 2) for name, us in {**told, BETWEEN: step_us - sum(told.values())}.items()}


def profiled(steps: Any, count: int = 4) -> Profile:
    """``count`` steps of ``bench.step.Steps`` under the profiler; of several GPUs the first one's.

    ValueError where the profile does not hold those steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps.run(count)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    hlo = steps.program.executable.as_text()
    module = re.search(r"^HloModule ([\w.-]+)", hlo)
    events = events_of(data, module[1] if module else "")
    return Profile(kernels(events, hlo, count), graph_us(events, count), busy_us(events, count))


def busy_us(events: Events, steps: int) -> float:
    """Microseconds of a step in which at least one kernel ran."""
    total = until = 0.0
    for start, _, us in sorted(events):
        begin, end = start / 1e3, start / 1e3 + us
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return round(total / steps, 3)


def graph_us(events: Events, steps: int) -> float:
    """Microseconds from the start of a step's first kernel to the end of its last one, median over the steps."""
    ordered, each = sorted(events), len(events) // steps
    spans = []
    for i in range(0, each * steps, each):
        own = ordered[i : i + each]
        spans.append(max(start / 1e3 + us for start, _, us in own) - own[0][0] / 1e3)
    return round(statistics.median(spans), 2)


def events_of(data: Any, module: str) -> Events:
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
