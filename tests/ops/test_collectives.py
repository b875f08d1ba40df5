"""The peer-pointer collectives without a GPU: the kernel's own code on emulated ranks, planted faults, refusals, the workspace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels import arch, collectives, registry
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import (
    ADD_NORM,
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    CASES,
    REDUCE_SCATTER,
    Message,
)
from tests.ops.collectives_emulator import Ranks

BF16 = ml_dtypes.bfloat16
H200 = arch.by_name("H200-141")


def operands(spec: Message, call: int) -> list[np.ndarray]:
    rng = np.random.default_rng(call)
    dtype = BF16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    return [(8 * rng.normal(size=spec.shape)).astype(dtype) for _ in range(spec.devices)]


def expected(spec: Message, xs: list[np.ndarray], extra: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """What every rank must get: sums in the order of ranks in float32."""
    total = xs[0].astype(np.float32)
    for x in xs[1:]:
        total = total + x.astype(np.float32)
    if spec.form == ADD_NORM:
        h = (total + extra[0].astype(np.float32)).astype(xs[0].dtype)
        wide = h.astype(np.float32)
        scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + spec.eps)
        return [(h, wide * scale * extra[1][1].astype(np.float32))] * spec.devices
    if spec.form == ALL_REDUCE:
        return [(total.astype(xs[0].dtype),)] * spec.devices
    if spec.form == ALL_GATHER:
        return [(np.concatenate(xs, spec.dim),)] * spec.devices
    if spec.form == REDUCE_SCATTER:
        return [(part,) for part in np.split(total.astype(xs[0].dtype), spec.devices, spec.dim)]
    parts = [np.split(x, spec.devices, spec.dim) for x in xs]
    return [(np.concatenate([p[r] for p in parts], spec.into),) for r in range(spec.devices)]


def play(ranks: Ranks, specs: list[Message], polls: int = 100_000, silent: tuple[int, ...] = ()) -> list[list[Any]]:
    """All calls on all ranks; results by call, by rank."""
    data = [operands(spec, call) for call, spec in enumerate(specs)]
    extras = [[operands(spec, 100 + c)[0], np.float32(operands(spec, 200 + c)[1][:1].repeat(3, 0)).astype(BF16)]
              for c, spec in enumerate(specs)]  # fmt: skip
    results: list[list[Any]] = [[None] * ranks.world for _ in specs]

    def calls(rank: int) -> None:
        for call, spec in enumerate(specs):
            more = (*extras[call], np.array(1, np.int32)) if spec.form == ADD_NORM else ()
            out, ranks.state[rank] = ranks.kernels.exchange(
                spec, data[call][rank], ranks.work[rank], ranks.state[rank], *more, polls=polls
            )
            results[call][rank] = out if isinstance(out, tuple) else (out,)

    ranks.run(calls, silent)
    return [
        [*zip(row, expected(spec, xs, extra), strict=True)]
        for row, spec, xs, extra in zip(results, specs, data, extras, strict=True)
    ]


def right(spec: Message, pair: Any) -> bool:
    got, want = pair
    if spec.form == ADD_NORM:  # blocks add squares in another order than numpy
        close = np.allclose(got[1].astype(np.float32), want[1], rtol=1e-2)
        return got[0].tobytes() == want[0].tobytes() and close
    return got[0].shape == want[0].shape and got[0].tobytes() == want[0].tobytes()


def reduce(world: int, n: int = 300, dtype: str = "bfloat16") -> Message:
    return Message(ALL_REDUCE, (n,), dtype, world)


FORMS = [
    reduce(2),
    reduce(4, 514),
    reduce(8, 34),
    reduce(4, 131, "float32"),
    Message(ADD_NORM, (2, 512), "bfloat16", 4, eps=1e-5),
    Message(ADD_NORM, (1, 20), "bfloat16", 2, eps=1e-5),
    Message(ALL_GATHER, (3,), "int32", 4),
    Message(ALL_GATHER, (3, 6), "bfloat16", 4, dim=1),
    Message(REDUCE_SCATTER, (3, 16), "bfloat16", 4, dim=1),
    Message(REDUCE_SCATTER, (8, 5), "float32", 4),
    Message(ALL_TO_ALL, (8, 3), "float32", 4, dim=0, into=1),
    Message(ALL_TO_ALL, (3, 8), "float32", 2, dim=1, into=0),
    Message(ALL_TO_ALL, (8, 3), "float32", 4, dim=0, into=0),
]


@pytest.mark.parametrize("spec", FORMS, ids=lambda s: f"{s.form}-{s.shape}-{s.dtype}-{s.devices}")
def test_every_form_at_random_interleavings(spec: Message) -> None:
    """Five calls in a row, so that both buffers are used again; the same bits on all ranks."""
    if spec.form == ADD_NORM and spec.shape[0] == 2:
        assert workspace.plan(spec).parts > 1  # blocks must exchange their partial sums
    for seed in range(2):
        ranks = Ranks(spec.devices, capacity=256, seed=seed)
        for pairs in play(ranks, [spec] * 5):
            assert all(right(spec, pair) for pair in pairs)
            if spec.form in (ALL_REDUCE, ADD_NORM, ALL_GATHER):
                assert len({tuple(o.tobytes() for o in got) for got, _ in pairs}) == 1
        assert [int(s.epoch[0, 0]) for s in ranks.state] == [6] * spec.devices
        assert not any(int(s.status[0, 0]) for s in ranks.state)


def test_sizes_and_forms_mixed() -> None:
    """Words of an earlier, larger message are still there when a later one polls beside them."""
    specs = [reduce(4, n) for n in (600, 4, 300, 600, 4, 600)]
    specs[2] = Message(ALL_GATHER, (100,), "float32", 4)
    for pairs, spec in zip(play(Ranks(4, 192, seed=3), specs), specs, strict=True):
        assert all(right(spec, pair) for pair in pairs)


def test_two_shots_are_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MOST_PUSHED", 3 * 200)
    spec = reduce(4, 400)
    assert workspace.two_shots(spec) is not None
    ranks = Ranks(4, 64, seed=1)
    for pairs in play(ranks, [spec] * 2):
        assert all(right(spec, pair) for pair in pairs)
    assert int(ranks.state[0].epoch[0, 0]) == 5


def test_the_epoch_wraps_to_2_and_skips_words_nobody_wrote() -> None:
    ranks = Ranks(2, 192, seed=0, epoch=(1 << 32) - 3)
    assert all(right(reduce(2), pair) for pairs in play(ranks, [reduce(2)] * 5) for pair in pairs)
    assert int(ranks.state[0].epoch[0, 0]) == 4  # -3, -2, -1, 2, 3


@pytest.mark.parametrize("form", [ALL_REDUCE, ADD_NORM, ALL_GATHER])
def test_a_missing_peer_is_named(form: Any) -> None:
    spec = Message(form, (1, 40), "bfloat16", 4, eps=1e-5)
    ranks = Ranks(4, 192, seed=0)
    results = play(ranks, [spec], polls=50, silent=(2,))
    for rank in (0, 1, 3):
        assert workspace.missing(int(ranks.state[rank].status[0, 0])) == (2,)
        for out in results[0][rank][0]:
            assert np.isnan(out.astype(np.float32)).all()


def test_a_rank_of_another_epoch_is_missing_not_summed() -> None:
    """Stale epoch: rank 1 believes that it is one call further, so it writes the other buffer."""
    for ahead in (1, 2):
        ranks = Ranks(2, 192, seed=0)
        ranks.state[1] = dataclasses.replace(ranks.state[1], epoch=np.full((1, 1), 1 + ahead, np.uint32))  # type: ignore[arg-type]
        results = play(ranks, [reduce(2)], polls=50)
        assert [workspace.missing(int(s.status[0, 0])) for s in ranks.state] == [(1,), (0,)]
        assert all(np.isnan(got[0].astype(np.float32)).all() for got, _ in results[0])


FAULTS = {
    "one buffer": lambda t: t.replace("(epoch & 1)", "(epoch & 0)"),
    "parity": lambda t: t.replace("bases[WORLD - 1] + bank", "bases[WORLD - 1] + (PARITY * 16 - bank)"),
    "any epoch will do": lambda t: t.replace("setp.ne.u32 again, stamp, {epoch}", "setp.ne.u32 again, stamp, stamp"),
    "second packet unchecked": lambda t: t.replace("ne.or.u32 again, stamp, {epoch}", "ne.or.u32 again, stamp, stamp"),
    "own slot": lambda t: t.replace("rank.to(tl.int64) * (CAPACITY * 16)", "(rank * 0).to(tl.int64) * (CAPACITY * 16)"),
    "epoch stands still": lambda t: t.replace("2, epoch + 1))", "2, epoch))"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    """Each fault gives a wrong sum or a missing peer within some interleavings: the emulation can tell."""
    source: Callable[[str], str] = FAULTS[fault]
    spec = reduce(4, 40)
    for seed in range(8):
        ranks = Ranks(4, 192, seed, source=source)
        results = play(ranks, [spec] * 6, polls=300)
        missed = any(int(s.status[0, 0]) for s in ranks.state)
        if missed or not all(right(spec, pair) for pairs in results for pair in pairs):
            return
    pytest.fail(f"{fault}: not noticed in 8 interleavings")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Message(ALL_REDUCE, (1, 6144), "bfloat16", 3), "3 devices"),
        (Message(ALL_REDUCE, (1, 6144), "float16", 2), "float16"),
        (Message(ALL_REDUCE, (128, 6144), "bfloat16", 4), "1572864 bytes"),
        (Message(ALL_GATHER, (64, 38720), "float32", 4), "9912320 bytes"),
        (Message(ALL_GATHER, (2, 3), "bfloat16", 2, dim=1), "6 bytes"),
        (Message(ADD_NORM, (64, 6144), "bfloat16", 4), "786432 bytes"),
        (Message(ADD_NORM, (1, 6144), "float32", 4), "float32"),
    ],
)
def test_refusals_name_the_number(spec: Message, words: str) -> None:
    refusal = workspace.supports(spec, H200)
    assert refusal is not None and words in refusal.reason


def test_kernels_serve_where_a_workspace_is_open() -> None:
    for name, spec in CASES.items():
        choice = registry.resolve("collectives", collectives.BACKENDS, spec, H200)
        assert choice.backend == ("reference" if name == "ep_logits_b64_n4" else "triton")
        outside = dataclasses.replace(spec, peers=False)
        choice = registry.resolve("collectives", collectives.BACKENDS, outside, H200)
        assert choice.backend == "reference" and "no workspace is open" in choice.reason
    assert not workspace.opened()
    with workspace.bound(None, None):  # type: ignore[arg-type]
        assert workspace.opened()


def test_decode_messages_fit() -> None:
    served = {name for name, spec in CASES.items() if workspace.supports(spec, H200) is None}
    assert served == CASES.keys() - {"ep_logits_b64_n4"}
    for rows in (1, 8, 64):
        for world in workspace.WORLDS:
            assert workspace.supports(Message(ALL_REDUCE, (rows, 6144), "bfloat16", world), H200) is None


def test_workspace_needs_a_mesh_it_can_serve() -> None:
    with pytest.raises(ValueError, match="2, 4 or 8"):
        workspace.make(Mesh(np.array(jax.devices()[:1]), ("d",)))
    with pytest.raises(ValueError, match=r"workspace\.bound"):
        workspace.current()


def test_missing_is_in_the_order_of_ranks() -> None:
    assert workspace.missing(0) == () and workspace.missing(0b1010) == (1, 3) and workspace.missing(1 << 30) == (30,)
