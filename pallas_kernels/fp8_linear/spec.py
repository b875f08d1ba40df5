"""Static sizes of fp8_linear: the spec of a call, the real shapes, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BLOCK, E4M3, BlockScaled
from pallas_kernels.layer_index import KnownLayer


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call: outputs [rows, n] for every n of ``ns`` (SwiGLU: one n, of gate and of up).

    arithmetic: "w8a16" or "w8a8". form: "linear" or "swiglu". weights: "float8_e4m3fn" for blocks, or the float dtype. layers: size
    of the flattened stack. x_dtype, out_dtype: names of dtypes. norm: dtype of the weight of an RMSNorm before it (then the
    outputs are total, normed and the projections), "" for none; delta: a residual is added before that norm; eps: the norm's.
    """

    rows: int
    k: int
    ns: tuple[int, ...]
    arithmetic: str = "w8a16"
    form: str = "linear"
    weights: str = "float8_e4m3fn"
    layers: int = 1
    x_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    norm: str = ""
    delta: bool = False
    eps: float = 0.0

    @property
    def mats(self) -> int:
        return 2 if self.form == "swiglu" else 1

    def operand_bits(self) -> int:
        """Of the matmul whose rate bounds this one: W8A16 is two products of e4m3, at best as fast as one of bfloat16."""
        return 8 if self.weights == "float8_e4m3fn" and self.arithmetic == "w8a8" else 16

    def flops(self) -> int:
        return 2 * self.rows * self.k * sum(self.ns) * self.mats

    def bytes(self) -> int:
        """Weights and scales of one layer, inputs and outputs, each once."""
        one = self.rows * self.k * jnp.dtype(self.x_dtype).itemsize
        # x; with a norm also the residual, total (where it is not x) and normed, and the norm's weight.
        total = one * (1 + 2 * self.delta + bool(self.norm))
        total += self.k * jnp.dtype(self.norm).itemsize if self.norm else 0
        for n in self.ns:
            total += self.mats * n * self.k * jnp.dtype(self.weights).itemsize
            total += self.rows * n * jnp.dtype(self.out_dtype).itemsize
            if self.weights == "float8_e4m3fn":
                total += self.mats * 4 * -(-n // BLOCK) * -(-self.k // BLOCK)
        return total


def _cases() -> dict[str, Spec]:
    shapes: dict[str, tuple[int, tuple[int, ...], str]] = {
        "o_proj": (16384, (6144,), "linear"),
        "q_b": (2048, (16384,), "linear"),
        "q_a_kv_a": (6144, (2048, 576), "linear"),
        "dense_gate_up": (6144, (12288,), "swiglu"),
        "dense_down": (12288, (6144,), "linear"),
        "shared_gate_up": (6144, (2048,), "swiglu"),
        "shared_down": (2048, (6144,), "linear"),
        "index_q": (2048, (4096,), "linear"),
        "o_proj_tp8": (2048, (6144,), "linear"),
        "q_b_tp8": (2048, (2048,), "linear"),
    }
    cases = {
        f"{name}_{arithmetic}": Spec(1, k, ns, arithmetic, form)
        for name, (k, ns, form) in shapes.items()
        for arithmetic in ("w8a8", "w8a16")
    }
    for name, delta in (
        ("norm_q_a_kv_a", False),
        ("add_norm_q_a_kv_a", True),
        ("norm_q_b", False),
        ("norm_q_b_tp8", False),
    ):
        for arithmetic in ("w8a8", "w8a16"):
            plain = cases[f"{name.partition('norm_')[2]}_{arithmetic}"]
            cases[f"{name}_{arithmetic}"] = dataclasses.replace(plain, norm="bfloat16", delta=delta, eps=1e-5)
    return cases


CASES: dict[str, Spec] = _cases()


def tolerance(spec: Spec, backend: str) -> float:
    """Relative L2 against the reference. One rounding to bfloat16 is 1.7e-3, the accumulation of FP8 wgmma 2.2e-4.

    In W8A8 a tie of the rounding of x to e4m3 may fall the other way. Where the largest of a group is 7/4 of a power of two, one in
    16 of its elements is a tie: 1.5e-3 where measured, after a norm 4.5e-3, and up to 5e-3 over 14 layers of normed rows in numpy.
    """
    return 6e-3 if spec.arithmetic == "w8a8" and spec.norm else 4e-3


def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(x [rows, k], weights, index, None) and with a norm (.., norm [layers, k], delta or None), made on the device.

    The layer of the index is known, as those of a model are. Weights: e4m3 of all finite values with positive scales around 1e-3.
    """
    return jax.jit(functools.partial(_inputs, spec))(key)


def _inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    x = jax.random.normal(jax.random.fold_in(key, 0), (spec.rows, spec.k), jnp.float32).astype(spec.x_dtype)
    stack = (spec.layers, 2) if spec.form == "swiglu" else (spec.layers,)
    weights = []
    for j, n in enumerate(spec.ns):
        a, b = jax.random.split(jax.random.fold_in(key, 1 + j))
        # Bit 0 is cleared: the NaN of e4m3fn has all of the lower seven bits set.
        bits = jax.random.bits(a, (*stack, n, spec.k), jnp.uint8) & jnp.uint8(0xFE)
        if spec.weights != "float8_e4m3fn":
            weights.append((jax.random.normal(a, (*stack, n, spec.k)) * spec.k**-0.5).astype(spec.weights))
            continue
        shape = (*stack, -(-n // BLOCK), -(-spec.k // BLOCK))
        scale = jax.random.uniform(b, shape, jnp.float32, 0.5, 1.5) * 1e-3
        weights.append(BlockScaled(jax.lax.bitcast_convert_type(bits, E4M3), scale))
    args = (x, tuple(weights), (KnownLayer(0),), None)
    if not spec.norm:
        return args
    a, b = jax.random.split(jax.random.fold_in(key, 100))
    norm = (1.0 + 0.1 * jax.random.normal(a, (spec.layers, spec.k), jnp.float32)).astype(spec.norm)
    delta = jax.random.normal(b, x.shape, jnp.float32).astype(spec.x_dtype) if spec.delta else None
    return *args, norm, delta


def advance(spec: Spec, args: tuple[Any, ...], out: Any, i: int) -> tuple[Any, ...]:
    """The next layer of the stack; the outputs before become an operand that is not read, so that calls stay in order."""
    x, weights, _, _, *norm = args
    return x, weights, (KnownLayer(i % spec.layers),), jax.tree.leaves(out)[-1], *norm


RIVALS: dict[str, dict[str, dict[int, float]]] = {
    "o_proj_w8a8": {"target": {1: 27.4, 8: 30.0, 4096: 916.3}},
    "q_b_w8a8": {"target": {1: 10.5, 8: 11.5}},
    "q_a_kv_a_w8a8": {"target": {1: 9.0, 8: 10.0}},
    "dense_gate_up_w8a8": {"target": {1: 39.0, 8: 41.0}},
    "o_proj_w8a16": {"OpenInfer CUDA": {1: 27.4, 8: 44.4}, "target": {1: 31.5, 4096: 1832.5}},
    "q_b_w8a16": {"OpenInfer CUDA": {1: 10.6, 8: 15.2}, "target": {1: 12.1}},
    "q_a_kv_a_w8a16": {"OpenInfer CUDA": {1: 15.0, 8: 17.0}, "target": {1: 10.35}},
    "dense_gate_up_w8a16": {"OpenInfer CUDA": {1: 39.0, 8: 59.2}, "target": {1: 44.9}},
    "dense_down_w8a16": {"OpenInfer CUDA": {1: 22.8, 8: 32.1}},
    "norm_q_a_kv_a_w8a8": {"target": {1: 9.0}},
    "norm_q_a_kv_a_w8a16": {"target": {1: 10.35}},
    "add_norm_q_a_kv_a_w8a8": {"target": {1: 9.0}},
    "add_norm_q_a_kv_a_w8a16": {"target": {1: 10.35}},
    "norm_q_b_w8a8": {"target": {1: 10.5, 8: 11.5}},
    "norm_q_b_w8a16": {"target": {1: 12.1}},
    "o_proj_tp8_w8a8": {"target": {1: 5.0}},
    "q_b_tp8_w8a8": {"target": {1: 5.0}},
}
