"""One sparse layer with its attention on several GPUs, in each way to share it: ``python -m bench.moe_layer``.

GLM-5.2's widths, synthetic weights made where they lie, a layer that shares its selection, FP8 caches of 4096 tokens. Two layers
are a graph with its exchanges over peer pointers that is replayed in a loop (``bench.collectives`` says why). Beside the layer
stand its experts with the exchanges around them and without: the difference is what dispatch and combine cost. ``layer-unrolled``
is the layer in a program without the loop, as a decode step has it today: the host's part shows in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from bench import records, several, step, step_model, timing
from bench.layer import _NO_INDEXER
from bench.records import FigureFile
from bench.step_model import StepSpec
from glm52_jax import exchange, model, parallel
from glm52_jax.cache import Cache, Selection, make_rows
from glm52_jax.layers.attention import add_attention
from glm52_jax.layers.moe import mixed
from pallas_kernels import paged, registry
from pallas_kernels.compare import rel_l2
from pallas_kernels.lowering import default_arch
from pallas_kernels.parts import whole

LAYER, UNROLLED, EXPERTS, AROUND = "layer", "layer-unrolled", "experts", "experts+exchange"
PARTS = (LAYER, UNROLLED, EXPERTS, AROUND)
CASES = "tp:1,ep:1,ep:64,ep+dp:64"
TARGETS = {(LAYER, "tp", 4, 1): 80.0}
# Layers in a graph, and replays of it in a run.
CALLS, REPLAYS = 2, 8
# Of the layer's outputs with exchanges over peer pointers against XLA's: roundings of sums in another order.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Figure:
    """One part of a layer. bytes: what a device must read and write; bound_us: over the copy bandwidth; error: with peer pointers
    against XLA's collectives, relative L2; whole: whether the program is one graph; backends: operation -> who served it."""

    part: str
    mode: str
    devices: int
    rows: int
    us: float
    spread: float
    calls: int
    bytes: int
    bound_us: float
    error: float
    whole: bool | None
    target_us: float | None
    backends: dict[str, str]
    run: str = ""

    @property
    def key(self) -> tuple[str, str, int, int]:
        return (self.part, self.mode, self.devices, self.rows)


FILE = FigureFile("moe_layer", Figure, "figures of sparse layers")


def spec_of(mode: str, devices: int, rows: int, **sizes: Any) -> StepSpec:
    """Two sparse layers; sizes: of the config, instead of GLM-5.2's. The vocabulary plays no part."""
    config = dataclasses.replace(
        step_model.glm52(2),
        **{"mlp_layer_types": ("sparse",) * 2, "indexer_types": ("full", "shared"), "vocab_size": 1024},
    )
    return StepSpec(dataclasses.replace(config, **sizes), rows, mode=mode, devices=devices)


def make_weights(spec: StepSpec) -> Any:
    """As ``step_model.make_weights`` makes them, in one program: every number is a hash of its place."""
    shapes = spec.shapes()
    named, tree = jax.tree.flatten_with_path(shapes)

    def make() -> list[jax.Array]:
        return [_leaf(jax.tree_util.keystr(p, simple=True, separator="."), i, a) for i, (p, a) in enumerate(named)]

    made = jax.jit(make, out_shardings=[a.sharding for _, a in named])()
    return jax.tree.unflatten(tree, made)


def _leaf(name: str, number: int, shape: Any) -> jax.Array:
    bits = step_model.hashed(shape.shape, jnp.uint32(number * 2654435761 % 2**32))
    columns = shape.shape[-1]
    gain = step_model.SMALL if any(part in name for part in step_model.INTO_THE_STREAM) else 1.0
    if shape.dtype == jnp.float8_e4m3fn:
        kind, gain = "bits", 1.0
    elif name.endswith("scale"):
        kind, gain = "scale", gain * (128 * columns) ** -0.5 / step_model.E4M3_DEVIATION
    elif name.endswith(("norm", "bias")):
        kind, gain = "norm" if name.endswith("norm") else "zero", 1.0
    else:
        kind, gain = "matrix", gain * columns**-0.5
    return step_model.numbers(kind, gain, bits).astype(shape.dtype)


