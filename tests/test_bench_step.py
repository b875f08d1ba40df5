"""The whole-step benchmark at tiny sizes on the CPU: its weights, its program, its clock and its bound."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import records, report, step, step_command, step_graph, step_kernels, step_launches, step_model, step_report
from bench.step_model import StepSpec, expected_experts, glm52, make_weights
from glm52_jax import audit, model, shapes
from glm52_jax.cache import contiguous_table, make_cache, make_rows
from glm52_jax.config import Config
from glm52_jax.tiny import tiny_config
from glm52_jax.weights import Weights
from pallas_kernels import arch
from pallas_kernels.blocks import dequantize
from tests.configs import GLM52_FP8

CONFIG = Config.from_hf(
    tiny_config(
        num_hidden_layers=3,
        num_nextn_predict_layers=0,
        first_k_dense_replace=1,
        indexer_types=["full", "shared", "full"],
        index_topk=16,
        vocab_size=96,
    )
)
SPEC = StepSpec(CONFIG, rows=2, context=64, room=40)


@cache
def weights_made() -> Weights:
    return make_weights(SPEC.shapes())


@pytest.fixture(scope="module")
def prepared() -> step.Prepared:
    return step.prepare(SPEC, weights_made())


def test_sizes_are_the_published_ones() -> None:
    published = Config.from_hf(GLM52_FP8)
    same = {field.name for field in dataclasses.fields(Config)} - {"eos_token_ids", "num_nextn_predict_layers"}
    assert {name: getattr(glm52(), name) for name in same} == {name: getattr(published, name) for name in same}
    assert glm52(5).full_layers == (0, 1, 2) and glm52(5).sparse_layers == (3, 4)


def test_weights_are_what_they_say() -> None:
    made = weights_made()
    wanted = jax.tree.map(lambda a: (a.shape, a.dtype), SPEC.shapes())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == wanted
    assert all(bool(jnp.isfinite(leaf.astype(jnp.float32)).all()) for leaf in jax.tree.leaves(made))
    assert made.moe is not None
    experts = np.asarray(made.moe.gate_up.data.astype(jnp.float32)).reshape(2 * 16, -1)
    assert len({row.tobytes() for row in experts}) == len(experts), "two experts or layers are the same"
    for weight, gain in ((made.attention.q_a, 1.0), (made.attention.o_proj, 0.05), (made.moe.down, 0.05)):
        deviation = float(jnp.std(dequantize(weight)))
        assert 0.8 < deviation / (gain * weight.shape[-1] ** -0.5) < 1.25
    assert abs(float(jnp.mean(made.norm.astype(jnp.float32))) - 1) < 0.02 and not bool(made.moe.router_bias.any())
    assert float(jnp.std(made.embed.astype(jnp.float32))) == pytest.approx(1.0, abs=0.02)


def test_one_rank_has_its_slices_of_every_weight() -> None:
    whole, rank = (
        shapes.abstract_weights(glm52(4), mode=mode, devices=devices) for mode, devices in ((None, 1), ("tp", 8))
    )
    assert whole.moe is not None and rank.moe is not None
    assert whole.moe.gate_up.shape == (1, 256, 2, 2048, 6144) and rank.moe.gate_up.shape == (1, 256, 2, 256, 6144)
    assert rank.moe.gate_up.scale.shape == (1, 256, 2, 2, 48)
    assert rank.attention.q_b.shape == (4, 2048, 2048) and rank.attention.q_a.shape == whole.attention.q_a.shape
    assert rank.head.shape == (19360, 6144) and rank.head.dtype == jnp.bfloat16
    ep = shapes.abstract_weights(glm52(4), mode="ep", devices=8).moe
    assert ep is not None and ep.gate_up.shape == (1, 32, 2, 2048, 6144)
    with pytest.raises(ValueError, match="over 32 devices of 'tp' is 64 each"):
        shapes.abstract_weights(glm52(4), mode="tp", devices=32)


def test_rows_choose_experts_at_random() -> None:
    assert expected_experts(1, 8, 256) == 8 and expected_experts(8, 8, 256) == pytest.approx(57.4, abs=0.1)
    assert dataclasses.replace(SPEC, mode="ep", devices=4, rank=True, rows=1).experts_hit() == pytest.approx(1.0)
    # What the synthetic model really does, against what the bound assumes.
    spec, batch = dataclasses.replace(SPEC, rows=16), jnp.arange(16, dtype=jnp.int32)
    rows = make_rows(CONFIG, contiguous_table(16, 1), batch, jnp.ones_like(batch), 1)
    pages = make_cache(CONFIG, spec.plan, 16)
    run = jax.jit(lambda w, t, c: model.forward(w, t, c, rows, CONFIG, spec.plan, taps=True)[2])
    taps = run(weights_made(), 5 * batch[:, None], pages)
    hit = [len(np.unique(taps[f"experts.{layer}"])) for layer in CONFIG.sparse_layers]
    assert np.mean(hit) == pytest.approx(spec.experts_hit(), rel=0.1)


def test_the_bound_is_every_byte_once() -> None:
    """One rank of eight with 4 layers, batch 1, by hand: weights of the layout, and 8 of 256 experts."""
    spec = StepSpec(glm52(4), rows=1, context=4096, room=64, mode="tp", devices=8, rank=True)
    weights = spec.shapes()
    h200 = arch.by_name("H200-141")
    got = step.moved_bytes(spec, shapes.choices(weights, spec.config, spec.plan, 1, spec.pages, h200))
    assert weights.moe is not None and weights.dense is not None
    counted = jax.tree.leaves((weights.attention, weights.indexer, weights.dense, weights.moe, weights.head))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in counted)
    routed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((weights.moe.gate_up, weights.moe.down)))
    latents, keys = 4 * 2048 * 656, 3 * 4160 * 132
    hand = total - routed * (256 - 8) / 256 + latents + keys
    assert got == pytest.approx(hand, rel=0.01)
    # The figure for all 78 layers, 1.65 ms at 4.18 TB/s, less what four layers leave out.
    assert dataclasses.replace(spec, rows=8).experts_hit() == pytest.approx(57.4, abs=0.1)


def test_a_figure(prepared: step.Prepared) -> None:
    steps = prepared.steps
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(steps.state.arrays.cache)]
    steps.run(10)
    assert np.asarray(steps.state.arrays.positions).tolist() == [74, 74]
    taken = step.timing.Timing(1000.0, 0.1, 10, (1000.0,))
    kernels = [step_kernels.Kernel("attention", "fp8_linear", "fp8_linear_kernel", 2, 400.0)]
    profile = step_kernels.Profile(kernels, 900.0, 400.0)
    figure = step.result(prepared, taken, 1e12, profile, "1 command buffers", "now")
    assert np.asarray(steps.state.arrays.positions).tolist() == [64 + SPEC.room] * 2
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(steps.state.arrays.cache)] == before
    assert figure.bound_us == pytest.approx(figure.bytes / 1e6, abs=0.01)
    assert figure.percent_of_bound == pytest.approx(figure.bound_us / 10, abs=0.1)
    assert figure.tokens_s == 2000.0 and 0 < figure.p50_us <= figure.p99_us and figure.dispatch_us > 0
    assert figure.backends["sparse_mla"] == "reference" and "batch 2, context 64: 1.000 ms" in step.line(figure)
    assert figure.stages_us == {"attention": 400.0, "between kernels": 600.0} and figure.run == "now"
    assert figure.kernels[0]["launches"] == 2 and "audit 1 command buffers" in step.line(figure)
    with pytest.raises(ValueError, match="steps=41 do not fit behind 64 tokens"):
        steps.run(41)


# An optimized module of XLA's for GPUs: two fusions, one of them twice under one kernel, and three calls of ours.
def packed(text: bytes) -> str:
    """As XLA prints the packed text of a Triton call."""
    return "".join(
        f"\\{byte:02X}" if byte < 32 or byte > 126 or byte in b'"\\' else chr(byte) for byte in zlib.compress(text)
    )


PACKED = packed(b"\0\nrow_kernel\x1a")
HLO = """\
HloModule jit_traced, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} fusion(%p), kind=kLoop, calls=%g, metadata={op_name="jit(traced)/no kernel of its own"}
}

