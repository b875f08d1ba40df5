"""An operation made for the tests of the benchmarks: x @ w[layer] + offset."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp

from bench import run
from bench.operations import Operation
from pallas_kernels import arch
from pallas_kernels.registry import Backend, Refusal

H200 = arch.by_name("H200-141")


@dataclasses.dataclass(frozen=True)
class Spec:
    rows: int = 1
    layers: int = 1
    n: int = 64
    offset: float = 0.0

    def flops(self) -> int:
        return 2 * self.rows * self.n**2

    def bytes(self) -> int:
        return 4 * self.n**2 + 8 * self.rows * self.n


def inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key)
    w = jax.random.normal(keys[0], (spec.layers, spec.n, spec.n))
    return jax.random.normal(keys[1], (spec.rows, spec.n)), w, jnp.int32(0)


def product(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    return jnp.matmul(x, w[layer]) + spec.offset


def backend(name: str, function: Any, refusal: str | None = None) -> Backend:
    return Backend(name, lambda *_: Refusal(refusal) if refusal else None, lambda: function)


def operation(*backends: Backend, reference: Any = product, **contents: Any) -> Operation:
    offered = {"CASES": {"square": Spec(), "large": Spec(n=128)}, "inputs": inputs, **contents}
    return Operation("toy", types.SimpleNamespace(**offered), (*backends, backend("reference", reference)))


def advance(spec: Spec, args: Any, out: Any, i: int) -> Any:
    return args[0], args[1], jnp.int32(i % spec.layers)


FAST = run.Options(rows=(1, 2), chain=4, rounds=2, round_seconds=1e-4)


def nan(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    return product(spec, x, w, layer).at[0, 0].set(jnp.nan)
