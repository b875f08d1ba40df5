"""The MLA layer at GLM-5.2's sizes on a GPU: kernels against references, first call against replays of the graph."""

import jax
import pytest

from bench import layer

pytestmark = pytest.mark.gpu

# Operations of the layer whose reference must not have served.
KERNELS = {"fp8_linear", "mla_front", "sparse_mla", "mla_out"}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
def test_layer_of_kernels_equals_the_references(arithmetic: str, rows: int) -> None:
    """``layer.check`` compares the last layer of three and refuses where the bits of later calls differ from the first's."""
    spec = layer.LayerSpec(rows=rows, arithmetic=arithmetic)
    result, choices = layer.check(spec, *layer.inputs(spec, jax.random.key(rows)))
    print(f"{arithmetic} rows={rows}: {result}")
    assert result.ok and result.tolerance == layer.TOLERANCE[arithmetic], result
    served = {choice.operation: choice.backend for choice in choices}
    assert served.keys() >= KERNELS and "reference" not in served.values(), served
