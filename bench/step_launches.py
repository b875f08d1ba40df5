"""The launches of a compiled step: which operation of which stage each kernel of the optimized program belongs to."""

from __future__ import annotations

import dataclasses
import re
import zlib

OTHER = "rest"
# Stages in the order in which they are told, and the scopes that mean them: of a path, the last that is known.
STAGES = {
    **{"attention": "attention", "indexer": "indexer", "dense": "dense", "router": "router", "experts": "experts"},
    **{"collectives": "collectives", "head": "head", "sample_logits": "sampling"},
}
_MOSAIC, _TRITON = "mosaic_gpu_v2", ("triton_kernel_call_ffi", "triton_kernel_call")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(?[a-z0-9]+\[[\d,]*\]).*? (fusion|custom-call)\(")
# XLA's wrapping of a call whose operands are layers of stacks: a kernel gets pointers, and nothing is copied.
_WRAPPED = re.compile(r"kind=kCustom, calls=%?([\w.-]+)")
_OPERATION = re.compile(r"^([a-z_0-9]+)\.(?:triton|gluon|mosaic\w*|reference)$")
_OPAQUE = re.compile(r'opaque = "((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(r"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)
_SIGNS = {"n": "\n", "t": "\t", "r": "\r"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch in a program. kernel: its function, of one of this repository's; "" for a fusion of XLA's."""

    stage: str
    what: str
    kernel: str = ""


def launches(hlo: str) -> tuple[list[Launch], dict[str, Launch]]:
    """(our custom calls in the program's order, XLA's kernels by name) of an optimized, scheduled module."""
    ours, fusions = [], {}
    before, _, entry = hlo.partition("\nENTRY ")
    wrapped = _wrapped(before)
    for line in entry.splitlines():
        calls = _WRAPPED.search(line)
        line = wrapped.get(calls[1], line) if calls else line
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        metadata = re.search(r'metadata=\{op_name="([^"]*)"', line)
        scope = metadata[1] if metadata else ""
        launch = _launch(scope, found[2].lstrip("("))
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if target is None:
            fusions[found[1].replace(".", "_").replace("-", "_")] = launch
        elif target[1] == _MOSAIC:
            # Mosaic calls a kernel after its body, which is the scope around the call.
            ours.append(dataclasses.replace(launch, kernel=f"{scope.split('/')[-2]}_mosaic_gpu_kernel"))
        elif target[1] in _TRITON:
            ours.append(dataclasses.replace(launch, kernel=_triton_name(line)))
    return ours, fusions


def _wrapped(computations: str) -> dict[str, str]:
    """The lines of the custom calls of fused computations, by the computation's name."""
    found, name = dict[str, str](), ""
    for line in computations.splitlines():
        if line and not line[0].isspace():
            name = line.split(" ", 1)[0].lstrip("%")
        elif "custom_call_target=" in line:
            found[name] = line
    return found


def _triton_name(line: str) -> str:
    """The function that a Triton call launches, which its packed text names."""
    found = _OPAQUE.search(line)
    packed = _ESCAPED.sub(_sign, found[1]).encode("latin-1") if found else b""
    named = re.search(rb"[a-z][a-z0-9_]*_kernel", zlib.decompress(packed)) if packed else None
    if named is None:
        raise ValueError(f"a Triton call names no kernel: {line[:300]}")
    return named[0].decode()


def _sign(escaped: re.Match[str]) -> str:
    text = escaped[1]
    return chr(int(text, 16)) if len(text) == 2 else _SIGNS.get(text, text)


def _launch(scope: str, shape: str) -> Launch:
    parts = scope.split("/")
    operations = [found[1] for part in parts if (found := _OPERATION.match(part))]
    known = [STAGES[name] for part in parts if (name := part.partition(".")[0]) in STAGES]
    return Launch(known[-1] if known else OTHER, f"{'/'.join(operations)} {shape}".strip())