%dynamic-slice-fusion.7 (p: f32[9,2]) -> f32[2] {
  %slice.8 = f32[1,2]{1,0} slice(%p), slice={[3:4], [0:2]}
  ROOT %call.4 = f32[2]{0} custom-call(%slice.8), custom_call_target="triton_kernel_call_ffi", \
metadata={op_name="jit(traced)/layer1/attention/indexer/top_k.gluon/call"}, backend_config={opaque = "PACKED"}
}

ENTRY %main (a: bf16[9,8]) -> s32[1] {
  %a = bf16[9,8]{1,0} parameter(0)
  %loop.slice-fusion = bf16[1,8]{1,0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(traced)/gather"}
  %mpmd_map.1 = (bf16[1,8]{1,0}, bf16[4]{0}) custom-call(%b), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(traced)/layer0/attention/mla_out.triton/fp8_linear.mosaic_sm90/fp8_linear/mpmd_map"}, backend_config={}
  %call.2 = f32[2]{0} custom-call(%c), custom_call_target="triton_kernel_call_ffi", \
metadata={op_name="jit(traced)/layer0/attention/indexer/top_k.gluon/call"}, backend_config={opaque = "PACKED"}
  %tuple.3 = (f32[1]{0}, u8[4]{0}) custom-call(%d), custom_call_target="Other"
  %wrapped.4 = f32[2]{0} fusion(%c), kind=kCustom, calls=%dynamic-slice-fusion.7, metadata={op_name="jit(traced)/of a layer"}
  ROOT %gemm_fusion = s32[1]{0} fusion(%a), kind=kCustom, calls=%h, metadata={op_name="jit(traced)/head/fp8_linear.reference/dot"}
}
"""
HLO = HLO.replace("PACKED", PACKED)


def step_events(start: int) -> list[tuple[int, str, float]]:
    names = ("loop_slice_fusion", "fp8_linear_mosaic_gpu_kernel", "row_kernel", "row_kernel", "gemm_fusion")
    return [(start + i, name, 1.0 + i) for i, name in enumerate(names)] + [(start + 9, "void cublas::sum<float>", 0.5)]


def test_kernels_of_a_step_by_operation() -> None:
    found = step_kernels.kernels([*step_events(100_000), *step_events(0)], HLO, 2)
    told = {(k.stage, k.what, k.kernel): (k.launches, k.us) for k in found}
    assert told == {
        ("attention", "mla_out/fp8_linear bf16[1,8]", "fp8_linear_mosaic_gpu_kernel"): (1, 2.0),
        ("indexer", "top_k f32[2]", "row_kernel"): (2, 7.0),
        ("head", "fp8_linear s32[1]", "gemm_fusion"): (1, 5.0),
        ("rest", "bf16[1,8]", "loop_slice_fusion"): (1, 1.0),
        ("rest", "", "void cublas::sum<float>"): (1, 0.5),
    }
    stages = step_kernels.stages(step_kernels.Profile(found, 16.0, 15.5), 20.0)
    assert stages == {"attention": 2.0, "indexer": 7.0, "head": 5.0, "rest": 1.5, "between kernels": 4.5}
    assert sum(stages.values()) == 20.0
    assert "indexer         2 x    3.50 =       7.0 us  top_k f32[2]" in step_kernels.lines(found)[1]
    with pytest.raises(
        ValueError, match=r"2 steps has fp8_linear_mosaic_gpu_kernel 1 times, not 2, row_kernel 3 times"
    ):
        step_kernels.kernels([*step_events(0), *step_events(100)[2:3]], HLO, 2)
    with pytest.raises(ValueError, match="1 steps has other_kernel 1 times, not 0"):
        step_kernels.kernels([*step_events(0), (50, "other_kernel", 1.0)], HLO, 1)


def test_kernels_that_run_side_by_side_are_told_apart_by_name() -> None:
    """A graph's branches: the search of the indexer begins before the projection, or with it."""
    swapped = [(start, *step_events(0)[i][1:]) for start, i in ((0, 0), (1000, 2), (1500, 1), (5000, 3), (9000, 4))]
    found = step_kernels.kernels(swapped, HLO, 1)
    assert {k.kernel: k.us for k in found if k.stage != "rest"} == {
        "fp8_linear_mosaic_gpu_kernel": 2.0, "row_kernel": 7.0, "gemm_fusion": 5.0,
    }  # fmt: skip
    # 1 to 4 us and 1.5 to 3.5 us; then 5 to 9 and 9 to 14, and 0 to 1 before.
    assert step_kernels.busy_us(swapped, 1) == 1.0 + 3.0 + 4.0 + 5.0
    stages = step_kernels.stages(step_kernels.Profile(found, 14.0, 13.0), 20.0)
    assert stages["side by side"] == -2.0 and stages["between kernels"] == 7.0 and sum(stages.values()) == 20.0
    assert step_kernels.stages(step_kernels.Profile(), 20.0) == {}


def test_a_call_without_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a Triton call names no kernel: .*call\.2"):
        step_launches.launches(HLO.replace(PACKED, packed(b"nothing")))


def test_a_profile_holds_the_kernels_of_step_programs() -> None:
    text = """
    planes {
      name: "/device:GPU:0"
      lines {
        name: "Stream #1" timestamp_ns: 1000
        events { metadata_id: 1 offset_ps: 3000 duration_ps: 2000000 stats { metadata_id: 1 str_value: "jit_traced" } }
        events { metadata_id: 2 offset_ps: 1000 duration_ps: 1000000 stats { metadata_id: 1 str_value: "jit__rewound" } }
      }
      event_metadata { key: 1 value { id: 1 name: "row_kernel" } }
      event_metadata { key: 2 value { id: 2 name: "copy" } }
      stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
    }
    planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 5000 } } }
    """
    data = jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    )
    assert step_kernels.events_of(data, "jit_traced") == [(1003, "row_kernel", 2.0)]
    assert step_kernels.events_of(data, "jit_other") == []


