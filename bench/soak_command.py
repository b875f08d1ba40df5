"""``python -m bench soak``: its options, the process it runs in, and its record."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench import records
from bench.soak import OTHER, START, STEPS, Soaking, SoakSpec
from bench.step_model import glm52
from glm52_jax.config import Config
from glm52_jax.tiny import KERNEL_TINY, tiny_config
from pallas_kernels.lowering import default_arch

_RECORDED = r"\b(Initialized|Recorded|Updated|Evicted \d+) command buffer"


def graph_lines(log: str) -> tuple[Counter[str], Counter[str]]:
    """(during steps, otherwise), after the start: graphs that XLA's log of ``command_buffer_thunk`` says were made or changed."""
    found, where = {STEPS: Counter[str](), OTHER: Counter[str]()}, OTHER
    for line in log.splitlines():
        if line in found:
            where = line
        elif line == START:
            found = {STEPS: Counter[str](), OTHER: Counter[str]()}
        elif match := re.search(_RECORDED, line):
            found[where][match[1].split()[0]] += 1
    return found[STEPS], found[OTHER]


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    command.add_argument("--steps", type=int, default=20_000, help="default %(default)s")
    command.add_argument("--rows", type=int, default=8, help="sequences at a time (default %(default)s)")
    command.add_argument(
        "--layers", type=int, default=0, help="of GLM-5.2's sizes; the kernel-sized tiny model unless given"
    )
    command.add_argument(
        "--poison", type=int, default=1000, help="steps between poisoned sequences (default %(default)s)"
    )
    command.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")


def main(options: argparse.Namespace) -> int:
    """Steps one decode program while sequences end and begin in its rows; 1 where something was wrong."""
    # In a process whose log can be read: it says which steps recorded a graph.
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        names = ("steps", "rows", "layers", "poison", "results")
        line = [sys.executable, "-m", "bench.soak_command", "--log", str(log)]
        line += [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
        # Level 0: JAX hides what is below a warning.
        verbose = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_buffer_thunk=3"}
        with log.open("w") as stream:
            status = subprocess.run(
                line, cwd=records.ROOT, env=os.environ | verbose, stderr=stream, check=False
            ).returncode
        if status not in (0, 1):
            print(*log.read_text().splitlines()[-20:], sep="\n", file=sys.stderr)
        return status


def worker(arguments: list[str] | None = None) -> int:
    """What that process does."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak_command")
    add_options(parser)
    parser.add_argument("--log", type=Path, help="where this process's standard error goes")
    options = parser.parse_args(arguments)
    sizes = tiny_config(**KERNEL_TINY, num_nextn_predict_layers=0)
    config = glm52(options.layers) if options.layers else Config.from_hf(sizes)
    spec = SoakSpec(config, options.steps, options.rows, poison=options.poison)
    return soak(spec, options.results, options.log)


def _say(text: str) -> None:
    print(text, flush=True)


def soak(
    spec: SoakSpec,
    results: Path,
    log: Path | None = None,
    say: Callable[[str], None] = _say,
) -> int:
    """Runs, records and prints; the exit status."""
    soaking = Soaking(spec, lambda text: print(text, file=sys.stderr, flush=True), say)
    seen = soaking.run()
    stepping, other = graph_lines(log.read_text()) if log else (Counter[str](), Counter[str]())
    wrong = seen.wrong + [f"{count} graphs {name.lower()} by steps" for name, count in sorted(stepping.items())]
    path = results / records.gpu_folder(default_arch()) / "checks" / "soak.json"
    record = {
        **records.provenance(),
        "layers": spec.config.num_hidden_layers,
        "hidden_size": spec.config.hidden_size,
        "rows": spec.rows,
        "seen": dataclasses.asdict(seen),
        "graph": {"during_steps": dict(stepping), "otherwise": dict(other)},
        "wrong": wrong,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    say(
        f"{seen.steps} steps in {seen.seconds} s, {seen.sequences} sequences with {seen.tokens} tokens, {seen.poisoned} poisoned; "
        f"{seen.texts_same} of {seen.texts_again} texts the same again; {max(seen.memory) / 1e6:.1f} MB on the device, "
        f"{seen.grown} bytes more at the end; graphs touched by steps: {stepping.total() if log else 'no log'}"
    )
    for text in wrong:
        say(f"WRONG: {text}")
    say(str(path))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(worker())