def make_state(spec: StepSpec) -> tuple[Any, Any]:
    """((residual [rows, hidden], latents), (table, selection)): each row is a sequence in the middle of its context."""
    plan, config = spec.plan, spec.config
    batch, pages = parallel.batch_spec(plan), parallel.cache_spec(plan)
    each = spec.rows // parallel.sequences(1, plan)
    own = np.arange(spec.rows, dtype=np.int32)[:, None] % each
    table = own * spec.pages + np.arange(spec.pages, dtype=np.int32)
    # Distinct positions: an odd stride walks through all of a power of two.
    k = min(config.index_topk, spec.context)
    positions = (np.arange(k, dtype=np.int32) * 677 + 31 * np.arange(spec.rows, dtype=np.int32)[:, None]) % spec.context
    selection = Selection(positions[:, None, :], (own * spec.pages * paged.PAGE + positions)[:, None, :])  # type: ignore[arg-type]
    x = np.random.default_rng(0).normal(size=(spec.rows, config.hidden_size)).astype(plan.activation)

    def latents() -> jax.Array:
        shape = (config.num_hidden_layers, spec.rows * spec.pages, paged.PAGE, config.latent_dim)
        values = jax.random.normal(jax.random.key(1), shape, jnp.float32)
        return paged.pack_latent(
            values[..., : config.kv_lora_rank], values[..., config.kv_lora_rank :], jnp.dtype("uint8")
        )

    assert plan.parallel is not None
    latent = jax.jit(latents, out_shardings=NamedSharding(plan.parallel.mesh, pages))()
    return (parallel.place(x, plan, batch), latent), parallel.place((table, selection), plan, batch)


type Carry = tuple[jax.Array, jax.Array]


def layers(spec: StepSpec, weights: Any, fixed: Any, carry: Carry) -> Carry:
    """All layers on one device; carry: residual stream, latents."""
    (table, selection), (x, latent) = fixed, carry
    plan, config = spec.plan, spec.config
    mailbox = model.new_mailbox(weights, x.shape[0], config, plan)
    last = jnp.full((x.shape[0],), spec.context - 1, jnp.int32)
    rows = make_rows(config, table, last, jnp.ones_like(last), 1)
    cache, delta = Cache(latent, jnp.zeros((0,), jnp.uint8)), None
    for layer in range(CALLS):
        given = (weights.attention, layer, _NO_INDEXER, None, x, delta, cache, rows, selection, config, plan)
        x, out, cache, _ = add_attention(*given)
        x, delta, _, mailbox = model.add_mlp(weights, layer, x, out, mailbox, config, plan)
    return (x if delta is None else x + whole(delta, x.dtype)), cache.latent


def experts(spec: StepSpec, weights: Any, carry: Carry, exchanged: bool) -> Carry:
    """The experts of all layers on one device, with the exchanges around them or without: then it meets all rows from the start."""
    x, latent = carry
    share = spec.plan.parallel
    assert share is not None
    mailbox = model.new_mailbox(weights, x.shape[0], spec.config, spec.plan)
    given = jnp.tile(x, (share.devices, 1)) if share.own_sequences and not exchanged else x
    for layer in range(CALLS):

        def run(rows: jax.Array, layer: int = layer) -> tuple[jax.Array, jax.Array]:
            nonlocal mailbox
            assert mailbox is not None
            out, chosen, mailbox = mixed(weights.moe, layer, rows, mailbox, spec.config, spec.plan)
            return out, chosen

        out, _ = model.mlp_sum(run, given, spec.plan) if exchanged else run(given)
        given = given + out
    return given[: x.shape[0]], latent


