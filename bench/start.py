"""Starting a model: ``python -m bench start``, twice, with nothing compiled and then again.

Two processes, one after the other, with a compilation cache that is empty before the first. Each makes synthetic weights where a
user's would read a checkpoint, asks ``Model.generate`` for the first token of a prompt, and compiles the step of every bucket. Kept
in ``bench/results/<gpu>/step/start.json``, with what the persistent cache held.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import records
from bench.records import FigureFile
from glm52_jax import compile_cache

# What a process prints before its JSON.
ANSWER = "START "
_WHICH = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One start, in seconds.

    import_s: until JAX has its devices; weights_s: made; first_token_s: from there to the first token, of which compile_s is
    tracing and compiling; buckets_s: the steps of all buckets, after it. programs: executables of it all; from_cache: those of
    them that the cache held.
    """

    case: str
    start: str
    tokens: int
    import_s: float
    weights_s: float
    first_token_s: float
    compile_s: float
    buckets_s: float
    buckets: str
    programs: int
    from_cache: int
    cores: int
    run: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return (self.case, self.start)


FILE = FigureFile("starts", Figure, "figures of starts")
NAME = "start.json"


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    command.add_argument("--layers", type=int, default=78, help="of GLM-5.2's, from the first (default %(default)s)")
    command.add_argument("--tiny", help="JSON of sizes of a tiny model instead, such as {}")
    command.add_argument("--devices", type=int, default=8, help="one rank of so many, TP (default %(default)s)")
    command.add_argument("--tokens", type=int, default=512, help="of the prompt (default %(default)s)")
    command.add_argument("--context", type=int, default=4096, help="that steps have room for (default %(default)s)")
    command.add_argument("--buckets", default="1,2,4,8,16,32,64", help="default %(default)s")
    command.add_argument("--again", help="buckets of the second start, the same unless given")
    command.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")


def main(options: argparse.Namespace) -> int:
    """Times both starts, prints and records them; the exit status of what failed."""
    names = ("layers", "tiny", "devices", "tokens", "context", "buckets")
    line = [sys.executable, "-m", "bench.start"]
    for name in names:
        value = getattr(options, name)
        line += [] if value is None else [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as cache:
        for start in _WHICH:
            began = {"GLM52_START_BEGAN": repr(time.time()), compile_cache.VARIABLE: cache}
            again = ["--buckets", options.again] if options.again and start != _WHICH[0] else []
            process = subprocess.run(
                line + again, cwd=records.ROOT, env=os.environ | began, stdout=subprocess.PIPE, text=True, check=False
            )
            if process.returncode:
                print(process.stdout)
                return process.returncode
            answer = next(text for text in process.stdout.splitlines() if text.startswith(ANSWER))
            facts = json.loads(answer.removeprefix(ANSWER))
            environment, folder = facts.pop("environment"), facts.pop("folder")
            figure = Figure(**facts, start=start, run=f"{environment['date']} {environment['sources']}")
            FILE.merge(options.results / folder / "step" / NAME, [figure], environment)
            print(
                f"{figure.case}, {start} start: {figure.first_token_s:.1f} s to the first token of {figure.tokens} on top of "
                f"the weights, {figure.compile_s:.1f} of them compiling; steps of {figure.buckets} rows in "
                f"{figure.buckets_s:.1f} s; "
                f"{figure.from_cache} of {figure.programs} programs from the cache; {figure.cores} cores",
                flush=True,
            )
    return 0


def worker(arguments: list[str] | None = None) -> int:
    """One start, in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.start")
    add_options(parser)
    options = parser.parse_args(arguments)
    began = float(os.environ["GLM52_START_BEGAN"])
    print(ANSWER + json.dumps(started(options, began)), flush=True)
    return 0


def started(options: argparse.Namespace, began: float) -> dict[str, Any]:
    """The facts of one start; began: ``time.time()`` before its process was."""
    from bench import step_command

    step_command.reserve_memory()
    import jax
    import numpy as np

    from bench.step_model import StepSpec, glm52, make_weights
    from glm52_jax import Sampling
    from glm52_jax.buckets import programs
    from glm52_jax.config import Config
    from glm52_jax.generate import Model
    from glm52_jax.tiny import tiny_config
    from pallas_kernels.lowering import default_arch

    compile_cache.enable()
    cores, _ = len(os.sched_getaffinity(0)), jax.devices()
    imported = time.time()
    config = glm52(options.layers) if options.tiny is None else Config.from_hf(tiny_config(**json.loads(options.tiny)))
    rank = {"mode": "tp", "devices": options.devices, "rank": True} if options.devices > 1 else {}
    dtype = "float32" if default_arch() is None else "bfloat16"
    spec = StepSpec(config, context=options.context, dtype=dtype, **rank)
    weights = jax.block_until_ready(make_weights(spec.shapes()))
    made = time.time()
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, options.tokens)
    with compile_cache.Compiling() as all_of_it:
        with compile_cache.Compiling() as compiling:
            tokens = Model(weights, config, spec.plan).generate(prompt.tolist(), 8, Sampling(temperature=0.0), ())
            next(iter(tokens))
            first = time.time()
        programs(weights, config, spec.plan, spec.pages, [int(rows) for rows in options.buckets.split(",")])
        end = time.time()
    seconds = {
        "import_s": imported - began, "weights_s": made - imported, "first_token_s": first - made,
        "compile_s": compiling.seconds, "buckets_s": end - first,
    }  # fmt: skip
    return {
        **{name: round(value, 1) for name, value in seconds.items()},
        "case": spec.name, "tokens": options.tokens, "buckets": options.buckets, "programs": all_of_it.programs,
        "from_cache": all_of_it.from_cache, "cores": cores, "environment": records.provenance(),
        "folder": records.gpu_folder(default_arch()),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(worker())
