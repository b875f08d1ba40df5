"""The whole MLA layer (norm to o_proj, absorbed, selection given) at GLM-5.2's sizes, with synthetic weights.

Timed in four ways: every operation called by itself, one jitted layer without a CUDA graph, the same as a graph, and many layers in
one graph, which is how a decode step runs it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import timing
from bench.check import Check, WrongResult
from bench.records import Ceilings, Record
from glm52_jax.cache import Cache, Rows, Selection, contiguous_table, make_rows
from glm52_jax.config import Config
from glm52_jax.layers.attention import add_attention
from glm52_jax.plan import Plan
from glm52_jax.weights import AttentionWeights, IndexerWeights
from glm52_jax.xla_options import step_options
from pallas_kernels import lowering, paged, registry
from pallas_kernels.blocks import BlockScaled, random_blocks
from pallas_kernels.compare import compare

WAYS = ("chain", "graph", "jitted", "op by op")
TARGET_US = {1: 75.0}
# Of one layer: five roundings to bfloat16 on either side; W8A8 quantizes four times what may differ by one such step
# (measured on an H200: 6.0e-3 and 4.1e-2).
TOLERANCE = {"w8a16": 1e-2, "w8a8": 6e-2}
_CHAIN = 32
# A graph is made from this many nodes on: a way to do without.
_NO_GRAPH = {"xla_gpu_graph_min_graph_size": 1_000_000}
_NO_INDEXER = IndexerWeights(*(None,) * 5)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Sizes of the layer; tokens: cached ones of each sequence (each row is a sequence of its own)."""

    rows: int = 1
    arithmetic: str = "w8a16"
    layers: int = 3
    tokens: int = 4096
    hidden: int = 6144
    heads: int = 64
    q_lora_rank: int = 2048
    kv_lora_rank: int = 512
    nope: int = 192
    rope: int = 64
    v: int = 256
    topk: int = 2048

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """(count of numbers, bytes of one, rows of the product) of q_a, kv_a, q_b, o_proj in FP8 and W_UK, W_UV in bfloat16."""
        heads = self.heads
        eight = (
            self.hidden * (self.q_lora_rank + self.kv_lora_rank + self.rope)
            + self.q_lora_rank * heads * (self.nope + self.rope)
            + heads * self.v * self.hidden
        )
        return ((eight, 1, self.rows), (heads * self.kv_lora_rank * (self.nope + self.v), 2, self.rows))

    def bytes(self) -> int:
        """Weights once, every selected latent once a row, the residual in and out."""
        weights = sum(count * size for count, size, _ in self.matrices)
        latents = self.rows * self.topk * paged.latent_width(self.kv_lora_rank, self.rope, True)
        return weights + latents + 2 * 2 * self.rows * self.hidden

    def flops(self) -> int:
        attend = self.rows * self.heads * self.topk * (2 * self.kv_lora_rank + self.rope)
        return 2 * (sum(count * rows for count, _, rows in self.matrices) + attend)

    def config(self) -> Config:
        """A model of such layers; what is not attention's is small, and unused here."""
        return Config(
            vocab_size=128, hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            q_lora_rank=self.q_lora_rank, kv_lora_rank=self.kv_lora_rank, qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope, v_head_dim=self.v, intermediate_size=128, moe_intermediate_size=128,
            n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=8, routed_scaling_factor=2.5, rms_norm_eps=1e-5,
            latent_norm_eps=1e-5, rope_theta=8e6, max_position_embeddings=1 << 20, index_topk=self.topk, index_n_heads=32,
            index_head_dim=128, indexer_types=("full",) + ("shared",) * (self.layers - 1),
            mlp_layer_types=("dense",) * self.layers, num_nextn_predict_layers=0, eos_token_ids=(0,), fp8=True,
        )  # fmt: skip

    def plan(self) -> Plan:
        return Plan(dtype="bfloat16", cache="fp8", linear=self.arithmetic)


