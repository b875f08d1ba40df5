"""Static sizes of the router, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arch import Arch


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names. norm: dtype of an RMSNorm's weight before it, "" for none; delta: a sum before that. unit:
    rows of an item of the experts' lists, 0 for no lists. split: the norm also comes in two e4m3 terms.
    """

    rows: int
    hidden: int
    experts: int
    k: int
    layers: int
    dtype: str
    gate_dtype: str
    scale: float
    norm: str = ""
    delta: bool = False
    eps: float = 0.0
    unit: int = 0
    split: bool = False

    @property
    def unit_here(self) -> int:
        """``unit`` where the launch makes the experts' lists."""
        return self.unit if 1 < self.rows <= self.unit and self.k <= 8 and slices_of(self) else 0

    def split_by(self, arch: Arch | None) -> bool:
        """Whether the launch for few rows makes the terms; GPUs before SM89 know no e4m3."""
        return self.split and bool(self.norm) and slices_of(self) > 0 and (arch is None or arch.sm >= 89)

    def flops(self) -> int:
        return 2 * self.rows * self.hidden * self.experts

    def bytes(self) -> int:
        """One layer's gate, bias and norm, the rows in and out, ids and weights, each once."""
        gate = self.experts * (self.hidden * jnp.dtype(self.gate_dtype).itemsize + 4)
        gate += self.hidden * jnp.dtype(self.norm).itemsize if self.norm else 0
        rows = 1 + bool(self.norm) + 2 * self.delta
        terms = (2 * self.hidden + self.hidden // 32) * self.split
        return gate + self.rows * (rows * self.hidden * jnp.dtype(self.dtype).itemsize + 8 * self.k + terms)


CASES: dict[str, Spec] = {
    "glm": Spec(1, 6144, 256, 8, 1, "bfloat16", "bfloat16", 2.5),
    "glm_f32_gate": Spec(1, 6144, 256, 8, 1, "bfloat16", "float32", 2.5),
    "small": Spec(1, 512, 24, 6, 1, "bfloat16", "bfloat16", 2.5),
    "glm_norm": Spec(1, 6144, 256, 8, 1, "bfloat16", "bfloat16", 2.5, "bfloat16", True, 1e-5),
    "small_norm": Spec(1, 512, 23, 6, 1, "bfloat16", "bfloat16", 2.5, "bfloat16", False, 1e-5),
}
# The launch for few rows: most rows (a warp chooses for a row), most experts (8 a lane), warps of a program, each of which takes 32
# of k at a time, experts of a program, most slices of k.
MOST_ROWS, MOST_EXPERTS, WARPS, TILE, MOST_SLICES = 8, 256, 4, 16, 8
# Updated in place: the mailbox.
STATE = (7,)
# For compute-sanitizer.
SMALL: dict[str, dict[str, Any]] = {"small": {}, "small_norm": {"delta": True, "unit": 8, "split": True}}
RIVALS: dict[str, dict[str, dict[int, float]]] = {"glm_norm": {"target": {1: 4.0}}}


def tolerance(spec: Spec, backend: str) -> float:
    """``inputs`` make logits that are exact on both sides: what differs is the sigmoid's and the sum's last bits. A norm is not
    exact: where its sum differs in the last bit, a number of a row in a thousand is rounded the other way."""
    return 1e-3 if spec.norm else 2e-6


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(x, gate, bias, layer, None, norm, delta, mailbox), the last three None without a norm.

    Logits have a standard deviation near 1, the bias is as wide as the scores.

    x are eighths and gate 2048ths: every product and every sum of them is exact in float32, whatever the order and the unit. So two
    backends have the same logits, and no near tie for the last place goes two ways.
    """
    kx, kg, kb, kn, kd = jax.random.split(key, 5)
    x = jnp.round(8 * jax.random.normal(kx, (spec.rows, spec.hidden), jnp.float32)) / 8
    gate = jax.random.normal(kg, (spec.layers, spec.experts, spec.hidden), jnp.float32) * spec.hidden**-0.5
    gate = (jnp.round(2048 * gate) / 2048).astype(spec.gate_dtype)
    bias = 0.2 * jax.random.normal(kb, (spec.layers, spec.experts), jnp.float32)
    plain = (x.astype(spec.dtype), gate, bias, jnp.zeros((), jnp.int32), None)
    if not spec.norm:
        return *plain, None, None, None
    norm = 1 + 0.1 * jax.random.normal(kn, (spec.layers, spec.hidden), jnp.float32)
    delta = jax.random.normal(kd, x.shape, jnp.float32).astype(spec.dtype) if spec.delta else None
    return (
        *plain,
        norm.astype(spec.norm),
        delta,
        jnp.zeros(mailbox_words(spec.rows, spec.hidden, spec.experts), jnp.int32),
    )


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, ...], i: int) -> tuple[Any, ...]:
    """The next layer of the stack; the weights before become an operand that is not read, so that calls stay in order. With a norm
    the mailbox does that."""
    x, gate, bias, _, _, norm, delta, _ = args
    layer = jnp.asarray(i % spec.layers, jnp.int32)
    return (x, gate, bias, layer, None if spec.norm else out[1], norm, delta, out[-1] if spec.norm else None)


def comparable(spec: Spec, out: tuple[jax.Array, ...]) -> Any:
    """Weights by expert, float32 [rows, experts]: two experts whose scores are equal but for rounding may change places.

    With a norm also the sum, its norm, what its terms stand for, and the mailbox.
    """
    ids, weights = out[2:4] if spec.norm else out
    by_expert = jnp.zeros((spec.rows, spec.experts), jnp.float32).at[jnp.arange(spec.rows)[:, None], ids].add(weights)
    if not spec.norm:
        return by_expert
    sides = (*out[:2], *([] if out[-2] is None else [_joined(spec, *out[-2])]), out[-1])
    return by_expert, *(side.astype(jnp.float32) for side in sides)


def _joined(spec: Spec, values: jax.Array, scales: jax.Array) -> jax.Array:
    """The rows [rows, hidden] of which these are the terms."""
    high, low = (values[:, at : at + spec.rows].astype(jnp.float32) for at in (0, MOST_ROWS))
    rows = (high + low / 16) * scales[:, : spec.rows, None]
    return rows.swapaxes(0, 1).reshape(spec.rows, spec.hidden)


def slices_of(spec: Spec) -> int:
    """Slices of the hidden size in the launch for few rows; 0 where it does not serve."""
    if (
        spec.rows > MOST_ROWS
        or spec.experts > MOST_EXPERTS
        or (spec.dtype, spec.gate_dtype) != ("bfloat16", "bfloat16")
    ):
        return 0
    return _slices(spec.hidden)


def _slices(hidden: int) -> int:
    blocks = -(-hidden // (32 * WARPS))
    return next(n for n in range(MOST_SLICES, 0, -1) if blocks % n == 0)


def mailbox_words(rows: int, hidden: int, experts: int) -> int:
    """Words in which the programs of a launch meet: a logit of each slice, 1 / RMS of each row for each program, a row's choice for
    each row."""
    if rows > MOST_ROWS or experts > MOST_EXPERTS:
        return 1
    programs = -(-experts // TILE) * _slices(hidden)
    return programs * (rows * TILE + MOST_ROWS) + rows * rows * 32
