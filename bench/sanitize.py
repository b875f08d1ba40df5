"""Every GPU backend under compute-sanitizer, on small cases: ``python -m bench.sanitize`` on a machine with a GPU.

Each (tool, operation, case, backend) is a process of its own, some at a time, with a time limit. Graphs are off, so that kernels
are launched one by one, and each array is an allocation of its own, or memcheck would see one large pool in which nothing is out
of bounds. XLA's own kernels are left out, and inputs are made on the CPU. Findings go to
``bench/results/<gpu>/checks/sanitizer.json`` as the tool gives them; ``REMARKS`` says what is known of some.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench import records
from bench.operations import Operation, Selection, discover, select
from pallas_kernels.arch import Arch
from pallas_kernels.lowering import default_arch

TOOLS = ("memcheck", "racecheck")
REMARKS = {
    "racecheck": "racecheck follows ordinary shared-memory accesses and barriers. It does not model copies of the asynchronous "
    "proxy (TMA) or what is ordered by mbarriers between specialized warps: such kernels may show hazards that are none, and "
    "it would miss hazards of the copies themselves. Where a Triton backend calls fp8_linear's Mosaic kernel, that kernel is left "
    "out (its mbarrier waits take minutes under the tool); fp8_linear's own cases show it. experts (mosaic_sm90, one row): every "
    "thread of a warpgroup writes the same list of experts and reads what it wrote; the tool sees another warp's equal write. "
    "Warnings are hazards inside one warp. fp8_linear (norms of one row): a zero that lanes of one warp store and load, in "
    "step. norm_quant (gluon): thread 0 initializes a barrier and arrives at it; the initialization is a "
    "uniform instruction (SYNCS.EXCH), which the tool counts for every lane.",
}
# Kernels that a tool leaves out of what a backend runs.
_EXCLUDED = {"memcheck": "fusion", "racecheck": "mosaic_gpu"}
# Sizes that a tool at a hundredth of the speed can run, at ROWS unless they name rows; an operation may state its own as SMALL in
# its spec: {case: changes}.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "fp8_linear": {
        "q_a_kv_a_w8a8": {"k": 1024, "ns": (128, 192)},
        "o_proj_w8a16": {"k": 2048, "ns": (256,)},
        "dense_gate_up_w8a16": {"k": 1024, "ns": (128,)},
        "o_proj_w8a8": {"k": 1024, "ns": (256,), "rows": 256},
        "q_b_w8a16": {"k": 1024, "ns": (256,), "rows": 256},
        "norm_q_b_tp8_w8a16": {"k": 1024, "ns": (128, 64)},
        "norm_q_b_w8a16": {"k": 2048, "ns": (64,), "rows": 1},
        "q_a_kv_a_w8a16": {"ns": (64,), "rows": 8},
        "add_norm_q_a_kv_a_w8a16": {"k": 3072, "ns": (128, 64), "rows": 9},
    },
    "index_keys": {"both_w8a16": {"hidden": 1024, "q_lora_rank": 512, "heads": 16, "pages": 4}},
    "latent_write": {"fp8": {"pages": 4}, "bf16": {"pages": 4}},
    "mla_front": {
        "h8_w8a16": {"heads": 2, "q_lora_rank": 512},
        "h8_w8a16_write_fp8": {"heads": 2, "q_lora_rank": 512, "pages": 4},
    },
    "mla_out": {"h8_w8a16": {"heads": 2, "hidden": 256}, "h8_w8a16_parts": {"heads": 2, "hidden": 256}},
    "mqa_logits": {"decode_2k": {}},
    "sparse_mla": {
        "h64_k2048_fp8": {"k": 192, "pages": 16},
        "h8_k2048_fp8": {"k": 192, "pages": 16},
        "h16_k2048_fp8": {"k": 192, "pages": 16},
    },
    "top_k": {"2k": {"n": 4352, "pages": 68}, "8k": {}},
}
ROWS = (1, 5)
_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)"),
}
_DONE = "sanitize: ran"
# faulthandler's first words when a case's own limit, nine tenths of the tool's, is over; the limit is passed in _LIMIT.
_LATE = "Timeout (0:"
_LIMIT = "GLM52_SANITIZE_LIMIT"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one tool said of one backend on one small case.

    status: "clean", "findings", "timed out", or "failed" where the program itself did not end well. errors and warnings: as
    counted by the tool (memcheck counts errors only), -1 where it gave no summary. messages: its first lines.
    """

    tool: str
    operation: str
    case: str
    backend: str
    rows: tuple[int, ...]
    changes: dict[str, Any]
    status: str
    errors: int
    warnings: int
    seconds: float
    messages: tuple[str, ...]