def part_of(spec: StepSpec, part: str, replays: int, loop: bool) -> Callable[[Any, Any], Any]:
    """(weights and fixed, state) -> state: ``replays`` times that part of all layers, on all devices, in a loop or one by one."""
    plan, config = spec.plan, spec.config

    def run(weights: Any, fixed: Any, x: jax.Array, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        def some(carry: Carry) -> Carry:
            if part in (LAYER, UNROLLED):
                return layers(spec, weights, fixed, carry)
            return experts(spec, weights, carry, part == AROUND)

        return parallel.repeated(some, (x, latent), replays, loop)

    batch, pages = parallel.batch_spec(plan), parallel.cache_spec(plan)
    inputs = (parallel.weight_specs(config, False, plan), batch, batch, pages)
    spread = parallel.spread(run, plan.parallel, inputs, (batch, pages))
    return lambda given, state: spread(*given, *state)


class Part:
    """A part of the layer as programs: what is timed, and two layers with peer pointers and with XLA's collectives."""

    def __init__(self, spec: StepSpec, part: str, given: Any, state: Any) -> None:
        self.spec, self.part = spec, part
        share = spec.plan.parallel
        self._chain = exchange.Lowered(part_of(spec, part, REPLAYS, part != UNROLLED), share, given, state)
        with registry.recorded() as found:
            self._two = exchange.Lowered(part_of(spec, part, 1, False), share, given, state)
        self.choices = list(found)
        self._xla = jax.jit(part_of(spec, part, 1, False)).lower(given, state)

    def compile(self) -> Part:
        """Returns itself; may run in any thread."""
        self.chain, self.xla = self._chain.compile(), self._xla.compile()
        self.two, self.whole = several.compiled(self._two)
        return self

    def error(self, given: Any, state: Any) -> float:
        """Of what two layers add to the stream, against XLA's collectives; the bits of whole results must agree on all devices."""
        x, _ = self.two(given, jax.tree.map(jnp.copy, state))
        want, _ = self.xla(given, state)
        if x.sharding.is_fully_replicated:
            parts = [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]
            if self.part != EXPERTS and len(set(parts)) != 1:
                return float("inf")
        before, after, wanted = (np.asarray(a).astype(np.float32) for a in (state[0], x, want))
        return float(rel_l2(after - before, wanted - before))

    def repeat(self, given: Any, state: Any) -> timing.Repeat:
        own = jax.tree.map(jnp.copy, state)
        return timing.Repeat(lambda current: self.chain(given, current), own, CALLS * REPLAYS)


def measure(
    spec: StepSpec, weights: Any, parts: Sequence[str], copy: float, rounds: int, round_seconds: float = 0.05
) -> list[Figure]:
    """Checks and times parts of one layer, interleaved."""
    state, fixed = make_state(spec)
    given = (weights, fixed)
    with ThreadPoolExecutor(len(parts)) as pool:
        made = [pool.submit(Part(spec, part, given, state).compile) for part in parts]
        programs = [one.result() for one in made]
    errors = [program.error(given, state) for program in programs]
    timings = timing.measure([program.repeat(given, state) for program in programs], rounds, round_seconds)
    peers = exchange.of(spec.plan.parallel)
    if peers is not None:
        peers.check()
    figures = []
    for program, taken, error in zip(programs, timings, errors, strict=True):
        nbytes = step.moved_bytes(spec, program.choices) // CALLS
        figures.append(
            Figure(
                part=program.part, mode=spec.mode or "", devices=spec.devices, rows=spec.rows,
                us=round(taken.microseconds, 2), spread=round(taken.spread, 4), calls=taken.calls, bytes=nbytes,
                bound_us=round(nbytes / copy * 1e6, 2), error=error, whole=program.whole,
                target_us=TARGETS.get((program.part, spec.mode or "", spec.devices, spec.rows)),
                backends=step.backends(program.choices),
            )
        )  # fmt: skip
    return figures


def table(figures: Sequence[Figure]) -> list[str]:
    """Markdown: one line a part."""
    lines = [
        "| part | shared | GPUs | rows | us | target | bound us | error | one graph |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    return lines + [
        f"| {f.part} | {f.mode} | {f.devices} | {f.rows} | {f.us:.1f} | {f.target_us or ''} | {f.bound_us:.1f} | {f.error:.1e} | "
        f"{'' if f.whole is None else 'yes' if f.whole else 'no'} |"
        for f in sorted(figures, key=lambda f: (f.mode, f.rows, PARTS.index(f.part)))
    ]


def _parts(text: str) -> list[str]:
    if unknown := set(parts := text.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} are no parts: there are {', '.join(PARTS)}")
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and records; 1 where a result was wrong, 2 without the GPUs."""
    parser = argparse.ArgumentParser(prog="python -m bench.moe_layer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, default=jax.device_count(), help="all of them unless given")
    parser.add_argument("--cases", default=CASES, help="MODE:ROWS, default %(default)s")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"default {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median is taken (default %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")
    options = parser.parse_args(arguments)
    if default_arch() is None or not 2 <= options.devices <= jax.device_count():
        print(f"bench.moe_layer: {options.devices} GPUs, at least 2, are needed; JAX sees {jax.devices()}")
        return 2
    show = functools.partial(print, flush=True)
    results, wrong = several.Results(FILE, options.results, table, show), 0
    weights: dict[str, Any] = {}
    for mode, rows in (case.split(":") for case in options.cases.split(",")):
        spec = spec_of(mode, options.devices, int(rows))
        if mode not in weights:
            weights.clear()  # One mode's weights at a time.
            weights[mode] = make_weights(spec)
        for figure in measure(spec, weights[mode], options.parts, results.copy, options.rounds):
            show(f"{figure.part} {mode} x{figure.devices} {rows} rows: {figure.us:.2f} us +-{figure.spread:.0%}, bound "
                 f"{figure.bound_us:.1f}, error {figure.error:.1e}, whole {figure.whole}, {figure.backends}")  # fmt: skip
            if figure.error <= TOLERANCE:
                results.keep(figure.devices, [dataclasses.replace(figure, run=results.name)])
            else:
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
