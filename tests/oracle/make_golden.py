"""Runs the fixture models in the official transformers code and writes, or with --check compares, the fixtures.

Runs in its own environment (Python 3.11, requirements.txt next to this file):
`python tests/oracle/make_golden.py [--check] [NAME ...]`.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import safetensors
import torch
import transformers
from models import FIXTURES, FixtureModel
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as official

Arrays = dict[str, np.ndarray]
TOLERANCE = 5e-6  # relative 2-norm between two runs of the official code; other CPU kernels gave up to 2.3e-6
MIN_MARGIN = 2e-5  # a choice decided by less is a tie to float32; the fixtures' seeds avoid them
ROPE_POSITIONS = (0, 1, 2, 63, 64, 100, 2047, 2048, 4095, 65537, 131071, 200000, 202751, 524289, 777777, 1048575)


class TopkInput(TorchFunctionMode):
    """Records what `Tensor.topk` is called on: the official indexer returns the chosen positions but not its scores."""

    scores: torch.Tensor

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.topk:
            self.scores = args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def load_official(directory: Path, layers: int) -> official.GlmMoeDsaForCausalLM:
    """Loads a checkpoint in float32 with eager attention; every tensor but the MTP layer's must be used."""
    model, info = official.GlmMoeDsaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    unexpected = [k for k in info["unexpected_keys"] if not k.startswith(f"model.layers.{layers}.")]
    if problems := {k: v for k, v in {**info, "unexpected_keys": unexpected}.items() if v}:
        raise RuntimeError(f"{directory}: the official code did not take every tensor: {problems}")
    return model.eval()


def attach_recorders(model: official.GlmMoeDsaForCausalLM, arrays: Arrays) -> None:
    """Hooks every layer, indexer and router so that one forward pass fills `arrays` (names as in README.md)."""
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(_recording_layer(i, arrays))
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.forward = _recording_indexer(layer.self_attn.indexer, i, arrays)
        if isinstance(layer.mlp, official.GlmMoeDsaMoE):
            layer.mlp.gate.register_forward_hook(_recording_router(i, arrays))


def _recording_layer(layer: int, arrays: Arrays) -> Callable:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        arrays[f"hidden.{layer}"] = output[0][0].numpy().copy()

    return hook


def _recording_indexer(indexer: official.GlmMoeDsaIndexer, layer: int, arrays: Arrays) -> Callable:
    forward = indexer.forward

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        with TopkInput() as mode:
            chosen = forward(*args, **kwargs)
        arrays[f"topk.{layer}"] = causal_positions(chosen[0].numpy())
        arrays[f"topk_margin.{layer}"] = selection_margins(mode.scores[0].numpy(), chosen.shape[-1])
        return chosen

    return recorded


def _recording_router(layer: int, arrays: Arrays) -> Callable:
    def hook(router: official.GlmMoeDsaTopkRouter, _inputs: Any, output: Any) -> None:
        logits, weights, experts = output
        weights, order = weights.sort(dim=-1, descending=True)
        arrays[f"experts.{layer}"] = experts.gather(-1, order).numpy().astype(np.int32)
        arrays[f"expert_weights.{layer}"] = weights.numpy().copy()
        biased = (logits.sigmoid() + router.e_score_correction_bias).sort(dim=-1, descending=True).values
        arrays[f"experts_margin.{layer}"] = (biased[:, router.top_k - 1] - biased[:, router.top_k]).numpy()

    return hook


def causal_positions(chosen: np.ndarray) -> np.ndarray:
    """Returns int32 [T, k]: each row's chosen positions <= row, ascending, then -1.

    Where fewer than k positions are causal the official code fills up with later ones and masks them afterwards.
    """
    rows = np.arange(len(chosen))[:, None]
    beyond = np.iinfo(np.int32).max
    kept = np.sort(np.where(chosen <= rows, chosen, beyond), axis=-1)
    return np.where(kept == beyond, -1, kept).astype(np.int32)


