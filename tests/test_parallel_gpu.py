"""Several real GPUs give what one gives; for 2, 4 and 8 of them as far as there are. Run with -m "gpu and multigpu"."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, parallel
from glm52_jax.tiny import KERNEL_TINY, tiny_config, write_checkpoint
from tests import parallel_checks as checks

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

# cuBLAS may multiply a slice by another algorithm than the whole; not measured yet.
TOLERANCE = 1e-4
MODES = ("tp", "ep", "ep+dp")
# Kernel sizes whose slices on four GPUs are whole FP8 blocks.
KERNELS = {**KERNEL_TINY, "moe_intermediate_size": 512, "num_hidden_layers": 4, "first_k_dense_replace": 2}


def counts() -> list[int]:
    return [n for n in (2, 4, 8) if n <= jax.device_count()]


def test_float32_is_the_same_in_every_mode(tmp_path: Path) -> None:
    directory, ids = checks.write(tmp_path / "c", checks.FLOAT, "float32"), checks.tokens(70)
    one = glm52_jax.load(directory, dtype="float32")
    prompts = [ids[:5], ids[7:37], ids[3:4]]
    want = checks.generated(one, prompts, Sampling(temperature=0.0), 8)
    for devices in counts():
        for mode in MODES:
            model = checks.load(directory, mode, devices, dtype="float32")
            checks.assert_sliced(model, one)
            error = checks.assert_same_scores(model, one, ids, TOLERANCE)
            assert checks.generated(model, prompts, Sampling(temperature=0.0), 8) == want
            checks.assert_state_stays(model, prompts)
            print(f"{mode} {devices}: {error:.1e}")


def test_stacks_of_experts_are_filled_in_place() -> None:
    for devices in counts():
        checks.assert_placed_in_place(devices)


@pytest.mark.parametrize("mode", MODES)
def test_kernels_on_slices_are_as_exact_as_on_one_gpu(mode: str, tmp_path: Path) -> None:
    """bfloat16 with FP8 weights and caches, whose errors sums in another order move: both are held against float32."""
    write_checkpoint(directory := tmp_path / "c", tiny_config(**KERNELS), weights="fp8")
    ids = checks.tokens(48, tiny_config(**KERNELS))
    truth = np.asarray(glm52_jax.load(directory, dtype="float32").score(ids))
    one = glm52_jax.load(directory).score(ids)
    for devices in (n for n in counts() if n <= 4):
        got = glm52_jax.load(directory, mesh=parallel.make_mesh(devices), parallel=mode).score(ids)
        errors = [np.linalg.norm(np.asarray(a) - truth, axis=-1) / np.linalg.norm(truth, axis=-1) for a in (got, one)]
        shared, alone = (float(np.median(e)) for e in errors)
        print(f"{mode} {devices}: {shared:.2e}, one GPU {alone:.2e}")
        assert shared < 1.25 * alone + 1e-3


def test_multicast_is_off() -> None:
    assert os.environ["NCCL_NVLS_ENABLE"] == "0" and os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
