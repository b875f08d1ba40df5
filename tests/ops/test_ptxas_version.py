"""ptxas is asked once, however often it is wanted."""

import types

import pytest
from jax.experimental.mosaic.gpu import fragmented_array

from pallas_kernels import ptxas_version


def test_the_version_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask() -> int:
        asked.append(1)
        return 90

    extension = types.SimpleNamespace(_get_ptxas_isa_version=ask)
    monkeypatch.setattr(fragmented_array, "mgpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    ptxas_version.install()
    ptxas_version.install()
    assert [extension._get_ptxas_isa_version() for _ in range(3)] == [90] * 3 and len(asked) == 1


def test_without_the_plugin_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragmented_array, "mgpu_lib", None)
    ptxas_version.install()