def test_a_graph_takes_from_its_first_kernel_to_the_end_of_its_last() -> None:
    first = [(0, "a_kernel", 2.0), (3000, "b_kernel", 4.0), (5000, "c", 1.0)]
    later = [(20_000 + start, name, us) for start, name, us in first]
    assert step_kernels.graph_us([*later, *first], 2) == 7.0
    assert step_kernels.graph_us([*later, *first, (40_000, "a", 1.0), (40_100, "b", 1.0), (50_000, "c", 0.5)], 3) == 7.0


def test_the_scopes_of_the_step_name_its_stages(prepared: step.Prepared) -> None:
    """Every operation that the step calls lies in a stage, in the compiled text as on a GPU."""
    text = prepared.steps.program.executable.as_text()
    scopes = set(re.findall(r'op_name="([^"]*)"', text))
    found = {(launch.stage, launch.what) for scope in scopes if (launch := step_launches._launch(scope, "")).what}
    assert {stage for stage, _ in found} == {"attention", "indexer", "dense", "router", "experts", "head", "sampling"}
    operations = {choice.operation for choice in prepared.steps.program.choices}
    assert operations <= {name for _, what in found for name in what.split("/")}


def test_a_gpu_as_xla_wants_it_told() -> None:
    text = step_graph.described(arch.by_name("H200-141"))
    for field in (
        "core_count: 132 ",
        "l2_cache_size: 52428800 ",
        "shared_memory_per_block_optin: 232448 ",
        "major: 9 minor: 0 ",
    ):
        assert field in text
    assert text.count("{") == text.count("}") and "ACCELERATED_FEATURES" in text
    assert "ACCELERATED_FEATURES" not in step_graph.described(arch.by_name("A100-80"))


