"""Whether a decode program is what it should be: one graph that is replayed, with nothing recorded again.

``audit`` runs a program and looks; the functions above it read texts of XLA's and run anywhere:

  thunks of the executable  ``DecodeProgram(..., dump=folder)``, then ``graph_of(dumped_thunks(folder))``. On GPUs only.
  why a thunk stayed out    TF_CPP_VMODULE=command_buffer_conversion_pass=2 in the environment, before JAX starts
  records and updates       TF_CPP_VMODULE=command_buffer_thunk=3, then ``records(stderr)``
  the optimized HLO         ``program.executable.as_text()``, for ``aliased`` and ``not_graphable``
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm52_jax.decode import DecodeState
from glm52_jax.program import DecodeProgram, State

COMMAND_BUFFER = "kCommandBuffer"
# Not a launch: the thunk inside it, which has a line of its own, gets pointers into stacks.
_POINTERS = "kDynamicSliceFusion"
# A line of a thunk sequence: blanks for each level, a number since 2025, the kind, then details: after a tab until 2025, since
# then after the thunks that it waits for and lets go, in brackets.
_THUNK = re.compile(r"^(?P<indent> *)(?:\d+: )?(?P<kind>k[A-Z]\w*)\s*(?:\t|$|\[)")
# What JAX 0.11.2's XLA cannot put into a graph, each of which would split it. Measured.
_SPLITTING = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("sort", "while", "infeed", "outfeed", "send", "recv", "rng", "rng-bit-generator", "rng-get-and-update-state"),
)
_OPCODE = re.compile(r"= (?:\([^=]*?\)|\S+) ([a-z][a-z0-9-]*)\(")
# Libraries' custom calls that are no kernel of ours and become no graph node.
_SPLITTING_CALLS = re.compile(r'custom_call_target="(TopK|[^"]*[Cc]allback[^"]*|__cub\$[^"]*)"')


@dataclasses.dataclass(frozen=True)
class Graph:
    """Thunks of an executable by kind: ``buffers`` command buffers, what they hold, and what stands beside them."""

    buffers: int
    inside: Counter[str]
    outside: Counter[str]

    @property
    def whole(self) -> bool:
        """Whether exactly one command buffer holds everything."""
        return self.buffers == 1 and not self.outside

    @property
    def looped(self) -> bool:
        """Whether exactly one command buffer is in the only loop; what counts its rounds stands beside it."""
        return self.buffers == 1 and self.outside["kWhile"] == 1

    def __str__(self) -> str:
        return (
            f"{self.buffers} command buffers with {self.inside.total()} thunks {dict(self.inside)}, "
            f"outside {dict(self.outside)}"
        )


def graph_of(text: str) -> Graph:
    """Reads a thunk sequence as XLA dumps it; ValueError for a text without thunks."""
    buffers, inside, outside, level = 0, Counter[str](), Counter[str](), None
    for line in text.splitlines():
        found = _THUNK.match(line)
        if found is None:
            continue
        indent, kind = len(found["indent"]), found["kind"]
        if level is not None and indent > level:
            inside.update([kind] if kind != _POINTERS else [])
            continue
        level = None
        if kind == COMMAND_BUFFER:
            buffers, level = buffers + 1, indent
        else:
            outside[kind] += 1
    if not buffers and not outside:
        raise ValueError(
            "no thunk in this text: give a *thunk_sequence*.txt of --xla_dump_to with --xla_dump_hlo_as_text"
        )
    return Graph(buffers, inside, outside)


def dumped_thunks(folder: Path) -> str | None:
    """The thunk sequence in a dump of one executable, as it runs; None where there is none (on CPUs, or from the compile cache)."""
    final = sorted(folder.glob("*thunk_sequence_after_thunk_passes*.txt"))
    # XLA writes that file only if its passes changed something: else no command buffer was made at all.
    files = final or sorted(folder.glob("*thunk_sequence*.txt"))
    if len(files) > 1:
        raise ValueError(f"{folder} holds thunk sequences of {len(files)} executables: give each a folder of its own")
    return files[0].read_text() if files else None


@dataclasses.dataclass(frozen=True)
class Records:
    """Lines of XLA's log: graphs recorded first, recorded again because an address changed, thrown away, and launched."""

    recorded: int
    updated: int
    evicted: int
    launched: int


def records(log: str) -> Records:
    """Counts what ``command_buffer_thunk`` logs at level 3 of its VLOG."""
    evicted = sum(int(n) for n in re.findall(r"\bEvicted (\d+) command buffer", log))
    count = {
        word: len(re.findall(rf"\b{word} command buffer\b", log)) for word in ("Execute", "Initialized", "Recorded")
    }
    updated = len(re.findall(r"\bUpdated command buffer\b", log))
    return Records(count["Initialized"] + count["Recorded"], updated, evicted, count["Execute"])


