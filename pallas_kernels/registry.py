"""Which backend serves a call: data first, one decision, its reason kept.

A backend states what it supports; ``resolve`` takes the first one that does not refuse, from static shapes and a GPU alone.
Nothing here catches an error of a kernel: a broken kernel must never turn into the reference by itself.

What an operation's folder offers, so that calls, tests and ``python -m bench`` find it:

``pallas_kernels/<op>/__init__.py``
  * the public function: argument checks, then ``registry.call("<op>", BACKENDS, spec, args, forced=backend)``;
  * ``BACKENDS: tuple[Backend, ...]``, fastest first, "reference" last. ``load()`` imports the kernel's file and returns
    ``run(spec, *args) -> outputs`` (an array or a pytree of arrays).

``pallas_kernels/<op>/spec.py`` (neither it nor ``__init__`` imports a kernel language)
  * ``Spec``: frozen dataclass of static sizes and arithmetic, with a field ``rows: int``, and ``layers: int`` where weights or
    caches are stacked; methods ``flops() -> int`` and ``bytes() -> int``: of one call, with one layer of the stack read once
    (for the roofline, so count what must move: weights, scales, inputs, outputs);
  * ``CASES: dict[str, Spec]``: the real shapes by name, at ``rows=1`` and ``layers=1``; the bench replaces ``rows`` by 1 .. 128
    and ``layers`` by enough copies to pass three times the L2;
  * ``inputs(spec, key) -> tuple``: the arguments ``args`` of one call, arrays or pytrees of arrays, made on the device from a PRNG
    key (jit it inside where it is large). Everything the public function would pass after ``spec``.
  Optional, the bench looks for them by name:
  * ``ROWS: tuple[int, ...]``: the rows to sweep instead of 1, 2, 4, ..., 128;
  * ``advance(spec, args, out, i) -> args``: the arguments of the i-th call of a timing chain (i >= 1) given those and the outputs
    of the call before: the next layer of the stack (``i % spec.layers`` as an int32 scalar), an updated cache. Without
    it every call has the same arguments and the record says "L2 warm";
  * ``STATE: tuple[int, ...]``: positions in ``args`` of buffers that are updated in place and come out of ``advance``; the
    bench donates them;
  * ``TOLERANCE: dict[str, float]`` by backend name, or ``tolerance(spec, backend) -> float``: the largest relative L2 error
    against the reference (each output leaf); 1e-2 where neither exists;
  * ``comparable(spec, out) -> pytree``: outputs as float arrays where they are packed bytes;
  * ``RIVALS: dict[str, dict[str, dict[int, float]]]``: case -> who ("OpenInfer CUDA", "target") -> rows -> microseconds.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import jax

from pallas_kernels.arch import Arch
from pallas_kernels.lowering import default_arch, target


@dataclass(frozen=True)
class Refusal:
    """Why a backend cannot serve a spec on a GPU: one sentence with the numbers."""

    reason: str


def needs_sm80(arch: Arch | None) -> Refusal | None:
    """What every portable kernel asks first."""
    return Refusal("needs an NVIDIA GPU of SM80 or newer") if arch is None or arch.sm < 80 else None


def needs_sm90(arch: Arch | None) -> Refusal | None:
    """What every kernel for Hopper asks first."""
    got = "no NVIDIA GPU" if arch is None else f"SM{arch.sm}"
    return None if arch is not None and arch.sm == 90 else Refusal(f"needs SM90, got {got}")


def always(spec: Any, arch: Arch | None) -> None:
    """``supports`` of a reference, which serves anything anywhere."""


@dataclass(frozen=True)
class Module:
    """``load`` of a backend whose file offers ``run(spec, *args)``: imports it, by its full name, when it is called."""

    name: str

    def __call__(self) -> Callable[..., Any]:
        return importlib.import_module(self.name).run


class BackendRefused(ValueError):
    """No backend, or not the forced one, can serve this call; the message has every refusal."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    name: "reference", "triton", "mosaic_sm90", "gluon".
    supports: (spec, arch) -> None, or a Refusal; arch None means that the device is no NVIDIA GPU. Pure, cheap, imports nothing.
    load: imports the kernel's file on first use and returns its function ``run(spec, *args)``.
    on_request: where not empty, why the backend serves only when it is forced, such as "never run on a GPU". Tests and benchmarks
      meet it all the same.
    """

    name: str
    supports: Callable[[Any, Arch | None], Refusal | None]
    load: Callable[[], Callable[..., Any]]
    on_request: str = ""


@dataclass(frozen=True)
class Choice:
    """The decision for one call: which backend, and why that one.

    spec: the call's. inside: the operation whose kernel made this call (what it moves is part of that one's), or "".
    """

    operation: str
    backend: str
    reason: str
    spec: Any = field(default=None, compare=False, repr=False)
    inside: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


class _DefaultDevice:
    pass


DEFAULT_DEVICE: Final = _DefaultDevice()


def resolve(
    operation: str,
    backends: tuple[Backend, ...],
    spec: Any,
    arch: Arch | _DefaultDevice | None = DEFAULT_DEVICE,
    forced: str | None = None,
) -> Choice:
    """Chooses the first backend, in the order given, that does not refuse and need not be asked for.

    arch: the GPU to choose for; the default device's unless given; None is a device that is no NVIDIA GPU.
    forced: the only backend to consider. Raises ValueError for an unknown name.
    Raises BackendRefused where the forced backend, or every backend, refuses.
    """
    gpu = default_arch() if isinstance(arch, _DefaultDevice) else arch
    where = gpu.name if gpu else "no NVIDIA GPU"
    if forced is not None:
        refusal = _by_name(operation, backends, forced).supports(spec, gpu)
        if refusal:
            raise BackendRefused(f"{operation}: backend {forced!r} refuses {spec} on {where}: {refusal.reason}")
        return Choice(operation, forced, "forced", spec)
    refusals: list[str] = []
    for backend in backends:
        refusal = backend.supports(spec, gpu)
        if refusal is None and not backend.on_request:
            return Choice(operation, backend.name, "; ".join(refusals) or f"first choice on {where}", spec)
        refusals.append(
            f"{backend.name} refused: {refusal.reason}"
            if refusal
            else f"{backend.name} on request only: {backend.on_request}"
        )
    raise BackendRefused(f"{operation}: no backend serves {spec} on {where}: {'; '.join(refusals)}")


def call(
    operation: str, backends: tuple[Backend, ...], spec: Any, args: tuple[Any, ...], forced: str | None = None
) -> Any:
    """Resolves for the default device, loads that backend and runs it; under ``jax.jit`` all of it happens at trace time."""
    choice = resolve(operation, backends, spec, forced=forced)
    record = _RECORD.get()
    if record is not None:
        record.append(replace(choice, inside=_INSIDE.get()))
    planning = _PLANNING.get()
    run = _by_name(operation, backends, "reference" if planning else choice.backend).load()
    token = _INSIDE.set(operation)
    try:
        # The reference of a plan is traced as on a device without kernels; what it may call itself is no part of the plan.
        with jax.named_scope(f"{operation}.{choice.backend}"), _unplanned() if planning else contextlib.nullcontext():
            return run(spec, *args)
    finally:
        _INSIDE.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Yields a list that receives the Choice of every call made inside, in order; of a jitted function while it is traced."""
    choices: list[Choice] = []
    token = _RECORD.set(choices)
    try:
        yield choices
    finally:
        _RECORD.reset(token)


@contextlib.contextmanager
def planned() -> Iterator[list[Choice]]:
    """As ``recorded``, for tracing with ``jax.eval_shape``: chooses backends and imports none of them.

    References stand in for what was chosen, since all backends return the same shapes; calls that a kernel makes itself are
    missing. With ``lowering.target`` it plans for a GPU that is not there.
    """
    token = _PLANNING.set(True)
    try:
        with recorded() as choices:
            yield choices
    finally:
        _PLANNING.reset(token)


@contextlib.contextmanager
def _unplanned() -> Iterator[None]:
    planning, record = _PLANNING.set(False), _RECORD.set(None)
    try:
        with target(None):
            yield
    finally:
        _RECORD.reset(record)
        _PLANNING.reset(planning)


_RECORD: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("recorded_choices", default=None)
_PLANNING: contextvars.ContextVar[bool] = contextvars.ContextVar("planning", default=False)
_INSIDE: contextvars.ContextVar[str] = contextvars.ContextVar("inside_operation", default="")


def _by_name(operation: str, backends: tuple[Backend, ...], name: str) -> Backend:
    for backend in backends:
        if backend.name == name:
            return backend
    raise ValueError(f"{operation}: unknown backend {name!r}: there are {', '.join(b.name for b in backends)}")
