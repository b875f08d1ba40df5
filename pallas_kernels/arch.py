"""What a GPU is: the static numbers that kernels, plans and rooflines need. No JAX here, and no GPU is touched.

Sources: NVIDIA's datasheets and the CUDA documentation (compute-capability tables, architecture tuning guides), except
``copy_bandwidth``, which this project measured. Datasheet gigabytes are taken as 1e9 bytes; drivers report a few
percent more.
"""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024
_MIB = 1024 * 1024
_GB = 10**9

# CUDA programming guide, compute-capability table: the most shared memory that one block can opt in to.
_SMEM_OPT_IN = {80: 163 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB, 120: 99 * _KIB}


@dataclass(frozen=True)
class Arch:
    """One GPU model.

    Attributes:
      name: the name used here and on the command line, such as "H200-141".
      sm: compute capability times ten (90 for Hopper).
      num_sms: streaming multiprocessors enabled in this product.
      smem_per_block: bytes of shared memory that a block can opt in to.
      l2_bytes: bytes of L2 cache.
      memory_bytes: bytes of device memory, datasheet.
      bandwidth: bytes/s of device memory, datasheet.
      copy_bandwidth: bytes/s of a device-to-device copy, reads and writes counted, as measured; None where nobody
      measured.
    """

    name: str
    sm: int
    num_sms: int
    smem_per_block: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    copy_bandwidth: float | None = None

    @property
    def compute_capability(self) -> tuple[int, int]:
        return divmod(self.sm, 10)


def _arch(
    name: str, sm: int, num_sms: int, l2_mib: int, memory_gb: int, bandwidth: float, copy_bandwidth: float | None = None
) -> Arch:
    return Arch(name, sm, num_sms, _SMEM_OPT_IN[sm], l2_mib * _MIB, memory_gb * _GB, bandwidth, copy_bandwidth)


ARCHS: tuple[Arch, ...] = (
    _arch("A100-40", 80, 108, 40, 40, 1.555e12),  # A100 SXM4 40 GB datasheet
    _arch("A100-80", 80, 108, 40, 80, 2.039e12),  # A100 SXM4 80 GB datasheet
    _arch("H100-80", 90, 132, 50, 80, 3.35e12),  # H100 SXM5 datasheet (the PCIe and NVL boards are other products)
    _arch("H200-141", 90, 132, 50, 141, 4.8e12, 4.18e12),  # H200 SXM datasheet; copy measured, see shared facts
    # SMs as the driver reports them; L2 from the Blackwell tuning guide ("126 MB"); 8 TB/s a GPU is the DGX B200
    # datasheet's 64 / 8.
    _arch("B200-180", 100, 148, 126, 180, 8.0e12),  # as shipped in DGX and HGX B200: 1,440 GB in eight
    _arch("B200-192", 100, 148, 126, 192, 8.0e12),  # the announced size
    _arch("RTX 4090", 89, 128, 72, 24, 1.008e12),  # Ada whitepaper
    _arch("RTX PRO 6000", 120, 188, 128, 96, 1.792e12),  # Blackwell workstation datasheet
)
_BY_NAME = {arch.name.lower(): arch for arch in ARCHS}


def by_name(name: str) -> Arch:
    """Returns the GPU of that name (case does not matter); ValueError lists the known names."""
    try:
        return _BY_NAME[name.strip().lower()]
    except KeyError:
        raise ValueError(f"unknown GPU {name!r}: known are {', '.join(arch.name for arch in ARCHS)}") from None


def from_device_kind(kind: str) -> Arch | None:
    """Returns the GPU that ``jax.Device.device_kind`` names ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"), or None.

    None also for boards whose numbers differ from those listed (H100 PCIe and NVL, A100 PCIe): a wrong roofline is
    worse than none.
    "NVIDIA B200" is taken as the 180 GB one, which is what ships.
    """
    text = kind.upper().replace("NVIDIA", "").replace("GEFORCE", "").strip()
    if any(variant in text for variant in ("PCIE", "NVL", "LAPTOP", "MIG", "MAX-Q", "4090 D")):
        return None
    if text.startswith("A100"):
        return by_name("A100-40" if "40GB" in text else "A100-80") if "GB" in text else None
    for prefix, name in _PREFIXES:
        if text.startswith(prefix):
            return by_name(name)
    return None


_PREFIXES = (
    ("H100", "H100-80"),
    ("H200", "H200-141"),
    ("B200", "B200-180"),
    ("RTX 4090", "RTX 4090"),
    ("RTX PRO 6000", "RTX PRO 6000"),
)
