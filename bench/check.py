"""The check that comes before every figure: a backend's outputs against the reference's, on the inputs that are timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.operations import Operation
from pallas_kernels.compare import Difference, compare


@dataclasses.dataclass(frozen=True)
class Check:
    """worst: largest relative L2 error of any output leaf of any call. detail: that leaf's Difference as text."""

    backend: str
    ok: bool
    worst: float
    tolerance: float
    detail: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'WRONG'} {self.backend}: {self.detail} (tolerance {self.tolerance:.1e})"


class WrongResult(RuntimeError):
    """A backend's result is outside its tolerance: nothing is reported for it."""


def check(operation: Operation, spec: Any, backend: str, args: tuple[Any, ...]) -> Check:
    """Compares a backend with the reference on a chain's first call and, where calls differ, on the call at its last layer."""
    run, reference = operation.function(spec, backend), operation.function(spec, "reference")
    calls = {0: args}
    if operation.rotates:
        last = last_call(spec)
        calls[last] = operation.advance(spec, args, reference(*args), last)
    worst, detail = -1.0, "no outputs"
    for number, call in calls.items():
        got, want = (operation.comparable(spec, f(*call)) for f in (run, reference))
        for name, difference in differences(got, want):
            # A NaN in the measure itself must lose against every number.
            error = difference.rel_l2 if not np.isnan(difference.rel_l2) else np.inf
            if error > worst:
                worst, detail = error, f"call {number} output{name} {difference}"
    tolerance = operation.tolerance(spec, backend)
    return Check(backend, 0.0 <= worst <= tolerance, worst, tolerance, detail)


def last_call(spec: Any) -> int:
    """The call of a chain that is checked beside the first: the one at the last layer."""
    return max(1, getattr(spec, "layers", 2) - 1)


def checked(operation: Operation, spec: Any, backend: str, args: tuple[Any, ...]) -> Check:
    """``check`` before a figure: on the timed inputs where that can be, and without asking the reference about itself."""
    if backend == "reference":
        return Check(backend, True, 0.0, 0.0, "is the reference")
    small = small_enough(operation, spec)
    return check(operation, small, backend, args if small is spec else operation.inputs(small, jax.random.key(0)))


def small_enough(operation: Operation, spec: Any) -> Any:
    """The spec to check: the timed one, unless its output is a whole cache, which the host would compare for minutes."""
    if not operation.state or not hasattr(spec, "layers"):
        return spec
    return dataclasses.replace(spec, layers=min(spec.layers, 3))


def differences(got: Any, want: Any) -> list[tuple[str, Difference]]:
    """(path, Difference) of every output leaf; raises WrongResult where the structures differ."""
    left, right = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    if [path for path, _ in left] != [path for path, _ in right]:
        raise WrongResult(f"outputs have another structure: {jax.tree.structure(got)} and {jax.tree.structure(want)}")
    return [
        (jax.tree_util.keystr(path), compare(_host(a), _host(b))) for (path, a), (_, b) in zip(left, right, strict=True)
    ]


def _host(leaf: Any) -> np.ndarray:
    """Floats of up to 32 bits as float32, the rest as it is."""
    array = jnp.asarray(leaf)
    return np.asarray(array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)


def same_bits(operation: Operation, spec: Any, backend: str, args: tuple[Any, ...], repeats: int = 5) -> bool:
    """Whether a backend gives bitwise the same outputs on every repeat; what an operation leaves undefined is not looked at."""
    run = operation.function(spec, backend)

    def outputs() -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(operation.comparable(spec, run(*args)))]

    first, *rest = (outputs() for _ in range(repeats))
    return all(other == first for other in rest)