def small_cases(operation: Operation) -> dict[str, dict[str, Any]]:
    """Changes of sizes by case: the operation's own, this module's, else its first case as it is."""
    own = getattr(operation.spec, "SMALL", None) or SMALL.get(operation.name)
    found = {case: changes for case, changes in (own or {}).items() if case in operation.cases}
    return found or {next(iter(operation.cases)): {}}


def small_specs(operation: Operation, case: str, backend: str, arch: Arch | None) -> list[Any]:
    """The specs of a small case at ``ROWS`` that the backend serves, with two layers where weights are stacked."""
    (chosen,) = (b for b in operation.backends if b.name == backend)
    changes = small_cases(operation)[case]
    base = dataclasses.replace(operation.cases[case], **changes)
    if hasattr(base, "layers"):
        base = dataclasses.replace(base, layers=2)
    specs = [dataclasses.replace(base, rows=rows) for rows in ((base.rows,) if "rows" in changes else ROWS)]
    return [spec for spec in specs if chosen.supports(spec, arch) is None]


def plan(operations: Sequence[Operation], arch: Arch | None) -> list[tuple[Operation, str, str]]:
    """(operation, case, backend) of everything to run: each backend but the reference that serves a small case.

    Raises ValueError where a backend that serves a case on this GPU serves none of the operation's small cases.
    """
    items: list[tuple[Operation, str, str]] = []
    for operation in operations:
        for backend in operation.backends:
            cases = [c for c in small_cases(operation) if small_specs(operation, c, backend.name, arch)]
            if not cases and any(backend.supports(spec, arch) is None for spec in operation.cases.values()):
                raise ValueError(f"{operation.name}@{backend.name} serves no small case: add one to SMALL")
            items += [(operation, case, backend.name) for case in cases if backend.name != "reference"]
    return items


def run_case(selection: Selection) -> int:
    """In a process of its own: calls one backend on its small specs, the last layer of the stack too."""
    operation, (case,) = selection.operation, selection.cases
    assert selection.backend is not None
    if _LIMIT in os.environ:  # then it says where it stands: still compiling, or waiting for a kernel
        faulthandler.dump_traceback_later(0.9 * float(os.environ[_LIMIT]), exit=True)
    for spec in small_specs(operation, case, selection.backend, default_arch()):
        with jax.default_device(jax.devices("cpu")[0]):
            made = operation.inputs(spec, jax.random.key(0))
        args, function = jax.device_put(made, jax.devices()[0]), operation.function(spec, selection.backend)
        out = jax.block_until_ready(function(*args))
        if operation.rotates:
            jax.block_until_ready(function(*operation.advance(spec, args, out, 1)))
        print(f"{_DONE} rows={spec.rows}", flush=True)
    return 0


def sanitize(sanitizer: str, tool: str, item: tuple[Operation, str, str], arch: Arch | None, limit: float) -> Finding:
    """Runs one case under one tool."""
    operation, case, backend = item
    rows = tuple(spec.rows for spec in small_specs(operation, case, backend, arch))
    left_out = _EXCLUDED[tool] if "mosaic" not in backend else "fusion"
    command = [
        sanitizer,
        "--tool",
        tool,
        "--print-limit",
        "20",
        "--kernel-name-exclude",
        f"kernel_substring={left_out}",
    ]
    command += [sys.executable, "-m", "bench.sanitize", "--case", f"{operation.name}:{case}@{backend}"]
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
        _LIMIT: str(limit),
    }
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, cwd=records.ROOT, check=False
        )
        text, ended = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as late:
        text, ended = "".join(_text(part) for part in (late.stdout, late.stderr)), False
    status, errors, warnings, messages = judge(tool, text, ended, len(rows))
    changes = small_cases(operation)[case]
    seconds = round(time.monotonic() - start, 1)
    return Finding(tool, operation.name, case, backend, rows, changes, status, errors, warnings, seconds, messages)


