"""The fixture models of the oracle: what make_golden.py runs in the official code and what the tests rebuild.

numpy and the standard library only: imported by Python 3.11 (torch, transformers) and by the test suite (jax).
"""

import hashlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

FIXTURES = Path(__file__).parent / "fixtures"


def load_tiny() -> ModuleType:
    """Returns glm52_jax/tiny.py, loaded by its path so that glm52_jax/__init__ (which needs jax) is not run."""
    name = "glm52_jax_tiny_standalone"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "glm52_jax" / "tiny.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while the file runs
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny = load_tiny()


@dataclass(frozen=True)
class FixtureModel:
    """One fixture: `name`.npz holds what the official code computes for `tokens` hashed ids on this model."""

    name: str
    tokens: int
    weights: Literal["bfloat16", "float32", "fp8"]
    overrides: dict[str, Any]
    drop: tuple[str, ...] = ()
    seed: int = 0
    shards: int = 1
    mtp: bool = False
    about: str = field(default="", compare=False)

    def config(self) -> dict[str, Any]:
        """Returns the config.json dict, before write_checkpoint sets its dtype."""
        return tiny.tiny_config(self.drop, **self.overrides)

    def ids(self) -> list[int]:
        """Returns the input ids: `tokens` hashed ints below vocab_size, with repetitions."""
        bits = tiny.hash_bits(f"{self.seed}/ids/{self.name}", self.tokens)
        return [int(x) % self.config()["vocab_size"] for x in bits >> 11]

    def write(self, directory: str | Path) -> None:
        """Writes the checkpoint (FP8 in its official form where weights is "fp8")."""
        tiny.write_checkpoint(
            directory, self.config(), weights=self.weights, seed=self.seed, shards=self.shards, mtp=self.mtp
        )

    def full_layers(self) -> list[int]:
        """Returns the layers that run an indexer."""
        return [i for i, kind in enumerate(tiny.indexer_types(self.config())) if kind == "full"]

    def sparse_layers(self) -> list[int]:
        """Returns the layers that route to experts."""
        return [i for i, kind in enumerate(tiny.mlp_layer_types(self.config())) if kind == "sparse"]


def checkpoint_digests(directory: str | Path) -> dict[str, str]:
    """Returns {file name: sha256 of its contents} of a directory."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(directory).iterdir())}


SMALL = {
    "vocab_size": 192, "hidden_size": 64, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 16,
}  # fmt: skip

# Seeds: the first whose choices are all clear of float32 rounding (make_golden.py refuses near ties).
# Index heads: with few of them every dot product is negative for many pairs, whose scores tie at exactly zero.
MODELS = [
    FixtureModel(
        "glm52", 96, "bfloat16",
        {**SMALL, "num_hidden_layers": 11, "first_k_dense_replace": 3},
        seed=23, shards=2, mtp=True,
        about="GLM-5.2's structure: index sharing (freq 4, offset 3), 3 dense layers, 6 x index_topk",
    ),
    FixtureModel(
        "glm5", 80, "float32",
        {**SMALL, "num_hidden_layers": 5, "first_k_dense_replace": 2, "max_position_embeddings": 202752,
         "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        drop=("indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "moe_router_dtype",
              "index_share_for_mtp_iteration", "mlp_layer_types"),
        seed=5, about="GLM-5 and 5.1: no sharing keys, so every layer is full; rope theta 1e6",
    ),
    FixtureModel(
        "odd", 72, "bfloat16",
        {"num_hidden_layers": 5, "first_k_dense_replace": 1, "index_topk_freq": 2, "index_skip_topk_offset": 2,
         "vocab_size": 131, "hidden_size": 72, "num_attention_heads": 3, "q_lora_rank": 56, "kv_lora_rank": 40,
         "qk_nope_head_dim": 20, "qk_rope_head_dim": 16, "v_head_dim": 24, "intermediate_size": 100,
         "moe_intermediate_size": 28, "n_routed_experts": 5, "num_experts_per_tok": 3, "index_n_heads": 7,
         "index_head_dim": 48, "index_topk": 13},
        seed=4, about="sizes that are multiples of nothing, another sharing schedule",
    ),
    FixtureModel(
        "fp8", 64, "fp8",
        {**SMALL, "num_hidden_layers": 5, "first_k_dense_replace": 1, "index_topk_freq": 2, "index_skip_topk_offset": 2,
         "hidden_size": 320, "q_lora_rank": 160, "kv_lora_rank": 136, "qk_nope_head_dim": 48, "qk_rope_head_dim": 32,
         "v_head_dim": 40, "intermediate_size": 200, "moe_intermediate_size": 136, "n_routed_experts": 8,
         "num_experts_per_tok": 3, "index_head_dim": 64},
        seed=2, shards=3, mtp=True,
        about="FP8 blocks: partial last blocks, kv_b heads of 88 rows straddling blocks; run as its twin",
    ),
    FixtureModel(
        "long", 256, "float32",
        {**SMALL, "num_hidden_layers": 4, "first_k_dense_replace": 1, "index_topk_freq": 3, "index_skip_topk_offset": 2,
         "vocab_size": 96, "index_topk": 32},
        seed=38, about="8 x index_topk tokens, four cache pages",
    ),
]  # fmt: skip
