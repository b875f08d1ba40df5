"""The DSA indexer of one layer, from the hidden state to cache slots, at GLM-5.2's sizes with synthetic weights and keys.

Timed in a graph of many layers, as a decode step runs it, and its parts in graphs of their own.
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
from bench.layer import LayerSpec
from bench.records import Ceilings, Record
from glm52_jax.cache import Rows, make_rows
from glm52_jax.layers.indexer import select
from glm52_jax.weights import IndexerWeights
from glm52_jax.xla_options import step_options
from pallas_kernels import index_keys, lowering, mqa_logits, paged, registry, top_k
from pallas_kernels.blocks import random_blocks
from pallas_kernels.compare import compare

PARTS = ("keys and queries", "logits", "selection")
WAYS = ("chain", *PARTS)
CONTEXTS = {"2K": 2048, "8K": 8192, "32K": 32768, "128K": 131072, "512K": 524288, "1M": 1048576}
TARGET_US = {("32K", 1): 35.0, ("1M", 1): 120.0}
# Of the root mean square of a row's scores: how far from the k-th best score a position may lie that only one side selects, given
# the same queries. FP8 units that keep some 13 bits move a score by up to 2e-3.
TOLERANCE = 5e-3
# Relative L2 of queries and head weights: where a value falls between two e4m3 codes the sides may round it differently.
QUERY_TOLERANCE = 3e-2
_ROTATION = 200e6
_CHAIN = 24


@dataclasses.dataclass(frozen=True)
class IndexerSpec:
    """rows: sequences of one new token each; context: its name in CONTEXTS; tokens: cached ones of each sequence."""

    rows: int = 1
    context: str = "32K"
    tokens: int = 32768
    arithmetic: str = "w8a16"
    hidden: int = 6144
    q_lora_rank: int = 2048
    heads: int = 32
    head_dim: int = 128
    rope: int = 64
    topk: int = 2048

    @property
    def pages(self) -> int:
        """Pages of a sequence; never so few that everything is selected whatever the length."""
        return max(-(-self.tokens // paged.PAGE), 2 * -(-self.topk // paged.PAGE))

    @property
    def weight_bytes(self) -> int:
        eight = self.heads * self.head_dim * self.q_lora_rank + self.head_dim * self.hidden
        return eight + 2 * self.heads * self.hidden

    @property
    def layers(self) -> int:
        """Enough copies of weights and keys to pass three times an L2, two at least."""
        return max(2, -(-int(_ROTATION) // (self.weight_bytes + self.rows * self.tokens * (self.head_dim + 4))))

    def bytes(self, way: str = "chain") -> int:
        """Of the whole: weights once, every cached key once, the rows in and the slots out. A part by itself also passes its
        queries or scores on, which the whole need not."""
        queries = self.rows * self.heads * (self.head_dim + 4)
        keys, scores = self.rows * self.tokens * (self.head_dim + 4), 4 * self.rows * self.tokens
        rows, slots = 2 * self.rows * (self.hidden + self.q_lora_rank), 4 * self.rows * min(self.topk, self.tokens)
        return {
            "chain": self.weight_bytes + rows + keys + slots,
            "keys and queries": self.weight_bytes + rows + queries,
            "logits": queries + keys + scores,
            "selection": scores + slots,
        }[way]

    def flops(self, way: str = "chain") -> int:
        """Projections and dot products."""
        project = self.heads * self.head_dim * self.q_lora_rank + (self.head_dim + self.heads) * self.hidden
        products = self.heads * self.head_dim * self.tokens
        counts = {"chain": project + products, "keys and queries": project, "logits": products, "selection": 0}
        return 2 * self.rows * counts[way]

    def model(self) -> LayerSpec:
        """The same sizes as a model's, for its config and plan."""
        return LayerSpec(
            rows=self.rows, arithmetic=self.arithmetic, layers=self.layers, tokens=self.tokens, hidden=self.hidden,
            q_lora_rank=self.q_lora_rank, rope=self.rope, topk=self.topk,
        )  # fmt: skip


