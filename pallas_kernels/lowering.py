"""Which GPU is being compiled for: the default device's, or a named one on a machine that has none."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels import arch as archs
from pallas_kernels.arch import Arch

# Empty outside of ``target``; a tuple inside it, because None is a target too.
_TARGET: contextvars.ContextVar[tuple[Arch | None, ...]] = contextvars.ContextVar("target_arch", default=())
# What the smallest generations from SM80 on (SM86, SM89, SM120) let a block opt in to.
_SMALLEST_SMEM = 99 * 1024


def default_arch() -> Arch | None:
    """The GPU that JAX computes on by default, or None where that is no NVIDIA GPU.

    Inside ``target`` it is the one named there. Where JAX is held to the CPU this starts no JAX backend.
    """
    aimed = _TARGET.get()
    if aimed:
        return aimed[0]
    if jax.config.jax_platforms == "cpu":
        return None
    device = jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):  # a platform name is allowed there
        device = jax.devices(device)[0]
    return device_arch(device)


@functools.cache
def device_arch(device: Any) -> Arch | None:
    """What is known of a ``jax.Device``: None unless it is an NVIDIA GPU.

    A GPU that the table lacks gets what its driver says (capability, SMs) and NaN or 0 for the rest: kernels can serve it,
    and nobody draws a roofline for it.
    """
    if device.platform != "gpu" or not device.device_kind.upper().startswith(("NVIDIA", "TESLA", "QUADRO")):
        return None
    known = archs.from_device_kind(device.device_kind)
    if known is not None:
        return known
    capability = str(getattr(device, "compute_capability", "0.0"))
    cores = int(getattr(device, "core_count", 0))
    return Arch(device.device_kind, int(capability.replace(".", "")), cores, _SMALLEST_SMEM, 0, 0, math.nan)


@contextlib.contextmanager
def target(arch: Arch | None) -> Iterator[None]:
    """Makes ``default_arch`` name this GPU for what is traced inside; None is no NVIDIA GPU, so that the references serve.

    What was traced before keeps the backends it chose, also inside a jit's cache: trace new functions here.
    """
    token = _TARGET.set((arch,))
    try:
        yield
    finally:
        _TARGET.reset(token)


def triton_options() -> dict[str, int]:
    """Arguments that ``triton_call`` needs on a machine without a GPU: the compute capability to compile for.

    Every kernel of jax-triton passes here, so its launches get their short keys here too.
    """
    from pallas_kernels import slim_triton

    slim_triton.install()
    arch = default_arch()
    return {} if arch is None else {"compute_capability": arch.sm}


def lower_for_cuda(function: Callable[..., Any], *args: Any, arch: Arch) -> str:
    """Returns the StableHLO text of ``function(*args)`` lowered for that GPU; needs no GPU.

    args: arrays or ``jax.ShapeDtypeStruct``. Mosaic kernels are lowered in full, so that layout errors show; Triton kernels
    are compiled where triton and a CUDA plugin of JAX are installed.
    """
    # The lambda is new in each call, so that no trace made for another GPU is found in jit's cache.
    with target(arch):
        return jax.jit(lambda *a: function(*a)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
