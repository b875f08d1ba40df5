"""``python -m bench prompt`` on a small model."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bench import __main__ as command
from bench import prompt
from bench.records import Ceilings
from glm52_jax import prefill
from glm52_jax.weights import Weights
from pallas_kernels import fp8_linear, registry
from tests.test_bench_step import CONFIG, SPEC, CpuSession

CEILINGS = Ceilings(4e12, 8e14)


def test_a_prompt_is_timed_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "glm52", lambda layers: CONFIG)
    monkeypatch.setattr(prefill, "CHUNK_ROWS", 32)
    options = command._parser().parse_args(["prompt", "--tokens", "70", "--layers", "3"])
    session = CpuSession(tmp_path)
    assert prompt.run(options, session) == 0  # type: ignore[arg-type]
    _, (figure,) = prompt.FILE.read(tmp_path / "step" / prompt.NAME)
    assert figure.key == ("3 layers, w8a16", 70) and figure.chunk == 32 and figure.run == "run"
    assert figure.tokens_s == pytest.approx(70e6 / figure.us, rel=1e-2) and figure.compile_s > 0
    assert figure.backends["sparse_mla"] == "reference" and 0 < figure.bound_us < figure.us
    assert "prompt of 70 in chunks of 32" in session.said[0]


def test_a_prompt_without_finite_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prompt.make_weights

    def poisoned(shapes: Weights) -> Weights:
        weights = made(shapes)
        return dataclasses.replace(weights, norm=weights.norm * jnp.nan)

    monkeypatch.setattr(prompt, "make_weights", poisoned)
    with pytest.raises(FloatingPointError, match="the logits behind 40 tokens hold NaN"):
        prompt.measure(SPEC, 40, CEILINGS)


def test_the_bound_counts_every_call() -> None:
    x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((128, 256), jnp.bfloat16)
    with registry.recorded() as choices:
        fp8_linear.linear(x, w)
    (spec,) = {choice.spec for choice in choices}
    each = max(spec.bytes() / 4e12, spec.flops() / 8e14 * spec.operand_bits() / 16) * 1e6
    assert prompt.bound(choices, 3, CEILINGS) == pytest.approx(3 * each)
    assert np.isfinite(each) and each > 0
