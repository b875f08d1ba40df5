"""A long run of one decode program: ``python -m bench soak [--steps 20000]``.

Sequences of changing lengths end, and new ones begin in their rows, for thousands of steps; once in a while a sequence's cache is
filled with NaN. What must hold, and what ``soak_command`` keeps in ``bench/results/<gpu>/checks/soak.json``:

  faults      no logits that are not finite, but in the poisoned sequences, each in the first step after it was poisoned
  memory      device memory at the end as after the first tenth
  programs    nothing traced or compiled after the start; no address of the state moves
  graph       (GPUs) no step records, updates or loses a graph: the steps' part of XLA's log, written in a process of its own

Sequences are greedy and come from a few prompts, so that most texts return: how many were the same again is kept too. It is no
condition: which rows stand beside a sequence may change the order of the experts' sums.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.step_model import StepSpec, make_weights
from glm52_jax import audit
from glm52_jax.compile_cache import Compiling
from glm52_jax.config import Config
from glm52_jax.decode import NOTHING
from glm52_jax.program import DecodeProgram, State, fault
from glm52_jax.sampling import Sampling
from glm52_jax.slots import Slots
from pallas_kernels.paged import PAGE

GREEDY = Sampling(temperature=0.0)
# Steps that the host is behind when it reads what they drew.
LAG = 2
# Lines of our own in XLA's log: what follows belongs to steps, or to something else; what came before the start does not count.
STEPS, OTHER, START = "soak: steps", "soak: other", "soak: start"


@dataclasses.dataclass(frozen=True)
class SoakSpec:
    """rows: of the program. pages: of each sequence. prompts: different ones. poison: steps between poisoned sequences, 0: none."""

    config: Config
    steps: int = 20_000
    rows: int = 8
    pages: int = 8
    prompts: int = 6
    poison: int = 1000
    seed: int = 0
    dtype: str = "bfloat16"


@dataclasses.dataclass
class Soak:
    """What was seen.

    sequences, poisoned: begun. texts_again: sequences whose prompt had come before, texts_same: those that got the same tokens.
    faults: such as "step 812, row 3: NaN", of sequences that were not poisoned. unreported: poisoned ones that drew tokens.
    memory: bytes on the device, each tenth of the run; moved: how often an address of the state was another; programs: compiled.
    """

    steps: int = 0
    seconds: float = 0.0
    sequences: int = 0
    tokens: int = 0
    poisoned: int = 0
    texts_again: int = 0
    texts_same: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    unreported: list[str] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)
    moved: int = 0
    programs: int = 0
    traces: int = 0

    @property
    def grown(self) -> int:
        """Bytes by which device memory grew."""
        return max(0, self.memory[-1] - self.memory[0]) if self.memory else 0

    @property
    def wrong(self) -> list[str]:
        """What must not be, in words."""
        found = [f"not finite: {text}" for text in self.faults[:5]]
        found += [f"not reported: {text}" for text in self.unreported[:5]]
        counts = {"bytes of device memory more at the end": self.grown, "times an address moved": self.moved}
        counts |= {"programs compiled during the run": self.programs, "traces of the step too many": self.traces - 1}
        return found + [f"{count} {what}" for what, count in counts.items() if count]


@dataclasses.dataclass
class _Row:
    """A sequence: its prompt's number, its tokens so far, steps left, and the step at which it was poisoned."""

    prompt: int
    text: list[int]
    left: int
    poisoned: int | None = None


