"""Checks on eight fake CPU devices; ``python -m tests.parallel_worker NAME`` runs one, where XLA_FLAGS gives JAX eight."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import glm52_jax
from glm52_jax import Sampling, decode, parallel, shares
from glm52_jax import model as decoder
from glm52_jax.layers import moe
from glm52_jax.plan import Parallel
from pallas_kernels import collectives
from pallas_kernels.compare import rel_l2
from tests import parallel_checks as checks

SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=5)


def floats(directory: Path) -> None:
    """float32 weights: every mode at its own number of devices; prefill, decode, drafts, uneven routing, short batches."""
    one = glm52_jax.load(checks.write(directory, checks.FLOAT, "float32"), dtype="float32")
    ids = checks.tokens(70)
    prompts = [ids[:5], ids[7:37], ids[3:4]]
    want = checks.generated(one, prompts, SAMPLED, 8)
    for mode, devices in (("tp", 8), ("ep+dp", 4)):
        model = checks.load(directory, mode, devices, dtype="float32")
        checks.assert_sliced(model, one)
        checks.assert_same_drafts(model, one, ids)
        # Three prompts on four devices in "ep+dp".
        assert checks.generated(model, prompts, SAMPLED, 8) == want
        checks.assert_state_stays(model, prompts)
    model = checks.load(directory, "ep", 2, dtype="float32")
    checks.assert_sliced(model, one)
    checks.assert_same_scores(model, one, ids)
    # All on the first device, none on the second.
    checks.assert_same_scores(checks.all_to(model, (4, 5, 6, 7)), checks.all_to(one, (4, 5, 6, 7)), ids)


def blocks(directory: Path) -> None:
    """FP8 blocks, kept and converted; one expert a token, and all tokens to the same one."""
    checks.assert_placed_in_place(8)
    one = glm52_jax.load(checks.write(directory, checks.BLOCKS, "fp8"), dtype="float32")
    ids = checks.tokens(40)
    for mode, devices in (("tp", 4), ("ep", 8), ("ep+dp", 2)):
        model = checks.load(directory, mode, devices, dtype="float32")
        checks.assert_sliced(model, one)
        checks.assert_same_scores(model, one, ids)
        checks.assert_same_scores(checks.all_to(model, (5,)), checks.all_to(one, (5,)), ids)
    plain = glm52_jax.load(directory, dtype="float32", weights="float32")
    for mode, devices in (("tp", 4), ("ep", 8)):
        checks.assert_sliced(checks.load(directory, mode, devices, dtype="float32", weights="float32"), plain)


def refusals(directory: Path) -> None:
    """Sizes that do not split, with their numbers; meshes and modes that cannot be."""
    checks.write(directory / "blocks", checks.BLOCKS, "fp8")
    checks.write(directory / "odd", checks.FLOAT | {"num_attention_heads": 6}, "float32")
    with pytest.raises(
        ValueError, match=r"moe.gate_up: expert_width 512 / 8 = 64 is no multiple of the FP8 block, 128"
    ):
        checks.load(directory / "blocks", "tp", 8)
    with pytest.raises(ValueError, match=r"attention.w_uk: heads 6 does not divide by 4"):
        checks.load(directory / "odd", "tp", 4)
    with pytest.raises(ValueError, match=r"moe.gate_up: experts 8 does not divide by 3"):
        checks.load(directory / "blocks", "ep", 3)
    with pytest.raises(ValueError, match="parallel='pp' must be one of"):
        checks.load(directory / "odd", "pp", 2)
    with pytest.raises(ValueError, match="devices=9 must be between 1 and 8"):
        parallel.make_mesh(9)
    made = parallel.share(jax.make_mesh((2,), ("x",)), None)
    assert made == Parallel(Mesh(np.array(jax.devices()[:2]), ("x",)), "tp")
    square = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    with pytest.raises(ValueError, match="a mesh with one axis"):
        glm52_jax.load(directory / "odd", mesh=square)


def faults(directory: Path) -> None:
    """A sum left out, a slice of another device, an expert counted from another's: each must show in the logits."""
    ids = checks.tokens(24)
    one = glm52_jax.load(checks.write(directory, checks.FLOAT, "float32"), dtype="float32")
    want = one.score(ids)
    models = {mode: checks.load(directory, mode, 2, dtype="float32") for mode in ("tp", "ep", "ep+dp")}

    def error(model: glm52_jax.Model) -> float:
        # Compiled programs are keyed by function and statics, not by what a fault patched.
        decode.score_chunk.clear_cache()
        return rel_l2(model.score(ids), want)

    with patched(decoder, "attention_sum", lambda out, plan: out):
        assert error(models["tp"]) > 1e-2
    with patched(decoder, "mlp_sum", lambda run, x, plan: run(x)):
        assert error(models["tp"]) > 1e-2
    with patched(moe, "_placed_here", lambda ids, experts, plan: ids):
        assert error(models["ep"]) > 1e-2
    with patched(collectives, "reduce_scatter", lambda x, axis: x[: x.shape[0] // 2]):
        assert error(models["ep+dp"]) > 1e-2
    assert error(models["tp"]) < checks.TOLERANCE

    right = shares.Shares._slices

    def turned(self: shares.Shares, value: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """Each device gets the other's slice of attention's tensors."""
        dims = [dim for dim, axis in enumerate(spec) if axis and value.shape[dim] == 8 * 32]
        return right(self, np.roll(value, value.shape[dims[0]] // 2, dims[0]) if dims else value, spec)

    with patched(shares.Shares, "_slices", turned):
        broken = checks.load(directory, "tp", 2, dtype="float32")
    assert rel_l2(broken.score(ids), want) > 1e-2
    with pytest.raises(AssertionError, match="another slice"):
        checks.assert_sliced(broken, one)


def exchanges(directory: Path) -> None:
    """Every collective against numpy, on four devices."""
    mesh, rng = parallel.make_mesh(4), np.random.default_rng(0)
    assert (os.environ["NCCL_NVLS_ENABLE"], os.environ["NVSHMEM_DISABLE_NVLS"]) == ("0", "1")

    def run(f: Callable[..., Any], *arrays: Any) -> Any:
        """f on every device with its [i] of the arrays; results of all devices, stacked."""
        spec = PartitionSpec("devices")

        def each(*parts: jax.Array) -> Any:
            return jax.tree.map(lambda a: a[None], f(*(part[0] for part in parts)))

        found = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec))(*arrays)
        return jax.tree.map(np.asarray, found)

    x = rng.normal(size=(4, 8, 12)).astype(np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    wide = np.asarray(narrow, np.float32)
    total = np.asarray(jnp.asarray(wide.sum(0), jnp.bfloat16))
    for device in run(lambda a: collectives.all_reduce(a, "devices"), narrow):
        assert device.tobytes() == total.tobytes(), "summed in float32, rounded once"
    scattered = run(lambda a: collectives.reduce_scatter(a, "devices", 1), x)
    assert np.allclose(np.concatenate(scattered, 1), x.sum(0), rtol=0, atol=1e-6)
    for device in run(lambda a: collectives.all_gather(a, "devices", -1), x):
        assert np.array_equal(device, np.concatenate(x, -1))
    swapped = run(lambda a: collectives.all_to_all(a, "devices", split=0, into=1), x)
    for i, device in enumerate(swapped):
        assert np.array_equal(device, np.concatenate(x[:, 2 * i : 2 * i + 2], 1))
    residual, weight = rng.normal(size=(8, 12)).astype(np.float32), rng.normal(size=(3, 12)).astype(np.float32)
    alike = [np.stack([a] * 4) for a in (residual, weight)]
    h, normed = run(lambda a, r, w: collectives.all_reduce_add_norm(a, r, w, 2, 1e-5, "devices"), x, *alike)
    want = x.astype(np.float64).sum(0) + residual
    assert rel_l2(h[3], want) < 1e-6 and np.array_equal(h[0], h[3])
    assert rel_l2(normed[1], weight[2] * want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)) < 1e-6
    with pytest.raises(ValueError, match=r"reduce_scatter of \(8, 12\)|must divide by 4"):
        run(lambda a: collectives.reduce_scatter(a[:, :6], "devices", 1), x)
    with pytest.raises(ValueError, match="residual"):
        run(lambda a: collectives.all_reduce_add_norm(a, a[:2], a, 0, 1e-5, "devices"), x)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


CHECKS: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (floats, blocks, refusals, faults, exchanges)}

if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    with tempfile.TemporaryDirectory() as folder:
        CHECKS[sys.argv[1]](Path(folder) / "c")
