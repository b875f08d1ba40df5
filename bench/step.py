"""The whole decode step, timed: the executable that ``generate`` runs, at real shapes with synthetic weights.

How, for each figure:
  step       ``program.step`` queued again and again, waited for once a round: the median over rounds, as ``bench.timing`` does it.
             Positions go back to the context before each round, in place.
  p50, p99   between the arrivals of tokens at a host that reads them two steps late, which is what a user sees.
  dispatch   what one ``step`` and the start of its token's copy take on the host's thread, median.
  bound      bytes of the operations' specs over the measured copy bandwidth: every weight of the actual layout once, of the
             routed experts as many as random choices are expected to hit, and the caches. ``step_model`` says why that is so.
  stages     ``bench.step_kernels``: every kernel of the step, from a profile of its graph, and the GPU's time of that graph, from
             its first kernel to the end of its last: a step that takes much longer waits for the host.
  graph      ``glm52_jax.audit``.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import step_kernels, timing
from bench.step_kernels import Kernel, Profile
from bench.step_model import StepSpec, make_state, make_weights, rewound
from glm52_jax import audit
from glm52_jax.program import DecodeProgram, State
from glm52_jax.weights import Weights
from pallas_kernels import experts, mla_out
from pallas_kernels.registry import Choice

# Steps that the host is behind when it reads a token.
LAG = 2
# Steps of a round. It begins with an idle GPU that waits for the first one to be queued, which is 1 % of so many.
QUEUED = 64
_NO_PROFILE = Profile()


@dataclasses.dataclass(frozen=True)
class Step:
    """One figure. us: a step, spread: (slowest - fastest round) / us; p50_us, p99_us, dispatch_us: see above.

    bytes: of one step and device; bound_us: over the copy bandwidth; tokens_s: of all sequences; compile_s: tracing and compiling;
    backends: operation -> backends that served it; stages_us: stage -> microseconds, adding up to us, and kernels: what they are
    the sums of; graph_us: the GPU's time of the graph; graph: what the audit found; all empty or 0 where not asked for.
    """

    case: str
    rows: int
    context: int
    us: float
    spread: float
    p50_us: float
    p99_us: float
    dispatch_us: float
    tokens_s: float
    bytes: int
    bound_us: float
    percent_of_bound: float
    experts_hit: float
    compile_s: float
    backends: dict[str, str]
    stages_us: dict[str, float]
    run: str = ""
    graph: str = ""
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    graph_us: float = 0.0

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.case, self.rows, self.context)


class Steps(timing.Repeat):
    """A program's steps as something to time: each round begins at the spec's context."""

    def __init__(self, spec: StepSpec, program: DecodeProgram, state: State) -> None:
        super().__init__(program.step, state, 1)
        self.spec, self.program = spec, program

    @property
    def state(self) -> State:
        """Where the last round ended."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state

    def run(self, steps: int) -> float:
        """Seconds of so many steps, in proportion where the last call has more of them."""
        calls = -(-steps // self.spec.burst)
        state = self._begin(calls * self.spec.burst)
        start = time.perf_counter()
        for _ in range(calls):
            state = self.program.step(state)
        jax.block_until_ready(state.arrays.tokens)
        elapsed = time.perf_counter() - start
        self._state = state
        return elapsed * steps / (calls * self.spec.burst)

    def warm_up(self, round_seconds: float = 0.1) -> None:
        super().warm_up(round_seconds)
        self.in_flight = min(QUEUED, self.spec.room)

    def paced(self, steps: int) -> tuple[list[float], list[float]]:
        """Microseconds a step between arrivals of tokens, and of queueing it, while the host reads ``LAG`` calls late."""
        state, burst = self._begin(steps), self.spec.burst
        arrivals, queueing, waiting = [], [], deque[jax.Array]()
        for _ in range(steps // burst):
            start = time.perf_counter()
            state = self.program.step(state)
            waiting.append(self.program.copied(state))
            queueing.append((time.perf_counter() - start) * 1e6 / burst)
            if len(waiting) > LAG:
                np.asarray(waiting.popleft())
                arrivals.append(time.perf_counter() * 1e6 / burst)
        jax.block_until_ready(state.arrays.tokens)
        self._state = state
        # The first arrivals wait for a queue that is still filling.
        return list(np.diff(arrivals[LAG:])), queueing[LAG:]

    def _begin(self, steps: int) -> State:
        if steps > self.spec.room:
            raise ValueError(f"{steps=} do not fit behind {self.spec.context} tokens: {self.spec.room=}")
        arrays = self.program.release(self._state)
        positions = rewound(arrays.positions, self.spec.context)
        jax.block_until_ready(positions)
        return self.program.adopt(arrays.replace(positions=positions))  # type: ignore[attr-defined]


def moved_bytes(spec: StepSpec, choices: Sequence[Choice]) -> int:
    """Bytes that a step must move on one device, summed over the calls of its trace."""
    total = 0
    for choice in choices:
        call = choice.spec
        if choice.inside or not hasattr(call, "bytes"):
            continue  # Part of the call around it, or an exchange, which moves next to nothing through memory.
        if isinstance(call, experts.Spec):
            call = dataclasses.replace(call, distinct=max(1, round(spec.experts_hit())))
        elif isinstance(call, mla_out.Spec):
            call = dataclasses.replace(call, parts=0)  # What attention passes on in parts need not be in parts.
        total += call.bytes()
    return total


def backends(choices: Sequence[Choice]) -> dict[str, str]:
    """Operation -> its backends, in the order of their first calls."""
    found: dict[str, dict[str, None]] = {}
    for choice in choices:
        found.setdefault(choice.operation, {})[choice.backend] = None
    return {operation: ", ".join(names) for operation, names in found.items()}


@dataclasses.dataclass
class Prepared:
    """A spec's program in the middle of its sequences."""

    spec: StepSpec
    steps: Steps
    compile_s: float


def prepare(spec: StepSpec, weights: Weights, dump: Any = None) -> Prepared:
    """Compiles a spec's program and fills its caches."""
    start = time.perf_counter()
    program = DecodeProgram(weights, spec.config, spec.plan, spec.rows, spec.pages, dump=dump, burst=spec.burst)
    compile_s = time.perf_counter() - start
    return Prepared(spec, Steps(spec, program, make_state(program, spec.context)), compile_s)


def result(
    prepared: Prepared,
    taken: timing.Timing,
    copy: float,
    found: Profile = _NO_PROFILE,
    graph: str = "",
    run: str = "",
) -> Step:
    """The figure of a timing; copy: bytes/s; found: of ``step_kernels.profiled``. Paces the program's steps."""
    spec, steps = prepared.spec, prepared.steps
    between, queueing = steps.paced(spec.room)
    nbytes = moved_bytes(spec, steps.program.choices)
    bound = nbytes / copy * 1e6
    p50, p99 = (float(np.percentile(between, q)) for q in (50, 99))
    return Step(
        case=spec.name, rows=spec.rows, context=spec.context, us=round(taken.microseconds, 2),
        spread=round(taken.spread, 4), p50_us=round(p50, 2), p99_us=round(p99, 2),
        dispatch_us=round(statistics.median(queueing), 2), tokens_s=round(spec.rows / taken.microseconds * 1e6, 1),
        bytes=nbytes, bound_us=round(bound, 2), percent_of_bound=round(100 * bound / taken.microseconds, 1),
        experts_hit=round(spec.experts_hit(), 1), compile_s=round(prepared.compile_s, 1),
        backends=backends(steps.program.choices),
        stages_us=step_kernels.stages(found, taken.microseconds), run=run, graph=graph,
        kernels=[dataclasses.asdict(kernel) for kernel in found.kernels], graph_us=found.graph_us,
    )  # fmt: skip


def audited(prepared: Prepared, steps: int = 64) -> str:
    """What the audit says of a program, which goes on from where it stopped."""
    spec, runs = prepared.spec, prepared.steps
    found, runs.state = audit.audit(runs.program, runs.state, min(steps, spec.room // spec.burst))
    return str(found)


def split(steps: Steps, say: Callable[[str], None]) -> Profile:
    """``step_kernels.profiled``; where it finds something else than the steps it says so, and the time stands without its parts."""
    try:
        return step_kernels.profiled(steps)
    except ValueError as error:
        say(f"no stages: {error}")
        return _NO_PROFILE


def sweep(
    base: StepSpec,
    batches: Sequence[int],
    contexts: Sequence[int],
    copy: float,
    *,
    rounds: int = 7,
    stages: bool = False,
    audits: bool = False,
    run: str = "",
    say: Callable[[str], None] = print,
    keep: Callable[[Step], None] = lambda figure: None,
) -> list[Step]:
    """Figures of every batch and context with the same weights; ``keep`` gets each as it comes.

    stages: split the step too; audits: look at its graph.
    """
    weights = jax.block_until_ready(make_weights(base.shapes()))
    say(f"{base.name}: weights made")
    figures = []
    for rows in batches:
        for context in contexts:
            with tempfile.TemporaryDirectory() as folder:
                dump = Path(folder) if audits else None
                prepared = prepare(dataclasses.replace(base, rows=rows, context=context), weights, dump)
                say(f"batch {rows}, context {context}: compiled in {prepared.compile_s:.0f} s")
                graph = audited(prepared) if audits else ""
            (taken,) = timing.measure([prepared.steps], rounds)
            found = split(prepared.steps, say) if stages else _NO_PROFILE
            figure = result(prepared, taken, copy, found, graph, run)
            say(line(figure))
            keep(figure)
            figures.append(figure)
            del prepared
            gc.collect()  # Caches of the last case: two do not always fit.
    return figures


def compare(
    first: StepSpec, second: StepSpec, copy: float, rounds: int = 7, say: Callable[[str], None] = print
) -> tuple[Step, Step]:
    """Two plans of one model interleaved, round by round, on the same weights; ValueError where they need different ones."""
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), spec.shapes()) for spec in (first, second)]
    if shapes[0] != shapes[1] or first.plan.parallel != second.plan.parallel:
        raise ValueError(f"{first.name} and {second.name} do not share their weights: compare plans of one model")
    weights = make_weights(first.shapes())
    prepared = [prepare(spec, weights) for spec in (first, second)]
    taken = timing.measure([one.steps for one in prepared], rounds)
    a, b = (result(one, one_taken, copy) for one, one_taken in zip(prepared, taken, strict=True))
    for figure in (a, b):
        say(line(figure))
    say(f"second / first: {b.us / a.us:.4f}")
    return a, b


def line(figure: Step) -> str:
    """A line for a person, and one for each stage and kernel, and for the audit."""
    split = "".join(f"\n    {name:16} {us / 1e3:8.3f} ms" for name, us in figure.stages_us.items())
    return (
        f"{figure.case}, batch {figure.rows}, context {figure.context}: {figure.us / 1e3:.3f} ms "
        f"+-{100 * figure.spread:.1f}%, p50 {figure.p50_us / 1e3:.3f}, p99 {figure.p99_us / 1e3:.3f}, "
        f"{figure.tokens_s:.0f} tok/s, bound {figure.bound_us / 1e3:.3f} ms ({figure.percent_of_bound:.0f} %), "
        f"dispatch {figure.dispatch_us:.0f} us, compiled in {figure.compile_s:.0f} s"
        + (f", the GPU's time of the graph {figure.graph_us / 1e3:.3f} ms" if figure.graph_us else "")
        + split
        + "".join(f"\n{text}" for text in step_kernels.lines([Kernel(**kernel) for kernel in figure.kernels]))
        + (f"\n    audit {figure.graph}" if figure.graph else "")
    )
