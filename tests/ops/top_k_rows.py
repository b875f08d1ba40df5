"""Rows that are hard to select from, and what top_k has to give, for its tests with and without a GPU."""

from __future__ import annotations

import numpy as np


def expected(scores: np.ndarray, length: int, k: int) -> np.ndarray:
    """Ascending positions, then -1; scores compared as numbers in float64, where no float32 is a denormal."""
    chosen = np.arange(min(length, k))
    if length > k:
        value = np.where(np.isnan(scores[:length]), np.float32(-np.inf), scores[:length]).astype(np.float64)
        chosen = np.sort(np.argsort(-value, kind="stable")[:k])
    return np.pad(chosen, (0, k - len(chosen)), constant_values=-1).astype(np.int32)


def around(n: int, k: int) -> np.ndarray:
    """Rows [6, n] for the bins of ``gluon_row``: their range spoilt by one score or infinite, 32 and 33 equals around the k-th."""
    rng = np.random.default_rng(n + k)
    rows = rng.normal(size=(6, n))
    rows[0, n // 3], rows[1, n // 3] = 3e38, -3e38
    rows[2, :: n // 4 + 1], rows[3, 5::7] = np.inf, -np.inf
    for row, equal in ((4, 32), (5, 33)):
        order = np.argsort(-rows[row])
        rows[row, order[max(0, k - 15) : k - 15 + equal]] = rows[row, order[min(k, n - 1)]]
    return rows.astype(np.float32)
