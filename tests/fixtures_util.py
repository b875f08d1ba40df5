"""Fixture checkpoints of the oracle, and the comparison that every one of them must pass."""

from __future__ import annotations

import atexit
import dataclasses
import re
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import numpy as np

import glm52_jax
from glm52_jax import loader
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
    atexit.register(rmtree, directory, ignore_errors=True)
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


def first_layers(model: glm52_jax.Model, count: int) -> glm52_jax.Model:
    """The model's first layers: what they compute is what they compute in the whole model, and compiles in less time."""
    config = model.config
    kinds = {"indexer_types": config.indexer_types[:count], "mlp_layer_types": config.mlp_layer_types[:count]}
    return model.replace(config=dataclasses.replace(config, num_hidden_layers=count, **kinds))


def assert_matches(name: str, model: glm52_jax.Model) -> None:
    """Logits and every layer within TOLERANCE, selections and experts equal as sets; AssertionError otherwise.

    Of ``first_layers`` these layers are compared, and no logits. The fixtures' ids were chosen so that no choice is a near tie: the
    sets need no exemption.
    """
    want = golden(name)
    logits, got = model.score(BY_NAME[name].ids(), taps=True)
    layers = [str(layer) for layer in range(model.config.num_hidden_layers)]
    compared = [
        key for key in want if key.partition(".")[0] in ("hidden", "topk", "experts") and key.split(".")[1] in layers
    ]
    if len(layers) == BY_NAME[name].config()["num_hidden_layers"]:
        got, compared = {"logits": logits, **got}, ["logits", *compared]
    assert set(got) == set(compared) and len(compared) > len(layers)
    for key in compared:
        if key.startswith(("topk.", "experts.")):
            differing = np.sort(np.asarray(got[key]), -1) != np.sort(want[key], -1)
            assert not differing.any(), f"{key}: {int(differing.any(-1).sum())} rows differ"
        else:
            error = rel_l2(got[key], want[key])
            assert error <= TOLERANCE, f"{key}: {error:.2e}"


def assert_placed_in_place(dtype: str) -> None:
    """The loader's update of a large stack, compiled (not run): aliases the stack, needs no temporary and widens nothing."""
    stack = jax.ShapeDtypeStruct((4, 64, 2, 2048, 1024), jnp.dtype(dtype))
    value = jax.ShapeDtypeStruct((2048, 1024), jnp.dtype(dtype))
    compiled = loader._place.lower(stack, jax.ShapeDtypeStruct((5,), jnp.int32), value).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == stack.size * stack.dtype.itemsize
    assert memory.temp_size_in_bytes <= 4 * value.size * value.dtype.itemsize, memory
    kinds = set(re.findall(r"(\w+)\[4,64,2,2048,1024\]", compiled.as_text()))
    own = {"float8_e4m3fn": {"f8e4m3fn", "u8"}, "bfloat16": {"bf16"}, "float32": {"f32"}}[dtype]
    assert kinds <= own, f"the whole stack passes through {sorted(kinds - own)}"
