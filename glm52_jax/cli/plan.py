"""``glm52 plan``: every operation of a decode step, who serves it on a GPU, and why. Needs neither the GPU nor the weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from glm52_jax.cli import common, make_tiny

if TYPE_CHECKING:
    from pallas_kernels.arch import Arch
    from pallas_kernels.registry import Choice

_PAGE = 64


def plan(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Checkpoint directory; its config.json is all that is read.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The tiny model of generate --tiny.")] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="As H200-141 or A100-80; cpu: none. Default: what JAX computes on.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences of a step.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens that a sequence has room for.")] = 4096,
    parallel: Annotated[
        Literal["tp", "ep", "ep+dp"] | None, typer.Option("--parallel", help="Show one of several devices' share.")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many share the model.")] = 1,
    dtype: common.DTypeOption = "bfloat16",
    cache: common.CacheOption = "auto",
    linear: common.LinearOption = "w8a16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the sizes of every call.")] = False,
) -> None:
    """Show which backend serves each operation of a decode step, and why."""
    if (devices > 1) != (parallel is not None):
        raise common.CliError("--parallel and --devices go together: how the model is shared, and by how many")
    hf = make_tiny.tiny_config() if tiny else _config_json(directory)
    if tiny and directory is not None:
        raise common.CliError("give a directory or --tiny, not both")

    from glm52_jax import shapes
    from glm52_jax.config import Config
    from glm52_jax.parallel import make_mesh
    from glm52_jax.plan import Parallel, Plan

    config = Config.from_hf(hf)
    arch = _arch(gpu)
    latents = cache if cache != "auto" else "float32" if dtype == "float32" else "fp8" if config.fp8 else "bfloat16"
    # One device's part of the work, its exchanges with the others included, as on a mesh of which it is all.
    share = Parallel(make_mesh(1), parallel) if parallel else None
    chosen = Plan(dtype=dtype, cache=latents, linear=linear, parallel=share)
    with common.refusals():
        weights = shapes.abstract_weights(config, dtype=dtype, mode=parallel, devices=devices)
        kernels = arch is not None and all(map(importlib.util.find_spec, ("triton", "jax_triton")))
        pages = -(-context // _PAGE)
        choices = shapes.choices(weights, config, chosen, rows, pages, arch, kernels=kernels)
    groups = grouped(choices)
    if as_json:
        typer.echo(json.dumps(_as_json(groups, arch), indent=1))
        return
    where = arch.name if arch else "no NVIDIA GPU"
    share_of = f", one of {devices} devices ({parallel})" if parallel else ""
    typer.echo(
        f"{where}{share_of}: a decode step of {rows} rows, {pages * _PAGE} tokens each, {linear}, cache {latents}"
    )
    for line in table(groups):
        typer.echo(line)
    if arch is not None and not kernels:
        typer.echo("(calls that a kernel makes itself are not shown: that needs triton, which is not installed)")


@dataclasses.dataclass(frozen=True)
class Group:
    """Calls of one operation that go to one backend for one reason; specs: their sizes and how many calls have them."""

    operation: str
    backend: str
    reason: str
    inside: str
    specs: dict[Any, int]

    @property
    def calls(self) -> int:
        return sum(self.specs.values())

    @property
    def bytes(self) -> int:
        return sum(spec.bytes() * count for spec, count in self.specs.items() if hasattr(spec, "bytes"))


def grouped(choices: list[Choice]) -> list[Group]:
    """In the order of the first call of each group."""
    groups: dict[tuple[str, str, str, str], dict[Any, int]] = {}
    for choice in choices:
        specs = groups.setdefault((choice.operation, choice.backend, choice.reason, choice.inside), {})
        specs[choice.spec] = specs.get(choice.spec, 0) + 1
    return [Group(*key, specs) for key, specs in groups.items()]


def table(groups: list[Group]) -> list[str]:
    """A line for each group: operation, calls, megabytes that they must move, backend and reason."""
    names = [f"{group.operation} in {group.inside}" if group.inside else group.operation for group in groups]
    wide, backends = max(map(len, names)), max(len(group.backend) for group in groups)
    return [
        f"{name:{wide}}  {group.calls:4d} calls {group.bytes / 1e6:9.1f} MB  {group.backend:{backends}}  {group.reason}"
        for name, group in zip(names, groups, strict=True)
    ]


def _as_json(groups: list[Group], arch: Arch | None) -> dict[str, Any]:
    def sizes(spec: Any) -> Any:
        return dataclasses.asdict(spec) if dataclasses.is_dataclass(spec) and not isinstance(spec, type) else str(spec)

    listed = [
        {
            **{"operation": group.operation, "inside": group.inside, "backend": group.backend, "reason": group.reason},
            **{"calls": group.calls, "bytes": group.bytes},
            "sizes": [{"calls": count, **sizes(spec)} for spec, count in group.specs.items()],
        }
        for group in groups
    ]
    return {"gpu": arch.name if arch else None, "operations": listed}


def _config_json(directory: Path | None) -> Any:
    if directory is None:
        raise common.CliError("give a checkpoint directory, or --tiny")
    return common.read_json(directory / "config.json", "the model's config")


def _arch(name: str | None) -> Arch | None:
    from pallas_kernels import arch as archs
    from pallas_kernels import lowering

    if name is None:
        return lowering.default_arch()
    with common.refusals():
        return None if name.lower() == "cpu" else archs.by_name(name)
