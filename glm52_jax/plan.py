"""What is decided once, before a program is traced: dtypes, the arithmetic of FP8 weights and how devices share the work."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.fp8_linear import ARITHMETICS

DTYPES = ("bfloat16", "float32")
CACHES = ("float32", "bfloat16", "fp8")


MODES = ("tp", "ep", "ep+dp")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the devices of a mesh with one axis share a model.

    mode: "tp" slices heads, every MLP's and every expert's width, and the vocabulary over all devices. "ep" places whole routed
    experts on devices and is "tp" in everything else. "ep+dp" is "ep" with whole attention weights on every device, each of which
    attends for its own sequences and holds their caches.
    """

    mesh: Mesh
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"parallel={self.mode!r} must be one of {MODES}")
        if len(self.mesh.axis_names) != 1:
            raise ValueError(
                f"a mesh with one axis over all its devices is needed, this one has {dict(self.mesh.shape)}"
            )

    @property
    def axis(self) -> str:
        """Name of the mesh axis, for collectives."""
        return self.mesh.axis_names[0]

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def own_sequences(self) -> bool:
        """Whether each device attends for its own sequences; else every device holds every row of the residual stream."""
        return self.mode == "ep+dp"

    @property
    def whole_experts(self) -> bool:
        """Whether a routed expert lies on one device; else every device has a slice of each."""
        return self.mode != "tp"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static choices of a program; hashable, so one plan is one trace.

    dtype: of the activations, "bfloat16" or "float32".
    cache: "float32", "bfloat16" or "fp8" for the latents; index keys are float32 with a float32 cache, else FP8.
    linear: arithmetic of FP8 weights, "w8a16" or "w8a8".
    parallel: how several devices share the work; None is one device.
    """

    dtype: str = "bfloat16"
    cache: str = "bfloat16"
    linear: str = "w8a16"
    parallel: Parallel | None = None

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
