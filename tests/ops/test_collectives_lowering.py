"""The peer-pointer kernels as machine code, without a GPU: accesses that meet a peer are relaxed, of system scope, and bounded."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import arch, lowering
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import ADD_NORM, ALL_GATHER, ALL_REDUCE, CASES, Message

pytestmark = pytest.mark.needs_triton

GPUS = ("A100-80", "H200-141", "B200-180", "RTX PRO 6000")
POLLS = 12345  # in no other test, so that nothing comes out of jax-triton's cache


def arguments(spec: Message) -> tuple:
    shape, world = jax.ShapeDtypeStruct, spec.devices
    units = world * workspace.limit(world) // workspace.UNIT_PAYLOAD + workspace.PARTIALS
    work = workspace.Workspace(shape((1, 2, units, 4), jnp.uint32), shape((1, world + 1, 2), jnp.uint32))
    state = workspace.State(shape((1, 1), jnp.uint32), shape((1, 1), jnp.int32))
    x = shape(spec.shape, jnp.dtype(spec.dtype))
    norm = (x, shape((3, spec.shape[-1]), jnp.bfloat16), shape((), jnp.int32)) if spec.form == ADD_NORM else ()
    return x, work, state, *norm


def lower(spec: Message, gpu: str, polls: int = workspace.POLLS) -> str:
    from pallas_kernels.collectives import triton

    return lowering.lower_for_cuda(
        functools.partial(triton.exchange, spec, polls=polls), *arguments(spec), arch=arch.by_name(gpu)
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", CASES)
def test_every_served_case_compiles(case: str, gpu: str) -> None:
    spec = CASES[case]
    if workspace.supports(spec, arch.by_name(gpu)) is not None:
        assert case == "ep_logits_b64_n4"
        return
    text = lower(spec, gpu)
    assert text.count("triton_kernel_call") == (2 if workspace.two_shots(spec) else 1)
    assert "output_operand_alias" in text  # the status stays where it is
    for operands, index in re.findall(r"@triton_kernel_call\w*\((.*?)\).*?operand_index = (\d+)", text):
        names = operands.split(", ")
        assert names.count(names[int(index)]) == 1, "XLA copies what a call changes in place and reads too"


def ptx(spec: Message, gpu: str, monkeypatch: pytest.MonkeyPatch) -> str:
    from jax_triton import triton_lib

    compiled, found = triton_lib.compile_ttir_inplace, []

    def keep(*args: object, **kwargs: object) -> object:
        found.append(compiled(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", keep)
    monkeypatch.setattr(workspace, "PARTIALS", workspace.PARTIALS + 2 * len(gpu))  # nor from an earlier run of this one
    lower(spec, gpu, POLLS)
    (one,) = found
    return one.binary if isinstance(one.binary, str) else one.binary.decode()


CHECKED = [
    Message(ALL_REDUCE, (1, 6144), "bfloat16", 2),
    Message(ALL_REDUCE, (1, 6144), "bfloat16", 4),
    Message(ADD_NORM, (1, 6144), "bfloat16", 4, eps=1e-5),
    Message(ADD_NORM, (8, 6144), "bfloat16", 8, eps=1e-5),
    Message(ALL_GATHER, (1, 19360), "float32", 8, dim=1),
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("spec", CHECKED, ids=lambda s: f"{s.form}-{s.shape[0]}-{s.devices}")
def test_machine_code(spec: Message, gpu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = ptx(spec, gpu, monkeypatch)
    packets = spec.devices + (spec.form == ADD_NORM)
    assert len(re.findall(r"st\.relaxed\.sys\.global\.v2\.b64", text)) == packets
    assert len(re.findall(r"ld\.relaxed\.sys\.global\.v2\.b64", text)) == packets
    loops = re.findall(r"POLL:\n(.*?)bra POLL;", text, re.S)
    assert len(loops) == 1 + (spec.form == ADD_NORM)
    for loop in loops:
        assert (
            "ld.relaxed.sys" in loop and "sub.u32 left, left, 1;" in loop and "setp.ne.and.u32 again, left, 0" in loop
        )
    assert text.count(f"mov.u32 left, {POLLS};") == len(loops)
    assert "fence" not in text and "membar" not in text and "multimem" not in text

    path, sm = tmp_path / "k.ptx", arch.by_name(gpu).sm
    path.write_text(text)
    target = re.search(r"\.target (\w+)", text).group(1)  # type: ignore[union-attr]
    assert target.startswith(f"sm_{sm}")
    code = path.with_suffix(".cubin")
    log = tool("ptxas-blackwell" if sm >= 100 else "ptxas", "-v", f"-arch={target}", str(path), "-o", str(code))
    registers = int(re.search(r"Used (\d+) registers", log).group(1))  # type: ignore[union-attr]
    assert " 0 bytes spill stores" in log and registers <= 64, "more registers and MOST_BLOCKS are not resident at once"
    sass = tool("cuobjdump", "-sass", str(code))
    # ptxas may turn a vector into the two packets it is made of, never into one access of another scope.
    assert len(re.findall(r"LDG?\.E\.(?:128|64)\.STRONG\.SYS", sass)) >= packets
    assert len(re.findall(r"STG?\.E\.(?:128|64)\.STRONG\.SYS", sass)) >= packets


def test_a_launch_has_a_short_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """jaxlib looks a kernel up by all that jax-triton hands it, in every run, for every node and device."""
    from jax_triton import triton_lib

    pressed, found = triton_lib.zlib.compress, []

    def keep(form: bytes) -> bytes:
        found.append((form, pressed(form)))
        return found[-1][1]

    monkeypatch.setattr(triton_lib.zlib, "compress", keep)
    lower(CHECKED[1], "H200-141")
    ((form, key),) = found
    assert b".visible .entry exchange_kernel" in form
    assert b"tt.func" not in form and b".debug_info" not in form and b".loc" not in form
    assert len(key) < 3000, f"{len(key)} bytes: about {len(key) // 4000 + 1} us a node and device in every run"


def tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
