"""Where a step's time goes: each stage's operations of all layers in a chain of their own, and what is left.

A stage is one executable that runs the model's own functions on the same weights and caches, layer after layer, each on what the
one before left: what the step does of that kind, and nothing else. ``rest`` is the step minus all stages, so the stages add up to
the step by construction; it holds what only the whole has (fusions across stages, the embedding) and what chains cost or save
(caches that stay warm between layers of one kind, launches), and may be negative. Attention is timed with a selection given; the
indexer that selects is a stage of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bench import timing
from bench.step_model import StepSpec
from glm52_jax import decode, model, parallel
from glm52_jax.cache import Cache, Selection, make_rows
from glm52_jax.decode import DecodeState
from glm52_jax.layers import indexer
from glm52_jax.layers.attention import add_attention
from glm52_jax.sampling import sample
from glm52_jax.weights import Weights
from pallas_kernels import norm_quant

REST = "rest"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What stages hand on, donated: the step's state, a residual stream [rows, hidden], a query latent, and a selection for each
    full layer."""

    state: DecodeState
    x: jax.Array
    latent: jax.Array
    selections: tuple[Selection, ...]


type Stage = Callable[[StepSpec, Weights, Carry], Carry]


def _rows(spec: StepSpec, state: DecodeState) -> Any:
    return make_rows(spec.config, state.table, state.positions, jnp.ones_like(state.positions), 1)


def _attention(spec: StepSpec, weights: Weights, carry: Carry) -> Carry:
    config, plan, rows = spec.config, spec.plan, _rows(spec, carry.state)
    x, delta, cache = carry.x, None, carry.state.cache
    for layer in range(config.num_hidden_layers):
        # Another full layer's set at each group of layers, as in the step.
        current = max((i for i, full in enumerate(config.full_layers) if full <= layer), default=0)
        selection = carry.selections[current]
        x, out, cache, _ = add_attention(
            weights.attention, layer, weights.indexer, None, x, delta, cache, rows, selection, config, plan
        )
        delta = model.attention_sum(out, plan)
    x = x if delta is None else x + delta
    return dataclasses.replace(carry, x=x, state=carry.state.replace(cache=cache))  # type: ignore[attr-defined]


def _indexer(spec: StepSpec, weights: Weights, carry: Carry) -> Carry:
    config, rows, cache = spec.config, _rows(spec, carry.state), carry.state.cache
    keys, selections = cache.index_keys, []
    for layer in range(len(config.full_layers)):
        # The keys of the layer before are an operand, which keeps the layers in order.
        found, keys = indexer.select(weights.indexer, layer, carry.latent, carry.x, keys, rows, config, spec.plan)
        selections.append(found)
    state = carry.state.replace(cache=Cache(cache.latent, keys))  # type: ignore[attr-defined]
    return dataclasses.replace(carry, state=state, selections=tuple(selections))


def _mlps(kind: str) -> Stage:
    def run(spec: StepSpec, weights: Weights, carry: Carry) -> Carry:
        x = carry.x
        for layer, found in enumerate(spec.config.mlp_layer_types):
            if found == kind:
                out, _ = model._mlp(weights, layer, x, spec.config, spec.plan)
                x = x + out
        return dataclasses.replace(carry, x=x)

    return run


def _head(spec: StepSpec, weights: Weights, carry: Carry) -> Carry:
    state, plan = carry.state, spec.plan
    hidden = norm_quant.rms_norm(carry.x, weights.norm, spec.config.rms_norm_eps)
    drawn = sample(model.logits(weights, hidden, plan), state.sampling, state.positions)
    return dataclasses.replace(carry, state=state.replace(tokens=parallel.all_tokens(drawn, plan)))  # type: ignore[attr-defined]


STAGES: dict[str, Stage] = {
    # First: attention then reads what was selected.
    "indexer": _indexer,
    "attention": _attention,
    "dense": _mlps("dense"),
    "experts": _mlps("sparse"),
    "head, sampling": _head,
}


def stages_of(spec: StepSpec) -> dict[str, Stage]:
    """Those of ``STAGES`` that the model has."""
    kinds = spec.config.mlp_layer_types
    absent = {"dense": "dense" not in kinds, "experts": "sparse" not in kinds}
    return {name: stage for name, stage in STAGES.items() if not absent.get(name)}


def compiled(spec: StepSpec, stage: Stage, weights: Weights, carry: Carry) -> Callable[[Carry], Carry]:
    """A stage as an executable that takes the carry's buffers and gives them back."""
    plan = spec.plan
    batch: Any = parallel.batch_spec(plan)
    specs = Carry(decode.state_specs(plan), batch, batch, batch)
    inputs = (parallel.weight_specs(spec.config, False, plan), specs)

    def run(weights: Weights, carry: Carry) -> Carry:
        return parallel.spread(lambda w, c: stage(spec, w, c), plan.parallel, inputs, specs)(weights, carry)

    executable = jax.jit(run, donate_argnums=1, keep_unused=True).lower(weights, carry).compile()
    return lambda current: executable(weights, current)


def first_carry(spec: StepSpec, state: DecodeState) -> Carry:
    """A carry of random rows around a state; the selections are valid, and the indexer's stage replaces them."""
    config, plan = spec.config, spec.plan
    keys = jax.random.split(jax.random.key(1))
    shapes = ((spec.rows, config.hidden_size), (spec.rows, config.q_lora_rank))
    x, latent = (jax.random.normal(key, shape).astype(plan.activation) for key, shape in zip(keys, shapes, strict=True))
    k = min(config.index_topk, spec.pages * 64)
    positions = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (spec.rows, 1, k))
    whole = PartitionSpec() if plan.parallel is None else parallel.batch_spec(plan)
    placed = parallel.place((x, latent, positions, positions), plan, whole)
    one = Selection(placed[2], placed[3])
    selections = tuple(jax.tree.map(jnp.copy, one) for _ in config.full_layers)
    return Carry(state, placed[0], placed[1], selections)


def split(prepared: Any, step_us: float, rounds: int) -> dict[str, float]:
    """Microseconds of each stage and of the rest; their sum is ``step_us``. The prepared state comes back as it was found."""
    spec, steps = prepared.spec, prepared.steps
    program = steps.program
    carry = first_carry(spec, program.release(steps.state))
    times: dict[str, float] = {}
    for name, stage in stages_of(spec).items():
        run = compiled(spec, stage, program.weights, carry)
        repeat = timing.Repeat(run, carry, 1)
        (taken,) = timing.measure([repeat], rounds)
        carry = repeat._state
        times[name] = round(taken.microseconds, 2)
    steps.state = program.adopt(carry.state)
    steps.warm_up()
    return {**times, REST: round(step_us - sum(times.values()), 2)}
