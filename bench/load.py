"""How fast a checkpoint reaches several GPUs, sliced: ``python -m bench.load``.

A synthetic FP8 checkpoint of GLM-5.2's widths (3 dense and 2 sparse layers, fewer experts where the time is short) is written and
so lies in the page cache. Beside the load stands how fast one thread, and several, copy the same files out of the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import records, several
from bench.records import FigureFile
from glm52_jax import parallel, tiny
from glm52_jax.checkpoint import Checkpoint
from glm52_jax.config import Config
from glm52_jax.loader import load_weights
from pallas_kernels.lowering import default_arch

MODES = ("tp", "ep")
# Of the page-cache rate of one thread.
TARGET = 0.6
_CHUNK = 1 << 26
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Figure:
    """One load. bytes: of the files; seconds: of ``load_weights``, its arrays ready; gb_s: bytes over that; cache_gb_s: of one
    thread that reads the same files from the page cache, cache_threads_gb_s: of eight; share: gb_s / cache_gb_s."""

    mode: str
    devices: int
    experts: int
    bytes: int
    seconds: float
    gb_s: float
    cache_gb_s: float
    cache_threads_gb_s: float
    share: float
    target_share: float
    run: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.mode, self.devices, self.experts)


FILE = FigureFile("load", Figure, "figures of loading")


def config_of(experts: int, **sizes: Any) -> dict[str, Any]:
    """config.json of three dense and two sparse layers at GLM-5.2's widths, with a small vocabulary."""
    real = {
        **{"vocab_size": 8192, "hidden_size": 6144, "num_hidden_layers": 5, "num_attention_heads": 64},
        **{
            "q_lora_rank": 2048,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
        },
        **{"intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 3},
        **{"n_routed_experts": experts, "num_experts_per_tok": 8, "index_topk": 2048, "index_n_heads": 32},
        **{"index_head_dim": 128, "num_nextn_predict_layers": 0},
    }
    return tiny.tiny_config(**{**real, **sizes})


def write(directory: Path, config: dict[str, Any], shards: int = 4) -> int:
    """Writes a checkpoint whose numbers mean nothing, quickly; returns its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    specs = tiny.tensor_specs(config)
    tiny._write_json(
        directory / "config.json",
        {**config, "dtype": "bfloat16", "quantization_config": tiny.quantization_config(specs)},
    )
    plan = tiny._plan(specs, "fp8")
    largest = max(int(np.prod(shape)) * tiny.DTYPES[kind].itemsize for kind, shape in plan.values())
    # No byte above 0x3f: finite, and positive where it is a scale.
    noise = (np.random.default_rng(0).integers(0, 256, largest, np.uint8) & 0x3F) | 0x01

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, (kind, shape) in plan.items():
            dtype = tiny.DTYPES[kind]
            yield name, noise[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    tiny._write_safetensors(directory, plan, tensors(), shards)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def cache_rate(directory: Path, threads: int) -> float:
    """Bytes/s of reading all files from the page cache into buffers that are used again."""
    parts = [
        (file, at) for file in sorted(directory.glob("*.safetensors")) for at in range(0, file.stat().st_size, _CHUNK)
    ]

    def read(mine: list[tuple[Path, int]]) -> int:
        buffer, total = bytearray(_CHUNK), 0
        for file, at in mine:
            with open(file, "rb", buffering=0) as stream:
                stream.seek(at)
                total += stream.readinto(buffer) or 0
        return total

    shares = [parts[i::threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        total = sum(pool.map(read, shares))
        return total / (time.perf_counter() - start)


def load(directory: Path, mode: str, devices: int) -> float:
    """Seconds of one load."""
    share = parallel.share(parallel.make_mesh(devices), mode)
    with Checkpoint.open(directory) as checkpoint:
        config = Config.from_hf(checkpoint.config)
        start = time.perf_counter()
        jax.block_until_ready(load_weights(checkpoint, config, parallel=share))
        return time.perf_counter() - start


def measure(directory: Path, mode: str, devices: int, experts: int, repeats: int = 2) -> Figure:
    """The fastest of some loads: the first compiles its programs."""
    nbytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    one, several_threads = (max(cache_rate(directory, n) for _ in range(2)) for n in (1, _THREADS))
    seconds = min(load(directory, mode, devices) for _ in range(repeats))
    rate = nbytes / seconds
    return Figure(
        mode=mode, devices=devices, experts=experts, bytes=nbytes, seconds=round(seconds, 3), gb_s=round(rate / 1e9, 3),
        cache_gb_s=round(one / 1e9, 3), cache_threads_gb_s=round(several_threads / 1e9, 3), share=round(rate / one, 3),
        target_share=TARGET,
    )  # fmt: skip


def table(figures: Sequence[Figure]) -> list[str]:
    """Markdown: one line a load."""
    lines = [
        "| shared | GPUs | experts | GB | s | GB/s | page cache, 1 thread | 8 threads | share of 1 thread | target |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return lines + [
        f"| {f.mode} | {f.devices} | {f.experts} | {f.bytes / 1e9:.2f} | {f.seconds:.2f} | {f.gb_s:.2f} | {f.cache_gb_s:.2f} | "
        f"{f.cache_threads_gb_s:.2f} | {f.share:.0%} | {f.target_share:.0%} |"
        for f in figures
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, loads, prints and records; 2 without the GPUs."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, help="all of them unless given")
    parser.add_argument("--modes", default=",".join(MODES), help="default %(default)s")
    parser.add_argument("--experts", type=int, default=256, help="of a sparse layer (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written if it is not there")
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint and end")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where records are kept")
    options = parser.parse_args(arguments)
    show = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "config.json").exists():
            start = time.perf_counter()
            nbytes = write(folder, config_of(options.experts))
            show(f"wrote {nbytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
        if options.write_only:
            return 0
        devices = options.devices or jax.device_count()
        if default_arch() is None or not 2 <= devices <= jax.device_count():
            show(f"bench.load: {devices} GPUs, at least 2, are needed; JAX sees {jax.devices()}")
            return 2
        results = several.Results(FILE, options.results, table, show)
        for mode in options.modes.split(","):
            figure = measure(folder, mode, devices, options.experts)
            results.keep(devices, [dataclasses.replace(figure, run=results.name)])
            show(table([figure])[-1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
