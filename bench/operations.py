"""The operations that can be benched: found through what their folders offer (see ``pallas_kernels.registry``)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any

import jax

import pallas_kernels
from pallas_kernels.arch import Arch
from pallas_kernels.registry import Backend, Choice, resolve

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Copies of the weights are walked through until three times this is passed: the L2 must not hold the next ones.
_LEAST_ROTATION = 200e6
# Beyond this many copies the chain compiles for long and the memory fills: such a call's record says "L2 warm".
_MOST_LAYERS = 256
_MOST_BYTES = 24e9
_DEFAULT_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation: its ``spec`` module and its backends. memory: the jitted functions of one that ``remembers``."""

    name: str
    spec: Any
    backends: tuple[Backend, ...]
    memory: dict[Any, Any] | None = None

    @property
    def cases(self) -> dict[str, Any]:
        return self.spec.CASES

    @property
    def rows(self) -> tuple[int, ...]:
        return getattr(self.spec, "ROWS", ROWS)

    @property
    def state(self) -> tuple[int, ...]:
        return getattr(self.spec, "STATE", ())

    def sized(self, case: str, rows: int | None = None, arch: Arch | None = None) -> Any:
        """The spec of a case with that many rows and, for a GPU, enough layers to pass three times its L2 where they fit."""
        changes: dict[str, int] = {} if rows is None else {"rows": rows}
        if arch is not None and hasattr(self.cases[case], "layers"):
            one = dataclasses.replace(self.cases[case], layers=1)
            rotation = max(3 * arch.l2_bytes, _LEAST_ROTATION)
            layer = self.size(dataclasses.replace(one, layers=3)) - self.size(dataclasses.replace(one, layers=2))
            fitting = int(_MOST_BYTES // max(layer, 1))
            changes["layers"] = max(2, min(1 + -(-int(rotation) // one.bytes()), _MOST_LAYERS, fitting))
        return dataclasses.replace(self.cases[case], **changes)

    def size(self, spec: Any) -> int:
        """Bytes of a call's arguments, the whole stack counted; nothing is computed."""
        shapes = jax.eval_shape(lambda: self.inputs(spec, jax.random.key(0)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def cold(self, spec: Any, arch: Arch) -> bool:
        """Whether a chain of calls reads three times the L2 before it comes back to the same bytes."""
        return self.rotates and getattr(spec, "layers", 1) * spec.bytes() >= 3 * arch.l2_bytes

    def remembering(self) -> Operation:
        """This operation with functions that stay, so that what is compiled ahead is found when it is called."""
        return dataclasses.replace(self, memory={})

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` makes; the one made before for this key where the operation remembers."""
        if self.memory is None:
            return make()
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def inputs_program(self, spec: Any) -> Any:
        """The jitted function key -> arguments."""
        return self.remembered(("inputs", spec), lambda: jax.jit(lambda key: tuple(self.spec.inputs(spec, key))))

    def inputs(self, spec: Any, key: jax.Array) -> tuple[Any, ...]:
        # One program only where it was compiled ahead: elsewhere the small ones that are compiled already are faster.
        return tuple(self.spec.inputs(spec, key) if self.memory is None else self.inputs_program(spec)(key))

    def advance(self, spec: Any, args: tuple[Any, ...], out: Any, i: int) -> tuple[Any, ...]:
        """The arguments of call i of a chain; those of the call before where the operation says nothing else."""
        following = getattr(self.spec, "advance", None)
        return tuple(following(spec, args, out, i)) if following else args

    @property
    def rotates(self) -> bool:
        return hasattr(self.spec, "advance")

    def tolerance(self, spec: Any, backend: str) -> float:
        """The largest relative L2 error against the reference that this backend may show."""
        if hasattr(self.spec, "tolerance"):
            return float(self.spec.tolerance(spec, backend))
        return float(getattr(self.spec, "TOLERANCE", {}).get(backend, _DEFAULT_TOLERANCE))

    def comparable(self, spec: Any, out: Any) -> Any:
        unpack = getattr(self.spec, "comparable", None)
        return unpack(spec, out) if unpack else out

    def rivals(self, case: str, rows: int) -> dict[str, float]:
        """Who else measured this case at these rows on the same GPU -> microseconds."""
        named = getattr(self.spec, "RIVALS", {}).get(case, {})
        return {who: by_rows[rows] for who, by_rows in named.items() if rows in by_rows}

    def compared(self, case: str) -> tuple[int, ...]:
        """The rows at which a target or somebody else's figure stands beside this case."""
        named = getattr(self.spec, "RIVALS", {}).get(case, {})
        return tuple(sorted({rows for by_rows in named.values() for rows in by_rows}))

    def choose(self, spec: Any, arch: Arch | None, forced: str | None = None) -> Choice:
        return resolve(self.name, self.backends, spec, arch, forced)

    def serving(self, spec: Any, arch: Arch | None) -> tuple[str, ...]:
        """Names of the backends that do not refuse, fastest first."""
        return tuple(backend.name for backend in self.backends if backend.supports(spec, arch) is None)

    def function(self, spec: Any, backend: str) -> Any:
        """``f(*args)`` of that backend. One jitted function for all calls of a chain: it is traced once."""
        (chosen,) = (b for b in self.backends if b.name == backend)
        return self.remembered((spec, backend), lambda: jax.jit(functools.partial(chosen.load(), spec)))


def discover() -> dict[str, Operation]:
    """Every operation of ``pallas_kernels`` that has cases and backends, by name."""
    found = {}
    for name in packages():
        package = importlib.import_module(f"pallas_kernels.{name}")
        if hasattr(package, "BACKENDS") and importlib.util.find_spec(f"pallas_kernels.{name}.spec"):
            found[name] = Operation(name, importlib.import_module(f"pallas_kernels.{name}.spec"), package.BACKENDS)
    return found


def packages() -> list[str]:
    """Names of all operations' folders, also of those that have only a reference so far."""
    return sorted(module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What one ``OP[:CASE][@BACKEND]`` on the command line names."""

    operation: Operation
    cases: tuple[str, ...]
    backend: str | None


def select(text: str, operations: dict[str, Operation]) -> Selection:
    """Parses ``OP[:CASE][@BACKEND]``; ValueError lists what there is."""
    path, _, backend = text.partition("@")
    name, _, case = path.partition(":")
    if name not in operations:
        known = ", ".join(operations) or "none yet"
        hint = "it has only a reference and no cases" if name in packages() else "there is no such operation"
        raise ValueError(f"cannot bench {name!r}: {hint}. Operations with cases: {known}")
    operation = operations[name]
    if case and case not in operation.cases:
        raise ValueError(f"{name} has no case {case!r}: there are {', '.join(operation.cases)}")
    names = [b.name for b in operation.backends]
    if backend and backend not in names:
        raise ValueError(f"{name} has no backend {backend!r}: there are {', '.join(names)}")
    return Selection(operation, (case,) if case else tuple(operation.cases), backend or None)
