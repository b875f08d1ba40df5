"""A loaded model: scoring and generation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from glm52_jax import decode, exchange
from glm52_jax import parallel as several
from glm52_jax.buckets import BUCKETS, bucket, burst
from glm52_jax.cache import Cache
from glm52_jax.checkpoint import Checkpoint
from glm52_jax.config import Config
from glm52_jax.loader import Progress, Storage, load_weights
from glm52_jax.model import Taps
from glm52_jax.plan import Plan
from glm52_jax.prefill import pages_of, power_of_two, prefill, table_of
from glm52_jax.program import DecodeProgram, fault
from glm52_jax.sampling import Sampling
from glm52_jax.weights import Weights
from pallas_kernels.blocks import BlockScaled
from pallas_kernels.paged import PAGE

type Ids = Sequence[int] | jax.Array | np.ndarray

# Tokens that are scored in a call; short sequences use the next power of two.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token: which prompt it continues, its id, and whether it is that sequence's last."""

    sequence: int
    id: int
    finished: bool


class NotFiniteError(ArithmeticError):
    """Logits of some sequences were not finite: NaN or infinity in the weights, or in those sequences' caches.

    found: sequence -> (number of the new token that could not be drawn, counted from 0; what its logits held).
    """

    def __init__(self, found: dict[int, tuple[int, str]]) -> None:
        told = "; ".join(f"sequence {i} ended at its new token {n}: {what}" for i, (n, what) in sorted(found.items()))
        super().__init__(
            f"logits are not finite: {told}. The weights or these sequences' caches are broken; all other sequences are complete"
        )
        self.found = found


