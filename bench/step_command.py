"""``python -m bench step``: its options, and what they run."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from bench import records, step, step_graph, step_report
from bench.session import Session
from bench.step_model import StepSpec, glm52
from glm52_jax.parallel import RULES
from pallas_kernels import arch


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    command.add_argument("--layers", type=int, default=78, help="of GLM-5.2's, from the first (default %(default)s)")
    command.add_argument("--rows", default="1", help="batches, such as 1,8,64 (default %(default)s)")
    command.add_argument("--contexts", default="4096", help="cached tokens, such as 4096,131072 (default %(default)s)")
    command.add_argument("--parallel", choices=tuple(RULES), help="how devices share the model")
    command.add_argument("--devices", type=int, default=1, help="how many do (default %(default)s)")
    command.add_argument(
        "--rank", action="store_true", help="one of those devices' work, alone on one GPU; its exchanges are local"
    )
    command.add_argument("--linear", default="w8a16", choices=("w8a16", "w8a8"), help="default %(default)s")
    command.add_argument("--burst", type=int, default=1, help="steps of a call of the program (default %(default)s)")
    command.add_argument("--against", choices=("w8a16", "w8a8"), help="time this arithmetic too, interleaved")
    command.add_argument("--stages", action="store_true", help="split the step's time by stage and kernel")
    command.add_argument("--audit", action="store_true", help="see whether the step is one graph that is only replayed")
    command.add_argument("--rounds", type=int, default=7, help="rounds whose median is taken (default %(default)s)")
    command.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")


def add_graph_options(command: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench graph``."""
    command.add_argument("--layers", type=int, default=78, help="of GLM-5.2's, from the first (default %(default)s)")
    command.add_argument("--rows", default="1", help="batches, such as 1,8,64 (default %(default)s)")
    command.add_argument("--contexts", default="4096", help="cached tokens (default %(default)s)")
    command.add_argument("--parallel", choices=tuple(RULES), default="tp", help="default %(default)s")
    command.add_argument("--devices", type=int, default=8, help="whose first one's share (default %(default)s)")
    command.add_argument("--linear", default="w8a16", choices=("w8a16", "w8a8"), help="default %(default)s")
    command.add_argument("--gpu", default="H200-141", help="default %(default)s")


def graph(options: argparse.Namespace) -> int:
    """Prints the graphs of steps for a GPU that need not be there; the exit status, 1 where one is no graph as a whole."""
    gpu = arch.by_name(options.gpu)
    options.rank, wrong = options.devices > 1, 0
    options.parallel = options.parallel if options.rank else None
    base, rows, contexts = specs(options)
    base = dataclasses.replace(base, mesh=step_graph.mesh_of(gpu))
    for batch in rows:
        for context in contexts:
            found = step_graph.graph_of(dataclasses.replace(base, rows=batch, context=context), gpu)
            print(f"{gpu.name}, {base.name}, batch {batch}, context {context}:", *found.lines(), sep="\n")
            wrong += not found.graph.whole
    return 1 if wrong else 0


def specs(options: argparse.Namespace) -> tuple[StepSpec, list[int], list[int]]:
    """The first spec, and the batches and contexts to sweep; ValueError for what does not fit together."""
    rows, contexts = ([int(n) for n in text.split(",")] for text in (options.rows, options.contexts))
    shared = {"mode": options.parallel, "devices": options.devices, "rank": options.rank}
    shared["burst"] = getattr(options, "burst", 1)
    return StepSpec(glm52(options.layers), rows[0], contexts[0], linear=options.linear, **shared), rows, contexts


def reserve_memory() -> None:
    """Before JAX first uses the GPU: one rank of eight has 95 GB of weights, and JAX takes three quarters of the memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def run(options: argparse.Namespace, session: Session) -> int:
    """Times, prints, records and draws; the exit status."""
    base, rows, contexts = specs(options)
    copy = session.ceilings.copy

    def keep(figure: step.Step) -> None:
        step_report.save(session.folder, [dataclasses.replace(figure, run=session.name)], session.environment)

    if options.against:
        other = dataclasses.replace(base, linear=options.against)
        for figure in step.compare(base, other, copy, options.rounds, session.say):
            keep(figure)
    else:
        how = {"rounds": options.rounds, "stages": options.stages, "audits": options.audit, "run": session.name}
        step.sweep(base, rows, contexts, copy, say=session.say, keep=keep, **how)
    path = session.folder / step_report.FOLDER / step_report.FILE
    step_report.draw(step_report.read(path)[1], step_report.picture_of(path))
    return session.status()
