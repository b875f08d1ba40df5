"""Structures that no golden fixture has, against a naive forward pass in float64 numpy that shares nothing with the model.

Not absorbed, not paged, not batched: keys and values of every head, a mask a row, a loop over tokens and experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm52_jax
from glm52_jax import tiny
from pallas_kernels.compare import rel_l2

LATENT_EPS, KEY_EPS = 1e-6, 1e-6
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 20,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "intermediate_size": 40,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 4,
    "index_head_dim": 16, "index_topk": 16, "num_nextn_predict_layers": 0,
}  # fmt: skip
IDS = [int(x) for x in np.random.default_rng(3).integers(0, SMALL["vocab_size"], 70)]


class Naive:
    """The forward pass of one checkpoint, layer by layer."""

    def __init__(self, directory: Path, ids: list[int]) -> None:
        self.c = json.loads((directory / "config.json").read_text())
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tiny.read_checkpoint(directory).items()}
        self.ids, self.prefix = ids, "model."
        pairs = np.arange(0, self.c["qk_rope_head_dim"], 2) / self.c["qk_rope_head_dim"]
        frequency = (1 / np.float32(self.c["rope_parameters"]["rope_theta"] ** pairs)).astype(np.float32)
        self.angle = (np.arange(len(ids), dtype=np.float32)[:, None] * frequency).astype(np.float64)

    def w(self, name: str) -> np.ndarray:
        return self.tensors[f"{self.prefix}{name}.weight"]

    def logits(self) -> np.ndarray:
        h = self.w("embed_tokens")[self.ids]
        mask = np.zeros((len(self.ids), len(self.ids)), bool)
        kinds = zip(tiny.indexer_types(self.c), tiny.mlp_layer_types(self.c), strict=True)
        for layer, (indexer, mlp) in enumerate(kinds):
            self.prefix = f"model.layers.{layer}."
            a = rms(h, self.w("input_layernorm"), self.c["rms_norm_eps"])
            latent = rms(a @ self.w("self_attn.q_a_proj").T, self.w("self_attn.q_a_layernorm"), LATENT_EPS)
            if indexer == "full":
                mask = self.selected(a, latent)
            h = h + self.attention(a, latent, mask)
            m = rms(h, self.w("post_attention_layernorm"), self.c["rms_norm_eps"])
            h = h + (self.ffn(m, "mlp.") if mlp == "dense" else self.moe(m))
        self.prefix = "model."
        return rms(h, self.w("norm"), self.c["rms_norm_eps"]) @ self.tensors["lm_head.weight"].T

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """x [T, heads, rope]: pairs as complex numbers, turned by the row's angle."""
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * self.angle)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def attention(self, a: np.ndarray, latent: np.ndarray, mask: np.ndarray) -> np.ndarray:
        heads, nope, rank = self.c["num_attention_heads"], self.c["qk_nope_head_dim"], self.c["kv_lora_rank"]
        q = (latent @ self.w("self_attn.q_b_proj").T).reshape(len(a), heads, -1)
        kv_a = a @ self.w("self_attn.kv_a_proj_with_mqa").T
        c = rms(kv_a[:, :rank], self.w("self_attn.kv_a_layernorm"), LATENT_EPS)
        kv = (c @ self.w("self_attn.kv_b_proj").T).reshape(len(a), heads, -1)
        shared = np.repeat(self.rotate(kv_a[:, None, rank:]), heads, 1)
        query = np.concatenate([q[..., :nope], self.rotate(q[..., nope:])], -1)
        keys = np.concatenate([kv[..., :nope], shared], -1)
        scores = np.einsum("ihd,jhd->hij", query, keys) / np.sqrt(query.shape[-1])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hij,jhv->ihv", weights, kv[..., nope:])
        return out.reshape(len(a), -1) @ self.w("self_attn.o_proj").T

    def selected(self, a: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """Boolean [T, T]: the positions that the indexer lets each row attend to."""
        heads, rope = self.c["index_n_heads"], self.c["qk_rope_head_dim"]
        q = (latent @ self.w("self_attn.indexer.wq_b").T).reshape(len(a), heads, -1)
        k = a @ self.w("self_attn.indexer.wk").T
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + KEY_EPS)
        k = k * self.w("self_attn.indexer.k_norm") + self.tensors[self.prefix + "self_attn.indexer.k_norm.bias"]
        q = np.concatenate([self.rotate(q[..., :rope]), q[..., rope:]], -1)
        k = np.concatenate([self.rotate(k[:, None, :rope])[:, 0], k[:, rope:]], -1)
        dots = np.maximum(np.einsum("ihd,jd->ihj", q, k), 0) / np.sqrt(k.shape[-1] * heads)
        scores = np.einsum("ih,ihj->ij", a @ self.w("self_attn.indexer.weights_proj").T, dots)
        mask = np.zeros(scores.shape, bool)
        for i in range(len(a)):
            mask[i, np.argsort(-scores[i, : i + 1], kind="stable")[: self.c["index_topk"]]] = True
        return mask

    def moe(self, x: np.ndarray) -> np.ndarray:
        scores = 1 / (1 + np.exp(-(x @ self.w("mlp.gate").T)))
        biased = scores + self.tensors[self.prefix + "mlp.gate.e_score_correction_bias"]
        out = self.ffn(x, "mlp.shared_experts.")
        for i, row in enumerate(x):
            chosen = np.argsort(-biased[i], kind="stable")[: self.c["num_experts_per_tok"]]
            for e in chosen:
                weight = scores[i, e] / scores[i, chosen].sum() * self.c["routed_scaling_factor"]
                out[i] += weight * self.ffn(row, f"mlp.experts.{e}.")
        return out

    def ffn(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = x @ self.w(name + "gate_proj").T, x @ self.w(name + "up_proj").T
        return (gate / (1 + np.exp(-gate)) * up) @ self.w(name + "down_proj").T


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1, "first_k_dense_replace": 0},
        {"num_hidden_layers": 2, "first_k_dense_replace": 0, "indexer_types": ["full", "shared"]},
        {"num_hidden_layers": 2, "first_k_dense_replace": 9},
        {"num_hidden_layers": 4, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_shared_experts": 2},
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "index_topk": 5000},
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 1, "index_n_heads": 1},
    ],
    ids=["one layer", "no dense", "all dense", "mixed", "two shared experts", "top-k beyond the context", "one head"],
)
def test_logits_are_the_naive_ones(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.tiny_config(**(SMALL | changes)), weights="float32")
    model = glm52_jax.load(tmp_path, dtype="float32", latent_norm_eps=LATENT_EPS)
    # 70 tokens are a page and a bit, and four times index_topk; one token is the shortest sequence.
    logits, taps = model.score(IDS, taps=True)
    assert rel_l2(logits, Naive(tmp_path, IDS).logits()) < 1e-5
    assert taps["topk.0"].shape == (len(IDS), model.config.index_topk)
    assert rel_l2(model.score(IDS[:1]), Naive(tmp_path, IDS[:1]).logits()) < 1e-5
