"""Figures of cases: check, chain, time, record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from bench import timing
from bench.ahead import compile_case
from bench.check import Check, WrongResult, checked, differences, same_bits
from bench.operations import Operation, Selection
from bench.records import Ceilings, Record
from bench.session import Session
from bench.workers import ALL, Share
from pallas_kernels.arch import Arch

CHAIN = 100
# The reference is some ten times slower and compiles slowly: a short chain of it is exact enough.
REFERENCE_CHAIN = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """backends: "chosen", "all" or a backend's name. reference: time the reference too. chain: calls in one jit.

    targets: only cases and rows beside which a target or somebody else's figure stands.
    """

    backends: str = "chosen"
    reference: bool = True
    rows: tuple[int, ...] | None = None
    targets: bool = False
    chain: int = CHAIN
    rounds: int = 7
    round_seconds: float = 0.1


@dataclasses.dataclass(frozen=True)
class Raw:
    """A timing before the ceilings of its run are known."""

    operation: Operation
    case: str
    spec: Any
    arch: Arch
    reason: str
    check: Check
    timing: timing.Timing
    reference_us: float | None

    def record(self, ceilings: Ceilings, run: str) -> Record:
        spec, us = self.spec, self.timing.microseconds
        nbytes, flops = int(spec.bytes()), int(spec.flops())
        bound, bound_us = ceilings.bound_of(spec)
        rivals = self.operation.rivals(self.case, spec.rows)
        others = {**rivals, **({"reference": self.reference_us} if self.reference_us else {})}
        return Record(
            operation=self.operation.name,
            case=self.case,
            rows=spec.rows,
            backend=self.check.backend,
            reason=self.reason,
            spec={
                name: value if isinstance(value, int | float | bool) else str(value) for name, value in _fields(spec)
            },
            us=round(us, 3),
            spread=round(self.timing.spread, 4),
            calls=self.timing.calls,
            l2="cold" if self.operation.cold(spec, self.arch) else "warm",
            bytes=nbytes,
            flops=flops,
            tb_s=round(nbytes / us / 1e6, 3),
            tflop_s=round(flops / us / 1e6, 2),
            bound=bound,
            bound_us=round(bound_us, 3),
            percent_of_bound=round(100 * bound_us / us, 1),
            error=self.check.worst,
            tolerance=self.check.tolerance,
            rivals_us=rivals,
            against={who: round(theirs / us, 3) for who, theirs in others.items()},
            run=run,
        )


def _fields(spec: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(spec, field.name)) for field in dataclasses.fields(spec))


def require_gpu(arch: Arch | None, command: str) -> Arch:
    """Refuses a command that reports figures where there is no NVIDIA GPU."""
    if arch is None:
        raise SystemExit(
            f"bench {command} needs an NVIDIA GPU: figures of {jax.devices()[0].device_kind!r} would say nothing. "
            "Here you can use list, verify and report."
        )
    return arch


def cases(selection: Selection, options: Options, arch: Arch) -> Iterator[tuple[str, Any]]:
    """(case, spec) of everything a selection names, at every row count, sized to pass the L2."""
    operation = selection.operation
    for case in selection.cases:
        for rows in options.rows or (operation.compared(case) if options.targets else operation.rows):
            if not options.targets or operation.rivals(case, rows):
                yield case, operation.sized(case, rows, arch)


def largest(selections: Sequence[Selection], options: Options, arch: Arch) -> int:
    """Bytes of the arguments of the largest case that a run has, at the first of its row counts."""
    first: dict[tuple[str, str], tuple[Operation, Any]] = {}
    for selection in selections:
        for case, spec in cases(selection, options, arch):
            first.setdefault((selection.operation.name, case), (selection.operation, spec))
    return max((operation.size(spec) for operation, spec in first.values()), default=0)


def measure_case(
    operation: Operation, case: str, spec: Any, options: Options, session: Session, forced: str | None = None
) -> list[Raw]:
    """Checks and times the backends of one spec, interleaved; raises WrongResult before anything is timed.

    What it needs is compiled first; from then on the GPU is this process's own, among those that share the session.
    """
    operation, arch = operation.remembering(), session.arch
    names = _names(operation, spec, options, arch, forced)
    lengths = {name: _length(name, spec, options) for name in names}
    compile_case(operation, spec, lengths)
    with session.turn():
        args = operation.inputs(spec, jax.random.key(0))
        checks = {name: checked(operation, spec, name, args) for name in names}
        for result in checks.values():
            if not result.ok:
                raise WrongResult(f"{operation.name}:{case} rows={spec.rows} {result}")
        chains = [timing.chain(operation, spec, name, args, lengths[name]) for name in names]
        timings = dict(zip(names, timing.measure(chains, options.rounds, options.round_seconds), strict=True))
    reference = timings["reference"].microseconds if "reference" in timings else None
    return [
        Raw(
            operation,
            case,
            spec,
            arch,
            _reason(operation, spec, name, arch, forced),
            checks[name],
            timings[name],
            reference,
        )
        for name in names
    ]


def _length(backend: str, spec: Any, options: Options) -> int:
    if backend == "reference":
        return min(REFERENCE_CHAIN, options.chain)
    return max(options.chain, getattr(spec, "layers", 1))  # every copy is walked through, or the L2 may hold them all


def _names(operation: Operation, spec: Any, options: Options, arch: Arch | None, forced: str | None) -> list[str]:
    wanted = forced or (None if options.backends in ("chosen", "all") else options.backends)
    names = [operation.choose(spec, arch, wanted).backend]
    if options.backends == "all" and not forced:
        names = [name for name in operation.serving(spec, arch) if name != "reference"] or names
    return names + (["reference"] if options.reference and "reference" not in names else [])


def _reason(operation: Operation, spec: Any, name: str, arch: Arch | None, forced: str | None) -> str:
    choice = operation.choose(spec, arch)
    return choice.reason if choice.backend == name and forced is None else f"forced; the choice is {choice.backend}"


def run(selections: Sequence[Selection], options: Options, session: Session, share: Share = ALL) -> None:
    """Times and records everything selected, or a worker's share of it; what is wrong is noted and not reported."""
    numbered = enumerate(
        (selection, *each) for selection in selections for each in cases(selection, options, session.arch)
    )
    for selection, case, spec in (what for number, what in numbered if share.takes(number)):
        choice = selection.operation.choose(spec, session.arch, selection.backend)
        if choice.backend == "reference" and options.backends == "chosen" and not selection.backend:
            session.say(
                f"{selection.operation.name}:{case} rows={spec.rows}: only the reference serves ({choice.reason})"
            )
            continue
        try:
            raws = measure_case(selection.operation, case, spec, options, session, selection.backend)
        except WrongResult as error:
            session.refuse(str(error))
            continue
        keep(raws, session)