def test_a_graph_needs_a_compiler_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def missing(*args: object, **options: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    parser = argparse.ArgumentParser()
    step_command.add_graph_options(parser)
    with pytest.raises(ValueError, match="H200-141 needs JAX's CUDA plugin"):
        step_command.graph(parser.parse_args(["--layers", "4"]))


def test_a_graph_is_told_by_stage() -> None:
    ours, xla = step_kernels.launches(HLO)
    graph = audit.graph_of("000: kCommandBuffer [source | sink]\n    001: kCustomCall [source | sink] kCustomCall\n")
    lines = step_graph.StepGraph(graph, ours, xla, audit.not_graphable(HLO), 1.0, 2.0).lines()
    assert lines[0].startswith(
        "1 command buffers with 1 thunks {'kCustomCall': 1}, outside {}; splitting: nothing; lowered in 1 s"
    )
    assert "    indexer         2 x top_k f32[2]" in lines and len(lines) == 5


def figure_of(rows: int, context: int, us: float) -> step.Step:
    return step.Step(
        "78 layers, w8a16", rows, context, us, 0.01, us, us, 50.0, 1.0, 10, us / 2, 50.0, 8.0, 60.0, {}, {}, "run"
    )


def test_figures_are_kept_and_drawn(tmp_path: Path) -> None:
    first = [figure_of(rows, context, 1000.0 * rows) for rows in (1, 8) for context in (4096, 8192)]
    path = step_report.save(tmp_path, first, {"date": "today"})
    step_report.save(tmp_path, [dataclasses.replace(first[0], us=7.0, run="later")], {"date": "tomorrow"})
    runs, kept = step_report.read(path)
    assert len(kept) == 4 and kept[0].us == 7.0 and set(runs) == {"run", "later"}
    picture = step_report.picture_of(path)
    step_report.draw(kept, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert step_report.table(kept)[-1].startswith("| 78 layers, w8a16 | 8 | 8192 | 8.00 |")
    # Records of operations lie beside it, and are read without it.
    assert report.load(tmp_path) == {}
    path.write_text("{}")
    with pytest.raises(ValueError, match="no whole-step figures"):
        step_report.read(path)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step_command.add_options(parser)
    return parser.parse_args(arguments)


def test_options() -> None:
    spec, rows, contexts = step_command.specs(
        options("--parallel", "tp", "--devices", "8", "--rank", "--rows", "1,8", "--contexts", "4096,131072")
    )
    assert (rows, contexts) == ([1, 8], [4096, 131072]) and spec.name == "78 layers, one rank of tp8, w8a16"
    assert options().results == records.RESULTS
    for arguments in (("--rank",), ("--devices", "2"), ("--rows", "0")):
        with pytest.raises(ValueError, match="="):
            step_command.specs(options(*arguments))


def test_a_sweep_looks_at_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.timing.Repeat.warm_up, "__defaults__", (1e-3,))
    monkeypatch.setattr(step.timing.measure, "__defaults__", (1, 1e-3))
    (figure,) = step.sweep(SPEC, [2], [64], 1e12, rounds=1, audits=True, say=lambda text: None)
    assert figure.graph.startswith("ok over 40 steps; traces: 1;") and figure.stages_us == {}


def test_a_profile_of_something_else_leaves_the_time(prepared: step.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def other(steps: step.Steps) -> None:
        raise ValueError("0 launches in 4 steps")

    monkeypatch.setattr(step_kernels, "profiled", other)
    assert step.split(prepared.steps, said.append) == step_kernels.Profile() and said == [
        "no stages: 0 launches in 4 steps"
    ]


def test_only_plans_of_one_model_are_compared() -> None:
    with pytest.raises(ValueError, match="do not share their weights"):
        step.compare(SPEC, dataclasses.replace(SPEC, config=dataclasses.replace(CONFIG, vocab_size=64)), 1e12)
    assert step_model.expected_experts(1, 4, 16) == 4


class CpuSession:
    """What a run keeps of ``Session``, without a GPU to measure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self.environment, self.said = folder, "run", {"date": "today"}, []
        self.ceilings = records.Ceilings(4e12, 8e14)
        self.say = self.said.append

    def status(self) -> int:
        return 0


def test_the_command_times_records_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_command, "glm52", lambda layers: CONFIG)
    monkeypatch.setattr(step_command, "StepSpec", functools.partial(StepSpec, room=40))
    monkeypatch.setattr(step.timing.Repeat.warm_up, "__defaults__", (1e-3,))
    monkeypatch.setattr(step.timing.measure, "__defaults__", (1, 1e-3))
    session = CpuSession(tmp_path)
    assert step_command.run(options("--rows", "2", "--contexts", "64", "--rounds", "1"), session) == 0  # type: ignore[arg-type]
    _, (figure,) = step_report.read(tmp_path / "step" / "step.json")
    assert figure.key == ("3 layers, w8a16", 2, 64) and figure.us > 0 and figure.run == "run"
    assert figure.backends["experts"] == "reference" and (tmp_path / "step" / "step.png").exists()
    weights, compiled, timed = session.said
    assert (
        weights.endswith("weights made")
        and compiled.startswith("batch 2, context 64: compiled")
        and timed == step.line(figure)
    )


def test_steps_of_a_burst_are_timed_each() -> None:
    spec = dataclasses.replace(SPEC, burst=4, room=32)
    assert spec.name.endswith(", 4 steps a call")
    prepared = step.prepare(spec, make_weights(spec.shapes()))
    steps = prepared.steps
    assert steps.run(6) > 0 and np.asarray(steps.state.arrays.positions).tolist() == [72, 72]
    between, queueing = steps.paced(32)
    assert len(queueing) == 8 - step.LAG and len(between) == 8 - 2 * step.LAG - 1
    assert "ok over 8 steps" in step.audited(prepared)