# latent, x, weights, rows: what stays; the key cache is what changes.
Fixed = tuple[jax.Array, jax.Array, IndexerWeights, Rows]


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: IndexerSpec, key: jax.Array) -> tuple[jax.Array, Fixed]:
    """(key cache u8, (latent, x, weights, rows)), all random; each sequence's pages lie scattered over the cache."""
    kl, kx, kk, kq, kp, kc = jax.random.split(key, 6)
    count = spec.rows * spec.pages
    stride = next(n for n in range(count * 5 // 8 | 1, 2 * count + 3, 2) if np.gcd(n, count) == 1)
    table = jnp.asarray((np.arange(count) * stride % count).reshape(spec.rows, -1), jnp.int32)
    last = jnp.full((spec.rows,), spec.tokens - 1, jnp.int32)
    rows = make_rows(spec.model().config(), table, last, jnp.ones_like(last), 1)
    vector = (spec.layers, spec.head_dim)
    weights = IndexerWeights(
        wq_b=random_blocks(kq, spec.layers, spec.heads * spec.head_dim, spec.q_lora_rank),
        wk=random_blocks(kk, spec.layers, spec.head_dim, spec.hidden),
        k_norm=jnp.ones(vector, jnp.bfloat16),
        k_norm_bias=jnp.zeros(vector, jnp.bfloat16),
        weights_proj=_normal(kp, (spec.layers, spec.heads, spec.hidden), spec.hidden**-0.5),
    )
    latent, x = _normal(kl, (spec.rows, spec.q_lora_rank)), _normal(kx, (spec.rows, spec.hidden))
    keys = jax.lax.map(lambda one: _keys(spec, one), jax.random.split(kc, spec.layers))
    return keys, (latent, x, weights, rows)


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def _keys(spec: IndexerSpec, key: jax.Array) -> jax.Array:
    """One layer's pages: e4m3 of all finite values, scales around 4e-3."""
    count, values = spec.rows * spec.pages, paged.PAGE * spec.head_dim
    kv, ks = jax.random.split(key)
    # Bit 0 is cleared: the NaN of e4m3fn has all of the lower seven bits set.
    bits = jax.random.bits(kv, (count, values), jnp.uint8) & jnp.uint8(0xFE)
    scales = 4e-3 * jax.random.uniform(ks, (count, paged.PAGE), jnp.float32, 0.5, 1.5)
    return jnp.concatenate([bits, jax.lax.bitcast_convert_type(scales, jnp.uint8).reshape(count, -1)], axis=1)


def index(spec: IndexerSpec, keys: jax.Array, fixed: Fixed, layer: Any) -> tuple[jax.Array, jax.Array]:
    """(slots [rows, k], keys) of one layer's indexer."""
    latent, x, weights, rows = fixed
    selection, keys = select(weights, layer, latent, x, keys, rows, spec.model().config(), spec.model().plan())
    return selection.slots.reshape(spec.rows, -1), keys


def repeat(spec: IndexerSpec, way: str, keys: jax.Array, fixed: Fixed, length: int = _CHAIN) -> timing.Repeat:
    """One of ``WAYS`` as something to time: a graph of ``length`` layers, each on keys and weights of its own.

    A part's inputs are those it has in the whole; it donates a copy of the keys.
    """
    latent, x, weights, rows = fixed
    sides = (weights.wq_b, weights.weights_proj)
    q, w = index_keys.query(latent, x, *sides, 0, rows.cos, rows.sin, quantized=True, arithmetic=spec.arithmetic)
    q, w = q[:, None], w[:, None]
    scores = mqa_logits.paged_logits(q, w, keys, 0, rows.table, rows.lengths).reshape(spec.rows, -1)

    def one(keys: jax.Array, fixed: Fixed, given: tuple[jax.Array, ...], layer: int) -> tuple[Any, jax.Array]:
        rows, (q, w, scores) = fixed[3], given
        if way == "chain":
            return index(spec, keys, fixed, layer)
        if way == "logits":
            return mqa_logits.paged_logits(q, w, keys, layer, rows.table, rows.lengths), keys
        if way == "selection":
            return top_k.top_k(scores, rows.lengths[:, 0], spec.topk, table=rows.table), keys
        keys, *out = _sides(spec, keys, fixed, layer)
        return out, keys

    def chain(state: tuple[jax.Array, jax.Array], fixed: Fixed, given: tuple[jax.Array, ...]) -> Any:
        (keys, token), (latent, x, weights, rows), (q, w, scores) = state, fixed, given
        for i in range(length):
            out, keys = one(keys, (latent, x, weights, rows), (q, w, scores), i % spec.layers)
            # The next layer waits for this one, as in a model, and XLA can drop neither. Only small arrays take part.
            first = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(out)]
            small, first = jax.lax.optimization_barrier(((latent, x, q, rows.lengths), first))
            latent, x, q, rows = *small[:3], dataclasses.replace(rows, lengths=small[3])
            token = sum(first, start=token)
        return keys, token

    step = jax.jit(chain, donate_argnums=0, compiler_options=step_options(lowering.default_arch()))
    given = (q, w, scores)
    return timing.Repeat(lambda state: step(state, fixed, given), (jnp.copy(keys), jnp.zeros((), jnp.float32)), length)


def check(spec: IndexerSpec, keys: jax.Array, fixed: Fixed) -> tuple[Check, list[registry.Choice]]:
    """Selected slots of the last layer against the references on the same queries, and these against the references' own.

    A position that only one side selects must lie near the k-th best score; the error is the farthest such distance over the root
    mean square of the row's scores. Raises WrongResult where calls differ in their bits, or queries are off.
    """
    layer = spec.layers - 1
    step = jax.jit(lambda k, f: index(spec, k, f, layer), donate_argnums=0)
    with registry.recorded() as choices:
        slots, *others = (np.asarray(step(jnp.copy(keys), fixed)[0]) for _ in range(4))
    name = f"indexer {spec.arithmetic} {spec.context} rows={spec.rows}"
    for number, other in enumerate(others, start=2):
        if slots.tobytes() != other.tobytes():
            raise WrongResult(f"{name}: call {number} differs from call 1 in its bits")
    # Functions are new in each target, so that no trace made for the other is found.
    written, q, w = jax.jit(lambda k, f: _sides(spec, k, f, layer))(keys, fixed)
    rows = fixed[3]
    with lowering.target(None):
        _, *theirs = jax.jit(lambda k, f: _sides(spec, k, f, layer))(keys, fixed)
        want, scores = jax.jit(lambda k, q, w, r: _search(spec, k, q, w, r, layer))(written, q, w, rows)
    for mine, other in zip((q, w), theirs, strict=True):
        difference = compare(*(np.asarray(a.astype(jnp.float32)) for a in (mine, other)))
        if not difference.rel_l2 <= QUERY_TOLERANCE:
            raise WrongResult(f"{name}: queries or head weights are off, {difference}")
    error, detail = distance(slots, np.asarray(want), np.asarray(scores), np.asarray(rows.table))
    return Check("indexer", bool(error <= TOLERANCE), error, TOLERANCE, detail), choices


def _sides(spec: IndexerSpec, keys: jax.Array, fixed: Fixed, layer: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(keys with this layer's written, q, w)."""
    latent, x, weights, rows = fixed
    to_key, to_query = (weights.wk, weights.k_norm, weights.k_norm_bias), (weights.wq_b, weights.weights_proj)
    at = (layer, rows.slots, rows.cos, rows.sin)
    return index_keys.write_and_query(
        latent, x, *to_key, *to_query, keys, *at, quantized=True, arithmetic=spec.arithmetic
    )


def _search(
    spec: IndexerSpec, keys: jax.Array, q: jax.Array, w: jax.Array, rows: Rows, layer: int
) -> tuple[jax.Array, jax.Array]:
    """(slots, scores [rows, positions]) of given queries."""
    scores = mqa_logits.paged_logits(q[:, None], w[:, None], keys, layer, rows.table, rows.lengths)[:, 0]
    return top_k.top_k(scores, rows.lengths[:, 0], spec.topk, table=rows.table)[1], scores


def distance(got: np.ndarray, want: np.ndarray, scores: np.ndarray, table: np.ndarray) -> tuple[float, str]:
    """How far from a row's k-th best score positions lie that only one of two selections of slots holds."""
    worst, differing = 0.0, 0
    for one, other, score, pages in zip(got, want, scores, table, strict=True):
        if len(set(one[one >= 0])) != len(set(other[other >= 0])):
            return np.inf, f"{len(set(one[one >= 0]))} slots, the reference selects {len(set(other[other >= 0]))}"
        position = np.full(pages.max() + 1, -1, np.int64)
        position[pages] = np.arange(len(pages))
        # A slot of a page of another sequence has no position here.
        foreign = [s for s in one[one >= 0] if s // paged.PAGE >= len(position) or position[s // paged.PAGE] < 0]
        if foreign:
            return np.inf, f"slot {foreign[0]} is of no page of its sequence"
        only = np.setxor1d(one, other)
        at = position[only // paged.PAGE] * paged.PAGE + only % paged.PAGE
        finite = score[np.isfinite(score)]
        # The k-th best of them: the lowest that the reference selects.
        kept = other[other >= 0]
        kth = score[position[kept // paged.PAGE] * paged.PAGE + kept % paged.PAGE].min()
        worst = max(worst, float(np.abs(score[at] - kth).max(initial=0.0) / np.sqrt(np.mean(finite**2))))
        differing += len(only) // 2
    return worst, f"{differing} of {int((want >= 0).sum())} slots differ, at most {worst:.1e} rms from the k-th score"


def run(
    spec: IndexerSpec, ways: tuple[str, ...], rounds: int, say: Callable[[str], None] = print
) -> list[Callable[[Ceilings, str], Record]]:
    """Checks and times one spec; returns what makes a record of each way once the ceilings are known."""
    keys, fixed = inputs(spec, jax.random.key(0))
    result, choices = check(spec, keys, fixed)
    name = f"indexer {spec.arithmetic} {spec.context} rows={spec.rows}"
    if not result.ok:
        raise WrongResult(f"{name} {result}")
    say(f"{name} {result}")
    timings = timing.measure([repeat(spec, way, keys, fixed) for way in ways], rounds)
    reason = "; ".join(dict.fromkeys(f"{choice.operation}: {choice.backend}" for choice in choices))
    for way, taken in zip(ways, timings, strict=True):
        say(f"{name} {way}: {taken.microseconds:.2f} us +-{100 * taken.spread:.1f}%")
    return [
        functools.partial(_record, spec, way, taken, result, reason) for way, taken in zip(ways, timings, strict=True)
    ]


def _record(
    spec: IndexerSpec, way: str, taken: timing.Timing, result: Check, reason: str, ceilings: Ceilings, run: str
) -> Record:
    nbytes, flops = spec.bytes(way), spec.flops(way)
    us, (bound, bound_us) = taken.microseconds, ceilings.bound(nbytes, flops, operand_bits=8)
    target = TARGET_US.get((spec.context, spec.rows)) if way == "chain" else None
    rivals = {} if target is None else {"target": target}
    return Record(
        operation="indexer", case=f"{spec.arithmetic} {spec.context} {way}", rows=spec.rows, backend="indexer",
        reason=reason, spec=dataclasses.asdict(spec), us=round(us, 3), spread=round(taken.spread, 4), calls=taken.calls,
        l2="warm" if way == "selection" else "cold", bytes=nbytes, flops=flops, tb_s=round(nbytes / us / 1e6, 3),
        tflop_s=round(flops / us / 1e6, 2), bound=bound, bound_us=round(bound_us, 3),
        percent_of_bound=round(100 * bound_us / us, 1), error=result.worst, tolerance=result.tolerance, rivals_us=rivals,
        against={who: round(theirs / us, 3) for who, theirs in rivals.items()}, run=run,
    )  # fmt: skip
