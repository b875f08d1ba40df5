"""What generation must give, on the CPU with the references and on a GPU with the kernels."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

import glm52_jax
from glm52_jax import Sampling
from glm52_jax.prefill import pages_of, prefill
from glm52_jax.program import DecodeProgram

GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of greedy text with a float32 reference that is fed the same text.

    errors: of each step's logits, relative L2. worst: of each step, the largest difference of a logit, in standard deviations of
    the reference's logits. margins: where the reference would have drawn another token, by how much it prefers that, in the same
    unit. text: what was drawn.
    """

    text: list[int]
    errors: np.ndarray
    worst: np.ndarray
    margins: np.ndarray

    def __str__(self) -> str:
        middle, high = np.quantile(self.errors, (0.5, 0.95))
        margins = f", by up to {self.margins.max():.3f}" if self.margins.size else ""
        return (
            f"{len(self.errors)} tokens: error median {middle:.2e}, 95 % below {high:.2e}, largest {self.errors.max():.2e}; "
            f"a logit is off by up to {self.worst.max():.3f} deviations; {self.margins.size} tokens differ{margins}"
        )


def agreement(model: glm52_jax.Model, exact: glm52_jax.Model, prompt: list[int], steps: int) -> Agreement:
    """Generates greedily with ``model`` and compares its logits and choices with those of ``exact``, teacher-forced."""
    drawn = [token.id for token in model.generate(prompt, steps, GREEDY, ())]
    return compared(forced_logits(model, prompt, drawn), exact, prompt, drawn)


def compared(got: np.ndarray, exact: glm52_jax.Model, prompt: list[int], drawn: list[int]) -> Agreement:
    """Logits [len(drawn) - 1, vocab] of all drawn tokens but the first, and what was drawn, with those of ``exact``."""
    want = scored(exact, prompt, drawn)
    chosen, unit = np.array(drawn[1:]), want.std(axis=-1)
    preferred = want.max(axis=-1) - np.take_along_axis(want, chosen[:, None], axis=-1)[:, 0]
    return Agreement(
        text=drawn,
        errors=np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1),
        worst=np.abs(got - want).max(axis=-1) / unit,
        margins=(preferred / unit)[want.argmax(axis=-1) != chosen],
    )


def scored(model: glm52_jax.Model, prompt: list[int], drawn: list[int]) -> np.ndarray:
    """The logits that ``compared`` takes, of one pass over the text."""
    return np.asarray(model.score([*prompt, *drawn]))[len(prompt) : -1]


def forced_logits(model: glm52_jax.Model, prompt: list[int], text: list[int]) -> np.ndarray:
    """Logits [len(text) - 1, vocab] of the decode program, fed one token of the text at a time."""
    pages = pages_of(len(prompt) + len(text))
    made = DecodeProgram(model.weights, model.config, model.plan, 1, pages, logits=True)
    arrays = prefill(model.weights, model.config, model.plan, [np.array(prompt, np.int32)], pages, GREEDY)
    state, found = made.adopt(arrays), []
    for token in text[:-1]:
        arrays = made.release(state)
        state = made.step(made.adopt(arrays.replace(tokens=jnp.full_like(arrays.tokens, token))))  # type: ignore[attr-defined]
        found.append(np.asarray(state.arrays.logits)[0])
    return np.stack(found)
