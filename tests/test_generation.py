"""Greedy text against a float32 reference that is fed the same text: the CPU twin of tests/test_generation_gpu.py."""

from __future__ import annotations

import pytest

import glm52_jax
from pallas_kernels.blocks import BlockScaled
from tests.generation_checks import agreement
from tests.test_program import prompts, tiny

# Below 64 tokens: one page.
STEPS = 30


@pytest.fixture
def exact() -> glm52_jax.Model:
    return tiny()


def test_float32_is_the_reference_itself(exact: glm52_jax.Model) -> None:
    """Prefill, decode steps and teacher forcing are one text: 1e-6 apart, no other token."""
    found = agreement(exact, exact, prompts(1)[0], STEPS)
    assert len(found.errors) == STEPS - 1 and found.errors.max() < 1e-5 and not found.margins.size, str(found)


def test_another_model_does_not_agree(exact: glm52_jax.Model) -> None:
    """Weights a few percent off: the check sees it."""
    q_b = exact.weights.attention.q_b
    assert isinstance(q_b, BlockScaled)
    changed = exact.weights.attention.replace(q_b=BlockScaled(q_b.data, q_b.scale * 1.05))  # type: ignore[attr-defined]
    other = exact.replace(weights=exact.weights.replace(attention=changed))
    assert agreement(other, exact, prompts(1)[0], STEPS).errors.max() > 1e-3
