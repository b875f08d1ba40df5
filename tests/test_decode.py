"""Prefill, decode, chunks and batches give the same numbers; generation follows its contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, decode, generate, prefill
from glm52_jax.cache import Cache, Rows, contiguous_table, make_cache, make_rows
from glm52_jax.model import forward, logits
from glm52_jax.weights import Weights
from pallas_kernels import experts
from pallas_kernels.compare import rel_l2
from pallas_kernels.parts import Parts
from tests.fixtures_util import BY_NAME, checkpoint_dir, first_layers, reference_model
from tests.test_program import tiny

SAME = 1e-5
GREEDY = Sampling(temperature=0.0)


def shallow(name: str = "long") -> glm52_jax.Model:
    """A dense layer and two with experts, of which the second shares its selection: the time of these tests is compilation."""
    return first_layers(reference_model(name), 3)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks of 8 tokens where there are four and of 32 for one, over as many pages."""
    monkeypatch.setattr(prefill, "CHUNK_ROWS", 32)
    monkeypatch.setattr(generate, "pages_of", lambda longest: 3)


def run_chunks(
    model: glm52_jax.Model, ids: list[int], chunks: list[int], table: jax.Array, cache: Cache, widths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(logits [T, vocab], chosen experts [T, layers, k] in order) of ids fed in chunks through one sequence's pages, each in the
    first of the widths that holds it."""
    out, experts, start = [], [], 0
    for count in chunks:
        width = next(width for width in widths if count <= width)
        tokens = jnp.array([[*ids[start : start + count], *[0] * (width - count)]], jnp.int32)
        found, cache = decode.score_chunk(
            model.weights,
            cache,
            table,
            tokens,
            jnp.array([start], jnp.int32),
            jnp.array([count], jnp.int32),
            config=model.config,
            plan=model.plan,
            taps=True,
        )
        out.append(np.asarray(found["logits"][0])[:count])
        chosen = [np.asarray(value[0])[:count] for name, value in found.items() if name.startswith("experts")]
        experts.append(np.sort(np.stack(chosen, axis=1), axis=-1))
        start += count
    assert start == len(ids)
    return np.concatenate(out), np.concatenate(experts)


# A split at a page boundary, before and after it, below and beyond index_topk; the last one is decode, token by token.
@pytest.mark.parametrize("chunks", [[64, 32], [63, 33], [65, 31], [5, 91], [17, 30, 49], [32] + [1] * 64])
def test_chunks_anywhere_give_the_same_logits(chunks: list[int]) -> None:
    model, ids = shallow(), BY_NAME["long"].ids()[:96]
    want = model.score(ids)
    # Pages in no particular order, inside a larger cache whose other pages hold NaN.
    cache = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), make_cache(model.config, model.plan, 7))
    got, _ = run_chunks(model, ids, chunks, jnp.array([[5, 2]], jnp.int32), cache, widths=(1, 64, 96))
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < SAME


@pytest.mark.parametrize("dtype,cache", [("float32", "fp8"), ("bfloat16", "bfloat16"), ("bfloat16", "fp8")])
def test_quantized_paths_agree_between_prefill_and_decode(dtype: str, cache: str) -> None:
    """The same rounding points in a chunk and in single steps: what is left is last-bit differences that cross a rounding."""
    model = first_layers(glm52_jax.load(checkpoint_dir("fp8"), dtype=dtype, cache=cache), 3)
    ids = BY_NAME["fp8"].ids()[:40]
    table = contiguous_table(1, 1)
    whole, chosen = run_chunks(model, ids, [40], table, make_cache(model.config, model.plan, 1), widths=(40,))
    steps, others = run_chunks(
        model, ids, [8] + [1] * 32, table, make_cache(model.config, model.plan, 1), widths=(1, 40)
    )
    error = np.linalg.norm(whole - steps, axis=-1) / np.linalg.norm(whole, axis=-1)
    # A flipped choice of an expert or of positions moves a row by 0.4, and rows after it that attend to it: only rows that select
    # everything, before the first such expert, are bounded one by one. The first eight are in one chunk both times.
    same = int(np.append((chosen != others).any((1, 2)), True).argmax())
    print(f"{same} rows before the first other expert; errors {error.round(4).tolist()}")
    assert same > 9 and error[: min(same, model.config.index_topk)].max() < 2e-2
    assert np.median(error) < 1e-2


def test_fp8_checkpoint_equals_its_dequantized_twin(tmp_path) -> None:
    from glm52_jax.tiny import write_dequantised_twin

    write_dequantised_twin(checkpoint_dir("fp8"), tmp_path)
    ids = BY_NAME["fp8"].ids()
    fp8 = glm52_jax.load(checkpoint_dir("fp8"), dtype="float32")
    twin = glm52_jax.load(tmp_path, dtype="float32")
    converted = glm52_jax.load(checkpoint_dir("fp8"), dtype="float32", weights="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, converted.weights, twin.weights))
    want, taps = first_layers(twin, 3).score(ids, taps=True)
    for model in (fp8, converted):
        got, found = first_layers(model, 3).score(ids, taps=True)
        assert rel_l2(got, want) < 1e-6
        assert all(np.array_equal(found[k], taps[k]) for k in taps if k.startswith(("topk", "experts")))


def test_score_under_jit_equals_score() -> None:
    model, ids = shallow(), BY_NAME["long"].ids()
    want, taps = model.score(ids, taps=True)
    got, found = jax.jit(lambda m, x: m.score(x, taps=True))(model, jnp.array(ids))
    assert rel_l2(got, want) < 1e-6 and set(found) == set(taps)


def test_score_is_causal_and_chunks_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shallow(), BY_NAME["long"].ids()
    want = np.asarray(model.score(ids))
    assert rel_l2(model.score(ids[:100]), want[:100]) < SAME
    monkeypatch.setattr(generate, "_CHUNK", 64)
    assert rel_l2(model.score(ids), want) < SAME


@pytest.mark.parametrize(
    "ids,problem", [([], "non-empty"), ([3, 96], "96"), ([-1], "-1"), ([1.5], "integers"), ([[1]], "shape")]
)
def test_score_refuses_bad_ids(ids: list, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        reference_model("long").score(ids)


def test_score_under_jit_refuses_floats() -> None:
    with pytest.raises(ValueError, match="float32 must be integers"):
        jax.jit(lambda m, x: m.score(x))(reference_model("long"), jnp.array([1.5, 2.0]))


def teacher_forced(model: glm52_jax.Model, prompt: list[int], new: list[int]) -> np.ndarray:
    """Most likely next tokens according to ``score``, at each position from which one of ``new`` was drawn. Others follow up to a
    length that all prompts share: one program."""
    text = [*prompt, *new]
    scored = np.asarray(model.score(text + [7] * (142 - len(text))))
    return scored[len(prompt) - 1 : len(text) - 1].argmax(-1)


def test_batch_of_different_lengths_equals_each_prompt_alone(few_programs: None) -> None:
    model, ids = tiny(), BY_NAME["long"].ids()
    prompts = [ids[:1], ids[3:80], ids[10:140], ids[7:27]]
    assert model.config.index_topk < len(prompts[1])
    together: dict[int, list[int]] = {i: [] for i in range(4)}
    for token in model.generate(prompts, max_new_tokens=12, sampling=GREEDY, stop_ids=()):
        together[token.sequence].append(token.id)
    for i, prompt in enumerate(prompts):
        if i:
            assert together[i] == [t.id for t in model.generate(prompt, 12, GREEDY, ())]
        if i in (0, 2):
            assert list(teacher_forced(model, prompt, together[i])) == together[i]


def test_rows_do_not_depend_on_their_batch() -> None:
    """Padding rows and other sequences, NaN in their caches included, do not reach a sequence's numbers."""
    model, ids = shallow(), BY_NAME["long"].ids()[:64]
    cache = make_cache(model.config, model.plan, 4)

    @jax.jit
    def run(weights: Weights, tokens: jax.Array, cache: Cache, rows: Rows) -> jax.Array:
        return logits(weights, forward(weights, tokens, cache, rows, model.config, model.plan)[0], model.plan)

    alone_rows = make_rows(
        model.config, jnp.array([[2, 1]], jnp.int32), jnp.zeros(1, jnp.int32), jnp.array([64], jnp.int32), 64
    )
    tokens = jnp.array([ids], jnp.int32)
    want = run(model.weights, tokens, cache, alone_rows)[0]
    poisoned = jax.tree.map(lambda a: a.at[:, jnp.array([0, 3])].set(jnp.nan), cache)
    table = jnp.array([[0, 3], [2, 1]], jnp.int32)
    rows = make_rows(model.config, table, jnp.array([70, 0], jnp.int32), jnp.array([64, 64], jnp.int32), 64)
    got = run(model.weights, jnp.concatenate([tokens, tokens]), poisoned, rows)
    assert np.isnan(np.asarray(got[0])).any()
    assert rel_l2(got[1], want) < SAME


def test_generate_stops_at_a_stop_id_and_yields_it(few_programs: None) -> None:
    model, prompt = tiny(), BY_NAME["long"].ids()[:9]
    free = [t.id for t in model.generate(prompt, max_new_tokens=16, sampling=GREEDY, stop_ids=())]
    stop = free[5]
    first = free.index(stop)
    tokens = list(model.generate([prompt] * 4, max_new_tokens=16, sampling=GREEDY, stop_ids=[stop]))
    assert [t.id for t in tokens if t.sequence == 1] == free[: first + 1]
    assert [t.finished for t in tokens if t.sequence == 0] == [False] * first + [True]


def test_generate_ends_after_max_new_tokens_and_marks_the_last(few_programs: None) -> None:
    model, ids = tiny(), BY_NAME["long"].ids()
    tokens = list(model.generate(ids[:9], max_new_tokens=3, sampling=GREEDY, stop_ids=()))
    assert [t.finished for t in tokens] == [False, False, True]
    assert [t.sequence for t in tokens] == [0, 0, 0]


def test_generate_draws_by_seed_not_by_batch(few_programs: None) -> None:
    model, ids = tiny(), BY_NAME["long"].ids()

    def draw(prompts: list, seed: int) -> list[int]:
        tokens = model.generate(prompts, max_new_tokens=10, sampling=Sampling(temperature=1.5, seed=seed), stop_ids=())
        return [t.id for t in tokens if t.sequence == 0]

    alone = draw([ids[:9]], 1)
    assert draw([ids[:9], ids[:50], ids[3:8], ids[4:30]], 1) == alone
    assert draw([ids[:9]], 1) == alone
    assert draw([ids[:9]], 2) != alone


@pytest.mark.parametrize(
    "kwargs,problem",
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1"),
        ({"prompts": [5000]}, "5000"),
        ({"prompts": [1], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompts": [1], "max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"prompts": [1], "max_new_tokens": 2**20}, "max_position_embeddings"),
    ],
)
def test_generate_refuses_at_the_call(kwargs: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        reference_model("long").generate(**kwargs)


def test_eos_of_the_config_is_the_default_stop(few_programs: None) -> None:
    model = tiny()
    stop = next(iter(model.generate([1, 2, 3], max_new_tokens=1, sampling=GREEDY))).id
    model = model.replace(config=glm52_jax.Config(**{**vars(model.config), "eos_token_ids": (stop,)}))
    assert [t.id for t in model.generate([1, 2, 3], max_new_tokens=8, sampling=GREEDY)] == [stop]


def test_decode_step_keeps_its_buffers(few_programs: None) -> None:
    """The state is donated and comes back with the same shapes: a step allocates no second cache."""
    model = tiny()
    state = model._prefill([np.array([1, 2, 3], np.int32)], 8, GREEDY)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    old = state.cache.latent
    state = decode.decode_step(model.weights, state, config=model.config, plan=model.plan)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert old.is_deleted()


def test_experts_that_leave_their_sum_to_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may hand out the parts of a sum: the stream, the taps and what the last layer leaves to the head are the same."""
    model, mix, left = shallow(), experts.mix, []

    def leaving(*args: Any, apart: bool = False, **options: Any) -> Any:
        y, mailbox = mix(*args, apart=apart, **options)
        if not apart:
            return y, mailbox
        left.append(y)
        nothing = jnp.full(y.shape, jnp.nan, jnp.float32)
        ids, weights = jnp.full((y.shape[0], 1), -1, jnp.int32), jnp.ones((y.shape[0], 1))
        return Parts(jnp.concatenate([nothing, y.astype(jnp.float32)]), ids, weights, 4), mailbox

    tokens, counts = jnp.asarray(BY_NAME["long"].ids()[:10], jnp.int32).reshape(2, 5), jnp.array([5, 5], jnp.int32)
    cache = make_cache(model.config, model.plan, 2)
    rows = make_rows(model.config, contiguous_table(2, 1), jnp.zeros(2, jnp.int32), counts, 5)

    def run() -> Any:
        return jax.jit(lambda w, c: forward(w, tokens, c, rows, model.config, model.plan, True))(model.weights, cache)

    want = run()
    monkeypatch.setattr(experts, "mix", leaving)
    got = run()
    assert len(left) == 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
