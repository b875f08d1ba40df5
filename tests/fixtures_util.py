"""Fixture checkpoints of the oracle, and the comparison that every one of them must pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import glm52_jax
from pallas_kernels.compare import rel_l2
from tests.oracle.models import FIXTURES, MODELS, FixtureModel

# transformers builds the two latent norms with this epsilon (spec trap 1).
HF_LATENT_EPS = 1e-6
TOLERANCE = 1e-4
BY_NAME: dict[str, FixtureModel] = {model.name: model for model in MODELS}


@cache
def checkpoint_dir(name: str) -> Path:
    """Directory with the fixture's checkpoint, written once a test process."""
    directory = Path(mkdtemp(prefix=f"glm52-{name}-"))
    BY_NAME[name].write(directory)
    return directory


@cache
def reference_model(name: str) -> glm52_jax.Model:
    """The fixture loaded as the official code computes it: float32, latent epsilon 1e-6."""
    return glm52_jax.load(checkpoint_dir(name), dtype="float32", latent_norm_eps=HF_LATENT_EPS)


def golden(name: str) -> dict[str, np.ndarray]:
    """What the official code computed for the fixture's ids."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        return dict(stored)


def assert_matches(name: str, model: glm52_jax.Model) -> None:
    """Logits and every layer within TOLERANCE, selections and experts equal as sets; AssertionError otherwise.

    The fixtures' ids were chosen so that no choice is a near tie: the sets need no exemption.
    """
    want = golden(name)
    logits, taps = model.score(BY_NAME[name].ids(), taps=True)
    got = {"logits": logits, **taps}
    compared = [key for key in want if key.split(".")[0] in ("logits", "hidden", "topk", "experts")]
    assert set(got) == set(compared)
    for key in compared:
        if key.startswith(("topk.", "experts.")):
            differing = np.sort(np.asarray(got[key]), -1) != np.sort(want[key], -1)
            assert not differing.any(), f"{key}: {int(differing.any(-1).sum())} rows differ"
        else:
            error = rel_l2(got[key], want[key])
            assert error <= TOLERANCE, f"{key}: {error:.2e}"