def aliased(hlo: str) -> dict[int, int]:
    """Outputs of an optimized module that take over a parameter's buffer, with that parameter."""
    head = hlo.partition("\n")[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, [a-z_]+=", head)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), ", found[1]) if found else []
    return {int(out or 0): int(parameter) for out, parameter in pairs}


def not_graphable(hlo: str) -> Counter[str]:
    """Operations of an optimized module that would split a CUDA graph, by name."""
    found = Counter[str]()
    for line in hlo.splitlines():
        opcode = _OPCODE.search(line)
        if opcode is None:
            continue
        name = re.sub(r"-(start|done)$", "", opcode[1])
        if name in _SPLITTING:
            found[name] += 1
        elif name == "custom-call" and (target := _SPLITTING_CALLS.search(line)):
            found[target[1]] += 1
    return found


def addresses(arrays: Any) -> tuple[int, ...]:
    """Device addresses of every buffer of a pytree of arrays, shard by shard."""
    leaves = [_raw(leaf) for leaf in jax.tree.leaves(arrays)]
    return tuple(shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards)


def _raw(array: jax.Array) -> jax.Array:
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


@dataclasses.dataclass(frozen=True)
class Audit:
    """What ``audit`` found.

    moved, not_donated, differing: leaves of the state whose address changed, whose buffer the step does not take over, and whose
    bits differed between calls. splitting: operations of the program that would split a CUDA graph, which matters on GPUs only.
    graph: None where no dump was asked for or written. burst: steps of a call; several are a loop around the graph.
    """

    steps: int
    on_gpu: bool
    traces: int
    moved: tuple[str, ...]
    not_donated: tuple[str, ...]
    differing: tuple[str, ...]
    splitting: Counter[str]
    graph: Graph | None
    burst: int = 1

    @property
    def ok(self) -> bool:
        whole = self.graph is None or (self.graph.whole if self.burst == 1 else self.graph.looped)
        split = self.on_gpu and bool(self.splitting)
        return whole and not split and self.traces == 1 and not (self.moved or self.not_donated or self.differing)

    def __str__(self) -> str:
        facts = {
            "traces": self.traces,
            "state that moved": ", ".join(self.moved) or "none",
            "state not donated": ", ".join(self.not_donated) or "none",
            "differing from the first call": ", ".join(self.differing) or "none",
            "operations that split a graph": dict(self.splitting) or "none",
            "graph": self.graph or "not looked at: no dump",
        }
        told = "; ".join(f"{name}: {fact}" for name, fact in facts.items())
        return f"{'ok' if self.ok else 'NOT OK'} over {self.steps} steps; {told}"


def audit(program: DecodeProgram, state: State, steps: int = 64, replays: int = 4) -> tuple[Audit, State]:
    """Runs a program and looks at it.

    steps: the state's sequences need that much room. replays: calls from copies of one state, compared in their bits with the
    first, which runs op by op; the second records and later ones replay. Memory for two more states is needed.
    Returns what was found and the state after ``steps`` steps.
    """
    differing, state = _differing(program, state, replays)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(program.avals)
    ]
    before, moved = [addresses(leaf) for leaf in jax.tree.leaves(state.arrays)], set[str]()
    for _ in range(steps):
        state = program.step(state)
        now = [addresses(leaf) for leaf in jax.tree.leaves(state.arrays)]
        moved |= {name for name, old, new in zip(names, before, now, strict=True) if old != new}
    hlo = program.executable.as_text() or ""
    given = aliased(hlo)
    text = dumped_thunks(program.dump) if program.dump else None
    found = Audit(
        steps=steps,
        on_gpu=next(iter(state.arrays.tokens.devices())).platform == "gpu",
        traces=program.traces,
        moved=tuple(name for name in names if name in moved),
        not_donated=tuple(name for i, name in enumerate(names) if i not in given),
        differing=differing,
        splitting=not_graphable(hlo) - Counter({"while": int(program.burst > 1)}),
        graph=graph_of(text) if text else None,
        burst=program.burst,
    )
    return found, state


def _differing(program: DecodeProgram, state: State, replays: int) -> tuple[tuple[str, ...], State]:
    """Leaves whose bits differ between calls from equal states, and a state as it was given."""
    first: DecodeState | None = None
    found: dict[str, None] = {}
    for _ in range(replays):
        after = program.step(program.adopt(jax.tree.map(jnp.copy, state.arrays))).arrays
        if first is None:
            first = after
            continue
        for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(after), strict=True):
            if not bool(_same_bits(_raw(a), _raw(b))):
                found[jax.tree_util.keystr(path, simple=True, separator=".")] = None
    return tuple(found), state


@jax.jit
def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    return jnp.array_equal(jax.lax.bitcast_convert_type(a, bits), jax.lax.bitcast_convert_type(b, bits))
