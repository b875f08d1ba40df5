"""What several devices must give: the one device's weights, logits and tokens. For fake CPU devices and for real GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import glm52_jax
from glm52_jax import Sampling, decode, parallel, shares
from glm52_jax.plan import Parallel
from glm52_jax.tiny import hash_bits, tiny_config, write_checkpoint
from pallas_kernels.compare import rel_l2

# Relative L2 error of float32 logits: what another order of the sums may change. Measured: up to 1.3e-6.
TOLERANCE = 1e-5
# Dense and full, sparse and shared; the MTP layer is sparse and full. Every layer costs seconds of compilation.
LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "indexer_types": ["full", "shared"]}
FLOAT: dict[str, Any] = LAYERS | {
    "vocab_size": 192, "hidden_size": 64, "num_attention_heads": 8, "q_lora_rank": 48, "kv_lora_rank": 40,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32, "intermediate_size": 96,
    "moe_intermediate_size": 32, "n_routed_experts": 16, "num_experts_per_tok": 4, "index_n_heads": 8,
    "index_head_dim": 32, "index_topk": 16,
}  # fmt: skip
# A single layer, sparse and full, of FLOAT's widths and without an MTP layer.
LAYER: dict[str, Any] = FLOAT | {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "indexer_types": ["full"], "num_nextn_predict_layers": 0,
}  # fmt: skip
# Widths whose slices are whole FP8 blocks on 8 (4 for the experts) devices, beside ranks with partial blocks and heads of kv_b, 224
# rows each, that straddle them.
BLOCKS: dict[str, Any] = FLOAT | {
    "hidden_size": 192, "q_lora_rank": 160, "kv_lora_rank": 136, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32,
    "v_head_dim": 128, "intermediate_size": 1024, "moe_intermediate_size": 512, "n_shared_experts": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 1,
}  # fmt: skip
# The dimension that each mode splits, by weight; all other weights are whole on every device.
_SLICED = {
    **{"dense.gate_up": 2, "dense.down": 2, "moe.shared_gate_up": 2, "moe.shared_down": 2, "head": 0},
    **{"attention.q_b": 1, "attention.w_uk": 1, "attention.w_uv": 1, "attention.o_proj": 2, "mtp.eh_proj": 0},
}
SPLIT: dict[str, dict[str, int]] = {
    "tp": _SLICED | {"moe.gate_up": 3, "moe.down": 3},
    "ep": _SLICED | {"moe.gate_up": 1, "moe.down": 1},
    "ep+dp": {
        **{name: dim for name, dim in _SLICED.items() if not name.startswith(("attention", "mtp"))},
        **{"moe.gate_up": 1, "moe.down": 1},
    },
}


def write(directory: Path, sizes: dict[str, Any], stored: Any) -> Path:
    """A checkpoint, with an MTP layer where the sizes announce one."""
    config = tiny_config(**sizes)
    write_checkpoint(directory, config, weights=stored, seed=1, mtp=config["num_nextn_predict_layers"] > 0)
    return directory


def tokens(count: int, sizes: dict[str, Any] = FLOAT) -> list[int]:
    return [int(x) % sizes["vocab_size"] for x in hash_bits("parallel/ids", count) >> 11]


def load(directory: Path, mode: str, devices: int, **options: Any) -> glm52_jax.Model:
    return glm52_jax.load(directory, mesh=parallel.make_mesh(devices), parallel=mode, **options)


def assert_sliced(model: glm52_jax.Model, one: glm52_jax.Model) -> None:
    """Every device holds, bit for bit, its slice of what one device holds, and nothing else."""
    share = model.plan.parallel
    assert share is not None
    split, seen = SPLIT[share.mode], set()
    whole = jax.tree.leaves(one.weights)
    for (path, array), full in zip(jax.tree.leaves_with_path(model.weights), whole, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".data").removesuffix(".scale")
        full, dim = np.asarray(full), split.get(name)
        parts = [full] * share.devices if dim is None else np.split(full, share.devices, axis=dim)
        seen |= {name} & split.keys()
        by_device = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
        for device, want in zip(share.mesh.devices.flat, parts, strict=True):
            got = by_device[device]
            assert got.dtype == want.dtype and got.shape == want.shape, f"{name}: {got.shape} for {want.shape}"
            assert got.tobytes() == want.tobytes(), f"{name}: another slice on {device}"
    assert seen == split.keys()


def assert_placed_in_place(devices: int) -> None:
    """An expert's update of a stack that is split along its experts, compiled (not run): no device copies its stack."""
    share = Parallel(parallel.make_mesh(devices), "ep")
    spec, whole = PartitionSpec(None, share.axis), PartitionSpec()
    how = shares._How(share, spec, PartitionSpec(None, None), True, None)

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(share.mesh, spec))

    stack = array((4, 16, 2, 1024, 512), jnp.float8_e4m3fn, spec)
    value = array((devices, 1024, 512), jnp.float8_e4m3fn, PartitionSpec(share.axis))
    placed = shares._place_shared.lower((stack, None), array((5,), jnp.int32, whole), value, None, how)
    memory = placed.compile().memory_analysis()
    assert memory.alias_size_in_bytes == stack.size // devices, memory
    assert memory.temp_size_in_bytes <= 4 * 1024 * 512, memory


