"""Error measures shared by tests and benchmarks, computed in float64 on the host."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far ``got`` is from ``want``.

    rel_l2: ||got - want||_2 / ||want||_2 over all elements (inf where a NaN or infinity is not matched by the other side).
    cosine: cosine of the two flattened arrays. worst: coordinate of the largest absolute difference. max_abs: that difference.
    nan_got, nan_want: counts of NaN on each side.
    """

    rel_l2: float
    cosine: float
    max_abs: float
    worst: tuple[int, ...]
    nan_got: int
    nan_want: int

    def __str__(self) -> str:
        return (
            f"rel_l2={self.rel_l2:.3e} cosine={self.cosine:.9f} max_abs={self.max_abs:.3e} at {self.worst} "
            f"nan={self.nan_got}/{self.nan_want}"
        )


def compare(got: ArrayLike, want: ArrayLike) -> Difference:
    """Compares two arrays of one shape; raises ValueError when the shapes differ.

    NaNs at the same places on both sides are left out; elsewhere a NaN or an unmatched infinity makes ``rel_l2`` infinite.
    """
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: got {a.shape}, want {b.shape}")
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    same = (nan_a & nan_b) | (a == b)
    with np.errstate(invalid="ignore"):
        diff = np.where(same, 0.0, np.abs(a - b))
    diff = np.where(np.isnan(diff), np.inf, diff)
    finite = np.isfinite(a) & np.isfinite(b)
    x, y = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    norm = float(np.linalg.norm(y))
    total = float(np.linalg.norm(diff)) if np.isfinite(diff).all() else np.inf
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(diff)), diff.shape)) if diff.size else ()
    return Difference(
        rel_l2=total / norm if norm else (0.0 if total == 0.0 else np.inf),
        cosine=float(x.ravel() @ y.ravel() / max(np.linalg.norm(x) * norm, 1e-300)) if total else 1.0,
        max_abs=float(diff.max(initial=0.0)),
        worst=worst,
        nan_got=int(nan_a.sum()),
        nan_want=int(nan_b.sum()),
    )


def rel_l2(got: ArrayLike, want: ArrayLike) -> float:
    """||got - want||_2 / ||want||_2 over all elements."""
    return compare(got, want).rel_l2