Fixed = tuple[AttentionWeights, Rows, Selection]
State = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: LayerSpec, key: jax.Array) -> tuple[State, Fixed]:
    """((residual x bf16 [rows, hidden], latent cache), (weights, rows, selection)), all random."""
    keys = iter(jax.random.split(key, 16))
    pages = spec.tokens // paged.PAGE
    table = contiguous_table(spec.rows, pages)
    last = jnp.full((spec.rows,), spec.tokens - 1, jnp.int32)
    rows = make_rows(spec.config(), table, last, jnp.ones_like(last), 1)
    # Distinct positions without a sort: an odd stride walks through a power of two.
    start = jax.random.randint(next(keys), (spec.rows, 1), 0, spec.tokens, jnp.int32)
    stride = 2 * jax.random.randint(next(keys), (spec.rows, 1), 100, spec.tokens // 2, jnp.int32) + 1
    positions = (start + stride * jnp.arange(spec.topk, dtype=jnp.int32)[None, :]) % spec.tokens
    slots = jnp.arange(spec.rows, dtype=jnp.int32)[:, None] * spec.tokens + positions
    selection = Selection(positions[:, None, :], slots[:, None, :])
    x = jax.random.normal(next(keys), (spec.rows, spec.hidden), jnp.float32).astype(jnp.bfloat16)
    return (x, _latents(spec, pages, next(keys))), (_weights(spec, keys), rows, selection)


def _latents(spec: LayerSpec, pages: int, key: jax.Array) -> jax.Array:
    count = spec.rows * pages

    def one(key: jax.Array) -> jax.Array:
        shape = (count, paged.PAGE, spec.kv_lora_rank + spec.rope)
        values = jax.random.normal(key, shape, jnp.float32)
        return paged.pack_latent(values[..., : spec.kv_lora_rank], values[..., spec.kv_lora_rank :], jnp.dtype("uint8"))

    return jax.lax.map(one, jax.random.split(key, spec.layers))


def _weights(spec: LayerSpec, keys: Any) -> AttentionWeights:
    def vector(n: int) -> jax.Array:
        return (1 + 0.1 * jax.random.normal(next(keys), (spec.layers, n), jnp.float32)).astype(jnp.bfloat16)

    def halves(width: int) -> jax.Array:
        shape = (spec.layers, spec.heads, width, spec.kv_lora_rank)
        return (0.05 * jax.random.normal(next(keys), shape, jnp.float32)).astype(jnp.bfloat16)

    def blocks(n: int, k: int) -> BlockScaled:
        return random_blocks(next(keys), spec.layers, n, k)

    return AttentionWeights(
        input_norm=vector(spec.hidden),
        q_a=blocks(spec.q_lora_rank, spec.hidden),
        q_a_norm=vector(spec.q_lora_rank),
        q_b=blocks(spec.heads * (spec.nope + spec.rope), spec.q_lora_rank),
        kv_a=blocks(spec.kv_lora_rank + spec.rope, spec.hidden),
        kv_a_norm=vector(spec.kv_lora_rank),
        w_uk=halves(spec.nope),
        w_uv=halves(spec.v),
        o_proj=blocks(spec.hidden, spec.heads * spec.v),
    )


def layers(spec: LayerSpec, state: State, fixed: Fixed, length: int, first: Any = 0) -> State:
    """``length`` attention layers with their residual, from layer ``first`` of the stack on."""
    x, latent = state
    delta = None
    for i in range(length):
        layer = (first + i) % spec.layers if isinstance(first, int) else first
        x, delta, latent = _attention(spec, x, delta, latent, fixed, layer)
    return (x if delta is None else x + delta), latent


def repeat(spec: LayerSpec, way: str, state: State, fixed: Fixed, length: int = _CHAIN) -> timing.Repeat:
    """One of ``WAYS`` as something to time. It donates a copy of the state, except op by op, where nothing can be donated."""
    own, graph = jax.tree.map(jnp.copy, state), step_options(lowering.default_arch())
    if way == "chain":
        step = jax.jit(lambda s, f: layers(spec, s, f, length), donate_argnums=0, compiler_options=graph)
        return timing.Repeat(lambda s: step(s, fixed), own, length)
    one: Callable[[State, Fixed, Any], State] = functools.partial(_one, spec)
    if way != "op by op":
        one = jax.jit(one, donate_argnums=0, compiler_options=_NO_GRAPH if way == "jitted" else graph)
    numbers = [jnp.int32(i) for i in range(spec.layers)]

    def through_all(s: State) -> State:
        for number in numbers:
            s = one(s, fixed, number)
        return s

    return timing.Repeat(through_all, own, spec.layers)


def _one(spec: LayerSpec, state: State, fixed: Fixed, layer: Any) -> State:
    return layers(spec, state, fixed, 1, layer)


def check(spec: LayerSpec, state: State, fixed: Fixed) -> tuple[Check, list[registry.Choice]]:
    """The last layer against the references; through the stack, bits of the first, second and later calls must agree.

    Raises WrongResult where they do not.
    """
    with registry.recorded() as choices:
        results = _calls(spec, state, fixed)
    name = f"mla_layer {spec.arithmetic} rows={spec.rows}"
    for number, result in enumerate(results[1:], start=2):
        if any(a.tobytes() != b.tobytes() for a, b in zip(results[0], result, strict=True)):
            raise WrongResult(f"{name}: call {number} differs from call 1 in its bits")
    # One layer, without the residual: its rounding to bfloat16 is larger than the kernels' errors.
    got = _attend(spec, state, fixed)
    with lowering.target(None):
        want = _attend(spec, state, fixed)
    difference = compare(got, want)
    tolerance = TOLERANCE[spec.arithmetic]
    ok = difference.rel_l2 <= tolerance
    return Check("attention", bool(ok), difference.rel_l2, tolerance, str(difference)), choices


def _attend(spec: LayerSpec, state: State, fixed: Fixed) -> np.ndarray:
    """Attention of the stack's last layer, float32 [rows, hidden]."""
    # The function is new in each call, so that no trace made for another target is found.
    step = jax.jit(lambda s, f: _attention(spec, s[0], None, s[1], f, spec.layers - 1)[1].astype(jnp.float32))
    return np.asarray(step(state, fixed))


def _attention(
    spec: LayerSpec, x: jax.Array, delta: jax.Array | None, latent: jax.Array, fixed: Fixed, layer: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(residual stream with delta added, output of the layer, latent cache)."""
    weights, rows, selection = fixed
    cache = Cache(latent=latent, index_keys=jnp.zeros((0,), jnp.uint8))
    plan, config = spec.plan(), spec.config()
    x, out, cache, _ = add_attention(weights, layer, _NO_INDEXER, None, x, delta, cache, rows, selection, config, plan)
    return x, out, cache.latent


def _calls(spec: LayerSpec, state: State, fixed: Fixed, calls: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Results of calls of one executable on copies of the same state."""
    step = jax.jit(lambda s, f: layers(spec, s, f, spec.layers), donate_argnums=0)
    results = []
    for _ in range(calls):
        x, latent = step(jax.tree.map(jnp.copy, state), fixed)
        results.append((np.asarray(x), np.asarray(latent)))
    return results


def run(
    spec: LayerSpec, ways: tuple[str, ...], rounds: int, say: Callable[[str], None] = print
) -> list[Callable[[Ceilings, str], Record]]:
    """Checks and times one spec; returns what makes a record of each way once the ceilings are known."""
    state, fixed = inputs(spec, jax.random.key(0))
    result, choices = check(spec, state, fixed)
    if not result.ok:
        raise WrongResult(f"mla_layer {spec.arithmetic} rows={spec.rows} {result}")
    timings = timing.measure([repeat(spec, way, state, fixed) for way in ways], rounds)
    reason = "; ".join(dict.fromkeys(f"{choice.operation}: {choice.backend}" for choice in choices))
    made = []
    for way, taken in zip(ways, timings, strict=True):
        say(
            f"mla_layer {spec.arithmetic} {way} rows={spec.rows}: {taken.microseconds:.2f} us +-{100 * taken.spread:.1f}% "
            f"{spec.bytes() / taken.microseconds / 1e6:.2f} TB/s, error {result.worst:.1e}"
        )
        made.append(functools.partial(_record, spec, way, taken, result, reason))
    return made


def _record(
    spec: LayerSpec, way: str, taken: timing.Timing, result: Check, reason: str, ceilings: Ceilings, run: str
) -> Record:
    us, (bound, bound_us) = taken.microseconds, ceilings.bound(spec.bytes(), spec.flops())
    rivals = {"target": TARGET_US[spec.rows]} if way == "chain" and spec.rows in TARGET_US else {}
    return Record(
        operation="mla_layer", case=f"{spec.arithmetic} {way}", rows=spec.rows, backend="attention", reason=reason,
        spec=dataclasses.asdict(spec), us=round(us, 3), spread=round(taken.spread, 4), calls=taken.calls, l2="cold",
        bytes=spec.bytes(), flops=spec.flops(), tb_s=round(spec.bytes() / us / 1e6, 3),
        tflop_s=round(spec.flops() / us / 1e6, 2), bound=bound, bound_us=round(bound_us, 3),
        percent_of_bound=round(100 * bound_us / us, 1), error=result.worst, tolerance=result.tolerance, rivals_us=rivals,
        against={who: round(theirs / us, 3) for who, theirs in rivals.items()}, run=run,
    )  # fmt: skip
