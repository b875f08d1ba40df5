"""Collectives by size and number of devices, kernel against XLA's, interleaved in one run: ``python -m bench.collectives``.

Calls are chained in one jit, each on the result of the one before, with the state donated, as a decode step would have them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench import timing
from pallas_kernels import collectives
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import ADD_NORM, ALL_REDUCE, Message

AXIS = "devices"
ROWS = (1, 4, 16, 64)
WIDTH = 6144
# Few enough that sums of sums stay finite in bfloat16 on eight devices: 8^32 = 8e28.
CALLS = 32
# (form, devices) -> microseconds in a replayed graph, one row.
TARGETS = {(ALL_REDUCE, 2): 5.0, (ALL_REDUCE, 4): 6.5, (ADD_NORM, 2): 6.0, (ADD_NORM, 4): 7.5}


@dataclasses.dataclass(frozen=True)
class Result:
    """One message by one backend; error: of one call against the reference, relative L2."""

    spec: Message
    backend: str
    microseconds: float
    spread: float
    error: float


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def operands(mesh: Mesh, spec: Message) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x [devices, ...], residual, norm weight): x differs by device, the other two do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(spec.devices, *spec.shape)).astype(jnp.dtype(spec.dtype))
    residual = rng.normal(size=spec.shape).astype(jnp.dtype(spec.dtype))
    weight = rng.uniform(0.5, 1.5, (2, spec.shape[-1])).astype(jnp.bfloat16)
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.device_put(x, split), jax.device_put(residual, whole), jax.device_put(weight, whole)


def step(mesh: Mesh, spec: Message, backend: str, calls: int, scale: float = 1.0) -> Callable[..., Any]:
    """Jitted (x, state, work, residual, weight) -> (scale * result [devices, ...], state) of ``calls`` calls; x, state donated."""
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def body(
        x: jax.Array, state: workspace.State, work: workspace.Workspace, residual: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, workspace.State]:
        y = x[0]
        with workspace.bound(work, state) as box:
            for _ in range(calls):
                if spec.form == ADD_NORM:
                    _, y = collectives.all_reduce_add_norm(y, residual, weight, 1, spec.eps, AXIS, backend=backend)
                else:
                    y = collectives.all_reduce(y, AXIS, backend=backend)
        return (y * scale if scale != 1.0 else y)[None], box.state

    ins, outs = (split, split, split, whole, whole), (split, split)
    spread = jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(spread, donate_argnums=(0, 1))


def repeat(mesh: Mesh, spec: Message, backend: str, made: tuple[Any, Any]) -> timing.Repeat:
    """A timing chain with a state of its own; the last multiplication brings sums of sums back to where they began."""
    x, residual, weight = operands(mesh, spec)
    run = step(mesh, spec, backend, CALLS, 1.0 if spec.form == ADD_NORM else float(spec.devices) ** -CALLS)
    work, state = made
    return timing.Repeat(lambda carry: run(*carry, work, residual, weight), (x, state), CALLS)


def error(mesh: Mesh, spec: Message, backend: str) -> float:
    """Of one call against the reference; a status that is not 0 is an error without end."""
    found = []
    for name in (backend, "reference"):
        x, residual, weight = operands(mesh, spec)
        work, state = workspace.make(mesh)
        y, state = step(mesh, spec, name, 1)(x, state, work, residual, weight)
        if np.asarray(state.status).any():
            return float("inf")
        found.append(np.asarray(y).astype(np.float64))
    return float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))


def measure(devices: int, form: Any, rows: int) -> list[Result]:
    """The kernel, where it serves, and the reference, interleaved."""
    from pallas_kernels.lowering import default_arch

    mesh = mesh_of(devices)
    spec = Message(form, (rows, WIDTH), "bfloat16", devices, eps=1e-5 if form == ADD_NORM else 0.0)
    refusal = workspace.supports(spec, default_arch())
    backends = ("reference",) if refusal else ("triton", "reference")
    errors = [error(mesh, spec, name) for name in backends]
    # Each chain has its own workspace: an epoch belongs to one.
    timings = timing.measure([repeat(mesh, spec, name, workspace.make(mesh)) for name in backends])
    return [
        Result(spec, name, taken.microseconds, taken.spread, wrong)
        for name, taken, wrong in zip(backends, timings, errors, strict=True)
    ]


def main() -> None:
    """Prints one line a message and backend, as they are measured."""
    timing.raise_clocks()
    show = functools.partial(print, flush=True)
    show(f"{'form':20} {'GPUs':>4} {'bytes':>8} {'backend':10} {'us':>8} {'spread':>7} {'target':>7} {'error':>8}")
    for devices in (n for n in workspace.WORLDS if n <= jax.device_count()):
        for form in (ALL_REDUCE, ADD_NORM):
            for rows in ROWS:
                target = TARGETS.get((form, devices), "") if rows == 1 else ""
                for r in measure(devices, form, rows):
                    line = f"{form:20} {devices:4} {r.spec.nbytes():8} {r.backend:10} {r.microseconds:8.2f}"
                    show(f"{line} {r.spread:7.1%} {target:>7} {r.error:8.1e}")


if __name__ == "__main__":
    main()
