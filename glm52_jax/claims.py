"""Does a checkpoint hold exactly the tensors that a model wants? Needs no JAX.

The model side says what it expects; `check_claims` compares it with the headers, before any tensor is read, and reports
every difference at once. FP8 weights come with one F32 scale a 128x128 block under `<weight>_scale_inv`; the dtype
found decides, because `modules_to_not_convert` of real configs lists names that no tensor has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm52_jax.checkpoint import Checkpoint
from glm52_jax.safetensors_file import CheckpointError, TensorInfo, show

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that the model wants.

    dtypes are the safetensors names it may have. block_scaled_allowed adds F8_E4M3 together with an F32 scale
    `<name>_scale_inv` of shape [ceil(rows/128), ceil(columns/128)], which is then wanted too.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    block_scaled_allowed: bool = False

    def __post_init__(self) -> None:
        if self.block_scaled_allowed and len(self.shape) != 2:
            raise ValueError(f"only matrices have 128x128 blocks, not shape {self.shape}")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP8 weight; a last block of fewer than 128 is a block."""
    return tuple(-(-n // BLOCK) for n in shape)


def check_claims(
    checkpoint: Checkpoint, expected: Mapping[str, Expected], ignore: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Compares headers with expectations; reads no tensor.

    Args:
        checkpoint: an open checkpoint.
        expected: what the model wants, by tensor name, without the scales.
        ignore: True for a name that may be there unclaimed; the scale of an ignored weight is ignored too.

    Returns:
        The claimed names, scales included (each after its weight), each once, in the order of `expected`.

    Raises:
        CheckpointError: one error for all differences; each kind is counted and its first 10 are listed.
    """
    report = _Report()
    claimed: dict[str, None] = {}
    for name, want in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            report.missing.append(f"{show(name)}, expected {_kind(want)}")
            continue
        claimed[name] = None
        report.compare(info, want.shape, (*want.dtypes, FP8) if want.block_scaled_allowed else want.dtypes)
        if info.dtype != FP8 or not want.block_scaled_allowed:
            continue
        scale = checkpoint.tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            report.missing.append(f"{show(name + SCALE_SUFFIX)}, the scales of the {FP8} weight in {info.file}")
            continue
        claimed[scale.name] = None
        report.compare(scale, scale_shape(want.shape), ("F32",))
    for name, info in checkpoint.tensors.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        if name in claimed or ignore(name) or ignore(weight):
            continue
        if weight != name and weight in expected:
            found = checkpoint.tensors.get(weight)
            state = f"is {found.dtype} in {found.file}" if found else "is missing"
            report.orphans.append(f"{_place(info)}: its weight {state}")
        else:
            report.unexpected.append(_place(info))
    report.raise_if_any(checkpoint.path)
    return list(claimed)


def check_scales(name: str, scales: np.ndarray, file: Path | None = None) -> None:
    """Refuses block scales that are NaN, infinite or negative. Zero passes: it is a block of zeros.

    Raises:
        CheckpointError: names the tensor, the first bad index and its value, and how many are bad.
    """
    bad = ~(np.isfinite(scales) & (scales >= 0))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        where = f" in {file}" if file else ""
        count = f"{int(bad.sum())} of {bad.size} scales are"
        raise CheckpointError(
            f"tensor {show(name)}{where}: {count} NaN, infinite or negative; the first is {scales[at]} at {list(at)}"
        )


class _Report:
    """Differences by kind, in the order in which they are printed."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.shapes: list[str] = []
        self.dtypes: list[str] = []
        self.orphans: list[str] = []

    def compare(self, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if info.shape != shape:
            self.shapes.append(f"{_place(info)}: found {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in dtypes:
            self.dtypes.append(f"{_place(info)}: found {info.dtype}, expected {' or '.join(dtypes)}")

    def raise_if_any(self, path: Path) -> None:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of the wrong shape": self.shapes,
            "of the wrong dtype": self.dtypes,
            f"scales without an {FP8} weight": self.orphans,
        }
        lines = []
        for kind, problems in kinds.items():
            if problems:
                lines.append(f"  {len(problems)} {kind}:")
                lines += [f"    {problem}" for problem in problems[:MAX_LISTED]]
                lines += ["    ..."] if len(problems) > MAX_LISTED else []
        if lines:
            lines.insert(0, f"{path}: the tensors do not fit the model that config.json describes:")
            raise CheckpointError("\n".join(lines))


def _place(info: TensorInfo) -> str:
    return f"{show(info.name)} in {info.file}"


def _kind(want: Expected) -> str:
    scaled = (f"{FP8} with scales",) if want.block_scaled_allowed else ()
    return f"{' or '.join((*want.dtypes, *scaled))} {list(want.shape)}"
