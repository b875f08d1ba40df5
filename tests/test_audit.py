"""The audit of a decode program: reading XLA's texts, and looking at a program on the CPU, where donation works as on a GPU."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax import audit
from tests.test_program import decoder, prefilled, prompts

# In the form in which XLA writes thunk sequences (SequentialThunk and CommandBufferThunk, ToString).
WHOLE = """\
000: kCommandBuffer\t
    000: kCustomCall\tcustom_call_target=triton_kernel_call
    000: kKernel    \t, kernel = loop_add_fusion, launch dimensions = blocks: {48, 1, 1}
    002: kGemm      \t
    003: kConditional\t
        000: kKernel\t, kernel = wrapped_copy

"""
SPLIT = """\
001: kCopy         \t
002: kCommandBuffer\t
    000: kKernel\t, kernel = a

003: kAllReduceStart\t
004: kAllReduceDone \t
005: kCommandBuffer\t
    000: kKernel\t, kernel = b
    000: kKernel\t, kernel = c

"""
# What XLA of JAX 0.11.2 writes: a graph with its edges.
GRAPH = """\
000: kCommandBuffer [source | sink] 
    001: kCustomKernel [source        | next=002 (1)] loop_dynamic_slice_fusion grid: [48, 1, 1] threads: [128, 1, 1]
    002: kCustomCall   [prev=001 (1)  | next=003 (1)] kCustomCall
    003: kDynamicSliceFusion [prev=002 (1) | sink] params=5, results=1
        004: kCustomCall [source | sink] kCustomCall
"""
# A burst: the graph in a loop, and what counts its rounds.
LOOP = """\
001: kCopy         [source       | next=003 (1)] kCopy
003: kWhile        [prev=001 (1) | sink        ]  \

condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]\

        005: kCustomKernel [source        | next=006 (1)] loop_dynamic_slice_fusion grid: [48, 1, 1]
        006: kCustomCall   [prev=005 (1)  | sink        ] kCustomCall
    090: kCopy [source | sink] kCopy
"""
# 2024's form has no numbers.
OLD = "kCommandBuffer\t\n    kKernel\tx\nkCopy         \t\n"
LOG = """\
I0000 command_buffer_thunk.cc:201] Initialize command buffer on device #0 by recoding command buffer cmd sequence
I0000 command_buffer_thunk.cc:229] Initialized command buffer on device #0 in 9000 us; num_commands=1500
I0000 command_buffer_thunk.cc:330] [0] Execute command buffer; num_executions=1
I0000 command_buffer_thunk.cc:290] [0] Create/Update command buffer by recoding command buffer cmd sequence; updated_allocs=1
I0000 command_buffer_thunk.cc:310] [0] Updated command buffer in 700 us; num_commands=1500
I0000 command_buffer_thunk.cc:330] [0] Execute command buffer; num_executions=1
I0000 command_buffer_thunk.cc:460] Evict command buffer thunk command buffers; tracked thunks = 2
I0000 command_buffer_thunk.cc:480] Evicted 2 command buffer thunk command buffers
"""


def test_a_whole_graph() -> None:
    graph = audit.graph_of(WHOLE)
    assert graph.whole and graph.buffers == 1 and not graph.outside
    assert graph.inside == {"kCustomCall": 1, "kKernel": 2, "kGemm": 1, "kConditional": 1}
    assert "1 command buffers with 5 thunks" in str(graph)


def test_a_graph_in_a_loop() -> None:
    graph = audit.graph_of(LOOP)
    assert graph.looped and not graph.whole and graph.inside == {"kCustomKernel": 1, "kCustomCall": 1}
    assert graph.outside == {"kCopy": 2, "kWhile": 1, "kCustomKernel": 1}
    assert not audit.graph_of(WHOLE).looped and not audit.graph_of(SPLIT).looped
    two = audit.graph_of(LOOP + GRAPH)
    assert two.buffers == 2 and not two.looped


def test_a_split_graph_names_what_splits_it() -> None:
    graph = audit.graph_of(SPLIT)
    assert not graph.whole and graph.buffers == 2
    assert graph.outside == {"kCopy": 1, "kAllReduceStart": 1, "kAllReduceDone": 1} and graph.inside == {"kKernel": 3}
    new = audit.graph_of(GRAPH)
    assert new.whole and new.inside == {"kCustomKernel": 1, "kCustomCall": 2}
    beside = audit.graph_of(GRAPH + "004: kWhile [prev=000 (1) | sink ] \n    005: kCopy [source | sink] \n")
    assert not beside.whole and beside.outside == {"kWhile": 1, "kCopy": 1}
    old = audit.graph_of(OLD)
    assert (old.buffers, dict(old.inside), dict(old.outside)) == (1, {"kKernel": 1}, {"kCopy": 1}) and not old.whole


def test_a_program_without_graph_and_a_text_without_thunks() -> None:
    assert not audit.graph_of("000: kKernel\t, kernel = a\n").whole
    with pytest.raises(ValueError, match="no thunk in this text"):
        audit.graph_of("HloModule jit_step\n")


def test_the_thunks_of_a_dump(tmp_path: Path) -> None:
    assert audit.dumped_thunks(tmp_path) is None
    (tmp_path / "module_0001.jit__traced.thunk_sequence.txt").write_text("000: kKernel\t\n")
    assert audit.dumped_thunks(tmp_path) == "000: kKernel\t\n"
    (tmp_path / "module_0001.jit__traced.thunk_sequence_after_thunk_passes.txt").write_text(WHOLE)
    assert audit.dumped_thunks(tmp_path) == WHOLE
    (tmp_path / "module_0002.jit_copy.thunk_sequence_after_thunk_passes.txt").write_text(SPLIT)
    with pytest.raises(ValueError, match="2 executables"):
        audit.dumped_thunks(tmp_path)


def test_records_of_a_log() -> None:
    assert audit.records(LOG) == audit.Records(recorded=1, updated=1, evicted=2, launched=2)
    assert audit.records("") == audit.Records(0, 0, 0, 0)


def test_operations_that_split_a_graph_are_found_in_compiled_text() -> None:
    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, order = jax.lax.top_k(x, 8)
        return jnp.sort(x) + 1.0, values + order.astype(jnp.float32)[:8]

    text = jax.jit(step).lower(jnp.arange(32.0)).compile().as_text()
    assert text is not None and set(audit.not_graphable(text)) == {"sort", "TopK"}
    plain = jax.jit(lambda x: x @ x + 1.0).lower(jnp.ones((4, 4))).compile().as_text()
    assert plain is not None and not audit.not_graphable(plain)
    gpu = """\
  %all-reduce-start.1 = bf16[1,6144]{1,0} all-reduce-start(%fusion.3), replica_groups={{0,1}}
  %custom-call.7 = (bf16[1,64]{1,0}, f32[2]{0}) custom-call(%p), custom_call_target="triton_kernel_call"
  ROOT %custom-call.8 = (f32[1,8]{1,0}, s32[1,8]{1,0}) custom-call(%x), custom_call_target="__cub$DeviceTopK"