def judge(tool: str, text: str, ended: bool, calls: int) -> tuple[str, int, int, tuple[str, ...]]:
    """(status, errors, warnings, messages) from what the tool and the program under it wrote."""
    summary = _SUMMARY[tool].search(text)
    said = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    said = [line for line in said if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY"))]
    if not ended or _LATE in text:
        return "timed out", -1, -1, tuple(said[:6] + _stack(text))
    if summary is None or text.count(_DONE) != calls:
        return "failed", -1, -1, tuple(said[:6] + text.strip().splitlines()[-6:])
    errors, warnings = (int(summary[2]), int(summary[3])) if tool == "racecheck" else (int(summary[1]), 0)
    return (
        ("findings" if errors or warnings else "clean"),
        errors,
        warnings,
        tuple(said[:6]) if errors or warnings else (),
    )


def _stack(text: str) -> list[str]:
    """The innermost lines of the stack that faulthandler wrote, without folders."""
    lines = text.partition("(most recent call first)")[2].splitlines()
    return [re.sub(r'".*/', '"', line).strip() for line in lines if line.strip().startswith("File")][:8]


def _text(part: Any) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def find_sanitizer() -> str:
    """The path of compute-sanitizer; it comes with the CUDA toolkit."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise SystemExit(
            "compute-sanitizer is not on the PATH and not in /usr/local/cuda/bin: install the CUDA toolkit"
        )
    return found


def version(sanitizer: str) -> str:
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in said.splitlines() if line.startswith("Version")), "unknown")


def save(path: Path, findings: Sequence[Finding], sanitizer: str, arch: Arch | None) -> None:
    """Merges findings into the file: a new one replaces that of its tool, operation, case and backend."""
    kept = {_key(old): old for old in (json.loads(path.read_text())["findings"] if path.exists() else [])}
    run = {
        "sanitizer": version(sanitizer), "revision": records.revision(), "sources": records.sources(),
        "gpu": arch.name if arch else "none", "versions": records.versions(),
    }  # fmt: skip
    for finding in findings:
        entry = {**dataclasses.asdict(finding), "run": run}
        kept[_key(entry)] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"remarks": REMARKS, "findings": [kept[key] for key in sorted(kept)]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _key(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return entry["tool"], entry["operation"], entry["case"], entry["backend"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a tool found something, a program failed or the time ran out."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("operations", nargs="*", help="names; all that have GPU backends unless given")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for one process")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--case", help="OP:CASE@BACKEND: only run it, in this process (what runs under the tool)")
    options = parser.parse_args(arguments)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process only asks which GPU there is
    operations = discover()
    if options.case:
        return run_case(select(options.case, operations))
    arch, sanitizer = default_arch(), find_sanitizer()
    chosen = [operations[name] for name in options.operations] if options.operations else list(operations.values())
    items = [(tool, item) for tool in options.tools for item in plan(chosen, arch)]
    findings: list[Finding] = []
    path = options.results / records.gpu_folder(arch) / "checks" / "sanitizer.json"
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(sanitize, sanitizer, tool, item, arch, options.limit) for tool, item in items]
        for done in concurrent.futures.as_completed(waiting):
            found = done.result()
            findings.append(found)
            save(path, [found], sanitizer, arch)
            name = f"{found.operation}:{found.case}@{found.backend}"
            print(f"{found.tool} {name}: {found.status}, {found.errors} errors, {found.seconds} s", flush=True)
            for line in found.messages:
                print(f"    {line}", flush=True)
    print(f"{len(findings)} runs, {sum(f.status == 'clean' for f in findings)} clean; findings are in {path}")
    return int(any(found.status != "clean" for found in findings))


if __name__ == "__main__":
    sys.exit(main())
