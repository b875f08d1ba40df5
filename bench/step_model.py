"""A model of real shapes with synthetic weights, made on the device, and a state in the middle of long sequences.

Numbers come from an integer hash of their position, computed where they are stored: nothing of the size of a stack exists beside
the stack, and nothing passes the host. Outputs of the blocks are small beside the residual stream, so that rows of different tokens
stay independent of each other, and with them the experts they choose: k of E at random for each row (``expected_experts``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm52_jax import parallel, tiny
from glm52_jax.config import Config
from glm52_jax.plan import Parallel, Plan
from glm52_jax.program import DecodeProgram, State
from glm52_jax.sampling import Sampling
from glm52_jax.shapes import abstract_weights
from glm52_jax.shares import update
from glm52_jax.weights import Weights
from pallas_kernels import paged
from pallas_kernels.blocks import BlockScaled

# Standard deviation of an e4m3 number whose bits are random.
E4M3_DEVIATION = 104.0
# Of the matrices whose output is added to the residual stream.
SMALL = 0.05
INTO_THE_STREAM = ("o_proj", "down")
# Pages of the caches that are filled at a time.
_PAGES = 256


def glm52(layers: int = 78) -> Config:
    """GLM-5.2's sizes with the first ``layers`` of its layers: three dense, then sparse; indexers where it has them."""
    sizes: dict[str, Any] = {
        **{"vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": layers, "num_attention_heads": 64},
        **{"q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
        **{"v_head_dim": 256, "intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 3},
        **{"n_routed_experts": 256, "num_experts_per_tok": 8, "index_topk": 2048, "index_n_heads": 32},
        **{"index_head_dim": 128, "num_nextn_predict_layers": 0},
    }
    return dataclasses.replace(Config.from_hf(tiny.tiny_config(**sizes)), fp8=True)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """One decode step.

    config: the whole model's. rows: sequences. context: tokens that each has cached when a round begins, with room for ``room``.
    mode: how ``devices`` share the model, None for one. rank: one of these devices' work, alone on one GPU: its slices of every
    weight, and exchanges with itself, which XLA makes copies or nothing. linear: arithmetic. mesh: instead of the devices that JAX
    sees. burst: steps of a call of the program.
    """

    config: Config
    rows: int = 1
    context: int = 4096
    room: int = 256
    mode: str | None = None
    devices: int = 1
    rank: bool = False
    linear: str = "w8a16"
    dtype: str = "bfloat16"
    mesh: Mesh | None = None
    burst: int = 1

    def __post_init__(self) -> None:
        if (self.mode is None) != (self.devices == 1) or (self.rank and self.mode is None):
            raise ValueError(f"{self.mode=} and {self.devices=} go together, and {self.rank=} needs both")
        if self.rows < 1 or self.context < 1 or self.room < 32:
            raise ValueError(f"{self.rows=} and {self.context=} must be positive, {self.room=} at least 32")

    @property
    def name(self) -> str:
        """What is run, without batch and context: "78 layers, one rank of tp8, w8a16"."""
        shared = f", {'one rank of ' if self.rank else ''}{self.mode}{self.devices}" if self.mode else ""
        bursts = f", {self.burst} steps a call" if self.burst > 1 else ""
        return f"{self.config.num_hidden_layers} layers{shared}, {self.linear}{bursts}"

    @property
    def pages(self) -> int:
        return -(-(self.context + self.room) // paged.PAGE)

    @functools.cached_property
    def plan(self) -> Plan:
        share = None
        if self.mode is not None:
            share = Parallel(self.mesh or parallel.make_mesh(1 if self.rank else self.devices), self.mode)
        cache = "float32" if self.dtype == "float32" else "fp8"
        return Plan(dtype=self.dtype, cache=cache, linear=self.linear, parallel=share)

    def shapes(self) -> Weights:
        """The weights as shapes, with shardings on a mesh; of one rank, its slices."""
        part = abstract_weights(self.config, fp8=True, dtype=self.dtype, mode=self.mode, devices=self.devices)
        # Of all devices the parts, which are known to fit, are put together again by their shardings.
        shapes = part if self.rank else abstract_weights(self.config, fp8=True, dtype=self.dtype)
        specs, share = parallel.weight_specs(self.config, False, self.plan), self.plan.parallel
        if share is None:
            return shapes

        def placed(spec: PartitionSpec, part: Any) -> Any:
            where = NamedSharding(share.mesh, spec)
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), part)

        return jax.tree.map(placed, specs, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec))

    def experts_hit(self) -> float:
        """Distinct experts a layer that the rows are expected to choose among those that one device has."""
        c = self.config
        here = c.n_routed_experts // (self.devices if self.mode in ("ep", "ep+dp") else 1)
        return here * expected_experts(self.rows, c.num_experts_per_tok, c.n_routed_experts) / c.n_routed_experts


def expected_experts(rows: int, k: int, experts: int) -> float:
    """Distinct experts that rows hit which choose k of them at random: 8 of 256 for one row, 57.4 for eight."""
    return experts * (1 - (1 - k / experts) ** rows)


def make_weights(shapes: Weights, seed: int = 0) -> Weights:
    """Arrays of these shapes, filled a layer at a time into donated stacks.

    FP8 values are e4m3 of all finite kinds with float32 scales; matrices have a standard deviation of columns^-1/2, those whose
    output enters the residual stream a twentieth of it; norms are near 1, the router's bias is 0.
    """
    named, structure = jax.tree.flatten_with_path(shapes, is_leaf=lambda node: isinstance(node, BlockScaled))
    made = []
    for number, (path, shape) in enumerate(named):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        key = np.uint32((seed * 1009 + number) * 2654435761 % 2**32)
        gain = SMALL if name.endswith(INTO_THE_STREAM) else 1.0
        if isinstance(shape, BlockScaled):
            width = gain * shape.data.shape[-1] ** -0.5 / E4M3_DEVIATION
            made.append(BlockScaled(_stack(shape.data, key, "bits", 1.0), _stack(shape.scale, key, "scale", width)))
        elif name.endswith(("norm", "bias")):
            made.append(_stack(shape, key, "norm" if name.endswith("norm") else "zero", 1.0))
        else:
            made.append(_stack(shape, key, "matrix", 1.0 if name == "embed" else gain * shape.shape[-1] ** -0.5))
    return jax.tree.unflatten(structure, made)


