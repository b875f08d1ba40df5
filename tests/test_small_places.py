"""Places for small arrays."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from glm52_jax.small_places import PIECES, small_places


def test_every_place_has_neighbours_that_stay() -> None:
    kept = small_places(SingleDeviceSharding(jax.devices()[0]))
    sizes = [array.nbytes for array in kept]
    assert {size: sizes.count(size) - 1 for size in set(sizes)} == PIECES
    assert sum(size * (2 * count + 1) for size, count in PIECES.items()) < 1e6
    assert small_places(SingleDeviceSharding(jax.devices()[0])) is kept


def test_all_devices_of_a_mesh_have_them() -> None:
    devices = jax.devices()[:2]
    kept = small_places(NamedSharding(Mesh(np.array(devices), ("d",)), PartitionSpec()))
    assert all(array.devices() == set(devices) for array in kept)