def keep(raws: Sequence[Raw], session: Session, remark: str = "") -> None:
    """Records timings and says them, a line each."""
    for raw, record in zip(raws, session.keep([raw.record for raw in raws]), strict=True):
        session.say(
            f"{record.operation}:{record.case} rows={record.rows} {record.backend}: {record.us:.2f} us "
            f"+-{100 * raw.timing.spread:.1f}% {record.tb_s:.2f} TB/s {record.tflop_s:.1f} TFLOP/s "
            f"{record.percent_of_bound:.0f}% of the {record.bound} bound, error {record.error:.1e}{remark}"
        )


def compare(
    first: Selection, second: Selection, options: Options, arch: Arch, say: Callable[[str], None] = print
) -> list[str]:
    """Times two selections of one case each, interleaved in one process; returns what was wrong."""
    wrong: list[str] = []
    timing.raise_clocks()
    for rows in options.rows or first.operation.rows:
        chains, names = [], []
        for selection in (first, second):
            operation, (case,) = selection.operation, selection.cases
            spec = operation.sized(case, rows, arch)
            name = operation.choose(spec, arch, selection.backend).backend
            args = operation.inputs(spec, jax.random.key(0))
            result = checked(operation, spec, name, args)
            if not result.ok:
                wrong.append(f"{operation.name}:{case} rows={rows} {result}")
            chains.append(timing.chain(operation, spec, name, args, _length(name, spec, options)))
            names.append(f"{operation.name}:{case}@{name}")
        if wrong:
            break
        a, b = timing.measure(chains, options.rounds, options.round_seconds)
        say(
            f"rows={rows} A {names[0]} {a.microseconds:.2f} us +-{100 * a.spread:.1f}%  "
            f"B {names[1]} {b.microseconds:.2f} us +-{100 * b.spread:.1f}%  B/A {b.microseconds / a.microseconds:.3f}"
        )
    return wrong


def sweep(selection: Selection, field: str, values: Sequence[Any], options: Options, session: Session) -> None:
    """Times one case for several values of a field of its spec, such as the number of KV splits.

    Each value must pass its check and give the same bits on every repeat; how far it is from the first value is printed.
    """
    (case,), operation = selection.cases, selection.operation
    for rows in options.rows or operation.rows:
        first: Any = None
        for value in values:
            spec = dataclasses.replace(operation.sized(case, rows, session.arch), **{field: value})
            args = operation.inputs(spec, jax.random.key(0))
            backend = operation.choose(spec, session.arch, selection.backend).backend
            out = operation.comparable(spec, operation.function(spec, backend)(*args))
            first = out if first is None else first
            apart = max((difference.rel_l2 for _, difference in differences(out, first)), default=0.0)
            name = f"{case}[{field}={value}]"
            if not same_bits(operation, spec, backend, args):
                session.refuse(f"{operation.name}:{name} rows={rows}: repeats differ in their bits")
                continue
            try:
                raws = measure_case(operation, name, spec, options, session, selection.backend)
            except WrongResult as error:
                session.refuse(str(error))
                continue
            keep(raws, session, f", {apart:.1e} from {field}={values[0]}, repeats bitwise equal")