def _stack(shape: Any, key: np.uint32, kind: str, gain: float) -> jax.Array:
    stack = jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
    if kind == "zero":
        return stack
    slices = shape.shape[0] if len(shape.shape) > 2 else 1
    for i in range(slices):
        stack = _fill(stack, np.int32(i), key, kind, gain, len(shape.shape) > 2, stack.sharding)
    return stack


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5, 6))
def _fill(
    stack: jax.Array, index: jax.Array, key: jax.Array, kind: str, gain: float, stacked: bool, where: Any
) -> jax.Array:
    """stack[index], or all of it, with the numbers of its place."""
    shape = stack.shape[1:] if stacked else stack.shape
    value = numbers(kind, gain, hashed(shape, key ^ (index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))))
    start = jnp.zeros(stack.ndim, jnp.int32).at[0].set(index if stacked else 0)
    return _kept(update(stack, start, value), where)


def numbers(kind: str, gain: float, bits: jax.Array) -> jax.Array:
    """Synthetic weights of a kind from uint32 ``bits``: "bits" of e4m3, or float32 "scale", "norm", "zero" or "matrix"."""
    if kind == "bits":
        # Bit 0 is cleared: the NaN of e4m3fn has all of the lower seven bits set.
        return jax.lax.bitcast_convert_type((bits >> 24).astype(jnp.uint8) & jnp.uint8(0xFE), jnp.float8_e4m3fn)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    if kind == "zero":
        return jnp.zeros_like(uniform)
    if kind == "scale":
        return gain * (0.5 + uniform)
    return 0.9 + 0.2 * uniform if kind == "norm" else gain * 3**0.5 * (2 * uniform - 1)


def _kept(array: jax.Array, where: Any) -> jax.Array:
    """The array where it was: on a mesh, what is not said is XLA's to choose."""
    return jax.lax.with_sharding_constraint(array, where) if isinstance(where, NamedSharding) else array


def hashed(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """uint32 numbers that look random, of a position and a key (a finalizer of the xor, shift and multiply kind)."""
    bits = jnp.broadcast_to(key, shape)
    for dim in range(len(shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        bits = (bits ^ (place + jnp.uint32(0x85EBCA6B + dim))) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 15)
    bits = bits * jnp.uint32(0x27D4EB2F)
    return bits ^ (bits >> 13)


def make_state(program: DecodeProgram, context: int, seed: int = 0) -> State:
    """Greedy sequences of ``context`` cached tokens of random content, each about to feed a token of its own."""
    arrays = program.fresh(Sampling(temperature=0.0)).arrays
    config = program.config
    tokens = np.random.default_rng(seed).choice(config.vocab_size, program.rows, replace=False).astype(np.int32)
    cache = arrays.cache
    latent, keys = cache.latent, cache.index_keys
    for first in range(0, program.pool, _PAGES):
        pages = min(_PAGES, program.pool - first)
        for layer in range(latent.shape[0]):
            latent = _latents(latent, np.int32([layer, first]), np.int32(seed), pages, config, latent.sharding)
        for layer in range(keys.shape[0]):
            keys = _index_keys(keys, np.int32([layer, first]), np.int32(seed), pages, config, keys.sharding)
    return program.adopt(
        arrays.replace(  # type: ignore[attr-defined]
            # A copy: CPUs may take the host's memory itself where it is aligned, and that cannot be donated.
            tokens=jnp.copy(jax.device_put(tokens, arrays.tokens.sharding)),
            positions=rewound(arrays.positions, context),
            cache=cache.replace(latent=latent, index_keys=keys),  # type: ignore[attr-defined]
        )
    )


def rewound(positions: jax.Array, to: int) -> jax.Array:
    """All positions set, in place: a new array would have XLA update the graph."""
    return _rewound(positions, to, positions.sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(1, 2), keep_unused=True)
def _rewound(positions: jax.Array, to: int, where: Any) -> jax.Array:
    return _kept(jnp.full_like(positions, to), where)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _latents(latent: jax.Array, at: jax.Array, seed: jax.Array, pages: int, config: Config, where: Any) -> jax.Array:
    """Pages at (layer, first page) of the latent cache."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), at[0]), at[1])
    values = jax.random.normal(key, (pages * paged.PAGE, config.latent_dim), jnp.float32)
    parts = values[:, : config.kv_lora_rank], values[:, config.kv_lora_rank :]
    rows = paged.pack_latent(*parts, latent.dtype).reshape(1, pages, paged.PAGE, -1)
    return _kept(jax.lax.dynamic_update_slice(latent, rows, (at[0], at[1], jnp.int32(0), jnp.int32(0))), where)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _index_keys(keys: jax.Array, at: jax.Array, seed: jax.Array, pages: int, config: Config, where: Any) -> jax.Array:
    """Pages at (full layer, first page) of the index-key cache."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed + 1), at[0]), at[1])
    values = jax.random.normal(key, (pages * paged.PAGE, config.index_head_dim), jnp.float32)
    slots = at[1] * paged.PAGE + jnp.arange(pages * paged.PAGE, dtype=jnp.int32)
    return _kept(paged.write_index_keys(keys, at[0], slots, values), where)
