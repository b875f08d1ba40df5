"""Checks on eight fake CPU devices; ``python -m tests.parallel_worker NAME...`` runs some, where XLA_FLAGS gives JAX eight."""

from __future__ import annotations

import dataclasses
import inspect
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
from glm52_jax import Sampling, decode, exchange, parallel, shares
from glm52_jax import model as decoder
from glm52_jax.layers import moe
from glm52_jax.plan import Parallel
from pallas_kernels import collectives, norm_quant
from pallas_kernels.collectives import reference, workspace
from pallas_kernels.collectives.message import Message
from pallas_kernels.compare import rel_l2
from pallas_kernels.registry import Backend, Refusal
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
    one = glm52_jax.load(checks.write(directory, checks.LAYER, "float32"), dtype="float32")
    want = one.score(ids)
    models = {mode: checks.load(directory, mode, 2, dtype="float32") for mode in ("tp", "ep", "ep+dp")}

    def error(model: glm52_jax.Model) -> float:
        # Compiled programs are keyed by function and statics, not by what a fault patched.
        decode.score_chunk.clear_cache()
        return rel_l2(model.score(ids), want)

    def alone(x: jax.Array, out: jax.Array, norm: jax.Array, layer: int, eps: float, plan: Any) -> Any:
        return x + out, norm_quant.rms_norm(x + out, norm[layer], eps)

    with patched(decoder, "add_sum", alone):
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


def peers(directory: Path) -> None:
    """A program's way to the peers' memory, with XLA's collectives standing in for the kernels: every call has its own epoch."""
    taken: list[str] = []

    def run(spec: Message, *args: Any) -> Any:
        box = workspace.current()
        assert box.workspace.table.shape == (1, spec.devices + 1, 2), "one device's part"
        taken.append(spec.form)
        box.state = workspace.State(box.state.epoch + 1, box.state.status)
        return reference.run(spec, *args)

    def supports(spec: Message, arch: Any) -> Refusal | None:
        return None if spec.peers else Refusal("no workspace is open")

    model = checks.load(checks.write(directory, checks.FLOAT, "float32"), "tp", 4, dtype="float32")
    share, ids = model.plan.parallel, np.array([checks.tokens(8)], np.int32)
    assert share is not None and exchange.of(share) is None, "these are no GPUs"
    cache = parallel.new_cache(model.config, model.plan, 1)
    chunk = inspect.unwrap(decode.score_chunk)

    def score(weights: Any, state: Any) -> Any:
        zero = jnp.zeros(1, jnp.int32)
        found, cache = chunk(
            weights, state[0], zero[:, None], ids, zero, zero + 8, config=model.config, plan=model.plan
        )
        return cache, found["logits"]

    state = (cache, jnp.zeros((1, 8, model.config.vocab_size)))
    own = exchange.Exchange(share.mesh)
    backends = (Backend("triton", supports, lambda: run), *collectives.BACKENDS[1:])
    with patched(collectives, "BACKENDS", backends), patched(exchange, "of", lambda share: own):
        step = exchange.Lowered(score, share, model.weights, state).compile()
        calls = len(taken)
        # Two sums a layer and the gather of the logits; no other call was traced, and none outside of the program.
        assert taken.count("all_gather") == 1 and calls == 2 * model.config.num_hidden_layers + 1
        first = own.state
        for i in range(1, 4):
            state = step(model.weights, state)
            assert np.asarray(own.state.epoch).tolist() == [[1 + i * calls]] * 4
        assert first.epoch.is_deleted() and not own.work.words.is_deleted()
        assert rel_l2(np.asarray(state[1])[0], np.asarray(model.score(ids[0]))) < checks.TOLERANCE
        assert len(taken) == calls
        # In a loop of the program, traced once, every turn has its epoch; what is spread before the program is traced takes part.
        split = PartitionSpec(share.axis)
        twice = parallel.spread(
            lambda _, x: parallel.repeated(lambda y: collectives.all_reduce(y, share.axis) / 4, x, 5), share,
            (PartitionSpec(), split), split,
        )  # fmt: skip
        before = int(np.asarray(own.state.epoch)[0, 0])
        doubled = exchange.Lowered(twice, share, jnp.zeros(()), x := jnp.arange(8.0)).compile()(jnp.zeros(()), x)
        assert len(taken) == calls + 1 and np.asarray(own.state.epoch).tolist() == [[before + 5]] * 4
        assert np.allclose(doubled, np.tile(np.arange(8.0).reshape(4, 2).mean(0), 4))
    own.check()
    own.state = dataclasses.replace(own.state, status=own.state.status.at[2].set(0b1010))
    with pytest.raises(exchange.PeerMissingError, match="device 2 missed device 1, device 3"):
        own.check()
    own.check()
    assert np.asarray(own.state.epoch).tolist() == [[1]] * 4


def benches(directory: Path) -> None:
    """The benchmarks of several devices on what a CPU can do: every exchange, a sparse layer, a load; figures mean nothing here."""
    from bench import collectives as exchanges
    from bench import load, moe_layer

    with patched(exchanges, "ROWS", {form: (4,) for form in exchanges.FORMS}), patched(exchanges, "CALLS", 2):
        figures = [figure for group in exchanges.cases(exchanges.mesh_of(4), exchanges.FORMS, jobs=2)
                   for figure in exchanges.measure(group, 1, 1e-4)]  # fmt: skip
    assert [(f.form, f.backend, f.error) for f in figures] == [(form, "reference", 0.0) for form in exchanges.FORMS]
    rows = exchanges.table(figures)[2:]
    assert len(rows) == len(figures) and rows[0].startswith("| all_reduce | 4 | 4 | 49152 |  | ")
    first = dataclasses.replace(figures[0], backend="triton", us=4.0, error=0.0, whole=True, target_us=5.0)
    assert exchanges.table([figures[0], first])[-1].endswith("| 5.0 | 0.0e+00 | yes |")

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "index_topk": 64}
    sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
    spec = dataclasses.replace(moe_layer.spec_of("ep+dp", 2, 4, **sizes), context=256, room=64)
    with patched(moe_layer, "CALLS", 1), patched(moe_layer, "REPLAYS", 2):
        found = moe_layer.measure(
            spec, moe_layer.make_weights(spec), (moe_layer.LAYER, moe_layer.AROUND), 1e12, 1, 1e-4
        )
    assert [(f.part, f.mode, f.rows) for f in found] == [("layer", "ep+dp", 4), ("experts+exchange", "ep+dp", 4)]
    assert all(f.error == 0 and f.us > 0 and f.bytes > 4 * 256 * 256 for f in found), found
    assert found[0].bytes > found[1].bytes and len(moe_layer.table(found)) == 4

    small = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512, "num_attention_heads": 8}
    written = load.write(directory, load.config_of(8, **small, index_n_heads=4, vocab_size=256))
    figure = load.measure(directory, "tp", 2, 8, repeats=1)
    assert figure.bytes == written and figure.gb_s > 0 and 0 < figure.share < 100
    path = load.FILE.merge(directory / "load.json", [figure], {"date": "now"})
    assert load.FILE.read(path)[1] == [figure]


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


_ALL = (floats, blocks, refusals, faults, exchanges, peers, benches)
CHECKS: dict[str, Callable[[Path], None]] = {f.__name__: f for f in _ALL}

if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            CHECKS[name](Path(folder) / "c")
