"""The plain-JAX model on a GPU: the same comparisons as on the CPU, where TF32, fused multiplies or fast sines would show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax.rope import rope_tables
from tests.fixtures_util import BY_NAME, assert_matches, assert_placed_in_place, checkpoint_dir, golden, reference_model

pytestmark = pytest.mark.gpu


def test_runs_on_a_gpu() -> None:
    assert all(d.platform == "gpu" for a in jax.tree.leaves(reference_model("long").weights) for d in a.devices())


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_matches_the_official_code(name: str) -> None:
    assert_matches(name, reference_model(name))


@pytest.mark.parametrize("theta", [1e6, 8e6])
def test_angles_reduce_their_range(theta: float) -> None:
    positions = jnp.arange(2**20 - 4096, 2**20, dtype=jnp.int32)
    cos, sin = rope_tables(positions, theta, 64)
    inv_freq = np.float32(1.0) / (np.float64(theta) ** (np.arange(0, 64, 2) / 64)).astype(np.float32)
    angle = np.asarray(positions, np.float32)[:, None] * inv_freq
    assert np.abs(np.asarray(cos) - np.cos(angle.astype(np.float64))).max() < 1e-6
    assert np.abs(np.asarray(sin) - np.sin(angle.astype(np.float64))).max() < 1e-6


# Measured on an H200 and on a CPU alike: 0.07, 0.27, 0.03, 0.04. W8A8 quantizes the activations of every matmul, and in a
# model this small a flipped expert is a third of a logit.
@pytest.mark.parametrize(
    "kwargs,bound",
    [({}, 0.1), ({"linear": "w8a8"}, 0.35), ({"weights": "bfloat16"}, 0.1), ({"cache": "bfloat16"}, 0.1)],
)
def test_narrow_paths_stay_near_the_official_code(kwargs: dict, bound: float) -> None:
    """Up to index_topk tokens nothing is selected, so rounding cannot flip a choice of positions (experts still may)."""
    model = glm52_jax.load(checkpoint_dir("fp8"), latent_norm_eps=1e-6, **kwargs)
    logits, want = model.score(BY_NAME["fp8"].ids()), golden("fp8")["logits"]
    error = np.linalg.norm(logits - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(error[: model.config.index_topk]) < bound


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
def test_loading_fills_in_place(dtype: str) -> None:
    assert_placed_in_place(dtype)


def test_generate_is_greedy_like_score() -> None:
    model, ids = reference_model("long"), BY_NAME["long"].ids()[:70]
    greedy = glm52_jax.Sampling(temperature=0.0)
    new = [t.id for t in model.generate(ids, max_new_tokens=24, sampling=greedy, stop_ids=())]
    scored = np.asarray(model.score([*ids, *new]))[len(ids) - 1 : -1]
    assert list(scored.argmax(-1)) == new
