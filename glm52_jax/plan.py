"""What is decided once, before a program is traced: dtypes and the arithmetic of FP8 weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.fp8_linear import ARITHMETICS

DTYPES = ("bfloat16", "float32")
CACHES = ("float32", "bfloat16", "fp8")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static choices of a program; hashable, so one plan is one trace.

    dtype: of the activations, "bfloat16" or "float32".
    cache: "float32", "bfloat16" or "fp8" for the latents; index keys are float32 with a float32 cache, else FP8.
    linear: arithmetic of FP8 weights, "w8a16" or "w8a8".
    """

    dtype: str = "bfloat16"
    cache: str = "bfloat16"
    linear: str = "w8a16"

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("cache", CACHES), ("linear", ARITHMETICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")

    @property
    def activation(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def index_quantized(self) -> bool:
        return self.cache != "float32"
