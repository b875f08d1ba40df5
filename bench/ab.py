"""Two revisions or two plans of the whole step, interleaved: ``python -m bench ab A B``.

Each side is a process of its own with its own weights, and stays warm while the other one runs: rounds alternate, and every second
pair begins with the other side, so that clocks and temperature favour neither. A side is

    REVISION                 a commit, branch or tag of this repository, unpacked beside it
    FOLDER                   a checkout; "." is the working tree
    ...@SETTING[,SETTING]    with another plan: linear=w8a8, or OPERATION=BACKEND, such as experts=reference

The ratio is B over A of each pair of rounds; its spread is what says whether a difference is one. Kept in
``bench/results/<gpu>/step/ab.json``, of each pair of sides and each step the last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from bench import ab_worker, records
from bench.records import FigureFile
from glm52_jax.parallel import RULES
from pallas_kernels.lowering import default_arch

_PARTS = ("glm52_jax", "pallas_kernels", "bench")
# Of the GPU's memory, for each of two processes.
_FRACTION = "0.46"


@dataclasses.dataclass(frozen=True)
class Side:
    """text: as it was given. place: revision or folder. linear: arithmetic, if set. backends: operation -> forced backend."""

    text: str
    place: str
    linear: str | None
    backends: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """ValueError for a setting that is none."""
        place, _, rest = text.partition("@")
        settings = dict[str, str]()
        for setting in filter(None, rest.split(",")):
            name, equals, value = setting.partition("=")
            if not (name and equals and value):
                raise ValueError(f"{setting!r} of {text!r} must be linear=ARITHMETIC or OPERATION=BACKEND")
            settings[name] = value
        return cls(text, place or ".", settings.pop("linear", None), settings)


@contextlib.contextmanager
def unpacked(place: str, root: Path = records.ROOT) -> Iterator[Path]:
    """The folder of a side; a revision's is removed again, and the repository is only read. ValueError where there is none."""
    folder = Path(place)
    if all((folder / part).is_dir() for part in _PARTS):
        yield folder.resolve()
        return
    command = ["git", "-C", str(root), "archive", "--format=tar", place, "--", *_PARTS]
    with tempfile.TemporaryDirectory(prefix="glm52-ab-") as target, tempfile.TemporaryFile() as archive:
        ended = subprocess.run(command, stdout=archive, stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            raise ValueError(f"{place!r} is neither a checkout nor a revision that has a bench: {ended.stderr.strip()}")
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(target, filter="data")
        yield Path(target)


class Worker:
    """The process of a side."""

    def __init__(self, side: Side, folder: Path, request: dict[str, Any]) -> None:
        self.side = side
        spec = request["spec"] | ({"linear": side.linear} if side.linear else {})
        asked = request | {"folder": str(folder), "backends": side.backends, "spec": spec}
        # Not this checkout, where it is on the path: the side's own first, and not the worker's folder either (-P).
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        kept = [path for path in others if Path(path).resolve() != records.ROOT]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *kept])}
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _FRACTION)
        line = [sys.executable, "-P", str(Path(ab_worker.__file__).resolve()), json.dumps(asked)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(line, cwd=folder, env=env, **pipes)

    def ask(self, line: str = "") -> dict[str, Any]:
        """Its answer to a line, or its first words; ValueError where it ended."""
        told, heard = self._pipes()
        try:
            if line:
                told.write(line + "\n")
                told.flush()
            for found in heard:
                if found.startswith(ab_worker.ANSWER):
                    return json.loads(found.removeprefix(ab_worker.ANSWER))
        except BrokenPipeError:
            pass
        raise ValueError(f"side {self.side.text!r} ended with status {self.process.wait()}: what it said is above")

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        told, heard = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            told.close()
        heard.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Microseconds of a step in each round of both sides; the rounds of a pair ran one after the other."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """B over A, pair by pair."""
        return [b / a for a, b in zip(self.a, self.b, strict=True)]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: half of them lie between the first and the last."""
        ratios = sorted(self.ratios)
        return ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]

    def __str__(self) -> str:
        ratios, (low, middle, high) = sorted(self.ratios), self.quartiles
        sure = "B is slower" if low > 1 else "B is faster" if high < 1 else "no difference beyond the spread"
        return (
            f"A {statistics.median(self.a) / 1e3:.4f} ms, B {statistics.median(self.b) / 1e3:.4f} ms a step; B / A {middle:.4f}, "
            f"half of {len(ratios)} pairs in {low:.4f} .. {high:.4f}, all in {ratios[0]:.4f} .. {ratios[-1]:.4f}: {sure}"
        )


