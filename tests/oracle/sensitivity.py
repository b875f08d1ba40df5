"""Shows that the fixtures can turn red: injects faults into the official code and prints how far each fixture moves.

Runs in make_golden.py's environment: `python tests/oracle/sensitivity.py [NAME ...]`. A column per fixture: the
relative 2-norm of the change in the logits, then the rows of top-k sets and of expert sets that change, in percent.
A second table does the same for faults of the MTP layer, on the draft logits and the layer's own choices.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import models
import numpy as np
import torch
import transformers
from make_golden import Arrays, OfficialMtp, run_model
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as official

Network = official.GlmMoeDsaForCausalLM
rotate = official.apply_rotary_pos_emb_interleave


def set_eps(network: Network, norms: str, eps: float) -> None:
    """Sets the epsilon of every norm whose module name ends in `norms`."""
    for name, module in network.named_modules():
        if name.endswith(norms):
            setattr(module, "eps" if isinstance(module, torch.nn.LayerNorm) else "variance_epsilon", eps)


def each(network: Network, kind: type, change: Callable[[Any], None]) -> None:
    """Applies `change` to every module of a class."""
    for module in network.modules():
        if isinstance(module, kind):
            change(module)


class RMSKeyNorm(torch.nn.Module):
    """The index keys' norm without the mean subtraction."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        return scaled * self.norm.weight + self.norm.bias