def selection_margins(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns float32 [T]: (k-th - (k+1)-th largest causal score) / largest causal |score|; inf if all are chosen."""
    margins = np.full(len(scores), np.inf, np.float32)
    for row in range(k, len(scores)):
        causal = scores[row, : row + 1]
        kth = np.sort(causal)[::-1]
        margins[row] = (kth[k - 1] - kth[k]) / np.abs(causal).max()
    return margins


class OfficialMtp(torch.nn.Module):
    """The MTP layer around the official decoder layer (transformers has no MTP code). Source: spec section 6.

    network: the official model with a single layer, the checkpoint's MTP layer; its final norm holds shared_head.norm, its
    embedding and head are the main model's. Around it only the two norms and eh_proj are added.
    """

    def __init__(self, checkpoint: Path, scratch: Path) -> None:
        """Loads the layer of `checkpoint`, by way of a one-layer checkpoint written to `scratch`, which must not exist."""
        super().__init__()
        config = json.loads((checkpoint / "config.json").read_text())
        prefix = f"model.layers.{config['num_hidden_layers']}."
        tensors = {name: x.astype(np.float32) for name, x in models.tiny.read_checkpoint(checkpoint).items()}
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        enorm, hnorm, eh_proj, norm = (
            own.pop(f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        )
        single = {f"model.layers.0.{name}": x for name, x in own.items()} | {"model.norm.weight": norm}
        single |= {name: tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        scratch.mkdir()
        save_file(single, scratch / "model.safetensors", {"format": "pt"})
        kinds = {"num_hidden_layers": 1, "indexer_types": ["full"], "mlp_layer_types": ["sparse"]}
        (scratch / "config.json").write_text(json.dumps({**config, **kinds, "dtype": "float32"}))
        self.network = load_official(scratch, 1)
        self.enorm, self.hnorm = (self._norm(weight, config["rms_norm_eps"]) for weight in (enorm, hnorm))
        self.eh_proj = torch.nn.Linear(*eh_proj.shape[::-1], bias=False)
        self.eh_proj.weight.data = torch.tensor(eh_proj)

    @staticmethod
    def _norm(weight: np.ndarray, eps: float) -> official.GlmMoeDsaRMSNorm:
        norm = official.GlmMoeDsaRMSNorm(len(weight), eps)
        norm.weight.data = torch.tensor(weight)
        return norm

    def embed(self, successors: torch.Tensor) -> torch.Tensor:
        """Returns [T - 1, hidden]: embeddings of the tokens at 1..T-1, zero at position 0."""
        embedded = self.network.model.embed_tokens(successors)
        embedded[0] = 0
        return embedded

    def join(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns [T - 1, 2 * hidden], the input of eh_proj."""
        return torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits [T - 1, vocab] at positions 0..T-2; ids [T]; hidden [T, hidden]: the main model's, final-normed."""
        x = self.eh_proj(self.join(self.embed(ids[1:]), hidden[:-1]))
        return self.network(inputs_embeds=x[None], use_cache=False).logits[0]

    def run(self, ids: torch.Tensor, hidden: torch.Tensor) -> Arrays:
        """Returns mtp_logits, mtp_topk, mtp_experts and the margins of the two choices (README.md)."""
        arrays: Arrays = {}
        attach_recorders(self.network, arrays)
        logits = self(ids, hidden).numpy()
        kept = ("topk", "topk_margin", "experts", "experts_margin")
        return {"mtp_logits": logits} | {f"mtp_{name}": arrays[f"{name}.0"] for name in kept}


def run_model(
    model: FixtureModel,
    change: Callable[[official.GlmMoeDsaForCausalLM], None] = lambda network: None,
    change_mtp: Callable[[OfficialMtp], None] = lambda mtp: None,
) -> tuple[Arrays, dict[str, Any]]:
    """Writes the model's checkpoint, runs it in the official code; returns the arrays and the record for digests.json.

    change, change_mtp: applied to the loaded network and MTP layer before they run (sensitivity.py's faults).
    """
    arrays: Arrays = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "checkpoint"
        model.write(directory)
        record: dict[str, Any] = {"about": model.about, "checkpoint": models.checkpoint_digests(directory)}
        if model.weights == "fp8":
            twin = Path(temporary) / "twin"
            models.tiny.write_dequantised_twin(directory, twin)
            record["twin"] = models.checkpoint_digests(twin)
            directory = twin
        network = load_official(directory, model.config()["num_hidden_layers"])
        mtp = OfficialMtp(directory, Path(temporary) / "mtp") if model.mtp else None
    change(network)
    attach_recorders(network, arrays)
    ids, final = torch.tensor(model.ids()), []
    network.model.norm.register_forward_hook(lambda module, inputs, output: final.append(output[0]))
    with torch.no_grad():
        arrays["logits"] = network(ids[None], use_cache=False).logits[0].numpy()
        if mtp is not None:
            change_mtp(mtp)
            arrays |= mtp.run(ids, final[0])
    record["ids"] = model.ids()
    record["min_margin"] = smallest_margins(arrays)
    return arrays, record


def smallest_margins(arrays: Arrays) -> dict[str, float]:
    """Returns {kind: smallest margin} over the layers, for each kind of margin among the arrays; MTP's by themselves."""
    kinds = ("topk_margin", "experts_margin", "mtp_topk_margin", "mtp_experts_margin")
    found = {kind: [x.min() for name, x in arrays.items() if name.split(".")[0] == kind] for kind in kinds}
    return {kind: float(min(margins)) for kind, margins in found.items() if margins}


def run_rope() -> tuple[Arrays, dict[str, Any]]:
    """Records the official cos and sin tables at positions up to 2^20 - 1, and one vector rotated by them.

    The official output order is [even results | odd results]; `y` is put back in place, pairs (2p, 2p + 1).
    """
    dim, positions = 64, np.array(ROPE_POSITIONS)
    arrays: Arrays = {"positions": positions, "x": models.tiny.hash_normal("rope/x", (len(positions), dim))}
    x = torch.tensor(arrays["x"])[None, None]
    for theta in (1000000, 8000000):
        rope = {"rope_theta": theta, "rope_type": "default"}
        config = official.GlmMoeDsaConfig(qk_rope_head_dim=dim, max_position_embeddings=1 << 20, rope_parameters=rope)
        table = official.GlmMoeDsaRotaryEmbedding(config)
        cos, sin = table(x, torch.tensor(positions)[None])
        y, _ = official.apply_rotary_pos_emb_interleave(x, x, cos, sin)
        arrays[f"inv_freq.{theta}"] = table.inv_freq.numpy()
        arrays[f"cos.{theta}"], arrays[f"sin.{theta}"] = (t[0, :, : dim // 2].numpy() for t in (cos, sin))
        arrays[f"y.{theta}"] = y[0, 0].unflatten(-1, (2, dim // 2)).transpose(-1, -2).flatten(-2).numpy()
    return arrays, {"about": "rope tables and one rotation of each position, theta 1e6 and 8e6"}


def summary(array: np.ndarray) -> dict[str, Any]:
    """Returns shape, dtype, the 2-norm of the finite elements and the sha256 of the bytes of an array."""
    finite = array[np.isfinite(array)].astype(np.float64)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    norm = float(np.linalg.norm(finite))
    return {"shape": list(array.shape), "dtype": str(array.dtype), "norm": norm, "sha256": digest}


Row = tuple[str, str, bool]  # what was compared, the difference, whether it passes


def compare(name: str, new: Arrays, new_record: dict[str, Any], old_record: dict[str, Any]) -> list[Row]:
    """Returns rows (what, difference, equal) of a regenerated fixture against the stored one."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        old = dict(stored)
    rows = [
        (key, "equal" if same else "DIFFERENT", same)
        for key in ("checkpoint", "twin", "ids")
        if key in new_record or key in old_record
        for same in [new_record.get(key) == old_record.get(key)]
    ]
    rows.append(("names", f"{len(new)} arrays", set(old) == set(new)))
    for key in sorted(set(old) & set(new)):
        a, b = new[key], old[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            rows.append((key, f"{a.shape} {a.dtype} != {b.shape} {b.dtype}", False))
        elif np.issubdtype(a.dtype, np.integer):  # sets: the order within a row carries no meaning
            differ = int((np.sort(a, -1) != np.sort(b, -1)).any(-1).sum()) if a.ndim > 1 else int((a != b).sum())
            rows.append((key, f"{differ} rows", differ == 0))
        elif "margin" in key:  # differences of nearly equal scores: absolute, not relative
            finite = np.isfinite(a)
            error = float(np.abs(a[finite] - b[finite]).max(initial=0))
            rows.append((key, f"{error:.1e} abs", bool((finite == np.isfinite(b)).all()) and error <= 10 * TOLERANCE))
        else:
            error = float(np.linalg.norm((a - b).astype(np.float64)) / np.linalg.norm(b.astype(np.float64)))
            rows.append((key, f"{error:.1e}", error <= TOLERANCE))
    return rows


def versions() -> dict[str, str]:
    """Returns the versions of everything the fixtures depend on."""
    libraries = (torch, transformers, np, ml_dtypes, safetensors)
    return {"python": platform.python_version()} | {module.__name__: str(module.__version__) for module in libraries}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="fixtures to treat; all if none is given")
    parser.add_argument("--check", action="store_true", help="compare with the stored fixtures instead of writing them")
    arguments = parser.parse_args()
    makers = {m.name: (lambda m=m: run_model(m)) for m in models.MODELS} | {"rope": run_rope}
    if unknown := set(arguments.names) - set(makers):
        parser.error(f"no fixture named {sorted(unknown)}; there are {sorted(makers)}")
    path = FIXTURES / "digests.json"
    digests = json.loads(path.read_text()) if path.exists() else {}
    failed = False
    for name in arguments.names or makers:
        arrays, record = makers[name]()
        if low := {k: v for k, v in record.get("min_margin", {}).items() if v < MIN_MARGIN}:
            raise RuntimeError(
                f"{name}: a choice is nearly a tie ({low} < {MIN_MARGIN}); take another seed in models.py"
            )
        if arguments.check:
            rows = compare(name, arrays, record, digests["fixtures"].get(name, {}))
            failed |= not all(same for *_, same in rows)
            print("\n".join(f"{'ok ' if same else 'BAD'} {name:6} {what:22} {how}" for what, how, same in rows))
            continue
        np.savez_compressed(FIXTURES / f"{name}.npz", **arrays)
        record["arrays"] = {key: summary(array) for key, array in sorted(arrays.items())}
        digests = {"versions": versions(), "fixtures": {**digests.get("fixtures", {}), name: record}}
        path.write_text(json.dumps(digests, indent=1) + "\n")
        print(f"{name:6} {(FIXTURES / f'{name}.npz').stat().st_size / 1e3:6.0f} kB, {record.get('min_margin', '')}")
    return int(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
