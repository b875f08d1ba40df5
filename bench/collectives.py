"""Collectives by size and number of devices, kernels against XLA's, interleaved in one run: ``python -m bench.collectives``.

Calls are chained in one jit with the state donated, as a decode step has them: a graph of some that is replayed in a loop, because
in each run of a program the host pays for every node of its graph and every device (11 us a node on four, more than a call takes).
The kernels follow each other by their epoch and repeat their operand. XLA's would be merged then: they take what the one before
left, divided by the number of devices (part of a conversion that is there anyway), or a sum with it (1 us).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench import records, several, timing
from bench.records import FigureFile
from bench.several import AXIS, mesh_of
from pallas_kernels import collectives
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import ADD_NORM, ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Message
from pallas_kernels.lowering import default_arch

WIDTH = 6144
# Calls in a graph, and replays of it in a run.
CALLS, REPLAYS = 32, 16
# The first graph that is checked: what is shorter becomes none.
CHECKED = 8
# The rows of all devices to the one that has their experts, and their sums back: ``all_gather`` and ``reduce_scatter``.
EXPERTS = "dispatch+combine"
FORMS = (ALL_REDUCE, ADD_NORM, ALL_GATHER, REDUCE_SCATTER, EXPERTS)
ROWS = {
    ALL_REDUCE: (1, 4, 16, 64),
    ADD_NORM: (1, 4, 16),
    ALL_GATHER: (8, 64),
    REDUCE_SCATTER: (8, 64),
    EXPERTS: (8, 64),
}
# (form, devices, rows) -> microseconds in a replayed graph.
TARGETS = {
    (ALL_REDUCE, 2, 1): 5.0, (ALL_REDUCE, 4, 1): 6.5, (ADD_NORM, 2, 1): 6.0, (ADD_NORM, 4, 1): 7.5, (EXPERTS, 4, 64): 35.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Figure:
    """One exchange by one backend.

    rows: of all devices, each 6144 bfloat16; bytes: of the operand on one device; error: of one call against the reference,
    relative L2; whole: whether calls in a row are one graph, None where nobody looked.
    """

    form: str
    devices: int
    rows: int
    bytes: int
    backend: str
    us: float
    spread: float
    calls: int
    error: float
    whole: bool | None
    target_us: float | None
    run: str = ""

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.form, self.devices, self.rows, self.backend)


FILE = FigureFile("collectives", Figure, "figures of collectives")


def message(form: str, rows: int, devices: int) -> Message:
    """The exchange of ``rows`` rows; a dispatch is described by the gather that it begins with."""
    if form in (ALL_GATHER, EXPERTS):
        return Message(ALL_GATHER, (rows // devices, WIDTH), "bfloat16", devices)
    return Message(form, (rows, WIDTH), "bfloat16", devices, eps=1e-5 if form == ADD_NORM else 0.0)  # type: ignore[arg-type]


def operands(mesh: Mesh, spec: Message) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x [devices, ...], residual, norm weight): x differs by device, the other two do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(spec.devices, *spec.shape)).astype(jnp.dtype(spec.dtype))
    residual = rng.normal(size=spec.shape).astype(jnp.dtype(spec.dtype))
    weight = rng.uniform(0.5, 1.5, (2, spec.shape[-1])).astype(jnp.bfloat16)
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.device_put(x, split), jax.device_put(residual, whole), jax.device_put(weight, whole)


def once(form: str, spec: Message, y: jax.Array, residual: jax.Array, weight: jax.Array, backend: str) -> jax.Array:
    """One exchange on one device."""
    if form == ADD_NORM:
        return collectives.all_reduce_add_norm(y, residual, weight, 1, spec.eps, AXIS, backend=backend)[1]
    if form == ALL_REDUCE:
        return collectives.all_reduce(y, AXIS, backend=backend)
    if form == REDUCE_SCATTER:
        return collectives.reduce_scatter(y, AXIS, backend=backend)
    rows = collectives.all_gather(y, AXIS, backend=backend)
    return rows if form == ALL_GATHER else collectives.reduce_scatter(rows, AXIS, backend=backend)


def chain(form: str, spec: Message, y: jax.Array, more: Sequence[jax.Array], backend: str, calls: int) -> jax.Array:
    """What leaves the last of ``calls`` exchanges."""
    for _ in range(calls - 1):
        out = once(form, spec, y, more[0], more[1], backend)
        if backend != "reference":
            continue
        if out.shape == y.shape:
            y = out if form == ADD_NORM else out * (1 / spec.devices)
        else:
            y = y + 0 * out.ravel()[:1].reshape((1,) * y.ndim)
    return once(form, spec, y, more[0], more[1], backend)


def step(mesh: Mesh, form: str, spec: Message, backend: str, calls: int, replays: int = 0) -> Callable[..., Any]:
    """Jitted (x, state, work, residual, weight) -> (result [devices, ...], state) of the last of ``calls``; x, state donated.

    With replays the calls are the body of a loop, and x comes back instead of the result.
    """
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def body(
        x: jax.Array, state: workspace.State, work: workspace.Workspace, residual: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, workspace.State]:
        def some(carry: tuple[jax.Array, workspace.State]) -> tuple[jax.Array, workspace.State]:
            with workspace.bound(work, carry[1]) as box:
                return chain(form, spec, carry[0], (residual, weight), backend, calls), box.state

        def again(_: Any, carry: tuple[jax.Array, workspace.State]) -> tuple[jax.Array, workspace.State]:
            y, state = some(carry)
            return carry[0] + 0 * y.ravel()[:1].reshape((1,) * (y.ndim)), state

        out, state = jax.lax.fori_loop(0, replays, again, (x[0], state)) if replays else some((x[0], state))
        return out[None], state

    ins, outs = (split, split, split, whole, whole), (split, split)
    spread = jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(spread, donate_argnums=(0, 1), keep_unused=True)


class Case:
    """One exchange by one backend: lowered when it is made, then ``compile`` it, in any thread."""

    def __init__(self, mesh: Mesh, form: str, rows: int, backend: str) -> None:
        self.mesh, self.form, self.rows, self.backend = mesh, form, rows, backend
        self.spec = message(form, rows, mesh.size)
        x, residual, weight = self.given()
        work, state = workspace.make(mesh)
        # The kernels repeat their operand: some calls leave what one does.
        first = step(mesh, form, self.spec, backend, 1 if backend == "reference" else CHECKED)
        runs = (first, step(mesh, form, self.spec, backend, CALLS, REPLAYS))
        self._lowered = [run.lower(x, state, work, residual, weight) for run in runs]  # type: ignore[attr-defined]

    def compile(self) -> Case:
        """What is checked and what is timed; returns itself."""
        self._first, self.whole = several.compiled(self._lowered[0])
        self._chain = self._lowered[1].compile()
        return self

    def given(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return operands(self.mesh, self.spec)

    def result(self) -> np.ndarray:
        """Of one call, on all devices; ValueError where a device missed another."""
        x, residual, weight = self.given()
        work, state = workspace.make(self.mesh)  # Of its own: an epoch belongs to one.
        y, state = self._first(x, state, work, residual, weight)
        missed = {rank: workspace.missing(int(s)) for rank, s in enumerate(np.asarray(state.status)[:, 0]) if s}
        if missed:
            raise ValueError(f"{self.form} of {self.rows} rows: devices missed others: {missed}")
        return np.asarray(y).astype(np.float64)

    def repeat(self) -> timing.Repeat:
        x, residual, weight = self.given()
        work, state = workspace.make(self.mesh)  # Of its own: an epoch belongs to one.
        return timing.Repeat(lambda carry: self._chain(*carry, work, residual, weight), (x, state), CALLS * REPLAYS)


def cases(mesh: Mesh, forms: Sequence[str], jobs: int = 16) -> list[list[Case]]:
    """For each form and size its backends, the kernel first where it serves; compiled side by side."""
    wanted = []
    for form in forms:
        for rows in (rows for rows in ROWS[form] if rows % mesh.size == 0 or form in (ALL_REDUCE, ADD_NORM)):
            refused = workspace.supports(message(form, rows, mesh.size), default_arch())
            wanted.append(
                [(form, rows, name) for name in ("triton", "reference") if not (refused and name == "triton")]
            )
    with ThreadPoolExecutor(jobs) as pool:
        # Lowered one after the other, since that compiles Triton's kernels; XLA's part beside it.
        made = {one: pool.submit(Case(mesh, *one).compile) for group in wanted for one in group}
        return [[made[one].result() for one in group] for group in wanted]


def measure(group: Sequence[Case], rounds: int, round_seconds: float = 0.04) -> list[Figure]:
    """The backends of one exchange, interleaved; the last one is the reference."""
    results = [case.result() for case in group]
    want = results[-1]
    timings = timing.measure([case.repeat() for case in group], rounds, round_seconds)
    figures = []
    for case, taken, got in zip(group, timings, results, strict=True):
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        figures.append(
            Figure(
                form=case.form, devices=case.mesh.size, rows=case.rows, bytes=case.spec.nbytes(), backend=case.backend,
                us=round(taken.microseconds, 3), spread=round(taken.spread, 4), calls=taken.calls, error=error,
                whole=case.whole, target_us=TARGETS.get((case.form, case.mesh.size, case.rows)),
            )
        )  # fmt: skip
    return figures


def table(figures: Sequence[Figure]) -> list[str]:
    """Markdown: one line an exchange."""
    lines = [
        "| exchange | GPUs | rows | bytes a GPU | kernel us | XLA us | target | error | one graph |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    kinds: dict[Any, dict[str, Figure]] = {}
    for figure in figures:
        kinds.setdefault((FORMS.index(figure.form), figure.devices, figure.rows), {})[figure.backend] = figure
    for (_, devices, rows), found in sorted(kinds.items()):
        ours, xla = found.get("triton"), found.get("reference")
        some = ours or xla
        assert some is not None
        us = [f"{figure.us:.2f}" if figure else "" for figure in (ours, xla)]
        error = f"{ours.error:.1e}" if ours else ""
        lines.append(
            f"| {some.form} | {devices} | {rows} | {some.bytes} | {us[0]} | {us[1]} | {some.target_us or ''} | {error} | "
            f"{'' if ours is None or ours.whole is None else 'yes' if ours.whole else 'no'} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and records; 1 where a result was wrong, 2 without two GPUs."""
    parser = argparse.ArgumentParser(prog="python -m bench.collectives", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", default="2,4,8", help="of these as many as there are (default %(default)s)")
    parser.add_argument("--forms", default=",".join(FORMS), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median is taken (default %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")
    options = parser.parse_args(arguments)
    counts = [n for n in map(int, options.devices.split(",")) if n <= jax.device_count() and n in workspace.WORLDS]
    if default_arch() is None or not counts:
        print(f"bench.collectives: two GPUs are needed, JAX sees {jax.devices()}")
        return 2
    show = functools.partial(print, flush=True)
    results = several.Results(FILE, options.results, table, show)
    wrong = 0
    for devices in counts:
        for group in cases(mesh_of(devices), options.forms.split(",")):
            figures = [dataclasses.replace(figure, run=results.name) for figure in measure(group, options.rounds)]
            show("; ".join(f"{f.form} x{devices} {f.rows} rows {f.backend} {f.us:.2f} us +-{f.spread:.0%} error {f.error:.1e}"
                           f" whole {f.whole}" for f in figures))  # fmt: skip
            bad = not all(math.isfinite(f.error) and f.error < 1e-2 for f in figures)
            wrong += bad
            if not bad:
                results.keep(devices, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
