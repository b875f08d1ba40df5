"""A long prompt through the kernels into the caches: ``python -m bench prompt [--tokens 32768]``, on one GPU.

Real widths, synthetic weights, the first layers of GLM-5.2; ``prefill.prefill`` as ``generate`` calls it, from prompt to first
token. us is the faster of two runs after one that compiled. The bound adds up, call for call, the larger of bytes over the copy
bandwidth and flops over the matmul rate, as the operations' specs count them. A prompt whose first token had logits that were not
finite is not reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from bench import records, step
from bench.records import Ceilings, FigureFile
from bench.session import Session
from bench.step_model import StepSpec, glm52, make_weights
from glm52_jax import prefill
from glm52_jax.program import fault
from glm52_jax.sampling import Sampling
from pallas_kernels import registry
from pallas_kernels.registry import Choice


@dataclasses.dataclass(frozen=True)
class Figure:
    """One prompt. us: of all of it; chunk: tokens of one call; peak_bytes: of the device, weights and caches included."""

    case: str
    tokens: int
    chunk: int
    us: float
    tokens_s: float
    bound_us: float
    percent_of_bound: float
    compile_s: float
    weight_bytes: int
    peak_bytes: int | None
    backends: dict[str, str]
    run: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return (self.case, self.tokens)


FILE = FigureFile("prompts", Figure, "figures of prompts")
NAME = "prompt.json"


def bound(choices: list[Choice], calls: int, ceilings: Ceilings) -> float:
    """Microseconds of ``calls`` calls of a program whose trace made these choices."""
    total = 0.0
    for choice in choices:
        spec = choice.spec
        if not choice.inside and hasattr(spec, "bytes") and hasattr(spec, "flops"):
            total += ceilings.bound_of(spec)[1]
    return calls * total


def measure(spec: StepSpec, tokens: int, ceilings: Ceilings, run: str = "") -> Figure:
    """One prompt of that many random tokens; FloatingPointError where its first token has no finite logits."""
    weights = jax.block_until_ready(make_weights(spec.shapes()))
    prompt = np.random.default_rng(0).integers(0, spec.config.vocab_size, tokens).astype(np.int32)
    pages = prefill.pages_of(tokens + 1)
    seconds, choices = [], []
    for _ in range(3):
        start = time.perf_counter()
        with registry.recorded() as traced:
            state = prefill.prefill(weights, spec.config, spec.plan, [prompt], pages, Sampling(temperature=0.0))
            jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        choices += traced
        (drawn,) = np.asarray(state.drawn).ravel()
        if wrong := fault(int(drawn)):
            raise FloatingPointError(f"the logits behind {tokens} tokens hold {wrong}")
        del state
    us, chunk = 1e6 * min(seconds[1:]), prefill.chunk_width(tokens, 1)
    limit = bound(choices, -(-tokens // chunk), ceilings)
    stats = jax.devices()[0].memory_stats() or {}
    return Figure(
        case=spec.name, tokens=tokens, chunk=chunk, us=round(us, 1), tokens_s=round(tokens / us * 1e6, 1),
        bound_us=round(limit, 1), percent_of_bound=round(100 * limit / us, 1),
        compile_s=round(seconds[0] - us / 1e6, 1), weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        peak_bytes=stats.get("peak_bytes_in_use"), backends=step.backends(choices), run=run,
    )  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    command.add_argument("--tokens", type=int, default=32768, help="of the prompt (default %(default)s)")
    command.add_argument("--layers", type=int, default=5, help="of GLM-5.2's, from the first (default %(default)s)")
    command.add_argument("--linear", default="w8a16", choices=("w8a16", "w8a8"), help="default %(default)s")
    command.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")


def run(options: argparse.Namespace, session: Session) -> int:
    """Times, prints and records; the exit status."""
    spec = StepSpec(glm52(options.layers), rows=1, context=options.tokens, linear=options.linear)
    try:
        figure = measure(spec, options.tokens, session.ceilings, session.name)
    except FloatingPointError as error:
        session.refuse(str(error))
        return session.status()
    peak = "" if figure.peak_bytes is None else f", peak {figure.peak_bytes / 2**30:.1f} GiB"
    session.say(
        f"{figure.case}, prompt of {figure.tokens} in chunks of {figure.chunk}: {figure.us / 1e3:.1f} ms, "
        f"{figure.tokens_s:.0f} tok/s, bound {figure.bound_us / 1e3:.1f} ms ({figure.percent_of_bound:.0f} %), weights "
        f"{figure.weight_bytes / 2**30:.1f} GiB{peak}, compiled in {figure.compile_s:.0f} s, {figure.backends}"
    )
    FILE.merge(session.folder / "step" / NAME, [figure], session.environment)
    return session.status()
