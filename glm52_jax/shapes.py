"""A model's weights, states and plan as shapes alone: for plans of GPUs that are not there, and for compiling ahead of time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glm52_jax import decode, parallel
from glm52_jax.cache import make_cache
from glm52_jax.config import Config
from glm52_jax.decode import DecodeState
from glm52_jax.plan import Plan
from glm52_jax.sampling import Sampling, sampling_state
from glm52_jax.weights import Leaf, Weights, weight_leaves
from pallas_kernels import lowering, registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BLOCK, BlockScaled
from pallas_kernels.registry import Choice

# Linear weights that the published FP8 checkpoints keep in bfloat16.
_NEVER_FP8 = ("head", "mtp.eh_proj")


def abstract_state(
    config: Config, plan: Plan, rows: int, pages: int, pool: int, width: int = 1, logits: bool = False, burst: int = 1
) -> DecodeState:
    """A DecodeState of shapes, with shardings where the plan has several devices.

    rows: sequences. width: query rows of each. logits: whether it keeps them. burst: steps of a call.
    """

    def make() -> DecodeState:
        each, every = jnp.zeros(rows, jnp.int32), jnp.zeros(rows * width, jnp.int32)
        table = jnp.zeros((rows, pages), jnp.int32)
        kept = jnp.zeros((rows * width, config.vocab_size), jnp.float32) if logits else None
        draws = sampling_state(Sampling(), rows)
        history = jnp.zeros((burst, rows * width), jnp.int32) if burst > 1 else None
        return DecodeState(every, each, table, make_cache(config, plan, pool), draws, every, kept, history)

    shapes = jax.eval_shape(make)
    share = plan.parallel
    if share is None:
        return shapes

    def placed(spec: PartitionSpec, part: Any) -> Any:
        sharding = NamedSharding(share.mesh, spec)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), part)

    specs = decode.state_specs(plan, logits, burst > 1)
    return jax.tree.map(placed, specs, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec))


def abstract_weights(
    config: Config, *, fp8: bool | None = None, dtype: str = "bfloat16", mode: str | None = None, devices: int = 1
) -> Weights:
    """The weights as shapes, for plans and benchmarks; of one device of several with ``mode`` ("tp", "ep", "ep+dp").

    fp8: whether linear weights are FP8 blocks, as the config says unless given: all but the head, as in the published checkpoints.
    dtype: of W_UK and W_UV. ValueError for a size that does not divide over the devices, FP8 between blocks of 128.
    """
    rules = parallel.RULES[mode] if mode else frozenset()
    blocks = config.fp8 if fp8 is None else fp8

    def one(path: Any, leaf: Leaf) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        scaled = blocks and leaf.kind == "linear" and name not in _NEVER_FP8
        shape = []
        for dim, (axis, size) in enumerate(zip(leaf.axes, leaf.shape, strict=True)):
            each, rest = divmod(size, devices if axis in rules else 1)
            if rest or (each != size and scaled and dim >= len(leaf.shape) - 2 and each % BLOCK):
                raise ValueError(f"{name}: {axis} {size} over {devices} devices of {mode!r} is {size / devices:g} each")
            shape.append(each)
        if scaled:
            grid = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
            return BlockScaled(_shape(shape, jnp.float8_e4m3fn), _shape(grid, jnp.float32))
        stored = {"w_uk": dtype, "w_uv": dtype, "float32": "float32"}.get(leaf.kind, "bfloat16")
        return _shape(shape, jnp.dtype(stored))

    leaves = weight_leaves(config, mtp=False)
    return jax.tree.map_with_path(one, leaves, is_leaf=lambda node: isinstance(node, Leaf))


def _shape(shape: Sequence[int], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def choices(
    weights: Weights, config: Config, plan: Plan, rows: int, pages: int, arch: Arch | None, kernels: bool = False
) -> list[Choice]:
    """The backends that a program of these shapes would take on a GPU, which need not be there; nothing is compiled.

    weights: shapes suffice. kernels: imports and traces the chosen kernels too, which shows the calls that they make themselves.
    """
    state = abstract_state(config, plan, rows, pages, rows * pages)

    def step(weights: Weights, state: DecodeState) -> DecodeState:
        return inspect.unwrap(decode.decode_step)(weights, state, config=config, plan=plan)

    with lowering.target(arch), registry.recorded() if kernels else registry.planned() as found:
        jax.eval_shape(step, weights, state)
    return found