@struct.dataclass
class Model:
    """Weights, configuration and plan; a pytree, so it can be an argument of a jitted function.

    Made by ``glm52_jax.load``.
    """

    weights: Weights
    config: Config = struct.field(pytree_node=False)
    plan: Plan = struct.field(pytree_node=False)

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint held the multi-token-prediction layer."""
        return self.weights.mtp is not None

    @overload
    def score(self, ids: Ids, taps: Literal[False] = False) -> jax.Array: ...

    @overload
    def score(self, ids: Ids, taps: Literal[True]) -> tuple[jax.Array, Taps]: ...

    def score(self, ids: Ids, taps: bool = False) -> jax.Array | tuple[jax.Array, Taps]:
        """Logits of every position of one sequence.

        Args:
          ids: int [T], T >= 1, each in 0..vocab_size-1 (checked unless traced).
          taps: also return what happened inside.

        Returns:
          logits float32 [T, vocab]: row t predicts token t + 1. With ``taps`` also a dict: "hidden.<layer>" [T, hidden] (the
          residual stream after the layer, in the plan's dtype), "topk.<layer>" int32 [T, index_topk] for layers that run an
          indexer (selected positions, any order, -1 beyond) and "experts.<layer>" int32 [T, k] for layers with experts.

        T may exceed max_position_embeddings, which ``generate`` refuses. Works under ``jax.jit``, where T is static.
        Raises ValueError for empty or out-of-range ids.
        """
        tokens = _as_ids(ids, self.config.vocab_size)
        found = self._by_chunks(decode.score_chunk, (tokens,), taps=taps)
        logits = found.pop("logits")
        return (logits, found) if taps else logits

    def score_mtp(self, ids: Ids) -> jax.Array:
        """Logits of the multi-token-prediction layer's first draft, for every position of one sequence.

        Args:
          ids: int [T], T >= 2.

        Returns:
          float32 [T - 1, vocab]: row t, made from the model's hidden state at t and the token at t + 1, predicts token t + 2.

        Raises:
          ValueError: the checkpoint has no MTP tensors, or ids are too short or out of range.
        """
        if not self.has_mtp:
            raise ValueError(
                f"MTP cannot be used: the checkpoint holds no tensor of model.layers.{self.config.num_hidden_layers}, "
                f"the MTP layer (num_nextn_predict_layers={self.config.num_nextn_predict_layers})"
            )
        tokens = _as_ids(ids, self.config.vocab_size)
        if tokens.shape[0] < 2:
            raise ValueError(f"ids of {tokens.shape[0]} token: a draft needs a token and its successor, so at least 2")
        return self._by_chunks(decode.draft_chunk, (tokens[:-1], tokens[1:]))["logits"]

    def _by_chunks(self, run: Callable[..., tuple[Taps, Cache]], rows: tuple[Any, ...], **static: bool) -> Taps:
        """Runs a sequence through ``run`` in chunks over a fresh cache; arrays of all chunks are joined."""
        length, plan = rows[0].shape[0], self.plan
        width, pages = _chunk_width(length), -(-length // PAGE)
        batch = several.sequences(1, plan)
        table = several.place(table_of(batch, pages, plan), plan, several.batch_spec(plan))
        cache = several.new_cache(self.config, plan, batch * pages, mtp=run is decode.draft_chunk)
        chunks: list[Taps] = []
        for start in range(0, length, width):
            count = min(width, length - start)
            pad = ((0, batch - 1), (0, width - count))
            pieces = [_xp(row).pad(row[None, start : start + count], pad) for row in rows]
            counts = np.zeros(batch, np.int32)
            counts[0] = count
            where = (np.full(batch, start, np.int32), counts)
            found, cache = run(self.weights, cache, table, *pieces, *where, config=self.config, plan=plan, **static)
            chunks.append({name: several.first_rows(value, count, plan) for name, value in found.items()})
        return {name: jnp.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def generate(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        """Continues one prompt or a batch of prompts of different lengths, token by token.

        Args:
          prompts: token ids of one prompt, or a list of prompts; none may be empty.
          max_new_tokens: at most this many for each prompt.
          sampling: how to draw; None is ``Sampling()``: temperature 1, no cuts.
          stop_ids: ids that end a sequence (they are yielded); None takes the config's eos ids, () never stops.

        Yields:
          tokens in step order, and in prompt order within a step.

        Raises:
          ValueError: an empty prompt, ids out of range, a max_new_tokens below 1, or a sequence longer than
            max_position_embeddings. Raised by the call itself, before the first token.
          NotFiniteError: a sequence's logits held NaN or infinity. It ends there, without a last token; the error is raised when
            all others have ended.
          PeerMissingError: (several GPUs) a device waited for another one in vain; the sequences have to begin again.

        On a GPU the step of the smallest bucket that holds the batch is compiled before anything runs, and kept: later calls with
        prompts of similar lengths reuse it. ``glm52_jax.buckets.programs`` compiles all buckets ahead. On several GPUs tokens come
        four steps at a time.
        """
        batch = _as_batch(prompts, self.config.vocab_size)
        stops = frozenset(self.config.eos_token_ids if stop_ids is None else stop_ids)
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be an integer of at least 1")
        longest = max(len(ids) for ids in batch) + max_new_tokens
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"prompt plus {max_new_tokens=} is {longest} tokens, more than "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        return self._stream(batch, max_new_tokens, sampling or Sampling(), stops)

    def _stream(
        self, batch: list[np.ndarray], max_new_tokens: int, sampling: Sampling, stops: frozenset[int]
    ) -> Iterator[Token]:
        live, broken = set(range(len(batch))), dict[int, tuple[int, str]]()
        # On a GPU some later steps are under way when a stop is seen; what they draw is never looked at.
        for step, drawn in enumerate(self._drawn(batch, max_new_tokens, sampling)):
            for sequence in sorted(live):
                token = int(drawn[sequence])
                finished = token in stops or step + 1 == max_new_tokens
                if finished or token < 0:
                    live.discard(sequence)
                if token < 0:
                    broken[sequence] = (step, fault(token))
                else:
                    yield Token(sequence, token, finished)
            if not live:
                break
        if broken:
            if (peers := exchange.of(self.plan.parallel)) is not None:
                peers.check()  # a device that missed another one made the NaN, not the weights or the caches
            raise NotFiniteError(broken)

    def _drawn(self, batch: list[np.ndarray], max_new_tokens: int, sampling: Sampling) -> Iterator[np.ndarray]:
        """What each step drew, int32 [at least the batch]."""
        config, plan = self.config, self.plan
        if self._on_gpu():
            # Rows without a sequence fill the smallest of the batches that programs are compiled for.
            rows = several.sequences(bucket(len(batch)) if len(batch) <= BUCKETS[-1] else len(batch), plan)
            batch = batch + [np.zeros(0, np.int32)] * (rows - len(batch))
            # Compiled before anything runs: loading an executable evicts the recorded graphs of others.
            steps = burst(plan)
            room = max_new_tokens + steps - 1  # The last call goes on past what is asked of it.
            made = DecodeProgram(self.weights, config, plan, rows, _pages(batch, room), burst=steps)
            yield from made.tokens(made.adopt(self._prefill(batch, room, sampling)), max_new_tokens - 1)
            return
        state = self._prefill(batch, max_new_tokens, sampling)
        yield np.asarray(state.drawn)
        for _ in range(max_new_tokens - 1):
            state = decode.decode_step(self.weights, state, config=config, plan=plan)
            yield np.asarray(state.drawn)

    def _on_gpu(self) -> bool:
        return next(iter(self.weights.embed.devices())).platform == "gpu"

    def _prefill(self, batch: list[np.ndarray], max_new_tokens: int, sampling: Sampling) -> decode.DecodeState:
        return prefill(self.weights, self.config, self.plan, batch, _pages(batch, max_new_tokens), sampling)


def load(
    path: str | os.PathLike[str],
    dtype: str = "bfloat16",
    weights: Storage = "checkpoint",
    cache: str = "auto",
    linear: str = "w8a16",
    latent_norm_eps: float | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    parallel: str | None = None,
) -> Model:
    """Loads a Hugging Face GLM-5, 5.1 or 5.2 checkpoint directory onto the default device, or onto several.

    Args:
      path: directory with config.json and safetensors files: bfloat16, float32 or the official FP8 format.
      dtype: of the activations, "bfloat16" or "float32" (true float32: no TF32).
      weights: "checkpoint" keeps every weight as stored, FP8 blocks included; "bfloat16" or "float32" converts.
      cache: latent cache, "float32", "bfloat16" or "fp8" (656 bytes a token and layer at the real sizes). "auto": float32 for
        float32 activations, else fp8 where the weights stay FP8, else bfloat16. Index keys are float32 with a float32 cache,
        else FP8.
      linear: arithmetic with FP8 weights: "w8a16", or "w8a8", which quantizes activations by groups of 128.
      latent_norm_eps: epsilon of the two latent norms; None is the config's rms_norm_eps, 1e-6 is what transformers uses.
      progress: called as progress(bytes done, bytes in total, tensor name) while loading.
      mesh: devices that share the model, a mesh with one axis (``parallel.make_mesh(n)`` takes the first n); all devices where only
        ``parallel`` is given. Each device gets its own slices of the weights and nothing else.
      parallel: how they share it. "tp" slices every weight that is worth it over all of them: lowest latency. "ep" places whole
        experts on devices and slices the rest. "ep+dp" also gives each device sequences of its own to attend for, with their
        caches, which "tp" and "ep" hold on every device: highest throughput. "tp" where only ``mesh`` is given.

    Returns:
      a Model.

    Raises:
      CheckpointError: a file or tensor is missing, unexpected, broken or of the wrong shape or type.
      ConfigError: config.json holds a field this code does not know or support.
      ValueError: an argument outside the values above, or a model whose sizes do not split over the devices, with the numbers.
    """
    if weights not in ("checkpoint", "bfloat16", "float32"):
        raise ValueError(f"{weights=} must be 'checkpoint', 'bfloat16' or 'float32'")
    # Arguments are checked before the disk is touched.
    share = several.share(mesh, parallel)
    plan = Plan(dtype=dtype, cache="float32" if cache == "auto" else cache, linear=linear, parallel=share)
    with Checkpoint.open(path) as checkpoint:
        config = Config.from_hf(checkpoint.config, latent_norm_eps)
        arrays = load_weights(checkpoint, config, dtype=dtype, weights=weights, progress=progress, parallel=share)
    if cache == "auto" and dtype != "float32":
        fp8 = isinstance(arrays.attention.q_b, BlockScaled)
        plan = dataclasses.replace(plan, cache="fp8" if fp8 else "bfloat16")
    return Model(arrays, config, plan)


def _as_ids(ids: Ids, vocab: int) -> jax.Array | np.ndarray:
    if isinstance(ids, jax.Array) and isinstance(ids, jax.core.Tracer):
        if ids.ndim != 1 or not ids.shape[0]:
            raise ValueError(f"ids of shape {ids.shape} must be one non-empty sequence [T]")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids of dtype {ids.dtype} must be integers")
        return ids.astype(jnp.int32)
    return _checked(ids, vocab, "ids")


def _xp(array: jax.Array | np.ndarray) -> Any:
    """numpy for its arrays, which every process of several has alike and any mesh takes; jnp for traced ones."""
    return np if isinstance(array, np.ndarray) else jnp


def _as_batch(prompts: Sequence[int] | Sequence[Sequence[int]], vocab: int) -> list[np.ndarray]:
    if len(prompts) == 0:
        raise ValueError("no prompt given")
    single = np.ndim(prompts[0]) == 0
    batch = [prompts] if single else list(prompts)
    return [_checked(ids, vocab, f"prompt {i}") for i, ids in enumerate(batch)]


def _checked(ids: object, vocab: int, name: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a non-empty list of integers, got shape {array.shape} of {array.dtype}")
    outside = array[(array < 0) | (array >= vocab)]
    if outside.size:
        raise ValueError(f"{name} holds {int(outside[0])}, outside 0..{vocab - 1}")
    return array.astype(np.int32)


def _pages(batch: list[np.ndarray], max_new_tokens: int) -> int:
    return pages_of(max(map(len, batch)) + max_new_tokens)


def _chunk_width(length: int) -> int:
    return min(_CHUNK, power_of_two(length))
