"""``glm52 plan``, the plan of a program that is not compiled, and the compilation cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from glm52_jax import compile_cache, shapes
from glm52_jax.cli import main
from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.tiny import KERNEL_TINY, tiny_config
from pallas_kernels import arch, registry
from tests.configs import GLM52_FP8

# Three layers of the published model: a dense one, an MoE one with an indexer, an MoE one without.
SMALL = GLM52_FP8 | {
    "num_hidden_layers": 3,
    "indexer_types": ["full", "full", "shared"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_nextn_predict_layers": 0,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_plan_of_a_gpu_that_is_not_there(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(shown(capsys, str(directory), "--gpu", "H200-141", "--json"))
    assert plan["gpu"] == "H200-141"
    found = {(group["operation"], group["backend"]): group for group in plan["operations"] if not group["inside"]}
    assert found["mla_front", "triton"]["calls"] == 3
    assert found["mqa_logits", "gluon"]["calls"] == 2
    (q_a,) = [
        group for group in plan["operations"] if group["operation"] == "fp8_linear" and "mosaic" in group["backend"]
    ][:1]
    assert "first choice on H200-141" in q_a["reason"] and {size["k"] for size in q_a["sizes"]} >= {6144}
    # Three layers' o_proj [6144, 16384] in FP8 and W_UV [64, 256, 512] in bfloat16, and what goes in and out.
    assert 0 < found["mla_out", "triton"]["bytes"] - 3 * (6144 * 16384 + 2 * 64 * 256 * 512) < 1e6


def test_plan_says_why_on_other_devices(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(directory), "--gpu", "A100-80", "--rows", "8")
    assert text.startswith("A100-80: a decode step of 8 rows, 4096 tokens each, w8a16, cache fp8\n")
    assert "needs SM90, got SM80" in text and "cpu" not in text
    text = shown(capsys, str(directory), "--gpu", "cpu")
    lines = [line for line in text.splitlines()[1:] if "calls" in line]
    assert lines and all(" reference " in line for line in lines)
    assert "needs SM90, got no NVIDIA GPU" in text


def test_plan_of_one_device_of_several(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (str(directory), "--gpu", "H200-141", "--json")
    whole = json.loads(shown(capsys, *flags))["operations"]
    share = json.loads(shown(capsys, *flags, "--parallel", "tp", "--devices", "8"))["operations"]

    def total(groups: list[dict], operation: str) -> int:
        return sum(group["bytes"] for group in groups if group["operation"] == operation and not group["inside"])

    assert 7.5 < total(whole, "mla_out") / total(share, "mla_out") < 8.1
    assert total(whole, "index_keys") == total(share, "index_keys")
    assert any(group["operation"] == "collectives" for group in share)


def test_plan_of_the_tiny_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--tiny")
    assert text.startswith("no NVIDIA GPU: a decode step of 1 rows")


@pytest.mark.parametrize(
    "arguments,problem",
    [
        ((), "give a checkpoint directory, or --tiny"),
        (("--tiny", "--gpu", "H300"), "unknown GPU 'H300'"),
        (("--tiny", "--devices", "2"), "--parallel and --devices go together"),
        (("--tiny", "--parallel", "tp", "--devices", "7"), "over 7 devices of"),
        (("nowhere",), "nowhere/config.json"),
    ],
)
def test_plan_refuses(arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_a_plan_is_what_a_trace_records() -> None:
    """Where references serve, planning and tracing are the same calls with the same sizes."""
    config = Config.from_hf(tiny_config(**KERNEL_TINY, num_hidden_layers=3, num_nextn_predict_layers=0))
    weights = shapes.abstract_weights(config, fp8=True)
    plans = [
        shapes.choices(weights, config, Plan(cache="fp8"), 2, 5, None, kernels=kernels) for kernels in (False, True)
    ]
    assert plans[0] == plans[1] and [c.spec for c in plans[0]] == [c.spec for c in plans[1]]
    assert all(choice.spec is not None for choice in plans[0])


def test_planning_imports_no_kernel_and_leaves_no_trace() -> None:
    def broken() -> None:
        raise AssertionError("loaded")

    backends = (
        registry.Backend("kernel", lambda spec, gpu: None if gpu else registry.Refusal("no GPU"), broken),
        registry.Backend("reference", lambda spec, gpu: None, lambda: lambda spec, x: x + spec),
    )
    from pallas_kernels import lowering

    with lowering.target(arch.by_name("H200-141")), registry.planned() as found:
        assert registry.call("op", backends, 2, (1,)) == 3
    assert found == [registry.Choice("op", "kernel", "first choice on H200-141")] and found[0].spec == 2
    with lowering.target(arch.by_name("H200-141")), pytest.raises(AssertionError, match="loaded"):
        registry.call("op", backends, 2, (1,))


def test_calls_of_a_kernel_are_marked() -> None:
    inner = (registry.Backend("reference", lambda spec, gpu: None, lambda: lambda spec: spec),)
    outer = (
        registry.Backend("reference", lambda spec, gpu: None, lambda: lambda spec: registry.call("in", inner, 1, ())),
    )
    with registry.recorded() as found:
        registry.call("out", outer, 0, ())
        registry.call("in", inner, 2, ())
    assert [(choice.operation, choice.inside, choice.spec) for choice in found] == [
        ("out", "", 0),
        ("in", "out", 1),
        ("in", "", 2),
    ]


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch):
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_compile_cache_is_in_the_users_cache_folder(
    no_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.enable() == tmp_path / "glm52_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "glm52_jax" / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0


def test_the_compile_cache_can_be_moved_and_switched_off(
    no_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert compile_cache.enable() is None and not jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    assert compile_cache.enable() == tmp_path


def test_short_compilations_are_kept_for_the_next_process(tmp_path: Path) -> None:
    text = "from glm52_jax import compile_cache; import jax; compile_cache.enable(); jax.jit(lambda x: x * 2)(3.0)"
    environment = {**os.environ, compile_cache.VARIABLE: str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", text], check=True, env=environment, timeout=120)
    assert len(list(tmp_path.glob("*-cache"))) == 1


def test_a_cache_that_the_user_gave_jax_stays(no_cache: None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    assert compile_cache.enable() == tmp_path
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