def assert_same_scores(
    model: glm52_jax.Model, one: glm52_jax.Model, ids: Sequence[int], tolerance: float = TOLERANCE
) -> float:
    """Logits and residual streams within tolerance, the same chosen positions and experts; returns the logits' error."""
    want, inside = one.score(ids, taps=True)
    got, found = model.score(ids, taps=True)
    assert set(inside) == set(found)
    for name, value in inside.items():
        if name.startswith("hidden"):
            assert rel_l2(found[name], value) < tolerance, f"{name}: {rel_l2(found[name], value):.2e}"
        else:
            assert np.array_equal(np.sort(found[name], -1), np.sort(value, -1)), name
    error = rel_l2(got, want)
    assert error < tolerance, f"logits: {error:.2e}"
    return error


def assert_same_drafts(model: glm52_jax.Model, one: glm52_jax.Model, ids: Sequence[int]) -> None:
    error = rel_l2(model.score_mtp(ids), one.score_mtp(ids))
    assert error < TOLERANCE, f"drafts: {error:.2e}"


def generated(model: glm52_jax.Model, prompts: list[list[int]], sampling: Sampling, count: int) -> list[list[int]]:
    """New tokens of each prompt."""
    out: list[list[int]] = [[] for _ in prompts]
    for token in model.generate(prompts, max_new_tokens=count, sampling=sampling, stop_ids=()):
        out[token.sequence].append(token.id)
    return out


def assert_state_stays(model: glm52_jax.Model, prompts: list[list[int]]) -> None:
    """One compiled step, its state donated and back under the same sharding, the same token on every device."""
    state = model._prefill([np.array(ids, np.int32) for ids in prompts], 8, Sampling(seed=2))
    compiled: list[str] = []

    def listen(event: str, duration: float, **more: Any) -> None:
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        before, state = state, decode.decode_step(model.weights, state, config=model.config, plan=model.plan)
        kept = [name for name, array in leaves(before) if not array.is_deleted()]
        assert not kept, f"{kept} were not donated"
        for (name, old), (_, new) in zip(leaves(before), leaves(state), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim), (
                f"{name}: {old.sharding} became {new.sharding}"
            )
        # Copies: a view would keep the tokens from being donated.
        drawn = [np.array(shard.data) for shard in state.tokens.addressable_shards]
        assert all(np.array_equal(one, drawn[0]) for one in drawn)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) <= 1, f"{len(compiled)} programs for three steps"


def leaves(tree: Any) -> list[tuple[str, jax.Array]]:
    """Arrays of a tree by name."""
    return [(jax.tree_util.keystr(path, simple=True, separator="."), a) for path, a in jax.tree.leaves_with_path(tree)]


def all_to(model: glm52_jax.Model, experts: Sequence[int]) -> glm52_jax.Model:
    """The model with a router bias that sends every token to these experts; all others get none."""
    moe = model.weights.moe
    assert moe is not None
    chosen = np.isin(np.arange(moe.router_bias.shape[-1]), experts)
    bias = np.broadcast_to(np.where(chosen, 10.0, -10.0).astype(np.float32), moe.router_bias.shape)
    placed = jnp.asarray(bias)
    if model.plan.parallel is not None:  # one device's arrays are committed to none, or its program would be another
        placed = jax.device_put(placed, moe.router_bias.sharding)
    return model.replace(weights=model.weights.replace(moe=moe.replace(router_bias=placed)))