def biased_weights(router: official.GlmMoeDsaTopkRouter) -> None:
    """Makes a router weight its experts by the biased scores."""
    forward = router.forward

    def changed(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _, experts = forward(hidden)
        weights = (logits.sigmoid() + router.e_score_correction_bias).gather(1, experts)
        return logits, weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor, experts

    router.forward = changed


def dense_when(network: Network, types: tuple[str, ...]) -> None:
    """Makes the layers of the given indexer types attend to every earlier position."""
    for layer, kind in zip(network.model.layers, network.config.indexer_types, strict=True):
        if kind in types:
            layer.self_attn.forward = partial(_dense_attention, layer.self_attn.forward, layer.self_attn)


def _dense_attention(forward: Callable, attention: official.GlmMoeDsaAttention, **kwargs: Any) -> tuple:
    tokens = kwargs["hidden_states"].shape[1]
    everything = torch.arange(tokens).expand(1, tokens, tokens).to(torch.int32)
    own = kwargs["prev_topk_indices"]
    if attention.indexer is not None:
        selected = attention.indexer.forward
        attention.indexer.forward = lambda *a, **k: (selected(*a, **k), everything)[1]
        output, weights, own = forward(**kwargs)
        return output, weights, own
    output, weights, _ = forward(**{**kwargs, "prev_topk_indices": everything})
    return output, weights, own


def half_split(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, where: int, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates pairs (p, p + dim/2) in the indexer (where = 2) or the attention (where = 1), correctly in the other."""
    if unsqueeze_dim != where:
        return rotate(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    order = torch.arange(q.shape[-1]).unflatten(0, (2, -1)).T.flatten()  # puts x[p], x[p + dim/2] side by side
    return rotate(q[..., order], k[..., order], cos, sin, unsqueeze_dim=unsqueeze_dim)


def local_scale_rows(network: Network) -> None:
    """Dequantises kv_b with the scale row counted from the head's first row instead of the matrix's."""
    model = next(m for m in models.MODELS if m.name == "fp8")
    rows_of_head = network.config.qk_nope_head_dim + network.config.v_head_dim
    with tempfile.TemporaryDirectory() as directory:
        model.write(directory)
        tensors = models.tiny.read_checkpoint(directory)
        for i, layer in enumerate(network.model.layers):
            data, scales = (tensors[f"model.layers.{i}.self_attn.kv_b_proj.weight{end}"] for end in ("", "_scale_inv"))
            wrong = scales[np.arange(len(data)) % rows_of_head // models.tiny.BLOCK].repeat(models.tiny.BLOCK, 1)
            wrong_weight = data.astype(np.float32) * wrong[:, : data.shape[1]]
            layer.self_attn.kv_b_proj.weight.data = torch.tensor(wrong_weight)


FAULTS: dict[str, Callable[[Network], None]] = {
    "latent norms' eps 1e-5": partial(set_eps, norms="_a_layernorm", eps=1e-5),
    "input norms' eps 1e-6": partial(set_eps, norms="input_layernorm", eps=1e-6),
    "post-attention eps 1e-6": partial(set_eps, norms="post_attention_layernorm", eps=1e-6),
    "index-key norm's eps 1e-5": partial(set_eps, norms="k_norm", eps=1e-5),
    "index-key norm RMS": lambda n: each(
        n, official.GlmMoeDsaIndexer, lambda m: setattr(m, "k_norm", RMSKeyNorm(m.k_norm))
    ),
    "index-key bias dropped": lambda n: each(n, official.GlmMoeDsaIndexer, lambda m: m.k_norm.bias.data.zero_()),
    "router bias dropped": lambda n: each(n, official.GlmMoeDsaTopkRouter, lambda m: m.e_score_correction_bias.zero_()),
    "router bias in the weights": lambda n: each(n, official.GlmMoeDsaTopkRouter, biased_weights),
    "routed scale 1": lambda n: each(
        n, official.GlmMoeDsaTopkRouter, lambda m: setattr(m, "routed_scaling_factor", 1.0)
    ),
    "softmax scale of nope only": lambda n: each(
        n, official.GlmMoeDsaAttention, lambda m: setattr(m, "scaling", m.qk_nope_head_dim**-0.5)
    ),
    "shared layers attend densely": partial(dense_when, types=("shared",)),
    "every layer attends densely": partial(dense_when, types=("full", "shared")),
    "attention rope half-split": lambda n: None,
    "indexer rope half-split": lambda n: None,
    "indexer without relu": lambda n: None,
    "kv_b scale rows per head": local_scale_rows,
}


def shift_rope(mtp: OfficialMtp, which: str) -> None:
    """Rotates the queries, the keys or both of the MTP layer, in its attention and its indexer, at position p + 1."""
    rope = mtp.network.model.rotary_emb

    def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any) -> tuple:
        later = rope(q, position_ids=torch.arange(1, cos.shape[1] + 1)[None])
        moved = rotate(q, k, *later, **kwargs)
        right = rotate(q, k, cos, sin, **kwargs)
        return tuple(m if name in which else r for name, m, r in zip("qk", moved, right, strict=True))

    run = mtp.forward

    def forward(*args: Any) -> torch.Tensor:
        with patch.object(official, "apply_rotary_pos_emb_interleave", rotated):
            return run(*args)

    mtp.forward = forward


def reuse_selection(mtp: OfficialMtp, clean: Arrays) -> None:
    """Makes the MTP layer attend to the set of the main model's last full layer."""
    last = max((name for name in clean if name.startswith("topk.")), key=lambda name: int(name.split(".")[1]))
    chosen = clean[last][:-1]
    # The last position is beyond every row that has room left: the causal mask takes it out again.
    chosen = torch.tensor(np.where(chosen < 0, len(chosen) - 1, chosen))[None]
    indexer = mtp.network.model.layers[0].self_attn.indexer
    own = indexer.forward
    indexer.forward = lambda *args, **kwargs: (own(*args, **kwargs), chosen)[1]


def replace_hidden(mtp: OfficialMtp, clean: Arrays) -> None:
    """Feeds the residual stream before the main model's final norm."""
    last = max((name for name in clean if name.startswith("hidden.")), key=lambda name: int(name.split(".")[1]))
    forward = mtp.forward
    mtp.forward = lambda ids, hidden: forward(ids, torch.tensor(clean[last]))


def replace(owner: Any, name: str, function: Callable) -> None:
    """Replaces a method of the MTP layer, or a norm."""
    setattr(owner, name, function)


MTP_FAULTS: dict[str, Callable[[OfficialMtp, Arrays], None]] = {
    "hidden before model.norm": replace_hidden,
    "embedding not zeroed at 0": lambda m, clean: replace(m, "embed", m.network.model.embed_tokens.forward),
    "token at p, not p + 1": lambda m, clean: replace(
        m, "forward", lambda ids, hidden: OfficialMtp.forward(m, torch.cat([ids[:1], ids[:-1]]), hidden)
    ),
    "hidden half first": lambda m, clean: replace(
        m, "join", lambda e, h: OfficialMtp.join(m, e, h).roll(h.shape[-1], -1)
    ),
    "model's selection reused": reuse_selection,
    "queries rotated at p + 1": lambda m, clean: shift_rope(m, "q"),
    "queries and keys at p + 1": lambda m, clean: shift_rope(m, "qk"),
    "shared_head.norm twice": lambda m, clean: replace(
        m.network.model, "norm", torch.nn.Sequential(m.network.model.norm, m.network.model.norm)
    ),
    "shared_head.norm left out": lambda m, clean: replace(m.network.model, "norm", torch.nn.Identity()),
    "shared_head.norm eps 1e-6": lambda m, clean: set_eps(m.network, "model.norm", 1e-6),
    "enorm eps 1e-6": lambda m, clean: set_eps(m, "enorm", 1e-6),
    "hnorm eps 1e-6": lambda m, clean: set_eps(m, "hnorm", 1e-6),
    "latent norms' eps 1e-5": lambda m, clean: set_eps(m, "_a_layernorm", 1e-5),
}


@contextmanager
def module_patches(fault: str) -> Iterator[None]:
    """Patches the functions of the official module that a fault replaces; does nothing for the others."""
    where = {"attention rope half-split": 1, "indexer rope half-split": 2}.get(fault)
    if where:
        with patch.object(official, "apply_rotary_pos_emb_interleave", partial(half_split, where=where)):
            yield
    elif fault == "indexer without relu":
        with patch.object(official.F, "relu", lambda x: x):
            yield
    else:
        yield


def changed_rows(new: Arrays, old: Arrays, kind: str) -> float:
    """Returns the percentage of rows whose set differs, over all arrays of a kind."""
    differ = [(np.sort(new[k], -1) != np.sort(old[k], -1)).any(-1) for k in old if k.split(".")[0] == kind]
    return 100 * float(np.concatenate(differ).mean())


def cell(new: Arrays, old: Arrays, prefix: str = "") -> str:
    """Returns the table's entry for one fault on one fixture; prefix "mtp_" compares the MTP layer's arrays."""
    logits = prefix + "logits"
    error = np.linalg.norm(new[logits] - old[logits]) / np.linalg.norm(old[logits])
    topk, experts = (changed_rows(new, old, prefix + kind) for kind in ("topk", "experts"))
    return f"{error:.1e} {topk:3.0f}% {experts:3.0f}%"


def print_row(first: str, cells: list[str]) -> None:
    print(first.ljust(30) + "".join(text.ljust(22) for text in cells).rstrip(), flush=True)


def main(names: list[str]) -> None:
    chosen = [m for m in models.MODELS if not names or m.name in names]
    clean = {m.name: run_model(m)[0] for m in chosen}
    print_row("fault", [m.name for m in chosen])
    for fault, change in FAULTS.items():
        cells = []
        for model in chosen:
            if change is local_scale_rows and model.weights != "fp8":
                cells.append("-")
                continue
            with module_patches(fault):
                cells.append(cell(run_model(model, change)[0], clean[model.name]))
        print_row(fault, cells)
    if with_mtp := [m for m in chosen if m.mtp]:
        print()
        print_row("fault of the MTP layer", [m.name for m in with_mtp])
    for fault, change_mtp in MTP_FAULTS.items() if with_mtp else ():
        runs = {m.name: run_model(m, change_mtp=partial(change_mtp, clean=clean[m.name]))[0] for m in with_mtp}
        print_row(fault, [cell(arrays, clean[name], "mtp_") for name, arrays in runs.items()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(sys.argv[1:])