@dataclasses.dataclass(frozen=True)
class Figure:
    """Sides as they were given; step: what both ran; a_us, b_us: medians of a step; ratio: B over A, its median, low and high half
    of ``pairs``."""

    a: str
    b: str
    step: str
    pairs: int
    a_us: float
    b_us: float
    ratio: float
    low: float
    high: float
    run: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.a, self.b, self.step)

    @classmethod
    def of(cls, a: str, b: str, step: str, outcome: Outcome, run: str) -> Self:
        low, middle, high = (round(ratio, 4) for ratio in outcome.quartiles)
        a_us, b_us = (round(statistics.median(us), 2) for us in (outcome.a, outcome.b))
        return cls(a, b, step, len(outcome.a), a_us, b_us, middle, low, high, run)


FILE = FigureFile("comparisons", Figure, "comparisons of steps")
NAME = "ab.json"


def compare(a: Worker, b: Worker, rounds: int) -> Outcome:
    """Alternating rounds of as many steps on both sides."""
    steps = min(worker.ask("warm")["steps"] for worker in (a, b))
    taken: dict[Worker, list[float]] = {a: [], b: []}
    for number in range(rounds):
        for worker in (a, b) if number % 2 == 0 else (b, a):
            taken[worker].append(worker.ask(f"round {steps}")["us"])
    return Outcome(tuple(taken[a]), tuple(taken[b]))


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    command.add_argument("a", metavar="A", help="REVISION or FOLDER[@linear=...|OPERATION=BACKEND,...]")
    command.add_argument("b", metavar="B", help="as A")
    command.add_argument("--layers", type=int, default=6, help="of GLM-5.2's, from the first (default %(default)s)")
    command.add_argument("--tiny", help="JSON of sizes of a tiny model instead, such as {}")
    command.add_argument("--rows", type=int, default=1, help="default %(default)s")
    command.add_argument("--context", type=int, default=4096, help="cached tokens (default %(default)s)")
    command.add_argument("--parallel", choices=tuple(RULES), help="time one rank of --devices, alone on one GPU")
    command.add_argument("--devices", type=int, default=1, help="default %(default)s")
    command.add_argument("--rounds", type=int, default=20, help="pairs of rounds (default %(default)s)")
    command.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")


def request(options: argparse.Namespace) -> dict[str, Any]:
    """What both sides are asked for; ValueError for sizes that are no JSON object."""
    spec = {"rows": options.rows, "context": options.context}
    if options.parallel:
        spec |= {"mode": options.parallel, "devices": options.devices, "rank": True}
    try:
        sizes = None if options.tiny is None else dict(json.loads(options.tiny))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--tiny {options.tiny!r} must be a JSON object of sizes: {error}") from error
    return {"layers": options.layers, "tiny": sizes, "spec": spec}


def main(options: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """Times two revisions or plans of the whole step interleaved, each in a process of its own; prints and keeps their ratio."""
    sides: Sequence[Side] = [Side.parse(text) for text in (options.a, options.b)]
    asked = request(options)
    with contextlib.ExitStack() as stack:
        workers = []
        for name, side in zip("AB", sides, strict=True):
            folder = stack.enter_context(unpacked(side.place))
            worker = stack.enter_context(Worker(side, folder, asked))
            facts = worker.ask()
            say(f"{name}: {side.text}, compiled in {facts['compile_s']} s, {facts['backends']}")
            workers.append(worker)
        outcome = compare(workers[0], workers[1], options.rounds)
    say(str(outcome))
    # Only now that the sides have let go of the GPU: asking for its name makes this process one that uses it.
    environment = records.provenance()
    run = f"{environment['date']} {environment['sources']}"
    step = ", ".join(f"{name}={value}" for name, value in {"layers": asked["layers"], **asked["spec"]}.items())
    step += f", tiny={asked['tiny']}" if asked["tiny"] is not None else ""
    figure = Figure.of(options.a, options.b, step, outcome, run)
    FILE.merge(options.results / records.gpu_folder(default_arch()) / "step" / NAME, [figure], environment)
    return 0
