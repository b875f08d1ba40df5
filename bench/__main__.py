"""The command line of ``python -m bench``: list, verify, run, compare, sweep, layer, indexer, step, prompt, graph, ab, soak,
report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from bench import ab, indexer, layer, prompt, readme, records, report, run, soak_command, start, step_command
from bench.check import WrongResult, checked
from bench.operations import ROWS, Operation, discover, packages, select
from bench.session import Session
from bench.workers import SESSION, Share, leave_cores, leave_memory, run_workers, that_fit
from glm52_jax import compile_cache
from pallas_kernels.arch import Arch
from pallas_kernels.lowering import default_arch


def main(arguments: list[str] | None = None) -> int:
    """Returns the process's exit status: 1 where a result was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        options.arguments = arguments
        return options.command(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def list_command(options: argparse.Namespace) -> int:
    """Operations, cases with bytes and flops at one row, and who serves them here."""
    arch, operations = default_arch(), discover()
    print(f"GPU: {arch.name if arch else 'none; figures need one'}")
    for name in packages():
        if name not in operations:
            print(f"{name}: reference only, no cases yet")
            continue
        operation = operations[name]
        print(
            f"{name}: backends {', '.join(b.name for b in operation.backends)}; rows {', '.join(map(str, operation.rows))}"
        )
        for case, spec in operation.cases.items():
            choice = operation.choose(spec, arch)
            print(
                f"  {case}: {spec.bytes() / 1e6:.2f} MB, {spec.flops() / 1e6:.1f} MFLOP -> {choice.backend} ({choice.reason})"
            )
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """Every serving backend against the reference on every case."""
    arch, operations = default_arch(), discover()
    wrong = 0
    for selection in [select(text, operations) for text in options.selections or operations]:
        operation = selection.operation
        for case in selection.cases:
            if not selection.backend and operation.serving(operation.sized(case), arch) == ("reference",):
                reason = operation.choose(operation.sized(case), arch).reason
                print(f"{operation.name}:{case}: only the reference serves ({reason})")
                continue
            for rows in _rows(options) or operation.rows:
                wrong += _verify(operation, case, rows, selection.backend, arch)
    if arch is None:
        print(
            "Without a GPU only the references serve; their checks against float64 numpy are tests: ./dev test tests/ops"
        )
    return 1 if wrong else 0


def _verify(operation: Operation, case: str, rows: int, forced: str | None, arch: Arch | None) -> int:
    """Prints the checks of one spec; returns how many were wrong."""
    spec = operation.sized(case, rows, arch)
    names = [operation.choose(spec, arch, forced).backend] if forced else operation.serving(spec, arch)
    kernels = [name for name in names if name != "reference"]
    if not kernels:
        print(f"{operation.name}:{case} rows={rows}: only the reference serves")
        return 0
    args = operation.inputs(spec, jax.random.key(0))
    results = [checked(operation, spec, name, args) for name in kernels]
    for result in results:
        print(f"{operation.name}:{case} rows={rows} {result}")
    return sum(not result.ok for result in results)


def run_command(options: argparse.Namespace) -> int:
    """Checks, times, records."""
    if options.worker:
        leave_cores()
    elif options.jobs > 1:
        leave_memory()
    operations, arch = discover(), run.require_gpu(default_arch(), "run")
    selections = [select(text, operations) for text in options.selections or operations]
    if options.worker:
        session = Session(arch, options.results, offered=Path(os.environ[SESSION]))
        run.run(selections, _options(options), session, Share.parse(options.worker))
        return 1 if session.wrong else 0
    session = Session(arch, options.results)
    if options.jobs <= 1:
        run.run(selections, _options(options), session)
        return session.status()
    largest = run.largest(selections, _options(options), arch)
    jobs = that_fit(options.jobs, largest, arch.memory_bytes)
    if jobs < options.jobs:
        session.say(f"{jobs} workers, not {options.jobs}: a case has {largest / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory() as folder:
        done = run_workers(options.arguments, jobs, session.offer(Path(folder) / "session.json"))
    return session.status() or int(not done)


def sweep_command(options: argparse.Namespace) -> int:
    """One case over the values of a field of its spec."""
    operations, arch = discover(), run.require_gpu(default_arch(), "sweep")
    selection = _one_case(options.selection, operations)
    field, _, values = options.setting.partition("=")
    if field not in selection.operation.cases[selection.cases[0]].__dataclass_fields__ or not values:
        raise ValueError(f"{options.setting!r} is not FIELD=VALUE,VALUE of {selection.operation.name}'s spec")
    chosen = [_value(value) for value in values.split(",")]
    session = Session(arch, options.results)
    run.sweep(selection, field, chosen, _options(options), session)
    return session.status()


def layer_command(options: argparse.Namespace) -> int:
    """The MLA layer with synthetic weights: in one graph of many, as a graph of its own, jitted without one, op by op."""
    session = Session(run.require_gpu(default_arch(), "layer"), options.results)
    for arithmetic in options.arithmetic.split(","):
        for rows in _rows(options) or ROWS:
            spec = layer.LayerSpec(rows=rows, arithmetic=arithmetic)
            try:
                session.keep(layer.run(spec, tuple(options.ways.split(",")), options.rounds, session.say))
            except WrongResult as error:
                session.refuse(str(error))
    return session.status()


def indexer_command(options: argparse.Namespace) -> int:
    """The indexer of one layer, from hidden state to cache slots, in one graph of many and by its parts."""
    session = Session(run.require_gpu(default_arch(), "indexer"), options.results)
    for context in options.contexts.split(","):
        if context not in indexer.CONTEXTS:
            raise ValueError(f"{context!r} is no context: there are {', '.join(indexer.CONTEXTS)}")
        for rows in _rows(options) or (1, 8, 32):
            spec = indexer.IndexerSpec(rows, context, indexer.CONTEXTS[context], options.arithmetic)
            try:
                session.keep(indexer.run(spec, tuple(options.ways.split(",")), options.rounds, session.say))
            except WrongResult as error:
                session.refuse(str(error))
    return session.status()


def whole_step_command(options: argparse.Namespace) -> int:
    """The whole decode step: real shapes, synthetic weights made on the device; see bench/step.py for what each figure is."""
    step_command.reserve_memory()
    arch = run.require_gpu(default_arch(), "step")
    compile_cache.enable()  # Before anything is compiled: JAX looks once.
    return step_command.run(options, Session(arch, options.results))


def prompt_command(options: argparse.Namespace) -> int:
    """A long prompt through the kernels into the caches: real widths, synthetic weights; see bench/prompt.py."""
    step_command.reserve_memory()
    arch = run.require_gpu(default_arch(), "prompt")
    compile_cache.enable()
    return prompt.run(options, Session(arch, options.results))


def graph_command(options: argparse.Namespace) -> int:
    """The graph of the whole decode step, compiled for a GPU that is not there; needs JAX's CUDA plugin and Triton."""
    return step_command.graph(options)


def compare_command(options: argparse.Namespace) -> int:
    """Two cases or backends interleaved in one process."""
    operations, arch = discover(), run.require_gpu(default_arch(), "compare")
    first, second = (_one_case(text, operations) for text in (options.a, options.b))
    wrong = run.compare(first, second, _options(options), arch)
    for text in wrong:
        print(f"WRONG, not reported: {text}", file=sys.stderr)
    return 1 if wrong else 0


def report_command(options: argparse.Namespace) -> int:
    """Table and plot of every GPU that has records."""
    folders = sorted({path.parent for path in options.results.glob("*/*.json")})
    if not folders:
        raise ValueError(f"no records under {options.results}: make some on a GPU with python -m bench run")
    for folder in folders:
        print(*report.write(folder), sep="\n")
    if options.readme:
        print(readme.update(readme.README, options.results / options.readme))
    return 0


def _one_case(text: str, operations: dict[str, Operation]) -> Any:
    selection = select(text, operations)
    if len(selection.cases) != 1:
        raise ValueError(f"{text!r} names {len(selection.cases)} cases: name one, as {text}:{selection.cases[0]}")
    return selection


def _rows(options: argparse.Namespace) -> tuple[int, ...] | None:
    return tuple(int(rows) for rows in options.rows.split(",")) if options.rows else None


def _value(text: str) -> Any:
    """A number, true or false where it reads as one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _options(options: argparse.Namespace) -> run.Options:
    return run.Options(
        backends=options.backends,
        reference=not options.no_reference,
        rows=_rows(options),
        targets=getattr(options, "targets", False),
        chain=options.chain,
        rounds=options.rounds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of pallas_kernels' operations.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    selection = "OP[:CASE][@BACKEND]"

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=function.__doc__)
        command.set_defaults(command=function)
        return command

    add("list", list_command, "operations, cases, and who serves them here")
    verify = add("verify", verify_command, "check every backend against the reference")
    timed = add("run", run_command, "check, time and record (needs a GPU)")
    for command in (verify, timed):
        command.add_argument("selections", nargs="*", metavar=selection, help="everything unless given")
    compare = add("compare", compare_command, "time two cases or backends interleaved (needs a GPU)")
    compare.add_argument("a", metavar="A", help="OP:CASE[@BACKEND]")
    compare.add_argument("b", metavar="B", help="OP:CASE[@BACKEND]")
    sweep = add("sweep", sweep_command, "time one case over values of a field of its spec (needs a GPU)")
    sweep.add_argument("selection", metavar="OP:CASE[@BACKEND]")
    sweep.add_argument("setting", metavar="FIELD=V,V", help="such as splits=1,2,4,8")
    whole = add("layer", layer_command, "time the whole MLA layer (needs a GPU)")
    whole.add_argument("--arithmetic", default="w8a16,w8a8", help="of the FP8 projections (default %(default)s)")
    whole.add_argument("--ways", default=",".join(layer.WAYS), help="default %(default)s")
    whole.add_argument("--rounds", type=int, default=7, help="rounds whose median is taken (default %(default)s)")
    search = add("indexer", indexer_command, "time the DSA indexer of one layer (needs a GPU)")
    search.add_argument("--contexts", default=",".join(indexer.CONTEXTS), help="cached tokens (default %(default)s)")
    search.add_argument("--arithmetic", default="w8a16", help="of the FP8 projections (default %(default)s)")
    search.add_argument("--ways", default=",".join(indexer.WAYS), help="default %(default)s")
    search.add_argument("--rounds", type=int, default=7, help="rounds whose median is taken (default %(default)s)")
    step_command.add_graph_options(add("graph", graph_command, "look at the decode step's graph (needs no GPU)"))
    step_command.add_options(add("step", whole_step_command, "time the whole decode step (needs a GPU)"))
    prompt.add_options(add("prompt", prompt_command, "time a long prompt (needs a GPU)"))
    ab.add_options(add("ab", ab.main, "time two revisions or plans of the step (needs a GPU)"))
    start.add_options(add("start", start.main, "time until the first token, cold and again"))
    soak_command.add_options(add("soak", soak_command.main, "run one program for thousands of steps"))
    reporting = add("report", report_command, "write tables and plots from the records")
    reporting.add_argument("--readme", metavar="GPU", help="write this GPU's figures into README.md too, such as h200")
    for command in (verify, timed, compare, sweep, whole, search):
        command.add_argument("--rows", help="such as 1,8,64; the operation's own unless given")
    for command in (timed, compare, sweep):
        command.add_argument("--backends", default="chosen", help="chosen, all, or a name")
        command.add_argument("--no-reference", action="store_true", help="do not time the reference")
        command.add_argument("--chain", type=int, default=run.CHAIN, help="calls in one jit (default %(default)s)")
        command.add_argument("--rounds", type=int, default=7, help="rounds whose median is taken (default %(default)s)")
    timed.add_argument("--targets", action="store_true", help="only what a target or a rival's figure stands beside")
    timed.add_argument(
        "--jobs", type=int, default=1, help="that compile side by side and take turns on the GPU (default %(default)s)"
    )
    timed.add_argument("--worker", help=argparse.SUPPRESS)
    for command in (timed, sweep, whole, search, reporting):
        command.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