class Soaking:
    """A program, its slots and the sequences in them."""

    def __init__(
        self,
        spec: SoakSpec,
        mark: Callable[[str], None] = lambda text: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """mark: writes a line into XLA's log. say: shows progress."""
        step = StepSpec(spec.config, rows=spec.rows, dtype=spec.dtype)
        weights = make_weights(step.shapes())
        self.spec, self.mark, self.say, self.random = spec, mark, say, np.random.default_rng(spec.seed)
        self.program = DecodeProgram(weights, spec.config, step.plan, spec.rows, spec.pages)
        self.slots = Slots(self.program, chunks=(32, 128))
        room = spec.pages * PAGE
        lengths = self.random.integers(1, room // 2, spec.prompts)
        self.prompts = [self.random.integers(0, spec.config.vocab_size, n).astype(np.int32) for n in lengths]
        self.state = self.program.fresh(GREEDY, positions=-1)
        self.rows: list[_Row | None] = [None] * spec.rows
        self.texts: dict[int, list[int]] = {}
        self.seen = Soak()
        # Read late: (step, rows as they were, what it drew).
        self.waiting: deque[tuple[int, list[_Row | None], jax.Array]] = deque()

    def run(self) -> Soak:
        """All steps."""
        # Records every graph (a second call does) and compiles what is small: prompts of all chunks, steps, NaN.
        longest = max(range(len(self.prompts)), key=lambda number: len(self.prompts[number]))
        for _ in range(3):
            self._begin(0, longest)
        self._turn(20)
        self._poisoned(0)
        self._drain()
        self.state = self.slots.stop(self.state, range(self.spec.rows))
        self.rows = [None] * self.spec.rows
        self.seen = Soak()
        self._marked(START)
        self.say("compiled and warm")
        before, until = self._addresses(), [self.spec.steps * (i + 1) // 10 for i in range(10)]
        with Compiling() as compiling:
            start = time.perf_counter()
            for end in until:
                while self.seen.steps < end:
                    self._turn(end - self.seen.steps)
                self._drain()
                self.seen.memory.append(memory(self.state))
                self.seen.moved += self._addresses() != before
                self.say(f"{end} of {self.spec.steps} steps after {time.perf_counter() - start:.1f} s")
            self.seen.seconds = round(time.perf_counter() - start, 2)
        self.seen.programs, self.seen.traces = compiling.programs, self.program.traces
        return self.seen

    def _turn(self, most: int) -> None:
        """Fills free rows, then steps until the next sequence ends, at most ``most`` of them."""
        for row, sequence in enumerate(self.rows):
            if sequence is None:
                self._begin(row)
        every, done = self.spec.poison, self.seen.steps
        if every:
            most = min(most, every - done % every)
            if done and not done % every:
                self._poisoned(int(self.random.integers(self.spec.rows)))
        count = min(most, *(sequence.left for sequence in self.rows if sequence))
        self._marked(STEPS)
        for _ in range(count):
            self.state = self.program.step(self.state)
            self.seen.steps += 1
            self.waiting.append((self.seen.steps, list(self.rows), self.program.copied(self.state)))
            if len(self.waiting) > LAG:
                self._read()
        self._marked(OTHER)
        for sequence in self.rows:
            if sequence:
                sequence.left -= count
        self._drain()
        ended = [row for row, sequence in enumerate(self.rows) if sequence and not sequence.left]
        for row in ended:
            self._compare(self.rows[row])
            self.rows[row] = None
        if ended:
            self.state = self.slots.stop(self.state, ended)

    def _begin(self, row: int, number: int | None = None) -> None:
        number = int(self.random.integers(len(self.prompts))) if number is None else number
        ids = self.prompts[number]
        self.state = self.slots.start(self.state, row, ids, GREEDY)
        first = int(np.asarray(self.program.copied(self.state))[row])
        left = int(self.random.integers(1, self.spec.pages * PAGE - len(ids)))
        self.rows[row] = _Row(number, [first], left)
        self.seen.sequences += 1
        if first < 0:
            self.seen.faults.append(f"first token of prompt {number}, row {row}: {fault(first)}")

    def _poisoned(self, row: int) -> None:
        """Fills a sequence's latents with NaN."""
        sequence = self.rows[row]
        if sequence is None:
            return
        arrays = self.program.release(self.state)
        latent = filled_with_nan(arrays.cache.latent, arrays.table, np.int32(row))
        self.state = self.program.adopt(arrays.replace(cache=arrays.cache.replace(latent=latent)))  # type: ignore[attr-defined]
        sequence.poisoned = self.seen.steps
        sequence.left = min(sequence.left, 3)
        self.seen.poisoned += 1

    def _read(self) -> None:
        step, rows, drawn = self.waiting.popleft()
        for row, (sequence, value) in enumerate(zip(rows, np.asarray(drawn).tolist(), strict=True)):
            if sequence is None:
                continue
            if sequence.poisoned is not None:
                # The first step after it reports; from there on the row holds no sequence.
                expected = bool(fault(value)) if step == sequence.poisoned + 1 else value == NOTHING
                if not expected:
                    self.seen.unreported.append(
                        f"step {step}, row {row}, poisoned before {sequence.poisoned + 1}: {value}"
                    )
            elif value < 0:
                self.seen.faults.append(f"step {step}, row {row}: {fault(value) or 'nothing drawn'}")
            else:
                sequence.text.append(value)
                self.seen.tokens += 1

    def _drain(self) -> None:
        while self.waiting:
            self._read()
        jax.block_until_ready(self.state.arrays.tokens)

    def _compare(self, sequence: _Row | None) -> None:
        """With the longest text of this prompt so far."""
        assert sequence is not None
        known = self.texts.setdefault(sequence.prompt, sequence.text)
        if known is not sequence.text:
            both = min(len(known), len(sequence.text))
            self.seen.texts_again += 1
            self.seen.texts_same += known[:both] == sequence.text[:both]
        if len(sequence.text) > len(known):
            self.texts[sequence.prompt] = sequence.text

    def _marked(self, text: str) -> None:
        jax.block_until_ready(self.state.arrays.tokens)
        self.mark(text)

    def _addresses(self) -> tuple[int, ...]:
        return audit.addresses(self.state.arrays)


@functools.partial(jax.jit, donate_argnums=0)
def filled_with_nan(latent: jax.Array, table: jax.Array, row: jax.Array) -> jax.Array:
    """The latents of every page of a row's sequence as NaN; as bytes 0x7f, which is e4m3's."""
    value = jnp.uint8(0x7F) if latent.dtype == jnp.uint8 else jnp.array(jnp.nan, latent.dtype)
    return latent.at[:, table[row]].set(value)


def memory(state: State) -> int:
    """Bytes in use on the state's first device; where it does not count them, those of all arrays that live."""
    stats = next(iter(state.arrays.tokens.devices())).memory_stats()
    return stats["bytes_in_use"] if stats else sum(array.nbytes for array in jax.live_arrays())