"""
    assert audit.not_graphable(gpu) == {"all-reduce": 1, "__cub$DeviceTopK": 1}


def test_aliased_outputs() -> None:
    text = jax.jit(lambda w, s: (s[0] + w, s[1] * 2.0), donate_argnums=1).lower(
        jnp.ones(4), (jnp.ones(4), jnp.ones((2, 2)))
    )
    hlo = text.compile().as_text()
    assert hlo is not None and audit.aliased(hlo) == {0: 1, 1: 2}
    assert audit.aliased("HloModule jit_f, is_scheduled=true, entry_computation_layout={()->f32[]}\n") == {}
    assert audit.aliased("HloModule f, input_output_alias={ {}: (3, {}, may-alias) }, num_partitions=2\n") == {0: 3}


def test_a_program_over_64_steps() -> None:
    """One trace, no address moves, everything is donated, and calls from equal states agree in their bits."""
    made = decoder(2)
    start = prefilled(made, prompts(2))
    found, state = audit.audit(made, start, steps=64, replays=3)
    assert found.ok, str(found)
    assert found.traces == 1 and found.graph is None and not found.on_gpu
    assert "no dump" in str(found)
    positions = np.asarray(state.arrays.positions)
    assert positions.tolist() == [len(prompt) + 64 for prompt in prompts(2)]


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder(2)
    calls = iter(range(100))
    real = made.executable

    class Moving:
        """Gives latents a new buffer, and another token in the second call."""

        def __call__(self, *args: object) -> object:
            state = real(*args)
            other = 1 if next(calls) == 1 else 0
            cache = state.cache.replace(latent=jnp.array(state.cache.latent, copy=True))
            return state.replace(cache=cache, tokens=(state.tokens + other) % 96)

        def as_text(self) -> str:
            return "HloModule f, input_output_alias={ {0}: (39, {}, may-alias) }, num_partitions=1\n"

    monkeypatch.setattr(made, "executable", Moving())
    found, _ = audit.audit(made, prefilled(made, prompts(2)), steps=2, replays=2)
    assert not found.ok and "NOT OK" in str(found)
    assert "tokens" in found.differing and "cache.latent" in found.moved
    assert "tokens" not in found.not_donated and "cache.latent" in found.not_donated


def test_a_split_graph_is_not_ok() -> None:
    good = audit.Audit(64, True, 1, (), (), (), collections.Counter(), audit.graph_of(WHOLE))
    assert good.ok
    for changes in ({"graph": audit.graph_of(SPLIT)}, {"traces": 2}, {"splitting": collections.Counter(sort=1)}):
        assert not dataclasses.replace(good, **changes).ok
